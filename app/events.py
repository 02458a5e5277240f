"""What happened to a session, for operators: one log line for each event that matters."""

import logging
import re
import uuid

from flask import Response, after_this_request, current_app, g, request

log = logging.getLogger("sessions")


def emit(event: str, *, session: str | None = None, **fields: object) -> None:
    """Log an event of this request and its subject. Subjects and session ids appear only as keyed hashes.

    The request's id goes into the line and, as `X-Request-Id`, into the answer.
    """
    known = {"subject": g.get("subject"), "session": session}
    hashes = {name: pseudonym(value) for name, value in known.items() if value is not None}
    log.info(event, extra={"request_id": request_id(), **hashes, **fields})


def pseudonym(value: str) -> str:
    """What stands for a subject or a session id in the logs."""
    return current_app.extensions["config"].pseudonym(value)  # type: ignore[no-any-return]


def request_id() -> str:
    """The caller's `X-Request-Id`, where it is one that can stand in a log, or one made here."""
    if "request_id" not in g:
        given = request.headers.get("X-Request-Id", "")
        g.request_id = given if re.fullmatch(r"[\w.:+/=-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
        after_this_request(_tell_request_id)
    return g.request_id  # type: ignore[no-any-return]


def _tell_request_id(response: Response) -> Response:
    response.headers["X-Request-Id"] = g.request_id
    return response
