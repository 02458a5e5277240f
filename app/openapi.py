"""The API as a document, /openapi.json: OpenAPI 3.1 out of the routes, the schemas and the views' docstrings.

A view's docstring is its summary, its description and, after `---` and in YAML, the rest of its Operation Object, in
which an `example` stands for a response's content. What endpoints of a kind have in common is added here.
"""

import inspect
import json
import re
from collections.abc import Callable
from typing import Any

from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin
from apispec.yaml_utils import load_yaml_from_docstring
from flask import Blueprint, Flask, Response, current_app
from werkzeug.routing import Rule

from app import errors
from app.schemas import (
    SESSION_ID,
    APIResponse,
    HeartbeatManySchema,
    Instant,
    OpenSchema,
    RevokeAllSchema,
    SessionSchema,
)

bp = Blueprint("openapi", __name__)

DESCRIPTION = """Keeps device sessions alive. A caller sees and touches the sessions of the token's subject only.

Times are RFC 3339, UTC, with milliseconds. Every answer has `Cache-Control: no-store`. A method that a path does not
have is a 405, which names the others in `Allow`."""
SESSION = {field.data_key or name: field.metadata["example"] for name, field in SessionSchema().fields.items()}
# What docstrings leave out of their examples.
EXAMPLES = {"session": SESSION, "sessions": [SESSION]}
# The fields that differ from answer to answer; all others are constant.
FIELDS: dict[str, Any] = {
    "id": {"type": "string"},
    "newExpiry": {"type": "string", "format": "date-time"},
    "session": {"$ref": "#/components/schemas/Session"},
    "sessions": {"type": "array", "items": {"$ref": "#/components/schemas/Session"}},
    "details": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "string"}}},
}
BEARER: dict[str, Any] = {"security": [{"bearer": []}]}
RETRY_AFTER = {"required": True, "schema": {"type": "integer", "minimum": 1}, "description": "Seconds until a new try"}
HEADERS: dict[int, Any] = {
    401: {"WWW-Authenticate": {"required": True, "schema": {"type": "string"}, "example": errors.BEARER}},
    405: {"Allow": {"required": True, "schema": {"type": "string"}, "example": "GET, HEAD"}},
    **dict.fromkeys([429, 500, 503], {"Retry-After": RETRY_AFTER}),
}


@bp.get("/openapi.json")
def openapi() -> Response:
    """Describe the API.
    ---
    responses: {200: {description: This document, content: {application/json: {schema: {type: object}}}}}
    """
    known = current_app.extensions
    if "openapi" not in known:  # it takes some milliseconds, which not every start should
        known["openapi"] = document(current_app)
    return APIResponse(known["openapi"])


def document(app: Flask) -> str:
    """The document of an app, as JSON."""
    plugin = MarshmallowPlugin()
    spec = APISpec("session-heartbeat", "1", "3.1.0", [plugin], info={"description": DESCRIPTION})
    plugin.map_to_openapi_type(Instant, "string", "date-time")
    spec.components.security_scheme("bearer", {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"})
    spec.components.parameter("id", "path", {"schema": {"type": "string", "pattern": f"^{SESSION_ID}$"}})
    spec.components.schema("Session", schema=SessionSchema)
    spec.components.schema("OpenSession", schema=OpenSchema(app.extensions["config"].session_idle_max_seconds))
    spec.components.schema("HeartbeatMany", schema=HeartbeatManySchema)
    spec.components.schema("RevokeAll", schema=RevokeAllSchema)
    spec.components.response("Error401", failure(401, errors.TOKEN_MISSING, errors.TOKEN_INVALID))
    for status, sentence in errors.SENTENCES.items():
        spec.components.response(f"Error{status}", failure(status, sentence))
    for rule in app.url_map.iter_rules():
        view = app.view_functions[rule.endpoint]
        if written := load_yaml_from_docstring(view.__doc__ or ""):
            # HEAD follows from GET, and OPTIONS are a browser's own.
            methods = (rule.methods or set()) - {"HEAD", "OPTIONS"}
            if rule.endpoint == "metrics.metrics" and app.extensions["config"].metrics_token:
                written = {**written, **BEARER, "responses": {**written["responses"], 401: "Error401"}}
            operations = {method.lower(): operation(rule, view, written) for method in methods}
            spec.path(re.sub(r"<(.*:)?(.*)>", r"{\2}", rule.rule), operations=operations)
    return json.dumps(spec.to_dict())


def operation(rule: Rule, view: Callable[..., Any], written: dict[str, Any]) -> dict[str, Any]:
    """A view's Operation Object; `written` is what its docstring says."""
    summary, _, description = (inspect.getdoc(view) or "").partition("\n---\n")[0].partition("\n")
    described = {"operationId": view.__name__, "summary": summary, "description": description.strip()}
    responses = {status: completed(response) for status, response in written["responses"].items()}
    shared: dict[str, Any] = {"tags": ["operations"]}
    if rule.endpoint in errors.FAILED:
        shared = {"tags": ["sessions"], **BEARER, "parameters": sorted(rule.arguments)}
        responses |= failures(rule, "requestBody" in written)
    return {**described, **shared, **written, "responses": dict(sorted(responses.items()))}


def failures(rule: Rule, takes_body: bool) -> dict[int, Any]:
    """The errors that all endpoints of a kind have; a body that is ignored can still be too large."""
    posted = [400, 408, 413] if "POST" in (rule.methods or ()) else []
    statuses = [401, *posted, *([415, 422] if takes_body else []), 503]
    responses: dict[int, Any] = {status: f"Error{status}" for status in statuses}
    if rule.arguments:
        responses[404] = failure(404, errors.not_found(rule.rule))
    return {**responses, 500: failure(500, errors.FAILED[rule.endpoint])}


def failure(status: int, *sentences: str) -> dict[str, Any]:
    """The response of an error, which has one of these sentences."""
    details = {"details": {"deviceName": ["Length must be between 1 and 128."]}} if status == 422 else {}
    bodies = [{"success": False, "error": sentence, **details} for sentence in sentences]
    return {"description": ", ".join(sentences), "headers": HEADERS.get(status, {}), "content": content(*bodies)}


def completed(response: Any) -> Any:
    """A docstring's response, with the content that its example shows."""
    if "example" not in response:
        return response
    body = {name: EXAMPLES.get(name, value) for name, value in response["example"].items()}
    more = {name: value for name, value in response.items() if name != "example"}
    return {"description": body.get("message", "OK"), **more, "content": content(body)}


def content(*bodies: dict[str, Any]) -> dict[str, Any]:
    """JSON bodies, of which these are examples."""
    if len(bodies) == 1:
        return {"application/json": {"schema": like(bodies[0]), "example": bodies[0]}}
    examples = {body["error"]: {"value": body} for body in bodies}
    return {"application/json": {"schema": {"oneOf": [like(body) for body in bodies]}, "examples": examples}}


def like(value: Any) -> dict[str, Any]:
    """The schema of values like this one: objects have all of its fields and no others."""
    if isinstance(value, list):
        return {"type": "array", "items": {"oneOf": [like(each) for each in value]}}
    if not isinstance(value, dict):
        return {"const": value}
    fields = {name: FIELDS.get(name) or like(part) for name, part in value.items()}
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
