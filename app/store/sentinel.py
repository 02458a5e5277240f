"""Redis behind Sentinel: the primary is whichever server the sentinels name."""

import threading
import time
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.sentinel import MasterNotFoundError

from app.config import addresses_of, credentials_of
from app.store.handshake import set_up_sentinel


def by_sentinel(url: str, connection: dict[str, Any], pool: dict[str, Any]) -> redis.Redis:
    """A client of the primary; `connection` has the options of its connections, `pool` those of their pool."""
    _, service, *database = urlsplit(url).path.split("/")
    encrypted = url.startswith("rediss")
    return redis.Redis(
        connection_pool=redis.BlockingConnectionPool(
            connection_class=_TLSConnection if encrypted else _Connection,
            primary=_Primary(url, service, {"ssl": encrypted, **connection}),
            db=int(database[0]) if database else 0,
            **credentials_of(url),
            **connection,
            **pool,
        )
    )


class _Primary:
    """The primary's address. The sentinels are asked in the background, from now on, and no caller waits for them.

    redis-py's pool would ask them for each new connection, and leave the old ones where they are for ten seconds after
    a planned failover.
    """

    EVERY = 0.5  # seconds

    def __init__(self, url: str, service: str, options: dict[str, Any]) -> None:
        """The sentinels may have the user and the password of the URL, or none."""
        user, password = credentials_of(url).values()
        credentials = (user, password or "") if user else (password,) if password else ()
        options = {**options, "redis_connect_func": partial(set_up_sentinel, credentials=credentials)}
        self._sentinels = [redis.Redis(*address, **options) for address in addresses_of(url)]
        self._service = service
        self._first_answer_timeout: float = options["socket_timeout"]
        self._address: tuple[str, int] | None = None
        self._last_error = "no sentinel has answered yet"
        self._asked = threading.Event()
        threading.Thread(target=self._watch, name="sentinel", daemon=True).start()

    def address(self) -> tuple[str, int]:
        """What the sentinels said last. Raises MasterNotFoundError, with their words, where they never named one.

        Before they were asked callers wait for that, as long as they would for an answer of Redis's.
        """
        if self._address is None:
            self._asked.wait(self._first_answer_timeout)
        if self._address is None:
            raise MasterNotFoundError(self._last_error)
        return self._address

    def _watch(self) -> None:
        while True:
            try:
                self._address = self._ask()
            except Exception as error:  # whatever it is, the next time another sentinel may know better
                self._last_error = str(error)
            self._asked.set()
            time.sleep(self.EVERY)

    def _ask(self) -> tuple[str, int]:
        """The address by the first sentinel that knows it, which is asked first from then on: a dead one costs time."""
        said = []
        for sentinel in self._sentinels:
            try:
                state: Any = sentinel.sentinel_master(self._service)
            except (redis.RedisError, OSError) as error:
                said.append(str(error))
                continue
            if state["is_master"] and not (state["is_sdown"] or state["is_odown"]):
                self._sentinels.remove(sentinel)
                self._sentinels.insert(0, sentinel)
                return state["ip"], state["port"]
            said.append(f"{self._service} is down")
        raise MasterNotFoundError("; ".join(dict.fromkeys(said)))


class _Connection(redis.Connection):
    """A connection to the primary. The pool calls `connect` whenever it hands one out."""

    def __init__(self, primary: _Primary, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self._primary = primary

    def connect(self) -> None:
        address = self._primary.address()
        if address != (self.host, self.port):
            self.disconnect()  # type: ignore[no-untyped-call]
            self.host, self.port = address
        super().connect()  # type: ignore[no-untyped-call]


class _TLSConnection(_Connection, redis.SSLConnection):
    """The same over TLS; the certificate must be for the address that the sentinels give."""
