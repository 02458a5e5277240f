"""Readiness: whether sessions can be served. And the rights that a user of Redis needs for that, and no others."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis
from flask import Flask
from redis.crc import key_slot

from app import create_app
from app.config import Config
from tests.conftest import SECRET, Caller, Log, fake_only
from tests.servers import PERSISTENT, ROOT, RedisServer, free_port, until
from tests.test_connection import KNOWN, cluster_node, disconnect, ids_of, port_of
from tests.test_outage import read_only, without_disk, without_replicas

GUIDE = (ROOT / "docs" / "operate.md").read_text()
# What stands behind ACL SETUSER <name>, as it is to be copied.
SERVER, CLUSTER = re.findall("^ACL SETUSER sessions (.*)$", GUIDE, re.MULTILINE)
SELECT, WAIT, DOCTOR = re.findall(r"^\| .* \| `(\+[^`]*)` \|$", GUIDE.replace("\\|", "|"), re.MULTILINE)
NOT_READY = {"success": False, "error": "Redis not available", "status": "unavailable"}


def commands(*rights: str) -> list[str]:
    return [word for word in " ".join(rights).split() if word.startswith("+")]


@contextmanager
def serving(url: str, **settings: object) -> Iterator[Flask]:
    app = create_app(Config(redis_url=url, jwt_secret=(SECRET,), session_idle_seconds=60, **settings))
    yield app
    with suppress(redis.ConnectionError):  # a cluster that could not be reached
        disconnect(app)


@pytest.fixture
def server(folder: Path) -> Iterator[RedisServer]:
    """A Redis to be hurt."""
    with RedisServer(folder, *PERSISTENT, "--enable-protected-configs", "yes") as server:
        yield server


def full(client: redis.Redis) -> None:
    client.config_set("maxmemory", 1)


def without_ping(client: redis.Redis) -> None:
    client.execute_command("ACL", "SETUSER", "default", "-ping")


def without_eval(client: redis.Redis) -> None:
    client.execute_command("ACL", "SETUSER", "default", "-eval", "-evalsha")


@pytest.mark.parametrize(
    "hurt, reason",
    [
        (read_only, "ReadOnlyError"),
        (without_disk, "MISCONF"),
        (without_replicas, "NOREPLICAS"),
        (without_eval, "eval"),
        (full, None),
        (without_ping, None),
    ],
)
def test_redis(server: RedisServer, hurt: Callable[[redis.Redis], None], reason: str | None, log: Log) -> None:
    """A worker is ready if it can keep sessions alive, as in a full Redis; else the answer names Redis, the log why."""
    with serving(server.url) as app:
        alice = Caller(app)
        id = alice.open()
        hurt(server.client)
        log.take()
        answer = alice.get("/readyz")
        lines = log.take()
        assert (answer.status_code, answer.json) == ((503, NOT_READY) if reason else (200, {"status": "ok"}))
        assert [line["event"] for line in lines] == (["redis_unavailable"] if reason else [])
        assert (alice.heartbeat(id).status_code == 200) == (reason is None)
        if reason:
            assert re.search(reason, lines[0]["reason"]), lines[0]["reason"]


def test_nothing_is_left(server: RedisServer) -> None:
    """Asking leaves no key behind, and goes with one round trip."""
    with serving(server.url) as app:
        for _ in range(2):
            assert app.test_client().get("/readyz").status_code == 200
        before = server.client.info("commandstats")
        assert app.test_client().get("/readyz").status_code == 200
        after = server.client.info("commandstats")
        sent = {name for name in after if after[name]["calls"] > before.get(name, {"calls": 0})["calls"]}
        assert sent == {"cmdstat_evalsha", "cmdstat_hdel", "cmdstat_info"}
        assert server.client.keys() == []


@fake_only
def test_keys(make_app: Callable[..., Flask]) -> None:
    """Not ready for want of signing keys says so."""
    app = make_app(jwt_secret=(), jwt_jwks_url=f"http://127.0.0.1:{free_port()}/")
    answer = app.test_client().get("/readyz")
    assert (answer.status_code, answer.json) == (503, NOT_READY | {"error": "Signing keys not available"})


def test_primary_elsewhere(server: RedisServer) -> None:
    """A worker whose Redis has become a replica is ready again when another primary has its address.

    No caller comes while it is not ready, so the question itself has to leave the old connections.
    """
    with serving(server.url) as app:
        ready = app.test_client()
        assert ready.get("/readyz").status_code == 200
        read_only(server.client)
        assert ready.get("/readyz").status_code == 503
        old, new = Path(server.socket), server.socket.with_name("old.sock")
        old.rename(new)
        with RedisServer(server.socket.parent):
            assert ready.get("/readyz").status_code == 200


@contextmanager
def two_primaries(folder: Path) -> Iterator[list[redis.Redis]]:
    """A cluster in which a primary that is gone does not take the other one along."""
    with cluster_node(folder) as first, cluster_node(folder) as second:
        nodes = [first, second]
        for node, slots in zip(nodes, [(0, 8191), (8192, 16383)]):
            node.config_set("cluster-require-full-coverage", "no")
            node.execute_command("CLUSTER", "ADDSLOTSRANGE", *slots)
        second.execute_command("CLUSTER", "SET-CONFIG-EPOCH", 2)
        first.execute_command("CLUSTER", "MEET", "127.0.0.1", port_of(second))
        names = {node.cluster("myid") for node in nodes}
        for node in nodes:
            until(lambda node=node: ids_of(node) == names and KNOWN.items() <= node.cluster("info").items(), 20)
            until(lambda node=node: node.cluster("info")["cluster_slots_assigned"] == "16384", 20)
        yield nodes


@pytest.mark.parametrize("dead", [0, 1])
def test_cluster(tmp_path: Path, dead: int) -> None:
    """Of a cluster one primary that takes writes is enough, whichever it is."""
    with two_primaries(tmp_path) as nodes, serving(f"redis+cluster://127.0.0.1:{port_of(nodes[0])}") as app:
        ready = app.test_client()
        assert ready.get("/readyz").status_code == 200
        without_eval(nodes[dead])
        assert ready.get("/readyz").status_code == 200
        without_eval(nodes[1 - dead])
        assert ready.get("/readyz").status_code == 503


def used(app: Flask, subject: str = "alice") -> list[int]:
    """The statuses of every endpoint, where sessions are there and where not."""
    alice = Caller(app, subject)
    first, second = (each.json["session"]["id"] for each in (alice.post("/sessions"), alice.post("/sessions")))
    answers = [alice.post("/sessions")]
    for id in (first, "A" * 32):
        answers += [alice.heartbeat(id), alice.read(id)]
    answers += [alice.post("/sessions/heartbeat", json={"ids": [first, "A" * 32]}), alice.get("/sessions")]
    answers += [alice.revoke(first), alice.post("/sessions/revoke-all"), alice.get("/readyz")]
    answers += [alice.post("/sessions/revoke-all", json={"refuseEarlierTokens": True})]
    return [answer.status_code for answer in answers]


def works(app: Flask, clients: list[redis.Redis]) -> bool:
    """Whether every endpoint does what it should in a Redis that knows no script yet."""
    for client in clients:
        client.flushall()
        client.script_flush()
    try:
        return used(app) == [429, 200, 200, 404, 404, 200, 200, 200, 200, 200, 200]
    except KeyError:  # no session could be opened
        return False


@pytest.fixture
def port(folder: Path) -> Iterator[int]:
    port = free_port()
    with RedisServer(folder, "--port", str(port), "--repl-diskless-sync-delay", "0") as server:
        replica = folder / "replica"
        replica.mkdir()
        with RedisServer(replica, "--replicaof", "127.0.0.1", str(port)):
            until(lambda: server.client.info("replication").get("slave0", {}).get("state") == "online", 20)
            yield port


def grant(client: redis.Redis, rights: str, *more: str) -> None:
    client.execute_command("ACL", "SETUSER", "sessions", "reset", *rights.split(), *more)


@pytest.mark.parametrize(
    "rights, place, settings",
    [
        (SERVER, "/0", {}),
        (f"{SERVER} {SELECT}", "/1", {}),
        (f"{SERVER} {WAIT}", "/0", {"redis_wait_replicas": 1}),
    ],
    ids=["plain", "another database", "replicas"],
)
def test_rights(port: int, rights: str, place: str, settings: dict[str, object]) -> None:
    """The rights in the guide are enough for every endpoint, none is refused, and one less is not enough."""
    with redis.Redis(port=port, decode_responses=True) as client:
        with serving(f"redis://sessions:PASSWORD@127.0.0.1:{port}{place}", session_limit=2, **settings) as app:
            grant(client, rights)
            until(lambda: works(app, [client]))  # a replica may need a moment
            assert client.acl_log() == []
            superfluous = []
            for command in commands(rights):
                grant(client, rights, f"-{command[1:]}")
                disconnect(app)
                if works(app, [client]):
                    superfluous.append(command)
            assert superfluous == []
            grant(client, rights.replace("~session*", "~other*"))
            assert not works(app, [client])


def test_rights_doctor(port: int) -> None:
    """With the rights for it the doctor tells as much as with all; without them it has nothing to complain about."""
    with redis.Redis(port=port, decode_responses=True) as client:
        said = []
        for rights in (SERVER, f"{SERVER} {DOCTOR}", f"{SERVER} +@all"):
            grant(client, rights)
            with serving(f"redis://sessions:PASSWORD@127.0.0.1:{port}/0") as app:
                output = app.test_cli_runner().invoke(args=["doctor"]).output
            said.append(re.sub(r"[0-9.]+ ms", "", output))
    assert said[1] == said[2] != said[0]
    assert "failure" not in said[0]


def test_rights_cluster(tmp_path: Path) -> None:
    """The rights in the guide are enough for a cluster, while a slot moves as well, and one less is not."""
    with two_primaries(tmp_path) as nodes:
        url = f"redis+cluster://sessions:PASSWORD@127.0.0.1:{port_of(nodes[0])}"

        def works_in_cluster(*more: str) -> bool:
            for node in nodes:
                grant(node, CLUSTER, *more)
            with serving(url, session_limit=2) as app:
                return works(app, nodes) and survives_move(app, nodes)

        assert works_in_cluster()
        assert [node.acl_log() for node in nodes] == [[], []]
        assert [command for command in commands(CLUSTER) if works_in_cluster(f"-{command[1:]}")] == []


def survives_move(app: Flask, nodes: list[redis.Redis]) -> bool:
    """Whether a session is kept alive while its slot moves to the other node, and does move back."""
    carol = Caller(app, "carol")
    id, slot = carol.open(), key_slot(b"sessions:{carol}")
    source, target = nodes if slot < 8192 else nodes[::-1]
    names = {node: node.cluster("myid") for node in nodes}
    target.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", names[source])
    source.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", names[target])
    for key in source.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
        source.execute_command("MIGRATE", "127.0.0.1", port_of(target), key, 0, 1000)
    kept = carol.heartbeat(id).status_code == 200
    target.execute_command("FLUSHALL")
    for node in nodes:
        node.execute_command("CLUSTER", "SETSLOT", slot, "STABLE")
    return kept
