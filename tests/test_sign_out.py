"""A sign-out that keeps out: what was issued before it opens no session any more."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from flask import Flask
from werkzeug.test import TestResponse

from app import create_app
from app.config import Config
from app.store import index_key, session_key, signed_out_key
from app.store.connect import connect
from tests.conftest import Caller, Clock, Log, fake_only, immortal
from tests.servers import RedisServer

REFUSED = b'{"success": false, "error": "Invalid or expired token"}'
CHALLENGE = (
    'Bearer realm="sessions", error="invalid_token", error_description="The token was issued before the sign-out"'
)
DAY_MS = 86_400_000


def sign_out(caller: Caller, **body: object) -> TestResponse:
    return caller.post("/sessions/revoke-all", json={"refuseEarlierTokens": True, **body})


def issued(app: Flask, seconds: float | None, **claims: object) -> Caller:
    """Alice with a token that was issued so many seconds from now."""
    return Caller(app, iat=None if seconds is None else int(time.time()) + seconds, **claims)


def instant(database: redis.Redis) -> int:
    return int(database.get(signed_out_key("alice")))


def test_kept_out(app: Flask) -> None:
    """After the sign-out an earlier token opens no session, and is told so; one that is issued later does."""
    alice = issued(app, -10)
    id = alice.open()
    response = sign_out(alice)
    assert (response.status_code, response.headers["Sessions-Revoked"]) == (200, "1")
    assert alice.heartbeat(id).status_code == 404
    refused = alice.post("/sessions")
    assert (refused.status_code, refused.data, refused.headers["WWW-Authenticate"]) == (401, REFUSED, CHALLENGE)
    issued(app, 5).open()


def test_without_it(app: Flask) -> None:
    """A revoke-all that does not ask for it, or says false, refuses no token."""
    alice = issued(app, -10)
    for body in ({}, {"refuseEarlierTokens": False}):
        alice.open()
        assert alice.post("/sessions/revoke-all", json=body).status_code == 200
        alice.open()


@pytest.mark.parametrize("seconds, status", [(-1, 401), (0, 401), (0.999, 401), (1, 201), (1.5, 201)])
def test_second(app: Flask, database: redis.Redis, seconds: float, status: int) -> None:
    """A token of the same second as the sign-out is refused, one of the next is taken, without any leeway."""
    sign_out(Caller(app))
    second = instant(database) // 1000
    assert Caller(app, iat=second + seconds).post("/sessions").status_code == status


@pytest.mark.parametrize("iat", [None, 0, -1, -(10**30), 0.5, "4000000000", True])
def test_without_time(app: Flask, iat: object) -> None:
    """A token that does not say when it was issued counts as earlier; before the sign-out it opens sessions."""
    alice = Caller(app, iat=iat)
    before = alice.post("/sessions").status_code
    assert before == (401 if iat == "4000000000" else 201)  # RFC 7519 §4.1.6: in the future
    sign_out(Caller(app))
    assert alice.post("/sessions").status_code == 401


def test_only_opening(app: Flask) -> None:
    """A session that was spared goes on, and an earlier token reads, lists and ends as before."""
    alice = issued(app, -10)
    ids = [alice.open() for _ in range(3)]
    assert sign_out(alice, exceptSessionId=ids[1]).headers["Sessions-Revoked"] == "2"
    assert alice.ids() == [ids[1]]
    assert [alice.heartbeat(id).status_code for id in ids] == [404, 200, 404]
    assert alice.read(ids[1]).status_code == 200
    assert alice.post("/sessions").status_code == 401
    assert alice.revoke(ids[1]).status_code == 200


def test_many_sessions(make_app: Callable[..., Flask], database: redis.Redis) -> None:
    """Of a thousand sessions the spared one stays, in the index as well, and nothing else."""
    alice = issued(make_app(session_limit=1000, session_idle_seconds=600, session_absolute_seconds=600), -10)
    ids = [alice.open() for _ in range(1000)]
    response = sign_out(alice, exceptSessionId=ids[500])
    assert (response.status_code, response.headers["Sessions-Revoked"]) == (200, "999")
    assert set(database.keys()) == {session_key("alice", ids[500]), index_key("alice"), signed_out_key("alice")}
    assert database.zrange(index_key("alice"), 0, -1) == [ids[500]]
    assert immortal(database) == []


def test_others(app: Flask, database: redis.Redis) -> None:
    """Another subject's sessions and tokens have nothing to do with it."""
    bob = Caller(app, "bob", iat=int(time.time()) - 10)
    id = bob.open()
    sign_out(issued(app, -10))
    assert bob.heartbeat(id).status_code == 200
    bob.open()


def test_acting(make_app: Callable[..., Flask]) -> None:
    """A backend that acts for the subject signs it out, and opens sessions for it afterwards as before."""
    app = make_app(jwt_admin_scope="admin")
    alice, backend = issued(app, -10), Caller(app, "backend", scope="admin", iat=1)
    alice.open()
    response = backend.post("/sessions/revoke-all?subject=alice", json={"refuseEarlierTokens": True})
    assert response.headers["Sessions-Revoked"] == "1"
    assert alice.post("/sessions").status_code == 401
    assert backend.post("/sessions?subject=alice").status_code == 201
    backend.open()
    sign_out(backend)
    assert backend.post("/sessions").status_code == 401


@pytest.mark.parametrize("absolute_days, days", [(1, 30), (30, 30), (90, 90)])
def test_kept_long_enough(make_app: Callable[..., Flask], database: redis.Redis, absolute_days: int, days: int) -> None:
    """The instant is kept for 30 days or the absolute timeout, whichever is longer."""
    sign_out(Caller(make_app(session_absolute_seconds=absolute_days * 86400)))
    assert database.pexpiretime(signed_out_key("alice")) == instant(database) + days * DAY_MS


def test_shorter_setting(make_app: Callable[..., Flask], database: redis.Redis) -> None:
    """A later sign-out never shortens the time for which one is kept, whatever the setting is by then."""
    sign_out(Caller(make_app(session_absolute_seconds=90 * 86400)))
    before = database.pexpiretime(signed_out_key("alice"))
    sign_out(Caller(make_app()))
    assert database.pexpiretime(signed_out_key("alice")) == before


def test_never_back(app: Flask, database: redis.Redis) -> None:
    """The instant moves on with each sign-out, and never back, as with a clock that was set back."""
    sign_out(Caller(app))
    first = instant(database)
    time.sleep(0.01)
    sign_out(Caller(app))
    assert instant(database) > first
    ahead = first + 60_000
    database.set(signed_out_key("alice"), ahead, pxat=ahead + 30 * DAY_MS)
    assert sign_out(issued(app, -10)).status_code == 200
    assert instant(database) == ahead
    assert database.pexpiretime(signed_out_key("alice")) == ahead + 30 * DAY_MS


def test_remembered_token(app: Flask) -> None:
    """A token that is remembered, and one that is not, are told apart by when they were issued all the same."""
    old, new = issued(app, -10), issued(app, 2)
    old.open(), new.open()
    sign_out(old)
    for _ in range(2):
        assert old.post("/sessions").status_code == 401
        new.open()


@fake_only
@pytest.mark.parametrize("value", ["true", "yes", 1, 0, 1.0, "", None, [], {}, [True]], ids=repr)
def test_only_true_and_false(app: Flask, database: redis.Redis, value: object) -> None:
    """What is neither true nor false is refused, and nothing happens."""
    alice = Caller(app)
    id = alice.open()
    refused = alice.post("/sessions/revoke-all", json={"refuseEarlierTokens": value})
    assert (refused.status_code, list(refused.json["details"])) == (422, ["refuseEarlierTokens"])
    assert alice.heartbeat(id).status_code == 200
    assert not database.exists(signed_out_key("alice"))


@fake_only
def test_null(app: Flask) -> None:
    """A body that is null is refused: a caller that meant to refuse tokens must not just end sessions."""
    alice = Caller(app)
    id = alice.open()
    answer = alice.post("/sessions/revoke-all", data="null", content_type="application/json")
    assert answer.status_code == 422
    assert alice.heartbeat(id).status_code == 200


@fake_only
def test_log(app: Flask, log: Log) -> None:
    """Its line says so, also where no session was alive, and an open that it keeps out is a refused token."""
    alice = issued(app, -10)
    for _ in range(12):
        sign_out(alice)
    lines = log.take()
    assert [(line["event"], line["number"], line["refuse_earlier_tokens"]) for line in lines] == [
        ("sessions_revoked", 0, True)
    ] * 12
    alice.post("/sessions")
    [refused] = log.take()
    assert (refused["event"], refused["reason"], refused["subject"]) == (
        "token_refused",
        "signed_out",
        lines[0]["subject"],
    )
    assert 'tokens_refused_total{reason="signed_out"} 1.0' in alice.get("/metrics").text


@fake_only
def test_command(app: Flask, database: redis.Redis) -> None:
    """The command line signs a subject out as well."""
    alice = issued(app, -10)
    alice.open(), alice.open()
    result = app.test_cli_runner().invoke(args=["sessions", "revoke", "alice", "--refuse-earlier-tokens"])
    assert (result.exit_code, result.stdout) == (0, "2 revoked\n")
    assert json.loads(result.stderr)["refuse_earlier_tokens"] is True
    assert alice.post("/sessions").status_code == 401


@fake_only
def test_command_for_one(app: Flask) -> None:
    """With one session's id the option is refused, and the session lives on."""
    alice = Caller(app)
    id = alice.open()
    words = ["sessions", "revoke", "alice", "--id", id, "--refuse-earlier-tokens"]
    result = app.test_cli_runner().invoke(args=words)
    assert result.exit_code == 2 and "do not go together" in result.stderr
    assert alice.heartbeat(id).status_code == 200


def test_index_that_cannot_be_read(app: Flask, database: redis.Redis) -> None:
    """Where the index is of another type the sign-out is a 500, and has changed nothing."""
    database.set(index_key("alice"), "x", ex=60)
    response = sign_out(Caller(app))
    assert (response.status_code, response.json["error"]) == (500, "Failed to revoke all sessions")
    assert not database.exists(signed_out_key("alice"))


def test_instant_that_cannot_be_read(app: Flask, database: redis.Redis, log: Log) -> None:
    """Where the instant of a sign-out is none, opens are 500s, which is no outage, until the next sign-out."""
    database.set(signed_out_key("alice"), "yesterday")
    alice = Caller(app, iat=int(time.time()) + 2)
    assert [alice.post("/sessions").status_code for _ in range(2)] == [500, 500]
    assert log.names() == ["index_unreadable"]
    assert sign_out(alice).status_code == 200
    assert alice.post("/sessions").status_code == 201


real_only = pytest.mark.parametrize("backend", ["redis"], indirect=True)


@real_only
def test_no_open_slips_between(make_app: Callable[..., Flask], database: redis.Redis) -> None:
    """Of opens that race with sign-outs none leaves a session of an earlier token behind."""
    app = make_app(session_limit=1000, session_idle_seconds=60, session_absolute_seconds=120)
    seen: set[int] = set()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(40):
            database.flushall()
            opens = [pool.submit(lambda: issued(app, -10).post("/sessions").status_code) for _ in range(8)]
            assert sign_out(issued(app, -10)).status_code == 200
            seen.update(each.result() for each in opens)
            assert database.keys("session:*") == []
    assert seen == {201, 401}


@real_only
def test_full(config: Config, folder: Path) -> None:
    """In a full Redis a subject can be signed out, and is kept out."""
    with RedisServer(folder, "--maxmemory-policy", "noeviction") as server:
        changed = replace(config, redis_url=server.url)
        servers = connect(changed)
        app = create_app(changed, servers)
        alice = issued(app, -10)
        alice.open()
        server.client.config_set("maxmemory", "1mb")
        with pytest.raises(redis.OutOfMemoryError):
            server.client.set("filler", "x")
        assert sign_out(alice).headers["Sessions-Revoked"] == "1"
        assert alice.post("/sessions").status_code in (401, 500)
        server.client.config_set("maxmemory", "0")
        assert alice.post("/sessions").status_code == 401
        servers.clients()[0].connection_pool.disconnect()


def test_after_its_time(app: Flask, database: redis.Redis, clock: Clock) -> None:
    """When the instant has gone earlier tokens open sessions again: by then they have expired."""
    alice = issued(app, -10)
    sign_out(alice)
    database.pexpire(signed_out_key("alice"), 50)
    clock.sleep(0.1)
    alice.open()
