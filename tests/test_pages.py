"""The README and docs/: their links, and what they list about events and metrics."""

import re
from pathlib import Path

import pytest

from app.metrics import Metrics
from tests.servers import ROOT

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
    """Each page names its readers first, and the README links to it."""
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
