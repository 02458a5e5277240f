"""The loops in examples/ as a device runs them: real processes, a real service, and what gets in the way."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import SECRET, token
from tests.servers import PERSISTENT, ROOT, RedisServer, gunicorn, required, running, until

Start = Callable[..., list["Loop"]]


class Loop:
    """One of the examples, started, and what it has printed so far. Its subject is its name."""

    def __init__(self, name: str, process: subprocess.Popen, tokens: Path) -> None:
        self.name = name
        self.process = process
        self.lines: list[str] = []
        self._seen = 0
        self._tokens = tokens
        # It ends when neither the process nor one that it has started can print any more.
        self.reader = threading.Thread(target=lambda: self.lines.extend(map(str.strip, process.stdout)))
        self.reader.start()

    def __repr__(self) -> str:
        return f"{self.name}: {self.lines}"

    @property
    def ids(self) -> list[str]:
        """The sessions that it has opened."""
        return [line.split()[1] for line in self.lines if line.startswith("opened ")]

    def stopped(self) -> str:
        """Wait until it has ended with exit code 1; gives its last line."""
        assert self.process.wait(15) == 1, self
        self.reader.join()
        return self.lines[-1]

    def wait_for(self, line: str, seconds: float = 15.0) -> None:
        """Wait for a line, given as a pattern, behind the one that was waited for last."""

        def printed() -> bool:
            while self._seen < len(self.lines):
                self._seen += 1
                if re.fullmatch(line, self.lines[self._seen - 1]):
                    return True
            return False

        try:
            until(printed, seconds)
        except AssertionError:
            pytest.fail(f"no {line!r} from {self}")

    def give_token(self, **claims: object) -> None:
        """From now on TOKEN_COMMAND prints this token."""
        self._tokens.write_text(token(self.name, **claims))


@contextmanager
def loop(name: str, command: list[str], environ: dict[str, str], tokens: Path) -> Iterator[Loop]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # What runs in the background, such as this suite under `make test &`, ignores SIGINT, and so does all it starts.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with running(command, env={"PATH": os.environ["PATH"], **environ}, **options) as process:
        started = Loop(name, process, tokens)
        yield started
    started.reader.join()
    process.stdout.close()


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts the three loops on an address; each with a token, or else with a command that prints what it was given."""
    required("curl")
    if os.environ.get("CI") != "true":
        pytest.importorskip("requests")
    programs = {"sh": required("sh"), "py": sys.executable, "mjs": required("node")}

    with ExitStack() as stack:

        def start(url: str, with_token: bool = False, **claims: object) -> list[Loop]:
            loops = []
            for name, program in programs.items():
                tokens = folder / f"{name}.jwt"
                environ = {"TOKEN": token(name, **claims)} if with_token else {"TOKEN_COMMAND": f"cat '{tokens}'"}
                environ["SESSIONS_URL"] = url.replace("SUBJECT", name)
                command = [program, str(ROOT / "examples" / f"heartbeat.{name}")]
                loops.append(stack.enter_context(loop(name, command, environ, tokens)))
            return loops

        yield start


def environ(server: RedisServer, idle: int) -> dict[str, str]:
    """The service's configuration: an idle timeout in seconds, exact about tokens."""
    return {
        "REDIS_URL": server.url,
        "JWT_SECRET": SECRET,
        "JWT_LEEWAY_SECONDS": "0",
        "SESSION_IDLE_SECONDS": str(idle),
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def url(server: RedisServer) -> Iterator[str]:
    """The service's sessions, which end after 3 seconds without a heartbeat."""
    with gunicorn(environ(server, idle=3)) as base:
        yield f"{base}/sessions"


def call(url: str, subject: str, action: str, body: bytes | None = None) -> int:
    """Call an endpoint as a subject; gives the status."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=10)
    try:
        headers = {"Authorization": f"Bearer {token(subject)}", "Content-Type": "application/json"}
        connection.request("POST", f"/sessions/{action}", body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.timed
def test_stays_alive(start: Start, server: RedisServer, url: str) -> None:
    """A loop keeps the session that it has opened alive, well past the idle timeout."""
    loops = start(url, with_token=True)
    for each in loops:
        each.wait_for("renewed for 3 s")
    before = [len(each.lines) for each in loops]
    time.sleep(5)
    for each, lines in zip(loops, before):
        assert len(each.ids) == 1, each
        assert set(each.lines[1:]) == {"renewed for 3 s"}, each
        assert server.client.exists(f"session:{{{each.name}}}:{each.ids[0]}"), each
        assert 3 <= len(each.lines) - lines <= 8, each


@pytest.fixture
def frail(folder: Path) -> Iterator[tuple[RedisServer, str]]:
    """A Redis to be hurt, which remembers over a restart what it was told, and the sessions of a service on it."""
    with RedisServer(folder, *PERSISTENT) as server:
        # Two thirds may be gone before the last of the loops meets the trouble, and a Retry-After of 2 s follows.
        with gunicorn({**environ(server, idle=12), "REDIS_TIMEOUT_SECONDS": "0.1"}) as base:
            yield server, f"{base}/sessions"


@pytest.mark.parametrize("trouble", ["hangs", "restarts"])
def test_redis_in_trouble(frail: tuple[RedisServer, str], start: Start, trouble: str) -> None:
    """A loop goes on with its session after Redis has hung, or has died and come back with its data."""
    server, url = frail
    loops = start(url, with_token=True)
    for each in loops:
        each.wait_for("renewed for 12 s")
    if trouble == "hangs":
        server.process.send_signal(signal.SIGSTOP)
    else:
        server.stop()
    for each in loops:
        each.wait_for(r"waiting [12]\.0 s after 500")
    if trouble == "hangs":
        server.process.send_signal(signal.SIGCONT)
    else:
        server.start()
    for each in loops:
        each.wait_for("renewed for 12 s")
        assert len(each.ids) == 1, each


def test_device_name(start: Start, server: RedisServer, url: str) -> None:
    """A loop opens its session under the name of its machine."""
    for each in start(url, with_token=True):
        each.wait_for("opened .*")
        assert server.client.hget(f"session:{{{each.name}}}:{each.ids[0]}", "device") == socket.gethostname(), each


def test_refused_for_good(start: Start, url: str) -> None:
    """A loop ends with the service's sentence where waiting would not help: a wrong path, a token that is too long."""
    for loops, sentence in (
        (start(f"{url}typo", with_token=True), "stopped after 404: Not found"),
        (start(f"{url}/typo", with_token=True), "stopped after 405: Method not allowed"),
        (start(url, with_token=True, groups="g" * 20_000), "stopped after 431: Request header fields too large"),
    ):
        assert [each.stopped() for each in loops] == [sentence] * 3


def test_revoked(start: Start, url: str) -> None:
    """When its session has been revoked a loop opens a new one and keeps that alive."""
    loops = start(url, with_token=True)
    for each in loops:
        each.wait_for("renewed for 3 s")
        assert call(url, each.name, f"{each.ids[0]}/revoke") == 200
    for each in loops:
        each.wait_for("session over, opening a new one")
        each.wait_for("opened .*", seconds=2)
        each.wait_for("renewed for 3 s", seconds=2)
        assert len(set(each.ids)) == 2, each
        assert [line for line in each.lines if "waiting" in line] == [], each


def test_signed_out(start: Start, server: RedisServer, url: str) -> None:
    """When its subject has been signed out a loop ends with that sentence, and asks for no other token."""
    loops = start(url)
    for each in loops:
        each.give_token(iat=int(time.time()) - 60)
    for each in loops:
        each.wait_for("renewed for 3 s")
        assert call(url, each.name, "revoke-all", b'{"refuseEarlierTokens": true}') == 200
    for each in loops:
        each.wait_for("session over, opening a new one")
        each.wait_for("stopped after 401: The token was issued before the sign-out")
        assert each.process.wait(5) == 1, each
        assert each.lines.count("new token") == 1, each
    server.client.flushall()  # the other tests' tokens do not say when they were issued


def test_token_expires(start: Start, url: str) -> None:
    """When its token has expired a loop gets a new one and goes on with the same session."""
    loops = start(url)
    for each in loops:
        each.give_token(exp=int(time.time()) + 6)
    for each in loops:
        each.wait_for("new token")
        each.wait_for("renewed for 3 s")
        each.give_token()
    for each in loops:
        each.wait_for("new token")
        each.wait_for("renewed for 3 s", seconds=2)
        assert len(each.ids) == 1, each


def test_token_comes_late(start: Start, url: str) -> None:
    """While it gets no token or a bad one a loop tries ever more rarely, and with a good one it begins."""
    loops = start(url)
    for each in loops:
        each.wait_for("waiting .* s after (no token|CalledProcessError|Error)")
        each.give_token(secret=SECRET[::-1])
    time.sleep(2)
    for each in loops:
        assert 1 < len(each.lines) < 15, each
        each.wait_for("waiting .* s after 401")
        each.give_token()
    for each in loops:
        each.wait_for("opened .*")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stops(start: Start, url: str, number: int) -> None:
    """A signal ends a loop and all its processes with exit code 0: at rest, in trouble, and waiting for an answer."""
    with socket.create_server(("127.0.0.1", 0)) as silent, ExitStack() as unanswered:
        silent.settimeout(15)
        at_rest = start(url, with_token=True)
        in_trouble = start("http://127.0.0.1:1/sessions", with_token=True)
        without_answer = start(f"http://127.0.0.1:{silent.getsockname()[1]}/sessions", with_token=True)
        for each in at_rest:
            each.wait_for("renewed .*")
        for each in in_trouble:
            each.wait_for("waiting .*")
        for _ in without_answer:
            unanswered.enter_context(silent.accept()[0])
        for each in (loops := at_rest + in_trouble + without_answer):
            each.process.send_signal(number)
        end = time.monotonic() + 2
        for each in loops:
            assert each.process.wait(max(0, end - time.monotonic())) == 0, each
            each.reader.join(1)
            assert not each.reader.is_alive(), each


SILENCE, BREAK_OFF = -1, -2
HTML, RETRY = {"Content-Type": "text/html"}, {"Retry-After": "1"}
# What a heartbeat may be answered without its session being over, and what a loop has to say about it.
TROUBLES: list[tuple[int, dict[str, str], str]] = [
    (SILENCE, {}, "after (curl 28|ReadTimeout|TimeoutError)"),
    (BREAK_OFF, {}, "after (curl 52|ConnectionError|UND_ERR_SOCKET)"),
    (429, RETRY, "waiting 1.0 s after 429"),
    (500, {}, "after 500"),
    (503, {}, "after 503"),
    (502, HTML, "after 502"),
    (404, HTML, "after 404"),
    (404, {}, "after 404"),
    (400, HTML, "after 400"),
    (403, {}, "after 403"),
    (200, HTML, "after 200"),
    (307, {"Location": "/elsewhere"}, "after 307"),
    (500, {"Retry-After": "soon"}, "after 500"),
    (500, {"Retry-After": "0"}, "waiting 0.2 s after 500"),
]


class Troubled(BaseHTTPRequestHandler):
    """Opens sessions, and answers every other heartbeat with the next trouble, or those of a status with this one."""

    server: "TroubledServer"

    def do_POST(self) -> None:
        self.server.times[self.path].append(time.monotonic())
        subject, status = self.path.split("/")[1:3]
        if self.path.endswith("/sessions"):
            expires_in = {"Session-Expires-In": "3" if status == "404" else "0"}
            self.answer(201, expires_in, b'{"success": true, "session": {"id": "%b"}}' % (b"A" * 32))
            return
        if status.isdecimal():
            self.answer(int(status), {}, b'{"success": false, "error": "Session not found"}')
            return
        number, is_trouble = divmod(self.server.beats[self.path], 2)
        self.server.beats[self.path] += 1
        if not is_trouble or number >= len(TROUBLES):
            self.answer(200, {"Session-Expires-In": "0"})
            return
        status, headers, _ = TROUBLES[number]
        if status == SILENCE:
            self.server.over.wait(10)
        elif status != BREAK_OFF:
            self.answer(status, headers)

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"{}") -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class TroubledServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Troubled)
        self.beats: Counter[str] = Counter()
        self.times: defaultdict[str, list[float]] = defaultdict(list)
        self.over = threading.Event()


@pytest.fixture
def troubled() -> Iterator[TroubledServer]:
    """Something that has a session for each subject, and much on the way to it that goes wrong."""
    with TroubledServer() as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.05,))
        thread.start()
        yield httpd
        httpd.over.set()
        httpd.shutdown()
        thread.join()


def test_nothing_else_ends_a_session(start: Start, troubled: TroubledServer) -> None:
    """Whatever goes wrong on the way, a loop waits, for as long as it is told to, and goes on with its session."""
    loops = start(f"http://127.0.0.1:{troubled.server_port}/SUBJECT/sessions", with_token=True)
    for _, _, said in TROUBLES:
        for each in loops:
            each.wait_for("renewed for 0 s")
            each.wait_for(f".*{said}")
    for each in loops:
        each.wait_for("renewed for 0 s")
        assert len(each.ids) == 1, each


@pytest.mark.parametrize("status", [400, 404, 405, 413, 415, 422, 431])
def test_final_answer(start: Start, troubled: TroubledServer, status: int) -> None:
    """A heartbeat that is refused for good ends a loop with the sentence; only that of an ended session opens anew."""
    loops = start(f"http://127.0.0.1:{troubled.server_port}/SUBJECT/{status}/sessions", with_token=True)
    for each in loops:
        assert each.stopped() == f"stopped after {status}: Session not found"
        assert len(each.ids) == 1, each
        [opened] = troubled.times[f"/{each.name}/{status}/sessions"]
        [beat] = troubled.times[f"/{each.name}/{status}/sessions/{each.ids[0]}/heartbeat"]
        # The first beat comes at a third of what the answer to opening says.
        assert status != 404 or 0.75 < beat - opened < 2, each
