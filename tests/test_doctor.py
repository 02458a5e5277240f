"""The doctor: what it says about a configuration and a Redis before they go live."""

import re
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import Result
from flask import Flask

from app import create_app
from app.config import Config
from tests.conftest import SECRET, Caller
from tests.servers import RedisServer, free_port, until
from tests.test_tls import authority, urls  # noqa: F401  # fixtures: two servers behind TLS


def doctor(app: Flask) -> Result:
    return app.test_cli_runner().invoke(args=["doctor"])


def examined(url: str, **settings: object) -> list[str]:
    """The lines of the doctor about a Redis, one worker and a configuration without gaps."""
    public = {"metrics_token": "off", "jwt_issuer": "me", "jwt_audience": ("you",), "trusted_proxies": 1}
    app = create_app(Config(**{"redis_url": url, "jwt_secret": (SECRET,), "web_concurrency": 1, **public, **settings}))
    result = doctor(app)
    app.extensions["servers"].clients()[0].connection_pool.disconnect()
    assert result.exit_code == any(line.startswith("failure") for line in result.output.splitlines())
    return result.output.splitlines()


def test_doctor(app: Flask) -> None:
    """The doctor finds nothing to fail on where all is well, and leaves no session behind."""
    result = doctor(app)
    assert result.exit_code == 0, result.output
    assert "A session was opened, kept alive and revoked" in result.output
    assert all(line.split()[0] in ("ok", "warning") for line in result.output.splitlines())
    assert Caller(app, "doctor").ids() == []


def test_doctor_at_the_limit(make_app: Callable[..., Flask]) -> None:
    """The doctor fails in one line, too, where its sessions of before are still there."""
    app = make_app(session_limit=1)
    Caller(app, "doctor").open()
    result = doctor(app)
    assert result.exit_code == 1
    assert "failure  A session could not be opened, kept alive and revoked: TooManySessions\n" in result.output


def test_doctor_on_redis(redis_server: RedisServer) -> None:
    """Where all is well the doctor has a line for configuration, Redis, keys and the life of a session."""
    redis_server.client.config_set("appendonly", "yes")
    lines = examined(redis_server.url)
    redis_server.client.config_set("appendonly", "no")
    assert [re.sub(r"[0-9.]+ ms", "N ms", line) for line in lines] == [
        "ok       The configuration is complete",
        f"ok       Redis {redis_server.client.info()['redis_version']} answers in N ms",
        "ok       Signing keys are loaded",
        "ok       A session was opened, kept alive and revoked",
    ]


def test_doctor_without_keys(make_app: Callable[..., Flask]) -> None:
    """The doctor fails where no signing key can be loaded."""
    result = doctor(make_app(jwt_secret=(), jwt_jwks_url="http://127.0.0.1:9/"))
    assert result.exit_code == 1
    assert "failure  No signing key" in result.output


@pytest.mark.parametrize(
    "setting, value, warning",
    [
        ("metrics_token", None, "METRICS_TOKEN is not set: /metrics is open to all who reach the service"),
        ("jwt_issuer", None, "JWT_ISSUER is not set: who has issued a token is not checked"),
        ("jwt_audience", (), "JWT_AUDIENCE is not set: tokens that were issued for other services are taken, too"),
        ("trusted_proxies", 0, "TRUSTED_PROXIES is 0: behind a proxy every session would have the proxy's address"),
    ],
)
def test_unset(setting: str, value: object, warning: str) -> None:
    """What should be set where the service is public, and is not, is a warning each."""
    assert not any("warning" in line for line in examined("memory://"))
    [line] = [line for line in examined("memory://", **{setting: value}) if line.startswith("warning")]
    assert line.startswith(f"warning  {warning}")


def test_clients(folder: Path) -> None:
    """A Redis that takes fewer clients than the workers may need is a warning, and one that takes enough is none."""
    with RedisServer(folder, "--maxclients", "50", "--appendonly", "yes") as server:
        assert not any(line.startswith("warning") for line in examined(server.url, web_concurrency=2))
        lines = examined(server.url, web_concurrency=3)
    assert "warning  Redis takes 50 clients: 3 workers may need 60 while they restart" in lines


def test_replica(folder: Path) -> None:
    """A replica is named as one, with its primary's address, and the session that cannot be opened is a failure."""
    port, replica = free_port(), folder / "replica"
    replica.mkdir()
    with RedisServer(folder, "--port", str(port)), RedisServer(replica) as copy:
        copy.client.replicaof("127.0.0.1", port)
        until(lambda: copy.client.info("replication")["master_link_status"] == "up", 20)
        lines = examined(copy.url)
    assert f"warning  Redis is a read-only replica: REDIS_URL must name the primary, 127.0.0.1:{port}" in lines
    assert lines[-1].startswith("failure  A session could not be opened, kept alive and revoked: StoreUnavailable ")
    assert lines[-1].endswith(" (name the primary in REDIS_URL)")


@contextmanager
def refusing(reply: str) -> Iterator[str]:
    """Something that answers every command with one error, as Redis words it; gives its URL."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while header := self.rfile.readline():
                for _ in range(int(header[1:])):
                    self.rfile.read(int(self.rfile.readline()[1:]) + 2)
                self.wfile.write(f"-{reply}\r\n".encode())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"redis://127.0.0.1:{server.server_address[1]}/1"
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    "reply, hint",
    [
        (
            "ERR unknown command 'SENTINEL', with args beginning with: 'MASTER'",
            "this is no sentinel: redis:// or rediss://",
        ),
        ("ERR not acknowledged by enough replicas", "REDIS_WAIT_REPLICAS asks for more replicas than the primary has"),
        ("ERR DB index is out of range", "REDIS_URL ends in a database that is not there; 0 always is"),
        ("ERR SELECT is not allowed in cluster mode", "a cluster needs redis+cluster:// or rediss+cluster://"),
        ("NOAUTH Authentication required.", "REDIS_URL needs a password: redis://:password@host"),
        ("WRONGPASS invalid username-password pair or user is disabled.", "user or password in REDIS_URL are wrong"),
        ("ERR max number of clients reached", "raise maxclients, or lower WEB_CONCURRENCY"),
    ],
)
def test_refusals(reply: str, hint: str) -> None:
    """What a Redis refuses at the first command is told in its own words, with a hint what to do."""
    with refusing(reply) as url:
        [line] = [line for line in examined(url) if line.startswith("failure  Redis does not answer: ")]
    assert f"({hint}" in line


def test_nothing_there() -> None:
    """A Redis that is not there is a failure, with a hint."""
    url = f"redis://127.0.0.1:{free_port()}"
    [line] = [line for line in examined(url) if line.startswith("failure  Redis does not answer: ConnectionError: ")]
    assert line.endswith("(nothing listens there: look at host and port in REDIS_URL)")


@pytest.mark.parametrize(
    "rights, hint",
    [
        (("~session*", "-@all", "+ping", "+info", "+config"), "give the user the rights that docs/operate.md lists"),
        (("~other*", "+@all"), "give the user the keys ~session*"),
        (("~session*", "+@all", "-ping"), None),
    ],
)
def test_rights(folder: Path, rights: tuple[str, ...], hint: str | None) -> None:
    """A user who may not do what sessions need gets a hint; PING is not among that."""
    port = free_port()
    with RedisServer(folder, "--port", str(port)) as server:
        server.client.execute_command("ACL", "SETUSER", "app", "on", ">pw", *rights)
        last = examined(f"redis://app:pw@127.0.0.1:{port}")[-1]
    assert f"({hint}" in last if hint else last == "ok       A session was opened, kept alive and revoked"


@pytest.mark.parametrize(
    "place, scheme, settings, hint",
    [
        ("loopback", "rediss", {}, "set REDIS_CA_CERTS to its authority, or REDIS_TLS_VERIFY=off"),
        ("elsewhere", "rediss", {"pinned": True}, "its certificate is for another host: name that one in REDIS_URL"),
        ("loopback", "redis", {}, "if it speaks TLS on this port: rediss:// instead of redis://"),
        ("plain", "rediss", {}, "only one of the two speaks TLS"),
    ],
)
def test_tls(
    authority: object,  # noqa: F811
    urls: dict[str, str],  # noqa: F811
    folder: Path,
    place: str,
    scheme: str,
    settings: dict[str, object],
    hint: str,
) -> None:
    """A handshake that fails is told with a hint what to do."""
    port = free_port()
    pinned = {"redis_ca_certs": authority.pem} if settings else {}
    with RedisServer(folder, "--port", str(port)):
        url = {**urls, "plain": f"rediss://127.0.0.1:{port}"}[place].replace("rediss:", f"{scheme}:")
        [line] = [line for line in examined(url, **pinned) if line.startswith("failure  Redis does not answer: ")]
    assert hint in line
