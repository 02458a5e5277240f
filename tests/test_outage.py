"""A Redis that is gone, hangs, or refuses: never taken for the end of a session, and got over without a restart."""

import re
import signal
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from flask import Flask

from app import create_app
from app.config import Config
from app.store.connect import connect
from app.store.server import OnePrimary
from tests.conftest import FAILURES, SECRET, Caller
from tests.servers import PERSISTENT, RedisServer, until

MISSING = "A" * 32
each_endpoint = pytest.mark.parametrize("method, path", FAILURES)


@pytest.fixture
def server(folder: Path) -> Iterator[RedisServer]:
    """A Redis to be hurt, which remembers over a restart what it was told."""
    with RedisServer(folder, *PERSISTENT, "--enable-protected-configs", "yes") as server:
        yield server


@pytest.fixture
def app(server: RedisServer) -> Iterator[Flask]:
    config = Config(redis_url=server.url, jwt_secret=(SECRET,), session_idle_seconds=60)
    client = connect(config).clients()[0]
    yield create_app(config, OnePrimary(client))
    client.connection_pool.disconnect()


@pytest.fixture
def id(alice: Caller) -> str:
    """A session that was opened before the trouble."""
    return alice.open()


def assert_fails(alice: Caller, method: str, path: str) -> None:
    """An endpoint gives its own 500, within 2 seconds, and says when to try again."""
    began = time.monotonic()
    response = alice.raw(method, path)
    assert time.monotonic() - began < 2
    sentence = FAILURES[method, re.sub("/[A-Za-z0-9_-]{32}", "/{id}", path)]
    body = b'{"success": false, "error": "%b"}' % sentence.encode()
    assert (response.status_code, response.data) == (500, body)
    assert re.fullmatch("[1-9][0-9]*", response.headers["Retry-After"])


@each_endpoint
def test_gone(alice: Caller, server: RedisServer, id: str, method: str, path: str) -> None:
    """While Redis is gone every endpoint fails in its own words, for sessions that exist and others alike."""
    server.stop()
    assert_fails(alice, method, path.format(id=id))
    assert_fails(alice, method, path.format(id=MISSING))


@each_endpoint
def test_back(alice: Caller, server: RedisServer, id: str, method: str, path: str) -> None:
    """When Redis is back at its place the first request succeeds, and the sessions that it kept live on."""
    server.stop()
    assert_fails(alice, method, path.format(id=id))
    server.start()
    assert alice.raw(method, path.format(id=id)).status_code in (200, 201)


def test_back_with_everything(alice: Caller, server: RedisServer, id: str) -> None:
    """After a restart of Redis an old session is kept alive and a new one can be opened."""
    expiry = alice.read(id).json["session"]["expiresAt"]
    server.stop()
    server.start()
    assert alice.heartbeat(id).json["newExpiry"] > expiry
    new = alice.open()
    assert sorted(alice.ids()) == sorted([id, new])


@each_endpoint
def test_token_comes_first(app: Flask, server: RedisServer, method: str, path: str) -> None:
    """While Redis is gone a caller without a valid token is told of the token."""
    server.stop()
    assert Caller(app, exp=1).raw(method, path.format(id=MISSING)).status_code == 401
    assert app.test_client().open(path.format(id=MISSING), method=method).status_code == 401


@pytest.mark.timed
def test_readiness(alice: Caller, server: RedisServer) -> None:
    """Liveness does not depend on Redis; readiness does, within 2 seconds, and comes back by itself."""
    for hurt, heal in (
        (server.stop, server.start),
        (
            lambda: server.process.send_signal(signal.SIGSTOP),
            lambda: server.process.send_signal(signal.SIGCONT),
        ),
    ):
        hurt()
        began = time.monotonic()
        assert [alice.get(path).status_code for path in ("/healthz", "/readyz")] == [200, 503]
        assert time.monotonic() - began < 2
        heal()
        assert [alice.get(path).status_code for path in ("/healthz", "/readyz")] == [200, 200]


@pytest.mark.timed
@each_endpoint
def test_hangs(alice: Caller, server: RedisServer, id: str, method: str, path: str) -> None:
    """A Redis that does not answer is an error within 2 seconds, and forgotten as soon as it answers again."""
    server.process.send_signal(signal.SIGSTOP)
    assert_fails(alice, method, path.format(id=id))
    server.process.send_signal(signal.SIGCONT)
    server.client.ping()
    began = time.monotonic()
    assert alice.open()
    assert time.monotonic() - began < 1


@pytest.mark.timed
def test_hangs_and_the_session_lives(alice: Caller, server: RedisServer, id: str) -> None:
    """Within a second after Redis answers again a heartbeat succeeds."""
    server.process.send_signal(signal.SIGSTOP)
    assert_fails(alice, "POST", f"/sessions/{id}/heartbeat")
    server.process.send_signal(signal.SIGCONT)
    until(lambda: alice.heartbeat(id).status_code == 200, seconds=1)


@pytest.mark.timed
def test_crowd(app: Flask, server: RedisServer, id: str) -> None:
    """Many more callers than there are connections all get their answer within 2 seconds while Redis hangs."""
    server.process.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(50) as pool:
        for each in [pool.submit(assert_fails, Caller(app), "POST", f"/sessions/{id}/heartbeat") for _ in range(50)]:
            each.result()
    server.process.send_signal(signal.SIGCONT)
    until(lambda: Caller(app).heartbeat(id).status_code == 200, seconds=1)


@each_endpoint
def test_closed_connections(alice: Caller, server: RedisServer, id: str, method: str, path: str) -> None:
    """That Redis has closed the connections that were idle is not noticed by any caller."""
    server.client.client_kill_filter(_type="normal", skipme=True)
    assert alice.raw(method, path.format(id=id)).status_code in (200, 201)


def read_only(client: redis.Redis) -> None:
    client.replicaof("127.0.0.1", "1")


def without_master(client: redis.Redis) -> None:
    client.config_set("replica-serve-stale-data", "no")
    client.replicaof("127.0.0.1", "1")


def without_replicas(client: redis.Redis) -> None:
    client.config_set("min-replicas-to-write", 1)


def without_permission(client: redis.Redis) -> None:
    client.execute_command("ACL SETUSER", "default", "-@scripting", "-@sortedset")


def with_another_password(client: redis.Redis) -> None:
    client.config_set("requirepass", "another")
    client.client_kill_filter(_type="normal", skipme=True)


def without_disk(client: redis.Redis) -> None:
    """The last snapshot has failed, after which Redis takes no writes: MISCONF."""
    gone = Path(client.config_get("dir")["dir"]) / "gone"
    gone.mkdir()
    client.config_set("dir", str(gone))
    gone.rmdir()
    client.config_set("save", "3600 1")
    client.bgsave()
    until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")


def heal(client: redis.Redis) -> None:
    client.config_set("stop-writes-on-bgsave-error", "no")
    client.replicaof("NO", "ONE")
    client.config_set("min-replicas-to-write", 0)
    client.execute_command("ACL SETUSER", "default", "+@all", "nopass")


@each_endpoint
@pytest.mark.parametrize(
    "hurt", [read_only, without_master, without_replicas, without_permission, with_another_password, without_disk]
)
def test_refuses(
    alice: Caller, server: RedisServer, id: str, hurt: Callable[[redis.Redis], None], method: str, path: str
) -> None:
    """A Redis that refuses, for whatever reason, is an error and never the end of a session."""
    hurt(server.client)
    assert_fails(alice, method, path.format(id=id))
    heal(server.client)
    assert alice.heartbeat(id).status_code == 200
    assert alice.ids() == [id]


USED = (
    "hmget",
    "hdel",
    "exists",
    "time",
    "pexpireat",
    "hset",
    "pexpiretime",
    "hgetall",
    "zrem",
    "zrange",
    "del",
    "zadd",
)


@each_endpoint
@pytest.mark.parametrize("command", USED)
def test_without_one_right(alice: Caller, server: RedisServer, id: str, command: str, method: str, path: str) -> None:
    """Whichever command a user may not use, a live session is not called gone, and lives on unless it was revoked."""
    server.client.execute_command("ACL SETUSER", "default", f"-{command}")
    status = alice.raw(method, path.format(id=id)).status_code
    assert status in (200, 201, 500)
    heal(server.client)
    revoked = status == 200 and "revoke" in path
    assert alice.heartbeat(id).status_code == (404 if revoked else 200)


@each_endpoint
@pytest.mark.parametrize("hurt", [without_replicas, without_disk])
def test_unknown(
    alice: Caller, server: RedisServer, hurt: Callable[[redis.Redis], None], method: str, path: str
) -> None:
    """A Redis that takes no writes is not believed that a session is over."""
    hurt(server.client)
    assert_fails(alice, method, path.format(id=MISSING))


@each_endpoint
def test_full(alice: Caller, server: RedisServer, id: str, method: str, path: str) -> None:
    """In a full Redis a live session is not called gone."""
    server.client.config_set("maxmemory", 1)
    assert alice.raw(method, path.format(id=id)).status_code == (
        500 if (method, path) == ("POST", "/sessions") else 200
    )


class Answering:
    """Something on a port that gives the same answer to whatever it is sent."""

    def __init__(self, answer: bytes) -> None:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                while self.request.recv(65536):
                    self.request.sendall(answer)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"redis://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Answering":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def caller_of(url: str) -> Iterator[Caller]:
    config = Config(redis_url=url, jwt_secret=(SECRET,))
    client = connect(config).clients()[0]
    yield Caller(create_app(config, OnePrimary(client)))
    client.connection_pool.disconnect()


@each_endpoint
@pytest.mark.parametrize("code", ["READONLY", "OOM", "MISCONF", "NOPERM", "TRYAGAIN", "BUSY", "CLUSTERDOWN"])
def test_codes(code: str, method: str, path: str) -> None:
    """Whatever Redis refuses with is an error and never the end of a session."""
    with Answering(f"-{code} no\r\n".encode()) as server, caller_of(server.url) as alice:
        assert_fails(alice, method, path.format(id=MISSING))


@pytest.mark.parametrize(
    "answer", [b"+\xff\xfe\r\n", b"$2\r\n\xff\xfe\r\n", b"-\xff\r\n", b"HTTP/1.1 400 \xff\r\n\r\n"]
)
def test_no_redis(answer: bytes) -> None:
    """Something that is no Redis makes the service not ready, and never fails it."""
    with Answering(answer) as server, caller_of(server.url) as alice:
        response = alice.get("/readyz")
        assert (response.status_code, response.json["status"]) == (503, "unavailable")


@each_endpoint
def test_replica_knows_nothing(alice: Caller, server: RedisServer, method: str, path: str) -> None:
    """What a replica has not got, perhaps not yet, is not taken for ended, nor its list for the whole."""
    read_only(server.client)
    assert_fails(alice, method, path.format(id=MISSING))


def test_loading(folder: Path) -> None:
    """While Redis loads its data every endpoint fails; afterwards the sessions are there."""
    with RedisServer(folder, "--rdbcompression", "no") as server:
        config = Config(redis_url=server.url, jwt_secret=(SECRET,), session_idle_seconds=60)
        client = connect(config).clients()[0]
        alice = Caller(create_app(config, OnePrimary(client)))
        id = alice.open()
        server.client.mset({f"filler:{i}": "x" * 3000 for i in range(1000)})
        server.client.save()
        server.stop()
        server.launch("--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024")
        until(lambda: server.client.info("persistence")["loading"])
        for method, path in FAILURES:
            assert_fails(alice, method, path.format(id=id))
        assert alice.get("/readyz").status_code == 503
        assert server.client.info("persistence")["loading"]
        server.client.config_set("key-load-delay", 0)
        until(lambda: not server.client.info("persistence")["loading"])
        assert alice.heartbeat(id).status_code == 200
        client.connection_pool.disconnect()
