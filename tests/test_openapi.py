"""The API as a document: valid, complete, and to the letter what the service answers."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import redis
import requests
from flask import Flask
from jsonschema import Draft202012Validator
from marshmallow import Schema, fields, missing, validate
from openapi_spec_validator import OpenAPIV31SpecValidator
from werkzeug.test import TestResponse

import app.operations
from app.bodies import BODY_TIMEOUT, LARGEST_BODY
from app.config import LONGEST_SECONDS, Config
from app.keys import KeysUnavailable
from app.schemas import (
    CHARACTERS,
    MOST_IDS,
    SESSION_ID,
    HeartbeatManySchema,
    OpenSchema,
    RevokeAllSchema,
    SessionSchema,
)
from tests.conftest import SECRET, Caller, milliseconds
from tests.servers import gunicorn, until
from tests.test_contract import late

MISSING = "A" * 32
JSON = "application/json"
DOCUMENT = json.loads(Path(app.operations.__file__).with_name("openapi.json").read_text())
SCHEMAS = DOCUMENT["components"]["schemas"]
# The bodies that callers send; all other schemas are of answers.
REQUESTED = {
    "OpenSession": OpenSchema(LONGEST_SECONDS),
    "HeartbeatMany": HeartbeatManySchema(),
    "RevokeAll": RevokeAllSchema(),
}
# The files of the page at /docs are no part of the API.
FILES = {"operations.page_file"}


def follow(part: Any) -> Any:
    """A part of the document, with references followed."""
    if isinstance(part, list):
        return [follow(each) for each in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        found: Any = DOCUMENT
        for name in part["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        return follow(found)
    return {name: follow(each) for name, each in part.items()}


OPERATIONS = [
    (method.upper(), path, follow(operation))
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
]
BY_ID = {operation["operationId"]: operation for _, _, operation in OPERATIONS}


def examples(shown: dict[str, Any]) -> list[Any]:
    """The bodies that a Response Object or a Request Body Object shows."""
    content = shown["content"].get(JSON, {})
    bodies = [each["value"] for each in content.get("examples", {}).values()]
    return bodies + [content["example"]] if "example" in content else bodies


@pytest.fixture
def backend() -> str:
    """One store is enough here."""
    return "fakeredis"


def test_served_as_it_is(app: Flask) -> None:
    """The service serves the file to the letter, to callers without a token."""
    response = app.test_client().get("/openapi.json")
    assert (response.status_code, response.headers["Content-Type"]) == (200, JSON)
    assert response.json == DOCUMENT


def test_head_too_large() -> None:
    """A head that is too large gets the documented 431, before it reaches the app and on every endpoint."""
    assert [id for id, operation in BY_ID.items() if "431" not in operation["responses"]] == []
    [body] = examples(BY_ID["heartbeat"]["responses"]["431"])
    with gunicorn({"REDIS_URL": "memory://", "JWT_SECRET": SECRET}) as url:
        headers = {"Authorization": "Bearer " + "x" * 20_000}

        def answered() -> bool:
            # The server closes the connection with a part of the head unread, which can destroy its answer on the way.
            response = requests.post(f"{url}/sessions/{MISSING}/heartbeat", headers=headers, timeout=5)
            assert (response.status_code, response.json()) == (431, body)
            return True

        until(answered)


def test_valid() -> None:
    """The document is valid OpenAPI 3.1."""
    assert DOCUMENT["openapi"] == "3.1.0"
    OpenAPIV31SpecValidator(DOCUMENT).validate()


def test_every_route(app: Flask) -> None:
    """Every route and method is documented under the name of its view, and nothing else is."""
    routes = {
        (method, re.sub("<.*?([a-z]+)>", r"{\1}", rule.rule), rule.endpoint.rpartition(".")[2])
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if rule.endpoint not in FILES
    }
    assert {(method, path, operation["operationId"]) for method, path, operation in OPERATIONS} == routes


def test_described() -> None:
    """Every endpoint has a sentence that says what it does, and a declared tag."""
    assert [id for id, operation in BY_ID.items() if not re.fullmatch("[A-Z].*[.]", operation["summary"])] == []
    declared = [tag["name"] for tag in DOCUMENT["tags"]]
    assert {tag for operation in BY_ID.values() for tag in operation["tags"]} == set(declared)


def test_bearer() -> None:
    """The way in is a JWT as a bearer token."""
    bearer = DOCUMENT["components"]["securitySchemes"]["bearer"]
    assert (bearer["type"], bearer["scheme"], bearer["bearerFormat"]) == ("http", "bearer", "JWT")
    assert DOCUMENT["security"] == [{"bearer": []}]


def test_token_needed(app: Flask) -> None:
    """The document asks for a token exactly where the service does."""
    http = app.test_client()
    for method, path, operation in OPERATIONS:
        status = http.open(path.format(id=MISSING), method=method).status_code
        assert operation.get("security") == (None if status == 401 else []), path


def test_session_id(alice: Caller) -> None:
    """The pattern of the path parameter is the service's, and fits the id of a session."""
    parameter = DOCUMENT["components"]["parameters"]["id"]
    assert parameter["schema"] == {"type": "string", "pattern": f"^{SESSION_ID}$"}
    assert re.search(parameter["schema"]["pattern"], alice.open())
    taking = {path for _, path, operation in OPERATIONS if parameter in operation.get("parameters", [])}
    assert taking == {path for path in DOCUMENT["paths"] if "{id}" in path}


def test_request_bodies() -> None:
    """A body is required only where there is nothing to do without one."""
    bodies = {id: each["requestBody"].get("required", False) for id, each in BY_ID.items() if "requestBody" in each}
    assert bodies == {"open_session": False, "heartbeat_many": True, "revoke_all": False}


TYPES: dict[type, dict[str, Any]] = {
    fields.String: {"type": "string"},
    fields.Integer: {"type": "integer"},
    fields.Boolean: {"type": "boolean"},
    fields.Function: {"type": "string", "format": "date-time"},
    fields.Raw: {"type": "array", "minItems": 1, "maxItems": MOST_IDS, "items": {"type": "string"}},
}


def schema_of(field: fields.Field) -> dict[str, Any]:
    """The JSON Schema of a marshmallow field: its type, its bounds and its default."""
    [schema] = [TYPES[kind] for kind in type(field).__mro__ if kind in TYPES]
    for each in field.validators:
        if isinstance(each, validate.Length):
            schema = {**schema, "minLength": each.min, "maxLength": each.max}
        elif isinstance(each, validate.Range):
            schema = {**schema, "minimum": each.min, "maximum": each.max}
        elif isinstance(each, validate.Regexp) and each is not CHARACTERS:
            # JSON Schema's regular expressions have no \Z.
            schema = {**schema, "pattern": "^" + each.regex.pattern.removesuffix(r"\Z") + "$"}
    return schema if field.load_default is missing else {**schema, "default": field.load_default}


@pytest.mark.parametrize("name, schema", [*REQUESTED.items(), ("Session", SessionSchema())])
def test_schema(name: str, schema: Schema) -> None:
    """A schema has the fields of the service's own, in their order, with the same types, bounds and defaults.

    Where a session is opened each of them may be null.
    """
    own = {field.data_key or name: field for name, field in schema.fields.items()}
    shown = {
        name: {key: value for key, value in each.items() if key != "description"}
        for name, each in SCHEMAS[name]["properties"].items()
    }
    expected = {name: schema_of(field) for name, field in own.items()}
    if name == "OpenSession":
        expected = {name: {**each, "type": [each["type"], "null"]} for name, each in expected.items()}
    assert list(shown.items()) == list(expected.items())
    assert SCHEMAS[name].get("required", []) == [name for name, field in own.items() if field.required]


def test_other_fields() -> None:
    """The service refuses fields that it does not know; a caller must not refuse an answer that has a new one."""
    closed = {name for name, schema in SCHEMAS.items() if schema.get("additionalProperties") is False}
    assert closed == set(REQUESTED)
    assert str(DOCUMENT).count("'additionalProperties': False") == len(REQUESTED)


def test_session(alice: Caller) -> None:
    """A session has the documented fields in their order."""
    options = {"deviceName": "Tablet", "location": "Oslo", "loginMethod": "pin"}
    opened = alice.post("/sessions", json=options).json["session"]
    assert list(SCHEMAS["Session"]["properties"]) == list(opened)


def test_figures() -> None:
    """The bounds and defaults that the descriptions name are the service's own."""
    shown = follow(DOCUMENT["components"]["responses"])
    assert f"{LARGEST_BODY:,} bytes" in shown["BodyTooLarge"]["description"]
    assert f"{BODY_TIMEOUT:.0f} seconds" in shown["BodyTooSlow"]["description"]
    idle_timeout = SCHEMAS["OpenSession"]["properties"]["idleTimeoutSeconds"]["description"]
    assert f"`SESSION_IDLE_MAX_SECONDS` of the service says ({Config().session_idle_max_seconds} " in idle_timeout
    assert f"`SESSION_IDLE_SECONDS` ({Config().session_idle_seconds} " in idle_timeout


def bodies() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every Request Body Object and Response Object with the name of its operation."""
    for id, operation in BY_ID.items():
        for each in [*operation["responses"].values(), operation.get("requestBody")]:
            if each and JSON in each["content"] and id != "openapi":
                yield id, each


def closed(schema: Any) -> Any:
    """The same schema without room for other fields."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {name: closed(each) for name, each in schema.items()}
    return {"additionalProperties": False, **parts} if "properties" in parts else parts


def fits(body: Any, shown: dict[str, Any]) -> None:
    """Check that a body has the documented fields, as documented, and no others."""
    Draft202012Validator(closed(shown["content"][JSON]["schema"])).validate(body)


def test_examples() -> None:
    """Every JSON body has an example, and every example fits its schema, also that of a header."""
    for id, body in bodies():
        assert examples(body), id
        for example in examples(body):
            fits(example, body)
    headers = [header for _, body in bodies() for header in body.get("headers", {}).values()]
    for header in headers:
        if "example" in header:
            Draft202012Validator(header["schema"]).validate(header["example"])


def test_life_of_a_session() -> None:
    """The examples tell of one session in the order of its life: opened, kept alive, listed, read, revoked."""
    shown = {
        id: examples(operation["responses"]["201" if id == "open_session" else "200"])
        for id, operation in BY_ID.items()
    }
    [opened], [renewed], [listed], [read] = map(
        shown.get, ["open_session", "heartbeat", "list_sessions", "get_session"]
    )
    session = opened["session"]
    assert BY_ID["open_session"]["responses"]["201"]["headers"]["Location"]["example"] == f"/sessions/{session['id']}"
    assert session["startedAt"] == session["lastActivity"]
    assert read["session"] == listed["sessions"][0]
    assert read["session"] == {
        **session,
        "lastActivity": read["session"]["lastActivity"],
        "expiresAt": renewed["newExpiry"],
    }
    idle_timeouts = {
        milliseconds(each["expiresAt"]) - milliseconds(each["lastActivity"]) for each in (session, read["session"])
    }
    assert idle_timeouts == {Config().session_idle_seconds * 1000}
    assert [path for path in DOCUMENT["paths"] if "{id}" in path] == [
        "/sessions/{id}/heartbeat",
        "/sessions/{id}",
        "/sessions/{id}/revoke",
    ]


RENEWED = '{"success": true, "message": "Session updated successfully", "newExpiry": "2019-08-24T14:15:22.000Z"}'
FIXED = [
    ("heartbeat", 200, RENEWED),
    ("heartbeat", 404, '{"success": false, "error": "Session not found or expired"}'),
    ("heartbeat", 500, '{"success": false, "error": "Failed to update session"}'),
    ("list_sessions", 500, '{"success": false, "error": "Failed to retrieve sessions"}'),
    ("revoke", 200, '{"success": true, "message": "Session revoked successfully"}'),
    ("revoke", 404, '{"success": false, "error": "Session not found"}'),
    ("revoke", 500, '{"success": false, "error": "Failed to revoke session"}'),
    ("revoke_all", 200, '{"success": true, "message": "All sessions revoked successfully"}'),
    ("revoke_all", 500, '{"success": false, "error": "Failed to revoke all sessions"}'),
]


@pytest.mark.parametrize("id, status, body", FIXED)
def test_fixed_example(id: str, status: int, body: str) -> None:
    """The example of a body that the contract fixes is that body, to the letter."""
    [example] = examples(BY_ID[id]["responses"][str(status)])
    assert json.dumps(example) == body


# What one can send to an endpoint.
REQUESTS: list[dict[str, Any]] = [
    {},
    {"json": {"ids": [MISSING]}},
    {"json": {"colour": "red"}},
    {"data": b"{", "content_type": JSON},
    {"data": b"{}", "content_type": "text/plain"},
    {"data": b" " * (LARGEST_BODY + 1), "content_type": JSON},
    {"environ_overrides": {"wsgi.input": BytesIO(), "CONTENT_LENGTH": "9"}},  # breaks off
]


@pytest.fixture
def answers(
    make_app: Callable[..., Flask], database: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], Iterator[TestResponse]]:
    """All kinds of answers that an endpoint gives."""
    app = make_app(session_limit=2, jwt_admin_scope="sessions:admin")
    others = [make_app(metrics_token=token).test_client() for token in ("0123456789abcdef", "off")]
    alice, server = Caller(app), database.connection_pool.connection_kwargs["server"]

    def no_keys(token: str) -> None:
        raise KeysUnavailable

    def ask(method: str, path: str) -> Iterator[TestResponse]:
        def send(id: str = MISSING, headers: dict[str, str] = alice.headers, **options: Any) -> TestResponse:
            return app.test_client().open(path.format(id=id), method=method, headers=headers, **options)

        for options in REQUESTS:
            alice.post("/sessions/revoke-all")
            yield send(alice.open(), **options)
            yield send(**options)
        yield send(headers={})
        yield send(headers=Caller(app, exp=1).headers)
        if path.startswith("/sessions"):
            yield send(query_string="subject=bob")
            yield send(query_string="subject", headers=Caller(app, scope="sessions:admin").headers)
        server.connected = False
        yield send(json={"ids": [MISSING]} if path == "/sessions/heartbeat" else None)
        server.connected = True
        with monkeypatch.context() as patch:
            patch.setattr(app.extensions["token_verifier"], "verify", no_keys)
            yield send()
        with monkeypatch.context() as patch:
            patch.setattr("app.bodies.deadline", late)
            yield send(json={})
        if path == "/metrics":
            yield from [http.get(path, headers=headers) for http in others for headers in (alice.headers, {})]
        if path == "/readyz":
            yield make_app(jwt_secret=(), jwt_jwks_url="http://127.0.0.1:9/").test_client().get(path)

    return ask


@pytest.mark.parametrize("method, path, operation", OPERATIONS, ids=BY_ID)
def test_every_answer(
    answers: Callable[[str, str], Iterator[TestResponse]], method: str, path: str, operation: dict[str, Any]
) -> None:
    """An endpoint gives the documented statuses and no others, with the documented headers, fields and errors."""
    seen = defaultdict(list)
    for answer in answers(method, path):
        seen[str(answer.status_code)].append(answer)
    assert sorted(seen) == sorted(operation["responses"].keys() - {"431"})  # which never reaches the app
    for status, given in seen.items():
        shown = operation["responses"][status]
        headers = {name for name, header in shown.get("headers", {}).items() if header["required"]}
        assert all(headers <= set(dict(answer.headers)) for answer in given)
        assert {answer.mimetype for answer in given} == set(shown["content"])
        if not (bodies := examples(shown)):
            continue
        if status >= "400" and status != "422":
            assert {answer.text for answer in given} == {json.dumps(body) for body in bodies}
        for answer in given:
            fits(answer.json, shown)
            assert tuple(answer.json) == tuple(bodies[0]) == tuple(shown["content"][JSON]["schema"]["properties"])
