"""Redis behind Sentinel: failovers under load."""

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from faults.load import Figures, Load
from tests.conftest import SECRET
from tests.servers import free_port, free_ports, gunicorn, required, running, until


class Trio:
    """A primary, two replicas and three sentinels."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        server = required("redis-server")
        ports = free_ports(6)
        self.ports, self.sentinels = ports[:3], ports[3:]
        self.clients = [stack.enter_context(redis.Redis(port=port, decode_responses=True)) for port in self.ports]
        self.processes = []
        for number, port in enumerate(self.ports):
            home = folder / str(port)
            home.mkdir()
            command = [server, "--port", str(port), "--save", "", "--dir", str(home), "--repl-diskless-sync-delay", "0"]
            command += ["--replicaof", "127.0.0.1", str(self.ports[0])] if number else []
            self.processes.append(stack.enter_context(running(command, stdout=subprocess.DEVNULL)))
            until(self.clients[number].ping)
        until(lambda: self._replicas_online() == 2, 30)
        for port in self.sentinels:
            file = folder / f"{port}.conf"
            lines = [f"port {port}", f"sentinel monitor main 127.0.0.1 {self.ports[0]} 2"]
            lines += ["sentinel down-after-milliseconds main 1000", "sentinel failover-timeout main 5000"]
            file.write_text("\n".join(lines))
            command = [server, str(file), "--sentinel", "--dir", str(folder)]
            stack.enter_context(running(command, stdout=subprocess.DEVNULL))
        self.sentinel = stack.enter_context(redis.Redis(port=self.sentinels[-1], decode_responses=True))
        until(self._sentinels_agree, 30)

    @property
    def url(self) -> str:
        """The first sentinel that it names is a dead one."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in [free_port(), *self.sentinels])
        return f"redis+sentinel://{hosts}/main/0"

    def _replicas_online(self) -> int:
        replication = self.clients[0].info("replication")
        return sum(replication.get(f"slave{n}", {}).get("state") == "online" for n in range(2))

    def _sentinels_agree(self) -> bool:
        state = self.sentinel.sentinel_master("main")
        return state["num-other-sentinels"] == 2 and state["num-slaves"] == 2


@pytest.fixture
def trio(tmp_path: Path) -> Iterator[Trio]:
    with ExitStack() as stack:
        yield Trio(stack, tmp_path)


def kill_primary(trio: Trio) -> None:
    trio.processes[0].kill()


def fail_over(trio: Trio) -> None:
    trio.sentinel.execute_command("SENTINEL", "FAILOVER", "main")


@pytest.mark.parametrize("replicas", [1, 0])
@pytest.mark.parametrize("fault", [kill_primary, fail_over])
def test_failover(trio: Trio, fault: object, replicas: int, figures: Figures) -> None:
    """Through a failover no live session is called gone, and with a confirming replica nothing acknowledged is lost."""
    environ = {"REDIS_URL": trio.url, "JWT_SECRET": SECRET, "REDIS_WAIT_REPLICAS": str(replicas)}
    with gunicorn(environ) as address:
        with Load(address, [f"beat-{n}" for n in range(4)], churn=True) as load:
            before = len(load.answers)
            fault(trio)
            until(lambda: trio.sentinel.sentinel_master("main")["port"] != trio.ports[0], 20)
            time.sleep(4)
            until(load.all_is_well, 30)
        assert before
        lost = load.lost()
    figures(
        f"{fault.__name__}, REDIS_WAIT_REPLICAS={replicas}: heartbeats 500 for {load.trouble(load.subjects):.1f} s, "
        f"all for {load.trouble():.1f} s, slowest {load.slowest():.2f} s, {lost[0]} of {len(load.opened)} opens lost, "
        f"{lost[1]} of {len(load.revoked)} revokes undone, {dict(load.statuses())}"
    )
    # Without a confirming replica an open can be lost, and then to revoke it is a 404.
    assert {status for _, who, status, _ in load.answers if who in load.subjects} <= {200, 500}
    if replicas:
        load.check(500)
        assert lost == (0, 0)


def test_replica_hangs(trio: Trio, figures: Figures) -> None:
    """A replica that hangs holds up opens and revokes for some seconds; then the other one's word will do."""
    with gunicorn({"REDIS_URL": trio.url, "JWT_SECRET": SECRET, "REDIS_WAIT_REPLICAS": "1"}) as address:
        with Load(address, ["beat"], churn=True) as load:
            trio.processes[1].send_signal(signal.SIGSTOP)
            time.sleep(9)
            held_up = load.trouble()
            trio.processes[1].send_signal(signal.SIGCONT)
            time.sleep(2)
        lost = load.lost()
    figures(f"replica hangs, REDIS_WAIT_REPLICAS=1: opens 500 for {held_up:.1f} s, {dict(load.statuses())}")
    load.check(500)
    assert held_up < 7 and not load.trouble(["beat"])
    assert lost == (0, 0) and load.answers[-1][2] in (200, 201)
