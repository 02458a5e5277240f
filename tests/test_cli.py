"""The commands under `flask --app wsgi`."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
import time_machine
from click.testing import Result
from flask import Flask

from app.cli import commands_only
from app.config import Config, ConfigError
from tests.conftest import SECRET, Caller, Log, token
from tests.servers import ROOT, RedisServer, gunicorn_logged, log_lines, until


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


def test_token_after_a_sign_out(app: Flask, alice: Caller) -> None:
    """A printed token says when it was issued, so that it opens a session after a sign-out."""
    now = time.time()
    with time_machine.travel(now - 10):
        assert alice.post("/sessions/revoke-all", json={"refuseEarlierTokens": True}).status_code == 200
    with time_machine.travel(now + 10):
        alice.headers = {"Authorization": f"Bearer {run(app, 'token', 'alice').output.strip()}"}
        assert alice.post("/sessions").status_code == 201


@pytest.mark.parametrize("words", [["token"], ["sessions", "list"], ["sessions", "revoke"], ["sessions", "watch"]])
@pytest.mark.parametrize("subject", ["", "x" * 257, "\udcff"])
def test_nobody(app: Flask, words: list[str], subject: str) -> None:
    """A subject that the service would refuse is refused in one line."""
    result = run(app, *words, subject)
    assert (result.exit_code, result.output) == (1, "Error: a subject has 1 to 256 characters of UTF-8\n")


@pytest.mark.parametrize(
    "environ, problem",
    [
        ({"JWT_SECRET": "short"}, "JWT_SECRET: every secret must have"),
        ({}, "JWT_SECRET, JWT_PUBLIC_KEY, JWT_JWKS_URL:"),
    ],
)
def test_pseudonym_without_its_key(environ: dict[str, str], problem: str) -> None:
    """Where a secret was refused or forgotten nothing is made of the URL of Redis instead: it would stand in no log."""
    code, output, error = commands_in({"REDIS_URL": "redis://host", **environ}, "pseudonym", "alice")
    assert (code, output) == (1, "") and problem in error


def test_pseudonym_with_a_refused_key(app: Flask) -> None:
    """With a LOG_KEY that no service takes nothing is printed that would stand in no log."""
    code, output, error = commands_in({"JWT_SECRET": SECRET, "LOG_KEY": "short"}, "pseudonym", "alice")
    assert (code, output) == (1, "") and "LOG_KEY: " in error


def test_token_of_an_issuer(make_app: Callable[..., Flask]) -> None:
    """Without a secret there is no token."""
    result = run(make_app(jwt_secret=(), jwt_jwks_url="http://127.0.0.1:9/"), "token", "alice")
    assert result.exit_code == 1
    assert "JWT_SECRET" in result.output


def test_list(app: Flask, alice: Caller, bob: Caller) -> None:
    """A subject's sessions are listed with what is known of them, and no other subject's."""
    id, other = alice.open(deviceName="Tablet"), bob.open()
    head, line, count = run(app, "sessions", "list", "alice").output.splitlines()
    assert head.split() == [
        "session",
        "started",
        "last",
        "active",
        "expires",
        "login,",
        "device,",
        "address,",
        "location",
    ]
    [session] = alice.get("/sessions").json["sessions"]
    times = [session["startedAt"], session["lastActivity"], session["expiresAt"]]
    assert line.split() == [id, *times, "token,", "Tablet,", "127.0.0.1"]
    assert [head.index(word) for word in ("started", "last active", "expires")] == [line.index(times[0]), 60, 86]
    assert count == "live sessions: 1"
    assert other not in line


def test_list_as_json(app: Flask, alice: Caller) -> None:
    """The list is there as JSON for programs, in the words of the API."""
    alice.open(deviceName="Tablet"), alice.open()
    result = run(app, "sessions", "list", "alice", "--json")
    assert json.loads(result.stdout) == alice.get("/sessions").json["sessions"]
    assert result.exit_code == 0


@pytest.mark.parametrize("options, stdout", [((), "live sessions: 0\n"), (("--json",), "[]\n")])
def test_list_of_nobody(app: Flask, options: tuple[str, ...], stdout: str) -> None:
    """Where there is no session to list the exit code is 1."""
    result = run(app, "sessions", "list", "nobody", *options)
    assert (result.exit_code, result.stdout) == (1, stdout)


def commands_in(environ: dict[str, str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `flask --app wsgi` in an environment."""
    command = [sys.executable, "-m", "flask", "--app", "wsgi", *words]
    environ = {"PATH": os.environ["PATH"], "FLASK_SKIP_DOTENV": "1", **environ}  # what a developer's .env says
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout, done.stderr


SECRETS = "JWT_SECRET, JWT_PUBLIC_KEY, JWT_JWKS_URL: exactly one must be set, not none"


@pytest.mark.parametrize(
    "command, error",
    [
        (["token", "alice"], SECRETS),
        (["pseudonym", "alice"], "LOG_KEY or JWT_SECRET must be set, as the service has it"),
        (["sessions", "list", "alice"], f"REDIS_URL: must be set; {SECRETS}"),
        (["sessions", "revoke", "alice"], f"REDIS_URL: must be set; {SECRETS}"),
    ],
)
def test_empty_environment(command: list[str], error: str) -> None:
    """In an empty environment a command says in one line what it lacks."""
    assert commands_in({}, *command) == (1, "", f"Error: {error}\n")


def test_help_in_an_empty_environment() -> None:
    """The commands are listed in an empty environment."""
    code, stdout, stderr = commands_in({}, "--help")
    assert (code, stderr) == (0, "")
    assert all(f"\n  {name} " in stdout for name in ("doctor", "pseudonym", "sessions", "token"))


def test_doctor_in_an_empty_environment() -> None:
    """The doctor has a line for each variable that is missing."""
    lines = [f"failure  {problem}\n" for problem in ("REDIS_URL: must be set", SECRETS)]
    assert commands_in({}, "doctor") == (1, "".join(lines), "")


def test_token_with_a_bad_secret() -> None:
    """Where the secret is refused the token command says why, without repeating it."""
    error = "Error: JWT_SECRET: every secret must have 32 bytes or more\n"
    assert commands_in({"JWT_SECRET": "hunter2"}, "token", "alice") == (1, "", error)


def test_without_redis_url(app: Flask) -> None:
    """A secret is all that `token` and `pseudonym` need; their output is that of the whole service."""
    code, stdout, stderr = commands_in({"JWT_SECRET": SECRET}, "token", "alice")
    assert (code, stderr) == (0, "")
    caller = Caller(app)
    caller.headers = {"Authorization": f"Bearer {stdout.strip()}"}
    assert caller.get("/sessions").status_code == 200
    assert commands_in({"JWT_SECRET": SECRET}, "pseudonym", "alice") == (0, run(app, "pseudonym", "alice").output, "")


def test_served_without_configuration() -> None:
    """The app that commands get for a refused environment answers no request with anything but a failure."""
    with pytest.raises(ConfigError) as refusal:
        Config.from_env({})
    assert commands_only(refusal.value).test_client().get("/sessions").status_code == 500


def test_list_what_cannot_be_printed(app: Flask, alice: Caller) -> None:
    """What a device calls itself moves no cursor and makes no line of its own."""
    alice.open(deviceName="Tab\x1b[2Jlet\nroot")
    output = run(app, "sessions", "list", "alice").output
    assert output.splitlines()[1].endswith("Tab[2Jletroot, 127.0.0.1") and output.count("\n") == 3


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis is not there."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("gone")

    monkeypatch.setattr("app.store.runner._send", fail)


@pytest.mark.usefixtures("gone")
@pytest.mark.parametrize("command", [["list", "alice"], ["revoke", "alice"], ["revoke", "alice", "--id", "A" * 32]])
def test_sessions_without_redis(app: Flask, command: list[str]) -> None:
    """Where Redis is in trouble one line says so, behind the one of the log that says what may have ended."""
    result = run(app, "sessions", *command)
    *logged, line = result.output.splitlines()
    assert (result.exit_code, line) == (1, "Error: Redis is in trouble: OSError: gone")
    assert [json.loads(each)["event"] for each in logged] == ["revoke_uncertain"] * (command[0] == "revoke")


def test_nothing_beside_the_one_line() -> None:
    """In a terminal, where no log is configured, no line of a log stands beside it."""
    environ = {"REDIS_URL": "redis://127.0.0.1:1", "JWT_SECRET": SECRET}
    code, stdout, stderr = commands_in(environ, "sessions", "list", "alice")
    assert (code, stdout, stderr.count("\n")) == (1, "", 1)
    assert stderr.startswith("Error: Redis is in trouble: ConnectionError: ")


def test_revoke_one(app: Flask, alice: Caller) -> None:
    """One session of a subject is ended by its id."""
    id, other = alice.open(), alice.open()
    assert run(app, "sessions", "revoke", "alice", "--id", id).stdout == "1 revoked\n"
    assert alice.ids() == [other]
    assert run(app, "sessions", "revoke", "alice", "--id", id).exit_code == 1


@pytest.mark.parametrize("id", ["-" + "A" * 31, "--" + "A" * 30])
def test_id_with_hyphens(app: Flask, id: str) -> None:
    """An id that begins with hyphens is not taken for an option."""
    assert run(app, "sessions", "revoke", "alice", "--id", id).output == "Error: there is no such session\n"
    assert run(app, "pseudonym", id).exit_code == 0


def test_revoke_all(app: Flask, alice: Caller, bob: Caller) -> None:
    """All sessions of a subject are ended, and no other subject's."""
    alice.open(), alice.open()
    id = bob.open()
    assert run(app, "sessions", "revoke", "alice").stdout == "2 revoked\n"
    assert (alice.ids(), bob.ids()) == ([], [id])


def test_malformed_id(app: Flask, alice: Caller) -> None:
    """What cannot be an id is no session's."""
    id = alice.open()
    result = run(app, "sessions", "revoke", "alice", "--id", f"{id}\n")
    assert (result.exit_code, result.output) == (1, "Error: there is no such session\n")
    assert alice.ids() == [id]


def test_trace(app: Flask, alice: Caller, log: Log) -> None:
    """What the command line ends is counted, and is the line on stderr that the service would log for the same."""
    ids = [alice.open() for _ in range(4)]
    log.take()
    alice.revoke(ids[0])
    one = run(app, "sessions", "revoke", "alice", "--id", ids[1])
    all_ = run(app, "sessions", "revoke", "alice")
    served, *_ = log.take()
    revoked, all_revoked = (json.loads(result.stderr) for result in (one, all_))
    assert list(revoked) == ["level", "logger", "event", "pid", "subject", "session", "time"]
    assert (revoked["event"], all_revoked["event"], all_revoked["number"]) == ("session_revoked", "sessions_revoked", 2)
    assert revoked["subject"] == all_revoked["subject"] == served["subject"]
    assert revoked["session"] == run(app, "pseudonym", ids[1]).output.strip() != served["session"]
    assert "sessions_revoked_total 4.0" in app.test_client().get("/metrics").get_data(as_text=True)


def test_trace_in_a_terminal(redis_server: RedisServer, tmp_path: Path) -> None:
    """A line of the command line's has the fields of the service's own, but for the request's id."""
    file, environ = tmp_path / "log", {"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET}
    with gunicorn_logged(environ, file) as (_, port):
        auth = {"Authorization": f"Bearer {token()}"}
        ids = []
        for _ in range(2):
            answer = requests.post(f"http://127.0.0.1:{port}/sessions", headers=auth, timeout=10)
            ids.append(answer.json()["session"]["id"])
        requests.post(f"http://127.0.0.1:{port}/sessions/{ids[0]}/revoke", headers=auth, timeout=10)
        command = [sys.executable, "-m", "flask", "--app", "wsgi", "sessions", "revoke", "alice", "--id", ids[1]]
        env = {"PATH": os.environ["PATH"], **environ}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)
        until(lambda: "session_revoked" in file.read_text())
        [served] = [line for line in log_lines(file) if line["event"] == "session_revoked"]
    assert (done.returncode, done.stdout) == (0, "1 revoked\n")
    said = json.loads(done.stderr)
    assert set(said) == set(served) - {"request_id"}
    same = ("level", "logger", "event", "subject")
    assert [said[name] for name in same] == [served[name] for name in same]
    assert said["pid"] != served["pid"]


def test_pseudonym(app: Flask) -> None:
    """What stands for a name in the logs is the same each time, and another one for another name."""
    alice, again, bob = (run(app, "pseudonym", name).output for name in ("alice", "alice", "bob"))
    assert alice == again != bob
