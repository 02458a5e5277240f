"""From a URL to Redis: one server, Sentinel, Cluster or in-process; timeouts and retries said out loud."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import ReadOnlyError, RedisClusterException, RedisError
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool, SentinelManagedConnection

from app.config import Config, addresses_of

log = logging.getLogger(__name__)

# Per worker. A heartbeat holds one for well under a millisecond; small Redis plans allow 20 clients in all.
POOL_SIZE = 10
# Per worker and node, where redis-py has no queue: who finds all of them in use is told so at once.
CLUSTER_POOL_SIZE = 100


class Single:
    """One server at a fixed address, or whichever Sentinel says is the primary: all keys are there."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def client_for(self, key: str) -> redis.Redis:
        """The client of the server that holds a key."""
        return self._client

    def clients(self) -> Sequence[redis.Redis]:
        """The clients of all servers that take writes."""
        return [self._client]

    def follow(self, command: Sequence[Any]) -> Any:
        """Send a command where a server has redirected us; only a cluster redirects."""
        return self._client.execute_command(*command)

    def failed(self, error: Exception) -> None:
        """Take notice of trouble with a server."""
        if isinstance(error, ReadOnlyError):
            # The primary has moved to another host under the same name; only a new connection finds it.
            self._client.connection_pool.disconnect()


class Cluster:
    """A Redis Cluster: each key's slot says which primary has it. The map of slots is renewed after trouble."""

    RENEW_EVERY = 0.2  # seconds between two renewals at the least

    def __init__(self, connect: Callable[[], RedisCluster]) -> None:
        self._connect = connect
        self._cluster: RedisCluster | None = None
        self._renewing = threading.Lock()
        self._renew()

    def client_for(self, key: str) -> redis.Redis:
        """The client of the primary that holds a key. Raises redis.ConnectionError while nobody knows which."""
        try:
            cluster = self._reached()
            return cluster.get_redis_connection(cluster.get_node_from_key(key))
        except RedisClusterException as error:
            self._renew_soon()
            raise redis.ConnectionError(str(error)) from error

    def clients(self) -> Sequence[redis.Redis]:
        """The clients of all primaries. Raises redis.ConnectionError while they are not known."""
        cluster = self._reached()
        return [cluster.get_redis_connection(node) for node in cluster.get_primaries()]

    def follow(self, command: Sequence[Any]) -> Any:
        """Send a command where MOVED or ASK points to, and learn from it."""
        try:
            return self._reached().execute_command(*command)
        except RedisClusterException as error:
            raise redis.ConnectionError(str(error)) from error

    def failed(self, error: Exception) -> None:
        """Take notice of trouble with a server: another one may have taken its place."""
        self._renew_soon()

    def _reached(self) -> RedisCluster:
        if self._cluster is None:
            self._renew_soon()
            raise redis.ConnectionError("no node of the cluster has answered yet")
        return self._cluster

    def _renew_soon(self) -> None:
        # In the background: asking a dead node costs a timeout, which nobody's request should pay for.
        if self._renewing.acquire(blocking=False):
            threading.Thread(target=self._renew_and_rest, name="slots", daemon=True).start()

    def _renew_and_rest(self) -> None:
        try:
            self._renew()
            time.sleep(self.RENEW_EVERY)
        finally:
            self._renewing.release()

    def _renew(self) -> None:
        try:
            if self._cluster is None:
                self._cluster = self._connect()
            else:
                self._cluster.nodes_manager.initialize(disconnect_startup_nodes_pools=False)
        except (RedisError, RedisClusterException, OSError) as error:
            log.warning("slots_not_renewed", extra={"reason": type(error).__name__})


Servers = Single | Cluster


def connect(config: Config) -> Servers:
    """The servers behind `config.redis_url`. They are reached when they are first used, and again after trouble.

    A call waits half the configured timeout for a connection out of the pool and the whole of it for an answer. One
    that times out is not repeated, since a server that hangs would only hang again.
    """
    url = urlsplit(config.redis_url)
    if url.scheme == "memory":
        return Single(_in_process())
    timeouts: dict[str, Any] = {
        "socket_timeout": config.redis_timeout_seconds,
        "socket_connect_timeout": config.redis_timeout_seconds,
        # RESP3 would come with maintenance notifications, which switch off the check for stale connections.
        "protocol": 2,
    }
    queue: dict[str, Any] = {
        "max_connections": POOL_SIZE,
        "timeout": config.redis_timeout_seconds / 2,
        "decode_responses": True,
    }
    credentials = {"username": unquote(url.username or "") or None, "password": unquote(url.password or "") or None}
    if url.scheme == "redis+sentinel":
        return Single(_by_sentinel(config, credentials, timeouts, queue))
    if url.scheme == "redis+cluster":
        nodes = [ClusterNode(host, port) for host, port in addresses_of(config.redis_url)]
        options: dict[str, Any] = {
            **credentials,
            **timeouts,
            "decode_responses": True,
            "max_connections": CLUSTER_POOL_SIZE,
        }
        return Cluster(lambda: RedisCluster(startup_nodes=list(nodes), retry=_retries(0), **options))
    tls = _tls(config) if url.scheme == "rediss" else {}
    pool = redis.BlockingConnectionPool.from_url(config.redis_url, retry=_retries(1), **timeouts, **queue, **tls)
    return Single(redis.Redis(connection_pool=pool))


def _retries(number: int) -> Retry:
    return Retry(NoBackoff(), number, supported_errors=(redis.ConnectionError,))


def _tls(config: Config) -> dict[str, Any]:
    """Certificates are verified against the system's authorities, or one that is pinned, or not at all."""
    if not config.redis_tls_verify:
        log.warning("redis_tls_not_verified")
        return {"ssl_cert_reqs": "none", "ssl_check_hostname": False}
    pinned = config.redis_ca_certs or ""
    if pinned.startswith("-----BEGIN"):
        return {"ssl_ca_data": pinned}
    return {"ssl_ca_certs": pinned} if pinned else {}


class _CleanConnection(SentinelManagedConnection):
    """One that is closed when its reader is interrupted: the reply left on it would be the next caller's."""

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        return super().read_response(*args, **{**kwargs, "disconnect_on_error": True})


class _SentinelPool(SentinelConnectionPool, redis.BlockingConnectionPool):
    """Sentinel's pool, where those who find all connections in use wait in a queue."""


def _by_sentinel(config: Config, credentials: Any, timeouts: Any, queue: Any) -> redis.Redis:
    _, service, *db = urlsplit(config.redis_url).path.split("/")
    # No retries: a dead sentinel costs one timeout, and the next one is asked.
    sentinel = Sentinel(addresses_of(config.redis_url), sentinel_kwargs={**timeouts, "retry": _retries(0)})
    pool = _SentinelPool(  # type: ignore[no-untyped-call]
        service,
        sentinel,
        connection_class=_CleanConnection,
        retry=_retries(1),
        db=int(db[0]) if db else 0,
        **credentials,
        **timeouts,
        **queue,
    )
    threading.Thread(target=_watch, args=(pool,), name="sentinel", daemon=True).start()
    return redis.Redis(connection_pool=pool)


def _watch(pool: _SentinelPool) -> None:
    """Ask for the primary twice a second: the pool would go on writing to the old one until that is told."""
    while True:
        time.sleep(0.5)
        try:
            # Where it has changed this closes the idle connections to the old one.
            pool.get_master_address()  # type: ignore[no-untyped-call]
        except (RedisError, OSError):
            pass  # the next call that needs a connection says so to its caller


def _in_process() -> redis.Redis:
    # Imported here: nobody else needs it, and it brings a Lua interpreter along.
    import fakeredis

    return fakeredis.FakeRedis(server=fakeredis.FakeServer(server_type="redis"), decode_responses=True)
