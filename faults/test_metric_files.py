"""The files in which the workers add up their metrics: they cost no heartbeat, lose no count and are tidied up."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from app.metric_files import SIZES
from tests.conftest import SECRET, token
from tests.servers import ROOT, RedisServer, free_port, gunicorn_logged, gunicorn_process, log_lines, until, workers_of

AUTH = {"Authorization": f"Bearer {token()}"}
MISSING = "A" * 32


@pytest.fixture
def environ(redis_server: RedisServer, folder: Path) -> dict[str, str]:
    """The service's environment, with a TMPDIR of its own and no sessions."""
    redis_server.client.flushall()
    return {"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET, "TMPDIR": str(folder), "PROMETHEUS_MULTIPROC_DIR": ""}


def folder_of(process: subprocess.Popen) -> Path:
    """The folder in which the workers count, as soon as one does."""
    found: set[Path] = set()

    def look() -> set[Path]:
        lines = [line for id in workers_of(process) for line in Path(f"/proc/{id}/maps").read_text().splitlines()]
        found.update(Path(line.split()[-1]).parent for line in lines if line.endswith(".db"))
        return found

    until(look, 20)
    [folder] = found
    return folder


def counted(port: int, name: str = "heartbeats_total") -> float:
    """The sum of all samples of a metric."""
    families = text_string_to_metric_families(requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def beat(port: int, id: str = MISSING) -> int:
    return requests.post(f"http://127.0.0.1:{port}/sessions/{id}/heartbeat", headers=AUTH, timeout=10).status_code


def restart(process: subprocess.Popen) -> None:
    """Have all workers replaced."""
    old = set(workers_of(process))
    process.send_signal(signal.SIGHUP)
    until(lambda: workers_of(process) and not old & set(workers_of(process)), 20)


def test_folder(environ: dict[str, str], folder: Path) -> None:
    """Counters are kept in a folder of the service's own, which is gone at the end; no other one is touched."""
    foreign, temporary = folder / "foreign", folder / "tmp"
    foreign.mkdir()
    temporary.mkdir()
    (foreign / "counter_1.db").touch()
    own = {"PROMETHEUS_MULTIPROC_DIR": str(foreign), "TMPDIR": str(temporary)}
    with gunicorn_process({**environ, **own}) as (process, port):
        assert (beat(port), counted(port)) == (404, 1)
        used = folder_of(process)
        assert used != foreign and used.stat().st_mode & 0o777 == 0o700
    assert not used.exists()
    assert list(foreign.iterdir()) == [foreign / "counter_1.db"]
    assert list(temporary.iterdir()) == []


def test_folder_that_is_removed(environ: dict[str, str]) -> None:
    """Where the folder is removed a worker goes on, and tells its own counts."""
    with gunicorn_process(environ) as (process, port):
        assert beat(port) == 404
        shutil.rmtree(folder_of(process))
        assert (beat(port), counted(port)) == (404, 2)


def test_killed_master(environ: dict[str, str]) -> None:
    """The folder of a master that was killed is removed at the next start, and that of a living one stays."""
    with gunicorn_process(environ) as (living, port):
        with gunicorn_process(environ) as (killed, _):
            left = folder_of(killed)
            workers = workers_of(killed)
            killed.kill()
            killed.wait()
            until(lambda: not any(Path(f"/proc/{id}").exists() for id in workers))
        with gunicorn_process(environ) as (next_one, _):  # or at that of another service on this machine
            assert folder_of(next_one) != left
            assert not left.exists()
        assert folder_of(living).exists()
        assert (beat(port), counted(port)) == (404, 1)


def test_restarts(environ: dict[str, str]) -> None:
    """Through restarts and deaths of workers no count is lost, seen twice or goes back, and no files are added."""
    with gunicorn_process(environ) as (process, port):
        beats = 0
        for signal_, receiver in ((signal.SIGHUP, process.pid), (signal.SIGHUP, process.pid), (signal.SIGKILL, None)):
            for _ in range(5):
                assert beat(port) == 404
                beats += 1
                assert counted(port) == beats
            old, deadline = set(workers_of(process)), time.monotonic() + 20
            os.kill(receiver or next(iter(old)), signal_)
            while old & set(workers_of(process)) or not workers_of(process):
                with suppress(requests.ConnectionError):  # of the worker that was killed
                    assert counted(port) == beats
                assert time.monotonic() < deadline
        assert counted(port) == beats
        assert len(list(folder_of(process).glob("*.db"))) <= 2 * 3  # in a restart there are twice the workers


def test_space(environ: dict[str, str]) -> None:
    """All space of the files is taken at the start, so that no write to them can fail when a disk is full."""
    with gunicorn_process(environ) as (process, _):
        for file in folder_of(process).glob("*.db"):
            assert file.stat().st_blocks * 512 >= file.stat().st_size == SIZES[file.stem.removesuffix("_0")]


@pytest.fixture
def mounts() -> Iterator[list[str]]:
    """A command that runs another one behind a line of shell that may mount anything, unseen by other processes."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "--mount", "true"], capture_output=True).returncode:
        pytest.skip("needs root and unshare(1), for file systems of its own")
    yield [unshare, "--mount", "sh", "-c"]


def small(size: str, *folders: object) -> str:
    """A line of shell: put an empty file system of a size in the place of each folder, and go on."""
    return "".join(f"mount -t tmpfs -o size={size} none {each} && " for each in folders) + 'exec "$0" "$@"'


def fill(process: subprocess.Popen, folder: object) -> None:
    """Take all the space of a file system that only this process sees."""
    with open(f"/proc/{process.pid}/root{folder}/fill", "wb", 0) as file, suppress(OSError):
        while file.write(bytes(512)):
            pass


def troubles(file: Path) -> list[dict]:
    """The service's log but for what it says about its Redis."""
    return [line for line in log_lines(file) if line["level"] != "INFO" and not line["event"].startswith("Redis ")]


def test_full_disk(environ: dict[str, str], folder: Path, mounts: list[str], tmp_path: Path) -> None:
    """When all space is taken after the start, requests of old and new kinds go on and are counted; no worker dies.

    Workers that start then serve, too. Each says once that its metrics are incomplete.
    """
    file, within = tmp_path / "log", [*mounts, small("2m", "/dev/shm", folder)]
    with gunicorn_logged(environ, file, within=within) as (process, port):
        address = f"http://127.0.0.1:{port}"
        id = requests.post(f"{address}/sessions", headers=AUTH, timeout=10).json()["session"]["id"]
        for place in ("/dev/shm", folder):
            fill(process, place)
        for refused in (0, 1):
            workers = workers_of(process)
            for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT"):
                for path in ("/sessions", f"/sessions/{id}", f"/sessions/{MISSING}/heartbeat", "/sessions/heartbeat"):
                    for headers in ({}, AUTH, {**AUTH, "Content-Type": "application/json"}):
                        answer = requests.request(method, address + path, data="{", headers=headers, timeout=10)
                        assert answer.status_code < 500
                        assert beat(port, id) == 200
            assert workers_of(process) == workers
            assert counted(port) >= 60
            lines = troubles(file)
            assert [line["event"] for line in lines] == ["metrics_incomplete"] * refused
            assert all("No space left on device" in line["reason"] for line in lines)
            if not refused:
                restart(process)


def test_no_room(environ: dict[str, str], folder: Path, mounts: list[str], tmp_path: Path) -> None:
    """Where there is too little room at the start, one line says so, and a worker tells its own counts."""
    file = tmp_path / "log"
    with gunicorn_logged(environ, file, within=[*mounts, small("100k", "/dev/shm", folder)]) as (_, port):
        assert (beat(port), counted(port)) == (404, 1)
        [line] = troubles(file)
    assert line["event"].startswith(f"No room for metrics in /dev/shm or {folder}: ")


def test_read_only(environ: dict[str, str], mounts: list[str], tmp_path: Path) -> None:
    """The service starts on a read-only file system, with its files in shared memory."""
    del environ["TMPDIR"]
    line = "mount -o remount,bind,ro / && for each in /tmp /var/tmp; do mount --bind -o ro $each $each; done && "
    with gunicorn_logged(environ, tmp_path / "log", within=[*mounts, line + small("2m", "/dev/shm")]) as (
        process,
        port,
    ):
        assert (beat(port), counted(port)) == (404, 1)
        assert subprocess.run(["touch", f"/proc/{process.pid}/root/tmp/x"], capture_output=True).returncode
    assert troubles(tmp_path / "log") == []


def test_nowhere_to_write(environ: dict[str, str], mounts: list[str]) -> None:
    """Where nothing at all can be written to, one line says what is needed, and the exit code is 1."""
    del environ["TMPDIR"]
    line = 'for each in / /dev/shm /tmp /var/tmp; do mount --bind -o ro $each $each; done; cd "$PWD" && exec "$0" "$@"'
    env = {**environ, "PATH": os.environ["PATH"], "PORT": str(free_port())}
    command = [*mounts, line, sys.executable, "-m", "gunicorn", "wsgi:app", "--log-level", "warning"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (1, "")
    [said] = done.stdout.splitlines()
    assert "No folder can be written to" in said
