"""The pins: what a PaaS, CI and `make run` install, today as on the day they were compiled."""

import re
from importlib.metadata import requires
from itertools import chain

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.servers import ROOT

FILES = ["requirements.txt", "requirements-dev.txt"]


def pins(file: str) -> dict[str, Requirement]:
    """What a file pins, by name."""
    lines = (ROOT / file).read_text().splitlines()
    found = [Requirement(line.removesuffix(" \\")) for line in lines if re.match(r"[a-z0-9]", line)]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


@pytest.mark.parametrize("file", FILES)
def test_extras(file: str) -> None:
    """What is needed with extras is pinned with them: otherwise pip takes the newest version, whose hash is unknown."""
    pinned = pins(file)
    needed = map(Requirement, chain.from_iterable(requires(name) or [] for name in pinned))
    for need in needed:
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            assert need.extras <= pinned[canonicalize_name(need.name)].extras, need


def test_same_versions() -> None:
    """Development runs on the very versions that are deployed."""
    developing = pins("requirements-dev.txt")
    for name, requirement in pins("requirements.txt").items():
        assert developing[name].specifier == requirement.specifier


@pytest.mark.parametrize("file", FILES)
def test_no_address(file: str) -> None:
    """A file of pins names packages, and no place to get them from."""
    assert not re.search(r"^\s*-|://|find-links=|index-url=", (ROOT / file).read_text().replace("    --hash", ""), re.M)
