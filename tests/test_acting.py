"""Acting for a subject: `?subject=`, for tokens that have the scope for it, and for no others."""

from collections.abc import Callable
from urllib.parse import quote

import pytest
import redis
from flask import Flask
from werkzeug.test import TestResponse

from app.store import index_key, session_key
from tests.conftest import FAILURES, Caller, Log, answer, fake_only
from tests.test_subjects import SUBJECTS, described

ADMIN = "sessions:admin"
MISSING = "A" * 32
REFUSED = b'{"success": false, "error": "Insufficient scope"}'
MALFORMED = b'{"success": false, "error": "Malformed request"}'


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    """The app with a scope that may act for others."""
    return make_app(jwt_admin_scope=ADMIN)


@pytest.fixture
def gateway(app: Flask) -> Caller:
    """A caller that may act for others."""
    return Caller(app, "backend", scope=ADMIN)


def call(caller: Caller, method: str, path: str, query: str, **options: object) -> TestResponse:
    """Call an endpoint with a query that is sent as it stands."""
    if path == "/sessions/heartbeat":
        options = {"json": {"ids": [MISSING]}, **options}
    return caller.http.open(path, method=method, query_string=query, headers=caller.headers, **options)


def test_life(gateway: Caller, alice: Caller) -> None:
    """A backend opens, reads, lists, keeps alive and ends a subject's sessions, which the subject sees as its own."""
    opened = gateway.post("/sessions?subject=alice", json={"deviceName": "Tablet"})
    assert opened.status_code == 201 and "ipAddress" not in opened.json["session"]
    id = opened.json["session"]["id"]
    assert gateway.get(f"/sessions/{id}?subject=alice").data == alice.read(id).data
    assert gateway.get("/sessions?subject=alice").data == alice.get("/sessions").data
    assert gateway.post(f"/sessions/{id}/heartbeat?subject=alice").status_code == 200
    [result] = gateway.post("/sessions/heartbeat?subject=alice", json={"ids": [id]}).json["results"]
    assert result["success"]
    assert gateway.post(f"/sessions/{id}/revoke?subject=alice").status_code == 200
    assert alice.heartbeat(id).status_code == 404
    other = alice.open()
    assert gateway.post("/sessions/revoke-all?subject=alice").status_code == 200
    assert alice.heartbeat(other).status_code == 404


def test_own_sessions(gateway: Caller, alice: Caller) -> None:
    """Without the parameter a backend's sessions are its own, with an address, and a subject's are not found."""
    id, alices = gateway.open(), alice.open()
    assert gateway.ids() == [id] and alice.ids() == [alices]
    assert "ipAddress" in gateway.read(id).json["session"]
    assert answer(gateway.heartbeat(alices)) == answer(gateway.heartbeat(MISSING))
    assert gateway.get(f"/sessions/{id}?subject=backend").status_code == 200


@fake_only
@pytest.mark.parametrize("method, path", FAILURES)
@pytest.mark.parametrize("query", ["subject=alice", "subject=bob", "x=1&%73ubject=bob", "subject", "subject=%FF"])
def test_without_scope(app: Flask, database: redis.Redis, method: str, path: str, query: str) -> None:
    """On every endpoint a token without the scope is refused, whichever subject it names, and changes nothing."""
    alice, bob = Caller(app, scope="sessions:read openid"), Caller(app, "bob")
    id = bob.open()
    before = bob.read(id).json, database.keys()
    response = call(alice, method, path.format(id=id), query)
    assert (response.status_code, response.data) == (403, REFUSED)
    challenge = 'Bearer realm="sessions", error="insufficient_scope", scope="sessions:admin"'
    assert response.headers["WWW-Authenticate"] == challenge
    assert (bob.read(id).json, database.keys()) == before


@fake_only
@pytest.mark.parametrize("method, path", FAILURES)
@pytest.mark.parametrize(
    "query",
    ["subject=", "subject", "subject=alice&subject=alice", "subject=a&%73ubject=b", "subject=" + "x" * 257]
    + ["subject=%FF", "subject=a%C3", "subject=%ED%A0%80"],
)
def test_malformed(gateway: Caller, database: redis.Redis, method: str, path: str, query: str) -> None:
    """On every endpoint a parameter that does not stand once, with 1 to 256 characters of UTF-8, is a 400."""
    response = call(gateway, method, path.format(id=MISSING), query)
    assert (response.status_code, response.data) == (400, MALFORMED)
    assert database.keys() == []


@pytest.mark.parametrize("subject", [str(each) for each in SUBJECTS], ids=described)
def test_spellings(app: Flask, gateway: Caller, subject: str) -> None:
    """Whatever a subject is called, percent-encoded it is that subject and no other."""
    id = Caller(app, subject).open()
    assert [
        each["id"] for each in call(gateway, "GET", "/sessions", f"subject={quote(subject, safe='')}").json["sessions"]
    ] == [id]


def test_plus(app: Flask, gateway: Caller) -> None:
    """A plus in the query is a space, as in a form, and %2B is a plus."""
    ids = [Caller(app, subject).open() for subject in ("a b", "a+b")]
    for query, id in zip(("a+b", "a%2Bb"), ids):
        assert gateway.post(f"/sessions/{id}/heartbeat?subject={query}").status_code == 200


@fake_only
@pytest.mark.parametrize(
    "claims",
    [
        {name: given}
        for name in ("scope", "scp", "permissions", "roles")
        for given in (ADMIN, f"a {ADMIN} b", ["a", ADMIN])
    ],
    ids=str,
)
def test_where_scopes_stand(app: Flask, claims: dict[str, object]) -> None:
    """The scope is found in each of the claims that issuers use, as a word of a string or in a list."""
    assert Caller(app, **claims).get("/sessions?subject=bob").status_code == 200


@fake_only
@pytest.mark.parametrize(
    "claims",
    [
        {"scope": scope}
        for scope in (ADMIN + "x", "x" + ADMIN, f"{ADMIN}:read", ADMIN.upper(), f"{ADMIN},a", f"a\t{ADMIN}")
    ]
    + [{"scope": [f"a {ADMIN}"]}, {"scope": [[ADMIN]]}, {"scope": {ADMIN: True}}, {"scope": True}, {"scope": [None]}]
    + [{"scopes": ADMIN}, {"role": ADMIN}, {"aud_": ADMIN}, {"sub_scope": [ADMIN]}],
    ids=str,
)
def test_no_scope(app: Flask, claims: dict[str, object]) -> None:
    """What only looks like the scope, or stands elsewhere, is none."""
    assert Caller(app, **claims).get("/sessions?subject=bob").status_code == 403


@fake_only
@pytest.mark.parametrize("scope", ["", None, "None", [None], [""], ADMIN])
def test_not_configured(make_app: Callable[..., Flask], scope: object) -> None:
    """Where no scope is configured no token may act for other subjects, and the challenge names none."""
    response = Caller(make_app(), scope=scope).get("/sessions?subject=bob")
    assert (response.status_code, response.data) == (403, REFUSED)
    assert response.headers["WWW-Authenticate"] == 'Bearer realm="sessions", error="insufficient_scope"'


@fake_only
def test_token_first(app: Flask) -> None:
    """Without a good token the answer is a 401, whatever the query says."""
    assert app.test_client().get("/sessions?subject=bob").status_code == 401
    assert Caller(app, exp=1, scope=ADMIN).get("/sessions?subject=bob").status_code == 401


@fake_only
def test_other_parameters(app: Flask) -> None:
    """Other parameters change nothing, however they are spelled."""
    alice = Caller(app)
    id = alice.open()
    for query in ("x=1", "x=%FF", "subjects=bob", "subject%00=bob", "Subject=bob", "x=subject=bob", "&&="):
        assert alice.post(f"/sessions/{id}/heartbeat?{query}").status_code == 200


@fake_only
def test_remembered(app: Flask) -> None:
    """A token that is remembered may do what it could before, and no more."""
    alice, backend = Caller(app), Caller(app, "backend", scope=ADMIN)
    for _ in range(2):
        assert alice.get("/sessions?subject=backend").status_code == 403
        assert backend.get("/sessions?subject=alice").status_code == 200


@fake_only
def test_log(app: Flask, gateway: Caller, log: Log) -> None:
    """A line of such a call has the hashes of the actor and of the subject; one of a subject's own call only this."""
    alice, id = Caller(app), gateway.post("/sessions?subject=alice").json["session"]["id"]
    alice.revoke(id)
    gateway.post(f"/sessions/{id}/revoke?subject=alice")
    gateway.post("/sessions/revoke-all?subject=alice")
    gateway.open()
    opened, revoked, missing, all_revoked, own = log.take()
    assert [line["event"] for line in (opened, missing, all_revoked)] == [
        "session_opened",
        "session_not_found",
        "sessions_revoked",
    ]
    assert {line["subject"] for line in (opened, revoked, missing, all_revoked)} == {revoked["subject"]}
    assert {line["actor"] for line in (opened, missing, all_revoked)} == {own["subject"]}
    assert "actor" not in revoked and "actor" not in own
    assert own["subject"] != revoked["subject"]


@fake_only
def test_log_of_a_refusal(app: Flask, log: Log) -> None:
    """A refused call is an event of its own, with both hashes, and counted; what can be no subject is left out."""
    alice, bob = Caller(app), Caller(app, "bob")
    bob.open(), alice.open()
    bobs, alices = (line["subject"] for line in log.take())
    alice.get("/sessions?subject=bob"), alice.get("/sessions?subject=%FF")
    refused, malformed = log.take()
    assert (refused["event"], refused["actor"], refused["subject"]) == ("scope_refused", alices, bobs)
    assert (refused["endpoint"], refused["address"]) == ("sessions.list_sessions", "127.0.0.1")
    assert malformed["actor"] == alices and "subject" not in malformed
    assert 'tokens_refused_total{reason="scope"} 2.0' in alice.get("/metrics").text


def test_number_revoked(alice: Caller) -> None:
    """The answer to revoke-all says in a header how many sessions it ended."""
    spared = [alice.open() for _ in range(4)][0]
    for body, number in (({"exceptSessionId": spared}, 3), ({}, 1), ({}, 0)):
        assert alice.post("/sessions/revoke-all", json=body).headers["Sessions-Revoked"] == str(number)


def test_keys(gateway: Caller, database: redis.Redis) -> None:
    """What a backend opens for a subject stands under that subject's keys alone."""
    id = gateway.post("/sessions?subject=auth0%7C1%2F2").json["session"]["id"]
    assert set(database.keys()) == {session_key("auth0|1/2", id), index_key("auth0|1/2")}
