"""What has to be changed inside gunicorn, and what each change buys. Settings and hooks are in gunicorn.conf.py.

- `Worker`: errors that never reach the app are JSON, and their log lines repeat nothing of what was sent.
- `Request`: a head is parsed once it is whole; it is bounded in size, lines and time, and so are trailers.
- `Unreader`: a connection that always has something to read gives way to the others between reads.
- `Request.drain`: the rest of a body that the app has not read is bounded in size and time.
- `Response`: head and body of an answer in one packet, which saves a worker most of 70 microseconds.
- `settings_at_hand`: settings are plain attributes, which takes a tenth off a worker's time.
- `http_date`, `WSGIErrorsWrapper`: made once a second and once, not for each request; 10 microseconds.
- `log_uncaught`: what gevent and threads would print is a line of JSON, and ten of a kind a second at most.
- `Logger`: no access log, whose preparation costs a tenth of a heartbeat even where no line is written; lines that
  clients can cause are limited, and clients that were cut off are not logged.

Everything else is gunicorn's. `tests/test_edge.py` and `tests/test_events.py` have a test for each change.
"""

import contextlib
import functools
import json
import socket
import sys
import threading
import time
from email.utils import formatdate
from http import HTTPStatus

import gevent
import gunicorn
from gunicorn import http as gunicorn_http
from gunicorn import util
from gunicorn.glogging import Logger as GunicornLogger
from gunicorn.http import errors, wsgi
from gunicorn.http.body import LengthReader
from gunicorn.http.message import Request as GunicornRequest
from gunicorn.http.parser import RequestParser
from gunicorn.http.unreader import IterUnreader, SocketUnreader
from gunicorn.workers.ggevent import GeventWorker

TRIED_WITH = 27
if gunicorn.version_info[0] != TRIED_WITH:
    sys.exit(f"gunicorn {gunicorn.__version__}: gunicorn_edge.py was only tried with gunicorn {TRIED_WITH}")

LARGEST_HEAD = 64 * 1024  # bytes, of a request's head and of the trailers of its body
HEAD_SECONDS = 5.0  # for a whole head, from its first byte on
# What is read of a body that the app left unread, so that the connection can be used again.
DRAIN_BYTES, DRAIN_SECONDS = 16 * 1024, 0.1
# What is read after the last answer on a connection: closing it with unread bytes would destroy the answer on its way.
LINGER_BYTES, LINGER_SECONDS = 1024 * 1024, 1.0

# The answers to what cannot be parsed, and to what is no fault of the client's.
REFUSALS = {
    errors.LimitRequestLine: (414, "Request line too long"),
    errors.ExpectationFailed: (417, "Expectation failed"),
    errors.LimitRequestHeaders: (431, "Request header fields too large"),
}
REFUSED = (400, "Malformed request")
FAILED = (500, "Internal server error")
OUR_FAULT = (errors.ConfigurationProblem, errors.InvalidResponseHeader, errors.InvalidResponseHeaderName)


def give_way():
    """Let the other connections have their turn, in 7 microseconds.

    Not by sleep(0): gevent then looks for what has arrived only after fifty such turns or five milliseconds.
    """
    gevent.sleep(1e-6)


class Unreader(SocketUnreader):
    """Reads a connection. Gives way before every read but the first one of a request."""

    received = 0  # bytes so far
    _reads = 0  # of the current request
    interrupted = False  # whether a read was given up: the reader of a body would take that for the body's end
    deadline = None  # of all reads from here on, in seconds of time.monotonic()

    def chunk(self, size_hint=None):
        """Bytes from the socket; empty at its end. Raises TimeoutError at the deadline of the head."""
        self.interrupted = True
        if self._reads:
            give_way()
        self._reads += 1
        if self.deadline is not None:
            self.sock.settimeout(max(self.deadline - time.monotonic(), 0.001))
        data = super().chunk(size_hint)
        self.received += len(data)
        self.interrupted = False
        return data

    def begin_head(self):
        """Read as much as comes: it is seldom more than one packet."""
        self._reads, self.mxchunk = 0, 8192

    def begin_body(self):
        """Read in small steps, since the chunks of a body can be of one byte; the app has a clock for them."""
        self.deadline, self.mxchunk = None, 512
        self.sock.settimeout(None)


class Request(GunicornRequest):
    """A request whose head is handed to gunicorn's parser (in Python or in C) when it is whole and within its bounds.

    The parser would scan all that has come so far at each packet, and drop names with `_` before it counts them.
    """

    def parse(self, unreader):
        """Parse the head. Raises StopIteration where the connection is to be closed without an answer."""
        self.max_buffer_headers = LARGEST_HEAD  # gunicorn bounds trailers by this, too
        try:
            head, rest = self._whole_head(unreader)
        except TimeoutError:
            raise StopIteration from None
        unreader.begin_body()
        unreader.unread(rest)
        self._limit_fields(head.count(b"\r\n") - 2)  # less the request line and the empty one
        # An unreader of its own: a parser that wanted more than this could not get it.
        super().parse(IterUnreader([head]))
        return b""

    def parse_headers(self, data, from_trailer=False):
        if from_trailer:
            self._limit_fields(data.count(b"\r\n") + 1)
        return super().parse_headers(data, from_trailer)

    def drain(self):
        """Read what the app has left of the body, within bounds; returns whether the connection can be used again."""
        if self.body.failed or self.unreader.interrupted:
            return False
        if isinstance(self.body.reader, LengthReader) and self.body.reader.length == 0:
            return True
        end = self.unreader.received + DRAIN_BYTES
        try:
            with gevent.Timeout(DRAIN_SECONDS, False):
                while self.unreader.received < end:
                    if not self.body.read(1024):
                        return True
        except (errors.ParseException, OSError):  # broken chunks, a lost connection
            pass
        return False

    def _whole_head(self, unreader):
        """The head up to its empty line, and what has come behind it.

        Raises StopIteration where the client closes first, TimeoutError, and what gunicorn's parser raises.
        """
        unreader.begin_head()
        # For the first bytes as long as a connection may be idle, also a new one.
        unreader.deadline = time.monotonic() + (self.cfg.keepalive or HEAD_SECONDS)
        head = unreader.read()
        if not head:
            raise StopIteration
        end = head.find(b"\r\n\r\n")
        if end < 0:
            unreader.deadline = time.monotonic() + HEAD_SECONDS
            head = bytearray(head)
            seen = 0
        while end < 0 and len(head) <= LARGEST_HEAD:
            _refuse_bare_line_feed(head, seen)
            seen = len(head)
            self.read_into(unreader, head)
            end = head.find(b"\r\n\r\n", max(seen - 3, 0))
        if not 0 <= end <= LARGEST_HEAD - 4:
            raise errors.LimitRequestHeaders("head too large")
        return bytes(head[: end + 4]), bytes(head[end + 4 :])

    def _limit_fields(self, number):
        """Count also those fields that gunicorn drops."""
        if number > self.limit_request_fields:
            raise errors.LimitRequestHeaders("too many fields")


def _refuse_bare_line_feed(head, start):
    """Look from `start` on: a head whose lines do not end with CR LF (RFC 9112 §2.2) would never come to its end."""
    if head.count(b"\n", start) != head.count(b"\r\n", max(start - 1, 0)):
        raise errors.InvalidHeader("bare LF")


class Parser(RequestParser):
    """The requests of one connection."""

    mesg_class = Request

    def __init__(self, cfg, source, source_addr):
        super().__init__(cfg, source, source_addr)
        self.unreader = Unreader(source)

    def finish_body(self, deadline=None, max_bytes=None):
        """Read what is left of the last request's body, within bounds; whether another request can follow."""
        return self.mesg is None or self.mesg.drain()


class Response(wsgi.Response):
    """An answer, whose head is sent together with the first of its body."""

    head = b""
    undrained = False

    def send_headers(self):
        """Make the head, which goes out with the first of the body.

        Before it the request's body is drained: where that fails the connection is to be closed, as the head says.
        """
        if self.headers_sent:
            return
        self.undrained = not self.req.drain()
        if self.undrained:
            self.force_close()
        lines = [*self.default_headers(), *(f"{name}: {value}\r\n" for name, value in self.headers), "\r\n"]
        self.head = "".join(lines).encode("latin-1")
        self.headers_sent = True

    def _emit_body(self, data):
        self._send_head(b"" if self.chunked else data)
        if self.chunked:
            super()._emit_body(data)

    def close(self):
        self.send_headers()
        self._send_head()
        super().close()
        if self.undrained:
            linger(self.sock)

    def _send_head(self, data=b""):
        """Send the head, where it has not been sent, and data."""
        data, self.head = self.head + data, b""
        if data:
            sent = self.sock.send(data)  # sendall begins with a system call more
            if sent < len(data):
                self.sock.sendall(data[sent:])


def linger(sock):
    """Drop what a client is still sending, within bounds, so that it gets to see its answer (RFC 9112 §9.6)."""
    with contextlib.suppress(OSError), gevent.Timeout(LINGER_SECONDS, False):
        sock.shutdown(socket.SHUT_WR)
        left = LINGER_BYTES
        while left > 0 and (data := sock.recv(65536)):
            left -= len(data)
            give_way()


class Worker(GeventWorker):
    """gunicorn's worker of greenlets."""

    def timeout_ctx(self):
        """No clock for waiting and parsing together: `Request` has one for each."""
        return contextlib.nullcontext()

    def handle_error(self, req, client, addr, exc):
        """Answer in the API's shape what never reached the app; gunicorn's HTML repeats what was sent."""
        if isinstance(exc, errors.ParseException) and not isinstance(exc, OUR_FAULT):
            status, sentence = REFUSALS.get(type(exc), REFUSED)
            reason = type(exc).__name__
            if self.log.allows("request_refused", reason):
                # A client by IPv4 on an IPv6 socket (RFC 4291 §2.5.5.2).
                address = addr[0].removeprefix("::ffff:") if isinstance(addr, tuple) else None
                self.log.warning("request_refused", extra={"reason": reason, "address": address})
        else:
            status, sentence = FAILED
            self.log.exception("unexpected_error")
        body = json.dumps({"success": False, "error": sentence})
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nConnection: close\r\n"
        head += "Content-Type: application/json\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
        with contextlib.suppress(OSError):
            util.write_nonblock(client, f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            linger(client)


class Logger(GunicornLogger):
    """gunicorn's log, in which clients can write no lines of their own, and none without a limit."""

    limiter = None  # an app.events.LineLimiter in workers, which alone have clients

    def allows(self, event, reason):
        """Whether a line that a client can cause may be written."""
        return self.limiter is None or self.limiter.allow(event, reason)

    def access(self, *args):
        """Write nothing."""

    def exception(self, msg, *args, **kwargs):
        """Log an error, but not that a client was cut off for reading nothing."""
        error = sys.exc_info()[1]
        if not isinstance(error, TimeoutError) and self.allows("unexpected_error", type(error).__name__):
            super().exception(msg, *args, **kwargs)


def log_uncaught(worker):
    """Log what gevent and threads would print, and give the worker's log its limit.

    Being out of file descriptors, for one, ends no worker: gevent tries to accept connections again, at least once a
    second, and each failure is a traceback to it.
    """
    from app.events import LineLimiter  # not in the master, which gevent has not patched

    worker.log.limiter = LineLimiter(worker.log.error_log)
    hub = gevent.get_hub()
    handle_error = hub.handle_error
    hub.exception_stream = None

    def report(kind, error, trace):
        if not issubclass(kind, hub.NOT_ERROR) and worker.log.allows("unexpected_error", kind.__name__):
            # Of a system call that failed a traceback says no more than the error.
            exc_info = None if issubclass(kind, OSError) else (kind, error, trace)
            worker.log.error("unexpected_error", extra={"reason": str(error)}, exc_info=exc_info)

    def log_error(context, kind, error, trace):
        gevent.spawn(report, kind, error, trace)  # the hub itself may not wait for a lock
        handle_error(context, kind, error, trace)

    hub.handle_error = log_error
    threading.excepthook = lambda args: report(args.exc_type, args.exc_value, args.exc_traceback)


def settings_at_hand(cfg):
    """Have a worker's settings as plain attributes.

    gunicorn looks up thirty of them for each request, and finds each by an attribute that is missing, a dictionary and
    two calls.
    """
    for name in cfg.settings:
        if not hasattr(type(cfg), name):
            object.__setattr__(cfg, name, getattr(cfg, name))


@functools.lru_cache(1)
def date_at(second):
    """The Date of an answer (RFC 9110 §6.6.1), which names no fraction of a second."""
    return formatdate(second, usegmt=True)


# gunicorn asks for these by their names; the worker and the log are settings.
gunicorn_http.RequestParser = Parser
wsgi.Response = Response
wsgi.WSGIErrorsWrapper = functools.cache(wsgi.WSGIErrorsWrapper)
util.http_date = lambda: date_at(int(time.time()))
