"""The doctor: what has to be right before going live, and what about a Redis would lose sessions."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import redis
from flask import Flask
from redis.exceptions import NoPermissionError

from app.config import Config
from app.store import SessionNotFound, SessionStore, StoreUnavailable, TooManySessions
from app.store.connect import POOL_SIZE

UNSET = {
    "metrics_token": "METRICS_TOKEN is not set: /metrics is open to all who reach the service; off removes it",
    "jwt_issuer": "JWT_ISSUER is not set: who has issued a token is not checked",
    "jwt_audience": "JWT_AUDIENCE is not set: tokens that were issued for other services are taken, too",
    "trusted_proxies": "TRUSTED_PROXIES is 0: behind a proxy every session would have the proxy's address",
}
# Causes of common errors of a first attempt: a pattern of the error's text, and what to do. The first match is told.
# What servers say comes before time-outs: of several sentinels one may say what is wrong and another nothing.
HINTS = {
    "self[- ]signed|unable to get (local )?issuer": "set REDIS_CA_CERTS to its authority, or REDIS_TLS_VERIFY=off",
    "mismatch|doesn't match": "its certificate is for another host: name that one in REDIS_URL",
    "certificate has expired": "its certificate has to be renewed",
    "wrong.version.number|record layer": "it does not speak TLS on this port: redis:// instead of rediss://",
    "closed by server|reset by peer": "if it speaks TLS on this port: rediss:// instead of redis://",
    "to run the": "give the user the rights that docs/operate.md lists",
    "access one of the keys": "give the user the keys ~session*",
    "invalid (username|password)|WRONGPASS": "user or password in REDIS_URL are wrong",
    "Authentication required|NOAUTH": "REDIS_URL needs a password: redis://:password@host",
    "DB index is out of range": "REDIS_URL ends in a database that is not there; 0 always is",
    "MOVED|CLUSTERDOWN|cluster mode": "a cluster needs redis+cluster:// or rediss+cluster:// in REDIS_URL",
    "cluster support disabled": "this is no cluster: redis:// or rediss:// in REDIS_URL",
    "READONLY|read only replica": "name the primary in REDIS_URL",
    "unknown command.*SENTINEL": "this is no sentinel: redis:// or rediss:// in REDIS_URL",
    "No such master": "the path of REDIS_URL names the service that sentinels know",
    "Name or service|name resolution|nodename|No address": "no such host: look at REDIS_URL",
    "refused": "nothing listens there: look at host and port in REDIS_URL",
    "not acknowledged": "REDIS_WAIT_REPLICAS asks for more replicas than the primary has, or one of them hangs",
    "max number of clients": "raise maxclients, or lower WEB_CONCURRENCY",
    "Timeout": "a firewall may be in the way, or only one of the two speaks TLS",
}


class Finding(NamedTuple):
    """What an operator should know: `ok`, `warning` or `failure`. One that is `fatal` prevents a start."""

    level: str
    text: str
    fatal: bool = False


def examine(app: Flask) -> Iterator[Finding]:
    """All that has to be right: configuration, Redis, keys, and the life of a session of the subject `doctor`."""
    yield Finding("ok", "The configuration is complete")
    yield from (Finding("warning", text) for name, text in UNSET.items() if not getattr(app.extensions["config"], name))
    yield from examine_redis(app)
    if app.extensions["keys"].loaded:
        yield Finding("ok", "Signing keys are loaded")
    else:
        yield Finding("failure", f"No signing key could be loaded: {app.extensions['keys'].error}")
    store: SessionStore = app.extensions["session_store"]
    try:
        id = store.open("doctor", login_method="doctor", idle_timeout=60).id
        store.heartbeat("doctor", id)
        store.revoke("doctor", id)
        yield Finding("ok", "A session was opened, kept alive and revoked")
    except (StoreUnavailable, SessionNotFound, TooManySessions) as error:
        reason = _with_hint(f"{type(error).__name__} {error}".strip())
        yield Finding("failure", f"A session could not be opened, kept alive and revoked: {reason}")


def examine_redis(app: Flask) -> Iterator[Finding]:
    """Ask every primary whether it answers, and look for what would lose sessions or keep the service from working."""
    config: Config = app.extensions["config"]
    try:
        for client in app.extensions["servers"].clients():
            info = _allowed(client.info)  # opens the connection
            began = time.perf_counter()
            with suppress(NoPermissionError):  # it answers all the same
                client.ping()
            milliseconds = (time.perf_counter() - began) * 1000
            version = info.get("redis_version", "of unknown version")
            yield Finding("ok", f"Redis {version} answers in {milliseconds:.2f} ms")
            # Where INFO is forbidden: only a cluster answers CLUSTER MYID.
            in_cluster = info.get("cluster_enabled") or (not info and _allowed(client.execute_command, "CLUSTER MYID"))
            if in_cluster and "+cluster:" not in config.redis_url:
                text = "Redis is a cluster: REDIS_URL must begin with redis+cluster://, or rediss+cluster:// over TLS"
                yield Finding("failure", text, fatal=True)
            yield from _shortcomings(info, _allowed(client.config_get, "save"), config.web_concurrency)
    except (redis.RedisError, OSError) as error:
        yield Finding("failure", _with_hint(f"Redis does not answer: {type(error).__name__}: {error}"))


def _allowed(ask: Callable[..., Any], *asked: str) -> Any:
    """An answer, or an empty one where Redis refuses the question, as hosted ones do with some."""
    try:
        return ask(*asked)
    except redis.ResponseError:
        return {}


def _shortcomings(info: dict[str, Any], config: dict[str, Any], workers: int) -> Iterator[Finding]:
    """What is wrong with a Redis by its INFO and CONFIG; what they do not tell is taken to be well."""
    version = str(info.get("redis_version", "7"))
    if int(version.partition(".")[0]) < 7:
        yield Finding("failure", f"Redis {version} is too old: 7.0 or later is needed", fatal=True)
    if info.get("role") == "slave":
        primary = f"{info.get('master_host')}:{info.get('master_port')}"
        yield Finding("warning", f"Redis is a read-only replica: REDIS_URL must name the primary, {primary}")
    # Expiries go by Redis's clock, tokens by ours.
    redis_time = info.get("server_time_usec", time.time() * 1e6) / 1e6
    if (skew := abs(redis_time - time.time())) > 5:
        yield Finding("warning", f"Redis's clock is {skew:.1f} s off this one")
    # While workers are replaced the old ones and the new ones have connections.
    needed = 2 * POOL_SIZE * workers
    if (most := info.get("maxclients", needed)) < needed:
        yield Finding("warning", f"Redis takes {most} clients: {workers} workers may need {needed} while they restart")
    if (policy := info.get("maxmemory_policy", "noeviction")) != "noeviction":
        yield Finding("warning", f"Redis may evict live sessions: maxmemory-policy is {policy}, not noeviction")
    if not (info.get("aof_enabled", True) or config.get("save", True) or info.get("connected_slaves")):
        yield Finding("warning", "Redis has neither persistence nor a replica: a restart ends all sessions")


def _with_hint(trouble: str) -> str:
    for pattern, hint in HINTS.items():
        if re.search(pattern, trouble):
            return f"{trouble} ({hint})"
    return trouble
