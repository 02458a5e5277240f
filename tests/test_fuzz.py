"""Requests made up from /openapi.json, good ones and bad ones: the service does what its document says."""

from collections.abc import Iterator

import fakeredis
import pytest
import schemathesis
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from schemathesis.config import SchemathesisConfig

from app import create_app
from app.config import LONGEST_SECONDS, Config
from app.store.server import OnePrimary
from tests.conftest import SECRET, token
from tests.servers import RedisServer, gunicorn

pytest_plugins = ["schemathesis.pytest.plugin"]  # setup.cfg keeps it from every other start

ADMIN = "sessions:admin"
CONFIG = SchemathesisConfig.from_dict(
    {
        "auth": {"openapi": {"bearer": {"bearer": token(scope=ADMIN)}}},
        # The same requests every time, so that a change is to blame for a failure; nothing is left behind on disk.
        "generation": {"max-examples": 25, "deterministic": True, "database": "none"},
        # In sequences a session ends with POST /sessions/{id}/revoke, and this check knows of no end but DELETE.
        "checks": {"ensure_resource_availability": {"enabled": False}},
    }
)
REDIS = fakeredis.FakeRedis(server=fakeredis.FakeServer(server_type="redis"), decode_responses=True)
# The longest idle timeout that can be configured, since the document names no shorter one.
SETTINGS = {"jwt_admin_scope": ADMIN, "session_limit": 1000, "session_idle_max_seconds": LONGEST_SECONDS}
APP = create_app(Config(redis_url="memory://", jwt_secret=(SECRET,), web_concurrency=1, **SETTINGS), OnePrimary(REDIS))

in_process = schemathesis.openapi.from_wsgi("/openapi.json", APP, config=CONFIG)
over_http = schemathesis.openapi.from_dict(APP.test_client().get("/openapi.json").json, config=CONFIG)


def whole_seconds(context: schemathesis.HookContext, body: object) -> object:
    """To JSON Schema 60.0 is an integer, to the service it is none."""
    seconds = body.get("idleTimeoutSeconds") if isinstance(body, dict) else None
    return {**body, "idleTimeoutSeconds": int(seconds)} if isinstance(seconds, float) and seconds.is_integer() else body


for schema in (in_process, over_http):
    schema.hook("map_body")(whole_seconds)


@pytest.fixture(scope="module")
def base_url(redis_server: RedisServer) -> Iterator[str]:
    """The address of the service as it is run."""
    redis_server.client.flushall()
    environ = {name.upper(): str(value) for name, value in SETTINGS.items()}
    with gunicorn({"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET, **environ}) as url:
        yield url


@in_process.parametrize()
def test_each_endpoint(case: schemathesis.Case) -> None:
    """Every answer is as documented; bad requests are refused, and good ones are not."""
    case.call_and_validate()


@over_http.parametrize()
def test_each_endpoint_over_http(case: schemathesis.Case, base_url: str) -> None:
    """It is the same over HTTP and on a real Redis."""
    case.call_and_validate(base_url=base_url)


def test_sequences() -> None:
    """It is the same where a request takes up what an answer has said: a session is opened, read, kept and ended."""
    seen = set()

    class Sequence(in_process.as_state_machine()):  # type: ignore[misc]
        def setup(self) -> None:
            REDIS.flushall()

        def after_call(self, response: schemathesis.Response, case: schemathesis.Case) -> None:
            seen.add((case.operation.label, response.status_code))

    bounds = settings(max_examples=20, stateful_step_count=10, derandomize=True, database=None, deadline=None)
    run_state_machine_as_test(Sequence, settings=bounds)
    taken_up = {"GET /sessions/{id}", "POST /sessions/{id}/heartbeat", "POST /sessions/{id}/revoke"}
    assert seen >= {(label, status) for label in taken_up for status in (200, 401, 404)}
