"""Every kind of answer, to the letter."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import redis
from flask import Flask
from werkzeug.test import TestResponse

from app.bodies import LARGEST_BODY
from tests.conftest import FAILURES, Caller, Clock, fake_only

RFC3339 = rb"[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]\.[0-9]{3}Z"
MISSING = "A" * 32

SESSION_REVOKED = b'{"success": true, "message": "Session revoked successfully"}'
ALL_REVOKED = b'{"success": true, "message": "All sessions revoked successfully"}'
NOT_FOUND = b'{"success": false, "error": "Session not found"}'
EXPIRED = b'{"success": false, "error": "Session not found or expired"}'
OK = b'{"status": "ok"}'


@contextmanager
def late(seconds: float) -> Iterator[None]:
    """Stands in for `deadline`, which only interrupts a server's worker: the time is over at once."""
    raise TimeoutError
    yield


def sent(response: TestResponse) -> bytes:
    """The body of an answer whose headers are those of every answer."""
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert int(response.headers["Content-Length"]) == len(response.data)
    return response.data


@pytest.mark.parametrize(
    "method, path, status, body",
    [
        ("POST", "/sessions/{id}/revoke", 200, SESSION_REVOKED),
        ("POST", "/sessions/revoke-all", 200, ALL_REVOKED),
        ("POST", f"/sessions/{MISSING}/heartbeat", 404, EXPIRED),
        ("POST", f"/sessions/{MISSING}/revoke", 404, NOT_FOUND),
        ("GET", f"/sessions/{MISSING}", 404, NOT_FOUND),
        ("GET", "/healthz", 200, OK),
        ("GET", "/readyz", 200, OK),
    ],
)
def test_fixed_body(alice: Caller, method: str, path: str, status: int, body: bytes) -> None:
    """A body that the contract fixes is exact to the letter."""
    response = alice.raw(method, path.format(id=alice.open()))
    assert (response.status_code, sent(response)) == (status, body)


def test_no_sessions(alice: Caller) -> None:
    """Without sessions the list is empty."""
    assert sent(alice.get("/sessions")) == b'{"success": true, "sessions": []}'


def test_heartbeat_body(alice: Caller) -> None:
    """The answer to a heartbeat has three fields and nothing else."""
    response = alice.heartbeat(alice.open())
    expected = rb'\{"success": true, "message": "Session updated successfully", "newExpiry": "%b"\}' % RFC3339
    assert response.status_code == 200
    assert re.fullmatch(expected, sent(response))
    assert re.fullmatch("[0-9]+", response.headers["Session-Expires-In"])


SESSION = (
    rb'\{"id": "[A-Za-z0-9_-]{32}", "deviceName": "Tablet", "ipAddress": "127\.0\.0\.1", "location": "Oslo", '
    rb'"startedAt": "%b", "lastActivity": "%b", "expiresAt": "%b", "loginMethod": "pin"\}' % (RFC3339, RFC3339, RFC3339)
)


def test_session_bodies(alice: Caller) -> None:
    """Opening, reading and listing show the session's eight fields in the contract's order."""
    opened = alice.post("/sessions", json={"loginMethod": "pin", "location": "Oslo", "deviceName": "Tablet"})
    expected = rb'\{"success": true, "message": "Session opened successfully", "session": %b\}' % SESSION
    assert opened.status_code == 201
    assert re.fullmatch(expected, sent(opened))
    read, listed = alice.get(opened.headers["Location"]), alice.get("/sessions")
    assert (read.status_code, listed.status_code) == (200, 200)
    assert re.fullmatch(rb'\{"success": true, "session": %b\}' % SESSION, sent(read))
    assert re.fullmatch(rb'\{"success": true, "sessions": \[%b\]\}' % SESSION, sent(listed))


def test_opened_expires_in(alice: Caller, clock: Clock) -> None:
    """Opening says how many whole seconds the session has, for devices without a set clock."""
    for options, seconds in (({}, clock.idle), ({"idleTimeoutSeconds": 1}, 1)):
        assert alice.post("/sessions", json=options).headers["Session-Expires-In"] == str(seconds)


def test_limit_body(make_app: Callable[..., Flask]) -> None:
    """At the limit the answer is 429 and says when to try again."""
    alice = Caller(make_app(session_limit=1))
    alice.open()
    response = alice.post("/sessions")
    assert (response.status_code, sent(response)) == (429, b'{"success": false, "error": "Too many sessions"}')
    assert re.fullmatch("[1-9][0-9]*", response.headers["Retry-After"])


@fake_only
@pytest.mark.parametrize("method, path", FAILURES)
def test_missing_token(app: Flask, method: str, path: str) -> None:
    """Without a token every endpoint of the API is a 401 that only names the scheme."""
    response = app.test_client().open(path.format(id=MISSING), method=method)
    assert (response.status_code, sent(response)) == (401, b'{"success": false, "error": "Missing bearer token"}')
    assert response.headers["WWW-Authenticate"] == 'Bearer realm="sessions"'


@fake_only
@pytest.mark.parametrize("method, path", FAILURES)
def test_expired_token(app: Flask, method: str, path: str) -> None:
    """With an expired token every endpoint of the API is a 401 that says so."""
    response = Caller(app, exp=1).raw(method, path.format(id=MISSING))
    assert (response.status_code, sent(response)) == (401, b'{"success": false, "error": "Invalid or expired token"}')
    challenge = r'Bearer realm="sessions", error="invalid_token", error_description="[^"\\]+"'
    assert re.fullmatch(challenge, response.headers["WWW-Authenticate"])


@fake_only
@pytest.mark.parametrize("path", ["/", "/nowhere", "/sessionsx", "/favicon.ico"])
def test_unknown_path(alice: Caller, path: str) -> None:
    """What is not there is a 404 in the contract's shape."""
    response = alice.get(path)
    assert (response.status_code, sent(response)) == (404, b'{"success": false, "error": "Not found"}')


@fake_only
@pytest.mark.parametrize(
    "path, options, status",
    [
        ("/sessions", {"data": "{", "content_type": "application/json"}, 400),
        ("/sessions", {"data": b" " * (LARGEST_BODY + 1), "content_type": "application/json"}, 413),
        ("/sessions", {"data": "{}", "content_type": "text/plain"}, 415),
        ("/sessions/{id}/heartbeat", {"data": b" " * (LARGEST_BODY + 1)}, 413),
        ("/sessions/{id}", {}, 405),
    ],
)
def test_error_shape(alice: Caller, path: str, options: dict, status: int) -> None:
    """Errors that the framework would answer in its own way have the contract's shape: false, and one sentence."""
    response = alice.post(path.format(id=alice.open()), **options)
    assert response.status_code == status
    assert re.fullmatch(rb'\{"success": false, "error": "[A-Z][A-Za-z -]+"\}', sent(response).replace(b"/", b""))


@fake_only
@pytest.mark.parametrize("path", ["/sessions", "/sessions/{id}/heartbeat"])
def test_body_that_never_comes(alice: Caller, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """A body that does not arrive in time is a 408."""
    path = path.format(id=alice.open())
    monkeypatch.setattr("app.bodies.deadline", late)
    response = alice.post(path, json={})
    expected = b'{"success": false, "error": "Request body not received in time"}'
    assert (response.status_code, sent(response)) == (408, expected)


@fake_only
def test_invalid_fields(alice: Caller) -> None:
    """A 422 adds the messages for each field."""
    response = alice.post("/sessions", json={"deviceName": "", "expiresAt": "2099-01-01T00:00:00.000Z"})
    assert response.status_code == 422
    body = json.loads(sent(response))
    assert list(body) == ["success", "error", "details"]
    assert body["success"] is False
    assert set(body["details"]) == {"deviceName", "expiresAt"}
    assert all(isinstance(message, str) for messages in body["details"].values() for message in messages)


ALLOWED = {
    "/sessions": {"GET", "HEAD", "POST"},
    "/sessions/revoke-all": {"POST"},
    "/sessions/{id}": {"GET", "HEAD"},
    "/sessions/{id}/heartbeat": {"POST"},
    "/sessions/{id}/revoke": {"POST"},
    "/healthz": {"GET", "HEAD"},
    "/readyz": {"GET", "HEAD"},
}
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"]


@fake_only
@pytest.mark.parametrize("path, method", [(p, m) for p in ALLOWED for m in METHODS if m not in ALLOWED[p]])
def test_wrong_method(alice: Caller, path: str, method: str) -> None:
    """A method that a path does not have is a 405 which names those that it has."""
    response = alice.raw(method, path.format(id=alice.open()))
    assert (response.status_code, sent(response)) == (405, b'{"success": false, "error": "Method not allowed"}')
    assert set(response.headers["Allow"].split(", ")) == ALLOWED[path]


@pytest.mark.parametrize("path", ["/sessions", "/sessions/{id}", "/healthz", "/readyz"])
def test_head(alice: Caller, path: str) -> None:
    """HEAD gives the headers of GET and no body."""
    path = path.format(id=alice.open())
    head, get = alice.raw("HEAD", path), alice.raw("GET", path)
    assert head.data == b""
    assert (head.status_code, head.headers.to_wsgi_list()) == (200, get.headers.to_wsgi_list())


@pytest.fixture
def outage(database: redis.Redis) -> Callable[[bool], None]:
    """Cuts the fake Redis off, or brings it back."""

    def cut(off: bool = True) -> None:
        database.connection_pool.connection_kwargs["server"].connected = not off

    return cut


@fake_only
@pytest.mark.parametrize("method, path", FAILURES)
def test_store_down(alice: Caller, outage: Callable[..., None], method: str, path: str) -> None:
    """While the store is down each endpoint gives its own 500, says when to try again, and heals by itself."""
    id = alice.open()
    outage()
    response = alice.raw(method, path.format(id=id))
    body = b'{"success": false, "error": "%b"}' % FAILURES[method, path].encode()
    assert (response.status_code, sent(response)) == (500, body)
    assert re.fullmatch("[1-9][0-9]*", response.headers["Retry-After"])
    outage(False)
    assert alice.raw(method, path.format(id=id)).status_code in (200, 201)


@fake_only
def test_retry_after_is_random(alice: Caller, outage: Callable[..., None]) -> None:
    """A fleet that saw the same outage does not come back in the same second."""
    outage()
    assert len({alice.heartbeat(MISSING).headers["Retry-After"] for _ in range(50)}) > 1


@fake_only
def test_operations_while_the_store_is_down(alice: Caller, outage: Callable[..., None]) -> None:
    """While the store is down the process is alive and not ready."""
    outage()
    alive, ready = alice.get("/healthz"), alice.get("/readyz")
    assert (alive.status_code, sent(alive)) == (200, OK)
    assert (ready.status_code, json.loads(sent(ready))["status"]) == (503, "unavailable")


@fake_only
@pytest.mark.parametrize("method, path", FAILURES)
def test_nothing_leaks(
    alice: Caller, database: redis.Redis, monkeypatch: pytest.MonkeyPatch, method: str, path: str
) -> None:
    """An unforeseen error is the same 500, without a word of the exception."""
    id = alice.open()
    for name in ("execute_command", "pipeline"):
        monkeypatch.setattr(database, name, lambda *_, **__: 1 / 0)
    monkeypatch.setattr(database.connection_pool, "get_connection", lambda *_, **__: 1 / 0)
    response = alice.raw(method, path.format(id=id))
    body = {"success": False, "error": FAILURES[method, path]}
    assert (response.status_code, json.loads(sent(response))) == (500, body)


@fake_only
def test_operations_need_no_token(app: Flask) -> None:
    """Liveness and readiness ask for no token."""
    assert [app.test_client().get(path).status_code for path in ("/healthz", "/readyz")] == [200, 200]
