"""Records and indexes that something else has written: other sessions go on, and none stays for ever."""

import re
from collections.abc import Callable

import pytest
import redis
from flask import Flask

from app.store import index_key, session_key
from tests.conftest import Caller, Log, immortal, milliseconds

MISSING = "A" * 32
Hurt = Callable[[redis.Redis, str], object]


def without(field: str) -> Hurt:
    return lambda database, key: database.hdel(key, field)


def with_odd(field: str, value: str | bytes) -> Hurt:
    return lambda database, key: database.hset(key, field, value)


def of_another_type(database: redis.Redis, key: str) -> None:
    database.delete(key)
    database.set(key, "x", ex=60)


def hurt_index(database: redis.Redis, subject: str = "alice") -> None:
    of_another_type(database, index_key(subject))


UNREADABLE = {
    "no start": without("started"),
    "no activity": without("active"),
    "no login method": without("login"),
    "odd start": with_odd("started", "yesterday"),
    "start before 1970": with_odd("started", "-1"),
    "activity after 9999": with_odd("active", "253402300800000"),
    "start of any length": with_odd("started", "1" * 5000),
    "no expiry": lambda database, key: database.persist(key),
    "another type": of_another_type,
}
unreadable = pytest.mark.parametrize("hurt", UNREADABLE.values(), ids=UNREADABLE)


@unreadable
def test_list(alice: Caller, database: redis.Redis, log: Log, hurt: Hurt) -> None:
    """A list leaves out what cannot be read, which is logged once, and has all the others."""
    good, bad, other = alice.open(), alice.open(), alice.open()
    hurt(database, session_key("alice", bad))
    log.take()
    assert [sorted(alice.ids()) for _ in range(3)] == [sorted([good, other])] * 3
    [line] = log.take()
    assert (line["event"], line["levelname"]) == ("session_unreadable", "ERROR")
    assert all(re.fullmatch("[0-9a-f]{16}", line[name]) for name in ("session", "subject"))
    assert bad not in str(line)


@unreadable
def test_get(alice: Caller, database: redis.Redis, hurt: Hurt) -> None:
    """To read what cannot be read is the endpoint's 500 and not the end of the session."""
    id = alice.open()
    hurt(database, session_key("alice", id))
    response = alice.read(id)
    assert (response.status_code, response.json["error"]) == (500, "Failed to retrieve session")


@unreadable
def test_revoke(alice: Caller, database: redis.Redis, hurt: Hurt) -> None:
    """What cannot be read can be revoked."""
    id = alice.open()
    hurt(database, session_key("alice", id))
    assert alice.revoke(id).status_code == 200
    assert database.keys() == []


@unreadable
def test_revoke_all(alice: Caller, database: redis.Redis, hurt: Hurt) -> None:
    """What cannot be read ends with all the others."""
    alice.open()
    hurt(database, session_key("alice", alice.open()))
    assert alice.post("/sessions/revoke-all").status_code == 200
    assert database.keys() == []


@pytest.mark.parametrize("backend", ["redis"], indirect=True)
@pytest.mark.parametrize("field", ["device", "login", "started", "unknown"])
def test_no_utf8(alice: Caller, database: redis.Redis, log: Log, field: str) -> None:
    """A record with bytes that are no UTF-8 is left out of the list, and nothing else is."""
    good, bad = alice.open(), alice.open()
    database.hset(session_key("alice", bad), field, b"\xff\xfe")
    log.take()
    assert alice.ids() == alice.ids() == [good]
    assert log.names() == ["session_unreadable"]
    assert (alice.read(bad).status_code, alice.heartbeat(bad).status_code) == (500, 200)
    assert alice.revoke(bad).status_code == 200


@pytest.mark.parametrize("backend", ["redis"], indirect=True)
def test_no_utf8_in_the_index(alice: Caller, database: redis.Redis) -> None:
    """An entry of the index that is no UTF-8 is no session and spoils no other one."""
    id = alice.open()
    database.zadd(index_key("alice"), {b"\xff": 1})
    assert alice.ids() == [id]
    assert alice.post("/sessions/revoke-all").status_code == 200
    assert alice.heartbeat(id).status_code == 404


NO_IDLE = [
    with_odd("idle", text)
    for text in ("0", "-1", "-1800000", "0.5", "1e-9", "nan", "-inf", "soon", "", "1800000.5", "1e15")
]
NO_END = [with_odd("end", text) for text in ("0", "-1", "nan", "never", "", "-inf", "1893456000000.5", "1e15")]
unusable = pytest.mark.parametrize("hurt", [*NO_IDLE, *NO_END, without("idle"), without("end"), of_another_type])


@unusable
@pytest.mark.parametrize("has_ttl", [True, False])
def test_heartbeat(alice: Caller, database: redis.Redis, hurt: Hurt, has_ttl: bool) -> None:
    """A session without a usable timeout is not extended and not called gone; the heartbeat is a 500."""
    id = alice.open()
    key = session_key("alice", id)
    hurt(database, key)
    if not has_ttl:
        database.persist(key)
    before = database.dump(key), database.pexpiretime(key)
    response = alice.heartbeat(id)
    assert (response.status_code, response.json["error"]) == (500, "Failed to update session")
    assert (database.dump(key), database.pexpiretime(key)) == before
    assert alice.revoke(id).status_code == 200


@pytest.mark.parametrize("field", ["idle", "end"])
@pytest.mark.parametrize("text", ["inf", "1e3", "1e300", "1.5", "0x10", " 9 ", "1" * 400])
def test_never_without_an_expiry(alice: Caller, database: redis.Redis, field: str, text: str) -> None:
    """Whatever stands for a timeout, a heartbeat that succeeds leaves a session that expires."""
    id = alice.open()
    database.hset(session_key("alice", id), field, text)
    assert alice.heartbeat(id).status_code in (200, 500)
    assert database.pttl(session_key("alice", id)) > 0
    database.persist(session_key("alice", id))
    assert alice.heartbeat(id).status_code == 500 or immortal(database) == []


@unusable
def test_heartbeats_of_others(alice: Caller, database: redis.Redis, log: Log, hurt: Hurt) -> None:
    """In a call of many a session that cannot be extended makes it a 500, and all the others are extended."""
    ids = [alice.open() for _ in range(3)]
    others = [session_key("alice", id) for id in (ids[0], ids[2])]
    hurt(database, session_key("alice", ids[1]))
    for key in others:
        database.pexpire(key, 1000)
    log.take()
    response = alice.post("/sessions/heartbeat", json={"ids": [*ids, MISSING]})
    assert (response.status_code, response.json["error"]) == (500, "Failed to update sessions")
    assert all(database.pttl(key) > 1000 for key in others)
    assert log.names() == ["session_unreadable"]


def test_never_shorter(alice: Caller, database: redis.Redis) -> None:
    """A heartbeat does not shorten a session, as it would where Redis's clock was set back."""
    id = alice.open()
    later = database.pexpiretime(session_key("alice", id)) + 3600_000
    database.pexpireat(session_key("alice", id), later)
    for _ in range(2):
        beat = alice.heartbeat(id)
        assert milliseconds(beat.json["newExpiry"]) == database.pexpiretime(session_key("alice", id)) == later
    [result] = alice.post("/sessions/heartbeat", json={"ids": [id]}).json["results"]
    assert result["newExpiry"] == beat.json["newExpiry"]


def test_gets_an_expiry(alice: Caller, database: redis.Redis) -> None:
    """A session whose key has lost its TTL gets one with the next heartbeat."""
    id = alice.open()
    before = database.pexpiretime(session_key("alice", id))
    database.persist(session_key("alice", id))
    beat = alice.heartbeat(id)
    assert milliseconds(beat.json["newExpiry"]) == database.pexpiretime(session_key("alice", id)) >= before


def test_without_an_expiry_and_over(alice: Caller, database: redis.Redis) -> None:
    """A session whose key has lost its TTL and whose absolute end has come ends with the next heartbeat."""
    id = alice.open()
    database.hset(session_key("alice", id), "end", "1000")
    database.persist(session_key("alice", id))
    assert alice.heartbeat(id).status_code == 404
    assert database.exists(session_key("alice", id)) == 0


def test_revoke_without_index(alice: Caller, database: redis.Redis) -> None:
    """An index of another type keeps no session alive: a revoke ends it."""
    id = alice.open()
    hurt_index(database)
    assert alice.revoke(id).status_code == 200
    assert alice.heartbeat(id).status_code == 404
    assert alice.revoke(id).status_code == 404


@pytest.mark.parametrize(
    "method, path, sentence",
    [
        ("GET", "/sessions", "Failed to retrieve sessions"),
        ("POST", "/sessions/revoke-all", "Failed to revoke all sessions"),
        ("POST", "/sessions", "Failed to open session"),
    ],
)
def test_index(alice: Caller, database: redis.Redis, log: Log, method: str, path: str, sentence: str) -> None:
    """What needs the index is a 500 where that has another type; the log says so, once, and nothing has changed."""
    id = alice.open()
    hurt_index(database)
    log.take()
    keys = set(database.keys())
    for _ in range(2):
        response = alice.raw(method, path)
        assert (response.status_code, response.json["error"]) == (500, sentence)
    lines = [line for line in log.take() if line["levelname"] == "ERROR"]
    assert [line["event"] for line in lines] == ["index_unreadable"]
    assert lines[0]["reason"].startswith("WRONGTYPE")
    assert set(database.keys()) == keys
    assert alice.heartbeat(id).status_code == 200


@pytest.mark.parametrize("subject", ["bob"])
def test_others_are_not_harmed(app: Flask, alice: Caller, database: redis.Redis, log: Log, subject: str) -> None:
    """Trouble with one subject's records is not taken for trouble with Redis."""
    hurt_index(database)
    assert alice.get("/sessions").status_code == 500
    assert Caller(app, subject).get("/sessions").status_code == 200
    assert not {"redis_unavailable", "redis_available"} & set(log.names())
