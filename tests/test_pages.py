"""The README and docs/: their links, and what they list about events, metrics and the rights of a Redis user."""

import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from app import create_app
from app.config import Config
from app.metrics import Metrics
from tests.conftest import SECRET, Caller
from tests.servers import PERSISTENT, ROOT, RedisServer, free_port, until
from tests.test_connection import sentinel_of

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS]
OPERATE = (ROOT / "docs/operate.md").read_text()


def section(title: str) -> str:
    """What stands under a heading of the page for operators."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", OPERATE, re.MULTILINE | re.DOTALL)[1]


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    """Every link to another page, or to a heading, leads to one."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            other = (page.parent / path).resolve() if path else page
            assert other.is_file(), target
            assert not anchor or anchor in anchors(other), target


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_reader(page: Path) -> None:
    """Each page says first for whom it is, and the README links to it."""
    assert re.match(r"# .*\n\nFor ", page.read_text())
    assert f"(docs/{page.name}" in (ROOT / "README.md").read_text()


def test_events() -> None:
    """Each event that the code logs has a row, and no other."""
    code = [*(ROOT / "app").rglob("*.py"), *ROOT.glob("gunicorn*.py")]
    logged = {
        event
        for file in code
        for call in re.findall(r"(?:emit|\.(?:info|warning|error|exception))\(\s*(\"[^)]*)", file.read_text())
        for event in re.findall(r'^"([a-z_]+)"', call)
    }
    chosen = {"session_unreadable", "index_unreadable"}  # in a variable
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \|", section("Why did it end?"), re.MULTILINE)
    assert set(re.findall(r"[a-z_]+", " ".join(rows))) == logged | chosen


def test_metrics() -> None:
    """Each metric that is counted has a row."""
    names = {each.name for each in Metrics().registry.collect()}
    rows = re.findall(r"^\| (`.*?`) \|", section("Metrics"), re.MULTILINE)
    listed = {re.sub("_total$", "", name) for name in re.findall(r"[a-z_]+(?=[`{])", " ".join(rows))}
    assert names <= listed


@pytest.mark.parametrize("kind", ["redis", "redis+cluster", "redis+sentinel"])
def test_rights(kind: str, tmp_path: Path) -> None:
    """A user with the rights that are listed can do all that the service needs: on a server, a cluster, a sentinel."""
    server_rights, cluster_rights, sentinel_rights = re.findall(r"^ACL SETUSER (.*)$", OPERATE, re.MULTILINE)
    clustered, port = kind == "redis+cluster", free_port()
    options = ["--cluster-enabled", "yes"] if clustered else []
    with ExitStack() as stack:
        admin = stack.enter_context(RedisServer(tmp_path, "--port", str(port), *PERSISTENT, *options)).client
        if clustered:
            admin.execute_command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
            until(lambda: "cluster_state:ok" in admin.execute_command("CLUSTER", "INFO"))
        admin.execute_command("ACL", "SETUSER", *(cluster_rights if clustered else server_rights).split())
        url = f"{kind}://127.0.0.1:{port}" + ("" if clustered else "/1")
        if kind == "redis+sentinel":
            primary = stack.enter_context(redis.Redis(port=port))
            lines = [f"user {sentinel_rights}", "requirepass other"]
            url = stack.enter_context(sentinel_of(primary, tmp_path, *lines, password="other"))
        config = Config(redis_url=url.replace("://", "://sessions:PASSWORD@"), jwt_secret=(SECRET,), session_limit=2)
        app = create_app(config)
        use_all(Caller(app, "al/ice"))
        assert app.test_cli_runner().invoke(args=["doctor"]).exit_code == 0
        strict = create_app(replace(config, redis_wait_replicas=1))
        assert Caller(strict).post("/sessions").status_code == 500  # there is no replica
        assert admin.execute_command("ACL", "LOG") == []
        for each in (app, strict):
            for client in each.extensions["servers"].clients():
                client.connection_pool.disconnect()


def use_all(caller: Caller) -> None:
    """Call every endpoint that asks Redis, also at the limit and for sessions that are over."""
    first, second = caller.open(), caller.open()
    assert caller.post("/sessions").status_code == 429
    assert set(caller.ids()) == {first, second}
    assert caller.heartbeat(first).status_code == caller.read(first).status_code == 200
    assert caller.post("/sessions/heartbeat", json={"ids": [first, second]}).status_code == 200
    assert [caller.revoke(first).status_code, caller.heartbeat(first).status_code] == [200, 404]
    assert caller.post("/sessions/revoke-all").status_code == 200
    assert caller.get("/readyz").status_code == 200
