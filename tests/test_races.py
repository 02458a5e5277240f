"""Callers that get in each other's way, scripts that get lost and a Redis that is full: on a real one only."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import redis
import requests
from flask import Flask

from app import create_app
from app.config import Config
from app.store import SessionStore, index_key, session_key
from app.store.connect import connect
from app.store.server import OnePrimary
from tests.conftest import FAILURES, SECRET, Caller, immortal, token
from tests.servers import RedisServer, gunicorn

pytestmark = pytest.mark.parametrize("backend", ["redis"], indirect=True)


def headers(subject: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(subject)}"}


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    """An app whose sessions outlive every test here."""
    return make_app(session_idle_seconds=60, session_absolute_seconds=120)


def at_once(*acts: Callable[[], object]) -> list:
    """Run functions at the same time, each in a thread; gives their results."""
    barrier = threading.Barrier(len(acts))

    def start(act: Callable[[], object]) -> object:
        barrier.wait(10)
        return act()

    with ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(start, acts))


def test_revoke_against_heartbeats(app: Flask, database: redis.Redis) -> None:
    """After a revoke has returned no heartbeat, not even one in flight, leaves anything of the session."""
    revoker, beater = Caller(app), Caller(app)
    outcomes: Counter[int] = Counter()
    with ThreadPoolExecutor(2) as pool:
        for round in range(400):
            id = revoker.open()
            barrier = threading.Barrier(3)

            def beat() -> list[int]:
                barrier.wait(10)
                return [beater.heartbeat(id).status_code for _ in range(3)]

            beats = [pool.submit(beat) for _ in range(2)]
            barrier.wait(10)
            time.sleep(round % 8 * 0.0003)
            assert revoker.revoke(id).status_code == 200
            assert database.exists(session_key("alice", id)) == 0
            for statuses in (each.result() for each in beats):
                assert statuses == sorted(statuses)
                outcomes.update(statuses)
            assert beater.heartbeat(id).status_code == 404
            assert database.keys() == []
    assert set(outcomes) == {200, 404}


@pytest.mark.parametrize("callers", [2, 8])
def test_last_place(make_app: Callable[..., Flask], database: redis.Redis, callers: int) -> None:
    """Of several callers that want the last place under the limit exactly one gets it."""
    app = make_app(session_limit=4, session_idle_seconds=60, session_absolute_seconds=120)
    alice = Caller(app)
    for _ in range(25):
        for _ in range(3):
            alice.open()
        statuses = at_once(*[lambda: Caller(app).post("/sessions").status_code] * callers)
        assert sorted(statuses) == [201] + [429] * (callers - 1)
        assert len(alice.ids()) == len(database.keys("session:*")) == 4
        assert immortal(database) == []
        assert alice.post("/sessions/revoke-all").status_code == 200


def test_revoke_once(app: Flask) -> None:
    """Of several callers that revoke the same session exactly one is told that it did."""
    for _ in range(25):
        id = Caller(app).open()
        statuses = at_once(*[lambda: Caller(app).revoke(id).status_code] * 4)
        assert sorted(statuses) == [200, 404, 404, 404]


def test_revoke_all_against_everything(app: Flask, database: redis.Redis) -> None:
    """Revoking all while sessions are opened, kept alive and listed leaves keys and index in agreement."""
    end = time.monotonic() + 2
    seen: Counter[tuple[str, int]] = Counter()
    known = [Caller(app).open()]

    def repeat(name: str, act: Callable[[Caller], int]) -> None:
        caller = Caller(app)
        while time.monotonic() < end:
            seen[name, act(caller)] += 1

    def open_one(caller: Caller) -> int:
        response = caller.post("/sessions")
        if response.status_code == 201:
            known.append(response.json["session"]["id"])
        return response.status_code

    at_once(
        *[lambda: repeat("open", open_one)] * 2,
        *[lambda: repeat("heartbeat", lambda caller: caller.heartbeat(known[-1]).status_code)] * 2,
        lambda: repeat("list", lambda caller: caller.get("/sessions").status_code),
        lambda: repeat("revoke", lambda caller: caller.post("/sessions/revoke-all").status_code),
    )
    assert set(seen) - {("open", 429)} == {
        ("open", 201),
        ("heartbeat", 200),
        ("heartbeat", 404),
        ("list", 200),
        ("revoke", 200),
    }
    indexed = database.zrange(index_key("alice"), 0, -1)
    assert set(database.keys("session:*")) == {session_key("alice", id) for id in indexed}
    assert immortal(database) == []
    alice = Caller(app)
    assert sorted(alice.ids()) == sorted(indexed)
    assert alice.post("/sessions/revoke-all").status_code == 200
    assert database.keys() == []


@pytest.mark.parametrize("method, path", FAILURES)
def test_lost_scripts(app: Flask, database: redis.Redis, method: str, path: str) -> None:
    """That Redis has forgotten its scripts, as after every restart, is not noticed by any caller."""
    alice = Caller(app)
    id = alice.open()
    assert alice.heartbeat(id).status_code == 200
    database.script_flush()
    assert alice.raw(method, path.format(id=id)).status_code in (200, 201)


def test_lost_scripts_do_not_count_twice(app: Flask, database: redis.Redis) -> None:
    """A session that is opened while Redis has lost its scripts is opened once."""
    alice = Caller(app)
    database.script_flush()
    assert alice.ids() == [] and alice.open() in alice.ids()
    assert database.zcard(index_key("alice")) == 1


def test_one_round_trip(app: Flask, database: redis.Redis) -> None:
    """A heartbeat is one script on one key and nothing else."""
    alice = Caller(app)
    id = alice.open()
    alice.heartbeat(id)
    with database.monitor() as monitor:
        database.echo("start")
        assert alice.heartbeat(id).status_code == 200
        database.echo("end")
        commands: list[str] = []
        while "ECHO end" not in commands:
            seen = monitor.next_command()
            commands += [seen["command"]] * (seen["client_type"] != "lua")
    [command] = commands[commands.index("ECHO start") + 1 : -1]
    name, _, number, key = command.split()
    assert (name, number, key) == ("EVALSHA", "1", session_key("alice", id))


@pytest.fixture
def full(config: Config, folder: Path) -> Iterator[tuple[RedisServer, Caller, list[str]]]:
    """A Redis without room for anything, a caller and the sessions it has there."""
    with RedisServer(folder, "--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as server:
        settings = {"redis_url": server.url, "session_idle_seconds": 60, "session_absolute_seconds": 120}
        client = connect(replace(config, **settings)).clients()[0]
        caller = Caller(create_app(replace(config, **settings), OnePrimary(client)))
        ids = [caller.open() for _ in range(3)]
        with pytest.raises(redis.OutOfMemoryError):
            for i in range(10_000):
                server.client.set(f"filler:{i}", "x" * 10_000, ex=600)
        # Memory of connections comes and goes; the bound is now well under what the data alone takes.
        server.client.config_set("maxmemory", "2mb")
        yield server, caller, ids
        client.connection_pool.disconnect()


@pytest.mark.parametrize("flush", [False, True])
def test_full(full: tuple[RedisServer, Caller, list[str]], flush: bool) -> None:
    """In a full Redis sessions can be kept alive, read, listed and revoked, also after it has lost its scripts."""
    server, alice, ids = full
    for act in (
        lambda: alice.heartbeat(ids[0]),
        lambda: alice.read(ids[0]),
        lambda: alice.get("/sessions"),
        lambda: alice.revoke(ids[0]),
        lambda: alice.post("/sessions/revoke-all"),
    ):
        if flush:
            server.client.script_flush()
        assert act().status_code == 200
    assert server.client.keys("session*") == []


def test_full_heartbeat_extends(full: tuple[RedisServer, Caller, list[str]]) -> None:
    """In a full Redis a heartbeat really extends the session."""
    server, alice, ids = full
    before = server.client.pexpiretime(session_key("alice", ids[0]))
    time.sleep(0.01)
    assert alice.heartbeat(ids[0]).status_code == 200
    assert server.client.pexpiretime(session_key("alice", ids[0])) > before
    assert alice.ids()[0] == ids[0]


def test_full_open(full: tuple[RedisServer, Caller, list[str]]) -> None:
    """In a full Redis no session can be opened, and the attempt leaves nothing."""
    server, alice, ids = full
    keys, index = set(server.client.keys()), server.client.zrange(index_key("alice"), 0, -1)
    refused = alice.post("/sessions")
    assert (refused.status_code, refused.data) == (500, b'{"success": false, "error": "Failed to open session"}')
    assert (set(server.client.keys()), server.client.zrange(index_key("alice"), 0, -1)) == (keys, index)
    assert sorted(alice.ids()) == sorted(ids)


OPENS = ("hgetall", "zcard", "zrange", "pexpiretime", "time", "zadd", "pexpireat", "zrem", "hset")


@pytest.fixture
def own(config: Config, folder: Path) -> Iterator[tuple[redis.Redis, Caller]]:
    """A Redis whose users can be changed, and a caller."""
    with RedisServer(folder) as server:
        settings = {"redis_url": server.url, "session_idle_seconds": 60, "session_absolute_seconds": 120}
        client = connect(replace(config, session_limit=2, **settings)).clients()[0]
        yield server.client, Caller(create_app(replace(config, session_limit=2, **settings), OnePrimary(client)))
        client.connection_pool.disconnect()


@pytest.mark.parametrize("command", OPENS)
@pytest.mark.parametrize("at_the_limit", [False, True])
def test_open_leaves_nothing(own: tuple[redis.Redis, Caller], command: str, at_the_limit: bool) -> None:
    """An open that Redis refuses in any of its steps leaves nothing behind, though it cannot be taken back either."""
    database, alice = own
    live = []
    if at_the_limit:
        live, dead = [alice.open()], alice.open()
        database.delete(session_key("alice", dead))
    index, keys = index_key("alice"), set(database.keys())
    before = database.pexpiretime(index)
    database.execute_command("ACL SETUSER", "default", "-del", f"-{command}")
    status = alice.post("/sessions").status_code
    database.execute_command("ACL SETUSER", "default", "+@all")
    if status == 201:  # a step that is only needed at the limit
        assert command in ("pexpiretime", "zrem") and not at_the_limit
        return
    assert status == 500
    assert set(database.keys()) == keys
    assert database.pexpiretime(index) == before
    assert alice.ids() == live


def test_open_without_the_right_to_the_index(own: tuple[redis.Redis, Caller]) -> None:
    """An open by a user who may not touch the index leaves nothing behind."""
    database, alice = own
    database.execute_command("ACL SETUSER", "default", "resetkeys", "~session:*")
    assert alice.post("/sessions").status_code == 500
    database.execute_command("ACL SETUSER", "default", "allkeys")
    assert database.keys() == []


@pytest.mark.timed
@pytest.mark.usefixtures("backend")
def test_long_list(redis_server: RedisServer) -> None:
    """While several callers list a thousand sessions each, all within 2 s, another one's heartbeats go on."""
    config = Config(redis_url=redis_server.url, jwt_secret=(SECRET,), session_limit=1000)
    servers = connect(config)
    store, beats = SessionStore(config, servers), []
    for _ in range(1000):
        store.open("long", login_method="token", device_name="Pixel 9 Pro", ip_address="203.0.113.195")
    id = store.open("short", login_method="token").id
    servers.clients()[0].connection_pool.disconnect()
    with gunicorn({"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET}) as address, requests.Session() as http:

        def listed() -> float:
            began = time.monotonic()
            answer = requests.get(f"{address}/sessions", headers=headers("long"), timeout=10)
            assert answer.status_code == 200 and len(answer.json()["sessions"]) == 1000
            return time.monotonic() - began

        def beat() -> None:
            began = time.monotonic()
            answer = http.post(f"{address}/sessions/{id}/heartbeat", headers=headers("short"), timeout=10)
            assert answer.status_code == 200
            beats.append(time.monotonic() - began)

        beat()
        beats.clear()  # the first one waits for the worker to start
        with ThreadPoolExecutor(6) as pool:
            lists = [pool.submit(listed) for _ in range(6)]
            while not all(each.done() for each in lists):
                beat()
        slowest = max(each.result() for each in lists)
    print(
        f"\nsix lists of 1,000: slowest {slowest:.2f} s; another caller's slowest heartbeat {max(beats) * 1000:.0f} ms"
    )
    assert slowest < 2
    assert max(beats) < 0.5
