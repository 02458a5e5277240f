"""When trouble with Redis begins and ends in the log."""

import gc
import weakref

import pytest
import redis

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


def seen(log: Log) -> list[tuple[str, str, str | None]]:
    return [(line["event"].removeprefix("redis_"), line["script"], line["server"]) for line in log.take()]


def test_once(outages: Outages, log: Log) -> None:
    """Trouble is logged when it begins and when it is over, however many callers meet it."""
    for error in (None, DOWN, DOWN, DOWN, None, None):
        outages.begun("heartbeat", server(1), error) if error else outages.over("heartbeat", server(1))
    assert seen(log) == [("unavailable", "heartbeat", "127.0.0.1:1"), ("available", "heartbeat", "127.0.0.1:1")]


def test_each_script_and_server(outages: Outages, log: Log) -> None:
    """One script's or server's trouble is not over because another's is not in trouble."""
    outages.begun("open", server(1), DOWN)
    outages.over("heartbeat", server(1))
    outages.over("open", server(2))
    assert seen(log) == [("unavailable", "open", "127.0.0.1:1")]


def test_gone(outages: Outages, shards: Shards, log: Log) -> None:
    """The trouble with a server that another has replaced is over, for all scripts."""
    for script in ("heartbeat", "open"):
        outages.begun(script, server(1), DOWN)
    shards.ports = (2, 3)
    log.take()
    outages.over("heartbeat", server(3))
    assert sorted(seen(log)) == [("available", "heartbeat", "127.0.0.1:1"), ("available", "open", "127.0.0.1:1")]
    outages.over("heartbeat", server(3))
    assert seen(log) == []


def test_unknown_server(outages: Outages, log: Log) -> None:
    """That it is not known which server holds a key is over with the first one that answers."""
    outages.begun("heartbeat", None, DOWN)
    outages.over("heartbeat", server(2))
    assert seen(log) == [("unavailable", "heartbeat", None), ("available", "heartbeat", None)]


def test_no_client_is_kept(outages: Outages) -> None:
    """A client that was in trouble can be forgotten."""
    client = server(1)
    known = weakref.ref(client)
    outages.begun("heartbeat", client, DOWN)
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
