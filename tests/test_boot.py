"""What the service says about its Redis when it starts, once and in a line each, and what keeps it from starting."""

import http.client
import json
import os
import re
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.conftest import SECRET, token
from tests.servers import PERSISTENT, ROOT, RedisServer, free_port, gunicorn_logged, log_lines, until

EVICTS = "Redis may evict live sessions: maxmemory-policy is allkeys-lru, not noeviction"
FORGETS = "Redis has neither persistence nor a replica: a restart ends all sessions"
WRONG_PASSWORD = "not-the-right-password"


def settings(url: str) -> dict[str, str]:
    """The least that the service needs in its environment."""
    return {"REDIS_URL": url, "JWT_SECRET": SECRET}


def run(url: str, *command: str) -> subprocess.CompletedProcess:
    """Run a command of the service to its end; it is given half a minute."""
    environ = {"PATH": os.environ["PATH"], "PORT": str(free_port()), **settings(url)}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=30
    )


def said(url: str) -> list[str]:
    """What `python -m wsgi` says about a Redis that the service starts with."""
    looked = run(url, "wsgi")
    assert (looked.returncode, looked.stderr) == (0, "")
    return looked.stdout.splitlines()


def warned(file: Path) -> list[str]:
    """The warnings in the service's own log."""
    return [line["event"] for line in log_lines(file) if line["level"] == "WARNING"]


def status(port: int, method: str, path: str) -> int:
    """Send a request with a token; gives the status of the answer."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request(method, path, headers={"Authorization": f"Bearer {token()}"})
        return connection.getresponse().status


@contextmanager
def old_redis(version: str) -> Iterator[str]:
    """Something that answers like a Redis of another version, as far as a start asks; gives its URL."""
    info = f"redis_version:{version}\r\nmaxmemory_policy:noeviction\r\naof_enabled:1\r\n".encode()
    answers = {b"PING": b"+PONG\r\n", b"INFO": b"$%d\r\n%s\r\n" % (len(info), info), b"CONFIG": b"*0\r\n"}

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while header := self.rfile.readline():
                words = []
                for _ in range(int(header[1:])):
                    length = int(self.rfile.readline()[1:])
                    words.append(self.rfile.read(length + 2)[:-2])
                self.wfile.write(answers.get(words[0].upper(), b"+OK\r\n"))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"redis://127.0.0.1:{server.server_address[1]}/0"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "options, expected",
    [
        (PERSISTENT, []),
        (("--save", "60 1"), []),
        ((), [FORGETS]),
        ((*PERSISTENT, "--maxmemory-policy", "allkeys-lru"), [EVICTS]),
        (("--maxmemory-policy", "allkeys-lru"), [EVICTS, FORGETS]),
    ],
)
def test_findings(folder: Path, options: tuple[str, ...], expected: list[str]) -> None:
    """A Redis that would lose sessions is described in a line for each reason, and a healthy one in none."""
    with RedisServer(folder, *options) as server:
        assert said(server.url) == expected


def test_replica_counts(folder: Path) -> None:
    """A Redis without persistence that has a replica is a healthy one."""
    port, replica = free_port(), folder / "replica"
    replica.mkdir()
    with RedisServer(folder, "--port", str(port), "--repl-diskless-sync-delay", "0") as server:
        with RedisServer(replica, "--replicaof", "127.0.0.1", str(port)):
            until(lambda: server.client.info("replication")["connected_slaves"] == 1, 20)
            assert said(server.url) == []


@pytest.mark.parametrize(
    "options, expected", [(PERSISTENT, []), (("--maxmemory-policy", "allkeys-lru"), [EVICTS, FORGETS])]
)
def test_once_for_all_workers(folder: Path, tmp_path: Path, options: tuple[str, ...], expected: list[str]) -> None:
    """Gunicorn logs each finding once and not once for each worker, and nothing about a healthy Redis."""
    file = tmp_path / "log"
    with RedisServer(folder, *options) as server, gunicorn_logged(settings(server.url), file, workers=3) as (_, port):
        until(lambda: status(port, "GET", "/readyz") == 200)
        assert warned(file) == expected


@pytest.mark.parametrize("place", ["redis://127.0.0.1:{port}/0", "unix:///nowhere/redis.sock"])
def test_nobody_there(place: str) -> None:
    """That no Redis answers is said in one line and is no reason not to start."""
    [line] = said(place.format(port=free_port()))
    assert line.startswith("Redis does not answer: ConnectionError: ")


def test_heals(folder: Path, tmp_path: Path) -> None:
    """The service starts without Redis, says so once, answers 500 and 503, and heals when Redis comes."""
    port, file = free_port(), tmp_path / "log"
    with gunicorn_logged(settings(f"redis://127.0.0.1:{port}/0"), file, workers=2) as (_, http_port):
        assert status(http_port, "POST", "/sessions") == 500
        assert status(http_port, "GET", "/readyz") == 503
        assert status(http_port, "GET", "/healthz") == 200
        with RedisServer(folder, "--port", str(port)):
            until(lambda: status(http_port, "GET", "/readyz") == 200)
            assert status(http_port, "POST", "/sessions") == 201
    [line] = warned(file)[:1]
    assert line.startswith("Redis does not answer: ConnectionError: ")
    assert sum(line.startswith("Redis does not answer") for line in warned(file)) == 1


@pytest.mark.parametrize("version, code", [("6.2.14", 1), ("5.0.7", 1), ("7.0.0", 0), ("7.2.4", 0), ("10.0.1", 0)])
def test_version(version: str, code: int) -> None:
    """A Redis below 7.0 is refused with exit code 1 and one line that names its version."""
    with old_redis(version) as url:
        looked = run(url, "wsgi")
    expected = f"Redis {version} is too old: 7.0 or later is needed\n" if code else ""
    assert (looked.returncode, looked.stdout, looked.stderr) == (code, expected, "")


def test_gunicorn_refuses_old_redis() -> None:
    """Gunicorn does not start on a Redis below 7.0; its exit code is 1 and its log says why."""
    with old_redis("6.2.14") as url:
        served = run(url, "gunicorn", "wsgi:app")
    assert served.returncode == 1
    assert served.stdout.count("Redis 6.2.14 is too old: 7.0 or later is needed") == 1
    assert "Traceback" not in served.stdout + served.stderr


def test_preload_is_refused() -> None:
    """Gunicorn does not start with --preload: its log says why in a line, and its exit code is 1."""
    served = run(f"redis://127.0.0.1:{free_port()}/0", "gunicorn", "--preload", "wsgi:app")
    assert served.returncode == 1
    [line] = [json.loads(line) for line in served.stdout.splitlines() if "ERROR" in line]
    assert line["event"].startswith("--preload (preload_app) is refused: ")
    assert "Booting worker" not in served.stdout and "Traceback" not in served.stdout + served.stderr


@pytest.mark.parametrize("forbidden", ["", "-info"])
def test_cluster_as_one_server(folder: Path, forbidden: str) -> None:
    """A cluster behind the URL of one server would be served by half: the start is refused, naming the scheme."""
    port = free_port()
    while port > 55_000:  # the nodes talk to each other 10,000 ports further up
        port = free_port()
    with RedisServer(folder, "--port", str(port), "--cluster-enabled", "yes", *PERSISTENT) as server:
        server.client.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~*", "+@all", *forbidden.split())
        looked = run(f"redis://app:pw@127.0.0.1:{port}", "wsgi")
    expected = "Redis is a cluster: REDIS_URL must begin with redis+cluster://, or rediss+cluster:// over TLS"
    assert (looked.returncode, looked.stdout.splitlines(), looked.stderr) == (1, [expected], "")


@pytest.fixture
def restricted(folder: Path) -> Iterator[tuple[RedisServer, str]]:
    """A healthy Redis on TCP with a user whose name and password need encoding; the URL's place is left open."""
    port = free_port()
    with RedisServer(folder, *PERSISTENT, "--maxmemory-policy", "allkeys-lru", "--port", str(port)) as server:
        yield server, f"redis://%s@127.0.0.1:{port}/0"


@pytest.mark.parametrize("forbidden, expected", [("-info", []), ("-config", [EVICTS]), ("-info -config", [])])
def test_forbidden_questions(restricted: tuple[RedisServer, str], forbidden: str, expected: list[str]) -> None:
    """What a hosted Redis forbids to ask is neither an error nor a warning; what it tells is still looked at."""
    server, url = restricted
    server.client.execute_command("ACL", "SETUSER", "app", "on", ">p@ss word", "~*", "+@all", *forbidden.split())
    assert said(url % "app:p%40ss%20word") == expected


def test_forbidden_questions_do_not_hinder(restricted: tuple[RedisServer, str], tmp_path: Path) -> None:
    """The service serves sessions with a user who may ask neither CONFIG nor INFO."""
    server, url = restricted
    server.client.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~session*", "+@all", "-config", "-info")
    with gunicorn_logged(settings(url % "app:pw"), tmp_path / "log") as (_, port):
        assert [status(port, *each) for each in (("POST", "/sessions"), ("GET", "/readyz"))] == [201, 200]
    assert warned(tmp_path / "log") == []


def test_wrong_password(restricted: tuple[RedisServer, str], tmp_path: Path) -> None:
    """A wrong password is said in one line, which does not hold it, and the log does not hold it either."""
    _, url = restricted
    [line] = said(url % f"app:{WRONG_PASSWORD}")
    assert re.match(r"Redis does not answer: AuthenticationError: ", line)
    with gunicorn_logged(settings(url % f"app:{WRONG_PASSWORD}"), tmp_path / "log") as (_, port):
        assert [status(port, *each) for each in (("POST", "/sessions"), ("GET", "/readyz"))] == [500, 503]
    assert WRONG_PASSWORD not in line + (tmp_path / "log").read_text()
