"""Trouble with servers: what it is to callers, and its log, once when it begins and once when it is over."""

import logging
import time

import redis

from app.store.connect import Servers
from app.store.errors import StoreUnavailable, described
from app.store.server import address_of

log = logging.getLogger(__name__)

QUIET_SECONDS = 1.0  # without trouble, after which an outage is over


class Outages:
    """What is in trouble: by script, since a full Redis refuses only some, and by server, since clusters fail in parts.

    A server can also fail in part, as for some slots of a cluster: what has just failed is not over because another
    call succeeds. Servers are known by their addresses, so that nothing here keeps the client of one that is gone.
    """

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._current: dict[tuple[str, str | None], float] = {}  # when each has failed last

    def failed(self, what: str, client: redis.Redis | None, error: Exception) -> StoreUnavailable:
        """Note that a call has failed; gives the exception to raise to its caller.

        `client` is None where it is not known which server it would be.
        """
        self._servers.failed(error)
        server = address_of(client) if client else None
        known = (what, server) in self._current
        self._current[what, server] = time.time()
        if not known:
            log.error("redis_unavailable", extra={"script": what, "server": server, "reason": described(error)})
        return StoreUnavailable(described(error))

    def succeeded(self, what: str, client: redis.Redis) -> None:
        """Note that a call has succeeded."""
        now = time.time()
        # In absolute terms, since a clock can be set back.
        quiet = [each for each, failed_at in self._current.items() if abs(now - failed_at) >= QUIET_SECONDS]
        if quiet:
            here, present = address_of(client), [address_of(each) for each in self._servers.clients()]
            for each in quiet:
                # Also over is trouble with a server that was not known, or is gone: another has taken its place.
                if each == (what, here) or each[1] not in present:
                    self._current.pop(each, None)
                    log.warning("redis_available", extra={"script": each[0], "server": each[1]})
