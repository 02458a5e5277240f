"""At the limit with SESSION_LIMIT_POLICY=replace: a silent session makes room, and a lively one never."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from flask import Flask

from app import create_app
from app.config import Config
from app.store import index_key, session_key
from app.store.connect import connect
from tests.conftest import Caller, Clock, Log, fake_only, immortal
from tests.servers import RedisServer
from tests.test_races import OPENS

MakeApp = Callable[..., Flask]
real_only = pytest.mark.parametrize("backend", ["redis"], indirect=True)


@pytest.fixture
def app(make_app: MakeApp, clock: Clock) -> Flask:
    return make_app(session_limit=3, session_limit_policy="replace", session_absolute_seconds=clock.idle * 20)


def test_silent(app: Flask, alice: Caller, database: redis.Redis, clock: Clock) -> None:
    """The session that has been silent for longest makes room, and nothing of it is left."""
    ids = [alice.open() for _ in range(3)]
    clock.sleep(clock.idle * 0.3)
    alice.heartbeat(ids[0])
    clock.sleep(clock.idle * 0.3)
    alice.heartbeat(ids[2])
    new = alice.open()
    assert set(alice.ids()) == {ids[0], ids[2], new}
    assert alice.heartbeat(ids[1]).status_code == 404
    assert set(database.zrange(index_key("alice"), 0, -1)) == {ids[0], ids[2], new}
    assert not database.exists(session_key("alice", ids[1]))
    assert immortal(database) == []


@pytest.mark.parametrize("part, status", [(0.25, 429), (0.6, 201)])
def test_lively(app: Flask, alice: Caller, clock: Clock, part: float, status: int) -> None:
    """Where no session has been silent for more than half of its idle timeout the answer is a 429, and all live on."""
    ids = [alice.open() for _ in range(3)]
    clock.sleep(clock.idle * part)
    response = alice.post("/sessions")
    assert response.status_code == status
    assert len(set(alice.ids()) & set(ids)) == (3 if status == 429 else 2)


@fake_only
def test_half(app: Flask, alice: Caller, clock: Clock) -> None:
    """Half of the idle timeout is not yet enough, and a little more is."""
    for _ in range(3):
        alice.open()
    clock.sleep(clock.idle * 0.499)
    assert alice.post("/sessions").status_code == 429
    clock.sleep(clock.idle * 0.002)
    assert alice.post("/sessions").status_code == 201


def test_mixed_idle_timeouts(app: Flask, alice: Caller, clock: Clock) -> None:
    """It is the part of its own idle timeout that counts, not the time."""
    long = alice.open(idleTimeoutSeconds=clock.idle * 10)
    clock.sleep(clock.idle * 0.2)
    short, middle = alice.open(), alice.open(idleTimeoutSeconds=clock.idle * 3)
    clock.sleep(clock.idle * 0.6)
    new = alice.open()
    assert set(alice.ids()) == {long, middle, new}
    assert alice.heartbeat(short).status_code == 404
    assert alice.post("/sessions").status_code == 429


def test_expired_first(app: Flask, alice: Caller, clock: Clock, log: Log) -> None:
    """Where a session has expired it is that one that makes room, and none is replaced."""
    alice.open()
    silent = alice.open(idleTimeoutSeconds=clock.idle * 2)
    alice.open(idleTimeoutSeconds=clock.idle * 4)
    clock.sleep(clock.idle * 1.2)
    log.take()
    alice.open()
    assert silent in alice.ids()
    assert log.names() == ["session_opened"]


def test_lowered_limit(make_app: MakeApp, clock: Clock) -> None:
    """Where a subject has more than the limit, as after it was lowered, one silent session makes no room."""
    settings = {"session_limit_policy": "replace", "session_absolute_seconds": clock.idle * 20}
    ids = {Caller(make_app(session_limit=4, **settings)).open() for _ in range(4)}
    clock.sleep(clock.idle * 0.6)
    alice = Caller(make_app(session_limit=3, **settings))
    assert alice.post("/sessions").status_code == 429
    assert set(alice.ids()) == ids


def test_default(make_app: MakeApp, clock: Clock) -> None:
    """Unless it is configured none is replaced."""
    alice = Caller(make_app(session_limit=1, session_absolute_seconds=clock.idle * 20))
    id = alice.open()
    clock.sleep(clock.idle * 0.7)
    assert alice.post("/sessions").status_code == 429
    assert alice.ids() == [id]


def test_others(app: Flask, alice: Caller, bob: Caller, clock: Clock) -> None:
    """Another subject's sessions make no room, however silent they are."""
    bobs = bob.open()
    clock.sleep(clock.idle * 0.6)
    for _ in range(3):
        alice.open()
    assert alice.post("/sessions").status_code == 429
    assert bob.ids() == [bobs]


@pytest.mark.parametrize("damage", ["active", "idle", "type"])
def test_unreadable(app: Flask, alice: Caller, database: redis.Redis, clock: Clock, damage: str) -> None:
    """A record that cannot be read makes no room, and does not keep another from doing so."""
    ids = [alice.open() for _ in range(3)]
    key = session_key("alice", ids[0])
    if damage == "type":
        database.delete(key)
        database.set(key, "x", ex=clock.idle * 3)
    else:
        database.hset(key, damage, "x")
    clock.sleep(clock.idle * 0.3)
    alice.heartbeat(ids[1])
    clock.sleep(clock.idle * 0.3)
    alice.open()
    assert database.exists(key)
    assert not database.exists(session_key("alice", ids[2]))


@fake_only
def test_log(app: Flask, alice: Caller, clock: Clock, log: Log) -> None:
    """A session that made room is a line with its hash, and counted; it is not among those that were revoked."""
    for _ in range(3):
        alice.open()
    opened = [line["session"] for line in log.take()]
    clock.sleep(clock.idle * 0.6)
    alice.open()
    new, replaced = log.take()
    assert (new["event"], replaced["event"]) == ("session_opened", "session_replaced")
    assert replaced["session"] in opened and replaced["subject"] == new["subject"]
    metrics = alice.get("/metrics").text
    assert "sessions_replaced_total 1.0" in metrics and "sessions_revoked_total 0.0" in metrics


def test_honest_loops(app: Flask, clock: Clock) -> None:
    """Of one loop more than the limit, all beating at a third of the timeout, none is pushed out: one waits."""
    ids = [Caller(app).open() for _ in range(3)]
    statuses = []
    for _ in range(7):
        statuses.append(Caller(app).post("/sessions").status_code)
        clock.sleep(clock.idle / 3)
        assert [Caller(app).heartbeat(id).status_code for id in ids] == [200] * 3
    assert statuses == [429] * 7


@real_only
def test_race_for_one_place(make_app: MakeApp, database: redis.Redis) -> None:
    """Of eight opens that race for one silent session's place exactly one gets it."""
    app = make_app(
        session_limit=3, session_limit_policy="replace", session_idle_seconds=60, session_absolute_seconds=120
    )
    with ThreadPoolExecutor(8) as pool:
        for _ in range(25):
            database.flushall()
            ids = [Caller(app).open() for _ in range(3)]
            silent = session_key("alice", ids[1])
            database.hset(silent, "active", int(time.time() * 1000) - 40_000)
            statuses = list(pool.map(lambda _: Caller(app).post("/sessions").status_code, range(8)))
            assert sorted(statuses) == [201] + [429] * 7
            assert len(database.keys("session:*")) == database.zcard(index_key("alice")) == 3
            assert not database.exists(silent)


@real_only
@pytest.mark.parametrize("command", [*OPENS, "hmget"])
def test_refused_half_way(config: Config, folder: Path, command: str) -> None:
    """An open that Redis refuses in any of its steps ends no session."""
    changed = replace(config, session_limit=2, session_limit_policy="replace", session_idle_seconds=60)
    with RedisServer(folder) as server:
        servers = connect(replace(changed, redis_url=server.url, session_absolute_seconds=120))
        alice = Caller(create_app(replace(changed, redis_url=server.url, session_absolute_seconds=120), servers))
        for id in (alice.open(), alice.open()):
            server.client.hset(session_key("alice", id), "active", int(time.time() * 1000) - 40_000)
        keys, index = set(server.client.keys()), server.client.zrange(index_key("alice"), 0, -1)
        server.client.execute_command("ACL SETUSER", "default", f"-{command}")
        status = alice.post("/sessions").status_code
        server.client.execute_command("ACL SETUSER", "default", "+@all")
        assert status == (429 if command == "hmget" else 500)
        assert (set(server.client.keys()), server.client.zrange(index_key("alice"), 0, -1)) == (keys, index)
        servers.clients()[0].connection_pool.disconnect()
