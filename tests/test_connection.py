"""Sentinel and Cluster, one node of each: the ways there. What happens when they fail is in faults/."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.exceptions import MovedError

from app import create_app
from app.config import Config
from app.doctor import examine_redis
from app.store.connect import POOL_SIZE, Cluster, OnePrimary, connect
from tests.conftest import SECRET, Caller
from tests.servers import free_port, required, running, until


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


@pytest.fixture
def sentinel_url(primary: redis.Redis, tmp_path: Path) -> Iterator[str]:
    """A sentinel that knows the primary, named behind one that is dead."""
    port, file = free_port(), tmp_path / "sentinel.conf"
    watched = primary.connection_pool.connection_kwargs["port"]
    file.write_text(f"port {port}\nsentinel monitor main 127.0.0.1 {watched} 1\nsentinel auth-pass main p@ss\n")
    with running([required("redis-server"), str(file), "--sentinel"], stdout=subprocess.DEVNULL):
        with redis.Redis(port=port, decode_responses=True) as sentinel:
            until(lambda: "disconnected" not in sentinel.sentinel_master("main")["flags"])
        yield f"redis+sentinel://:p%40ss@127.0.0.1:{free_port()},127.0.0.1:{port}/main/3"


@pytest.fixture
def cluster_url(tmp_path: Path) -> Iterator[str]:
    """A cluster of one node, which has all slots."""
    port = free_port()
    while port > 55_000:  # the nodes talk to each other 10,000 ports further up
        port = free_port()
    command = [required("redis-server"), "--port", str(port), "--save", "", "--dir", str(tmp_path)]
    with running([*command, "--cluster-enabled", "yes"], stdout=subprocess.DEVNULL):
        with redis.Redis(port=port, decode_responses=True) as node:
            until(node.ping)
            node.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            until(lambda: node.cluster("info")["cluster_state"] == "ok")
        yield f"redis+cluster://127.0.0.1:{port}"


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


def test_sentinel_service_unknown(sentinel_url: str) -> None:
    """Where no sentinel knows the service the answer is a 500, and the look at the start says so."""
    app = create_app(config(sentinel_url.replace("/main/", "/other/")))
    assert Caller(app).get("/sessions").status_code == 500
    assert any("No master found" in finding.text for finding in examine_redis(app))


def test_cluster(cluster_url: str) -> None:
    """Sessions live in a cluster, each on the node that has its slot."""
    app = create_app(config(cluster_url))
    live(app)
    disconnect(app)


def test_cluster_follows(cluster_url: str) -> None:
    """What has moved is followed to where it is said to be."""
    servers = connect(config(cluster_url))
    assert isinstance(servers, Cluster)
    moved = MovedError(f"0 127.0.0.1:{free_port()}")
    assert servers.follow(moved, ("ZCARD", "sessions:{alice}")) == 0
    servers.failed(redis.ConnectionError())  # has the map of slots renewed
    assert servers.client_for("sessions:{alice}").ping()
    for client in servers.clients():
        client.connection_pool.disconnect()


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


def test_sentinel_pool_is_bounded() -> None:
    """However often the primary cannot be reached, no more connections are kept than the pool may have."""
    servers = connect(config(f"redis+sentinel://127.0.0.1:{free_port()}/main"))
    [client] = servers.clients()
    for _ in range(3 * POOL_SIZE):
        with pytest.raises(redis.ConnectionError):
            client.ping()
    assert len(client.connection_pool._connections) <= POOL_SIZE


def test_cluster_pool(cluster_url: str) -> None:
    """Callers of a cluster's node queue for its connections, as many as a single server's."""
    [client] = connect(config(cluster_url)).clients()
    assert isinstance(client.connection_pool, redis.BlockingConnectionPool)
    assert (client.connection_pool.max_connections, client.connection_pool.timeout) == (POOL_SIZE, 0.25)
    client.connection_pool.disconnect()


def test_cluster_under_another_address(cluster_url: str) -> None:
    """A cluster that has announced addresses where nobody is is found again where the URL says."""
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
