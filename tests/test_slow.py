"""A Redis that is slow, or that cannot be found: no caller waits for an answer for 2 seconds."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import requests

from tests.conftest import SECRET, token
from tests.servers import RedisServer, SlowWay, gunicorn, gunicorn_logged, log_lines

pytestmark = pytest.mark.timed
HEADERS = {"Authorization": f"Bearer {token()}"}
MISSING = "A" * 32
REQUESTS: list[tuple[str, str, object]] = [
    ("POST", "", None),
    ("GET", "", None),
    ("GET", "/{id}", None),
    ("POST", "/{id}/heartbeat", None),
    ("POST", "/heartbeat", {"ids": [MISSING] * 1000}),
    ("POST", "/{id}/revoke", None),
    ("POST", "/revoke-all", None),
]


def timed(method: str, url: str, body: object = None) -> tuple[int, float]:
    """The status of an answer and the seconds it took."""
    began = time.monotonic()
    status = requests.request(method, url, json=body, headers=HEADERS, timeout=20).status_code
    return status, time.monotonic() - began


@pytest.fixture
def server(folder: Path) -> Iterator[RedisServer]:
    """A Redis with a password."""
    with RedisServer(folder) as server:
        server.client.config_set("requirepass", "secret")
        yield server


def test_slow_replies(server: RedisServer) -> None:
    """Whatever is asked, on new connections and old ones, alone or in a crowd, is answered within 2 seconds."""
    with SlowWay(server) as way:
        environ = {"REDIS_URL": f"redis://:secret@127.0.0.1:{way.port}/1", "JWT_SECRET": SECRET}
        with gunicorn(environ) as address, ThreadPoolExecutor(20) as pool:
            assert requests.get(f"{address}/healthz", timeout=20).status_code == 200  # the worker is there
            way.seconds = 0.45  # one reply in time after the other
            for method, path, body in REQUESTS:
                status, took = timed(method, f"{address}/sessions{path.format(id=MISSING)}", body)
                assert status in (200, 201, 404, 500) and took < 2, path
            beats = [pool.submit(timed, "POST", f"{address}/sessions/{MISSING}/heartbeat") for _ in range(20)]
            for beat in beats:
                status, took = beat.result()
                assert status in (404, 500) and took < 2
            assert timed("GET", f"{address}/readyz")[1] < 2
            way.seconds = 0
            assert timed("POST", f"{address}/sessions")[0] == 201


@pytest.fixture
def silent() -> Iterator[list[int]]:
    """Ports at which connections are taken and nothing is ever said."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(closing(socket.create_server(("127.0.0.1", 0)))) for _ in range(3)]
        yield [listener.getsockname()[1] for listener in listeners]


@pytest.mark.parametrize("scheme, path", [("redis+sentinel", "/main"), ("redis+cluster", "")])
def test_silent_nodes(silent: list[int], scheme: str, path: str) -> None:
    """While sentinels or nodes of a cluster say nothing, answers come within 2 seconds all the same."""
    hosts = ",".join(f"127.0.0.1:{port}" for port in silent)
    with gunicorn({"REDIS_URL": f"{scheme}://{hosts}{path}", "JWT_SECRET": SECRET}) as address:
        assert requests.get(f"{address}/healthz", timeout=20).status_code == 200  # the worker is there
        with ThreadPoolExecutor(10) as pool:
            beats = [pool.submit(timed, "POST", f"{address}/sessions/{MISSING}/heartbeat") for _ in range(10)]
            for status, took in [*(beat.result() for beat in beats), timed("GET", f"{address}/sessions")]:
                assert status == 500 and took < 2
        status, took = timed("GET", f"{address}/readyz")
        assert status == 503 and took < 2


def test_lost_reply(folder: Path) -> None:
    """A revoke whose reply is lost is no 404, which would say that there was no session, and the log says so."""
    with RedisServer(folder) as server, SlowWay(server) as way:
        environ = {"REDIS_URL": f"redis://127.0.0.1:{way.port}", "JWT_SECRET": SECRET}
        with gunicorn_logged(environ, folder / "log") as (_, port):
            address = f"http://127.0.0.1:{port}/sessions"
            session = requests.post(address, headers=HEADERS, timeout=5).json()["session"]
            assert timed("POST", f"{address}/{MISSING}/revoke")[0] == 404  # Redis has the script from here on
            way.cuts = True
            assert timed("POST", f"{address}/{session['id']}/revoke")[0] == 500
            way.cuts = False
            assert timed("POST", f"{address}/{session['id']}/revoke")[0] == 404
        events = [line["event"] for line in log_lines(folder / "log") if line["logger"] == "sessions"]
        assert events == ["session_opened", "session_not_found", "revoke_uncertain", "session_not_found"]
