"""Liveness, which asks nobody, readiness, which asks Redis, and what about a Redis would lose sessions."""

import time
from collections.abc import Callable, Iterator
from statistics import median
from timeit import repeat
from typing import Any, NamedTuple

import redis
from flask import Blueprint, Response, current_app, jsonify

from app.connection import Servers
from app.errors import error, retry_after
from app.store import StoreUnavailable

bp = Blueprint("health", __name__)


@bp.get("/healthz")
def liveness() -> dict[str, str]:
    """Whether this process answers.
    ---
    responses: {200: {example: {status: ok}}}
    """
    return {"status": "ok"}


@bp.get("/readyz")
def readiness() -> Response:
    """Whether this process can serve sessions: Redis answers, within 1.5 seconds.
    ---
    responses:
      200: {example: {status: ok}}
      503:
        description: Not now
        headers: {Retry-After: {required: true, schema: {type: integer, minimum: 1}, description: Seconds}}
        example: {success: false, error: Redis does not answer, status: unavailable}
    """
    try:
        current_app.extensions["session_store"].ping()
    except StoreUnavailable:
        return error(503, "Redis does not answer", retry_after(1), status="unavailable")
    return jsonify(status="ok")


class Finding(NamedTuple):
    """What an operator should know: `ok`, `warning`, or `failure`, which keeps the service from starting."""

    level: str
    text: str


def examine(servers: Servers) -> Iterator[Finding]:
    """Ask every primary whether it is there and whether it would lose sessions, within the configured timeouts."""
    try:
        for client in servers.clients():
            client.ping()  # opens the connection
            seconds = median(repeat(client.ping, number=1, repeat=9))
            yield Finding("ok", f"Redis answers in {seconds * 1000:.2f} ms")
            yield from _findings(_allowed(client.info), _allowed(lambda: client.config_get("save")))
    except (redis.RedisError, OSError) as trouble:
        yield Finding("warning", f"Redis does not answer: {type(trouble).__name__}: {trouble}")


def _findings(info: dict[str, Any], config: dict[str, Any]) -> Iterator[Finding]:
    if version := str(info.get("redis_version", "")):
        old = int(version.partition(".")[0]) < 7
        yield Finding("failure" if old else "ok", f"Redis {version}" + " is too old: 7.0 or later is needed" * old)
    if "server_time_usec" in info:
        skew = abs(info["server_time_usec"] / 1e6 - time.time())
        # Expiries go by Redis's clock, tokens by ours.
        yield Finding("warning" if skew > 5 else "ok", f"Redis's clock is {skew:.1f} s off this one")
    if policy := info.get("maxmemory_policy"):
        evicts = policy != "noeviction"
        text = f"Redis may evict live sessions: maxmemory-policy is {policy}, not noeviction"
        yield Finding("warning", text) if evicts else Finding("ok", "Redis evicts nothing")
    if "aof_enabled" in info:
        replicas, kept = info.get("connected_slaves", 0), "on disk"
        if not (info["aof_enabled"] or config.get("save")):
            kept = "in memory only" if config else "on disk or not, CONFIG is forbidden"
        if kept == "in memory only" and not replicas:
            yield Finding("warning", "Redis has neither persistence nor a replica: a restart ends all sessions")
        else:
            yield Finding("ok", f"Redis keeps its data {kept}; replicas: {replicas}")


def _allowed(ask: Callable[[], Any]) -> dict[str, Any]:
    """An answer, or an empty one where a hosted Redis forbids the question."""
    try:
        return ask()  # type: ignore[no-any-return]
    except redis.ResponseError:
        return {}
