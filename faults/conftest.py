"""What these tests share with those in tests/, and the figures that they print at the end."""

from collections.abc import Callable

import pytest

from faults.load import Figures
from tests.conftest import folder, redis_server

__all__ = ["figures", "folder", "redis_server"]


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> Figures:
    """Keeps lines for the end; a report brings them from whichever process ran the test."""
    return lambda text: record_property("figures", text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures after the failures' output, and before the list of what failed."""
    ended = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    told = [text for report in ended for name, text in report.user_properties if name == "figures"]
    if told:
        terminalreporter.section("figures")
    for text in told:
        terminalreporter.write_line(text)
