"""A rolling deploy: workers of release 1.0.0 and of today, side by side on one Redis."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.conftest import SECRET, immortal, milliseconds, token
from tests.servers import ROOT, RedisServer, gunicorn_process

OLD = "6e6f4af"  # what ran before
LIMIT = 4


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the old release, out of this repository's history."""
    folder = tmp_path_factory.mktemp("old")
    archive = ["git", "archive", "--output", str(folder / "old.tar"), OLD]
    found = subprocess.run(archive, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        reason = f"this clone has no commit {OLD}: {found.stderr.strip()}"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    subprocess.run(["tar", "xf", "old.tar"], cwd=folder, check=True)
    # Its document was written by a library that is no longer installed.
    (folder / "app" / "openapi.py").write_text('from flask import Blueprint\n\nbp = Blueprint("openapi", __name__)\n')
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


class Service:
    """One of the two, as a device sees it."""

    def __init__(self, port: int) -> None:
        self._sessions = f"http://127.0.0.1:{port}/sessions"

    def ask(self, method: str, path: str = "", **options: object) -> tuple[int, dict]:
        headers = {"Authorization": f"Bearer {token()}"}
        answer = requests.request(method, self._sessions + path, headers=headers, timeout=10, **options)
        return answer.status_code, answer.json()

    def open(self) -> str:
        status, body = self.ask("POST", json={"deviceName": "Küche", "idleTimeoutSeconds": 600})
        assert status == 201
        return body["session"]["id"]

    def expiry(self, id: str) -> int:
        """Send a heartbeat; gives the new expiry in ms."""
        status, body = self.ask("POST", f"/{id}/heartbeat")
        assert status == 200
        return milliseconds(body["newExpiry"])


@pytest.fixture(scope="module")
def both(old: Path, server: RedisServer) -> Iterator[tuple[Service, Service]]:
    """The old service and the new one."""
    environ = {"REDIS_URL": server.url, "JWT_SECRET": SECRET, "SESSION_LIMIT": str(LIMIT)}
    with gunicorn_process(environ, cwd=old) as (_, before), gunicorn_process(environ) as (_, after):
        yield Service(before), Service(after)


@pytest.fixture(params=["opened by the old", "opened by the new"])
def pair(both: tuple[Service, Service], server: RedisServer, request: pytest.FixtureRequest) -> list[Service]:
    """The one that opens sessions, and the other."""
    server.client.flushall()
    return list(both) if request.param == "opened by the old" else list(reversed(both))


def test_kept_alive(pair: list[Service], server: RedisServer) -> None:
    """A session of the one is kept alive by both in turn, alone and with others, also where Redis has lost scripts."""
    opener, other = pair
    ids = [opener.open(), opener.open()]
    expiry = 0
    for _ in range(5):
        for each in (other, opener):
            expiry, before = each.expiry(ids[0]), expiry
            assert expiry >= before
        server.client.script_flush()
    for each in (other, opener):
        status, body = each.ask("POST", "/heartbeat", json={"ids": ids})
        assert (status, [result["success"] for result in body["results"]]) == (200, [True, True])
    assert immortal(server.client) == []


def test_seen(pair: list[Service]) -> None:
    """A session of the one is read and listed by both in the same words, and counts for both at the limit."""
    opener, other = pair
    ids = [service.open() for service in (opener, other) for _ in range(LIMIT // 2)]
    assert opener.ask("GET") == other.ask("GET")
    assert {session["id"] for session in other.ask("GET")[1]["sessions"]} == set(ids)
    for id in ids:
        assert opener.ask("GET", f"/{id}") == other.ask("GET", f"/{id}")
    assert [each.ask("POST") for each in pair] == [(429, {"success": False, "error": "Too many sessions"})] * 2


def test_revoked(pair: list[Service], server: RedisServer) -> None:
    """A session of the one that is revoked by the other is over for both, alone and with all, and nothing is left."""
    opener, other = pair
    first, second, third = (opener.open() for _ in range(3))
    assert other.ask("POST", f"/{first}/revoke")[0] == 200
    over = (404, {"success": False, "error": "Session not found or expired"})
    assert [each.ask("POST", f"/{first}/heartbeat") for each in pair] == [over] * 2
    assert other.ask("POST", "/revoke-all", json={"exceptSessionId": second})[0] == 200
    assert [[session["id"] for session in each.ask("GET")[1]["sessions"]] for each in pair] == [[second]] * 2
    assert [each.ask("POST", f"/{third}/heartbeat") for each in pair] == [over] * 2
    assert other.ask("POST", "/revoke-all")[0] == 200
    assert server.client.keys() == []
