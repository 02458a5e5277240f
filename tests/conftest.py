"""What every test can ask for: a Redis, fake or real, a clock that moves, the app on both, and callers."""

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import unquote_to_bytes

import fakeredis
import jwt
import pytest
import redis
import time_machine
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from app import create_app
from app.config import Config
from app.store.connect import connect
from app.store.server import OnePrimary
from tests.browser import Browser
from tests.servers import RedisServer

# A proxy that the environment names, such as one on the way to the package index, is not to be used for loopback.
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"

# For what does not depend on the store: once is enough.
fake_only = pytest.mark.parametrize("backend", ["fakeredis"], indirect=True)

SECRET = "the-tests-own-secret-of-more-than-32-bytes"


def pytest_collection_finish() -> None:
    """What has been collected stays: not looking through it takes a twentieth off the suite's time."""
    gc.freeze()


@dataclass
class Clock:
    """Timeouts that fit the Redis under test, in seconds, and a way to let time pass."""

    idle: int
    absolute: int
    sleep: Callable[[float], None]


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A redis-server for each worker, for the whole run. Tests that hurt it start one of their own."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A real browser for the whole run."""
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.driver.quit()


@pytest.fixture(params=["fakeredis", "redis"])
def backend(request: pytest.FixtureRequest) -> str:
    """The two stores that the suite runs on."""
    return request.param


@pytest.fixture
def clock(backend: str) -> Iterator[Clock]:
    """Time: moved on fakeredis, waited for on a real Redis, whose clock is its own."""
    if backend == "redis":
        yield Clock(idle=2, absolute=4, sleep=time.sleep)
    else:
        with time_machine.travel(time.time(), tick=True) as traveller:
            yield Clock(idle=1800, absolute=3600, sleep=traveller.shift)


@pytest.fixture
def config(backend: str, clock: Clock, request: pytest.FixtureRequest) -> Config:
    """The configuration under test; `replace` it and call `make_app` for another one."""
    url = request.getfixturevalue("redis_server").url if backend == "redis" else "memory://"
    return Config(
        redis_url=url,
        jwt_secret=(SECRET,),
        session_idle_seconds=clock.idle,
        session_idle_max_seconds=clock.idle * 100,
        session_absolute_seconds=clock.absolute,
        web_concurrency=1,
    )


@pytest.fixture
def database(backend: str, request: pytest.FixtureRequest) -> Iterator[redis.Redis]:
    """An empty Redis, for a look at what the app has left in it."""
    if backend == "fakeredis":
        yield fakeredis.FakeRedis(server=fakeredis.FakeServer(server_type="redis"), decode_responses=True)
    else:
        client = request.getfixturevalue("redis_server").client
        client.flushall()
        yield client


@pytest.fixture
def make_app(backend: str, config: Config, database: redis.Redis) -> Iterator[Callable[..., Flask]]:
    """Makes apps on the Redis under test, with settings of the configuration replaced."""
    clients = []

    def make(**settings: object) -> Flask:
        changed = replace(config, **settings)
        clients.append(database if backend == "fakeredis" else connect(changed).clients()[0])
        return create_app(changed, OnePrimary(clients[-1]))

    yield make
    for client in clients:
        client.close()
        client.connection_pool.disconnect()  # close() leaves a pool alone that it has not made


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    """The app on the Redis under test."""
    return make_app()


def token(subject: object = "alice", secret: str = SECRET, **claims: object) -> str:
    """A token that is good for a day, but for the claims given; None leaves one out."""
    claims = {"sub": subject, "exp": int(time.time()) + 86400, **claims}
    return jwt.encode({k: v for k, v in claims.items() if v is not None}, secret, "HS256")


class Caller:
    """A caller with a token, over HTTP."""

    def __init__(self, app: Flask, subject: object = "alice", **claims: object) -> None:
        self.http: FlaskClient = app.test_client()
        self.headers = {"Authorization": f"Bearer {token(subject, **claims)}"}

    def get(self, path: str, **options: object) -> TestResponse:
        return self.http.get(path, headers=self.headers, **options)

    def post(self, path: str, **options: object) -> TestResponse:
        return self.http.post(path, headers=self.headers, **options)

    def open(self, **options: object) -> str:
        """Open a session; gives its id."""
        response = self.post("/sessions", **({"json": options} if options else {}))
        assert response.status_code == 201, response.data
        return response.json["session"]["id"]

    def heartbeat(self, id: str) -> TestResponse:
        return self.post(f"/sessions/{id}/heartbeat")

    def revoke(self, id: str) -> TestResponse:
        return self.post(f"/sessions/{id}/revoke")

    def read(self, id: str) -> TestResponse:
        return self.get(f"/sessions/{id}")

    def raw(self, method: str, path: str, **options: object) -> TestResponse:
        """Send a path as it stands: decoded byte by byte, as servers do, and not tidied by the client.

        The one endpoint that cannot do without a body gets one.
        """
        if path.endswith("/sessions/heartbeat"):
            options = {"json": {"ids": ["A" * 32]}, **options}
        environ = {"PATH_INFO": unquote_to_bytes(path).decode("latin-1"), "REQUEST_URI": path, "RAW_URI": path}
        return self.http.open("/", method=method, headers=self.headers, environ_overrides=environ, **options)

    def ids(self) -> list[str]:
        """The ids of the live sessions, in the order that the list gives."""
        return [session["id"] for session in self.get("/sessions").json["sessions"]]


@pytest.fixture
def alice(app: Flask) -> Caller:
    return Caller(app, "alice")


@pytest.fixture
def bob(app: Flask) -> Caller:
    return Caller(app, "bob")


class Log:
    """What the test's own thread has logged so far.

    Other threads live on beyond their tests, such as those that refresh key sets, and log when they like.
    """

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        self._thread = threading.get_ident()

    def take(self) -> list[dict]:
        """The lines since the last look, as dictionaries."""
        records = [record for record in self._caplog.records if record.thread == self._thread]
        self._caplog.clear()
        return [vars(record) | {"event": record.getMessage()} for record in records]

    def names(self) -> list[str]:
        return [line["event"] for line in self.take()]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    caplog.set_level(logging.INFO)
    return Log(caplog)


# Every endpoint of the API and its sentence for trouble with the store; {id} stands for a session's.
FAILURES = {
    ("POST", "/sessions/{id}/heartbeat"): "Failed to update session",
    ("GET", "/sessions"): "Failed to retrieve sessions",
    ("POST", "/sessions/{id}/revoke"): "Failed to revoke session",
    ("POST", "/sessions/revoke-all"): "Failed to revoke all sessions",
    ("POST", "/sessions"): "Failed to open session",
    ("GET", "/sessions/{id}"): "Failed to retrieve session",
    ("POST", "/sessions/heartbeat"): "Failed to update sessions",
}


def milliseconds(text: str) -> int:
    """RFC 3339 with milliseconds and Z, as milliseconds since the epoch."""
    moment = datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc)
    return round(moment.timestamp() * 1000)


def answer(response: TestResponse) -> tuple[int, bytes, list[tuple[str, str]]]:
    """All that a caller gets to see: status, body, and headers apart from Date."""
    return (
        response.status_code,
        response.data,
        sorted(h for h in response.headers if h[0] not in ("Date", "X-Request-Id")),
    )


def immortal(database: redis.Redis) -> list[str]:
    """The keys that would stay for ever."""
    return [key for key in database.keys() if database.pttl(key) == -1]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose path is short enough for a socket in it."""
    return tmp_path_factory.mktemp("t")


def refused(alice: Caller, method: str, path: str, **options: object) -> int:
    """The status of a request that has to be a 4xx in the contract's shape, and no redirect."""
    response = alice.raw(method, path, **options)
    assert 400 <= response.status_code < 500
    assert "Location" not in response.headers
    if method != "HEAD":
        assert response.headers["Content-Type"] == "application/json"
        assert response.json["success"] is False
        assert isinstance(response.json["error"], str)
        assert set(response.json) <= {"success", "error", "details"}
        assert ("details" in response.json) == (response.status_code == 422)
        for messages in response.json.get("details", {}).values():
            assert messages and all(isinstance(message, str) for message in messages)
    return response.status_code
