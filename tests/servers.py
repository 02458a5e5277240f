"""Servers that the tests start themselves, on loopback or on a socket in a temporary folder, and stop."""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import redis

ROOT = Path(__file__).parent.parent


# Below the ports that the kernel gives to outgoing connections, one of which could otherwise take a port between its
# choice and its use. Each process of pytest-xdist has a thousand of its own, since it could be another one's choice as
# well. A cluster's nodes use the port 10,000 above, too. Node and browsers connect to none of some ports, of which
# 10,080 is the highest (https://fetch.spec.whatwg.org/#port-blocking).
FIRST_PORT = 11_000 + 1_000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10)
PORTS = range(FIRST_PORT, FIRST_PORT + 1_000)


def free_port() -> int:
    """A TCP port on which nothing listens."""
    while True:
        port = random.choice(PORTS)
        with contextlib.suppress(OSError), socket.socket() as each:
            each.bind(("127.0.0.1", port))
            return port


def free_ports(number: int) -> list[int]:
    """So many ports, no two the same."""
    ports: set[int] = set()
    while len(ports) < number:
        ports.add(free_port())
    return list(ports)


def required(program: str) -> str:
    """The path of a program; without it the test is skipped on a laptop and fails on CI."""
    path = shutil.which(program)
    if path is None and os.environ.get("CI") == "true":
        pytest.fail(f"{program} is missing, and on CI that is a failure")
    return path or pytest.skip(f"{program} is not on the PATH")


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for a condition; connection trouble counts as not yet."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, redis.RedisError):
            if condition():
                return
        time.sleep(0.02)
    raise AssertionError("not within %s seconds" % seconds)


@contextlib.contextmanager
def running(command: list[str], **options) -> Iterator[subprocess.Popen]:
    """A process for the length of a block, stopped by its id."""
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# What is acknowledged has been written and outlives the process. To wait for the disk, too, would only help against a
# power cut, and on a busy machine a disk can take longer than the service waits for Redis.
PERSISTENT = ("--appendonly", "yes", "--appendfsync", "no")


class RedisServer:
    """A redis-server on a socket, which can be stopped and started again at the same place."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._command = [required("redis-server"), "--port", "0", "--unixsocket", str(self.socket)]
        self._command += ["--save", "", "--dir", str(folder), "--loglevel", "warning", *options]
        self.client = redis.Redis(unix_socket_path=str(self.socket), decode_responses=True)
        self.process: subprocess.Popen | None = None

    def launch(self, *options: str) -> None:
        """Start without waiting until it answers."""
        self.process = subprocess.Popen([*self._command, *options], stdout=subprocess.DEVNULL)

    def start(self) -> None:
        self.launch()
        until(self.client.ping)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "RedisServer":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self.client.close()


class SlowWay:
    """A way to a Redis over which replies come late, or not at all: with `cuts` set the connection ends instead."""

    def __init__(self, server: RedisServer) -> None:
        self.seconds, self.cuts = 0.0, False
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> "SlowWay":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(str(self._server.socket))
                threading.Thread(target=self._pass_on, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._pass_on, args=(far, near, True), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, replies: bool) -> None:
        with contextlib.suppress(OSError), source, target:
            while (data := source.recv(65536)) and not (replies and self.cuts):
                time.sleep(self.seconds if replies else 0)
                target.sendall(data)
            for end in (source, target):
                end.shutdown(socket.SHUT_RDWR)


def log_lines(file: Path) -> list[dict]:
    """What the service has written to its stdout, each line a JSON object; the last one may be on its way."""
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


@contextlib.contextmanager
def gunicorn_logged(
    environ: dict[str, str], file: Path, workers: int = 1, **options: object
) -> Iterator[tuple[subprocess.Popen, int]]:
    """The service with its stdout in a file; gives the process and the port. The options are `gunicorn_process`'s."""
    with file.open("wb") as stdout, gunicorn_process(environ, workers, stdout=stdout, **options) as started:
        yield started


def workers_of(process: subprocess.Popen) -> list[int]:
    """The process ids of a gunicorn's workers."""
    return [int(id) for id in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@contextlib.contextmanager
def gunicorn(environ: dict[str, str], workers: int = 1) -> Iterator[str]:
    """The service under its own gunicorn.conf.py, on a free port; gives its base address."""
    with gunicorn_process(environ, workers) as (_, port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def gunicorn_process(
    environ: dict[str, str], workers: int = 1, within: Sequence[str] = (), port: int | None = None, **options: object
) -> Iterator[tuple[subprocess.Popen, int]]:
    """The same; gives the process and the port. `within` is a command that becomes the one behind it.

    `port` is the one that `environ` makes it listen on, if it does. The other options are Popen's.
    """
    port = port or free_port()
    env = {"PATH": os.environ["PATH"], "PORT": str(port), "WEB_CONCURRENCY": str(workers), **environ}
    command = [*within, sys.executable, "-m", "gunicorn", "wsgi:app", "--log-level", "warning"]
    with running(command, env=env, **{"cwd": ROOT, **options}) as process:

        def listening() -> bool:
            assert process.poll() is None, "gunicorn did not start"
            return socket.create_connection(("127.0.0.1", port), 1).close() is None

        until(listening, 60)
        yield process, port
