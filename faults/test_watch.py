"""`sessions watch` when its server hangs, and when another one takes over."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from app.store import session_key
from tests.servers import RedisServer, free_ports, required, running, until
from tests.test_watch import TELLS, subscribed, watching


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("t"), *TELLS) as server:
        yield server


def test_hangs(server: RedisServer) -> None:
    """A server that hangs is noticed as well."""
    with watching(server.url) as watcher:
        until(lambda: subscribed(server.client))
        server.process.send_signal(signal.SIGSTOP)
        try:
            until(lambda: watcher.said, 20)
        finally:
            server.process.send_signal(signal.SIGCONT)
        until(lambda: len(watcher.said) == 2)
    assert watcher.said[0] == "The connection to Redis broke: ConnectionError: no answer"


def test_failover(tmp_path: Path) -> None:
    """Behind Sentinel it goes over to the new primary, and says that it may have missed some."""
    one, other, sentinel = free_ports(3)
    with ExitStack() as stack:
        for port in (one, other):
            (home := tmp_path / str(port)).mkdir()
            command = [required("redis-server"), "--port", str(port), "--save", "", "--dir", str(home), *TELLS]
            command += ["--repl-diskless-sync-delay", "0"]
            command += ["--replicaof", "127.0.0.1", str(one)] if port == other else []
            stack.enter_context(running(command, stdout=subprocess.DEVNULL))
        clients = [stack.enter_context(redis.Redis(port=port, decode_responses=True)) for port in (one, other)]
        until(lambda: clients[0].info("replication").get("slave0", {}).get("state") == "online", 30)
        file = tmp_path / "sentinel.conf"
        file.write_text(f"port {sentinel}\nsentinel monitor main 127.0.0.1 {one} 1\n")
        command = [required("redis-server"), str(file), "--sentinel", "--dir", str(tmp_path)]
        stack.enter_context(running(command, stdout=subprocess.DEVNULL))
        guard = stack.enter_context(redis.Redis(port=sentinel, decode_responses=True))
        until(lambda: guard.sentinel_master("main")["num-slaves"] == 1, 30)
        url = f"redis+sentinel://127.0.0.1:{sentinel}/main/0"
        watcher = stack.enter_context(watching(url))
        until(lambda: subscribed(clients[0]))
        guard.execute_command("SENTINEL FAILOVER main")
        until(lambda: subscribed(clients[1]), 30)
        clients[1].set(session_key("alice", "A" * 32), "x", px=200)
        until(lambda: watcher.lines)
    assert watcher.expired == [("alice", "A" * 32)]
    assert watcher.said[-1] == "Watching again. Sessions may have expired unseen."
