"""Liveness, which asks nobody, readiness, which asks Redis, and what about a Redis would lose sessions."""

import time
from collections.abc import Callable, Iterator
from statistics import median
from timeit import repeat
from typing import Any, NamedTuple

import redis
from flask import Blueprint, Response, current_app, jsonify

from app.connection import Servers
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
def readiness() -> Response | tuple[Response, int]:
    """Whether this process can serve sessions: Redis answers, within the configured timeout.
    ---
    responses:
      200: {example: {status: ok}}
      503: {description: Not now, example: {status: unavailable, success: false, error: Redis does not answer}}
    """
    try:
        current_app.extensions["session_store"].ping()
    except StoreUnavailable:
        return jsonify(status="unavailable", success=False, error="Redis does not answer"), 503
    return jsonify(status="ok")


class Finding(NamedTuple):
    """What an operator should know: `ok`, `warning`, or `failure`, which keeps the service from starting."""

    level: str
    text: str


def inspect(servers: Servers) -> Iterator[Finding]:
    """Ask every primary whether it is there and whether it would lose sessions, within the configured timeouts."""
    try:
        for client in servers.clients():
            client.ping()  # opens the connection
            seconds = median(repeat(client.ping, number=1, repeat=9))
            yield Finding("ok", f"Redis answers in {seconds * 1000:.2f} ms")
            yield from _findings(_allowed(client.info), _allowed(lambda: client.config_get("save")))
    except (redis.RedisError, OSError) as error:
        yield Finding("warning", f"Redis does not answer: {type(error).__name__}: {error}")


def _findings(info: dict[str, Any], config: dict[str, Any]) -> Iterator[Finding]:
    if version := str(info.get("redis_version", "")):
        old = int(version.partition(".")[0]) < 7
        yield Finding("failure" if old else "ok", f"Redis {version}" + " is too old: 7.0 or later is needed" * old)
    if "server_time_usec" in info:
        skew = info["server_time_usec"] / 1e6 - time.time()
        # Expiries go by Redis's clock, tokens by ours.
        yield Finding("warning" if abs(skew) > 5 else "ok", f"Redis's clock is {skew:+.1f} s off this one")
    if (policy := info.get("maxmemory_policy", "noeviction")) != "noeviction":
        yield Finding("warning", f"Redis may evict live sessions: maxmemory-policy is {policy}, not noeviction")
    if not (info.get("aof_enabled", 1) or config.get("save", "unknown") or info.get("connected_slaves")):
        yield Finding("warning", "Redis has neither persistence nor a replica: a restart ends all sessions")


def _allowed(ask: Callable[[], Any]) -> dict[str, Any]:
    """An answer, or an empty one where a hosted Redis forbids the question."""
    try:
        return ask()  # type: ignore[no-any-return]
    except redis.ResponseError:
        return {}
