"""The log: one JSON line for each event that matters, none for a heartbeat, and no secret in any of them."""

import http.client
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import redis
from flask import Flask
from werkzeug.test import TestResponse

from app.events import LineLimiter
from app.store import session_key
from tests.conftest import SECRET, Caller, Clock, Log, token
from tests.servers import ROOT, RedisServer, free_port, gunicorn_logged, log_lines, running, until, workers_of

MISSING = "A" * 32
HASH = re.compile(r"[0-9a-f]{16}")


@pytest.fixture
def backend() -> str:
    """What is logged does not depend on the store."""
    return "fakeredis"


def test_life(alice: Caller, log: Log) -> None:
    """A session's opening, its revocation and that of all are a line each, with the same hashes throughout."""
    id = alice.open()
    alice.revoke(id)
    alice.open()
    alice.post("/sessions/revoke-all")
    opened, revoked, other, all_revoked = log.take()
    assert [line["event"] for line in (opened, revoked, other, all_revoked)] == [
        "session_opened",
        "session_revoked",
        "session_opened",
        "sessions_revoked",
    ]
    assert opened["session"] == revoked["session"] != other["session"]
    assert opened["subject"] == revoked["subject"] == all_revoked["subject"]
    assert HASH.fullmatch(opened["session"]) and HASH.fullmatch(opened["subject"])
    assert all_revoked["number"] == 1


def test_subjects_differ(alice: Caller, bob: Caller, log: Log) -> None:
    """Two subjects have two hashes."""
    alice.open(), bob.open()
    assert len({line["subject"] for line in log.take()}) == 2


def test_own_key(make_app: Callable[..., Flask], log: Log) -> None:
    """With a LOG_KEY the hashes are the same whatever happens to the other secrets, and others with another key."""
    secret = "another-secret-of-more-than-thirty-two-bytes"
    Caller(make_app(log_key="a" * 16)).open()
    Caller(make_app(log_key="a" * 16, jwt_secret=(secret,)), secret=secret).open()
    Caller(make_app(log_key="b" * 16)).open()
    first, same, other = log.take()
    assert first["subject"] == same["subject"] != other["subject"]


def test_another_secret_other_hashes(make_app: Callable[..., Flask], log: Log) -> None:
    """The hashes are keyed: without the secrets they cannot be computed."""
    secret = "another-secret-of-more-than-thirty-two-bytes"
    Caller(make_app()).open()
    Caller(make_app(jwt_secret=(secret,)), secret=secret).open()
    first, second = log.take()
    assert first["subject"] != second["subject"]


def test_successes_that_log_nothing(alice: Caller, log: Log) -> None:
    """Heartbeats, reads and lists that succeed leave no line."""
    id = alice.open()
    log.take()
    answers = [alice.heartbeat(id), alice.read(id), alice.get("/sessions"), alice.get("/healthz"), alice.get("/readyz")]
    answers.append(alice.post("/sessions/heartbeat", json={"ids": [id]}))
    assert [each.status_code for each in answers] == [200] * 6
    assert log.take() == []


@pytest.mark.parametrize(
    "method, path, endpoint",
    [
        ("POST", "/sessions/{id}/heartbeat", "sessions.heartbeat"),
        ("POST", "/sessions/{id}/revoke", "sessions.revoke"),
        ("GET", "/sessions/{id}", "sessions.get_session"),
    ],
)
@pytest.mark.parametrize("whose", ["nobody's", "bob's"])
def test_session_not_found(alice: Caller, bob: Caller, log: Log, method: str, path: str, endpoint: str, whose: str):
    """A session that is missing, or another subject's, is a line with the caller and the session."""
    id = bob.open() if whose == "bob's" else MISSING
    alice.open()
    mine = log.take()[-1]["subject"]
    assert alice.raw(method, path.format(id=id)).status_code == 404
    [line] = log.take()
    assert (line["event"], line["endpoint"], line["subject"]) == ("session_not_found", endpoint, mine)
    assert HASH.fullmatch(line["session"])


def test_sessions_not_found(alice: Caller, log: Log) -> None:
    """Of many heartbeats in one call those that find no session are one line, with their number."""
    id = alice.open()
    log.take()
    alice.post("/sessions/heartbeat", json={"ids": [id, MISSING, "nonsense"]})
    [line] = log.take()
    assert (line["event"], line["number"]) == ("sessions_not_found", 2)


def test_limit(make_app: Callable[..., Flask], log: Log) -> None:
    """A session refused at the limit is a line with its subject."""
    alice = Caller(make_app(session_limit=1))
    alice.open()
    assert alice.post("/sessions").status_code == 429
    opened, refused = log.take()
    assert (refused["event"], refused["subject"]) == ("limit_reached", opened["subject"])


@pytest.mark.parametrize(
    "authorization, reason",
    [
        (None, "missing"),
        ("Basic YTpi", "missing"),
        ("Bearer a.b", "malformed"),
        (f"Bearer {token(exp=1)}", "expired"),
    ],
)
def test_token_refused(app: Flask, log: Log, authorization: str | None, reason: str) -> None:
    """A refused token is a line with the reason, and nothing of the token."""
    headers = {"Authorization": authorization} if authorization else {}
    answer = app.test_client().get("/sessions", headers=headers)
    [line] = log.take()
    assert (answer.status_code, line["event"], line["reason"]) == (401, "token_refused", reason)
    assert line["request_id"] == answer.headers["X-Request-Id"]
    assert line["address"] == "127.0.0.1"
    assert authorization is None or authorization.split()[1] not in str(line)


def test_outage(alice: Caller, database: redis.Redis, log: Log, clock: Clock) -> None:
    """An outage is one line when it begins and one when it is over, however many requests meet it."""
    id = alice.open()
    log.take()
    server = database.connection_pool.connection_kwargs["server"]
    for _ in range(2):
        server.connected = False
        assert [alice.heartbeat(id).status_code for _ in range(5)] == [500] * 5
        [line] = log.take()
        assert (line["event"], line["levelname"], line["script"]) == ("redis_unavailable", "ERROR", "heartbeat")
        server.connected = True
        clock.sleep(1)
        assert [alice.heartbeat(id).status_code for _ in range(5)] == [200] * 5
        assert log.names() == ["redis_available"]


@pytest.mark.parametrize("script", ["heartbeat", "get"])
def test_nobody_knows_where(
    app: Flask, alice: Caller, log: Log, clock: Clock, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    """It is an outage, too, while it is not known which server holds a session, and each is two lines."""
    ask, id = {"heartbeat": alice.heartbeat, "get": alice.read}[script], alice.open()
    log.take()

    def client_for(key: str) -> redis.Redis:
        raise redis.ConnectionError("nobody knows")

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(app.extensions["servers"], "client_for", client_for)
            assert [ask(id).status_code for _ in range(3)] == [500] * 3
        [line] = log.take()
        assert (line["event"], line["script"]) == ("redis_unavailable", script)
        clock.sleep(1)
        assert [ask(id).status_code for _ in range(3)] == [200] * 3
        assert log.names() == ["redis_available"]


@pytest.fixture
def one_second(app: Flask) -> None:
    """All that happens to the app happens within the same second, however long it takes."""
    app.extensions["line_limiter"] = LineLimiter(logging.getLogger("sessions"), clock=lambda: 0.0)


def without_token(app: Flask) -> TestResponse:
    return app.test_client().get("/sessions")


def expired(app: Flask) -> TestResponse:
    return Caller(app, exp=1).get("/sessions")


def missing(app: Flask) -> TestResponse:
    return Caller(app).heartbeat(MISSING)


def many_missing(app: Flask) -> TestResponse:
    return Caller(app).post("/sessions/heartbeat", json={"ids": [MISSING]})


def one_too_many(app: Flask) -> TestResponse:
    return Caller(app, "carol").post("/sessions")


def none_revoked(app: Flask) -> TestResponse:
    return Caller(app).post("/sessions/revoke-all")


def met_bug(app: Flask) -> TestResponse:
    return app.test_client().get("/bug")


@pytest.mark.usefixtures("one_second")
def test_flood(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    """Of each kind of line that a caller can cause ten are written in a second, and then how many were not.

    An answer names a request's id only where that stands in the log, and a traceback counts like a line.
    """
    app.add_url_rule("/bug", view_func=lambda: 1 / 0)
    for _ in range(100):
        Caller(app, "carol").open()
    caplog.set_level(logging.INFO)
    caplog.clear()
    floods = {
        ("token_refused", "missing"): without_token,
        ("token_refused", "expired"): expired,
        ("session_not_found", ""): missing,
        ("sessions_not_found", ""): many_missing,
        ("limit_reached", ""): one_too_many,
        ("sessions_revoked", ""): none_revoked,
        ("unexpected_error", "ZeroDivisionError"): met_bug,
    }
    named = {kind: [flood(app).headers.get("X-Request-Id") for _ in range(25)] for kind, flood in floods.items()}
    until(lambda: sum(record.message == "lines_dropped" for record in caplog.records) == len(floods))
    lines = [vars(record) for record in caplog.records]
    for (event, reason), ids in named.items():
        written = [line for line in lines if line["message"] == event and line.get("reason", reason) == reason]
        assert [line["request_id"] for line in written] == ids[:10]
        assert ids[10:] == [None] * 15
    dropped = [line for line in lines if line["message"] == "lines_dropped"]
    assert {(line["dropped"], line["reason"]): line["number"] for line in dropped} == dict.fromkeys(floods, 15)


@pytest.mark.usefixtures("one_second")
def test_complete(app: Flask, log: Log) -> None:
    """What begins and ends sessions is written in full, however many there are."""
    alice = Caller(app)
    for id in [alice.open() for _ in range(30)]:
        alice.revoke(id)
    assert log.names() == ["session_opened"] * 30 + ["session_revoked"] * 30


def test_quiet_again(caplog: pytest.LogCaptureFixture) -> None:
    """After a second a kind has its ten lines again; one that kept to them is not summed up, and no thread stays."""
    now = 0.0
    limiter = LineLimiter(logging.getLogger("sessions"), clock=lambda: now)
    assert [limiter.allow("a") for _ in range(10)] == [True] * 10
    now = 1.0
    assert [limiter.allow("a") for _ in range(11)] == [True] * 10 + [False]
    assert limiter.allow("b") and limiter.allow("a", "another reason")
    until(lambda: "lines_dropped" in caplog.messages)
    dropped = [record for record in caplog.records if record.message == "lines_dropped"]
    assert [(record.dropped, record.number) for record in dropped] == [("a", 1)]
    assert [limiter.allow("a") for _ in range(10)] == [True] * 10
    until(lambda: not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)])


REQUEST_IDS = ["0af7651916cd43dd8448eb211c80319c", "a", "x" * 128, "A.b:c+d/e=f-g_h"]
FORGED = [
    "",
    "two words",
    'quo"te',
    "{}",
    "a,b",
    "x" * 129,
    "x" * 8000,
    "x" * 10_000,
    "caf\xe9",
    "\u0661",
    "a\tb",
    "%0A",
]


@pytest.mark.parametrize("given", REQUEST_IDS)
def test_request_id(app: Flask, log: Log, given: str) -> None:
    """The caller's X-Request-Id stands in the line and in the answer."""
    answer = app.test_client().get("/sessions", headers={"X-Request-Id": given})
    assert [line["request_id"] for line in log.take()] == [answer.headers["X-Request-Id"]] == [given]


@pytest.mark.parametrize("given", FORGED, ids=ascii)
def test_forged_request_id(app: Flask, log: Log, given: str) -> None:
    """An X-Request-Id that could be anything but an id is replaced by one made here."""
    environ = {"HTTP_X_REQUEST_ID": given.encode().decode("latin-1")}
    answer = app.test_client().get("/sessions", environ_overrides=environ)
    [line] = log.take()
    assert re.fullmatch("[0-9a-f]{32}", line["request_id"])
    assert line["request_id"] == answer.headers["X-Request-Id"]


def test_request_ids_differ(app: Flask, log: Log) -> None:
    """Every request without an id gets one of its own."""
    for _ in range(3):
        app.test_client().get("/sessions")
    assert len({line["request_id"] for line in log.take()}) == 3


def exchange(port: int, request: bytes) -> bytes:
    """Send bytes; gives all that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port), 10) as s:
        s.sendall(request)
        received = b""
        while data := s.recv(65536):
            received += data
    return received


@pytest.fixture(scope="module")
def served(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """The service in one process: its port and its log."""
    file = tmp_path_factory.mktemp("log") / "log"
    with gunicorn_logged({"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET}, file) as (_, port):
        yield port, file


@pytest.mark.parametrize("break_", [b"\r", b"\n", b"\r\n", b"\r\n ", b"\x00", b"\x0b", b"\x85"])
def test_no_line_can_be_forged(served: tuple[int, Path], break_: bytes) -> None:
    """Whatever an X-Request-Id holds, a line of the caller's own making never stands in the log."""
    port, file = served
    head = b"GET /sessions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: a"
    answer = exchange(port, head + break_ + b'{"event": "forged"}\r\n\r\n')
    assert re.match(rb"HTTP/1\.1 40[01] ", answer)
    assert b"forged" not in answer.partition(b"\r\n\r\n")[0]
    assert "forged" not in [line["event"] for line in log_lines(file)]


def test_served_flood(served: tuple[int, Path]) -> None:
    """Under gunicorn the lines of a flood and the numbers of those left out add up, soon after it has stopped."""
    port, file = served
    before = len(log_lines(file))
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        for _ in range(300):
            connection.request("GET", "/sessions")
            connection.getresponse().read()

    def written() -> int:
        lines = log_lines(file)[before:]
        return sum(line["event"] == "token_refused" for line in lines) + sum(line.get("number", 0) for line in lines)

    until(lambda: written() == 300)
    assert len(log_lines(file)) - before < 100


def test_out_of_descriptors(tmp_path: Path) -> None:
    """A worker that is out of file descriptors logs JSON lines, few of them, and serves again when it has some."""
    file, few = tmp_path / "log", ["sh", "-c", 'ulimit -n 60 && exec "$0" "$@"']
    environ = {"REDIS_URL": "memory://", "JWT_SECRET": SECRET}
    with gunicorn_logged(environ, file, within=few, stderr=subprocess.STDOUT) as (_, port):
        request = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        assert exchange(port, request).startswith(b"HTTP/1.1 200 ")
        with ExitStack() as stack:
            for _ in range(80):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
            until(lambda: "Too many open files" in file.read_text())
            time.sleep(2)
        began = time.monotonic()
        assert exchange(port, request).startswith(b"HTTP/1.1 200 ")
        assert time.monotonic() - began < 2
        lines = [line for line in log_lines(file) if line["level"] == "ERROR"]
    assert {line["event"] for line in lines} == {"unexpected_error"}
    assert len(lines) < 20


BUGS = """
import threading, time, gevent

def bug():
    time.sleep(1)
    raise ZeroDivisionError

def app(environ, start_response):
    for _ in range(30):
        threading.Thread(target=bug).start()
        gevent.spawn(bug)
    start_response("200 OK", [])
    return []
"""


@pytest.mark.timed
def test_bugs_in_the_background(tmp_path: Path) -> None:
    """What fails in a thread or a greenlet of its own is logged as JSON lines with tracebacks, and limited, too."""
    (tmp_path / "bugs.py").write_text(BUGS)
    file, port = tmp_path / "log", free_port()
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path}:{ROOT}", "PORT": str(port), "WEB_CONCURRENCY": "1"}
    command = [sys.executable, "-m", "gunicorn", "bugs:app"]
    with file.open("wb") as log, running(command, cwd=ROOT, env=env, stdout=log, stderr=log):
        until(lambda: exchange(port, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
        until(lambda: "lines_dropped" in file.read_text())
        lines = [line for line in log_lines(file) if line["level"] != "INFO"]
    bugs, [dropped] = lines[:-1], lines[-1:]
    assert [line["event"] for line in bugs] == ["unexpected_error"] * 10
    assert all("ZeroDivisionError" in line["exc_info"] for line in bugs)
    assert dropped["number"] == 50


PATH = f"/sessions/{'S' * 32}/heartbeat"


@pytest.mark.parametrize(
    "request_, status",
    [
        (f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization Bearer {token()}\r\n\r\n", 400),
        (f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token()}\0\r\n\r\n", 400),
        (f"POST {PATH} HTTP/1.1\r\nHost: x\r\nBearer: {token()} : : \r\n {token()}\r\n\r\n", 400),
        (f"POST {PATH} HTTP/1.1\r\nHost: x\r\nExpect: {token()}\r\n\r\n", 417),
        (f"POST {PATH} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: {token()}\r\n\r\n", 400),
        (f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-Long: {token()}{'x' * 18000}\r\n\r\n", 431),
        (f"POST http://[{PATH}?access_token={token()} HTTP/1.1\r\n\r\n", 400),
        (f"POST {PATH}?access_token={token()} HTTP/{token()}\r\n\r\n", 400),
        (f"{token()} {PATH} HTTP/1.1\r\n\r\n", 400),
        (f"{token()}: : {PATH}\r\n\r\n", 400),
        (f"POST {PATH} HTTP/1.1\nAuthorization: Bearer {token()}\n\n\r\n\r\n", 400),
        (f"POST /{'x' * 5000}?access_token={token()} HTTP/1.1\r\n\r\n", 414),
    ],
    ids=range(12),
)
def test_unparsable_request(served: tuple[int, Path], request_: str, status: int) -> None:
    """A request that the app never sees is refused in the contract's shape, and repeated nowhere, not in the log."""
    port, file = served
    before = len(log_lines(file))
    head, _, body = exchange(port, request_.encode()).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()) and b"Content-Type: application/json" in head
    assert b"Cache-Control: no-store" in head and b"X-Content-Type-Options: nosniff" in head
    assert list(json.loads(body)) == ["success", "error"] and not json.loads(body)["success"]
    until(lambda: len(log_lines(file)) > before)
    assert (log_lines(file)[-1]["event"], log_lines(file)[-1]["address"]) == ("request_refused", "127.0.0.1")
    for secret in ("eyJ", token().split(".")[1], "S" * 32):
        assert secret.encode() not in head + body and secret not in file.read_text()


def test_served_log(redis_server: RedisServer, tmp_path: Path) -> None:
    """Every line is a JSON object with a UTC time, and none holds a subject, a session's id, a token or a secret."""
    subject, file = "somebody@example.org", tmp_path / "log"
    secrets = {SECRET, subject, redis_server.url, "somebody%40example.org"}
    good, expired, foreign = token(subject), token(subject, exp=1), token(subject, secret="y" * 40)
    secrets.update(each for jwt in (good, expired, foreign) for each in (jwt, *jwt.split(".")))

    def ask(method: str, path: str, bearer: str = good) -> dict:
        # A connection for each request, so that both workers get some.
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            connection.request(method, path, headers={"Authorization": f"Bearer {bearer}"})
            return json.loads(connection.getresponse().read())

    environ = {"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET, "SESSION_LIMIT": "30"}
    with gunicorn_logged(environ, file, workers=2) as (process, port):
        for bearer in (expired, foreign, "x.y"):
            ask("GET", "/sessions", bearer)
        ids = [ask("POST", "/sessions")["session"]["id"] for _ in range(30)]
        assert ask("POST", "/sessions") == {"success": False, "error": "Too many sessions"}
        secrets.update(ids, (session_key(subject, id) for id in ids))
        for act in ("heartbeat", "revoke", "revoke", "heartbeat"):
            ask("POST", f"/sessions/{ids[0]}/{act}")
        for path in (f"/sessions/{MISSING}/heartbeat", f"/sessions/{MISSING}/revoke", "/sessions/revoke-all"):
            ask("POST", path)
        until(lambda: "sessions_revoked" in file.read_text())
        pids = {process.pid, *workers_of(process)}
    lines = log_lines(file)
    assert {line["event"] for line in lines} >= {
        "session_opened",
        "session_not_found",
        "sessions_revoked",
        "limit_reached",
        "token_refused",
    }
    for line in lines:
        assert datetime.fromisoformat(line["time"]).utcoffset() == timedelta(0), line
        assert ("address" in line) == (line["event"] == "token_refused"), line
    assert {line["pid"] for line in lines} <= pids and len({line["pid"] for line in lines}) > 1
    written = file.read_text()
    assert [secret for secret in secrets | {MISSING} if secret in written] == []
    assert len({line["subject"] for line in lines if "subject" in line}) == 1
