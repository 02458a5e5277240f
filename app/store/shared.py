"""Callers of one server that are served together: heartbeats share round trips, and so do probes."""

import functools
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import redis

from app.store.batching import GroupCommit
from app.store.errors import StoreUnavailable
from app.store.runner import Runner
from app.store.scripts import HEARTBEAT, PROBE, Script

PROBE_SECONDS = 1.5  # after which no other server is asked


class SharedRoundTrips:
    """One batch after the other for each server and script: a server that hangs holds up no caller of another."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        # Weak, since a failover makes new clients. So no batch may hold its client, which comes along with each key.
        self._batches: defaultdict[str, WeakKeyDictionary[redis.Redis, GroupCommit]] = defaultdict(WeakKeyDictionary)

    def heartbeat(self, key: str) -> Any:
        """Run heartbeat.lua over a key, together with whatever other callers ask of its server.

        Raises StoreUnavailable, and Unreadable where the key is not what it should be.
        """
        return self._submit(HEARTBEAT, self._runner.client_for(HEARTBEAT, key), key)

    def takes_writes(self, keys: Sequence[str]) -> bool:
        """Whether a server lets probe.lua write to one of these keys; asks one after the other for PROBE_SECONDS.

        One primary of a cluster is enough: the subjects of that one are served.
        """
        end, asked = time.monotonic() + PROBE_SECONDS, set[redis.Redis]()
        for key in keys:
            with suppress(StoreUnavailable):
                client = self._runner.client_for(PROBE, key)
                if client not in asked:
                    asked.add(client)
                    if self._submit(PROBE, client, key) == 0:  # what is no Redis may answer anything
                        return True
            if time.monotonic() > end:
                break
        return False

    def _submit(self, script: Script, client: redis.Redis, key: str) -> Any:
        batches = self._batches[script.name]
        batch = batches.get(client) or batches.setdefault(
            client, GroupCommit(functools.partial(self._runner.run_batch, script))
        )
        return batch.submit((client, key))
