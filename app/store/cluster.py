"""Redis Cluster: each key's slot says which primary has it. The map of slots is refreshed after trouble."""

import logging
import threading
import time
from collections.abc import Collection, Sequence
from typing import Any

import redis
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import AskError, RedisClusterException, RedisError

from app.config import addresses_of, credentials_of
from app.store.server import read_reply

log = logging.getLogger(__name__)


class Cluster:
    """The servers of a cluster. It is reached at once or, where no node answers, after the first call that needs it."""

    REFRESH_EVERY = 0.2  # seconds between two refreshes at the least

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        """`options` are those of the connections and their pools."""
        (host, port), *others = addresses_of(url)
        scheme = url.partition("+")[0]
        self._options = {
            **options,
            **credentials_of(url),
            "redis_connect_func": read_reply,  # redis-py has one of its own, which calls this at its end
            # Only with a URL does redis-py take a pool of another kind: one with a queue.
            "url": f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}",
            "startup_nodes": [ClusterNode(*address) for address in others],
            "connection_pool_class": redis.BlockingConnectionPool,
            # After a restart under new addresses the ones in the URL are the only ones that hold.
            "dynamic_startup_nodes": False,
        }
        self._cluster: RedisCluster | None = None
        self._newcomers: dict[tuple[str, int], ClusterNode] = {}  # nodes without slots, to which keys have moved
        self._last_error = ""
        self._refreshing = threading.Lock()
        self._refresh()

    def client_for(self, key: str) -> redis.Redis:
        """The client of the primary that holds a key. Raises redis.ConnectionError while it is not known which."""
        try:
            cluster = self._cluster_or_raise()
            return cluster.get_redis_connection(cluster.get_node_from_key(key))
        except RedisClusterException as error:
            self._refresh_slots_async()
            raise redis.ConnectionError(str(error)) from error

    def clients(self) -> Sequence[redis.Redis]:
        """The clients of all primaries. Raises redis.ConnectionError while they are not known."""
        cluster = self._cluster_or_raise()
        return [cluster.get_redis_connection(node) for node in cluster.get_primaries()]

    def addresses(self) -> Collection[str]:
        """The addresses of all primaries, as far as they are known."""
        return [node.name for node in self._cluster.get_primaries()] if self._cluster else ()

    def follow(self, redirection: AskError, command: Sequence[Any]) -> Any:
        """Send a command again where MOVED (to redis-py an AskError as well) or ASK says.

        redis-py's own client follows ASK only to nodes that have slots, and so not to one that is getting its first.
        """
        self._refresh_slots_async()
        cluster = self._cluster_or_raise()
        address = redirection.host, redirection.port
        node = cluster.get_node(*address) or self._newcomers.setdefault(address, ClusterNode(*address))
        pipeline = cluster.get_redis_connection(node).pipeline(transaction=False)
        pipeline.execute_command("ASKING")
        pipeline.execute_command(*command)
        return pipeline.execute()[-1]

    def failed(self, error: Exception) -> None:
        """Take notice of trouble with a server: another one may have taken its place."""
        self._refresh_slots_async()

    def _cluster_or_raise(self) -> RedisCluster:
        if self._cluster is None:
            self._refresh_slots_async()
            raise redis.ConnectionError(f"no node of the cluster has answered yet: {self._last_error}")
        return self._cluster

    def _refresh_slots_async(self) -> None:
        # In the background: asking a dead node costs a timeout, for which no caller should wait.
        if self._refreshing.acquire(blocking=False):
            threading.Thread(target=self._refresh_and_rest, name="slots", daemon=True).start()

    def _refresh_and_rest(self) -> None:
        try:
            self._refresh()
            time.sleep(self.REFRESH_EVERY)
        finally:
            self._refreshing.release()

    def _refresh(self) -> None:
        """Read the map of slots anew.

        Private to redis-py: `nodes_manager.initialize`. The public way is a new RedisCluster, which would drop every
        connection to the nodes that are well.
        """
        try:
            if self._cluster is None:
                self._cluster = RedisCluster(**self._options)
            else:
                self._cluster.nodes_manager.initialize(disconnect_startup_nodes_pools=False)
        except (RedisError, RedisClusterException, OSError) as error:
            said = str(_cause(error))
            if not self._last_error:
                log.warning("slots_not_renewed", extra={"reason": said})
            self._last_error = said
        else:
            self._last_error = ""


def _cause(error: BaseException) -> BaseException:
    """What a server or its connection has said, out of what redis-py has wrapped it in."""
    cause = error.__cause__ or error.__context__
    return _cause(cause) if cause and isinstance(error, RedisClusterException) else error
