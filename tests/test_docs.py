"""The API as a page: Swagger UI, served here and asking nobody else."""

import json
import re
from collections.abc import Iterator
from urllib.request import Request, urlopen

import pytest
from flask import Flask

from tests.browser import Browser
from tests.conftest import SECRET, Caller, fake_only, token
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
    served = {path: http.get(path, buffered=True) for path in re.findall(LINKS, http.get("/docs").text)}
    assert {path: response.status_code for path, response in served.items()} == dict.fromkeys(served, 200)
    types = {path: response.mimetype.replace("application/java", "text/java") for path, response in served.items()}
    assert types == {
        "/docs/favicon-32x32.png": "image/png",
        "/docs/swagger-ui.css": "text/css",
        "/docs/swagger-ui-bundle.js": "text/javascript",
        "/docs/start.js": "text/javascript",
    }
    assert {response.headers["X-Content-Type-Options"] for response in served.values()} == {"nosniff"}


@fake_only
def test_no_address_outside(app: Flask) -> None:
    """Neither the page nor its start names an address elsewhere; the validator, which has one, is off."""
    http = app.test_client()
    page, start = http.get("/docs").text, http.get("/docs/start.js").text
    assert "//" not in page + start
    assert "<script>" not in page
    assert 'url: "/openapi.json"' in start
    assert "validatorUrl: null" in start


@fake_only
@pytest.mark.parametrize("path", ["/docs/", "/docs/nothing.js", "/docs/..", "/docs/../__init__.py", "/docs/%2e%2e%2fx"])
def test_missing_file(alice: Caller, path: str) -> None:
    """What is not there is a 404 in the contract's shape, and no redirect."""
    response = alice.raw("GET", path)
    assert (response.status_code, response.data) == (404, b'{"success": false, "error": "Not found"}')
    assert response.headers["Content-Type"] == "application/json"


@fake_only
@pytest.mark.parametrize("path", ["/docs", "/docs/start.js", "/docs/swagger-ui.css"])
def test_wrong_method(alice: Caller, path: str) -> None:
    """The page and its files can only be read."""
    response = alice.post(path)
    assert (response.status_code, response.data) == (405, b'{"success": false, "error": "Method not allowed"}')
    assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD"}


@pytest.fixture(scope="module")
def url(redis_server: RedisServer) -> Iterator[str]:
    """The address of the service as it is run."""
    with gunicorn({"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET}) as url:
        yield url


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Browser]:
    """A browser that shows the page; afterwards, that nothing of it was refused and nobody else was asked."""
    browser.complaints(), browser.requests()
    browser.driver.get(f"{url}/docs")
    yield browser
    assert browser.complaints() == []
    asked = [address for _, address in browser.requests()]
    assert asked[0] == f"{url}/docs"
    assert [address for address in asked if not address.startswith(f"{url}/")] == []


def ask(method: str, url: str) -> str:
    with urlopen(Request(url, method=method, headers={"Authorization": f"Bearer {token()}"}), timeout=10) as response:
        return response.read().decode()


def authorise(page: Browser) -> None:
    """Paste a token into the page's dialog."""
    page.find(".auth-wrapper .authorize").click()
    page.find(".modal-ux input").send_keys(token())
    page.find(".modal-ux .authorize").click()
    page.find(".modal-ux .btn-done").click()


def heartbeat(page: Browser, id: str) -> tuple[str, str]:
    """Try out a heartbeat; gives the status and the body that the page then shows."""
    page.find("#operations-sessions-heartbeat .opblock-summary-control").click()
    page.find("#operations-sessions-heartbeat .try-out__btn").click()
    page.find("#operations-sessions-heartbeat input[placeholder=id]").send_keys(id)
    page.find("#operations-sessions-heartbeat .execute").click()
    status = page.find("#operations-sessions-heartbeat .live-responses-table tbody .response-col_status").text
    return status, page.find("#operations-sessions-heartbeat .live-responses-table .highlight-code code").text


def test_shows_every_endpoint(page: Browser, url: str) -> None:
    """The page lists every endpoint of the document."""
    paths = json.loads(ask("GET", f"{url}/openapi.json"))["paths"]
    page.find(".opblock")
    shown = [each.text.split()[:2] for each in page.driver.find_elements("css selector", ".opblock-summary-control")]
    assert sorted(shown) == sorted([method.upper(), path] for path in paths for method in paths[path])


def test_unfolds(page: Browser) -> None:
    """Every endpoint and every schema unfolds, and the page finds no fault with the document."""
    page.find(".opblock")
    for fold in page.driver.find_elements(
        "css selector", ".opblock-summary-control, .json-schema-2020-12-expand-deep-button"
    ):
        fold.click()
    page.find("#operations-operations-docs .responses-table")
    assert page.driver.find_elements("css selector", ".errors-wrapper") == []


def test_try_it_out(page: Browser, url: str) -> None:
    """With a token pasted into the dialog a heartbeat can be tried on the page, and keeps the session alive."""
    id = re.search('"id": "([^"]+)"', ask("POST", f"{url}/sessions"))[1]
    authorise(page)
    status, body = heartbeat(page, id)
    assert status == "200"
    expiry = re.search('"newExpiry": "([^"]+)"', body)[1]
    assert f'"expiresAt": "{expiry}"' in ask("GET", f"{url}/sessions/{id}")
