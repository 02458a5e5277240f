"""Sentinel and Cluster, one node of each: the ways there. What happens when they fail is in faults/."""

import gc
import signal
import socket
import socketserver
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import pytest
import redis
from redis.crc import key_slot

from app import create_app
from app.config import Config
from app.doctor import examine_redis
from app.store.cluster import Cluster
from app.store.connect import POOL_SIZE, connect
from app.store.server import OnePrimary, address_of
from tests.conftest import SECRET, Caller, Log
from tests.servers import RedisServer, free_port, required, running, until


def config(url: str, **settings: object) -> Config:
    return Config(redis_url=url, jwt_secret=(SECRET,), web_concurrency=1, **settings)


@pytest.fixture
def primary(tmp_path: Path) -> Iterator[redis.Redis]:
    """A Redis on a port, with a password."""
    port = free_port()
    command = [required("redis-server"), "--port", str(port), "--save", "", "--dir", str(tmp_path)]
    with running([*command, "--requirepass", "p@ss"], stdout=subprocess.DEVNULL):
        with redis.Redis(port=port, password="p@ss", decode_responses=True) as client:
            until(client.ping)
            yield client


@contextmanager
def sentinel_of(primary: redis.Redis, folder: Path, *more: str, password: str | None = None) -> Iterator[str]:
    """A sentinel of the primary with more lines in its configuration; gives its URL without credentials."""
    port, file = free_port(), folder / "sentinel.conf"
    lines = [f"port {port}", f"sentinel monitor main 127.0.0.1 {port_of(primary)} 1", "sentinel auth-pass main p@ss"]
    file.write_text("\n".join([*lines, *more, ""]))
    with running([required("redis-server"), str(file), "--sentinel"], stdout=subprocess.DEVNULL):
        with redis.Redis(port=port, password=password, decode_responses=True) as sentinel:
            until(lambda: "disconnected" not in sentinel.sentinel_master("main")["flags"])
        yield f"redis+sentinel://127.0.0.1:{port}/main/3"


@pytest.fixture
def sentinel_url(primary: redis.Redis, tmp_path: Path) -> Iterator[str]:
    """A sentinel that knows the primary, named behind one that is dead."""
    with sentinel_of(primary, tmp_path) as url:
        yield url.replace("://", f"://:p%40ss@127.0.0.1:{free_port()},")


@contextmanager
def cluster_node(folder: Path) -> Iterator[redis.Redis]:
    """A node of a cluster, without slots."""
    port = free_port()
    while port > 55_000:  # the nodes talk to each other 10,000 ports further up
        port = free_port()
    home = folder / str(port)
    home.mkdir()
    command = [required("redis-server"), "--port", str(port), "--save", "", "--dir", str(home)]
    with running([*command, "--cluster-enabled", "yes"], stdout=subprocess.DEVNULL):
        with redis.Redis(port=port, decode_responses=True) as node:
            until(node.ping)
            yield node


KNOWN = {"cluster_state": "ok", "cluster_known_nodes": "2"}


def ids_of(node: redis.Redis) -> set[str]:
    """The nodes of the cluster, as one of them knows them."""
    return {known["node_id"] for known in node.cluster("nodes").values()}


def port_of(node: redis.Redis) -> int:
    return node.get_connection_kwargs()["port"]


def port_in(url: str) -> int:
    return urlsplit(url).port


@pytest.fixture
def node(tmp_path: Path) -> Iterator[redis.Redis]:
    """The only node of a cluster, which has all slots."""
    with cluster_node(tmp_path) as node:
        node.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        until(lambda: node.cluster("info")["cluster_state"] == "ok")
        yield node


@pytest.fixture
def cluster_url(node: redis.Redis) -> str:
    return f"redis+cluster://127.0.0.1:{port_of(node)}"


def live(app: object) -> None:
    """A session is opened, kept alive, listed and revoked."""
    alice = Caller(app)
    id = alice.open()
    assert alice.heartbeat(id).status_code == 200
    assert alice.ids() == [id]
    assert alice.http.get("/readyz").status_code == 200
    assert alice.post(f"/sessions/{id}/revoke").status_code == 200
    assert alice.heartbeat(id).status_code == 404


def disconnect(app: object) -> None:
    for client in app.extensions["servers"].clients():
        client.connection_pool.disconnect()


def test_sentinel(sentinel_url: str, primary: redis.Redis) -> None:
    """The primary is found by asking sentinels, with the password and in the database that the URL names."""
    app = create_app(config(sentinel_url))
    live(app)
    Caller(app).open()
    primary.select(3)
    assert primary.keys("sessions:*") == ["sessions:{alice}"]
    disconnect(app)


@pytest.mark.parametrize(
    "lines, password, user",
    [
        ([], None, ""),
        (["requirepass p@ss"], "p@ss", ""),
        (["user app on >p@ss ~* &* +@all"], None, "app"),
        (["user app on >p@ss ~* &* -@all +sentinel|master", "requirepass other"], "other", "app"),
    ],
    ids=["no password", "a password", "users, who are not needed", "users with few rights, who are needed"],
)
def test_sentinel_credentials(
    primary: redis.Redis, tmp_path: Path, lines: list[str], password: str | None, user: str
) -> None:
    """The URL's user and password are tried on sentinels; one that needs none and refuses them is asked without."""
    primary.execute_command("ACL", "SETUSER", "app", "on", ">p@ss", "~*", "+@all")
    with sentinel_of(primary, tmp_path, *lines, password=password) as url:
        app = create_app(config(url.replace("://", f"://{user}:p%40ss@")))
        live(app)
        disconnect(app)


@pytest.mark.parametrize(
    "password, sentence",
    [("", "Authentication required."), (":p%40ss@", "invalid username-password pair or user is disabled.")],
)
def test_sentinel_refuses(primary: redis.Redis, tmp_path: Path, log: Log, password: str, sentence: str) -> None:
    """What a sentinel says where it refuses the credentials, or misses them, is in the log, and the doctor says it."""
    with sentinel_of(primary, tmp_path, "requirepass other", password="other") as url:
        app = create_app(config(url.replace("://", f"://{password}")))
        assert Caller(app).get("/sessions").status_code == 500
        [line] = log.take()
        assert line["event"] == "redis_unavailable"
        assert line["reason"].startswith(f"MasterNotFoundError: {sentence}")
        assert any(sentence in finding.text for finding in examine_redis(app))


def test_sentinel_refuses_and_another_is_silent(primary: redis.Redis, tmp_path: Path) -> None:
    """Where one sentinel says what is wrong and another nothing at all, the doctor's hint is about what is wrong."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with sentinel_of(primary, tmp_path, "requirepass other", password="other") as url:
            app = create_app(config(url.replace("://", f"://127.0.0.1:{silent.getsockname()[1]},")))
            time.sleep(0.6)  # a sentinel's time-out
            [finding] = examine_redis(app)
    assert "Timeout" in finding.text and finding.text.endswith("(REDIS_URL needs a password: redis://:password@host)")


def test_sentinel_knows_better(primary: redis.Redis, tmp_path: Path) -> None:
    """A sentinel that takes the primary for down, or has never heard of it, does not keep another from being asked."""
    folders = [tmp_path / name for name in ("alone", "strange", "good")]
    for folder in folders:
        folder.mkdir()
    with ExitStack() as stack:
        alone, strange, good = (stack.enter_context(sentinel_of(primary, folder)) for folder in folders)
        with redis.Redis(port=port_in(alone)) as sentinel:
            sentinel.execute_command("SENTINEL", "SET", "main", "auth-pass", "wrong", "down-after-milliseconds", "1")
            until(lambda: sentinel.sentinel_master("main")["is_sdown"])
        with redis.Redis(port=port_in(strange)) as sentinel:
            sentinel.sentinel_remove("main")
        ports = [port_in(each) for each in (alone, strange, good)]
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        app = create_app(config(f"redis+sentinel://:p%40ss@{hosts}/main"))
        live(app)
        disconnect(app)


@pytest.mark.parametrize("place", ["one server", "behind a sentinel", "a cluster"])
def test_too_many_clients(
    request: pytest.FixtureRequest, primary: redis.Redis, tmp_path: Path, log: Log, place: str
) -> None:
    """That a Redis takes no more clients is said in its own words, in the log and by the doctor."""
    with ExitStack() as stack:
        server, url = primary, f"redis://127.0.0.1:{port_of(primary)}"
        primary.config_set("requirepass", "")
        if place == "behind a sentinel":
            url = stack.enter_context(sentinel_of(primary, tmp_path))
        if place == "a cluster":
            server, url = request.getfixturevalue("node"), request.getfixturevalue("cluster_url")
        app = create_app(config(url))
        live(app)
        disconnect(app)
        server.config_set("maxclients", 1)  # which is the one that sets it
        log.take()
        for _ in range(5):
            assert Caller(app).get("/sessions").status_code == 500
        [line] = log.take()
        sentence = "max number of clients +" if place == "a cluster" else "max number of clients reached"
        assert line["event"] == "redis_unavailable" and sentence in line["reason"]
        assert any(sentence in finding.text for finding in examine_redis(app))


def test_protected(tmp_path: Path) -> None:
    """What a Redis says to every new connection is passed on in its own words."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"-DENIED Redis is running in protected mode\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        app = create_app(config(f"redis://127.0.0.1:{server.server_address[1]}"))
        assert any("DENIED Redis is running in protected mode" in each.text for each in examine_redis(app))
        server.shutdown()


def test_no_cluster(primary: redis.Redis, log: Log) -> None:
    """That a single server is named as a cluster is said in its own words."""
    app = create_app(config(f"redis+cluster://:p%40ss@127.0.0.1:{port_of(primary)}"))
    [line] = log.take()
    assert (line["event"], line["reason"]) == ("slots_not_renewed", "This instance has cluster support disabled")
    assert any("(this is no cluster: redis:// or rediss://" in finding.text for finding in examine_redis(app))


def test_sentinel_service_unknown(sentinel_url: str) -> None:
    """Where no sentinel knows the service the answer is a 500, and the look at the start says so."""
    app = create_app(config(sentinel_url.replace("/main/", "/other/")))
    assert Caller(app).get("/sessions").status_code == 500
    assert any("No such master" in finding.text for finding in examine_redis(app))


def test_cluster(cluster_url: str) -> None:
    """Sessions live in a cluster, each on the node that has its slot."""
    app = create_app(config(cluster_url))
    live(app)
    disconnect(app)


def test_cluster_refresh(cluster_url: str) -> None:
    """The map of slots is refreshed without new clients: connections to nodes that are well are kept."""
    servers = connect(config(cluster_url))
    assert isinstance(servers, Cluster)
    client = servers.client_for("sessions:{alice}")
    asked = client.info("commandstats")["cmdstat_cluster|slots"]["calls"]
    servers.failed(redis.ConnectionError())
    until(lambda: client.info("commandstats")["cmdstat_cluster|slots"]["calls"] > asked)
    assert servers.client_for("sessions:{alice}") is client
    client.connection_pool.disconnect()


@contextmanager
def moving(node: redis.Redis, folder: Path, slot: int) -> Iterator[redis.Redis]:
    """A second node, to which a slot of the first one begins to move."""
    with cluster_node(folder) as target:
        target.execute_command("CLUSTER", "MEET", "127.0.0.1", port_of(node))
        until(
            lambda: node.cluster("info")["cluster_known_nodes"] == target.cluster("info")["cluster_known_nodes"] == "2"
        )
        names = {each: each.cluster("myid") for each in (node, target)}
        until(lambda: all(KNOWN.items() <= each.cluster("info").items() for each in names))
        until(lambda: all(ids_of(each) == set(names.values()) for each in names))
        target.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", names[node])
        node.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", names[target])
        yield target


def move(node: redis.Redis, target: redis.Redis, key: str) -> None:
    node.execute_command("MIGRATE", "127.0.0.1", port_of(target), key, 0, 1000)


def keys_in(node: redis.Redis, slot: int) -> list[str]:
    return node.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100)


def finish(node: redis.Redis, target: redis.Redis, slot: int) -> None:
    """Move what is left, and let the slot be the target's."""
    for key in keys_in(node, slot):
        move(node, target, key)
    for each in (target, node):
        each.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target.cluster("myid"))


def test_slot_on_its_way(node: redis.Redis, cluster_url: str, tmp_path: Path) -> None:
    """While a slot moves to a node that has none, sessions live on alone and together, and none is called gone."""
    app = create_app(config(cluster_url))
    alice, slot, dead = Caller(app), key_slot(b"sessions:{alice}"), "A" * 32
    ids = [alice.open() for _ in range(3)]

    def check() -> None:
        asked = [*ids, dead] * 60  # more than one call takes
        results = alice.post("/sessions/heartbeat", json={"ids": asked}).json["results"]
        assert [result["success"] for result in results] == [True, True, True, False] * 60
        assert [alice.heartbeat(id).status_code for id in (*ids, dead)] == [200, 200, 200, 404]
        assert set(alice.ids()) == set(ids)

    with moving(node, tmp_path, slot) as target:
        check()
        for key in keys_in(node, slot):
            move(node, target, key)
            check()
        finish(node, target, slot)
        check()
        disconnect(app)


@pytest.mark.parametrize("before", [{}, {"refuseEarlierTokens": True}])
def test_revoke_all_on_its_way(node: redis.Redis, cluster_url: str, tmp_path: Path, before: dict) -> None:
    """While a slot moves a revoke-all ends all sessions or is a 500: none of those that are elsewhere is forgotten."""
    app = create_app(config(cluster_url))
    slot = key_slot(b"sessions:{alice}")
    assert Caller(app).post("/sessions/revoke-all", json=before).status_code == 200
    alice = Caller(app, iat=int(time.time()) + 2)
    ids = [alice.open() for _ in range(3)]
    with moving(node, tmp_path, slot) as target:
        for key in keys_in(node, slot):
            if not any(key.endswith(id) for id in ids[1:]):
                move(node, target, key)
        for more in ({}, {"refuseEarlierTokens": True}):
            assert alice.post("/sessions/revoke-all", json=more).status_code == 500
        finish(node, target, slot)
        assert set(alice.ids()) == set(ids)
        assert alice.post("/sessions/revoke-all").headers["Sessions-Revoked"] == "3"
        disconnect(app)


def test_slots_of_nobody(tmp_path: Path, log: Log) -> None:
    """Where slots of a cluster belong to nobody a service that starts then serves the others, and logs that once."""
    with cluster_node(tmp_path) as node:
        node.config_set("cluster-require-full-coverage", "no")
        node.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 8191)
        until(lambda: node.cluster("info")["cluster_state"] == "ok")
        app = create_app(config(f"redis+cluster://127.0.0.1:{port_of(node)}"))
        log.take()
        for subject in "abcdefgh" * 2:
            served = key_slot(f"{{{subject}}}".encode()) < 8192
            assert Caller(app, subject).post("/sessions").status_code == (201 if served else 500)
        assert app.test_client().get("/readyz").status_code == 200
        trouble = [line["script"] for line in log.take() if line["event"].startswith("redis_")]
        assert sorted(trouble) == ["open", "revoke"]
        disconnect(app)


def test_cluster_away() -> None:
    """While no node of a cluster answers everything is a 500."""
    app = create_app(config(f"redis+cluster://127.0.0.1:{free_port()}"))
    alice = Caller(app)
    assert alice.get("/sessions").status_code == alice.heartbeat("A" * 32).status_code == 500
    assert alice.http.get("/readyz").status_code == 503


def test_primary_moved(primary: redis.Redis) -> None:
    """A Redis that has become a replica is left for whatever stands behind its name now."""
    address = primary.connection_pool.connection_kwargs
    app = create_app(config(f"redis://:p%40ss@127.0.0.1:{address['port']}"))
    assert isinstance(app.extensions["servers"], OnePrimary)
    alice = Caller(app)
    id = alice.open()
    primary.replicaof("127.0.0.1", free_port())
    assert alice.heartbeat("A" * 32).status_code == 500
    primary.replicaof("NO", "ONE")
    assert alice.heartbeat(id).status_code == 200
    disconnect(app)


def test_replicas_do_not_confirm(primary: redis.Redis) -> None:
    """Where replicas have to confirm and there are none, opens are 500s and leave nothing, and heartbeats are not."""
    address = primary.connection_pool.connection_kwargs
    app = create_app(config(f"redis://:p%40ss@127.0.0.1:{address['port']}", redis_wait_replicas=1))
    assert Caller(app).post("/sessions").status_code == 500
    assert primary.keys() == []
    assert Caller(app).heartbeat("A" * 32).status_code == 404
    disconnect(app)


def test_sentinels_are_asked_in_the_background(sentinel_url: str) -> None:
    """New connections take the address that is known: redis-py's own pool would ask a sentinel for each of them."""
    [client] = connect(config(sentinel_url)).clients()
    client.ping()
    with redis.Redis(port=int(sentinel_url.rpartition("/main")[0].rpartition(":")[2])) as sentinel:

        def questions() -> int:
            return sentinel.info("stats")["total_commands_processed"]

        before, began = questions(), time.monotonic()
        for _ in range(100):
            client.connection_pool.disconnect()
            client.ping()
        assert questions() - before < 20 + 10 * (time.monotonic() - began)
    client.connection_pool.disconnect()


def test_primary_replaced(primary: redis.Redis, tmp_path: Path, folder: Path) -> None:
    """Where sentinels name another primary calls go there, by a client of its own, and the old one's is let go."""
    port = free_port()
    with sentinel_of(primary, tmp_path) as url, RedisServer(folder, "--port", str(port)) as other:
        other.client.config_set("requirepass", "p@ss")
        servers = connect(config(url.replace("://", "://:p%40ss@")))
        client = servers.client_for("any")
        assert client.info("server")["tcp_port"] == port_of(primary)
        with redis.Redis(port=port_in(url)) as sentinel:
            sentinel.sentinel_remove("main")
            sentinel.sentinel_monitor("main", "127.0.0.1", port, 1)
        until(lambda: servers.client_for("any").info("server")["tcp_port"] == port)
        assert address_of(servers.client_for("any")) == f"127.0.0.1:{port}"
        known = weakref.ref(client)
        del client
        gc.collect()
        assert known() is None
        assert len(primary.client_list(_type="normal")) == 1  # the test's own
        servers.client_for("any").connection_pool.disconnect()


class Interrupted(BaseException):
    """What ends a reader from outside, as gevent's timeouts do."""


def test_interrupted_reader(sentinel_url: str) -> None:
    """A connection whose reader was interrupted is closed: the reply on it would be the next caller's."""

    def interrupt(*_: object) -> NoReturn:
        raise Interrupted

    [client] = connect(config(sentinel_url)).clients()
    connection = client.connection_pool.get_connection()
    connection.send_command("BLPOP", "nothing", "0.4")
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(Interrupted):
        connection.read_response()
    signal.signal(signal.SIGALRM, before)
    assert not connection.is_connected
    client.connection_pool.release(connection)
    client.connection_pool.disconnect()


def test_cluster_pool(cluster_url: str) -> None:
    """Callers of a cluster's node queue for its connections, as many as a single server's."""
    [client] = connect(config(cluster_url)).clients()
    assert isinstance(client.connection_pool, redis.BlockingConnectionPool)
    assert (client.connection_pool.max_connections, client.connection_pool.timeout) == (POOL_SIZE, 0.25)
    client.connection_pool.disconnect()


def test_cluster_under_another_address(cluster_url: str) -> None:
    """A cluster that has announced addresses without a server is found again where the URL says."""
    app = create_app(config(cluster_url))
    alice = Caller(app)
    id = alice.open()
    with redis.Redis.from_url(cluster_url.replace("redis+cluster", "redis")) as node:
        node.config_set("cluster-announce-ip", "127.1.2.3")
        node.config_set("bind", "127.0.0.1")
        app.extensions["servers"].failed(redis.ConnectionError())
        until(lambda: alice.heartbeat(id).status_code == 500)
        node.config_set("cluster-announce-ip", "127.0.0.1")
        until(lambda: alice.heartbeat(id).status_code == 200)
    disconnect(app)


def test_read_only_connections_in_use(primary: redis.Redis) -> None:
    """A connection that another caller is using is left to them when a Redis turns out to be a replica."""
    servers = connect(config(f"redis://:p%40ss@127.0.0.1:{primary.connection_pool.connection_kwargs['port']}"))
    pool = servers.clients()[0].connection_pool
    used, idle = pool.get_connection(), pool.get_connection()
    pool.release(idle)
    servers.failed(redis.ReadOnlyError())
    assert (used.is_connected, idle.is_connected) == (True, False)
    pool.release(used)
    pool.disconnect()
