"""What gunicorn_edge.py changes in gunicorn: a stranger on a raw connection, and a caller beside it."""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest

from tests.conftest import SECRET, token
from tests.servers import ROOT, RedisServer, gunicorn_logged, gunicorn_process, log_lines, until

BOUND = 0.5  # seconds that another caller may wait; 0.1 on a quiet machine
GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"Host: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
OPEN = b"POST /sessions HTTP/1.1\r\n" + CHUNKED
OPEN_WITH_TOKEN = OPEN + f"Authorization: Bearer {token()}\r\n".encode()


@pytest.fixture(scope="module")
def port(redis_server: RedisServer) -> Iterator[int]:
    """The service with one worker."""
    with gunicorn_process({"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET}) as (_, port):
        yield port


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 10)


def all_of(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    received = b""
    with suppress(ConnectionError):
        while data := connection.recv(65536):
            received += data
    return received


def exchange(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """Send bytes, part by part; gives all that comes back until the server closes."""
    with connect(port) as connection:
        with suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        return all_of(connection)


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", received)]


def refused(received: bytes, status: int) -> None:
    """There is one answer, in the contract's shape, and it announces that the connection is closed."""
    head, _, body = received.partition(b"\r\n\r\n")
    assert statuses(received) == [status]
    assert b"\r\nConnection: close\r\n" in head
    assert b"\r\nContent-Type: application/json\r\n" in head
    assert json.loads(body)["success"] is False


# Attacks. Each sends what it sends once; they are repeated for some seconds.


def once(*parts: bytes) -> Callable[[int], None]:
    def attack(port: int) -> None:
        exchange(port, *parts)

    return attack


def endless(head: bytes, piece: bytes, pieces_a_second: int) -> Callable[[int], None]:
    """A request that never ends, sent steadily."""

    def attack(port: int) -> None:
        with connect(port) as connection:
            connection.sendall(head)
            for _ in range(50):
                connection.sendall(piece * (pieces_a_second // 50))
                time.sleep(0.02)

    return attack


def large_files(port: int) -> None:
    """Requests for a large file, one behind the other, whose answers are taken in at once and dropped."""
    with connect(port) as connection:
        connection.sendall(b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        end = time.monotonic() + 1
        while time.monotonic() < end and connection.recv(1 << 20):
            pass


ATTACKS = {
    "names that are dropped": once(GET + b"_:\r\n" * 200_000 + b"\r\n"),
    "trailers that are dropped": once(OPEN + b"\r\n0\r\n" + b"_:\r\n" * 150_000 + b"\r\n"),
    "trailers that are dropped, with a token": once(OPEN_WITH_TOKEN + b"\r\n0\r\n" + b"_:\r\n" * 15_000 + b"\r\n"),
    "trailers without an end": endless(OPEN_WITH_TOKEN + b"\r\n0\r\n", b"X: y\r\n", 50_000),
    "an endless body": endless(OPEN + b"\r\n", b"1\r\na\r\n", 250_000),
    "an endless body to no path": endless(b"POST /x HTTP/1.1\r\n" + CHUNKED + b"\r\n", b"1\r\na\r\n", 250_000),
    "an endless body with a length": endless(
        b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n\r\n", b"a" * 1000, 50_000
    ),
    "an endless body with a token": endless(OPEN_WITH_TOKEN + b"\r\n", b"1\r\na\r\n", 250_000),
    "an endless size of a chunk": endless(OPEN_WITH_TOKEN + b"\r\n", b"0" * 1000, 50_000),
    "chunks of one byte": once(
        OPEN_WITH_TOKEN + b"Connection: close\r\n\r\n" + b"1\r\n \r\n" * 97_000 + b"2\r\n{}\r\n0\r\n\r\n"
    ),
    "extensions of chunks": once(
        OPEN_WITH_TOKEN + b"Connection: close\r\n\r\n" + b"1" + b";a" * 7000 + b"\r\n \r\n" + b"0\r\n\r\n"
    ),
    "few fields, all large": once(GET + b"".join(b"X-%d: %s\r\n" % (i, b"y" * 16_000) for i in range(30)) + b"\r\n"),
    "a large head without an end": endless(GET + b"X: %s\r\n" % (b"y" * 7000) * 9, b"z", 1000),
    "many small packets of a head": endless(GET, b"z", 50),
    "empty lines": once(b"\r\n" * 50_000),
    "no line at all": once(b"x" * 500_000),
    "large files, one behind the other": large_files,
    "a request line of slashes": once(b"GET /" + b"/" * 4000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
}


@pytest.mark.timed
@pytest.mark.parametrize("name", ATTACKS)
def test_other_callers_do_not_wait(port: int, name: str) -> None:
    """While a stranger tries it over several connections, a heartbeat of another caller is answered soon, each time."""
    # Once the machine itself may have been slow.
    assert slowest_heartbeat(port, ATTACKS[name]) < BOUND or slowest_heartbeat(port, ATTACKS[name]) < BOUND


def slowest_heartbeat(port: int, attack: Callable[[int], None]) -> float:
    """Seconds that the slowest heartbeat took during an attack over three connections."""
    path = open_session(port)
    end = time.monotonic() + 1

    def repeat() -> None:
        while time.monotonic() < end:
            with suppress(OSError):
                attack(port)

    threads = [threading.Thread(target=repeat) for _ in range(3)]
    for thread in threads:
        thread.start()
    slowest = 0.0
    try:
        time.sleep(0.2)
        while time.monotonic() < end:
            began = time.monotonic()
            assert heartbeat(port, path) == 200
            slowest = max(slowest, time.monotonic() - began)
            time.sleep(0.02)
    finally:
        for thread in threads:
            thread.join()
    return slowest


def open_session(port: int) -> str:
    """The path of a new session, of a subject of its own."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("POST", "/sessions", headers={"Authorization": f"Bearer {token('edge')}"})
        return connection.getresponse().headers["Location"]


def heartbeat(port: int, path: str, **headers: str) -> int:
    """The status of a heartbeat on a connection of its own."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("POST", f"{path}/heartbeat", headers={"Authorization": f"Bearer {token('edge')}", **headers})
        return connection.getresponse().status


def test_fields_are_counted(port: int) -> None:
    """A hundred fields are taken, one more is a 431, whether gunicorn would keep them or drop them."""
    for name in (b"X", b"_"):
        field = name + b": y\r\n"
        assert statuses(exchange(port, GET + field * 98 + b"Connection: close\r\n\r\n")) == [200]
        refused(exchange(port, GET + field * 99 + b"Connection: close\r\n\r\n"), 431)


def test_trailers_are_counted(port: int) -> None:
    """A hundred trailers are taken, one more ends the connection, whether gunicorn would keep them or drop them."""
    head = b"POST /sessions/revoke-all HTTP/1.1\r\n" + CHUNKED + f"Authorization: Bearer {token()}\r\n".encode()
    last = GET + b"Connection: close\r\n\r\n"
    for name in (b"X", b"_"):
        field = name + b": y\r\n"
        assert statuses(exchange(port, head + b"\r\n0\r\n" + field * 100 + b"\r\n", last)) == [200, 200]
        refused(exchange(port, head + b"\r\n0\r\n" + field * 101 + b"\r\n", last), 400)


def test_size_of_a_head(port: int) -> None:
    """A head of 64 KB is taken, a larger one is a 431, in one packet or in many."""
    start = GET + b"Connection: close\r\n" + b"".join(b"X-%d: %s\r\n" % (i, b"y" * 16_000) for i in range(4))
    for size, check in ((65_536, lambda got: statuses(got) == [200]), (65_537, lambda got: statuses(got) == [431])):
        head = start + b"Z: " + b"z" * (size - len(start) - 7) + b"\r\n\r\n"
        assert len(head) == size
        assert check(exchange(port, head))
        assert check(exchange(port, *(head[i : i + 10_000] for i in range(0, size, 10_000)), pause=0.01))


def test_long_token(port: int) -> None:
    """A token of 16,384 bytes reaches the app; one for which not even the field has room is a 431."""
    for size, status in ((16_384, 401), (17_000, 401), (20_000, 431)):
        head = b"GET /sessions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer "
        assert statuses(exchange(port, head + b"x" * size + b"\r\n\r\n")) == [status]


def test_names_with_underscores(port: int) -> None:
    """A header that a device names with an underscore is dropped, and its heartbeat is answered."""
    assert heartbeat(port, open_session(port), device_id="7") == 200


@pytest.mark.parametrize("size", [1, 1000, 16_000])
def test_small_body_that_is_not_read(port: int, size: int) -> None:
    """After a refusal of a request with an unread body the connection goes on, where the body is small."""
    body = b"x" * size
    for head in (
        f"POST /sessions HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode() + body,
        OPEN + b"\r\n%x\r\n%s\r\n0\r\n\r\n" % (size, body),
    ):
        assert statuses(exchange(port, head, GET + b"Connection: close\r\n\r\n")) == [401, 200]


LARGE = [
    b"Content-Length: 100000\r\n\r\n" + b"x" * 100_000,
    b"Content-Length: 100000\r\n\r\n" + b"x" * 100,
    b"Transfer-Encoding: chunked\r\n\r\n" + b"4000\r\n" + b"x" * 0x4000 + b"\r\n4000\r\n" + b"x" * 0x4000 + b"\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\nno size\r\n",
]


@pytest.mark.parametrize("rest", LARGE, ids=range(len(LARGE)))
@pytest.mark.parametrize("path, status", [("/sessions", 401), ("/nowhere", 404)])
def test_large_body_that_is_not_read(port: int, path: str, status: int, rest: bytes) -> None:
    """A refusal whose body is large, unfinished or broken says that it closes the connection, and does, soon."""
    began = time.monotonic()
    refused(exchange(port, f"POST {path} HTTP/1.1\r\nHost: x\r\n".encode() + rest), status)
    assert time.monotonic() - began < 5


def test_body_that_comes_too_late(port: int) -> None:
    """What arrives after a 408 is not taken for a request, also where it begins in the middle of a chunk."""
    with connect(port) as connection:
        connection.sendall(OPEN_WITH_TOKEN + b"\r\n64\r\n{")
        answer = connection.recv(65536)
        with suppress(ConnectionError):
            connection.sendall(GET + b"\r\n" + b"0\r\n\r\n" + GET + b"\r\n")
        refused(answer + all_of(connection), 408)


def test_answer_arrives(port: int) -> None:
    """A client that goes on sending for a while still gets to see why it was refused."""
    for head in (
        b"POST /sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n",
        GET + b"X: y\r\n" * 20_000,
        b"nonsense\r\n\r\n",
    ):
        with connect(port) as connection:
            connection.sendall(head)
            for _ in range(40):
                connection.sendall(b"x" * 16_384)
            assert statuses(all_of(connection))[0] in (400, 401, 431)


def test_body_with_line_feeds(port: int) -> None:
    """A body that comes together with the end of its head may hold line feeds; only the head must not."""
    body = b'{\n"exceptSessionId":\n"' + b"A" * 32 + b'"\n}\n'
    head = f"POST /sessions/revoke-all HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token()}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    for cut in (10, len(head) - 3, len(head) - 2, len(head) - 1):
        whole = head.encode() + body
        assert statuses(exchange(port, whole[:cut], whole[cut:], pause=0.05)) == [200]


def test_bare_line_feed(port: int) -> None:
    """A head whose lines end in a bare line feed is refused at once, not when its time is over."""
    began = time.monotonic()
    for parts in ([b"GET /healthz HTTP/1.1\n"], [GET, b"X: y\n"], [GET + b"X: y", b"\n"], [GET + b"X: y\r", b"\nZ\n"]):
        refused(exchange(port, *parts, pause=0.05), 400)
    assert time.monotonic() - began < 4


def test_head_by_the_byte(port: int) -> None:
    """A head that arrives byte by byte is a request like any other, and so is the one behind it."""
    request = GET + b"\r\n" + GET + b"Connection: close\r\n\r\n"
    assert statuses(exchange(port, *(request[i : i + 1] for i in range(len(request))), pause=0.001)) == [200, 200]


def test_clocks(redis_server: RedisServer) -> None:
    """Behind a proxy an idle connection stays, and a head has 5 seconds from its first byte on all the same."""
    environ = {"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET, "TRUSTED_PROXIES": "1"}
    with gunicorn_process(environ) as (_, port), ThreadPoolExecutor(2) as pool:
        assert statuses(exchange(port, GET + b"Connection: close\r\n\r\n")) == [200]  # the worker is there

        def idle() -> bytes:
            with connect(port) as connection:
                time.sleep(6)
                connection.sendall(GET + b"Connection: close\r\n\r\n")
                return all_of(connection)

        def slow() -> float:
            with connect(port) as connection:
                connection.sendall(GET)
                began = time.monotonic()
                with suppress(ConnectionError):
                    while time.monotonic() - began < 9 and not closed(connection):
                        connection.sendall(b"X")
                return time.monotonic() - began

        def closed(connection: socket.socket) -> bool:
            connection.settimeout(0.5)
            try:
                return connection.recv(1) == b""
            except TimeoutError:
                return False

        answered, cut = pool.submit(idle), pool.submit(slow)
        assert statuses(answered.result()) == [200]
        assert 4.5 < cut.result() < 7


def test_one_packet(port: int) -> None:
    """Head and body of an answer arrive together."""
    with connect(port) as connection:
        for _ in range(20):
            connection.sendall(GET + b"\r\n")
            assert connection.recv(65536).endswith(b'{"status": "ok"}')


def test_date(port: int) -> None:
    """Each answer has the Date of its second, in the form of RFC 9110 §5.6.7."""
    with connect(port) as connection:

        def date() -> str:
            connection.sendall(GET + b"\r\n")
            [found] = re.findall(r"\r\nDate: (.*)\r\n", connection.recv(65536).decode())
            assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", found)
            assert -0.1 < time.time() - parsedate_to_datetime(found).timestamp() < 1.5
            return found

        first = date()
        until(lambda: date() != first, 3)


def test_error_stream() -> None:
    """gunicorn makes one stream for `wsgi.errors`, under the name by which it is replaced, not one for each request."""
    code = "import gunicorn_edge as e, gunicorn.config as c; c = c.Config(); make = e.wsgi.base_environ; "
    code += "assert make(c)['wsgi.errors'] is make(c)['wsgi.errors']"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=30)


def test_settings_at_hand() -> None:
    """A worker's settings have the values that they had, without a call of gunicorn's look-up."""
    code = "import gunicorn_edge as e, gunicorn.config as c; c, Config = c.Config(), c.Config; c.set('keepalive', 7); "
    code += "before = {each: getattr(c, each) for each in c.settings}; e.settings_at_hand(c); del Config.__getattr__; "
    code += "assert before == {each: getattr(c, each) for each in c.settings} and c.keepalive == 7"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=30)


@pytest.mark.parametrize("method, path", [("HEAD", "/healthz"), ("HEAD", "/docs/swagger-ui.css")])
def test_head_method(port: int, method: str, path: str) -> None:
    """The answer to HEAD is a head, and the connection goes on."""
    request = f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    received = exchange(port, request, GET + b"Connection: close\r\n\r\n")
    assert statuses(received) == [200, 200]
    assert received.count(b"\r\n\r\n") == 2


def test_file(port: int) -> None:
    """A file arrives whole."""
    received = exchange(port, b"GET /docs/swagger-ui.css HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    head, _, body = received.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}\r\n".encode() in head


def test_error_of_ours(redis_server: RedisServer, folder: Path) -> None:
    """Where gunicorn itself fails the answer is a 500 in the contract's shape, and the log does not name the path."""
    environ = {"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET, "SCRIPT_NAME": "/mounted"}
    with gunicorn_logged(environ, folder / "log") as (_, port):
        refused(exchange(port, b"GET /secret-path HTTP/1.1\r\nHost: x\r\n\r\n"), 500)
        until(lambda: "unexpected_error" in [line["event"] for line in log_lines(folder / "log")])


def test_refusals_are_limited(redis_server: RedisServer, folder: Path) -> None:
    """Of the requests that cannot be parsed ten a second are logged, and then how many there were."""
    with gunicorn_logged({"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET}, folder / "log") as (_, port):
        for _ in range(50):
            refused(exchange(port, b"nonsense\r\n\r\n"), 400)

        def lines(event: str) -> list[dict]:
            return [line for line in log_lines(folder / "log") if line["event"] == event]

        until(lambda: len(lines("request_refused")) + sum(line["number"] for line in lines("lines_dropped")) == 50)
        assert {line["dropped"] for line in lines("lines_dropped")} == {"request_refused"}
        assert {line["reason"] for line in lines("request_refused")} == {"InvalidRequestLine"}


def test_lost_connection_is_not_logged(redis_server: RedisServer, folder: Path) -> None:
    """A client that resets its connection in the middle of a request or an answer leaves no line in the log."""
    with gunicorn_logged({"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET}, folder / "log") as (_, port):
        for data in (GET, GET + b"\r\n", OPEN_WITH_TOKEN + b"\r\n5\r\n", GET + b"\r\n" + GET):
            for _ in range(5):
                with connect(port) as connection:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    connection.sendall(data)
        assert statuses(exchange(port, GET + b"Connection: close\r\n\r\n")) == [200]
        assert [line for line in log_lines(folder / "log") if line["level"] == "ERROR"] == []


def test_another_gunicorn() -> None:
    """A major release of gunicorn that this was not tried with is refused in one line."""
    program = (
        "import gunicorn; gunicorn.version_info = (28, 0, 0); gunicorn.__version__ = '28.0.0'; import gunicorn_edge"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == "gunicorn 28.0.0: gunicorn_edge.py was only tried with gunicorn 27\n"
