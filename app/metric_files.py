"""The files in which workers add up their metrics, as prometheus_client does, but for two things.

Their space is taken when they are made. prometheus_client leaves them sparse, and then the first write to a page for
which a full disk has no room kills the process (SIGBUS).

They are named after a slot, which is free again when its worker has gone, and not after a process: the next worker
counts on in the files of a dead one, so that they stay as few as the workers and no count is lost or seen twice.
"""

import fcntl
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, values
from prometheus_client.multiprocess import MultiProcessCollector

log = logging.getLogger(__name__)

FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own name
# Bytes by kind of metric, under prometheus_client's names: twice what all routes, methods and statuses fill.
SIZES = {"counter": 1 << 16, "gauge_max": 1 << 16, "histogram": 1 << 20}


def share_values() -> None:
    """Keep the metrics made from now on in the folder that gunicorn_metrics.py made, or in memory without one."""
    if FOLDER in os.environ:
        values.ValueClass = _shared_values(Path(os.environ[FOLDER]))


@functools.cache
def _shared_values(folder: Path) -> Callable[..., Any]:
    """Makes values in the files of this process, which claims them once, or in its memory where there is no room."""
    try:
        slot = _claim_slot(folder)
        for kind, size in SIZES.items():
            _make_file(folder / f"{kind}_{slot}.db", size)
    except OSError as error:
        log.warning("metrics_incomplete", extra={"reason": str(error)})
        return values.MutexValue
    return values.MultiProcessValue(lambda: slot)  # type: ignore[no-untyped-call, no-any-return]


def _claim_slot(folder: Path) -> int:
    """The lowest number that no living process holds; this one holds it until it ends."""
    # A record lock (fcntl(2)) is not inherited, and ends with the process however that ends. The file stays open, since
    # closing it would give the lock up.
    slots, slot = os.open(folder / "slots", os.O_RDWR), 0
    while True:
        try:
            fcntl.lockf(slots, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
            return slot
        except BlockingIOError:
            slot += 1


def _make_file(path: Path, size: int) -> None:
    if not path.exists():
        # Complete before it has its name: a reader would take an empty file for a broken one.
        unfinished = path.with_suffix(".new")
        with unfinished.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(file.fileno(), 0, size)
        unfinished.rename(path)


def of_all_workers() -> CollectorRegistry | None:
    """A registry of all files; None without files."""
    folder = os.environ.get(FOLDER)
    if folder is None or not any(Path(folder).glob("*.db")):
        return None
    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
    return registry
