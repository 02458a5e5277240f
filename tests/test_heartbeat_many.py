"""Heartbeats of many sessions in one call, for gateways."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import redis
from flask import Flask
from werkzeug.test import TestResponse

from app.bodies import LARGEST_BODY
from app.responses import rfc3339
from app.store import session_key
from tests.conftest import Caller, Clock, fake_only, token

PATH = "/sessions/heartbeat"
MISSING = "A" * 32
STRANGE_IDS = {
    "empty": "",
    "one letter": "A",
    "21 characters": "A" * 21,
    "65 characters": "A" * 65,
    "10 kB": "A" * 10_000,
    "NUL": "A" * 32 + "\0",
    "line feed": "A" * 32 + "\n",
    "space": " " + "A" * 32,
    "slash": "A" * 16 + "/" + "A" * 16,
    "colon": "A" * 16 + ":" + "A" * 16,
    "braces": "{" + "A" * 32 + "}",
    "glob": "*" * 32,
    "padding": "A" * 31 + "=",
    "letters beyond ASCII": "é" * 32,
    "digits beyond ASCII": "١" * 32,
    "lone surrogate": "\ud800" * 32,
}
MakeApp = Callable[..., Flask]


@pytest.fixture
def app(make_app: MakeApp) -> Flask:
    """An app whose sessions outlive every test here."""
    return make_app(session_idle_seconds=60, session_absolute_seconds=120, session_limit=1000)


@pytest.fixture
def cut_off(backend: str, make_app: MakeApp, database: redis.Redis, folder: Path) -> Flask:
    """An app whose Redis is gone."""
    if backend == "redis":
        return make_app(redis_url=f"unix://{folder}/nobody-listens.sock")
    database.connection_pool.connection_kwargs["server"].connected = False
    return make_app()


def many(caller: Caller, ids: object) -> TestResponse:
    return caller.post(PATH, json={"ids": ids})


def results(caller: Caller, ids: list[str]) -> list[dict[str, Any]]:
    """The results of a call that has to succeed."""
    response = many(caller, ids)
    assert response.status_code == 200, response.data
    return response.json["results"]


def expiry(database: redis.Redis, id: str, subject: str = "alice") -> int:
    return database.pexpiretime(session_key(subject, id))


def missing(id: str) -> dict[str, Any]:
    return {"id": id, "success": False, "error": "Session not found or expired"}


def renewed(database: redis.Redis, id: str) -> dict[str, Any]:
    return {"id": id, "success": True, "newExpiry": rfc3339(expiry(database, id))}


def test_body(alice: Caller, database: redis.Redis) -> None:
    """The answer has the contract's body to the letter."""
    id = alice.open()
    response = many(alice, [id, MISSING])
    assert (response.status_code, response.content_type) == (200, "application/json")
    assert response.text == (
        '{"success": true, "message": "Sessions updated successfully", "results": ['
        f'{{"id": "{id}", "success": true, "newExpiry": "{rfc3339(expiry(database, id))}"}}, '
        f'{{"id": "{MISSING}", "success": false, "error": "Session not found or expired"}}]}}'
    )


def test_all_extended(alice: Caller, database: redis.Redis, clock: Clock) -> None:
    """Every session is extended, and its new expiry and activity are the ones that a read gives."""
    ids = [alice.open() for _ in range(20)]
    before = [expiry(database, id) for id in ids]
    clock.sleep(0.05)
    answers = results(alice, ids)
    for id, earlier, answer in zip(ids, before, answers, strict=True):
        assert expiry(database, id) >= earlier + 50
        session = alice.get(f"/sessions/{id}").json["session"]
        assert answer == {"id": id, "success": True, "newExpiry": session["expiresAt"]}
        assert session["lastActivity"] > session["startedAt"]


def test_timeouts(alice: Caller, database: redis.Redis) -> None:
    """Each session is extended by its own idle timeout, whichever ones come before it."""
    seconds = [60, 90, 60, 70, 90]
    ids = [alice.open(idleTimeoutSeconds=each) for each in seconds]
    assert results(alice, ids) == [renewed(database, id) for id in ids]
    first = expiry(database, ids[0])
    assert [expiry(database, id) - first for id in ids] == [0, 30_000, 0, 10_000, 30_000]


def test_order(alice: Caller, database: redis.Redis) -> None:
    """Results come in the order asked, whatever becomes of each."""
    live = [alice.open() for _ in range(30)]
    ids = live + [f"{n:032d}" for n in range(30)] + ["!" * n for n in range(30)]
    random.Random(1).shuffle(ids)
    assert results(alice, ids) == [renewed(database, id) if id in live else missing(id) for id in ids]


@pytest.mark.parametrize("number", [1, 1000])
def test_number(alice: Caller, database: redis.Redis, number: int) -> None:
    """From one to a thousand ids are taken."""
    id = alice.open()
    others = [f"{n:032d}" for n in range(number - 1)]
    assert results(alice, [*others, id]) == [*map(missing, others), renewed(database, id)]


def test_longest_body(alice: Caller) -> None:
    """A thousand of the longest ids are taken also when their JSON is indented."""
    ids = [f"{n:064d}" for n in range(1000)]
    response = alice.post(PATH, data=json.dumps({"ids": ids}, indent=4), content_type="application/json")
    assert response.json["results"] == [missing(id) for id in ids]


def test_duplicates(alice: Caller, database: redis.Redis) -> None:
    """An id that comes several times is answered each time."""
    id, other = alice.open(), alice.open()
    answers = results(alice, [id, MISSING, id, other, id, MISSING])
    mine, others = renewed(database, id), renewed(database, other)
    assert answers == [mine, missing(MISSING), mine, others, mine, missing(MISSING)]


def test_foreign(alice: Caller, bob: Caller, database: redis.Redis, clock: Clock) -> None:
    """Another subject's session is answered like a missing one and is not extended."""
    bobs = bob.open()
    before, fields = expiry(database, bobs, "bob"), database.hgetall(session_key("bob", bobs))
    clock.sleep(0.05)
    assert results(alice, [bobs]) == [missing(bobs)]
    assert (expiry(database, bobs, "bob"), database.hgetall(session_key("bob", bobs))) == (before, fields)


def test_ended(make_app: MakeApp, database: redis.Redis, clock: Clock) -> None:
    """Sessions that were revoked or have expired are answered as missing, and nothing of them comes back."""
    alice = Caller(make_app())
    revoked, expired = alice.open(), alice.open()
    assert alice.post(f"/sessions/{revoked}/revoke").status_code == 200
    clock.sleep(clock.idle + 0.1)
    live = alice.open()
    keys = set(database.keys())
    assert results(alice, [revoked, expired, live]) == [missing(revoked), missing(expired), renewed(database, live)]
    assert set(database.keys()) == keys


def test_nothing_created(alice: Caller, database: redis.Redis) -> None:
    """Missing sessions leave nothing in Redis."""
    assert len(results(alice, [f"{n:032d}" for n in range(100)])) == 100
    assert database.keys() == []


@pytest.mark.parametrize("strange", STRANGE_IDS.values(), ids=STRANGE_IDS)
def test_strange_id(app: Flask, alice: Caller, database: redis.Redis, strange: str) -> None:
    """What cannot be an id is answered like a missing session, in its place, and Redis is not asked for it."""
    id, store = alice.open(), app.extensions["session_store"]
    store.heartbeat_many = MagicMock(wraps=store.heartbeat_many)
    assert results(alice, [strange, id, strange]) == [missing(strange), renewed(database, id), missing(strange)]
    store.heartbeat_many.assert_called_once_with("alice", [id])


def test_only_strange_ids(cut_off: Flask) -> None:
    """Where nothing can be an id, Redis is not asked at all."""
    ids = list(STRANGE_IDS.values())
    assert results(Caller(cut_off), ids) == [missing(id) for id in ids]


@fake_only
@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        "ids",
        {},
        {"ids": []},
        {"ids": None},
        {"ids": MISSING},
        {"ids": {"0": MISSING}},
        {"ids": 1},
        {"ids": ["{id}"] * 1001},
        {"ids": ["{id}", 1]},
        {"ids": ["{id}", None]},
        {"ids": ["{id}", True]},
        {"ids": ["{id}", ["{id}"]]},
        {"ids": ["{id}", {"id": "{id}"}]},
        {"ids": ["{id}"], "subject": "bob"},
        {"IDs": ["{id}"]},
    ],
    ids=lambda body: json.dumps(body)[:40],
)
def test_invalid_body(alice: Caller, database: redis.Redis, clock: Clock, body: object) -> None:
    """A body of another shape is a 422 with a list of messages for each field, and nothing is extended."""
    id = alice.open()
    before = expiry(database, id)
    clock.sleep(0.05)
    text = json.dumps(body).replace("{id}", id)
    response = alice.post(PATH, data=text, content_type="application/json")
    assert response.status_code == 422
    assert list(response.json) == ["success", "error", "details"]
    assert (response.json["success"], response.json["error"]) == (False, "Invalid request body")
    for messages in response.json["details"].values():
        assert isinstance(messages, list) and messages
        assert all(isinstance(message, str) for message in messages)
    assert expiry(database, id) == before


@fake_only
@pytest.mark.parametrize("element", ["1", "null", '""'])
def test_refusal_is_short(alice: Caller, element: str) -> None:
    """However much is wrong with a body, the answer to it is short."""
    text = '{"ids": [' + f"{element}, " * 15_000 + '""]}'
    response = alice.post(PATH, data=text, content_type="application/json")
    assert response.status_code == 422
    assert len(response.data) < 1000


@fake_only
def test_no_body(alice: Caller) -> None:
    """Without a body the answer names the field that is missing."""
    response = alice.post(PATH)
    assert (response.status_code, list(response.json["details"])) == (422, ["ids"])


@fake_only
@pytest.mark.parametrize(
    "data, content_type, status",
    [
        (b'{"ids": [', "application/json", 400),
        (b'{"ids": ["\xff"]}', "application/json", 400),
        (b'{"ids": ' + b"[" * 40_000, "application/json", 400),
        (b'{"ids": ["AAAAAAAAAAAAAAAAAAAAAAAA"]}', "text/plain", 415),
        (b" " * (LARGEST_BODY + 1), "application/json", 413),
    ],
    ids=["cut off", "not UTF-8", "nested", "another type", "too large"],
)
def test_unreadable_body(alice: Caller, data: bytes, content_type: str, status: int) -> None:
    """A body that is no JSON, does not say so or is too large is refused in the contract's shape."""
    response = alice.post(PATH, data=data, content_type=content_type)
    assert response.status_code == status
    assert (list(response.json), response.json["success"]) == (["success", "error"], False)


@fake_only
def test_no_token(app: Flask, alice: Caller, database: redis.Redis, clock: Clock) -> None:
    """Without a token nothing is extended, and the answer does not say what is there."""
    id = alice.open()
    before = expiry(database, id)
    clock.sleep(0.05)
    response = app.test_client().post(PATH, json={"ids": [id]})
    assert (response.status_code, response.text) == (401, '{"success": false, "error": "Missing bearer token"}')
    assert response.headers["WWW-Authenticate"] == 'Bearer realm="sessions"'
    assert expiry(database, id) == before


@fake_only
def test_token_comes_first(app: Flask) -> None:
    """A bad token is refused before the body is looked at."""
    headers = {"Authorization": f"Bearer {token(exp=1)}"}
    response = app.test_client().post(PATH, data=b"[", headers=headers)
    assert (response.status_code, response.text) == (401, '{"success": false, "error": "Invalid or expired token"}')


@fake_only
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_other_methods(alice: Caller, method: str) -> None:
    """The only method is POST."""
    response = alice.http.open(PATH, method=method, headers=alice.headers)
    assert (response.status_code, response.headers["Allow"]) == (405, "POST")


def test_redis_gone(cut_off: Flask) -> None:
    """Without Redis the answer is the contract's 500 to the letter, with a hint when to come back."""
    response = many(Caller(cut_off), [MISSING])
    assert (response.status_code, response.text) == (500, '{"success": false, "error": "Failed to update sessions"}')
    assert re.fullmatch("[12]", response.headers["Retry-After"])


def test_scripts_lost(alice: Caller, database: redis.Redis) -> None:
    """That Redis has lost its scripts, as after every restart, is not noticed."""
    ids = [alice.open() for _ in range(10)]
    database.script_flush()
    assert results(alice, [*ids, MISSING]) == [*(renewed(database, id) for id in ids), missing(MISSING)]


@pytest.mark.parametrize("backend", ["redis"], indirect=True)
def test_one_round_trip(app: Flask, alice: Caller, database: redis.Redis) -> None:
    """A thousand sessions are extended by ten scripts that reach Redis in a few reads."""
    store = app.extensions["session_store"]
    ids = [store.open("alice", login_method="token").id for _ in range(1000)]
    assert alice.heartbeat(ids[0]).status_code == 200
    database.config_resetstat()
    assert all(result["success"] for result in results(alice, ids))
    calls = {name: stats["calls"] for name, stats in database.info("commandstats").items()}
    assert calls["cmdstat_evalsha"] == 10 and "cmdstat_eval" not in calls
    assert database.info("stats")["total_reads_processed"] < 50
