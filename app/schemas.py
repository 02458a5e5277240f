"""What comes in and what goes out: JSON bodies, read and written with marshmallow."""

import functools
import json
from datetime import datetime, timezone
from typing import Any, NoReturn

import gevent
from flask import Response, request
from flask.json.provider import DefaultJSONProvider
from marshmallow import Schema, ValidationError, fields, post_dump, validate
from werkzeug.datastructures import Headers
from werkzeug.exceptions import BadRequest, HTTPException, RequestEntityTooLarge, RequestTimeout, UnsupportedMediaType

LARGEST_BODY = 96 * 1024  # bytes: a thousand ids of 64 characters, with room for white space
BODY_TIMEOUT = 3.0  # seconds for the whole body to arrive
MOST_IDS = 1000
SESSION_ID = r"[A-Za-z0-9_-]{22,64}"


# No answer is to be stored (RFC 9111 §5.2.2.5) or taken for another type than its own (OWASP ASVS 3.4.4).
ALWAYS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class APIResponse(Response):
    """With the headers that every answer has; JSON, unless a mimetype is given."""

    default_mimetype = "application/json"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.headers.update(ALWAYS)


# Written out, since building it with json takes a tenth of the time that the whole heartbeat takes.
HEARTBEAT_BODY = '{"success": true, "message": "Session updated successfully", "newExpiry": "%s"}'


class HeartbeatResponse(APIResponse):
    """The answer to a heartbeat, with all of its headers worked out here.

    Werkzeug would look whether there is a body, how long it is and whether it may be sent, which takes a quarter of
    the time of all the rest of Flask.
    """

    def __init__(self, expires_at_ms: int, expires_in: int) -> None:
        body = HEARTBEAT_BODY % rfc3339(expires_at_ms)
        head = [
            ("Content-Type", self.default_mimetype),
            ("Content-Length", str(len(body))),
            *ALWAYS.items(),
            ("Session-Expires-In", str(expires_in)),
        ]
        Response.__init__(self, [body.encode()], headers=Headers(head))

    def __call__(self, environ: Any, start_response: Any) -> Any:
        start_response(self.status, self.headers.to_wsgi_list())
        return self.response


class ContractJSON(DefaultJSONProvider):
    """Bodies as the API document prints them: fields in their order, a space behind colons and commas."""

    sort_keys = False

    def response(self, *args: Any, **kwargs: Any) -> APIResponse:
        return APIResponse(self.dumps(args[0] if args else kwargs))


def rfc3339(ms: int) -> str:
    """Milliseconds since the epoch as RFC 3339: UTC, ending in Z, with milliseconds."""
    return f"{_to_the_second(ms // 1000)}.{ms % 1000:03d}Z"


@functools.lru_cache(1024)  # a fleet's expiries lie in few seconds
def _to_the_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


class Instant(fields.Field[int]):
    """An instant: integer milliseconds inside, RFC 3339 on the wire."""

    def _serialize(self, value: int | None, attr: str | None, obj: Any, **kwargs: Any) -> str | None:
        return None if value is None else rfc3339(value)


class Text(fields.String):
    """Text of 1 to `most` characters. Lone surrogates are none (RFC 8259 §8.2), and Redis could not store them."""

    def __init__(self, most: int, **kwargs: Any) -> None:
        super().__init__(validate=[validate.Length(1, most), _all_characters], **kwargs)


def _all_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValidationError("Not valid text.") from None


class SessionSchema(Schema):
    """A session as callers see it; what is not known is left out."""

    id = fields.String(required=True)
    device_name = fields.String(data_key="deviceName")
    ip_address = fields.String(data_key="ipAddress")
    location = fields.String()
    started_at_ms = Instant(data_key="startedAt", required=True)
    last_activity_ms = Instant(data_key="lastActivity", required=True)
    expires_at_ms = Instant(data_key="expiresAt", required=True)
    login_method = fields.String(data_key="loginMethod", required=True)

    @post_dump
    def leave_out_unknown(self, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {name: value for name, value in data.items() if value is not None}


class OpenSchema(Schema):
    """What may be said of a session when it is opened; `idle_max` is the longest idle timeout, in seconds."""

    device_name = Text(128, data_key="deviceName")
    location = Text(128)
    login_method = Text(64, data_key="loginMethod", load_default="token")
    idle_timeout = fields.Integer(data_key="idleTimeoutSeconds", strict=True)

    def __init__(self, idle_max: int) -> None:
        super().__init__()
        # A new list, since the old one is shared by all instances.
        self.fields["idle_timeout"].validators = [validate.Range(1, idle_max)]


class Ids(fields.Field[list[str]]):
    """A list of 1 to MOST_IDS strings. Whatever is wrong with it is one message, not one for each element."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> list[str]:
        if isinstance(value, list) and 1 <= len(value) <= MOST_IDS and all(isinstance(id, str) for id in value):
            return value
        raise ValidationError(f"Not a list of 1 to {MOST_IDS} strings.")


class HeartbeatManySchema(Schema):
    """Which sessions to keep alive. A malformed id is no error: it is answered like a missing session."""

    ids = Ids(required=True)


class RevokeAllSchema(Schema):
    """Which session to spare, if any."""

    except_id = fields.String(data_key="exceptSessionId", validate=validate.Regexp(SESSION_ID + r"\Z"))


def load_body(schema: Schema) -> dict[str, Any]:
    """The request's JSON body, validated; an empty body is an empty object.

    Raises what `read_body` raises, BadRequest where it is no JSON, UnsupportedMediaType where it does not say that
    it is, and marshmallow's ValidationError.
    """
    body = read_body()
    if body and not request.is_json:
        raise UnsupportedMediaType
    try:
        parsed = json.loads(body or "{}", parse_constant=_no_number)
    # ValueError: no JSON or no UTF-8. RecursionError: nested deeper than Python's stack.
    except (ValueError, RecursionError):
        raise BadRequest from None
    return schema.load(parsed)  # type: ignore[no-any-return]


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity are Python's, not JSON's (RFC 8259 §6)


def read_body() -> bytes:
    """The request's body, in bounded time and size.

    Raises RequestEntityTooLarge, RequestTimeout, or BadRequest where it breaks off.
    """
    try:
        with gevent.Timeout(BODY_TIMEOUT, RequestTimeout):
            body = request.get_data(cache=False)
    except HTTPException:
        raise
    # Every server has exceptions of its own for a broken chunk.
    except Exception:
        raise BadRequest from None
    # Servers that end the input themselves make a body that broke off look complete.
    if len(body) < (request.content_length or 0):
        raise BadRequest
    # Werkzeug cuts a chunked body off at MAX_CONTENT_LENGTH, which is one byte more than we take.
    if len(body) > LARGEST_BODY:
        raise RequestEntityTooLarge
    return body


def ignore_body() -> None:
    """Read a body that nobody asked for and drop it, under the bounds of `read_body`."""
    environ = request.environ
    if environ.get("CONTENT_LENGTH", "0") != "0" or "HTTP_TRANSFER_ENCODING" in environ:
        read_body()
