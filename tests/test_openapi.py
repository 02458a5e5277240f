"""The API as a document: valid, complete, and to the letter what the service answers."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import pytest
import redis
from flask import Flask
from openapi_spec_validator import OpenAPIV31SpecValidator
from werkzeug.test import TestResponse

from app.keys import KeysUnavailable
from app.schemas import LARGEST_BODY
from tests.conftest import Caller
from tests.test_contract import STALLED

pytestmark = pytest.mark.parametrize("backend", ["fakeredis"], indirect=True)

MISSING = "A" * 32
JSON = "application/json"
# The files of the page at /docs are no part of the API.
FILES = {"docs.static", "docs.start"}
Document = dict[str, Any]


@pytest.fixture
def document(app: Flask) -> Document:
    response = app.test_client().get("/openapi.json")
    assert (response.status_code, response.headers["Content-Type"]) == (200, JSON)
    return response.json


def operations(document: Document) -> Iterator[tuple[str, str, Document]]:
    """Method, path and Operation Object of each endpoint."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def responses(document: Document, operation: Document) -> dict[int, Document]:
    """The Response Objects of an operation by status, with references followed."""
    shared = document["components"]["responses"]
    return {
        int(status): shared[each["$ref"].rpartition("/")[2]] if "$ref" in each else each
        for status, each in operation["responses"].items()
    }


def examples(response: Document) -> list[Any]:
    """The bodies that a Response Object shows."""
    content = response["content"].get(JSON, {})
    shown = [each["value"] for each in content.get("examples", {}).values()]
    return shown + [content["example"]] if "example" in content else shown


def test_valid(document: Document) -> None:
    """The document is valid OpenAPI 3.1."""
    assert document["openapi"] == "3.1.0"
    OpenAPIV31SpecValidator(document).validate()


def test_every_route(app: Flask, document: Document) -> None:
    """Every route and method of the service is documented, and nothing else is."""
    routes = {
        (method, re.sub("<.*?([a-z]+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if rule.endpoint not in FILES
    }
    assert {(method, path) for method, path, _ in operations(document)} == routes


@pytest.mark.parametrize(
    "settings",
    [{"cors_origins": ("https://app.example.com",)}, {"metrics_token": "0123456789abcdef"}, {"metrics_token": "off"}],
    ids=str,
)
def test_other_settings(make_app: Callable[..., Flask], settings: dict[str, Any]) -> None:
    """The same holds where pages of other origins may call, and where metrics are not for everybody."""
    app = make_app(**settings)
    document = app.test_client().get("/openapi.json").json
    test_valid(document)
    test_every_route(app, document)
    test_described(document)
    test_token_needed(app, document)


def test_described(document: Document) -> None:
    """Every endpoint has a sentence that says what it does, and an id of its own."""
    every = [operation for _, _, operation in operations(document)]
    assert all(re.fullmatch("[A-Z].*[.]", operation["summary"]) for operation in every)
    assert all("---" not in operation["description"] for operation in every)
    assert len({operation["operationId"] for operation in every}) == len(every)


def test_bearer(document: Document) -> None:
    """The way in is a JWT as a bearer token."""
    scheme = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
    assert document["components"]["securitySchemes"] == {"bearer": scheme}


def test_token_needed(app: Flask, document: Document) -> None:
    """The document asks for a token exactly where the service does."""
    for method, path, operation in operations(document):
        status = app.test_client().open(path.format(id=MISSING), method=method).status_code
        assert (operation.get("security"), 401 in responses(document, operation)) == (
            ([{"bearer": []}], True) if status == 401 else (None, False)
        )


def test_session_id(alice: Caller, document: Document) -> None:
    """The pattern of the path parameter fits a session's id, and nothing that the service takes for none."""
    [id] = document["components"]["parameters"].values()
    assert (id["name"], id["in"], id["required"]) == ("id", "path", True)
    assert re.search(id["schema"]["pattern"], alice.open())
    assert not any(
        re.search(id["schema"]["pattern"], each) for each in ["A" * 21, "A" * 65, "A" * 31 + "=", "revoke-all"]
    )
    taking = {path for _, path, operation in operations(document) if operation.get("parameters")}
    assert taking == {path for path in document["paths"] if "{id}" in path}


def test_request_bodies(document: Document) -> None:
    """A body is required only where there is nothing to do without one."""
    bodies = {
        operation["operationId"]: operation["requestBody"].get("required", False)
        for _, _, operation in operations(document)
        if "requestBody" in operation
    }
    assert bodies == {"open_session": False, "heartbeat_many": True, "revoke_all": False}


def test_no_other_fields(document: Document) -> None:
    """What goes in and what comes out have the documented fields and no others."""
    schemas = document["components"]["schemas"].values()
    bodies = [
        schema
        for _, _, operation in operations(document)
        for status, response in responses(document, operation).items()
        if examples(response)
        for schema in (lambda each: each.get("oneOf", [each]))(response["content"][JSON]["schema"])
    ]
    assert [schema for schema in [*schemas, *bodies] if schema["additionalProperties"] is not False] == []
    assert [schema for schema in bodies if set(schema["required"]) != set(schema["properties"])] == []


def test_session(alice: Caller, document: Document) -> None:
    """A session has the documented fields, in their order, and always those that the document calls required."""
    session = document["components"]["schemas"]["Session"]
    options = {"deviceName": "Tablet", "location": "Oslo", "loginMethod": "pin"}
    opened = alice.post("/sessions", json=options).json["session"]
    assert list(session["properties"]) == list(opened)
    assert set(session["required"]) == {"id", "startedAt", "lastActivity", "expiresAt", "loginMethod"}


def test_bounds(make_app: Callable[..., Flask]) -> None:
    """The longest idle timeout is the configured one."""
    document = make_app(session_idle_max_seconds=4321).test_client().get("/openapi.json").json
    seconds = document["components"]["schemas"]["OpenSession"]["properties"]["idleTimeoutSeconds"]
    assert seconds == {"type": "integer", "minimum": 1, "maximum": 4321}


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
def test_fixed_example(document: Document, id: str, status: int, body: str) -> None:
    """The example of a body that the contract fixes is that body, to the letter."""
    [operation] = [operation for _, _, operation in operations(document) if operation["operationId"] == id]
    [example] = examples(responses(document, operation)[status])
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
    {"environ_overrides": STALLED},
]


@pytest.fixture
def answers(
    make_app: Callable[..., Flask], database: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], Iterator[TestResponse]]:
    """All kinds of answers that an endpoint gives."""
    monkeypatch.setattr("app.schemas.BODY_TIMEOUT", 0.05)
    app = make_app(session_limit=2)
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
        server.connected = False
        yield send(json={"ids": [MISSING]} if path == "/sessions/heartbeat" else None)
        server.connected = True
        with monkeypatch.context() as patch:
            patch.setattr(app.extensions["token_verifier"], "verify", no_keys)
            yield send()

    return ask


def test_every_answer(answers: Callable[[str, str], Iterator[TestResponse]], document: Document) -> None:
    """Every endpoint gives the documented statuses and no others, with the documented headers and errors."""
    for method, path, operation in operations(document):
        documented = responses(document, operation)
        seen = defaultdict(list)
        for answer in answers(method, path):
            seen[answer.status_code].append(answer)
        assert sorted(seen) == sorted(documented), (method, path)
        for status, given in seen.items():
            bodies = examples(documented[status])
            headers = {name for name, header in documented[status].get("headers", {}).items() if header["required"]}
            assert all(headers <= set(dict(answer.headers)) for answer in given)
            if status >= 400 and status != 422:
                assert {answer.text for answer in given} == {json.dumps(body) for body in bodies}
            elif bodies:
                assert {tuple(answer.json) for answer in given} == {tuple(bodies[0])}


def test_wrong_method(alice: Caller, document: Document) -> None:
    """The document shows what a method that a path does not have is answered with."""
    shown = document["components"]["responses"]["Error405"]
    answer = alice.get("/sessions/revoke-all")
    assert answer.json in examples(shown)
    assert set(shown["headers"]) == {"Allow"} <= set(dict(answer.headers))
