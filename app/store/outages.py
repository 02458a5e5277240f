"""Trouble with servers: what it is to callers, and its log, once when it begins and once when it is over."""

import logging

import redis

from app.store.connect import Servers
from app.store.server import address_of

log = logging.getLogger(__name__)


class StoreUnavailable(Exception):
    """Redis is down, slow, failing over, full or read-only: whether the session lives is not known."""


class ConnectionsBusy(StoreUnavailable):
    """More calls at once than there are connections for those that are not heartbeats. Redis itself may be well."""


class Unreadable(StoreUnavailable):
    """A session's record, or a subject's index, is not what this service has written. It can still be revoked."""


class Outages:
    """What is in trouble: by script, since a full Redis refuses only some, and by server, since clusters fail in parts.

    Servers are known by their addresses, so that nothing here keeps the client of one that is gone.
    """

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._current: set[tuple[str, str | None]] = set()

    def begun(self, what: str, client: redis.Redis | None, error: Exception) -> StoreUnavailable:
        """Take notice that a call has failed; gives what this is to its caller.

        `client` is None where it is not known which server it would be.
        """
        self._servers.failed(error)
        server = address_of(client) if client else None
        if (what, server) not in self._current:
            self._current.add((what, server))
            log.error("redis_unavailable", extra={"script": what, "server": server, "reason": described(error)})
        return StoreUnavailable(described(error))

    def over(self, what: str, client: redis.Redis) -> None:
        """Take notice that a call has succeeded."""
        if self._current:
            here, present = address_of(client), [address_of(each) for each in self._servers.clients()]
            # Also over is the trouble with a server that is gone: another one has taken its place.
            over = {each for each in self._current if each == (what, here) or each[1] not in present}
            self._current -= over
            for script, server in over:
                log.warning("redis_available", extra={"script": script, "server": server})


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
