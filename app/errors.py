"""One table from exception to response: `{"success": false, "error": "<one sentence>"}`."""

import logging
import math
import random
from typing import Any

from flask import Flask, Response, current_app, jsonify, request
from marshmallow import ValidationError
from werkzeug.exceptions import HTTPException

from app.auth import InsufficientScope, TokenInvalid, TokenMissing
from app.events import allowed, emit, peer_address, request_id
from app.keys import KeysUnavailable
from app.metrics import counted
from app.store import ConnectionsBusy, SessionNotFound, SignedOut, StoreUnavailable, TooManySessions

log = logging.getLogger(__name__)

MESSAGES = {
    400: "Malformed request",
    403: "Insufficient scope",
    404: "Not found",
    405: "Method not allowed",
    408: "Request body not received in time",
    413: "Request body too large",
    415: "Content-Type must be application/json",
    422: "Invalid request body",
    429: "Too many sessions",
    503: "Signing keys not available",
}
TOKEN_MISSING, TOKEN_INVALID = "Missing bearer token", "Invalid or expired token"
# The error_description of a challenge (RFC 6750 §3), by TokenInvalid's reason.
TOKEN_DESCRIPTIONS = {
    "malformed": "The token is malformed",
    "expired": "The token has expired",
    "signature": "The token is not signed with a known key",
    "subject": "The subject is not valid",
    "signed_out": "The token was issued before the sign-out",
}
LONGEST_RETRY = 3600  # seconds; a session may be revoked before it expires
BEARER = 'Bearer realm="sessions"'


def register(app: Flask) -> None:
    """Answer every error, the framework's included, in the API's shape."""
    app.register_error_handler(HTTPException, http_error)
    app.register_error_handler(SessionNotFound, session_not_found)
    app.register_error_handler(TooManySessions, too_many_sessions)
    app.register_error_handler(ValidationError, lambda e: error(422, details=e.normalized_messages()))
    app.register_error_handler(TokenMissing, token_missing)
    app.register_error_handler(TokenInvalid, token_invalid)
    app.register_error_handler(SignedOut, lambda _: token_invalid(TokenInvalid("signed_out")))
    app.register_error_handler(InsufficientScope, insufficient_scope)
    app.register_error_handler(KeysUnavailable, lambda _: error(503, headers=retry_after(5)))
    app.register_error_handler(StoreUnavailable, lambda _: failed())
    app.register_error_handler(ConnectionsBusy, connections_busy)
    app.register_error_handler(Exception, unexpected)


# `status` by its place: /readyz has a field of that name.
def error(status: int, /, sentence: str | None = None, headers: dict[str, str] | None = None, **more: Any) -> Response:
    response = jsonify(success=False, error=sentence or MESSAGES[status], **more)
    response.status_code = status
    response.headers.update(headers or {})
    return response


def retry_after(seconds: int) -> dict[str, str]:
    """Up to twice as many seconds, at random, so that a fleet does not come back all at once (RFC 9110 §10.2.3)."""
    return {"Retry-After": str(random.randint(seconds, 2 * seconds))}


def failed() -> Response:
    return error(500, route_message("failed", "Internal server error"), retry_after(1))


def connections_busy(e: ConnectionsBusy) -> Response:
    emit("connections_busy", endpoint=request.endpoint)  # other trouble of the store's is logged there
    return failed()


def route_message(kind: str, otherwise: str) -> str:
    """What the route says of this kind, `failed` or `not_found`; `otherwise` where there is no route."""
    return getattr(current_app.view_functions.get(request.endpoint or ""), kind, otherwise)


def http_error(e: HTTPException) -> Response:
    """Keep the headers that the framework has chosen, such as Allow; nothing of its HTML."""
    status = e.code or 500
    headers = {k: v for k, v in e.get_headers() if k != "Content-Type"}
    return error(status, MESSAGES.get(status, e.name), headers)


def token_missing(e: TokenMissing) -> Response:
    refused("missing")
    return error(401, TOKEN_MISSING, {"WWW-Authenticate": BEARER})


def token_invalid(e: TokenInvalid) -> Response:
    refused(e.reason, **({"key_id": e.key_id} if e.key_id else {}))
    description = TOKEN_DESCRIPTIONS.get(e.reason, "The token is not valid here")
    challenge = f'{BEARER}, error="invalid_token", error_description="{description}"'
    return error(401, TOKEN_INVALID, {"WWW-Authenticate": challenge})


def insufficient_scope(e: InsufficientScope) -> Response:
    counted().token_refused("scope")
    emit("scope_refused", endpoint=request.endpoint, address=peer_address())
    scope = current_app.extensions["config"].jwt_admin_scope
    needed = f', scope="{scope}"' if scope else ""  # RFC 6750 §3.1 has no empty one
    return error(403, headers={"WWW-Authenticate": f'{BEARER}, error="insufficient_scope"{needed}'})


def refused(reason: str, **found: Any) -> None:
    counted().token_refused(reason)
    emit("token_refused", reason=reason, endpoint=request.endpoint, address=peer_address(), **found)


def session_not_found(e: SessionNotFound) -> Response:
    emit("session_not_found", session=(request.view_args or {})["id"], endpoint=request.endpoint)
    return error(404, route_message("not_found", MESSAGES[404]))


def too_many_sessions(e: TooManySessions) -> Response:
    counted().limit_reached()
    emit("limit_reached")
    return error(429, headers={"Retry-After": str(max(1, min(math.ceil(e.seconds), LONGEST_RETRY)))})


def unexpected(e: Exception) -> Response:
    if allowed("unexpected_error", type(e).__name__):
        log.exception("unexpected_error", extra={"request_id": request_id()})
    return failed()
