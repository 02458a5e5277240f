"""Where the service listens, and what is in front of it: IPv4 and IPv6, a real nginx, connections that stay idle."""

import json
import runpy
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPMessage
from pathlib import Path

import pytest

from tests.conftest import SECRET, token
from tests.servers import (
    ROOT,
    RedisServer,
    free_port,
    free_ports,
    gunicorn_logged,
    gunicorn_process,
    log_lines,
    required,
    running,
    until,
)

IPV4, IPV6 = "0.0.0.0", "[::]"


def settings(monkeypatch: pytest.MonkeyPatch, **environ: str) -> dict[str, object]:
    """What gunicorn.conf.py says in an environment."""
    for name in ("PORT", "TRUSTED_PROXIES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return runpy.run_path(str(ROOT / "gunicorn.conf.py"))


class Kernel(socket.socket):
    """A socket on a machine whose IPv6 is away, is alone on its sockets, or serves IPv4, too."""

    ipv6 = "dual"

    def bind(self, address: tuple) -> None:
        if self.family == socket.AF_INET6 and self.ipv6 == "none":
            raise OSError(99, "Cannot assign requested address")
        super().bind(address)

    def getsockopt(self, level: int, option: int, *size: int) -> int:
        if (level, option) == (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            return int(self.ipv6 == "alone")
        return super().getsockopt(level, option, *size)


@pytest.mark.parametrize("ipv6, hosts", [("dual", [IPV6]), ("alone", [IPV4, IPV6]), ("none", [IPV4])])
def test_addresses(monkeypatch: pytest.MonkeyPatch, ipv6: str, hosts: list[str]) -> None:
    """With PORT the service listens on all addresses that the machine has."""
    monkeypatch.setattr(socket, "socket", Kernel)
    monkeypatch.setattr(Kernel, "ipv6", ipv6)
    assert settings(monkeypatch, PORT="8080")["bind"] == [f"{host}:8080" for host in hosts]


@pytest.mark.parametrize("environ", [{}, {"PORT": ""}, {"PORT": " "}])
def test_localhost(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    """Without PORT the service listens on localhost only."""
    assert settings(monkeypatch, **environ)["bind"] == ["127.0.0.1:8000"]


@pytest.mark.parametrize("proxies, seconds", [("", 5), ("0", 5), ("1", 100), ("2", 100)])
def test_keep_alive(monkeypatch: pytest.MonkeyPatch, proxies: str, seconds: int) -> None:
    """Behind a proxy idle connections outlast its own: Heroku's, for one, keeps them for 90 seconds."""
    assert settings(monkeypatch, TRUSTED_PROXIES=proxies)["keepalive"] == seconds


def ask(connection: HTTPConnection, method: str, path: str, **options: object) -> tuple[int, HTTPMessage, dict]:
    """Send a request with a token; gives status, headers and body of the answer."""
    headers = {"Authorization": f"Bearer {token()}", **options.pop("headers", {})}
    connection.request(method, path, headers=headers, **options)
    response = connection.getresponse()
    return response.status, response.headers, json.loads(response.read())


@pytest.fixture
def environ(redis_server: RedisServer) -> dict[str, str]:
    redis_server.client.flushall()
    return {"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET}


def test_both_protocols(environ: dict[str, str], tmp_path: Path) -> None:
    """IPv4 and IPv6 are served on one port, and the address of an IPv4 client is shown and logged as IPv4."""
    hosts = ["127.0.0.1"]
    if socket.has_dualstack_ipv6():
        hosts.append("::1")
    with gunicorn_logged(environ, tmp_path / "log") as (_, port):
        for host in hosts:
            with closing(HTTPConnection(host, port, timeout=10)) as connection:
                status, _, body = ask(connection, "POST", "/sessions")
                assert (status, body["session"]["ipAddress"]) == (201, host)
            with socket.create_connection((host, port), 10) as connection:
                connection.sendall(b"nonsense\r\n\r\n")
                connection.recv(1)

        def refused() -> list[str]:
            return [each["address"] for each in log_lines(tmp_path / "log") if each["event"] == "request_refused"]

        until(lambda: refused() == hosts)


def test_arguments_win(environ: dict[str, str]) -> None:
    """GUNICORN_CMD_ARGS override the address and the time that an idle connection has."""
    other, unused = free_ports(2)
    environ |= {"PORT": str(unused), "TRUSTED_PROXIES": "1"}
    environ["GUNICORN_CMD_ARGS"] = f"--bind 127.0.0.1:{other} --keep-alive 1"
    with gunicorn_process(environ, port=other):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", unused), 10)
        with socket.create_connection(("127.0.0.1", other), 10) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            began = time.monotonic()
            assert connection.recv(1) == b""
            assert 0.5 < time.monotonic() - began < 4


NGINX = """
daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr;
events {}
http {
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    large_client_header_buffers 4 32k;  # a token of 16 KB
    upstream service {
        server 127.0.0.1:%(service)d;
        keepalive 4;
    }
    server {
        listen 127.0.0.1:%(port)d;
        location /api/ {
            proxy_pass http://service/;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Prefix /api;
            proxy_request_buffering off;
        }
    }
}
"""


@contextmanager
def nginx(service: int, folder: Path) -> Iterator[int]:
    """An nginx in front of the service; gives its port."""
    port = free_port()
    (folder / "nginx.conf").write_text(NGINX % {"service": service, "port": port})
    with running([required("nginx"), "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"]):
        until(lambda: socket.create_connection(("127.0.0.1", port), 1).close() is None)
        yield port


@pytest.fixture(scope="module")
def ports(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    """The ports of an nginx and of the service behind it."""
    environ = {"REDIS_URL": redis_server.url, "JWT_SECRET": SECRET, "TRUSTED_PROXIES": "1"}
    with gunicorn_process(environ) as (_, service), nginx(service, tmp_path_factory.mktemp("nginx")) as port:
        yield port, service


@pytest.fixture
def connection(ports: tuple[int, int], environ: dict[str, str]) -> Iterator[HTTPConnection]:
    """A connection to the nginx."""
    with closing(HTTPConnection("127.0.0.1", ports[0], timeout=10)) as connection:
        yield connection


def established(port: int) -> set[str]:
    """The local ends of this machine's IPv4 connections to a port, as Linux's proc(5) tells them."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {row[1] for row in rows if row[2].endswith(f":{port:04X}") and row[3] == "01"}


def test_idle_behind_nginx(connection: HTTPConnection, ports: tuple[int, int]) -> None:
    """A proxy's connection that was idle for longer than strangers' may be is used for the next request."""
    service = ports[1]
    location = ask(connection, "POST", "/api/sessions")[1]["Location"]
    kept = established(service)
    assert len(kept) == 1
    time.sleep(6)
    assert ask(connection, "POST", f"{location}/heartbeat")[0] == 200
    assert established(service) == kept


def test_forwarded_by_nginx(connection: HTTPConnection) -> None:
    """Address and prefix are those that the proxy has written, whatever the caller writes; the Location works."""
    forged = {"X-Forwarded-For": "192.0.2.66:80", "X-Forwarded-Prefix": "/forged"}
    status, headers, body = ask(connection, "POST", "/api/sessions", headers=forged)
    assert (status, body["session"]["ipAddress"]) == (201, "127.0.0.1")
    assert headers["Location"] == f"/api/sessions/{body['session']['id']}"
    assert ask(connection, "GET", headers["Location"])[0] == 200


def test_chunks_through_nginx(connection: HTTPConnection) -> None:
    """A body without a length arrives, and an unread one leaves the connection as it was."""
    for _ in range(3):
        chunked = {"headers": {"Content-Type": "application/json"}, "encode_chunked": True}
        status, headers, body = ask(
            connection, "POST", "/api/sessions", body=iter([b'{"device', b'Name": "x"}']), **chunked
        )
        assert (status, body["session"]["deviceName"]) == (201, "x")
        heartbeat = f"{headers['Location']}/heartbeat"
        assert ask(connection, "POST", heartbeat, body=iter([b"x" * 9000] * 2), **chunked)[0] == 200


@pytest.mark.parametrize("size", [10_000, 16_384])
def test_long_token_through_nginx(connection: HTTPConnection, size: int) -> None:
    """A token of up to 16,384 bytes, long with groups, is taken."""
    groups = "g" * 7000
    while len(long := token(groups=groups)) < size - 3:
        groups += "g" * ((size - len(long)) * 3 // 4 or 1)
    assert size - 3 <= len(long) <= size
    bearer = {"Authorization": f"Bearer {long}"}
    status, headers, _ = ask(connection, "POST", "/api/sessions", headers=bearer)
    assert status == 201
    assert ask(connection, "POST", f"{headers['Location']}/heartbeat", headers=bearer)[0] == 200
