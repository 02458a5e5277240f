"""Redis behind Sentinel: the primary is whichever server the sentinels name."""

import threading
import time
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.sentinel import MasterNotFoundError, SentinelConnectionPool, SentinelManagedConnection

from app.config import addresses_of, credentials_of
from app.store.handshake import set_up_sentinel


def by_sentinel(url: str, connection: dict[str, Any], pool: dict[str, Any]) -> redis.Redis:
    """A client of the primary. The sentinels are asked in the background, from now on; a dead one costs a timeout."""
    _, service, *database = urlsplit(url).path.split("/")
    encrypted = url.startswith("rediss")
    managed = _Pool(
        service,
        _Sentinels(url, {"ssl": encrypted, **connection}),
        connection_class=_TLSConnection if encrypted else _Connection,
        db=int(database[0]) if database else 0,
        **credentials_of(url),
        **connection,
        **pool,
    )
    threading.Thread(target=managed.watch, name="sentinel", daemon=True).start()
    return redis.Redis(connection_pool=managed)


class _Sentinels:
    """The sentinels of a URL. They may have its user and password, or none. In the place of redis-py's `Sentinel`."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        """`options` are those of the connections."""
        user, password = credentials_of(url).values()
        credentials = (user, password or "") if user else (password,) if password else ()
        options = {**options, "redis_connect_func": partial(set_up_sentinel, credentials=credentials)}
        self._clients = [redis.Redis(*address, **options) for address in addresses_of(url)]

    def discover_master(self, service: str) -> tuple[str, int]:
        """The primary's address. Raises MasterNotFoundError with what the sentinels say instead."""
        said = []
        for client in self._clients:
            try:
                state: Any = client.sentinel_master(service)
            except (redis.RedisError, OSError) as error:
                said.append(str(error))
                continue
            if state["is_master"] and not (state["is_sdown"] or state["is_odown"]):
                self._clients.remove(client)
                self._clients.insert(0, client)
                return state["ip"], state["port"]
            said.append(f"{service} is down")
        raise MasterNotFoundError("; ".join(dict.fromkeys(said)))


class _Connection(SentinelManagedConnection):
    """One that is closed when its reader is interrupted: the reply left on it would be the next caller's.

    Private to redis-py: `read_response`, which everywhere else closes by itself.
    """

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        return super().read_response(*args, **{**kwargs, "disconnect_on_error": True})


class _TLSConnection(_Connection, redis.SSLConnection):
    """The same over TLS; the certificate must be for the address that the sentinels give."""


class _Pool(SentinelConnectionPool, redis.BlockingConnectionPool):
    """Sentinel's pool, in which callers queue for connections, and none of them waits for sentinels.

    Private to redis-py: that its connections ask `connection_pool` for the address, `owns_connection`, and `proxy`.
    Without them each new connection asks every sentinel, and writes go to the old primary for ten seconds after a
    planned failover.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._last_error = "no sentinel has answered yet"
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
            raise MasterNotFoundError(self._last_error)
        return self.master_address  # type: ignore[no-any-return]

    def owns_connection(self, connection: Any) -> bool:
        """Counts as ours also what never reached a primary: redis-py would drop it and yet keep it in its list."""
        return not connection.is_connected or super().owns_connection(connection)  # type: ignore[no-untyped-call]

    def watch(self) -> None:
        """Ask for the primary twice a second. Where it has changed, redis-py closes the idle connections to the old."""
        while True:
            try:
                self.proxy.get_master_address()
            except Exception as error:  # whatever it is, the next time another sentinel may know better
                self._last_error = str(error)
            self._asked.set()
            time.sleep(0.5)
