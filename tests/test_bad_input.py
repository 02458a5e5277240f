"""Bad input: a 4xx in the contract's shape, and nothing written."""

import json
from collections.abc import Callable

import pytest
import redis
from flask import Flask

from app.bodies import LARGEST_BODY
from tests.conftest import FAILURES, Caller, Clock, Log, answer, fake_only, refused

MISSING = "A" * 32
STRANGE_IDS = {
    "one letter": "A",
    "not UTF-8": "%FF",
    "also not UTF-8": "%FE",
    "id and not UTF-8": "A" * 31 + "%FF",
    "NUL": "%00",
    "id and NUL": "A" * 32 + "%00",
    "id and newline": "A" * 32 + "%0A",
    "id and CR LF": "A" * 32 + "%0D%0A",
    "newline and id": "%0A" + "A" * 32,
    "id and space": "A" * 32 + "%20",
    "10 kB": "A" * 10_000,
    "21 characters": "A" * 21,
    "65 characters": "A" * 65,
    "dots": "..",
    "encoded dots": "%2e%2e",
    "one dot": ".",
    "slash": "%2F",
    "id, slash": "A" * 32 + "%2F",
    "path": "..%2F..%2Fetc%2Fpasswd",
    "encoded twice": "%2541" * 32,
    "space": "%20",
    "plus": "A" * 31 + "+",
    "padding": "A" * 31 + "=",
    "letters beyond ASCII": "%C3%A9" * 32,
    "digits beyond ASCII": "%D9%A1" * 32,
    "wide letters": "%EF%BC%A1" * 32,
    "emoji": "%F0%9F%92%A9" * 32,
    "surrogate": "%ED%A0%80" * 32,
    "glob": "*" * 32,
    "braces": "{" + "A" * 30 + "}",
    "colons": ":" * 32,
    "quote": "'" + "A" * 32,
    "semicolon": "A" * 32 + ";x=1",
    "format": "%25s" * 32,
}


@fake_only
@pytest.mark.parametrize("method, path", [("POST", "/heartbeat"), ("POST", "/revoke"), ("GET", "")])
@pytest.mark.parametrize("id", STRANGE_IDS.values(), ids=STRANGE_IDS)
def test_strange_id(alice: Caller, database: redis.Redis, id: str, method: str, path: str) -> None:
    """What cannot be an id is answered byte for byte like a session that does not exist."""
    missing = alice.raw(method, f"/sessions/{MISSING}{path}")
    assert missing.status_code == 404
    assert answer(alice.raw(method, f"/sessions/{id}{path}")) == answer(missing)
    assert answer(alice.raw(method, f"/sessions/{id}{path}/")) == answer(missing)
    assert database.keys() == []


@fake_only
@pytest.mark.parametrize("method, path", [("POST", "/heartbeat"), ("POST", "/revoke"), ("GET", "")])
@pytest.mark.parametrize("id", STRANGE_IDS.values(), ids=STRANGE_IDS)
def test_strange_id_without_token(alice: Caller, log: Log, id: str, method: str, path: str) -> None:
    """What cannot be an id is a 401 like the rest where there is no token, and a line in the log either way."""
    alice.raw(method, f"/sessions/{id}{path}")
    alice.headers = {}
    assert alice.raw(method, f"/sessions/{id}{path}").status_code == 401
    assert log.names() == ["session_not_found", "token_refused"]


@fake_only
@pytest.mark.parametrize("id", STRANGE_IDS.values(), ids=STRANGE_IDS)
def test_strange_id_while_the_store_is_down(alice: Caller, database: redis.Redis, id: str) -> None:
    """Redis is never asked for what cannot be an id."""
    database.connection_pool.connection_kwargs["server"].connected = False
    assert alice.raw("POST", f"/sessions/{id}/heartbeat").status_code == 404
    assert alice.raw("POST", f"/sessions/{MISSING}/heartbeat").status_code == 500


@fake_only
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
@pytest.mark.parametrize(
    "path",
    [
        "//",
        "///",
        "/sessions//",
        "/sessions//heartbeat",
        "/sessions//{id}",
        "/sessions//{id}/heartbeat",
        "/sessions/{id}//heartbeat",
        "/sessions/{id}/heartbeat//",
        "/sessions/{id}/Heartbeat",
        "/sessions/{id}/revoke/{id}",
        "/sessions/heartbeat/heartbeat",
        "/sessions/revoke-all/revoke",
        "/sessions%2F{id}",
        "/SESSIONS",
        "/sessions%00",
        "/sessions%FF",
        "//example.com/sessions",
        "/%2e%2e/sessions",
        "/sessions%3Fid=1",
    ],
)
def test_no_such_path(alice: Caller, method: str, path: str) -> None:
    """A path that is not quite one of ours is not found, whatever the method, and no redirect.

    The sentence is not that of an ended session, at which a device would open a new one.
    """
    id = alice.open()
    assert refused(alice, method, path.format(id=id)) == 404
    if method != "HEAD":
        assert alice.raw(method, path.format(id=id)).json == {"success": False, "error": "Not found"}
    assert alice.ids() == [id]


@pytest.mark.parametrize("method, path", FAILURES)
def test_slash_at_the_end(alice: Caller, method: str, path: str) -> None:
    """A slash at the end of a path changes nothing."""
    ids = [alice.open(), alice.open()]
    body = {"json": {"ids": ids}} if path == "/sessions/heartbeat" else {}
    plain, slashed = (alice.raw(method, path.format(id=id) + end, **body) for id, end in zip(ids, ("", "/")))
    assert plain.status_code == slashed.status_code in (200, 201)
    assert list(plain.json) == list(slashed.json)
    refused_plain, refused_slashed = (alice.raw("DELETE", path.format(id=ids[0]) + end) for end in ("", "/"))
    assert refused_plain.status_code == 405
    assert answer(refused_plain) == answer(refused_slashed)


@fake_only
@pytest.mark.parametrize("path", ["/sessions/heartbeat", "/sessions/revoke-all"])
@pytest.mark.parametrize("end", ["", "/"])
def test_names_are_no_ids(alice: Caller, path: str, end: str) -> None:
    """The name of an endpoint is not taken for a session's id, with or without a token."""
    for _ in range(2):
        response = alice.raw("GET", path + end)
        assert (response.status_code, response.headers["Allow"]) == (405, "POST")
        alice.headers = {}


@fake_only
@pytest.mark.parametrize("method, path", FAILURES)
def test_leading_slashes(alice: Caller, method: str, path: str) -> None:
    """A path that begins with more than one slash is not found, so that it gets past no rule of a proxy's."""
    assert refused(alice, method, "/" + path.format(id=alice.open())) == 404


@fake_only
@pytest.mark.parametrize("slashes", ["/", "//"])
@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/docs/start.js"])
def test_leading_slashes_without_token(alice: Caller, path: str, slashes: str) -> None:
    """Nor is one of those that ask for no token."""
    assert alice.raw("GET", path, buffered=True).status_code == 200
    assert refused(alice, "GET", slashes + path) == 404


JSON = "application/json"
OBJECTS = {
    "not JSON": (b"{", 400),
    "words": (b"deviceName=x", 400),
    "white space": (b"  ", 400),
    "two objects": (b"{}{}", 400),
    "single quotes": (b"{'deviceName': 'x'}", 400),
    "not UTF-8": (b'{"deviceName": "\xff"}', 400),
    "only bytes": (b"\xff\xfe\xfd", 400),
    "NUL": (b"\x00", 400),
    "NaN": (b'{"idleTimeoutSeconds": NaN}', 422),
    "Infinity": (b'{"idleTimeoutSeconds": Infinity}', 422),
    "minus Infinity": (b'{"idleTimeoutSeconds": -Infinity}', 422),
    "digits": (b'{"idleTimeoutSeconds": ' + b"1" * 5000 + b"}", 400),
    "lists 40,000 deep, never closed": (b"[" * 40_000, 400),
    "list": (b"[]", 422),
    "list of objects": (b"[{}]", 422),
    "number": (b"5", 422),
    "string": (b'"deviceName"', 422),
    "true": (b"true", 422),
    "beyond a double": (b'{"idleTimeoutSeconds": 1e999}', 422),
    "unknown field": (b'{"colour": "red"}', 422),
    "unknown field without a name": (b'{"": 1}', 422),
    "unknown field that is no text": (b'{"\\ud800": 1}', 422),
    "unknown field 500 deep": (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", 422),
    "100 kB": (b'{"deviceName": "' + b"x" * 100_000 + b'"}', 413),
    "100 kB of white space": (b" " * 100_000, 413),
    "100 kB that is no JSON": (b"\xff" * 100_000, 413),
}


@fake_only
@pytest.mark.parametrize("path", ["/sessions", "/sessions/revoke-all"])
@pytest.mark.parametrize("body, status", OBJECTS.values(), ids=OBJECTS)
def test_bad_body(alice: Caller, database: redis.Redis, path: str, body: bytes, status: int) -> None:
    """A body that is no JSON object of the documented fields is refused, and nothing has happened."""
    id = alice.open()
    keys = set(database.keys())
    assert refused(alice, "POST", path, data=body, content_type=JSON) == status
    assert set(database.keys()) == keys
    assert alice.ids() == [id]


@fake_only
@pytest.mark.parametrize("path", ["/sessions", "/sessions/revoke-all"])
@pytest.mark.parametrize("body", [b"[" * 2000 + b"]" * 2000, b'{"a":' * 2000 + b"1" + b"}" * 2000], ids=["[", "{"])
def test_deep_body(alice: Caller, database: redis.Redis, path: str, body: bytes) -> None:
    """A body nested 2,000 deep is refused: as no JSON, or as of unknown fields where Python reads so deep (3.13)."""
    assert refused(alice, "POST", path, data=body, content_type=JSON) in (400, 422)
    assert database.keys() == []


@fake_only
@pytest.mark.parametrize("path", ["/sessions", "/sessions/heartbeat", "/sessions/revoke-all"])
def test_many_unknown_fields(alice: Caller, path: str) -> None:
    """Of thousands of unknown fields a hundred are named: to look at each would hold up other callers."""
    response = alice.post(path, json={f"field{number}": 1 for number in range(5000)})
    assert response.status_code == 422
    assert 1 <= len(response.json["details"]) <= 101


@fake_only
def test_repeated_fields(alice: Caller) -> None:
    """Of a field that is there again and again the last one counts, and none behind it is overlooked."""
    id = alice.open()
    body = b"{" + b'"refuseEarlierTokens": true, ' * 200 + b'"refuseEarlierTokens": false, "exceptSessionId": "%s"}'
    answered = alice.post("/sessions/revoke-all", data=body % id.encode(), content_type=JSON)
    assert (answered.status_code, alice.ids()) == (200, [id])


@fake_only
@pytest.mark.parametrize("path", ["/sessions", "/sessions/revoke-all"])
@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "application/jsonp",
        "json",
        ";",
        "\xff",
    ],
)
def test_wrong_content_type(alice: Caller, path: str, content_type: str | None) -> None:
    """A body that does not say that it is JSON is refused, whatever it holds."""
    id = alice.open()
    assert refused(alice, "POST", path, data=b"{}", content_type=content_type) == 415
    assert alice.ids() == [id]


@fake_only
@pytest.mark.parametrize(
    "content_type", [JSON, "application/json; charset=utf-8", "Application/JSON", None, "text/plain"]
)
def test_no_body(alice: Caller, content_type: str | None) -> None:
    """Without a body the Content-Type does not matter."""
    assert alice.post("/sessions", content_type=content_type).status_code == 201
    assert alice.post("/sessions/revoke-all", content_type=content_type).status_code == 200


@fake_only
@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_spellings_of_the_content_type(alice: Caller, content_type: str) -> None:
    """The Content-Type may have parameters and capitals."""
    assert alice.post("/sessions", data=b'{"location": "x"}', content_type=content_type).status_code == 201


STRANGE_TEXTS = ["", 5, 1.5, True, [], {}, ["x"], "\ud800", "x\udfff"]
STRANGE_SECONDS = [0, -1, 1.5, "5", "", True, False, [], {}, 10**30, -(10**30), 1e300]


@fake_only
@pytest.mark.parametrize(
    "field, value",
    [(field, text) for field in ("deviceName", "location", "loginMethod") for text in STRANGE_TEXTS]
    + [("deviceName", "x" * 129), ("location", "é" * 129), ("loginMethod", "x" * 65)]
    + [("idleTimeoutSeconds", seconds) for seconds in STRANGE_SECONDS]
    + [
        (field, "2099-01-01T00:00:00.000Z")
        for field in ("startedAt", "expiresAt", "lastActivity", "userId", "id", "ipAddress", "subject", "success")
    ]
    + [("startedAt", None), ("login_method", None)]
    + [
        ("devicename", "x"),
        ("device_name", "x"),
        ("idle_timeout", 5),
        ("absoluteTimeoutSeconds", 5),
        ("__proto__", {}),
    ],
)
def test_bad_field(alice: Caller, database: redis.Redis, field: str, value: object) -> None:
    """A field with a value out of its bounds, or one that only the server sets, is named and refused."""
    body = {"deviceName": "x", field: value}
    response = alice.post("/sessions", json=body)
    assert refused(alice, "POST", "/sessions", json=body) == response.status_code == 422
    assert set(response.json["details"]) == {field}
    assert database.keys() == []


@fake_only
def test_idle_timeout_above_the_maximum(make_app: Callable[..., Flask], database: redis.Redis) -> None:
    """The configured maximum may be asked for, and not a second more."""
    alice = Caller(make_app(session_idle_max_seconds=7))
    assert alice.post("/sessions", json={"idleTimeoutSeconds": 8}).status_code == 422
    assert database.keys() == []
    assert alice.post("/sessions", json={"idleTimeoutSeconds": 7}).status_code == 201


@fake_only
def test_refused_alike_every_time(alice: Caller, clock: Clock) -> None:
    """Requests leave nothing behind in the process: the same mistake gets the same answer, with one message."""
    for _ in range(3):
        response = alice.post("/sessions", json={"idleTimeoutSeconds": clock.idle * 100 + 1})
        assert len(response.json["details"]["idleTimeoutSeconds"]) == 1


@fake_only
def test_apps_side_by_side(make_app: Callable[..., Flask]) -> None:
    """Two apps in one process keep to their own configuration each."""
    narrow, wide = Caller(make_app(session_idle_max_seconds=7)), Caller(make_app(session_idle_max_seconds=70))
    assert narrow.post("/sessions", json={"idleTimeoutSeconds": 70}).status_code == 422
    assert wide.post("/sessions", json={"idleTimeoutSeconds": 70}).status_code == 201


@fake_only
@pytest.mark.parametrize("field", ["deviceName", "location", "loginMethod", "idleTimeoutSeconds"])
def test_null_is_absent(alice: Caller, field: str) -> None:
    """A field that is null when a session is opened counts as absent, and so does a body that is null."""
    for body in (None, {field: None}, {"deviceName": None, "location": None, "loginMethod": None}):
        opened = alice.post("/sessions", data=json.dumps(body), content_type=JSON)
        assert opened.status_code == 201
        assert not {"deviceName", "location"} & set(opened.json["session"])
        assert opened.json["session"]["loginMethod"] == "token"


@fake_only
@pytest.mark.parametrize("body", [None, {"exceptSessionId": None}])
def test_null_revokes_nothing(alice: Caller, body: object) -> None:
    """For revoke-all null is a 422, as a session may have been meant to be spared."""
    id = alice.open()
    assert refused(alice, "POST", "/sessions/revoke-all", data=json.dumps(body), content_type=JSON) == 422
    assert alice.ids() == [id]


@fake_only
@pytest.mark.parametrize("field", ["startedAt", "sessionId", "except_id", "ids"])
def test_bad_field_for_revoke_all(alice: Caller, field: str) -> None:
    """A misspelt wish to spare a session revokes none, rather than all."""
    id = alice.open()
    assert refused(alice, "POST", "/sessions/revoke-all", json={field: id}) == 422
    assert alice.ids() == [id]


SMALL_BODIES = [b"{}", b"{", b"x", b"\xff\x00", b'{"newExpiry": "2099-01-01T00:00:00.000Z"}', b" " * LARGEST_BODY]


@fake_only
@pytest.mark.parametrize("content_type", [None, JSON, "text/plain", "multipart/form-data", "nonsense"])
@pytest.mark.parametrize("body", SMALL_BODIES, ids=lambda body: repr(body[:9]))
def test_ignored_body(alice: Caller, body: bytes, content_type: str | None) -> None:
    """A heartbeat or a revoke ignores a body of bounded size, whatever it is and says it is."""
    id = alice.open()
    assert alice.raw("POST", f"/sessions/{id}/heartbeat", data=body, content_type=content_type).status_code == 200
    assert alice.raw("POST", f"/sessions/{id}/revoke", data=body, content_type=content_type).status_code == 200


@fake_only
@pytest.mark.parametrize("size", [LARGEST_BODY + 1, LARGEST_BODY + 2, 1_000_000])
def test_body_too_large_to_ignore(alice: Caller, size: int) -> None:
    """A heartbeat or a revoke with a body beyond the bound is refused and has no effect."""
    id = alice.open()
    before = alice.read(id).json
    for path in (f"/sessions/{id}/heartbeat", f"/sessions/{id}/revoke"):
        assert refused(alice, "POST", path, data=b"x" * size) == 413
    assert alice.read(id).json == before
