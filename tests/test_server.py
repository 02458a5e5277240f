"""The service as it is run: gunicorn on a real Redis, spoken to over real connections."""

import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import pytest

from app.bodies import LARGEST_BODY
from tests.conftest import SECRET, token
from tests.servers import RedisServer, gunicorn_process

MISSING = "A" * 32


@pytest.fixture(scope="module")
def port(redis_server: RedisServer) -> Iterator[int]:
    """Where the service listens."""
    with gunicorn_process({"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET}, workers=2) as (_, port):
        yield port


@pytest.fixture(autouse=True)
def empty(redis_server: RedisServer) -> None:
    """Every test begins with no sessions at all."""
    redis_server.client.flushall()


@pytest.fixture
def connection(port: int) -> Iterator[http.client.HTTPConnection]:
    """A connection that is kept open."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        yield connection


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: object = None, **headers: str
) -> tuple[int, dict, http.client.HTTPMessage]:
    """Send a request; gives status, body and headers of the answer."""
    headers = {"Authorization": f"Bearer {token()}", **{k.replace("_", "-"): v for k, v in headers.items()}}
    connection.request(method, path, body, headers, encode_chunked="Transfer-Encoding" in headers)
    response = connection.getresponse()
    assert response.headers["Content-Type"] == "application/json"
    return response.status, json.loads(response.read()), response.headers


@pytest.fixture
def id(connection: http.client.HTTPConnection) -> str:
    """A live session."""
    status, body, _ = ask(connection, "POST", "/sessions")
    assert status == 201
    return body["session"]["id"]


def raw(port: int, *parts: bytes, pause: float = 0.0, break_off: bool = False) -> tuple[bytes, float]:
    """Send bytes, part by part; gives all that comes back until the server closes, and how long that took."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), 15) as s:
        # A server that has heard enough closes before it has read all, which the client sees as a reset.
        with suppress(ConnectionError):
            for part in parts:
                s.sendall(part)
                time.sleep(pause)
            if break_off:
                s.shutdown(socket.SHUT_WR)
        received = b""
        with suppress(ConnectionError):
            while data := s.recv(65536):
                received += data
    return received, time.monotonic() - began


def head(method: str, path: str, *fields: str) -> bytes:
    """The head of a request with a token, on a connection that is to be closed after it."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {token()}", "Connection: close", *fields]
    return "\r\n".join([*lines, "", ""]).encode()


def test_transcript(connection: http.client.HTTPConnection, port: int) -> None:
    """Over one connection a session is opened, read, kept alive, listed and revoked, and then it is gone."""
    status, body, headers = ask(
        connection, "POST", "/sessions", json.dumps({"deviceName": "Tablet"}), Content_Type="application/json"
    )
    session, path = body["session"], headers["Location"]
    assert (status, session["deviceName"], session["ipAddress"]) == (201, "Tablet", "127.0.0.1")
    assert ask(connection, "GET", path)[:2] == (200, {"success": True, "session": session})

    status, body, headers = ask(connection, "POST", f"{path}/heartbeat")
    assert (status, list(body), headers["Session-Expires-In"]) == (200, ["success", "message", "newExpiry"], "1800")
    assert headers["Cache-Control"] == "no-store"
    listed = ask(connection, "GET", "/sessions")[1]["sessions"]
    assert body["newExpiry"] in [each["expiresAt"] for each in listed if each["id"] == session["id"]]

    revoked = {"success": True, "message": "Session revoked successfully"}
    assert ask(connection, "POST", f"{path}/revoke")[:2] == (200, revoked)
    expired = {"success": False, "error": "Session not found or expired"}
    assert ask(connection, "POST", f"{path}/heartbeat")[:2] == (404, expired)
    assert ask(connection, "GET", path)[0] == ask(connection, "POST", f"{path}/revoke")[0] == 404
    assert ask(connection, "POST", "/sessions/revoke-all")[0] == 200
    assert ask(connection, "GET", "/sessions")[1] == {"success": True, "sessions": []}
    assert ask(connection, "GET", "/readyz")[:2] == (200, {"status": "ok"})


def test_heartbeats_together(connection: http.client.HTTPConnection, port: int, id: str) -> None:
    """Heartbeats over many connections at once all succeed."""

    def beat(_: int) -> list[int]:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as own:
            return [ask(own, "POST", f"/sessions/{id}/heartbeat")[0] for _ in range(5)]

    with ThreadPoolExecutor(30) as pool:
        assert [status for statuses in pool.map(beat, range(30)) for status in statuses] == [200] * 150


@pytest.mark.timed
def test_unfinished_body(port: int, id: str) -> None:
    """A body that does not arrive, or arrives by drips, is a 408 within 4 seconds, and the connection is closed."""
    fields = "Content-Type: application/json", "Content-Length: 100"
    chunked = "Content-Type: application/json", "Transfer-Encoding: chunked"
    requests = [
        (head("POST", "/sessions", *fields), b"{"),
        (head("POST", f"/sessions/{id}/heartbeat", *fields), b"{"),
        (head("POST", "/sessions", *chunked), b"64\r\n{"),
        (head("POST", f"/sessions/{id}/revoke", *fields), *[b" "] * 8),
    ]
    with ThreadPoolExecutor(len(requests)) as pool:
        for received, seconds in pool.map(lambda parts: raw(port, *parts, pause=0.3), requests):
            assert received.startswith(b"HTTP/1.1 408 ")
            assert received.endswith(b'{"success": false, "error": "Request body not received in time"}')
            assert seconds < 4


LENGTH, CHUNKED = "Content-Length: 53", "Transfer-Encoding: chunked"


@pytest.mark.parametrize("path", ["/sessions", "/sessions/revoke-all"])
@pytest.mark.parametrize(
    "field, part", [(LENGTH, b""), (LENGTH, b"{"), (LENGTH, b"{}"), (CHUNKED, b""), (CHUNKED, b"35\r\n{}")]
)
def test_body_that_breaks_off(
    connection: http.client.HTTPConnection, port: int, id: str, path: str, field: str, part: bytes
) -> None:
    """A request whose body breaks off is a 400 and does nothing: no session is opened, and none revoked."""
    start = head("POST", path, "Content-Type: application/json", field)
    received, _ = raw(port, start, part, pause=0.05, break_off=True)
    assert [each["id"] for each in ask(connection, "GET", "/sessions")[1]["sessions"]] == [id]
    assert received.startswith(b"HTTP/1.1 400 ")


@pytest.mark.timed
def test_others_do_not_wait(connection: http.client.HTTPConnection, port: int, id: str) -> None:
    """While a hundred clients keep the service waiting for their bodies, a heartbeat is answered at once."""
    start = head("POST", "/sessions", "Content-Type: application/json", "Content-Length: 100")
    slow = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(100)]
    try:
        for each in slow:
            each.sendall(start)
        began = time.monotonic()
        assert ask(connection, "POST", f"/sessions/{id}/heartbeat")[0] == 200
        assert time.monotonic() - began < 1
    finally:
        for each in slow:
            each.close()


@pytest.mark.timed
def test_greedy_client(redis_server: RedisServer) -> None:
    """A client whose next request is always there already leaves the others their turn."""

    def last_answer(connection: socket.socket) -> float:
        while connection.recv(65536):
            pass
        return time.monotonic()

    environ = {"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET}
    with gunicorn_process(environ) as (_, port), socket.create_connection(("127.0.0.1", port), 10) as greedy:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            path = ask(connection, "POST", "/sessions")[2]["Location"]
            with ThreadPoolExecutor(2) as pool:
                began = time.monotonic()
                sent = pool.submit(greedy.sendall, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 5000)
                greedy.recv(1)
                ended = pool.submit(last_answer, greedy)
                assert ask(connection, "POST", f"{path}/heartbeat")[0] == 200
                answered = time.monotonic()
                sent.result()
                greedy.shutdown(socket.SHUT_WR)
                assert answered - began < (ended.result() - began) / 2


@pytest.mark.parametrize("path", ["/sessions", "/sessions/{id}/heartbeat", "/sessions/revoke-all"])
def test_chunked_body_too_large(port: int, id: str, path: str) -> None:
    """A chunked body, whose length is not announced, is refused when it passes the bound."""
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    chunks = [chunk] * (LARGEST_BODY // 0x4000 + 1) + [b"0\r\n\r\n"]
    fields = "Content-Type: application/json", "Transfer-Encoding: chunked"
    received, _ = raw(port, head("POST", path.format(id=id), *fields), *chunks)
    assert received.startswith(b"HTTP/1.1 413 ")
    assert received.endswith(b'{"success": false, "error": "Request body too large"}')


@pytest.mark.parametrize("chunk", [b"{}", b"no JSON", b"\xff\x00"])
def test_small_chunked_body(connection: http.client.HTTPConnection, id: str, chunk: bytes) -> None:
    """A heartbeat ignores a small chunked body, and the connection can be used again."""
    for _ in range(2):
        assert ask(connection, "POST", f"/sessions/{id}/heartbeat", [chunk], Transfer_Encoding="chunked")[0] == 200
    assert ask(connection, "GET", f"/sessions/{id}")[0] == 200


def test_chunked_json(connection: http.client.HTTPConnection) -> None:
    """A session can be opened with a chunked body."""
    chunks = [b'{"device', b'Name": "Tablet"}']
    more = {"Transfer_Encoding": "chunked", "Content_Type": "application/json"}
    status, body, _ = ask(connection, "POST", "/sessions", chunks, **more)
    assert (status, body["session"]["deviceName"]) == (201, "Tablet")


@pytest.mark.parametrize("body", [b"zz\r\nx\r\n0\r\n\r\n", b"-1\r\n\r\n"])
def test_broken_chunks(port: int, id: str, body: bytes) -> None:
    """Malformed chunks are a 4xx and no trouble for other callers."""
    fields = "Content-Type: application/json", "Transfer-Encoding: chunked"
    received, _ = raw(port, head("POST", f"/sessions/{id}/heartbeat", *fields) + body)
    assert re.match(rb"HTTP/1\.1 4[0-9][0-9] ", received)


def test_refused_body_is_no_request(port: int, id: str) -> None:
    """A request that hides in a refused body is not carried out."""
    body = b" " * (LARGEST_BODY + 1) + head("POST", f"/sessions/{id}/revoke")
    start = head("POST", f"/sessions/{id}/heartbeat", f"Content-Length: {len(body)}")
    received, _ = raw(port, start.replace(b"Connection: close\r\n", b""), body, head("GET", f"/sessions/{id}"))
    statuses = re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", received)
    assert statuses in ([b"413"], [b"413", b"200"])
    assert raw(port, head("GET", f"/sessions/{id}"))[0].startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("id", ["%FF", "%00", "..", "%2e%2e", "%2F", "A" * 32 + "%0A", "A" * 4000])
def test_strange_id(connection: http.client.HTTPConnection, id: str) -> None:
    """What cannot be an id is answered like a session that does not exist."""
    expected = ask(connection, "POST", f"/sessions/{MISSING}/heartbeat")[:2]
    assert expected[0] == 404
    assert ask(connection, "POST", f"/sessions/{id}/heartbeat")[:2] == expected


def test_script_name(connection: http.client.HTTPConnection, id: str) -> None:
    """What a request says of where the service is mounted counts for nothing, so that it gets past no rule either."""
    for path, status in ((f"/sessions/{id}", 200), (f"/x/sessions/{id}", 404)):
        connection.request("GET", path, headers={"SCRIPT_NAME": "/x", "Authorization": f"Bearer {token()}"})
        response = connection.getresponse()
        assert (response.status, response.headers["Content-Type"]) == (status, "application/json")
        response.read()


@pytest.mark.timed
def test_stops(redis_server: RedisServer) -> None:
    """SIGTERM ends the service in good order and, when no connection is open, at once."""
    with gunicorn_process({"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET}, workers=2) as (process, port):
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            assert ask(connection, "POST", "/sessions")[0] == 201
        began = time.monotonic()
        process.terminate()
        assert process.wait(10) == 0
        assert time.monotonic() - began < 5
