"""The commands under `flask --app wsgi`."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from click.testing import Result
from flask import Flask

from tests.conftest import SECRET, Caller
from tests.servers import ROOT


def run(app: Flask, *words: str) -> Result:
    return app.test_cli_runner().invoke(args=list(words))


def test_token(app: Flask) -> None:
    """A printed token works."""
    alice = Caller(app)
    alice.headers = {"Authorization": f"Bearer {run(app, 'token', 'alice').output.strip()}"}
    assert alice.get("/sessions").status_code == 200


def test_token_claims(make_app: Callable[..., Flask]) -> None:
    """A printed token has the issuer, the audience and the subject claim that are asked for."""
    app = make_app(jwt_issuer="me", jwt_audience=("you", "them"), jwt_subject_claim="userId")
    alice = Caller(app)
    alice.headers = {"Authorization": f"Bearer {run(app, 'token', 'alice').output.strip()}"}
    assert alice.get("/sessions").status_code == 200


@pytest.mark.parametrize("subject", ["", "x" * 257])
def test_token_of_nobody(app: Flask, subject: str) -> None:
    """A token that the service would refuse is not printed."""
    result = run(app, "token", subject)
    assert (result.exit_code, result.output) == (1, "Error: a subject has 1 to 256 characters\n")


def test_token_of_an_issuer(make_app: Callable[..., Flask]) -> None:
    """Without a secret there is no token."""
    result = run(make_app(jwt_secret=(), jwt_jwks_url="http://127.0.0.1:9/"), "token", "alice")
    assert result.exit_code == 1
    assert "JWT_SECRET" in result.output


def test_list(app: Flask, alice: Caller, bob: Caller) -> None:
    """A subject's sessions are listed with what is known of them, and nobody else's."""
    id, other = alice.open(deviceName="Tablet"), bob.open()
    output = run(app, "sessions", "list", "alice").output
    assert id in output and "Tablet" in output and other not in output


def test_list_what_cannot_be_printed(app: Flask, alice: Caller) -> None:
    """What a device calls itself moves no cursor and makes no line of its own."""
    alice.open(deviceName="Tab\x1b[2Jlet\nroot")
    output = run(app, "sessions", "list", "alice").output
    assert output.endswith("Tab\ufffd[2Jlet\ufffdroot, 127.0.0.1\n") and output.count("\n") == 1


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis is not there."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("gone")

    monkeypatch.setattr("app.scripts._send", fail)


@pytest.mark.usefixtures("gone")
@pytest.mark.parametrize("command", [["list", "alice"], ["revoke", "alice"], ["revoke", "alice", "--id", "A" * 32]])
def test_sessions_without_redis(app: Flask, command: list[str]) -> None:
    """Where Redis is in trouble one line says so."""
    result = run(app, "sessions", *command)
    assert (result.exit_code, result.output) == (1, "Error: Redis is in trouble: OSError: gone\n")


def test_nothing_beside_the_one_line() -> None:
    """In a terminal, where no log is configured, no line of a log stands beside it."""
    environ = {"PATH": os.environ["PATH"], "REDIS_URL": "redis://127.0.0.1:1", "JWT_SECRET": SECRET}
    command = [sys.executable, "-m", "flask", "--app", "wsgi", "sessions", "list", "alice"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("Error: Redis is in trouble: ConnectionError: ")


def test_revoke_one(app: Flask, alice: Caller) -> None:
    """One session of a subject is ended by its id."""
    id, other = alice.open(), alice.open()
    assert run(app, "sessions", "revoke", "alice", "--id", id).output == "1 revoked\n"
    assert alice.ids() == [other]
    assert run(app, "sessions", "revoke", "alice", "--id", id).exit_code == 1


def test_revoke_all(app: Flask, alice: Caller, bob: Caller) -> None:
    """All sessions of a subject are ended, and nobody else's."""
    alice.open(), alice.open()
    id = bob.open()
    assert run(app, "sessions", "revoke", "alice").output == "2 revoked\n"
    assert (alice.ids(), bob.ids()) == ([], [id])


def test_pseudonym(app: Flask) -> None:
    """What stands for a name in the logs is the same each time, and another one for another name."""
    alice, again, bob = (run(app, "pseudonym", name).output for name in ("alice", "alice", "bob"))
    assert alice == again != bob
