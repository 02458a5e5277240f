"""What happened to a session, for operators: one log line for each event that matters."""

import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import TextIO

from flask import Response, after_this_request, current_app, g, has_request_context, request
from pythonjsonlogger.json import JsonFormatter

from app.config import Config

log = logging.getLogger("sessions")

# A caller can cause as many of these as it sends requests, and none of them changes a session.
LIMITED = frozenset(
    "connections_busy limit_reached scope_refused session_not_found sessions_not_found token_refused".split()
)

# An address as some proxies write it: 203.0.113.7:51234 or [2001:db8::1]:443.
WITH_PORT = re.compile(r"\A(?:\[(.+)\](?::\d+)?|([\d.]+):\d+)\Z")


class LineLimiter:
    """Allows each kind of log line so many times a second, and logs the number of the others when the second is over.

    A kind is an event and a reason. Their number is to be bounded: nothing that a caller sends may be part of one.
    """

    PER_SECOND = 10

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger, self._clock = logger, clock
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], tuple[float, int]] = {}  # when a kind's second began, and the lines in it

    def allow(self, event: str, reason: str = "") -> bool:
        """Whether a line may be logged now. The first line that is dropped starts a timer, which logs how many were."""
        kind = event, reason
        with self._lock:
            now = self._clock()
            began, lines = self._counts.get(kind, (now, 0))
            if now - began >= 1 and lines <= self.PER_SECOND:  # a second with more is ended by its timer
                began, lines = now, 0
            self._counts[kind] = began, lines + 1
        if lines == self.PER_SECOND:
            timer = threading.Timer(max(0.0, began + 1 - now), self._sum_up, kind)
            timer.daemon = True
            timer.start()
        return lines < self.PER_SECOND

    def _sum_up(self, event: str, reason: str) -> None:
        with self._lock:
            _, lines = self._counts.pop((event, reason))
        dropped = {"dropped": event, "reason": reason, "number": lines - self.PER_SECOND}
        self._logger.warning("lines_dropped", extra=dropped)


def allowed(event: str, reason: str = "") -> bool:
    """Whether a line of this app may be logged, under its limit."""
    return current_app.extensions["line_limiter"].allow(event, reason)  # type: ignore[no-any-return]


def emit(
    event: str, *, subject: str | None = None, session: str | None = None, limited: bool = False, **fields: object
) -> None:
    """Log an event and its subject, by default the request's, and the actor where that is another.

    Subjects and session ids appear only as keyed hashes.
    The request's id goes into the line and, as `X-Request-Id`, into the answer. A line that is dropped sets no header.
    Commands have no request id. Where it is `limited`, as those in LIMITED are, a line may be dropped.
    """
    if (limited or event in LIMITED) and not allowed(event, str(fields.get("reason", ""))):
        return
    caller = g.get("caller")
    known = {"actor": caller and caller.actor, "subject": subject or (caller and caller.subject), "session": session}
    config: Config = current_app.extensions["config"]
    hashes = {name: config.pseudonym(value) for name, value in known.items() if value}
    ours = {"request_id": request_id()} if has_request_context() else {}
    log.info(event, extra={**ours, **hashes, **fields})


@contextmanager
def logged_to(stream: TextIO) -> Iterator[None]:
    """Write the events to a stream meanwhile, as gunicorn.conf.py has the service write them."""
    handler = logging.StreamHandler(stream)
    names = {"levelname": "level", "name": "logger", "message": "event", "process": "pid"}
    handler.setFormatter(
        JsonFormatter(" ".join(f"%({name})s" for name in names), rename_fields=names, timestamp="time")
    )
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def peer_address() -> str | None:
    """The caller's IP address, or None where a proxy names something else."""
    try:
        address = ip_address(WITH_PORT.sub(r"\1\2", request.remote_addr or ""))
    except ValueError:
        return None
    # An IPv4 client on an IPv6 socket (RFC 4291 §2.5.5.2). A zone means something on the proxy's machine only.
    return str(getattr(address, "ipv4_mapped", None) or address).partition("%")[0]


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
