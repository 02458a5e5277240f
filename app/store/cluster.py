"""Redis Cluster: each key's slot says which primary has it. The map of slots is refreshed after trouble."""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import AskError, RedisClusterException

from app.config import addresses_of, credentials_of
from app.store.server import ping

log = logging.getLogger(__name__)


class Cluster:
    """The servers of a cluster. It is asked at the start and, where no node answers, after each call that needs it."""

    REFRESH_EVERY = 0.2  # seconds between two refreshes at the least

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        """`options` are those of the connections and their pools."""
        first = urlsplit(url).netloc.rpartition("@")[2].partition(",")[0]
        self._options = {
            **options,
            **credentials_of(url),
            "redis_connect_func": ping,  # redis-py has one of its own, which calls this at its end
            # Only with a URL does redis-py take a pool of another kind: one with a queue.
            "url": f"redis://{first}",
            "connection_pool_class": redis.BlockingConnectionPool,
            # After a restart under new addresses the ones in the URL are the only ones that hold.
            "dynamic_startup_nodes": False,
            # Where some slots belong to nobody the others are served.
            "require_full_coverage": False,
        }
        self._addresses = addresses_of(url)
        self._cluster: RedisCluster | None = None
        self._nodes_without_slots: dict[tuple[str, int], ClusterNode] = {}  # to which keys have moved
        self._last_error = ""
        self._refresh_wanted = threading.Event()
        self._refresh()
        # In the background: asking a dead node costs a timeout, for which no caller should wait.
        threading.Thread(target=self._watch, name="slots", daemon=True).start()

    def client_for(self, key: str) -> redis.Redis:
        """The client of the primary that holds a key. Raises redis.ConnectionError while it is not known which."""
        cluster = self._cluster_or_raise()
        try:
            return cluster.get_redis_connection(cluster.get_node_from_key(key))
        except RedisClusterException as error:  # the slot belongs to nobody
            raise redis.ConnectionError(str(error)) from error

    def clients(self) -> Sequence[redis.Redis]:
        """The clients of all primaries. Raises redis.ConnectionError while they are not known."""
        cluster = self._cluster_or_raise()
        return [cluster.get_redis_connection(node) for node in cluster.get_primaries()]

    def follow(self, redirection: AskError, command: Sequence[Any]) -> Any:
        """Send a command again where MOVED (to redis-py an AskError as well) or ASK says.

        redis-py's own client follows ASK only to nodes that have slots, and so not to one that is getting its first.
        """
        self._refresh_wanted.set()
        cluster = self._cluster_or_raise()
        address = redirection.host, redirection.port
        node = cluster.get_node(*address) or self._nodes_without_slots.setdefault(address, ClusterNode(*address))
        pipeline = cluster.get_redis_connection(node).pipeline(transaction=False)
        pipeline.execute_command("ASKING")
        pipeline.execute_command(*command)
        return pipeline.execute()[-1]

    def failed(self, error: Exception) -> None:
        """Note trouble with a server: another one may have taken its place."""
        self.look_again()

    def look_again(self) -> None:
        """Find out where the slots are, in the background."""
        self._refresh_wanted.set()

    def _cluster_or_raise(self) -> RedisCluster:
        if self._cluster is None:
            self._refresh_wanted.set()
            raise redis.ConnectionError(f"no node of the cluster has answered yet: {self._last_error}")
        return self._cluster

    def _watch(self) -> None:
        while True:
            self._refresh_wanted.wait()
            self._refresh_wanted.clear()
            self._refresh()
            time.sleep(self.REFRESH_EVERY)

    def _refresh(self) -> None:
        """Read the map of slots anew.

        Private to redis-py: `nodes_manager.initialize`. The public way is a new RedisCluster, which would drop every
        connection to the nodes that are well.
        """
        try:
            if self._cluster is None:
                nodes = [ClusterNode(*address) for address in self._addresses]  # made here: redis-py adds to them
                self._cluster = RedisCluster(startup_nodes=nodes, **self._options)
            else:
                self._cluster.nodes_manager.initialize(disconnect_startup_nodes_pools=False)
        except Exception as error:  # whatever it is, the next time another node may know better
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
