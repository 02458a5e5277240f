"""One Redis in all sorts of trouble, under load."""

import signal
import time
from collections.abc import Iterator

import pytest
import requests

from faults.load import Figures, Load, headers
from tests.conftest import SECRET
from tests.servers import PERSISTENT, RedisServer, gunicorn, until


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis that keeps what it has acknowledged when it is killed."""
    with RedisServer(tmp_path_factory.mktemp("t"), *PERSISTENT) as server:
        yield server


@pytest.fixture
def load(server: RedisServer) -> Iterator[Load]:
    """Callers that keep 32 sessions alive, and one that opens and revokes others."""
    with gunicorn({"REDIS_URL": server.url, "JWT_SECRET": SECRET}) as address:
        yield Load(address, [f"beat-{n}" for n in range(32)], churn=True)


def report(load: Load, what: str, figures: Figures) -> None:
    figures(f"{what}: 500s for {load.trouble():.1f} s, slowest {load.slowest():.2f} s, {dict(load.statuses())}")


@pytest.mark.timed
def test_hangs(server: RedisServer, load: Load, figures: Figures) -> None:
    """While Redis hangs each caller gets an answer within 2 s, other routes answer as ever, and it recovers soon."""
    with load:
        server.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        while time.monotonic() < began + 3:
            alive = requests.get(f"{load.address}/healthz", timeout=5)
            assert (alive.status_code, alive.elapsed.total_seconds() < 0.5) == (200, True)
            time.sleep(0.1)
        server.process.send_signal(signal.SIGCONT)
        resumed = time.monotonic()
        time.sleep(2)
    report(load, "Redis hangs for 3 s", figures)
    load.check(500)
    assert max(at for at, _, status, _ in load.answers if status == 500) < resumed + 1
    assert load.lost() == (0, 0)


def test_killed(server: RedisServer, load: Load, figures: Figures) -> None:
    """After a Redis that keeps its data was killed, what was acknowledged is still there."""
    with load:
        server.stop()
        time.sleep(1)
        server.start()
        time.sleep(2)
    report(load, "Redis killed and started again after 1 s", figures)
    load.check(500)
    assert load.lost() == (0, 0)
    assert {status for *_, status, _ in load.answers[-20:]} <= {200, 201}


def test_scripts_lost(server: RedisServer, load: Load, figures: Figures) -> None:
    """When the scripts are lost again and again no caller notices."""
    with load:
        for _ in range(50):
            server.client.script_flush()
            time.sleep(0.04)
    report(load, "SCRIPT FLUSH 50 times", figures)
    load.check()


def test_full(server: RedisServer, load: Load, figures: Figures) -> None:
    """In a full Redis sessions are kept alive and revoked, and none is opened."""
    path = f"{load.address}/sessions/{load.open('other')}/revoke"
    with load:
        server.client.config_set("maxmemory-policy", "noeviction")
        server.client.config_set("maxmemory", 1)
        began = time.monotonic() + 0.5
        time.sleep(2)
        full = [(who, status) for at, who, status, _ in load.answers if at > began]
        assert requests.post(path, headers=headers("other"), timeout=5).status_code == 200
    report(load, "Redis full", figures)
    assert {status for who, status in full if who.startswith("beat")} == {200}
    assert {status for who, status in full if not who.startswith("beat")} == {500}


def test_loading(server: RedisServer, load: Load, figures: Figures) -> None:
    """While Redis reads its data from disk a session is not called gone."""
    server.client.mset({f"filler-{n}": "x" * 50 for n in range(20_000)})
    with load:
        server.stop()
        # As slow as with very much data.
        server.launch("--key-load-delay", "100", "--loading-process-events-interval-bytes", "1024")
        until(lambda: server.client.ping(), 30)
        time.sleep(1)
    report(load, "Redis loads its data", figures)
    load.check(500)
