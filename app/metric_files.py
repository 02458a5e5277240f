"""The files in which workers add up their metrics: prometheus_client's, with two changes.

Their space is taken for good when they are made and when they grow. prometheus_client leaves them sparse, and then the
first write to a page for which a full disk has no room kills the process (SIGBUS).

They are named after a slot, which is free again when its worker has gone, and not after a process: the next worker
counts on in the files of a dead one, so that they stay as few as the workers and no count is lost or seen twice.
"""

import fcntl
import functools
import glob
import logging
import os
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, values
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

log = logging.getLogger(__name__)

FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own name
SIZE = 1 << 16  # bytes of a new file, as in prometheus_client
ENTRY = 28  # bytes that an entry takes beside its key, at most


class ReservedFile(MmapedDict):
    """prometheus_client's file with its space reserved. Raises OSError where there is none."""

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        if not os.path.exists(filename):
            # Complete before it has its name: a reader would take an empty file for a broken one.
            unfinished = f"{filename}.new"
            with open(unfinished, "wb") as file:
                _reserve(file.fileno(), SIZE)
            os.rename(unfinished, filename)
        super().__init__(filename, read_mode)  # type: ignore[no-untyped-call]

    def _init_value(self, key: str) -> None:
        if self._used + len(key) + ENTRY > self._capacity:
            _reserve(self._f.fileno(), 2 * self._capacity)  # the size that it is about to be given
        super()._init_value(key)  # type: ignore[no-untyped-call]


def share_values() -> None:
    """Keep the metrics made from now on in the folder that gunicorn_metrics.py made, or in memory without one."""
    if FOLDER in os.environ:
        values.ValueClass = _shared_values(os.environ[FOLDER])


@functools.cache
def _shared_values(folder: str) -> Callable[..., Any]:
    """Makes values in the files of this process. One for which there is no room is kept in memory.

    So metrics never stop a request. That they are incomplete is logged once.
    """
    values.MmapedDict = ReservedFile  # type: ignore[attr-defined]
    in_file: Callable[..., Any] | None = None
    complete = True

    def value(*args: Any, **kwargs: Any) -> Any:
        nonlocal in_file, complete
        try:
            if in_file is None:
                slot = _claim_slot(folder)
                in_file = values.MultiProcessValue(lambda: slot)  # type: ignore[no-untyped-call]
            return in_file(*args, **kwargs)
        except Exception as error:
            if complete:
                complete = False
                log.warning("metrics_incomplete", extra={"reason": str(error)})
            return values.MutexValue(*args, **kwargs)  # type: ignore[no-untyped-call]

    return value


def of_all_workers() -> CollectorRegistry | None:
    """A registry of all files; None without files."""
    folder = os.environ.get(FOLDER)
    if folder is None or not glob.glob(os.path.join(glob.escape(folder), "*.db")):
        return None
    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
    return registry


def _claim_slot(folder: str) -> int:
    """The lowest number that no living process holds; this one holds it until it ends."""
    # A record lock (fcntl(2)) is not inherited, and ends with the process however that ends.
    slots, slot = os.open(os.path.join(folder, "slots"), os.O_RDWR), 0
    while True:
        try:
            fcntl.lockf(slots, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
            return slot
        except BlockingIOError:
            slot += 1


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):  # macOS has none
        os.posix_fallocate(descriptor, 0, size)
