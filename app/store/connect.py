"""From a URL to Redis: one server, Sentinel, Cluster or in-process; timeouts and retries all explicit."""

import logging
import socket
import ssl
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.config import Config
from app.store.cluster import Cluster
from app.store.sentinel import BehindSentinel
from app.store.server import OnePrimary, set_up

log = logging.getLogger(__name__)

# Per worker and server. A heartbeat holds one for well under a millisecond; small Redis plans allow 20 clients in all.
POOL_SIZE = 10

Servers = OnePrimary | Cluster


def connect(config: Config) -> Servers:
    """The servers behind `config.redis_url`; none of them has to be there yet.

    A call waits half the configured timeout for a connection out of the pool and the whole of it for an answer. The
    clients repeat nothing; the caller knows what may be repeated.
    """
    url, scheme = config.redis_url, config.redis_url.partition(":")[0]
    if scheme == "memory":
        return OnePrimary(_in_process())
    options: dict[str, Any] = {
        "socket_timeout": config.redis_timeout_seconds,
        "socket_connect_timeout": config.redis_timeout_seconds,
        "retry": Retry(NoBackoff(), 0),
        # RESP3 would come with maintenance notifications, which switch off the check for stale connections.
        "protocol": 2,
        "driver_info": None,  # spares each new connection the two round trips of CLIENT SETINFO
        "redis_connect_func": set_up,
        "max_connections": POOL_SIZE,
        "timeout": config.redis_timeout_seconds / 2,
        "decode_responses": True,
        # What is no UTF-8 must not fail the other replies of a pipeline: it becomes lone surrogates, which valid text
        # never has.
        "encoding_errors": "surrogateescape",
    }
    if scheme.startswith("rediss"):
        options["connection_class"] = _tls_connection(config)
    if scheme.endswith("+cluster"):
        return Cluster(url, options)
    if scheme.endswith("+sentinel"):
        return BehindSentinel(url, options)
    return OnePrimary(redis.Redis(connection_pool=redis.BlockingConnectionPool.from_url(url, **options)))


def _tls_connection(config: Config) -> type[redis.Connection]:
    """Connections that verify certificates by the system's authorities, by REDIS_CA_CERTS instead, or not at all.

    Private to redis-py: `_wrap_socket_with_ssl`. By itself it would trust the system's authorities besides those that
    it is given, and read all of them anew for each connection.
    """
    context = ssl.create_default_context(cadata=config.redis_ca_certs)
    if not config.redis_tls_verify:
        log.warning("redis_tls_not_verified")
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    class TLSConnection(redis.SSLConnection):
        def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
            return context.wrap_socket(sock, server_hostname=self.host)

    return TLSConnection


def _in_process() -> redis.Redis:
    # Imported here: nothing else needs it, and it brings a Lua interpreter along.
    import fakeredis

    return fakeredis.FakeRedis(server=fakeredis.FakeServer(server_type="redis"), decode_responses=True)
