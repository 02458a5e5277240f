"""Redis behind Sentinel: the primary is whichever server the sentinels name."""

import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.sentinel import MasterNotFoundError

from app.config import addresses_of, credentials_of
from app.store.server import OnePrimary


class BehindSentinel(OnePrimary):
    """The server that the sentinels name. They are asked at the start, then by a thread: no call waits for them.

    redis-py's pool would ask them for each new connection, and leave the old ones where they are for ten seconds after
    a planned failover.
    """

    EVERY = 0.5  # seconds

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        """`options` are those of the connections and their pools."""
        _, self._service, *database = urlsplit(url).path.split("/")
        credentials = credentials_of(url)
        self._options = {**options, **credentials, "db": int(database[0]) if database else 0}
        # One that refuses the user and the password of the URL may need none.
        self._sentinels = [
            _client_at(address, {**options, **login}) for login in (credentials, {}) for address in addresses_of(url)
        ]
        self._address: tuple[str, int] | None = None
        self._primary: redis.Redis | None = None
        self._last_error = ""
        self._ask()
        threading.Thread(target=self._watch, name="sentinel", daemon=True).start()

    def clients(self) -> Sequence[redis.Redis]:
        """The primary's client. Raises MasterNotFoundError, with the sentinels' words, where they never named one."""
        if self._primary is None:
            raise MasterNotFoundError(self._last_error)
        return [self._primary]

    def _watch(self) -> None:
        while True:
            time.sleep(self.EVERY)
            self._ask()

    def _ask(self) -> None:
        """Go by the first sentinel that knows the primary. It is asked first from then on: a dead one costs time."""
        said = []
        for sentinel in self._sentinels:
            try:
                state: Any = sentinel.sentinel_master(self._service)
                if state["is_master"] and not (state["is_sdown"] or state["is_odown"]):
                    address = state["ip"], state["port"]
                    # Another address is another client: what waits for the old server is not taken along.
                    if address != self._address:
                        self._address, self._primary = address, _client_at(address, self._options)
                    self._sentinels.remove(sentinel)
                    self._sentinels.insert(0, sentinel)
                    return
                said.append(f"{self._service} is down")
            except Exception as error:  # whatever it is, another sentinel may know better
                said.append(str(error))
        self._last_error = "; ".join(dict.fromkeys(said))


def _client_at(address: tuple[str, int], options: dict[str, Any]) -> redis.Redis:
    host, port = address
    return redis.Redis(connection_pool=redis.BlockingConnectionPool(host=host, port=port, **options))
