"""Whether replicas have a write, so that it outlives the loss of its primary."""

import time
from collections.abc import Sequence
from typing import Any


class ReplicaAcks:
    """Whether a primary's replicas have acknowledged a write, so that whichever of them takes over has it too.

    All attached replicas have to acknowledge. One that disappears may just have been promoted, while the others
    acknowledge what will be thrown away: so nothing is acknowledged until it has been gone for SETTLED seconds; after
    that the remaining ones suffice. One that hangs, and so lacks even the write before this one, counts as gone.
    """

    SETTLED = 5.0
    WAIT_MS = 100

    def __init__(self, least: int, role: Sequence[Any]) -> None:
        """`role` is the primary's reply to ROLE: its kind, its offset, and address, port and offset of its replicas."""
        self._least = least
        self._offset, self._attached = 0, 0
        self._fewer_since: float | None = None
        if role[0] == "master":
            self._offset, self._attached = role[1], len(role[2])

    @property
    def commands(self) -> Sequence[tuple[str | int, ...]]:
        """What to send behind a write, on the same connection."""
        return ("WAIT", max(self._least, self._attached), self.WAIT_MS), ("ROLE",)

    def sufficient(self, acknowledged: int, role: Sequence[Any]) -> bool:
        """Whether the replies to `commands` are enough."""
        if role[0] != "master":  # since a moment ago
            return False
        before, now = self._attached, time.monotonic()
        attached = sum(int(offset) >= self._offset for _, _, offset in role[2])
        self._offset = role[1]
        if attached < self._attached and self._fewer_since is None:
            self._fewer_since = now
        elif attached >= self._attached or now - (self._fewer_since or now) >= self.SETTLED:
            self._attached, self._fewer_since = attached, None
        return acknowledged >= max(self._least, min(before, self._attached))
