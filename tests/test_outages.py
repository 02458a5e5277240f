"""When trouble with Redis begins and ends in the log."""

import gc
import time
import weakref
from collections.abc import Iterator

import pytest
import redis
import time_machine

from app.store.outages import Outages
from app.store.server import address_of
from tests.conftest import Log


class Shards:
    """Servers of a cluster, of which some take writes at the moment."""

    def __init__(self, *ports: int) -> None:
        self.ports = ports

    def clients(self) -> list[redis.Redis]:
        return [server(port) for port in self.ports]

    def failed(self, error: Exception) -> None:
        pass


def server(port: int) -> redis.Redis:
    return redis.Redis(host="127.0.0.1", port=port)


DOWN = redis.ConnectionError("refused")


@pytest.fixture
def shards() -> Shards:
    return Shards(1, 2)


@pytest.fixture
def outages(shards: Shards) -> Outages:
    return Outages(shards)


@pytest.fixture(autouse=True)
def clock() -> Iterator[time_machine.Traveller]:
    """The time, which stands still unless it is moved."""
    with time_machine.travel(time.time(), tick=False) as traveller:
        yield traveller


def seen(log: Log) -> list[tuple[str, str, str | None]]:
    return [(line["event"].removeprefix("redis_"), line["script"], line["server"]) for line in log.take()]


def test_once(outages: Outages, log: Log, clock: time_machine.Traveller) -> None:
    """Trouble is logged when it begins and when it is over, however many callers meet it."""
    for error in (None, DOWN, DOWN, DOWN, None, None):
        clock.shift(1)
        outages.failed("heartbeat", server(1), error) if error else outages.succeeded("heartbeat", server(1))
    assert seen(log) == [("unavailable", "heartbeat", "127.0.0.1:1"), ("available", "heartbeat", "127.0.0.1:1")]


@pytest.mark.parametrize("seconds, logged", [(0, 0), (0.9, 0), (1, 1), (-3600, 1)])
def test_quiet(outages: Outages, log: Log, clock: time_machine.Traveller, seconds: float, logged: int) -> None:
    """Trouble is over when there has been none for a second, also where the clock has been set back."""
    clock.shift(1)
    outages.failed("heartbeat", server(1), DOWN)
    outages.succeeded("heartbeat", server(1))
    outages.failed("heartbeat", server(1), DOWN)
    clock.shift(seconds)
    outages.succeeded("heartbeat", server(1))
    assert log.names() == ["redis_unavailable"] + ["redis_available"] * logged


def test_each_script_and_server(outages: Outages, log: Log, clock: time_machine.Traveller) -> None:
    """One script's or server's trouble is not over because another's is not in trouble."""
    outages.failed("open", server(1), DOWN)
    clock.shift(1)
    outages.succeeded("heartbeat", server(1))
    outages.succeeded("open", server(2))
    assert seen(log) == [("unavailable", "open", "127.0.0.1:1")]


def test_gone(outages: Outages, shards: Shards, log: Log, clock: time_machine.Traveller) -> None:
    """The trouble with a server that another has replaced is over, for all scripts."""
    for script in ("heartbeat", "open"):
        outages.failed(script, server(1), DOWN)
    shards.ports = (2, 3)
    clock.shift(1)
    log.take()
    outages.succeeded("heartbeat", server(3))
    assert sorted(seen(log)) == [("available", "heartbeat", "127.0.0.1:1"), ("available", "open", "127.0.0.1:1")]
    outages.succeeded("heartbeat", server(3))
    assert seen(log) == []


def test_unknown_server(outages: Outages, log: Log, clock: time_machine.Traveller) -> None:
    """That it is not known which server holds a key is over with the first one that answers."""
    outages.failed("heartbeat", None, DOWN)
    clock.shift(1)
    outages.succeeded("heartbeat", server(2))
    assert seen(log) == [("unavailable", "heartbeat", None), ("available", "heartbeat", None)]


def test_no_client_is_kept(outages: Outages) -> None:
    """A client that was in trouble can be forgotten."""
    client = server(1)
    known = weakref.ref(client)
    outages.failed("heartbeat", client, DOWN)
    del client
    gc.collect()
    assert known() is None


@pytest.mark.parametrize(
    "url, address",
    [
        ("redis://127.0.0.1:6380/0", "127.0.0.1:6380"),
        ("redis://127.0.0.1", "127.0.0.1:6379"),
        ("redis://:secret@[::1]:6380/0", "::1:6380"),
        ("unix:///run/redis.sock", "/run/redis.sock"),
    ],
)
def test_address(url: str, address: str) -> None:
    """A server is named by host and port or by its socket, without credentials."""
    assert address_of(redis.Redis.from_url(url)) == address
