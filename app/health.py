"""Liveness, which asks nobody, readiness, which asks Redis, and what about a Redis would lose sessions."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import redis
from flask import Blueprint, Response, current_app, jsonify

from app.connection import Servers
from app.store import StoreUnavailable

bp = Blueprint("health", __name__)


@bp.get("/healthz")
def liveness() -> dict[str, str]:
    """Whether this process answers."""
    return {"status": "ok"}


@bp.get("/readyz")
def readiness() -> Response | tuple[Response, int]:
    """Whether this process can serve sessions: Redis answers, within the configured timeout."""
    try:
        current_app.extensions["session_store"].ping()
    except StoreUnavailable:
        return jsonify(status="unavailable", success=False, error="Redis does not answer"), 503
    return jsonify(status="ok")


class Finding(NamedTuple):
    """What an operator should know about a Redis; a fatal one keeps the service from starting."""

    text: str
    fatal: bool = False


def inspect(servers: Servers) -> Iterator[Finding]:
    """Ask every primary whether it is there and whether it would lose sessions, within the configured timeouts."""
    try:
        for client in servers.clients():
            client.ping()
            yield from _inspect(client)
    except (redis.RedisError, OSError) as error:
        yield Finding(f"Redis does not answer: {type(error).__name__}: {error}")


def _inspect(client: redis.Redis) -> Iterator[Finding]:
    info = _allowed(client.info)
    version = str(info.get("redis_version", "7.0"))
    if int(version.partition(".")[0]) < 7:
        yield Finding(f"Redis {version} is too old: 7.0 or later is needed", fatal=True)
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        yield Finding(f"Redis may evict live sessions: maxmemory-policy is {policy}, not noeviction")
    saves = _allowed(lambda: client.config_get("save")).get("save", "unknown")
    if not (info.get("aof_enabled", 1) or saves or info.get("connected_slaves")):
        yield Finding("Redis has neither persistence nor a replica: a restart ends all sessions")


def _allowed(ask: Callable[[], Any]) -> dict[str, Any]:
    """An answer, or an empty one where a hosted Redis forbids the question."""
    try:
        return ask()  # type: ignore[no-any-return]
    except redis.ResponseError:
        return {}
