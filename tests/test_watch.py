"""Word of an expiry: `sessions watch` tells of each session that expires, as it happens."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import redis

from app import create_app
from app.config import Config
from app.store import SessionStore
from app.store.connect import connect
from tests.conftest import SECRET, milliseconds
from tests.servers import PERSISTENT, ROOT, RedisServer, free_ports, required, running, until

TELLS = ("--notify-keyspace-events", "Kx")


class Watcher:
    """The command, started, and what it has printed so far."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.lines: list[dict] = []
        self.said: list[str] = []
        self._readers = [
            threading.Thread(target=lambda: self.lines.extend(map(json.loads, process.stdout))),
            threading.Thread(target=lambda: self.said.extend(map(str.strip, process.stderr))),
        ]
        for reader in self._readers:
            reader.start()

    def join(self) -> None:
        for reader in self._readers:
            reader.join()
        self.process.stdout.close(), self.process.stderr.close()

    @property
    def expired(self) -> list[tuple[str, str]]:
        return [(line["subject"], line["session"]) for line in self.lines]


@contextmanager
def watching(url: str, *words: str) -> Iterator[Watcher]:
    command = [sys.executable, "-m", "flask", "--app", "wsgi", "sessions", "watch", *words]
    environ = {"PATH": os.environ["PATH"], "FLASK_SKIP_DOTENV": "1", "REDIS_URL": url, "JWT_SECRET": SECRET}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with running(command, cwd=ROOT, env=environ, **pipes) as process:
        watcher = Watcher(process)
        yield watcher
    watcher.join()


def store_on(url: str) -> SessionStore:
    config = Config(redis_url=url, jwt_secret=(SECRET,), session_idle_max_seconds=100)
    return SessionStore(config, connect(config))


def subscribed(client: redis.Redis) -> bool:
    return client.pubsub_numpat() > 0


@pytest.fixture
def server(folder: Path) -> Iterator[RedisServer]:
    with RedisServer(folder, *TELLS, *PERSISTENT) as server:
        yield server


def test_expiry(server: RedisServer) -> None:
    """A session that expires is a JSON line with its plain names; a revoked one and one that lives on are none."""
    store = store_on(server.url)
    with watching(server.url) as watcher:
        until(lambda: subscribed(server.client))
        store.open("bob", login_method="token")
        store.revoke("bob", store.open("bob", login_method="token").id)
        server.client.set("other", "x", px=1)
        session = store.open("auth0|1/{2} é", login_method="token", idle_timeout=1)
        until(lambda: watcher.lines)
        time.sleep(0.3)
        [line] = watcher.lines
    assert list(line) == ["time", "subject", "session"]
    assert (line["subject"], line["session"]) == ("auth0|1/{2} é", session.id)
    assert 0 <= milliseconds(line["time"]) - session.expires_at_ms < 1000
    assert watcher.said == []


@pytest.mark.parametrize("flags", ["Kx", "KEA"])
def test_one_subject(server: RedisServer, flags: str) -> None:
    """Of one subject alone where that is asked for; heartbeats and other events are none, whatever Redis tells."""
    server.client.config_set("notify-keyspace-events", flags)
    store = store_on(server.url)
    with watching(server.url, "a*") as watcher:
        until(lambda: subscribed(server.client))
        for subject in ("ab", "a", "b"):
            store.open(subject, login_method="token", idle_timeout=1)
        session = store.open("a*", login_method="token", idle_timeout=1)
        store.heartbeat("a*", session.id)
        until(lambda: watcher.lines)
        time.sleep(0.3)
    assert watcher.expired == [("a*", session.id)]


@pytest.mark.parametrize("flags", ["", "K", "x", "Ex", "Kg", "A", "KE"])
def test_not_enabled(server: RedisServer, flags: str) -> None:
    """Where Redis does not tell of expiries the command says what to set, sets nothing and stops."""
    server.client.config_set("notify-keyspace-events", flags)
    before = server.client.config_get("notify-keyspace-events")
    config = Config(redis_url=server.url, jwt_secret=(SECRET,))
    result = create_app(config).test_cli_runner().invoke(args=["sessions", "watch"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ") and "CONFIG SET notify-keyspace-events Kx" in result.stderr
    assert server.client.config_get("notify-keyspace-events") == before


def test_restart(server: RedisServer) -> None:
    """Where the connection breaks the command comes back and says that it may have missed some."""
    with watching(server.url) as watcher:
        until(lambda: subscribed(server.client))
        server.stop()
        until(lambda: watcher.said)
        server.start()
        until(lambda: subscribed(server.client))
        session = store_on(server.url).open("alice", login_method="token", idle_timeout=1)
        until(lambda: watcher.lines)
    assert watcher.expired == [("alice", session.id)]
    broken, back = watcher.said
    assert broken.startswith("The connection to Redis broke: ")
    assert back == "Watching again. Sessions may have expired unseen."


def test_unreachable(folder: Path) -> None:
    """Where Redis cannot be reached at the start the command says so in one line and stops."""
    with watching(f"unix://{folder}/nothing") as watcher:
        assert watcher.process.wait(10) == 1
    [said] = watcher.said
    assert said.startswith("Error: Redis is in trouble: ")


def test_forbidden(server: RedisServer) -> None:
    """Where its user may not listen the command says so in one line and stops."""
    rights = ["on", ">pw", "~session*", "-@all", "+ping", "+psubscribe", "resetchannels"]
    server.client.execute_command("ACL", "SETUSER", "app", *rights)
    with watching(f"unix://app:pw@{server.socket}") as watcher:
        assert watcher.process.wait(10) == 1
    [said] = watcher.said
    assert said.startswith("Error: Redis is in trouble: ")


def test_rights(server: RedisServer) -> None:
    """A user that may subscribe, and see what Redis is set to tell, needs no other rights."""
    rights = ["on", ">pw", "-@all", "+psubscribe", "+ping", "+config|get", "allchannels"]
    server.client.execute_command("ACL", "SETUSER", "app", *rights)
    with watching(f"unix://app:pw@{server.socket}") as watcher:
        until(lambda: subscribed(server.client))
        session = store_on(server.url).open("alice", login_method="token", idle_timeout=1)
        until(lambda: watcher.lines)
        time.sleep(6)  # until the connection has been asked whether it is there
    assert (watcher.expired, watcher.said) == ([("alice", session.id)], [])


def test_cluster(tmp_path: Path) -> None:
    """In a cluster it hears every primary."""
    ports = free_ports(3)
    with ExitStack() as stack:
        clients = []
        for port in ports:
            (home := tmp_path / str(port)).mkdir()
            command = [required("redis-server"), "--port", str(port), "--save", "", "--dir", str(home), *TELLS]
            stack.enter_context(running([*command, "--cluster-enabled", "yes"], stdout=subprocess.DEVNULL))
            clients.append(stack.enter_context(redis.Redis(port=port, decode_responses=True)))
            until(clients[-1].ping)
        nodes = [f"127.0.0.1:{port}" for port in ports]
        create = [required("redis-cli"), "--cluster", "create", *nodes, "--cluster-yes"]
        subprocess.run(create, check=True, stdout=subprocess.DEVNULL, timeout=60)
        until(lambda: all(each.cluster("info")["cluster_state"] == "ok" for each in clients))
        url = f"redis+cluster://{nodes[0]}"
        watcher = stack.enter_context(watching(url))
        until(lambda: all(subscribed(each) for each in clients))
        store = store_on(url)
        sessions = {(name, store.open(name, login_method="token", idle_timeout=1).id) for name in "abcdefghijkl"}
        until(lambda: len(watcher.lines) >= 12)
        held = [len(each.keys("sessions:*")) for each in clients]
    assert set(watcher.expired) == sessions and len(watcher.lines) == 12
    assert all(held)
