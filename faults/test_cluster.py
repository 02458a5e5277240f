"""A Redis Cluster of six nodes: a primary lost, one that hangs, a slot on its way."""

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis
import requests
from redis.crc import key_slot

from app.store import index_key
from faults.load import Figures, Load, headers
from tests.conftest import SECRET
from tests.servers import free_port, gunicorn, gunicorn_logged, log_lines, required, running, until

DEAD = "A" * 32
KNOWN = {"cluster_state": "ok", "cluster_known_nodes": "7"}


class Six:
    """Three primaries with a replica each."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        cli = required("redis-cli")
        self.processes, self.clients = {}, {}
        for _ in range(6):
            self.start(stack, folder)
        nodes = [f"127.0.0.1:{port}" for port in self.processes]
        create = [cli, "--cluster", "create", *nodes, "--cluster-replicas", "1", "--cluster-yes"]
        subprocess.run(create, check=True, stdout=subprocess.DEVNULL, timeout=60)
        self.primaries = list(self.processes)[:3]
        until(lambda: all(self._is_safe(port) for port in self.primaries), 60)
        self.url = "redis+cluster://" + ",".join(nodes[:2])

    def start(self, stack: ExitStack, folder: Path) -> int:
        """Start a node that belongs to no cluster yet; gives its port."""
        port = free_port()
        home = folder / str(port)
        home.mkdir()
        command = [required("redis-server"), "--port", str(port), "--save", "", "--dir", str(home)]
        command += ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--repl-diskless-sync-delay", "0"]
        # One shard that is down must not take the others along.
        command += ["--cluster-require-full-coverage", "no"]
        self.processes[port] = stack.enter_context(running(command, stdout=subprocess.DEVNULL))
        self.clients[port] = stack.enter_context(redis.Redis(port=port, decode_responses=True))
        until(self.clients[port].ping)
        return port

    def _is_safe(self, port: int) -> bool:
        replication = self.clients[port].info("replication")
        good = self.clients[port].cluster("info")["cluster_state"] == "ok"
        return good and replication.get("slave0", {}).get("state") == "online"

    def primary_of(self, subject: str) -> int:
        """The port of the primary that holds a subject's sessions."""
        slot = key_slot(index_key(subject).encode())
        for start, end, primary, *_ in self.clients[self.primaries[-1]].execute_command("CLUSTER SLOTS"):
            if start <= slot <= end:
                return primary[1]
        raise AssertionError("no primary has this slot")


@pytest.fixture
def six(tmp_path: Path) -> Iterator[Six]:
    with ExitStack() as stack:
        yield Six(stack, tmp_path)


@pytest.fixture
def address(six: Six) -> Iterator[str]:
    with gunicorn({"REDIS_URL": six.url, "JWT_SECRET": SECRET}) as address:
        yield address


def shared_out(six: Six, number: int = 12) -> tuple[list[str], list[str]]:
    """Subjects whose sessions are on the first primary, and subjects whose are not."""
    subjects = [f"subject-{n}" for n in range(number)]
    here = [subject for subject in subjects if six.primary_of(subject) == six.primaries[0]]
    return here, [subject for subject in subjects if subject not in here]


def test_primary_killed(six: Six, tmp_path: Path, figures: Figures) -> None:
    """When a primary is lost its subjects get 500s until the replica takes over, and no caller a 404.

    The log has the end of the trouble with it, although it never comes back.
    """
    here, elsewhere = shared_out(six)
    log = tmp_path / "log"
    with gunicorn_logged({"REDIS_URL": six.url, "JWT_SECRET": SECRET}, log) as (_, port):
        with Load(f"http://127.0.0.1:{port}", [*here, *elsewhere]) as load:
            six.processes[six.primaries[0]].kill()
            until(lambda: load.trouble(here))
            # A replica that is not elected at once tries again after eight seconds.
            until(load.all_is_well, 30)
            time.sleep(2)
    lines = [(line["event"], line["script"], line["server"]) for line in log_lines(log) if "server" in line]
    began = {line[1:] for line in lines if line[0] == "redis_unavailable"}
    assert any(server == f"127.0.0.1:{six.primaries[0]}" for _, server in began)
    assert {line[1:] for line in lines if line[0] == "redis_available"} == began
    figures(
        f"primary killed: 500 for {load.trouble(here):.1f} s on its shard, for {load.trouble(elsewhere):.1f} s "
        f"elsewhere, slowest {load.slowest():.2f} s, {dict(load.statuses())}"
    )
    load.check(500)
    assert {status for at, _, status, _ in load.answers[-20:]} == {200}


def test_primary_hangs(six: Six, address: str, figures: Figures) -> None:
    """While a primary hangs the subjects of the others are served as ever."""
    here, elsewhere = shared_out(six)
    with Load(address, [*here, *elsewhere]) as load:
        six.processes[six.primaries[0]].send_signal(signal.SIGSTOP)
        time.sleep(1.5)  # less than the nodes wait before they replace it
        six.processes[six.primaries[0]].send_signal(signal.SIGCONT)
        time.sleep(2)
    others = sorted(took for _, who, _, took in load.answers if who in elsewhere)
    figures(f"primary hangs: the others' p99 {others[len(others) * 99 // 100] * 1000:.0f} ms, {dict(load.statuses())}")
    load.check(500)
    assert not load.trouble(elsewhere)
    assert {status for at, _, status, _ in load.answers[-20:]} == {200}


@pytest.mark.parametrize("to", ["a node that has slots", "a new node"])
def test_slot_moved(six: Six, address: str, tmp_path: Path, to: str, figures: Figures) -> None:
    """While a slot moves between nodes its sessions are kept alive, alone and together, and none is called gone."""
    here, elsewhere = shared_out(six)
    subject, slot = here[0], key_slot(index_key(here[0]).encode())
    with ExitStack() as stack:
        port = six.primaries[1]
        if to == "a new node":
            port = six.start(stack, tmp_path)
            six.clients[port].execute_command("CLUSTER", "MEET", "127.0.0.1", six.primaries[0])
            for client in six.clients.values():
                until(lambda: KNOWN.items() <= client.cluster("info").items())
        load = move_slot(six, address, subject, slot, port, elsewhere[:3])
    figures(f"slot moved to {to}: slowest {load.slowest():.2f} s, {dict(load.statuses())}")
    load.check()


def move_slot(six: Six, address: str, subject: str, slot: int, port: int, others: list[str]) -> Load:
    """Move a slot under load, key by key; gives what the callers were answered."""
    source, target = six.clients[six.primaries[0]], six.clients[port]
    ids = {client: client.execute_command("CLUSTER MYID") for client in (source, target)}
    with Load(address, [subject, *others]) as load:
        live = [load.sessions[subject], *(load.open(subject) for _ in range(3))]
        target.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
        source.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
        for key in source.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            time.sleep(0.3)
            source.execute_command("MIGRATE", "127.0.0.1", port, key, 0, 1000)
            listed = requests.get(f"{address}/sessions", headers=headers(subject), timeout=10)
            assert listed.status_code == 500 or {s["id"] for s in listed.json()["sessions"]} == set(live)
            assert renewed(address, subject, [*live, DEAD]) == [True] * len(live) + [False]
        time.sleep(0.3)
        for client in (target, source):
            client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
        time.sleep(1)
    return load


def renewed(address: str, subject: str, ids: list[str]) -> list[bool]:
    """Which of many sessions one call keeps alive."""
    asked = {"json": {"ids": ids}, "headers": headers(subject), "timeout": 10}
    answer = requests.post(f"{address}/sessions/heartbeat", **asked)
    assert answer.status_code == 200
    return [result["success"] for result in answer.json()["results"]]


def test_started_before_the_cluster(six: Six) -> None:
    """A service that was started while the cluster was away serves when it is there."""
    for process in six.processes.values():
        process.send_signal(signal.SIGSTOP)
    with gunicorn({"REDIS_URL": six.url, "JWT_SECRET": SECRET}) as address:
        # The worker asks two of them in vain before its first answer.
        assert requests.get(f"{address}/sessions", headers=headers("alice"), timeout=20).status_code == 500
        for process in six.processes.values():
            process.send_signal(signal.SIGCONT)
        until(lambda: requests.get(f"{address}/sessions", headers=headers("alice"), timeout=5).status_code == 200, 20)
