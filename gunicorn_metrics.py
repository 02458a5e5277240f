"""The folder in which workers add up their metrics: the master makes it, and removes those of killed masters.

Apart from the app, since what the app imports must not be in the master: gevent has not patched that.
"""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile

FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own name
PREFIX = "session-heartbeat-metrics-"
ROOM = 1_310_720  # bytes for each worker; app/metric_files.py takes nine tenths of them


def make_folder(parents, workers):
    """Make a folder in the first of `parents` that has room; gives its path, or None where none has."""
    for parent in parents:
        remove_dead_folders(parent)
    for parent in parents:
        with contextlib.suppress(OSError):
            if shutil.disk_usage(parent).free >= ROOM * workers:
                # Under its name only when it is locked: until then it would look like one that was left behind.
                unnamed = tempfile.mkdtemp(prefix="new-", dir=parent)
                fcntl.flock(os.open(unnamed, os.O_RDONLY), fcntl.LOCK_EX)
                open(os.path.join(unnamed, "slots"), "x").close()
                folder = os.path.join(parent, PREFIX + os.path.basename(unnamed).removeprefix("new-"))
                os.rename(unnamed, folder)
                return folder
    return None


def remove_dead_folders(parent):
    """Remove the folders that killed masters of ours have left behind: a living one holds a lock on its own."""
    for folder in glob.glob(os.path.join(glob.escape(parent), PREFIX + "*")):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, lock)
            if os.fstat(lock).st_uid == os.geteuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
