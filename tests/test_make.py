"""`make run` and `make token`: what a newcomer sees, in a copy of the repository whose environment is ready."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jwt
import pytest
import requests

from tests.servers import ROOT, RedisServer, free_port, required, running, until

Served = tuple[Path, list[str], int]


def copied(tmp_path: Path) -> Path:
    """A copy with what `make run` needs, in which everything is installed already."""
    required("make")
    (tmp_path / ".venv").mkdir()
    for each in Path(sys.prefix).iterdir():
        if each.name in ("bin", "include", "lib", "lib64", "pyvenv.cfg"):
            (tmp_path / ".venv" / each.name).symlink_to(each)
    for name in ("app", "wsgi.py", "Makefile", "requirements.txt", *(each.name for each in ROOT.glob("gunicorn*.py"))):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name)
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "run").touch()
    return tmp_path


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return copied(tmp_path)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A copy in which `make run` serves in an empty environment, what it has said, and its port."""
    copy = copied(tmp_path_factory.mktemp("copy"))
    with run(copy) as (lines, port):
        yield copy, lines, port


def made(copy: Path, *words: str, **environ: str) -> subprocess.CompletedProcess:
    """A target that ends by itself."""
    env = {"PATH": os.environ["PATH"], **environ}
    return subprocess.run(["make", *words], cwd=copy, env=env, capture_output=True, text=True, timeout=60)


@contextmanager
def run(copy: Path, **environ: str) -> Iterator[tuple[list[str], int]]:
    """`make run` until it serves; gives what it has said up to then, and the port."""
    port, said = free_port(), copy / "said"
    env = {"PATH": os.environ["PATH"], "PORT": str(port), **environ}
    with said.open("w") as file, running(["make", "run"], cwd=copy, env=env, stdout=file, stderr=file) as process:

        def serving() -> bool:
            assert process.poll() is None, said.read_text()
            return requests.get(f"http://127.0.0.1:{port}/healthz").status_code == 200

        until(serving, 30)
        yield said.read_text().splitlines(), port


def pasted(lines: list[str]) -> str:
    """What the printed lines print when they are pasted into a shell."""
    start = lines.index("Paste this into another terminal:")
    script = "\n".join(lines[start + 2 : start + 9])
    environ = {"PATH": os.environ["PATH"], "no_proxy": "localhost"}
    return subprocess.run(["sh", "-c", script], env=environ, capture_output=True, text=True, timeout=30).stdout


def test_run(served: Served) -> None:
    """The lines to paste open, extend, list and revoke a session; it is kept in the process, which is said."""
    required("curl")
    _, lines, _ = served
    assert lines[0] == "Sessions are kept in the process and end with it: REDIS_URL is not set"
    opened, renewed, listed, revoked, over = pasted(lines).splitlines()
    assert '"Session opened successfully"' in opened and '"newExpiry"' in renewed and '"startedAt"' in listed
    assert '"Session revoked successfully"' in revoked and '"Session not found or expired"' in over


def test_localhost_only(served: Served) -> None:
    """What a newcomer tries out is not offered to the network."""
    with pytest.raises(ConnectionRefusedError):
        # An address of this machine, where a server that listens on all addresses is found.
        socket.create_connection(("127.0.0.2", served[2]), 1)


def test_token(served: Served) -> None:
    """`make token` makes tokens for the service that runs."""
    copy, _, port = served
    headers = {"Authorization": f"Bearer {made(copy, 'token', 'SUBJECT=bob').stdout.strip()}"}
    assert requests.get(f"http://127.0.0.1:{port}/sessions", headers=headers).status_code == 200


def test_token_of_nobody(copy: Path) -> None:
    """`make token` says how to name a subject."""
    assert made(copy, "token").stderr.count("must be named, as in: make token SUBJECT=bob") == 1


def test_secret(copy: Path) -> None:
    """The secret is kept for its owner alone, and the next token is signed with it, too."""
    tokens = [made(copy, "token", "SUBJECT=bob").stdout.strip() for _ in range(2)]
    file = copy / ".venv" / "secret"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [jwt.decode(each, file.read_text().strip(), ["HS256"])["sub"] for each in tokens] == ["bob", "bob"]


def test_busy_port(copy: Path) -> None:
    """With a busy port one line says so and names one that is free."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        result = made(copy, "run", PORT=str(port))
    assert result.returncode != 0
    [line] = result.stdout.splitlines()
    free = re.fullmatch(rf"Port {port} is in use\. Try: make run PORT=(\d+)", line)
    assert free and int(free[1]) > port


def test_dotenv(copy: Path, folder: Path) -> None:
    """What .env says counts where the environment says nothing else; the password of the store is not shown."""
    with RedisServer(folder, "--port", str(port := free_port()), "--save", "60 1") as server:
        server.client.execute_command("ACL", "SETUSER", "app", "on", ">hunter2", "~*", "+@all")
        url = f"redis://app:hunter2@127.0.0.1:{port}/0"
        (copy / ".env").write_text(f"# a note\n\nREDIS_URL={url}\nJWT_SECRET={'s' * 32} {'t' * 32}\nPORT=1\nLOG_KEY=")
        with run(copy) as (lines, http_port):
            headers = {"Authorization": f"Bearer {made(copy, 'token', 'SUBJECT=bob').stdout.strip()}"}
            assert requests.post(f"http://127.0.0.1:{http_port}/sessions", headers=headers).status_code == 201
    assert f"Sessions are kept in redis://127.0.0.1:{port}/0" in lines
    assert "hunter2" not in "\n".join(lines)
    assert not (copy / ".venv" / "secret").exists()


def test_redis_away(copy: Path) -> None:
    """Where Redis is away this is said above the lines to paste, and these show that the open failed."""
    with run(copy, REDIS_URL=f"redis://127.0.0.1:{free_port()}", WEB_CONCURRENCY="1") as (lines, _):
        assert lines[0].startswith("Redis does not answer: ConnectionError: ")
        assert '"Failed to open session"' in pasted(lines).splitlines()[0]


def test_refused(copy: Path) -> None:
    """Where the configuration is refused this is all that is said."""
    result = made(copy, "run", SESSION_LIMIT="many")
    assert result.returncode != 0
    assert "SESSION_LIMIT='many': Not a valid integer" in result.stderr and result.stdout == ""


def test_dotenv_is_for_make(copy: Path) -> None:
    """The service by itself, as tests start it, does not read .env."""
    (copy / ".env").write_text("REDIS_URL=redis://127.0.0.1:1\n")
    environ = {"PATH": os.environ["PATH"], "JWT_SECRET": "s" * 32}
    looked = subprocess.run([sys.executable, "wsgi.py"], cwd=copy, env=environ, capture_output=True, text=True)
    assert "REDIS_URL: must be set" in looked.stderr
