"""Subjects of any spelling keep their own sessions, and only those."""

import pytest
import redis
from flask import Flask
from redis.crc import key_slot

from tests.conftest import Caller, answer, immortal

MISSING = "A" * 32
SUBJECTS = [
    "alice",
    42,
    "0",
    " ",
    "a b",
    "a:b",
    "{alice}",
    "}{",
    "{}",
    "{",
    "}",
    "a}:x",
    "%",
    "alice%",
    "%7B",
    "a%20b",
    "a+b",
    "a/b",
    "..",
    "*",
    "?",
    "[a-z]*",
    "\\",
    '"',
    "'; DROP",
    "\x00",
    "a\x00b",
    "a\nb",
    "a\r\nSET x y\r\n",
    "zoë",
    "zoe\u0308",
    "平",
    "🖥",
    "\u202eevil",
    "\uffff",
    "x" * 256,
    "é" * 256,
    "🖥" * 256,
    "{" * 256,
    "auth0|5f7c8ec7c33c6c004bbafe82",
    "https://issuer.example/users/1?a=b#c",
]


def described(subject: object) -> str:
    return ascii(subject)[:24]


@pytest.mark.parametrize("subject", SUBJECTS, ids=described)
def test_life(app: Flask, database: redis.Redis, subject: object) -> None:
    """Whatever a subject is called, its sessions live and end like others."""
    caller = Caller(app, subject)
    id, other = caller.open(), caller.open()
    assert caller.heartbeat(id).status_code == 200
    assert caller.read(id).json["session"]["id"] == id
    assert set(caller.ids()) == {id, other}
    assert immortal(database) == []
    assert caller.revoke(id).status_code == 200
    assert caller.heartbeat(id).status_code == 404
    assert caller.ids() == [other]
    assert caller.post("/sessions/revoke-all").status_code == 200
    assert database.keys() == []


@pytest.mark.parametrize("subject", SUBJECTS, ids=described)
def test_one_slot(app: Flask, database: redis.Redis, subject: object) -> None:
    """All keys of a subject are in one slot of a Redis Cluster, and printable."""
    caller = Caller(app, subject)
    caller.open(), caller.open()
    keys = database.keys()
    assert len(keys) == 3
    assert len({key_slot(key.encode()) for key in keys}) == 1
    assert all(key.isascii() and key.isprintable() and " " not in key for key in keys)
    assert all(key.count("{") == key.count("}") == 1 for key in keys)


def test_slots_differ(app: Flask, database: redis.Redis) -> None:
    """The slot depends on the subject alone, so that subjects spread over a Cluster."""
    for subject in ("alice", "bob", "carol"):
        Caller(app, subject).open()
    assert len({key_slot(key.encode()) for key in database.keys()}) == 3


PAIRS = [
    ("a", "a}:x"),
    ("a", "a}"),
    ("a", "{a"),
    ("a", "{a}"),
    ("a", "a:"),
    ("a", "a:b"),
    ("a", "a "),
    ("a", " a"),
    ("a", "a\n"),
    ("a", "a\x00"),
    ("a", "A"),
    ("a", "*"),
    ("a", "?"),
    ("a", "[a]"),
    ("a", "\uff41"),
    ("alice", "alice%"),
    ("alice", "{alice}"),
    ("alice", "%61lice"),
    ("a b", "a%20b"),
    ("a b", "a+b"),
    ("a%20b", "a%2520b"),
    ("a/b", "a%2Fb"),
    ("a%2Fb", "a%2fb"),
    ("zoë", "zoe\u0308"),
    ("é", "\u00c3\u00a9"),
    ("1", "01"),
    ("1", "1.0"),
    ("x" * 256, "x" * 255),
]


@pytest.mark.parametrize("mine, theirs", [*PAIRS, *(pair[::-1] for pair in PAIRS)], ids=described)
def test_strangers(app: Flask, database: redis.Redis, mine: str, theirs: str) -> None:
    """A subject that looks like another neither sees, extends nor ends the other's sessions."""
    me, them = Caller(app, mine), Caller(app, theirs)
    my_id, their_id = me.open(), them.open()
    before = them.read(their_id).json
    for act in (Caller.heartbeat, Caller.read, Caller.revoke):
        assert answer(act(me, their_id)) == answer(act(me, MISSING))
    assert me.ids() == [my_id]
    assert me.post("/sessions/revoke-all").status_code == 200
    assert them.read(their_id).json == before
    assert them.ids() == [their_id]
    assert len(database.keys()) == 2
    assert them.heartbeat(their_id).status_code == 200
