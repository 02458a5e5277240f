"""Giving up after so long, and giving way to others; the only importer of gevent in the app."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import gevent
from gevent.monkey import is_module_patched

ITEMS_A_TURN = 50  # of a long list, before a worker's other requests have their turn

T = TypeVar("T")


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise TimeoutError where the block takes longer, whatever it waits for.

    Only under gevent, as in every worker; elsewhere the sockets' own timeouts have to do. What the block waits for is
    interrupted by an exception that no library takes for one of its own, and that no `except Exception` catches.
    """
    if not is_module_patched("socket"):
        yield
        return
    with gevent.Timeout(seconds, False):  # type: ignore[arg-type]  # ends the block silently where it is this one
        yield
        return
    raise TimeoutError(f"not within {seconds:g} s") from None


def give_way() -> None:
    """Let the worker's other requests have their turn, in the middle of long work.

    Not by sleep(0): gevent then looks for what has arrived only after fifty such turns or five milliseconds.
    """
    time.sleep(1e-6)


def giving_way(items: Iterable[T]) -> Iterator[T]:
    """The items of a long list, with a turn for the worker's other requests after each ITEMS_A_TURN of them."""
    for number, item in enumerate(items, 1):
        yield item
        if number % ITEMS_A_TURN == 0:
            give_way()
