"""A client in Python that openapi-python-client writes out of /openapi.json."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.conftest import SECRET, token
from tests.servers import ROOT, gunicorn

DOCUMENT = ROOT / "app" / "openapi.json"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The client as a package; the document is such that the generator leaves nothing out and warns of nothing."""
    folder = tmp_path_factory.mktemp("client")
    (folder / "config.json").write_text(json.dumps({"post_hooks": []}))  # without formatting it
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--path", str(DOCUMENT), "--meta", "none"]
    command += ["--config", "config.json", "--output-path", "session_client", "--fail-on-warning"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("session_client")
    sys.path.remove(str(folder))


def call(client: ModuleType, operation: str) -> ModuleType:
    return importlib.import_module(f"{client.__name__}.api.sessions.{operation}")


def test_life_of_a_session(client: ModuleType) -> None:
    """It opens a session, keeps it alive, lists it and revokes it, after which a heartbeat is the documented error."""
    models = importlib.import_module(f"{client.__name__}.models")
    with (
        gunicorn({"REDIS_URL": "memory://", "JWT_SECRET": SECRET}) as url,
        client.AuthenticatedClient(base_url=url, token=token()) as caller,
    ):
        session = (
            call(client, "open_session").sync(client=caller, body=models.OpenSession(device_name="Tablet")).session
        )
        assert session.device_name == "Tablet"
        renewed = call(client, "heartbeat").sync(session.id, client=caller)
        assert renewed.new_expiry >= session.expires_at
        [result] = call(client, "heartbeat_many").sync(client=caller, body=models.HeartbeatMany([session.id])).results
        assert (result.success, result.id) == (True, session.id)
        [listed] = call(client, "list_sessions").sync(client=caller).sessions
        assert (listed.id, listed.expires_at) == (session.id, result.new_expiry)
        assert call(client, "revoke").sync(session.id, client=caller).success
        gone = call(client, "heartbeat").sync(session.id, client=caller)
        assert gone == models.Error(success=False, error="Session not found or expired")


def with_news(body: object) -> object:
    """The same with a field in every object that no document knows yet."""
    if isinstance(body, list):
        return [with_news(each) for each in body]
    return {**{name: with_news(each) for name, each in body.items()}, "news": 1} if isinstance(body, dict) else body


@pytest.mark.parametrize(
    "operation, status, schema",
    [
        ("open_session", "201", "SessionOpened"),
        ("list_sessions", "200", "SessionList"),
        ("get_session", "200", "SessionFound"),
        ("heartbeat", "200", "Renewed"),
        ("heartbeat_many", "200", "ManyRenewed"),
        ("revoke", "200", "Revoked"),
        ("revoke", "404", "Error"),
    ],
)
def test_new_fields(client: ModuleType, operation: str, status: str, schema: str) -> None:
    """It goes on reading answers that have got new fields, in every object of theirs."""
    paths = json.loads(DOCUMENT.read_text())["paths"]
    [shown] = [each for methods in paths.values() for each in methods.values() if each["operationId"] == operation]
    body = with_news(shown["responses"][status]["content"]["application/json"]["example"])
    read = getattr(importlib.import_module(f"{client.__name__}.models"), schema).from_dict(body)
    # Times come back in another spelling of RFC 3339.
    assert json.dumps(read.to_dict(), sort_keys=True).replace("+00:00", ".000Z") == json.dumps(body, sort_keys=True)
