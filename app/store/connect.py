"""From a URL to Redis: one server, Sentinel, Cluster or in-process; timeouts and retries all explicit."""

import logging
from collections.abc import Collection, Sequence
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AskError, ReadOnlyError
from redis.retry import Retry

from app.config import Config
from app.store.cluster import Cluster
from app.store.handshake import set_up
from app.store.sentinel import by_sentinel

log = logging.getLogger(__name__)

# Per worker and server. A heartbeat holds one for well under a millisecond; small Redis plans allow 20 clients in all.
POOL_SIZE = 10


class OnePrimary:
    """One server at a fixed address, or whichever Sentinel says is the primary: all keys are there."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def client_for(self, key: str) -> redis.Redis:
        """The client of the server that holds a key."""
        return self._client

    def clients(self) -> Sequence[redis.Redis]:
        """The clients of all servers that take writes."""
        return [self._client]

    def addresses(self) -> Collection[str]:
        """The addresses of all servers that take writes."""
        return [address_of(self._client)]

    def follow(self, redirection: AskError, command: Sequence[Any]) -> Any:
        """Only a cluster redirects."""
        raise redirection

    def failed(self, error: Exception) -> None:
        """Take notice of trouble with a server."""
        if isinstance(error, ReadOnlyError):
            # The primary has moved to another host under the same name; only a new connection finds it. Connections
            # in use are left alone: their users meet the same error and close them.
            self._client.connection_pool.disconnect(inuse_connections=False)


Servers = OnePrimary | Cluster


def address_of(client: redis.Redis) -> str:
    """A server's address for logs: host and port, a socket's path, or for Sentinel just the primary."""
    options = client.get_connection_kwargs()
    host = f"{options['host']}:{options.get('port')}" if "host" in options else "the primary"
    return options.get("path") or host


def connect(config: Config) -> Servers:
    """The servers behind `config.redis_url`. They are reached when they are first used, and again after trouble.

    A call waits half the configured timeout for a connection out of the pool and the whole of it for an answer. The
    clients repeat nothing; the caller knows what may be repeated.
    """
    url = urlsplit(config.redis_url)
    if url.scheme == "memory":
        return OnePrimary(_in_process())
    connection: dict[str, Any] = {
        "socket_timeout": config.redis_timeout_seconds,
        "socket_connect_timeout": config.redis_timeout_seconds,
        "retry": Retry(NoBackoff(), 0, supported_errors=(redis.ConnectionError,)),
        # RESP3 would come with maintenance notifications, which switch off the check for stale connections.
        "protocol": 2,
        "driver_info": None,  # spares each new connection the two round trips of CLIENT SETINFO
        "redis_connect_func": set_up,
        **(_tls(config) if url.scheme.startswith("rediss") else {}),
    }
    pool: dict[str, Any] = {
        "max_connections": POOL_SIZE,
        "timeout": config.redis_timeout_seconds / 2,
        "decode_responses": True,
        # What is no UTF-8 must not fail the other replies of a pipeline: it becomes lone surrogates, which valid text
        # never has.
        "encoding_errors": "surrogateescape",
    }
    if url.scheme.endswith("+cluster"):
        return Cluster(config.redis_url, {**connection, **pool})
    if url.scheme.endswith("+sentinel"):
        return OnePrimary(by_sentinel(config.redis_url, connection, pool))
    return OnePrimary(
        redis.Redis(connection_pool=redis.BlockingConnectionPool.from_url(config.redis_url, **connection, **pool))
    )


def _tls(config: Config) -> dict[str, Any]:
    """Options: verify certificates against the system's authorities, against REDIS_CA_CERTS, or not at all."""
    if not config.redis_tls_verify:
        log.warning("redis_tls_not_verified")
        return {"ssl_cert_reqs": "none"}
    pinned = config.redis_ca_certs
    if pinned and pinned.startswith("-----BEGIN"):
        return {"ssl_ca_data": pinned}
    return {"ssl_ca_certs": pinned}


def _in_process() -> redis.Redis:
    # Imported here: nothing else needs it, and it brings a Lua interpreter along.
    import fakeredis

    return fakeredis.FakeRedis(server=fakeredis.FakeServer(server_type="redis"), decode_responses=True)
