"""Whether replicas have a write, so that it outlives the loss of its primary."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from redis.exceptions import ReadOnlyError

WAIT_MS = 100
SETTLED_SECONDS = 5.0


class ReplicaAcks:
    """Whether a primary's replicas have acknowledged a write, so that whichever of them takes over has it too.

    All attached replicas have to acknowledge. One that disappears may just have been promoted, while the others
    acknowledge what will be thrown away: so nothing is acknowledged until it has been gone for SETTLED_SECONDS; after
    that the remaining ones suffice. One that hangs, and so lacks even the writes before this one, counts as gone.
    """

    def __init__(self, least: int) -> None:
        self._least = least
        self._offset, self._attached = 0, 0
        self._fewer_since = math.inf

    def write(self, send: Callable[[Sequence[Any]], Sequence[Any]], command: Sequence[Any]) -> list[Any]:
        """The reply to a write and whether enough replicas have it. `send` gives a reply or an error for each command.

        Raises RedisError where there is no reply; only with a ReadOnlyError is it certain that nothing was written.
        """
        [role] = send([("ROLE",)])
        if isinstance(role, Exception):
            raise role
        if role[0] != "master":
            raise ReadOnlyError("what answers there is a replica")
        _, offset, replicas = role
        required = self._required([int(acknowledged) for _, _, acknowledged in replicas])
        reply, acknowledged = send([command, ("WAIT", required, WAIT_MS)])
        self._offset = offset  # which by now every replica has that does not hang
        return [reply, isinstance(acknowledged, int) and acknowledged >= required]

    def _required(self, offsets: Sequence[int]) -> int:
        """How many replicas have to acknowledge the next write, by what each of them has acknowledged so far."""
        now, attached = time.monotonic(), sum(offset >= self._offset for offset in offsets)
        if attached < self._attached:
            self._fewer_since = min(self._fewer_since, now)
        if attached >= self._attached or now - self._fewer_since >= SETTLED_SECONDS:
            self._attached, self._fewer_since = attached, math.inf
        return max(self._least, self._attached)
