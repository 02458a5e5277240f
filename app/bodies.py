"""Reading the body of a request, in bounded time and size."""

import json
from itertools import islice
from typing import Any

from flask import request
from marshmallow import Schema
from werkzeug.exceptions import BadRequest, HTTPException, RequestEntityTooLarge, RequestTimeout, UnsupportedMediaType

from app.deadline import deadline

LARGEST_BODY = 96 * 1024  # bytes: a thousand ids of 64 characters, with room for white space
BODY_TIMEOUT = 3.0  # seconds for the whole body to arrive
MOST_FIELDS = 100  # more than any schema has


def load_body(schema: Schema) -> dict[str, Any]:
    """The request's JSON body, validated; an empty body is an empty object.

    Raises what `read_body` raises, BadRequest where it is no JSON, UnsupportedMediaType where it does not say that
    it is, and marshmallow's ValidationError.
    """
    body = read_body()
    if body and not request.is_json:
        raise UnsupportedMediaType
    try:
        parsed = json.loads(body or "{}")
    # ValueError: no JSON or no UTF-8. RecursionError: nested deeper than Python's stack.
    except (ValueError, RecursionError):
        raise BadRequest from None
    if isinstance(parsed, dict):
        # marshmallow describes each unknown field: thousands of them would block the worker.
        parsed = dict(islice(parsed.items(), MOST_FIELDS))
    return schema.load(parsed)  # type: ignore[no-any-return]


def read_body() -> bytes:
    """The request's body, in bounded time and size.

    Raises RequestEntityTooLarge, RequestTimeout, or BadRequest where it breaks off.
    """
    # Werkzeug cuts a chunked body off here: one byte more than we take tells that there was more.
    request.max_content_length = LARGEST_BODY + 1
    try:
        with deadline(BODY_TIMEOUT):
            body = request.get_data(cache=False)
    except TimeoutError:
        raise RequestTimeout from None
    except HTTPException:
        raise
    # Every server has exceptions of its own for a broken chunk.
    except Exception:
        raise BadRequest from None
    # Servers that end the input themselves make a body that broke off look complete.
    if len(body) < (request.content_length or 0):
        raise BadRequest
    if len(body) > LARGEST_BODY:
        raise RequestEntityTooLarge
    return body


def drain_body() -> None:
    """Read a body that is not asked for and drop it, under the bounds of `read_body`."""
    environ = request.environ
    if environ.get("CONTENT_LENGTH", "0") != "0" or "HTTP_TRANSFER_ENCODING" in environ:
        read_body()
