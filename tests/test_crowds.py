"""Many callers at once while Redis takes its time: none of them is another one's outage."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from flask import Flask

from app import create_app, metric_files
from app.config import Config
from app.store.batching import GroupCommit, run_once
from tests.conftest import SECRET, Caller
from tests.servers import RedisServer, SlowWay

pytestmark = pytest.mark.timed

CROWD = 40  # callers at once: four times as many as there are connections to Redis
SECONDS = 0.1  # that a reply takes


@pytest.fixture
def app(redis_server: RedisServer) -> Iterator[Flask]:
    """The app on a Redis whose replies come late, but well in time."""
    with SlowWay(redis_server) as way:
        app = create_app(Config(redis_url=f"redis://127.0.0.1:{way.port}", jwt_secret=(SECRET,)))
        way.seconds = SECONDS
        yield app
        app.extensions["servers"].clients()[0].connection_pool.disconnect()


def all_at_once(act: Callable[[], int]) -> set[int]:
    """The results of a crowd that does the same at the same time."""
    with ThreadPoolExecutor(CROWD) as pool:
        return {each.result() for each in [pool.submit(act) for _ in range(CROWD)]}


@contextmanager
def crowd(app: Flask, path: str) -> Iterator[float]:
    """A crowd that asks for a path again and again; gives when it ends, in seconds of time.monotonic()."""
    mallory = Caller(app, "mallory")
    end = time.monotonic() + 1.5

    def insist() -> None:
        while time.monotonic() < end:
            app.test_client().get(path, headers=mallory.headers)

    with ThreadPoolExecutor(CROWD) as pool:
        for _ in range(CROWD):
            pool.submit(insist)
        time.sleep(0.2)
        yield end


def test_readiness_for_many(app: Flask) -> None:
    """Whoever asks for readiness at the same time as many others is told that the service is ready."""
    assert all_at_once(lambda: app.test_client().get("/readyz").status_code) == {200}


PATHS = ["/readyz", "/sessions", "/sessions/" + "A" * 32]


@pytest.mark.parametrize("path", PATHS)
def test_heartbeats_beside_a_crowd(app: Flask, path: str, caplog: pytest.LogCaptureFixture) -> None:
    """However many others wait for Redis, each heartbeat is answered, and the log speaks of no outage."""
    alice = Caller(app, "alice")
    id = alice.open()
    with crowd(app, path) as end:
        while time.monotonic() < end:
            assert alice.heartbeat(id).status_code == 200
    assert [record.getMessage() for record in caplog.records if record.name == "app.store.outages"] == []


def test_connections_busy(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    """Callers for whom no connection is left have a 500, and a line says so."""
    caplog.set_level(logging.INFO)
    with crowd(app, "/sessions"):
        assert 500 in all_at_once(lambda: Caller(app, "alice").get("/sessions").status_code)
    [line, *_] = [vars(record) for record in caplog.records if record.getMessage() == "connections_busy"]
    assert line["endpoint"] == "sessions.list_sessions" and line["subject"]


def test_revoke_that_was_not_sent(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    """A revoke for which no connection was left has not taken effect, and no line says that it may have."""
    caplog.set_level(logging.INFO)
    with crowd(app, "/sessions"):
        assert 500 in all_at_once(lambda: Caller(app, "alice").revoke("A" * 32).status_code)
    assert "revoke_uncertain" not in {record.getMessage() for record in caplog.records}


@pytest.mark.parametrize("path", PATHS)
def test_readiness_beside_a_crowd(app: Flask, path: str) -> None:
    """However many others wait for Redis, the service is ready."""
    with crowd(app, path) as end:
        while time.monotonic() < end:
            assert app.test_client().get("/readyz").status_code == 200


def test_scrapes_for_many(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scrapes at the same time share one answer: to put it together takes a worker for many milliseconds."""
    collected = []
    monkeypatch.setattr(metric_files, "of_all_workers", lambda: collected.append(1))
    assert all_at_once(lambda: app.test_client().get("/metrics").status_code) == {200}
    assert 0 < len(collected) < CROWD / 4


def test_shared_act_that_is_stopped() -> None:
    """Where the caller that runs a shared act is stopped from outside, those that wait for theirs go on."""
    shared = GroupCommit(run_once)
    begun, stop = threading.Event(), threading.Event()

    def stopped() -> int:
        begun.set()
        stop.wait(10)
        raise SystemExit

    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(shared.submit, stopped)
        begun.wait(10)
        follower = pool.submit(shared.submit, lambda: 1)
        time.sleep(0.1)
        stop.set()
        assert follower.result(10) == 1
        assert isinstance(leader.exception(10), SystemExit)
