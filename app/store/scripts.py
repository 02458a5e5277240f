"""The Lua scripts, one for each operation that must be atomic, and what the reply of a heartbeat is to callers."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Command = tuple[str | int, ...]


class Renewal(NamedTuple):
    """A session's new expiry and the time of its renewal, in ms since the epoch, both by Redis's clock."""

    expires_at_ms: int
    renewed_at_ms: int

    @property
    def expires_in(self) -> int:
        """Whole seconds until the expiry, rounded down so that no heartbeat comes too late."""
        return (self.expires_at_ms - self.renewed_at_ms) // 1000


class Script:
    """A Lua file and the hash that Redis keeps it under."""

    def __init__(self, name: str, *, repeatable: bool = True, per_key: Callable[[list[Any]], list[Any]] = list) -> None:
        """A script is `repeatable` where running it again after a lost reply does no harm, and its reply is as good.

        `per_key` makes one reply for each key out of the reply of a script that takes any number of them.
        """
        self.name, self.repeatable, self.per_key = name, repeatable, per_key
        self.source = (Path(__file__).parent / "lua" / f"{name}.lua").read_text()
        self.sha = hashlib.sha1(self.source.encode()).hexdigest()

    def evalsha(self, keys: Sequence[str]) -> Command:
        return ("EVALSHA", self.sha, len(keys), *keys)

    def eval(self, keys: Sequence[str], args: Sequence[str | int] = ()) -> Command:
        return ("EVAL", self.source, len(keys), *keys, *args)


def _renewals(reply: list[Any]) -> list[Any]:
    now, *expiries = reply
    return [Renewal(expiry, now) if isinstance(expiry, int) else expiry for expiry in expiries]


HEARTBEAT, GET, PROBE = Script("heartbeat", per_key=_renewals), Script("get"), Script("probe")
OPEN, INDEX = Script("open"), Script("index")
REVOKE, REVOKE_ALL = Script("revoke", repeatable=False), Script("revoke_all", repeatable=False)
