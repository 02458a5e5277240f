"""What Prometheus is told."""

from collections.abc import Callable, Iterator

import pytest
import requests
from flask import Flask
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import SECRET, Caller, Log, token
from tests.servers import RedisServer, gunicorn

HEARTBEAT = "/sessions/<session_id:id>/heartbeat"


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
    """Requests are counted by route rule, method and status."""
    alice.heartbeat(alice.open())
    assert count("http_request_duration_seconds_count", route=HEARTBEAT, method="POST", status="200") == 1
    assert count("http_request_duration_seconds_count", route="/sessions", method="POST", status="201") == 1


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
    alice.post("/sessions/heartbeat", json={"ids": [id, id, "A" * 32]})
    assert count("heartbeats_total", outcome="renewed") == 3
    assert count("heartbeats_total", outcome="not_found") == 2
    assert count("heartbeats_total", outcome="failed") == 0


def test_sessions(alice: Caller, count: Callable[..., float]) -> None:
    """Sessions opened and revoked are counted, those revoked together one by one."""
    ids = [alice.open() for _ in range(3)]
    alice.post(f"/sessions/{ids[0]}/revoke")
    alice.post("/sessions/revoke-all")
    assert (count("sessions_opened_total"), count("sessions_revoked_total")) == (3, 3)


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


def test_wrong_token_is_no_refused_session(make_app: Callable[..., Flask], log: Log) -> None:
    """A wrong METRICS_TOKEN, or none, is a 401 with a challenge of its own, and counts as no refused token."""
    http = make_app(metrics_token="0123456789abcdef").test_client()
    right = {"Authorization": "Bearer 0123456789abcdef"}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {token()}"}):
        answer = http.get("/metrics", headers=headers)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, 'Bearer realm="metrics"')
    assert "tokens_refused_total{" not in http.get("/metrics", headers=right).get_data(as_text=True)
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
