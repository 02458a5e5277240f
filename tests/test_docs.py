"""The API as a page: Swagger UI, served here and asking no other server."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urljoin

import pytest
import requests
from flask import Flask

from tests.browser import Browser
from tests.conftest import SECRET, Caller, fake_only, refused, token
from tests.servers import RedisServer, gunicorn

LINKS = r'(?:src|href)="([^"]*)"'


@fake_only
def test_page(app: Flask) -> None:
    """The page needs no token and is HTML."""
    response = app.test_client().get("/docs")
    assert (response.status_code, response.headers["Content-Type"]) == (200, "text/html; charset=utf-8")


@fake_only
def test_policy(app: Flask) -> None:
    """The page's policy permits nothing but the service's own files, and neither script nor style inside the page."""
    policy = app.test_client().get("/docs").headers["Content-Security-Policy"]
    sources = {name: rest for name, *rest in map(str.split, policy.split(";"))}
    assert sources["default-src"] == sources["frame-ancestors"] == sources["base-uri"] == ["'none'"]
    assert sources["script-src"] == sources["style-src"] == sources["connect-src"] == ["'self'"]
    assert {each for rest in sources.values() for each in rest} == {"'none'", "'self'", "data:"}


@fake_only
def test_own_files(app: Flask) -> None:
    """All that the page links to is served with its own type, and not to be taken for another."""
    http = app.test_client()
    links = re.findall(LINKS, http.get("/docs").text)
    served = {path: http.get(urljoin("/docs", path), buffered=True) for path in links}
    assert {path: response.status_code for path, response in served.items()} == dict.fromkeys(served, 200)
    types = {path: response.mimetype.replace("application/java", "text/java") for path, response in served.items()}
    assert types == {
        "docs/favicon-32x32.png": "image/png",
        "docs/swagger-ui.css": "text/css",
        "docs/page.css": "text/css",
        "docs/swagger-ui-bundle.js": "text/javascript",
        "docs/start.js": "text/javascript",
    }
    assert {response.headers["X-Content-Type-Options"] for response in served.values()} == {"nosniff"}


@fake_only
def test_no_address_outside(app: Flask) -> None:
    """Neither the page nor its start names an address elsewhere; the validator, which has one, is off."""
    http = app.test_client()
    page, start = http.get("/docs").text, http.get("/docs/start.js", buffered=True).text
    assert "//" not in page + start
    assert "<script>" not in page
    assert 'url: "openapi.json"' in start
    assert "validatorUrl: null" in start


@fake_only
@pytest.mark.parametrize("path", ["/docs/", "/docs/nothing.js", "/docs/..", "/docs/../__init__.py", "/docs/%2e%2e%2fx"])
def test_missing_file(alice: Caller, path: str) -> None:
    """What is not there is a 404 in the contract's shape, and no redirect."""
    assert refused(alice, "GET", path) == 404
    assert alice.raw("GET", path).json["error"] == "Not found"


@fake_only
@pytest.mark.parametrize("path", ["/docs", "/docs/start.js", "/docs/swagger-ui.css"])
def test_wrong_method(alice: Caller, path: str) -> None:
    """The page and its files can only be read."""
    assert refused(alice, "POST", path) == 405
    response = alice.post(path)
    assert response.json["error"] == "Method not allowed"
    assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD"}


@pytest.fixture(scope="module")
def service(redis_server: RedisServer) -> Iterator[str]:
    """The address of the service as it is run."""
    with gunicorn({"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET}) as url:
        yield url


class Prefix(BaseHTTPRequestHandler):
    """A proxy that serves a service under /prefix, and nothing else."""

    protocol_version = "HTTP/1.1"
    service = ""

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        kept = {name: value for name, value in self.headers.items() if name in ("Authorization", "Content-Type")}
        if not self.path.startswith("/prefix/"):
            return self.send_error(404)
        answer = requests.request(
            self.command, self.service + self.path.removeprefix("/prefix"), headers=kept, data=self.rfile.read(length)
        )
        self.send_response(answer.status_code)
        for name in ("Content-Type", "Content-Security-Policy"):
            if name in answer.headers:
                self.send_header(name, answer.headers[name])
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def prefixed(service: str) -> Iterator[str]:
    """The address of the service behind a proxy that serves it under a prefix."""
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Proxy", (Prefix,), {"service": service})) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_port}/prefix"
        proxy.shutdown()


@contextmanager
def shown(browser: Browser, url: str) -> Iterator[Browser]:
    """A browser that shows the page; afterwards, that nothing of it was refused and no other server was asked."""
    browser.complaints(), browser.requests()
    browser.driver.get(f"{url}/docs")
    browser.find(".opblock")
    yield browser
    assert browser.complaints() == []
    asked = [address for _, address in browser.requests()]
    assert asked[0] == f"{url}/docs"
    assert [address for address in asked if not address.startswith(f"{url}/")] == []


@pytest.fixture
def phone(browser: Browser) -> Iterator[None]:
    """The browser as a phone of 390 pixels."""
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    yield
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def paste(page: Browser, selector: str, text: str) -> None:
    """Put a text into a field all at once: the page works anew at each key."""
    page.find(selector).click()
    page.driver.execute_cdp_cmd("Input.insertText", {"text": text})


def authorise(page: Browser) -> None:
    """Paste a token into the page's dialog."""
    page.find(".auth-wrapper .authorize").click()
    paste(page, ".modal-ux input", token())
    page.find(".modal-ux .authorize").click()
    page.find(".modal-ux .btn-done").click()


def unfold(page: Browser, operation: str) -> str:
    """Unfold an endpoint for trying it out; gives the CSS selector of its block."""
    block = f"#operations-sessions-{operation}"
    page.find(f"{block} .opblock-summary-control").click()
    page.find(f"{block} .try-out__btn").click()
    page.find(f"{block} .execute")
    return block


def execute(page: Browser, operation: str, id: str = "") -> tuple[str, dict]:
    """Try out an endpoint with what the page has filled in, and an id; gives the status and body that it then shows."""
    block = unfold(page, operation)
    if id:
        paste(page, f"{block} input[placeholder=id]", id)
    page.find(f"{block} .execute").click()
    status = page.find(f"{block} .live-responses-table tbody .response-col_status").text.split()[0]
    return status, json.loads(page.find(f"{block} .live-responses-table .highlight-code code").text)


def test_as_it_opens(browser: Browser, service: str) -> None:
    """The page lists every endpoint of the document, and what it fills in names no idle timeout, session or subject."""
    paths = requests.get(f"{service}/openapi.json").json()["paths"]
    with shown(browser, service) as page:
        listed = [each.text.split()[:2] for each in page.all(".opblock-summary-control")]
        filled_in = {}
        for operation in ("open_session", "heartbeat", "get_session", "revoke", "revoke_all"):
            block = unfold(page, operation)
            filled_in[operation] = [
                each.get_attribute("value") for each in page.all(f"{block} input, {block} textarea")
            ]
    assert sorted(listed) == sorted([method.upper(), path] for path in paths for method in paths[path])
    subject, opened = filled_in.pop("open_session")
    assert subject == ""
    assert set(json.loads(opened)) == {"deviceName", "location"}
    assert filled_in == {**dict.fromkeys(("heartbeat", "get_session", "revoke"), ["", ""]), "revoke_all": ["", "{}"]}


UNFOLD = """
    document.querySelector(".models-control").click()
    const folds = ".opblock-summary-control, .json-schema-2020-12-expand-deep-button"
    setTimeout(() => document.querySelectorAll(folds).forEach((each) => each.click()))
"""


def test_phone(phone: None, browser: Browser, service: str) -> None:
    """On a phone every endpoint and every schema unfolds, no wider than the screen, and the document has no fault."""
    with shown(browser, service) as page:
        page.driver.execute_script(UNFOLD)
        page.find("#operations-operations-docs .responses-table")
        page.find(".json-schema-2020-12-property")
        assert len(page.all(".opblock.is-open")) == len(page.all(".opblock"))
        assert page.driver.execute_script("return document.documentElement.scrollWidth") == 390
        assert page.all(".errors-wrapper") == []


def test_try_it_out(browser: Browser, prefixed: str) -> None:
    """With a token a session can be opened, kept alive and ended on the page, also where it is under a prefix."""
    with shown(browser, prefixed) as page:
        authorise(page)
        status, opened = execute(page, "open_session")
        assert status == "201"
        id = opened["session"]["id"]
        status, renewed = execute(page, "heartbeat", id)
        assert (status, renewed["newExpiry"] >= opened["session"]["expiresAt"]) == ("200", True)
        assert execute(page, "revoke", id) == ("200", {"success": True, "message": "Session revoked successfully"})
        status, listed = execute(page, "list_sessions")
        assert (status, id in str(listed)) == ("200", False)
