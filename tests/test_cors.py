"""What browsers are told, and what they make of it."""

from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import requests
from flask import Flask
from flask.testing import FlaskClient

from app.config import Config
from tests.browser import Browser
from tests.conftest import SECRET, Caller, token
from tests.servers import RedisServer, gunicorn

FRIEND, STRANGER = "https://app.example.com", "https://evil.example.com"
ENVIRON = {"REDIS_URL": "memory://", "WEB_CONCURRENCY": "1", "JWT_SECRET": SECRET}
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


@pytest.fixture
def open_app(make_app: Callable[..., Flask]) -> Flask:
    """An app that one origin may call."""
    return make_app(cors_origins=(FRIEND,))


@pytest.fixture
def http(open_app: Flask) -> FlaskClient:
    return open_app.test_client()


@pytest.mark.parametrize("path", ["/sessions", "/sessions/revoke-all", f"/sessions/{'A' * 32}/heartbeat"])
def test_preflight(http: FlaskClient, path: str) -> None:
    """A preflight of an allowed origin is answered without a token."""
    response = http.options(path, headers={"Origin": FRIEND, **PREFLIGHT})
    assert response.status_code == 200
    assert response.headers["Access-Control-Allow-Origin"] == FRIEND
    assert "POST" in response.headers["Access-Control-Allow-Methods"]
    assert "authorization" in response.headers["Access-Control-Allow-Headers"].lower()
    assert "Access-Control-Allow-Credentials" not in response.headers


@pytest.mark.parametrize("origin", [STRANGER, "null", FRIEND + ".evil.example.com", "http://app.example.com"])
def test_stranger(http: FlaskClient, origin: str) -> None:
    """Another origin is allowed nothing."""
    for response in (
        http.options("/sessions", headers={"Origin": origin, **PREFLIGHT}),
        http.get("/sessions", headers={"Origin": origin}),
    ):
        assert "Access-Control-Allow-Origin" not in response.headers


APPS = ["capacitor://localhost", "http://[::1]:8080", "chrome-extension://abcdefgh", "https://app_1.example.com:8443"]


@pytest.mark.parametrize("origin", APPS)
def test_origins_of_apps(make_app: Callable[..., Flask], origin: str) -> None:
    """Any scheme, host and port may be listed, and what only looks like a listed one is allowed nothing."""
    http = make_app(
        cors_origins=Config.from_env({**ENVIRON, "CORS_ORIGINS": " ".join(APPS)}).cors_origins
    ).test_client()
    for given, allowed in ((origin, origin), (origin + "0", None), (origin.replace("a", "b").replace(":", "x"), None)):
        response = http.options("/sessions", headers={"Origin": given, **PREFLIGHT})
        assert response.headers.get("Access-Control-Allow-Origin") == allowed


def test_headers_that_are_asked_for(http: FlaskClient) -> None:
    """A preflight is allowed the headers that it asks for, and only from a listed origin."""
    asked = "authorization, baggage, content-type, traceparent, x-anything"
    for origin, allowed in ((FRIEND, asked), (STRANGER, None)):
        headers = {"Origin": origin, **PREFLIGHT, "Access-Control-Request-Headers": asked}
        assert http.options("/sessions", headers=headers).headers.get("Access-Control-Allow-Headers") == allowed


def test_exposed(open_app: Flask) -> None:
    """A script may read how long the session lasts and when to come again."""
    alice = Caller(open_app)
    alice.headers["Origin"] = FRIEND
    response = alice.heartbeat(alice.open())
    assert response.headers["Access-Control-Allow-Origin"] == FRIEND
    assert {"Session-Expires-In", "Retry-After", "Sessions-Revoked"} <= set(
        response.headers["Access-Control-Expose-Headers"].split(", ")
    )


def test_errors(http: FlaskClient) -> None:
    """A script may read errors, too."""
    assert http.get("/sessions", headers={"Origin": FRIEND}).headers["Access-Control-Allow-Origin"] == FRIEND


def test_off(alice: Caller) -> None:
    """Without CORS_ORIGINS no origin is allowed, and OPTIONS is a method that is not allowed."""
    response = alice.http.options("/sessions", headers={"Origin": FRIEND, **PREFLIGHT})
    assert response.status_code == 405
    assert "Access-Control-Allow-Origin" not in response.headers


PAGE = "<!DOCTYPE html><title>-</title>"
# What a page's script would do: keep a session alive and read how long it lasts.
SCRIPT = """
const [address, token, done] = arguments;
fetch(address, {method: "POST", headers: {Authorization: "Bearer " + token, traceparent: "00-1", baggage: "a=b"}})
  .then(answer => answer.json().then(body => done([answer.status, answer.headers.get("Session-Expires-In")])))
  .catch(error => done(["refused", null]));
"""


@pytest.fixture
def origin() -> Iterator[Callable[[], str]]:
    """Starts servers of an empty page, each an origin of its own."""
    servers = []

    def start() -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
        servers.append(server)
        Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE.encode())

    def log_message(self, *_: object) -> None:
        pass


def test_browser(browser: Browser, redis_server: RedisServer, origin: Callable[[], str]) -> None:
    """In a browser a page of an allowed origin, with tracing, keeps a session alive; one of another is refused."""
    friend, stranger = origin(), origin()
    redis_server.client.flushall()
    with gunicorn({"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET, "CORS_ORIGINS": friend}) as address:
        headers = {"Authorization": f"Bearer {token()}"}
        id = requests.post(f"{address}/sessions", headers=headers).json()["session"]["id"]
        answers = {}
        for page in (friend, stranger):
            browser.driver.get(page)
            heartbeat = f"{address}/sessions/{id}/heartbeat"
            answers[page] = browser.driver.execute_async_script(SCRIPT, heartbeat, token())
        browser.complaints(), browser.requests()  # which are not the next test's
    assert answers == {friend: [200, "1800"], stranger: ["refused", None]}
