"""Trouble with servers: what it is to callers, and its log, once when it begins and once when it is over."""

import logging

import redis

from app.store.connect import Servers
from app.store.server import address_of

log = logging.getLogger(__name__)


class StoreUnavailable(Exception):
    """Redis is down, slow, failing over, full or read-only: whether the session lives is not known."""


class Unreadable(StoreUnavailable):
    """A session's record, or a subject's index, is not what this service has written. It can still be revoked."""


class Outages:
    """What is in trouble: by script, since a full Redis refuses only some, and by server, since clusters fail in parts.

    Servers are known by their addresses, so that nothing here keeps the client of one that is gone.
    """

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._begun: set[tuple[str, str | None]] = set()

    def log_transition(self, what: str, client: redis.Redis | None, error: Exception | None) -> None:
        """Take notice of how a call ended. `client` is None where it is not known which server it would be."""
        if error is not None:
            self._servers.failed(error)
            server = address_of(client) if client else None
            if (what, server) not in self._begun:
                self._begun.add((what, server))
                log.error("redis_unavailable", extra={"script": what, "server": server, "reason": described(error)})
        elif self._begun and client:
            here, present = address_of(client), [address_of(each) for each in self._servers.clients()]
            # Also over is the trouble with a server that is gone: another one has taken its place.
            over = {each for each in self._begun if each == (what, here) or each[1] not in present}
            self._begun -= over
            for script, server in over:
                log.warning("redis_available", extra={"script": script, "server": server})


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
