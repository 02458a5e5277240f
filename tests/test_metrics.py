"""What Prometheus is told."""

import json
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import redis
import requests
from flask import Flask, Response, request, request_started
from prometheus_client import values
from prometheus_client.parser import text_string_to_metric_families

from app import auth, metric_files
from app.metrics import Metrics
from tests.conftest import SECRET, Caller, Log, fake_only, token
from tests.servers import ROOT, RedisServer, gunicorn

HEARTBEAT = "/sessions/{id}/heartbeat"
REASONS = "missing malformed expired not_yet_valid signature issuer audience claim subject scope signed_out".split()


def samples(text: str) -> dict[tuple[str, frozenset], float]:
    """The samples of an answer by name and labels."""
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


@pytest.fixture
def count(app: Flask) -> Callable[..., float]:
    """A sample's value by its name and labels, or 0."""

    def ask(name: str, **labels: str) -> float:
        text = app.test_client().get("/metrics").get_data(as_text=True)
        return samples(text).get((name, frozenset(labels.items())), 0.0)

    return ask


def test_requests(alice: Caller, count: Callable[..., float]) -> None:
    """Requests are counted by route as the document has it, method and status, those without a route among them."""
    alice.heartbeat(alice.open())
    alice.get("/nowhere"), alice.http.open("/healthz", method="BREW")
    assert count("http_request_duration_seconds_count", route="none", method="GET", status="404") == 1
    assert count("http_request_duration_seconds_count", route="none", method="other", status="405") == 1
    assert count("http_request_duration_seconds_count", route=HEARTBEAT, method="POST", status="200") == 1
    assert count("http_request_duration_seconds_count", route="/sessions", method="POST", status="201") == 1


def test_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests that the document describes, and those without a route, fit twice into the workers' files."""
    (tmp_path / "slots").touch()
    monkeypatch.setenv(metric_files.FOLDER, str(tmp_path))
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    app, paths = Flask("counted"), json.loads((ROOT / "app/openapi.json").read_text())["paths"]
    Metrics().count_requests(app)
    for path in paths:
        route = path.replace("{", "<").replace("}", ">")
        methods = ["GET", "POST", "OPTIONS"]
        app.add_url_rule(route, route, lambda **_: ("", int(request.args["status"])), methods=methods)
    everywhere = [200, 400, 408, 413, 500]
    for path, operations in paths.items():
        for method, described in {"options": {}, **operations}.items():
            for status in (*described.get("responses", ()), *everywhere):
                app.test_client().open(path, method=method, query_string={"status": status})
    for method in ("GET", "HEAD", "OPTIONS", "POST", "BREW"):
        app.test_client().open("/nowhere", method=method)
    for file in tmp_path.glob("*.db"):
        assert 0 < 2 * int.from_bytes(file.read_bytes()[:4], sys.byteorder) < file.stat().st_size
        assert file.stat().st_size == metric_files.SIZES[file.stem.removesuffix("_0")]


def test_no_paths(alice: Caller) -> None:
    """What a caller puts into a method, a path, a header or a token makes no label."""
    alice.get("/sessions/secret-of-mine")
    alice.get("/no-such-page")
    alice.http.post("/sessions", headers={"Authorization": "Bearer secret-of-mine", "Host": "secret-of-mine"})
    alice.http.open("/healthz", method="SECRET-OF-MINE")
    text = alice.http.get("/metrics").get_data(as_text=True)
    assert "secret-of-mine" not in text.lower() and "no-such-page" not in text


def test_heartbeats(alice: Caller, count: Callable[..., float]) -> None:
    """Heartbeats are counted by outcome, alone and many at once."""
    id = alice.open()
    alice.heartbeat(id)
    alice.heartbeat("A" * 32)
    alice.heartbeat("malformed")
    alice.post("/sessions/heartbeat", json={"ids": [id, id, "A" * 32, "malformed"]})
    assert count("heartbeats_total", outcome="renewed") == 3
    assert count("heartbeats_total", outcome="not_found") == 4
    assert count("heartbeats_total", outcome="failed") == 0


def test_sessions(alice: Caller, count: Callable[..., float]) -> None:
    """Sessions opened and revoked are counted, those revoked together one by one."""
    ids = [alice.open() for _ in range(3)]
    alice.post(f"/sessions/{ids[0]}/revoke")
    alice.post("/sessions/revoke-all")
    assert (count("sessions_opened_total"), count("sessions_revoked_total")) == (3, 3)


def test_just_begun(count: Callable[..., float], app: Flask) -> None:
    """All counters with fixed labels are there from the beginning, at zero."""
    counted = samples(app.test_client().get("/metrics").get_data(as_text=True))
    for name in ("sessions_opened", "sessions_revoked", "session_limits_reached", "key_set_failures"):
        assert counted[f"{name}_total", frozenset()] == 0
    for outcome in ("renewed", "not_found", "failed"):
        assert counted["heartbeats_total", frozenset({("outcome", outcome)})] == 0
    assert set(auth.REASONS.values()) < set(REASONS)
    for reason in REASONS:
        assert counted["tokens_refused_total", frozenset({("reason", reason)})] == 0
    assert counted["key_set_fetched_timestamp_seconds", frozenset()] == 0


def test_limit(make_app: Callable[..., Flask]) -> None:
    """Sessions that were not opened at the limit are counted."""
    alice = Caller(make_app(session_limit=1))
    alice.open()
    alice.post("/sessions"), alice.post("/sessions")
    text = alice.get("/metrics").get_data(as_text=True)
    assert samples(text)["session_limits_reached_total", frozenset()] == 2


@fake_only
def test_redis_up(count: Callable[..., float], database: redis.Redis) -> None:
    """Whether Redis answers is asked at each look."""
    server = database.connection_pool.connection_kwargs["server"]
    for up in (True, False, True):
        server.connected = up
        assert count("redis_up") == up


def test_build(count: Callable[..., float]) -> None:
    """The version of the service, and of Python, stand in a metric."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    version = setup["metadata"]["version"]
    assert count("session_heartbeat_build_info", version=version, python=platform.python_version()) == 1


class Issuer(BaseHTTPRequestHandler):
    """Publishes a key set, or what `status` and `keys` make of it."""

    status, keys = 200, '[{"kty": "RSA", "n": "%s", "e": "AQAB", "kid": "1"}]' % ("x" * 342)

    def do_GET(self) -> None:
        body = f'{{"keys": {self.keys}}}'.encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Keep quiet."""


@fake_only
@pytest.mark.parametrize("status, keys, failures", [(200, Issuer.keys, 0), (403, Issuer.keys, 1), (200, "[]", 1)])
def test_key_set(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch, status: int, keys: str, failures: int
) -> None:
    """When the key set was fetched is known without a look before; a fetch that gave no key is counted, not dated."""
    monkeypatch.setattr(Issuer, "status", status)
    monkeypatch.setattr(Issuer, "keys", keys)
    with ThreadingHTTPServer(("127.0.0.1", 0), Issuer) as issuer:
        thread = threading.Thread(target=issuer.serve_forever)
        thread.start()
        app = make_app(jwt_secret=(), jwt_jwks_url=f"http://127.0.0.1:{issuer.server_address[1]}/")
        counted = samples(app.test_client().get("/metrics").get_data(as_text=True))
        issuer.shutdown()
        thread.join()
        assert app.test_client().get("/readyz").status_code == (503 if failures else 200)
    assert counted["key_set_failures_total", frozenset()] == failures
    fetched = counted["key_set_fetched_timestamp_seconds", frozenset()]
    assert (time.time() - fetched < 60) == (not failures) and (fetched > 0) == (not failures)


def test_hooks(make_app: Callable[..., Flask], count: Callable[..., float]) -> None:
    """Flask's own hooks and signals fire on good and unknown paths, and what they take is in the time of a request."""
    app, fired = make_app(), []

    @app.before_request
    def before() -> None:
        fired.append("before")
        time.sleep(0.01)

    @app.after_request
    def after(response: Response) -> Response:
        fired.append("after")
        return response

    def started(sender: Flask, **_: object) -> None:
        fired.append("started")

    alice = Caller(app)
    with request_started.connected_to(started, app):
        for path, status in (("/sessions", 200), ("/nowhere", 404), ("//sessions", 404)):
            assert alice.raw("GET", path).status_code == status
            assert fired == ["started", "before", "after"]
            fired.clear()
    counted = samples(alice.get("/metrics").get_data(as_text=True))
    labels = frozenset({("route", "/sessions"), ("method", "GET"), ("status", "200")})
    assert counted["http_request_duration_seconds_sum", labels] >= 0.01


def test_hook_that_refuses(make_app: Callable[..., Flask]) -> None:
    """A hook can answer in a view's place, as a rate limiter does, and what it answers is counted."""
    app = make_app()
    app.before_request(lambda: ("busy", 429) if request.path == "/sessions" else None)
    alice = Caller(app)
    assert alice.post("/sessions").status_code == 429
    counted = samples(alice.get("/metrics").get_data(as_text=True))
    labels = frozenset({("route", "/sessions"), ("method", "POST"), ("status", "429")})
    assert counted["http_request_duration_seconds_count", labels] == 1


def test_refused_tokens(alice: Caller, app: Flask, count: Callable[..., float]) -> None:
    """Refused tokens are counted by reason."""
    Caller(app, exp=1).get("/sessions")
    alice.http.get("/sessions")
    assert count("tokens_refused_total", reason="expired") == 1
    assert count("tokens_refused_total", reason="missing") == 1


def test_redis(alice: Caller, count: Callable[..., float]) -> None:
    """Round trips to Redis are timed by script, and the size of heartbeat batches is counted."""
    alice.heartbeat(alice.open())
    assert count("redis_round_trip_seconds_count", script="open") == 1
    assert count("heartbeat_batch_size_sum") == 1


def test_token(make_app: Callable[..., Flask]) -> None:
    """With METRICS_TOKEN set only its bearer is answered."""
    http = make_app(metrics_token="0123456789abcdef").test_client()
    assert http.get("/metrics").status_code == 401
    assert http.get("/metrics", headers={"Authorization": f"Bearer {token()}"}).status_code == 401
    assert http.get("/metrics", headers={"Authorization": "Bearer 0123456789abcdef"}).status_code == 200
    assert http.get("/metrics", headers={"Authorization": "Bearer \xe9"}).status_code == 401
    assert http.get("/metrics", headers={"Authorization": "Token 0123456789abcdef"}).status_code == 401


def test_wrong_token_is_no_refused_session(make_app: Callable[..., Flask], log: Log) -> None:
    """A wrong METRICS_TOKEN, or none, is a 401 with a challenge of its own, and counts as no refused token."""
    http = make_app(metrics_token="0123456789abcdef").test_client()
    right = {"Authorization": "Bearer 0123456789abcdef"}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {token()}"}):
        answer = http.get("/metrics", headers=headers)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, 'Bearer realm="metrics"')
    counted = samples(http.get("/metrics", headers=right).get_data(as_text=True))
    assert sum(value for (name, _), value in counted.items() if name == "tokens_refused_total") == 0
    assert log.names() == []


def test_off(make_app: Callable[..., Flask]) -> None:
    """With METRICS_TOKEN=off there is no such page."""
    assert make_app(metrics_token="off").test_client().get("/metrics").status_code == 404


@pytest.fixture
def service(redis_server: RedisServer) -> Iterator[str]:
    """The service with two workers."""
    redis_server.client.flushall()
    with gunicorn({"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET}, workers=2) as address:
        yield address


def test_workers(service: str) -> None:
    """Whichever worker is asked, it answers for all."""
    headers = {"Authorization": f"Bearer {token()}"}
    for _ in range(40):  # each on a connection of its own, so that both workers get some
        assert requests.post(f"{service}/sessions/{'A' * 32}/heartbeat", headers=headers).status_code == 404
    for _ in range(10):
        counted = samples(requests.get(f"{service}/metrics").text)
        assert counted["heartbeats_total", frozenset({("outcome", "not_found")})] == 40
