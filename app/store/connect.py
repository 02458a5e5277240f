"""From a URL to Redis: one server, Sentinel, Cluster or in-process; timeouts and retries all explicit."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import AskError, ReadOnlyError, RedisClusterException, RedisError
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool, SentinelManagedConnection

from app.config import Config, addresses_of

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

    def follow(self, redirection: AskError, command: Sequence[Any]) -> Any:
        """Only a cluster redirects."""
        raise redirection

    def failed(self, error: Exception) -> None:
        """Take notice of trouble with a server."""
        if isinstance(error, ReadOnlyError):
            # The primary has moved to another host under the same name; only a new connection finds it. Connections
            # in use are left alone: their users meet the same error and close them.
            self._client.connection_pool.disconnect(inuse_connections=False)


class Cluster:
    """A Redis Cluster: each key's slot says which primary has it. The map of slots is renewed after trouble."""

    RENEW_EVERY = 0.2  # seconds between two renewals at the least

    def __init__(self, connect: Callable[[], RedisCluster]) -> None:
        self._connect = connect
        self._cluster: RedisCluster | None = None
        self._trouble = ""
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

    def follow(self, redirection: AskError, command: Sequence[Any]) -> Any:
        """Send a command where MOVED or ASK points to, and learn from it."""
        cluster = self._reached()
        # redis-py follows only to nodes that it knows, and one that is getting its first slot is not yet among them.
        node = ClusterNode(redirection.host, redirection.port)
        cluster.nodes_manager.nodes_cache.setdefault(node.name, node)
        try:
            return cluster.execute_command(*command)
        except (RedisClusterException, AttributeError) as error:  # the latter where the map is renewed meanwhile
            raise redis.ConnectionError(str(error)) from error

    def failed(self, error: Exception) -> None:
        """Take notice of trouble with a server: another one may have taken its place."""
        self._renew_soon()

    def _reached(self) -> RedisCluster:
        if self._cluster is None:
            self._renew_soon()
            raise redis.ConnectionError(f"no node of the cluster has answered yet: {self._trouble}")
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
            if not self._trouble:
                log.warning("slots_not_renewed", extra={"reason": str(error)})
            self._trouble = str(error)
        else:
            self._trouble = ""


Servers = OnePrimary | Cluster


def connect(config: Config) -> Servers:
    """The servers behind `config.redis_url`. They are reached when they are first used, and again after trouble.

    A call waits half the configured timeout for a connection out of the pool and the whole of it for an answer. One
    that times out is not repeated, since a server that hangs would only hang again.
    """
    url = urlsplit(config.redis_url)
    if url.scheme == "memory":
        return OnePrimary(_in_process())
    timeouts: dict[str, Any] = {
        "socket_timeout": config.redis_timeout_seconds,
        "socket_connect_timeout": config.redis_timeout_seconds,
        # RESP3 would come with maintenance notifications, which switch off the check for stale connections.
        "protocol": 2,
    }
    if url.scheme != "rediss":
        # Spares each new connection the two round trips of CLIENT SETINFO. Not over TLS, where session tickets that
        # nobody has read yet would make the pool refuse the connection as one with an unread reply.
        timeouts["driver_info"] = None
    queue: dict[str, Any] = {
        "max_connections": POOL_SIZE,
        "timeout": config.redis_timeout_seconds / 2,
        "decode_responses": True,
        # What is no UTF-8 must not fail the replies beside it: it becomes lone surrogates, which no text of ours has.
        "encoding_errors": "surrogateescape",
    }
    credentials = {"username": unquote(url.username or "") or None, "password": unquote(url.password or "") or None}
    if url.scheme == "redis+sentinel":
        return OnePrimary(_by_sentinel(config, credentials, timeouts, queue))
    if url.scheme == "redis+cluster":
        return Cluster(lambda: _by_cluster(config, credentials, timeouts, queue))
    tls = _tls(config) if url.scheme == "rediss" else {}
    pool = redis.BlockingConnectionPool.from_url(config.redis_url, retry=_retries(1), **timeouts, **queue, **tls)
    return OnePrimary(redis.Redis(connection_pool=pool))


def _retries(number: int) -> Retry:
    return Retry(NoBackoff(), number, supported_errors=(redis.ConnectionError,))


def _tls(config: Config) -> dict[str, Any]:
    """Certificates are verified against the system's authorities, or one that is pinned, or not at all."""
    if not config.redis_tls_verify:
        log.warning("redis_tls_not_verified")
        return {"ssl_cert_reqs": "none"}
    pinned = config.redis_ca_certs
    if pinned and pinned.startswith("-----BEGIN"):
        return {"ssl_ca_data": pinned}
    return {"ssl_ca_certs": pinned}


def _by_cluster(config: Config, credentials: Any, timeouts: Any, queue: Any) -> RedisCluster:
    (host, port), *others = addresses_of(config.redis_url)
    return RedisCluster(
        # Only with a URL does redis-py take a pool of another kind: one with a queue.
        url=f"redis://[{host}]:{port}" if ":" in host else f"redis://{host}:{port}",
        startup_nodes=[ClusterNode(*address) for address in others],
        connection_pool_class=redis.BlockingConnectionPool,
        # After a restart under new addresses the ones in the URL are the only ones that hold.
        dynamic_startup_nodes=False,
        retry=_retries(0),
        **credentials,
        **timeouts,
        **queue,
    )


class _CleanConnection(SentinelManagedConnection):
    """One that is closed when its reader is interrupted: the reply left on it would be the next caller's."""

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        return super().read_response(*args, **{**kwargs, "disconnect_on_error": True})


class _SentinelPool(SentinelConnectionPool, redis.BlockingConnectionPool):
    """Sentinel's pool, where those who find all connections in use wait in a queue, and nobody waits for sentinels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._trouble = "no sentinel has answered yet"
        self._asked = threading.Event()
        # Connections ask us, not redis-py's proxy, which would ask every sentinel for each of them.
        self.connection_kwargs["connection_pool"] = self

    def get_master_address(self) -> tuple[str, int]:
        """The primary's address, as the sentinels last had it. Raises MasterNotFoundError where they never had.

        Before the first answer of a sentinel callers wait for it, as long as they would for an answer of Redis's.
        """
        if self.master_address is None:
            self._asked.wait(self.connection_kwargs["socket_timeout"])
        if self.master_address is None:
            raise MasterNotFoundError(self._trouble)
        return self.master_address  # type: ignore[no-any-return]

    def owns_connection(self, connection: Any) -> bool:
        """Counts as ours also what never reached a primary: redis-py would drop it and yet keep it in its list."""
        return not connection.is_connected or super().owns_connection(connection)  # type: ignore[no-untyped-call]

    def watch(self) -> None:
        """Ask for the primary twice a second: the pool would go on writing to the old one until that learns of its end.

        Where it has changed, redis-py closes the idle connections to the old one.
        """
        while True:
            try:
                self.proxy.get_master_address()
            except Exception as error:  # whatever it is, the next time another sentinel may know better
                self._trouble = str(error).partition(" : ")[0]  # and not what redis-py says of its own objects
            self._asked.set()
            time.sleep(0.5)


def _by_sentinel(config: Config, credentials: Any, timeouts: Any, queue: Any) -> redis.Redis:
    _, service, *db = urlsplit(config.redis_url).path.split("/")
    # No retries: a dead sentinel costs one timeout, and the next one is asked.
    sentinel = Sentinel(addresses_of(config.redis_url), sentinel_kwargs={**timeouts, "retry": _retries(0)})
    pool = _SentinelPool(
        service,
        sentinel,
        connection_class=_CleanConnection,
        retry=_retries(1),
        db=int(db[0]) if db else 0,
        **credentials,
        **timeouts,
        **queue,
    )
    threading.Thread(target=pool.watch, name="sentinel", daemon=True).start()
    return redis.Redis(connection_pool=pool)


def _in_process() -> redis.Redis:
    # Imported here: nobody else needs it, and it brings a Lua interpreter along.
    import fakeredis

    return fakeredis.FakeRedis(server=fakeredis.FakeServer(server_type="redis"), decode_responses=True)
