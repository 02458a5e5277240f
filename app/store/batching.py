"""Callers that are waiting together share one round trip, or one call."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from app.deadline import give_way
from app.store.errors import StoreUnavailable


class Abandoned(StoreUnavailable):
    """The leader of this batch was stopped; whether the command took effect is not known."""


class _Batch:
    """Commands that travel together, and their replies once `done` is set."""

    __slots__ = ("commands", "replies", "done")

    def __init__(self) -> None:
        self.commands: list[Any] = []
        self.replies: Sequence[Any] | None = None
        self.done = threading.Event()


class GroupCommit:
    """Sends commands in batches, one batch at a time, without a thread or a timer of its own.

    The first caller of a batch is its leader. It waits until the batch before is back, while other callers join, gives
    way once to callers that are ready to run, so that they join as well, and sends the batch for all of them. Works
    under threads and, where gevent has patched them, under greenlets.
    """

    def __init__(self, send: Callable[[Sequence[Any]], Sequence[Any]]) -> None:
        """`send` takes a batch to the server in bounded time; gives a reply or an error for each command, in order.

        What it raises is raised to every caller of that batch, and to no other.
        """
        self._send = send
        self._mutex = threading.Lock()
        self._sending = threading.Lock()
        self._collecting = _Batch()

    def submit(self, command: Any) -> Any:
        """Send a command with whatever else is waiting; gives its own reply or raises its own error.

        Raises Abandoned where the leader of its batch was stopped from outside.
        """
        with self._mutex:
            batch = self._collecting
            place = len(batch.commands)
            batch.commands.append(command)
        if place == 0:
            self._lead(batch)
        else:
            batch.done.wait()
        reply = batch.replies[place] if batch.replies is not None else Abandoned()
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _lead(self, batch: _Batch) -> None:
        try:
            with self._sending:
                give_way()  # lets callers whose requests are there already join this batch
                self._close(batch)
                batch.replies = self._send(batch.commands)
        except Exception as error:
            batch.replies = [error] * len(batch.commands)
        finally:
            # Also where the leader is killed, so that no caller of its batch waits for ever.
            self._close(batch)
            batch.done.set()

    def _close(self, batch: _Batch) -> None:
        """Have the next caller open the next batch."""
        with self._mutex:
            if self._collecting is batch:
                self._collecting = _Batch()


def run_once(acts: Sequence[Callable[[], Any]]) -> Sequence[Any]:
    """For a GroupCommit of an act that is always the same: one result for all who ask at the same time."""
    return [acts[0]()] * len(acts)
