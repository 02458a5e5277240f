"""Clients that are slow, many, odd or in the way of a restart: how the others fare meanwhile. Needs two minutes."""

import http.client
import math
import re
import resource
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from faults.load import Figures
from tests.conftest import SECRET, token
from tests.servers import RedisServer, gunicorn_logged, gunicorn_process, log_lines, until, workers_of

pytestmark = pytest.mark.timed
WORKERS = 2
AUTHORIZATION = f"Authorization: Bearer {token()}\r\n"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
HEADERS = {"Authorization": f"Bearer {token()}"}


@pytest.fixture(autouse=True, scope="module")
def many_files() -> Iterator[None]:
    """Room for the connections of both sides."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The service's environment, with a Redis of its own."""
    with RedisServer(tmp_path_factory.mktemp("t")) as server:
        yield {"REDIS_URL": server.url, "JWT_SECRET": SECRET}


@pytest.fixture(scope="module")
def port(environ: dict[str, str]) -> Iterator[int]:
    with gunicorn_process(environ, WORKERS) as (_, port):
        yield port


def open_session(port: int) -> str:
    """Open a session; gives the path of its heartbeat."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("POST", "/sessions", headers=HEADERS)
        answer = connection.getresponse()
        assert answer.status == 201, answer.read()
        return answer.headers["Location"] + "/heartbeat"


def megabytes(process: subprocess.Popen) -> int:
    """The resident memory of all workers."""
    statuses = [Path(f"/proc/{child}/status").read_text() for child in workers_of(process)]
    return sum(int(re.search(r"VmRSS:\s+([0-9]+)", status)[1]) for status in statuses) // 1024


def beats(port: int, path: str, number: int = 60, pause: float = 0.04) -> list[float]:
    """Send heartbeats, each over a connection of its own; gives the milliseconds that they took, in order."""
    took = []
    for _ in range(number):
        began = time.monotonic()
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            connection.request("POST", path, headers=HEADERS)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            answer.read()
        took.append((time.monotonic() - began) * 1000)
        time.sleep(pause)
    return sorted(took)


@contextmanager
def crowd(port: int, number: int, first: bytes) -> Iterator[list[socket.socket]]:
    """Connections that have sent some bytes each."""
    connections = []
    try:
        for _ in range(number):
            connections.append(socket.create_connection(("127.0.0.1", port), 30))
            connections[-1].sendall(first)
        yield connections
    finally:
        for connection in connections:
            connection.close()


@contextmanager
def dripping(connections: list[socket.socket]) -> Iterator[None]:
    """Send a byte over each connection every half second."""
    over = threading.Event()

    def drip() -> None:
        while not over.wait(0.5):
            for connection in connections:
                with suppress(OSError):
                    connection.send(b"x")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def last_words(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    received = b""
    with suppress(ConnectionError):
        while data := connection.recv(65536):
            received += data
    return received


def answered(connection: socket.socket) -> bool:
    """Whether a request for /healthz gets its whole answer."""
    received = b""
    with suppress(ConnectionError):
        while not received.endswith(b'{"status": "ok"}') and (data := connection.recv(65536)):
            received += data
    return received.startswith(b"HTTP/1.1 200 ") and received.endswith(b'{"status": "ok"}')


def report(what: str, took: list[float], before: int, after: int, more: str, figures: Figures) -> None:
    p50 = statistics.median(took)
    figures(
        f"{what}: heartbeat p50 {p50:.1f} ms, max {took[-1]:.1f} ms; {WORKERS} workers {before} -> {after} MB; {more}"
    )
    assert p50 < 100


def test_slow_headers(environ: dict[str, str], figures: Figures) -> None:
    """A thousand clients that send their headers by drips hold up no other client and are cut off."""
    with gunicorn_process(environ, WORKERS) as (process, port):
        path, before = open_session(port), megabytes(process)
        began = time.monotonic()
        with crowd(port, 1000, b"POST /sessions HTTP/1.1\r\nX-Slow: ") as connections, dripping(connections):
            took = beats(port, path)
            after = megabytes(process)
            answers = Counter(last_words(connection)[:12] for connection in connections)
        seconds = time.monotonic() - began
        assert seconds < 20
        report("1,000 slow headers", took, before, after, f"all cut within {seconds:.1f} s", figures)
        assert set(answers) <= {b"", b"HTTP/1.1 408"}
        assert beats(port, path, 5)


def test_unfinished_bodies(environ: dict[str, str], figures: Figures) -> None:
    """A thousand clients that never send the rest of their bodies hold up no other client and get a 408."""
    head = f"POST /sessions HTTP/1.1\r\nHost: x\r\n{AUTHORIZATION}Content-Length: 100\r\n"
    with gunicorn_process(environ, WORKERS) as (process, port):
        path, before = open_session(port), megabytes(process)
        began = time.monotonic()
        with crowd(port, 1000, f"{head}Content-Type: application/json\r\n\r\n{{".encode()) as connections:
            took = beats(port, path)
            after = megabytes(process)
            answers = Counter(last_words(connection)[:12] for connection in connections)
        seconds = time.monotonic() - began
        assert seconds < 15
        report("1,000 unfinished bodies", took, before, after, f"all got 408 within {seconds:.1f} s", figures)
        assert answers == {b"HTTP/1.1 408": 1000}


def test_idle_connections(environ: dict[str, str], figures: Figures) -> None:
    """Five thousand connections that a proxy keeps open hold up no client."""
    with gunicorn_process({**environ, "TRUSTED_PROXIES": "1"}, WORKERS) as (process, port):
        path, before = open_session(port), megabytes(process)
        with crowd(port, 5000, HEALTH) as connections:
            assert sum(map(answered, connections)) == 5000
            took = beats(port, path)
            after = megabytes(process)
            for connection in connections:
                connection.sendall(HEALTH)
            alive = sum(map(answered, connections))
        report("5,000 idle connections", took, before, after, f"{alive} still answer", figures)
        assert alive == 5000


def test_no_reading(environ: dict[str, str], tmp_path: Path, figures: Figures) -> None:
    """A client that asks for very much and reads nothing of it is cut off, which is not worth a line in the log."""
    with gunicorn_logged(environ, tmp_path / "log") as (process, port), socket.socket() as connection:
        open_session(port)
        [worker] = workers_of(process)

        def files() -> int:
            return len(list(Path(f"/proc/{worker}/fd").iterdir()))

        before = files()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        until(lambda: files() > before)
        time.sleep(1)
        began, served = time.monotonic(), files()
        time.sleep(6)
        assert files() == served  # it is not the keep-alive timeout that ends it
        until(lambda: files() < served, 30)
    assert [line for line in log_lines(tmp_path / "log") if line["level"] == "ERROR"] == []
    figures(f"reading nothing: cut after {time.monotonic() - began:.0f} s")


class Clients:
    """Threads that send heartbeats over connections they keep, until told to stop; nothing is tried twice.

    As HTTP has it: a client that is told `Connection: close` connects anew (RFC 9112 §9.6).
    """

    def __init__(self, port: int, path: str, number: int = 4) -> None:
        self.answered: Counter[int] = Counter()
        self.failures: list[str] = []
        self.connections = self.refused = 0
        self.stopping_since = math.inf  # later connections may be refused
        self._port, self._path = port, path
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(number)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self.join()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)

    def _run(self) -> None:
        while not self._over.is_set():
            began, used = time.monotonic(), 0
            with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=15)) as connection:
                try:
                    connection.connect()
                    while connection.sock and not self._over.is_set():
                        connection.request("POST", self._path, headers=HEADERS)
                        answer = connection.getresponse()
                        answer.read()
                        used += 1
                        with self._lock:
                            self.answered[answer.status] += 1
                except (OSError, http.client.HTTPException) as error:
                    with self._lock:
                        if not used and began > self.stopping_since:
                            self.refused += 1
                            return
                        self.failures.append(f"{type(error).__name__}: {error}, after {used} on this connection")
                finally:
                    with self._lock:
                        self.connections += 1


def test_rolling_restart(environ: dict[str, str], figures: Figures) -> None:
    """While all workers are replaced, three times under load, not a single request fails."""
    with gunicorn_process(environ, WORKERS) as (process, port):
        with Clients(port, open_session(port)) as clients:
            for _ in range(3):
                time.sleep(1)
                old = set(workers_of(process))
                process.send_signal(signal.SIGHUP)
                until(lambda: len(workers_of(process)) == WORKERS and not old & set(workers_of(process)), 30)
            time.sleep(1)
    figures(
        f"3 rolling restarts: {clients.answered.total()} requests, {len(clients.failures)} failed, "
        f"{clients.connections} connections"
    )
    assert (clients.failures, clients.refused, set(clients.answered)) == ([], 0, {200})


def test_stops_under_load(environ: dict[str, str], figures: Figures) -> None:
    """After SIGTERM every connection that was there gets whole answers, new ones may be refused; the exit code is 0."""
    with gunicorn_process(environ, WORKERS) as (process, port):
        path, head = open_session(port), f"POST /sessions HTTP/1.1\r\nHost: x\r\n{AUTHORIZATION}Connection: close\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{"
        with Clients(port, path, 8) as clients, crowd(port, 20, head.encode()) as halfway:
            time.sleep(1)
            clients.stopping_since = began = time.monotonic()
            process.terminate()
            time.sleep(0.5)
            for connection in halfway:
                connection.sendall(b"}")
            assert Counter(last_words(connection)[:12] for connection in halfway) == {b"HTTP/1.1 201": 20}
            assert process.wait(20) == 0
            seconds = time.monotonic() - began
            clients.join()
    figures(
        f"SIGTERM under load: {clients.answered.total()} requests, {len(clients.failures)} failed, "
        f"20 of 20 half-sent ones answered, stopped in {seconds:.1f} s"
    )
    assert (clients.failures, set(clients.answered)) == ([], {200})


def test_halfway_through_a_restart(environ: dict[str, str]) -> None:
    """A request that is half sent when its worker is replaced is answered by it."""
    with gunicorn_process(environ, WORKERS) as (process, port):
        head = f"POST /sessions HTTP/1.1\r\nHost: x\r\n{AUTHORIZATION}Connection: close\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{"
        open_session(port)  # the workers are there
        with crowd(port, 20, head.encode()) as halfway:
            time.sleep(0.3)
            process.send_signal(signal.SIGHUP)
            time.sleep(1.5)
            for connection in halfway:
                connection.sendall(b"}")
            assert Counter(last_words(connection)[:12] for connection in halfway) == {b"HTTP/1.1 201": 20}


HOST, EMPTY = "Host: x\r\n", "Content-Length: 2\r\n"
# What is said above the token, and below the head, to a heartbeat; and the statuses that come back.
ODD_FIELDS = {
    "two lengths": (f"{HOST}{EMPTY}Content-Length: 3\r\n", "{}x", [400]),
    "the same length twice": (HOST + EMPTY * 2, "{}", [400]),
    "a list of lengths": (f"{HOST}Content-Length: 2, 2\r\n", "{}", [400]),
    "a negative length": (f"{HOST}Content-Length: -1\r\n", "", [400]),
    "a length with a sign": (f"{HOST}Content-Length: +2\r\n", "{}", [400]),
    "a length of 30 digits": (f"{HOST}Content-Length: {'9' * 30}\r\n", "", [400, 413]),
    "a length of 5,000 digits": (f"{HOST}Content-Length: {'9' * 5000}\r\n", "", [400]),
    "length and chunks": (f"{HOST}{EMPTY}Transfer-Encoding: chunked\r\n", "0\r\n\r\n", [400]),
    "chunked twice": (HOST + "Transfer-Encoding: chunked\r\n" * 2, "0\r\n\r\n", [400]),
    "chunked, or nearly": (f"{HOST}Transfer-Encoding: identity\r\n", "0\r\n\r\n", [400]),
    "a header of 18 kB": (f"{HOST}X-Long: {'x' * 18000}\r\n", "", [431]),
    "two hundred headers": (HOST + "X-Many: x\r\n" * 200, "", [431]),
    "a folded header": (f"{HOST}X-Folded: a\r\n b\r\n", "", [400]),
    "a header without a name": (f"{HOST}: x\r\n", "", [400]),
    "a space before the colon": (f"{HOST}X-Space : x\r\n", "", [400]),
    "no Host": ("", "", [200, 400]),
    "two Hosts": (HOST * 2, "", [400]),
    "a bad Host": ("Host: a b/c?\r\n", "", [200, 400]),
    "half an IPv6 Host": ("Host: [\r\n", "", [200, 400]),
    "an unknown expectation": (f"{HOST}Expect: magic\r\n", "", [417]),
    "an upgrade to HTTP/2": (f"{HOST}Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n", "", [200]),
}
ODD_LINES = {
    "HTTP/1.0": ("POST {path} HTTP/1.0", [200]),
    "HTTP/2.0": ("POST {path} HTTP/2.0", [400]),
    "a lower-case method": ("post {path} HTTP/1.1", [400]),
    "an absolute URI": ("POST http://x{path} HTTP/1.1", [200]),
    "an absolute URI with an escape": ("POST http://x{path}?x=%2f HTTP/1.1", [200]),
    "an absolute URI of another host": ("POST http://elsewhere:99999{path} HTTP/1.1", [200, 400, 404]),
    "half an IPv6 URI": ("POST http://[{path} HTTP/1.1", [400]),
    "two slashes": ("GET //sessions HTTP/1.1", [404]),
    "two slashes and half an IPv6 address": ("GET //[/sessions HTTP/1.1", [404]),
    "no slash": ("GET sessions HTTP/1.1", [400]),
    "NUL": ("GET /sessions/\0 HTTP/1.1", [400]),
    "NUL, encoded": ("GET /sessions/%00 HTTP/1.1", [404]),
    "a byte that is not ASCII": ("GET /sessions/\xe9 HTTP/1.1", [400, 404]),
    "a line of 5 kB": (f"GET /{'x' * 5000} HTTP/1.1", [414]),
    "CONNECT": ("CONNECT x:443 HTTP/1.1", [400, 404, 405]),
    "TRACE": ("TRACE /sessions HTTP/1.1", [405]),
    "OPTIONS *": ("OPTIONS * HTTP/1.1", [404, 405]),
    "GET *": ("GET * HTTP/1.1", [400]),
}
ODD = {
    **{name: ("POST {path} HTTP/1.1", *rest) for name, rest in ODD_FIELDS.items()},
    **{name: (line, HOST, "", expected) for name, (line, expected) in ODD_LINES.items()},
}


def converse(port: int, request: bytes) -> list[int]:
    """Send bytes; gives the statuses of all answers until the server closes."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(request)
        return [int(status) for status in re.findall(rb"HTTP/1\.[01] ([0-9]{3}) ", last_words(connection))]


@pytest.mark.parametrize("name", ODD)
def test_odd_request(port: int, name: str) -> None:
    """An odd request gets one proper answer and never a 5xx, and the service goes on."""
    line, fields, body, expected = ODD[name]
    path = open_session(port)
    head = f"{line.format(path=path)}\r\n{fields}{AUTHORIZATION}Connection: close\r\n\r\n"
    [status] = converse(port, (head + body).encode("latin-1"))
    assert status in expected
    assert beats(port, path, 1)


@pytest.mark.parametrize(
    "request_",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", b"GET /healthz\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
    ids=["TLS", "HTTP/0.9", "HTTP/2"],
)
def test_other_protocol(port: int, request_: bytes) -> None:
    """What is no HTTP/1 request is a 400."""
    assert converse(port, request_) == [400]


def test_bare_line_feeds(port: int) -> None:
    """A head whose lines end in LF alone is a 400 and not a request."""
    head = f"POST {open_session(port)} HTTP/1.1\n{HOST.strip()}\n{AUTHORIZATION.strip()}\n\n\r\n\r\n"
    assert converse(port, head.encode()) == [400]


def test_pipelined(port: int) -> None:
    """Pipelined requests are answered in their order."""
    path = open_session(port)
    lines = [f"POST {path}", "GET /nothing", f"POST {path}", f"GET {path.removesuffix('/heartbeat')}", "GET /healthz"]
    requests = [f"{line} HTTP/1.1\r\n{HOST}{AUTHORIZATION}\r\n" for line in lines]
    requests.append(f"POST {path} HTTP/1.1\r\n{HOST}{AUTHORIZATION}Connection: close\r\n\r\n")
    assert converse(port, "".join(requests).encode()) == [200, 404, 200, 200, 200, 200]


def test_expect_continue(port: int) -> None:
    """A client that expects 100-continue is told to go on before the body is sent."""
    head = f"POST /sessions HTTP/1.1\r\n{HOST}{AUTHORIZATION}Connection: close\r\nExpect: 100-continue\r\n"
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n{EMPTY}\r\n".encode())
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"{}")
        assert last_words(connection).startswith(b"HTTP/1.1 201 ")
