"""The doctor: what has to be right before going live, and what about a Redis would lose sessions."""

import time
from collections.abc import Callable, Iterator
from statistics import median
from timeit import repeat
from typing import Any, NamedTuple

import redis
from flask import Flask

from app.connection import Servers
from app.store import SessionNotFound, SessionStore, StoreUnavailable, TooManySessions


class Finding(NamedTuple):
    """What an operator should know: `ok`, `warning`, or `failure`, which keeps the service from starting."""

    level: str
    text: str


def examine_app(app: Flask) -> Iterator[Finding]:
    """All that has to be right: configuration, Redis, keys, and the life of a session of the subject `doctor`."""
    yield Finding("ok", "The configuration is complete")
    yield from examine(app.extensions["servers"])
    if app.extensions["keys"].loaded:
        yield Finding("ok", "Signing keys are loaded")
    else:
        yield Finding("failure", "No signing key could be loaded from JWT_JWKS_URL")
    store: SessionStore = app.extensions["session_store"]
    try:
        id = store.open("doctor", login_method="doctor", idle_timeout=60).id
        store.heartbeat("doctor", id)
        store.revoke("doctor", id)
        yield Finding("ok", "A session was opened, kept alive and revoked")
    except (StoreUnavailable, SessionNotFound, TooManySessions) as error:
        reason = f"{type(error).__name__} {error}".strip()
        yield Finding("failure", f"A session could not be opened, kept alive and revoked: {reason}")


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
