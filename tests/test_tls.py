"""Redis over TLS, alone, behind Sentinel and as a Cluster: certificates are verified unless that is switched off."""

import datetime
import http.client
import ipaddress
import itertools
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from app import create_app
from app.config import Config
from tests.conftest import SECRET, Caller, Log, token
from tests.servers import RedisServer, free_port, gunicorn_logged, log_lines, required, running, until

NAMES = {"loopback": x509.IPAddress(ipaddress.ip_address("127.0.0.1")), "elsewhere": x509.DNSName("elsewhere.test")}


class Authority:
    """A certificate authority of a test's own."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        # Of two authorities with one name OpenSSL would try but the first.
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Authority {next(self._numbers)}")])
        self.certificate = self._certify(self._name, self._key, x509.BasicConstraints(ca=True, path_length=None))
        self.pem = self.certificate.public_bytes(Encoding.PEM).decode()

    def issue(self, folder: Path, name: x509.GeneralName) -> tuple[Path, Path]:
        """Certify a new key for a server; gives the files of the certificate and of the key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "redis")])
        certificate = self._certify(subject, key, x509.SubjectAlternativeName([name]))
        files = folder / "redis.crt", folder / "redis.key"
        files[0].write_bytes(certificate.public_bytes(Encoding.PEM))
        files[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return files

    def _certify(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = x509.CertificateBuilder(self._name, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(hours=1))
        builder = builder.not_valid_after(now + datetime.timedelta(hours=1))
        return builder.add_extension(extension, critical=True).sign(self._key, SHA256())


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def encrypted(authority: Authority, folder: Path, place: str) -> tuple[int, dict[str, object]]:
    """A port, and the settings of a server that speaks TLS and nothing else there, with its peers as well."""
    port, (certificate, key) = free_port(), authority.issue(folder, NAMES[place])
    (folder / "ca.crt").write_text(authority.pem)
    files = {"tls-cert-file": certificate, "tls-key-file": key, "tls-ca-cert-file": folder / "ca.crt"}
    peers = {"tls-replication": "yes", "tls-cluster": "yes", "tls-auth-clients": "no"}
    return port, {"port": 0, "tls-port": port, **peers, **files}


@contextmanager
def server(authority: Authority, folder: Path, place: str, **settings: str) -> Iterator[tuple[int, redis.Redis]]:
    """A server behind TLS: its port, and a client on its socket."""
    port, options = encrypted(authority, folder, place)
    options |= {name.replace("_", "-"): value for name, value in settings.items()}
    with RedisServer(folder, *(str(part) for name, value in options.items() for part in (f"--{name}", value))) as it:
        yield port, it.client


@pytest.fixture(scope="module")
def urls(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Two servers at 127.0.0.1 behind TLS alone, one with a certificate for that and one with another's."""
    found = {}
    with ExitStack() as stack:
        for place in NAMES:
            port, _ = stack.enter_context(server(authority, tmp_path_factory.mktemp("t"), place))
            found[place] = f"rediss://127.0.0.1:{port}/0"
        yield found


@contextmanager
def sentinel(authority: Authority, new_folder: Callable[[str], Path], places: tuple[str, str]) -> Iterator[str]:
    """A server and its sentinel, which want a password, with certificates for these places; gives their URL."""
    with server(authority, new_folder("t"), places[0]) as (watched, client):
        client.config_set("requirepass", "pw")
        folder = new_folder("t")
        port, options = encrypted(authority, folder, places[1])
        options |= {
            "requirepass": "pw",
            "sentinel monitor": f"main 127.0.0.1 {watched} 1",
            "sentinel auth-pass": "main pw",
        }
        file = folder / "sentinel.conf"
        file.write_text("".join(f"{name} {value}\n" for name, value in options.items()))
        with running([required("redis-server"), str(file), "--sentinel"], stdout=subprocess.DEVNULL):
            way = {"ssl": True, "ssl_cert_reqs": "none", "password": "pw", "decode_responses": True}
            with redis.Redis(port=port, **way) as client:
                until(lambda: "disconnected" not in client.sentinel_master("main")["flags"])
            yield f"rediss+sentinel://:pw@127.0.0.1:{port}/main"


@contextmanager
def cluster(authority: Authority, new_folder: Callable[[str], Path], place: str) -> Iterator[str]:
    """A cluster of three primaries with certificates for a place; gives its URL."""
    with ExitStack() as stack:
        on = {"cluster_enabled": "yes"}
        nodes = [stack.enter_context(server(authority, new_folder("t"), place, **on)) for _ in range(3)]
        for number, (_, node) in enumerate(nodes):
            node.execute_command("CLUSTER", "ADDSLOTSRANGE", number * 5461, min(number * 5461 + 5460, 16383))
            node.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            node.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0][0])
        nodes[-1][1].execute_command("CLUSTER", "ADDSLOTS", 16383)
        known = {"cluster_state": "ok", "cluster_known_nodes": "3", "cluster_size": "3"}
        for _, node in nodes:
            until(lambda node=node: known.items() <= node.cluster("info").items(), 30)
        yield f"rediss+cluster://127.0.0.1:{nodes[0][0]},127.0.0.1:{nodes[1][0]}"


@contextmanager
def caller(url: str, **more: str) -> Iterator[Caller]:
    """A caller of an app with this environment."""
    app = create_app(Config.from_env({"REDIS_URL": url, "JWT_SECRET": SECRET, **more}))
    yield Caller(app)
    with suppress(redis.RedisError):  # a cluster that could not be reached
        for client in app.extensions["servers"].clients():
            client.connection_pool.disconnect()


WAYS: dict[str, Callable[[str, Path], str]] = {
    "a file": lambda pem, file: str(file),
    "the PEM": lambda pem, file: pem,
    "the PEM on one line": lambda pem, file: pem.replace("\n", "\\n"),
    "two authorities": lambda pem, file: Authority().pem + pem,
}


@pytest.mark.parametrize("way", WAYS)
def test_pinned(authority: Authority, urls: dict[str, str], tmp_path: Path, way: str) -> None:
    """A self-signed authority can be pinned, by a file or by the certificate itself."""
    (tmp_path / "ca.crt").write_text(authority.pem)
    with caller(urls["loopback"], REDIS_CA_CERTS=WAYS[way](authority.pem, tmp_path / "ca.crt")) as alice:
        assert alice.heartbeat(alice.open()).status_code == 200
        assert alice.get("/readyz").status_code == 200


SENTINELS = {
    "for both": ("loopback", "loopback"),
    "for the sentinel": ("elsewhere", "loopback"),
    "for the server": ("loopback", "elsewhere"),
}


@pytest.mark.parametrize("certified", SENTINELS)
def test_sentinel(authority: Authority, tmp_path_factory: pytest.TempPathFactory, certified: str) -> None:
    """The certificates of both sentinels and servers are verified, unless that is switched off."""
    with sentinel(authority, tmp_path_factory.mktemp, SENTINELS[certified]) as url:
        with caller(url, REDIS_CA_CERTS=authority.pem) as alice:
            assert served(alice) == (certified == "for both")
        with caller(url) as alice:
            assert not served(alice)
        with caller(url, REDIS_TLS_VERIFY="off") as alice:
            assert served(alice)
        with caller(url.replace("rediss", "redis")) as alice:
            assert not served(alice)


@pytest.mark.parametrize("place", NAMES)
def test_cluster(authority: Authority, tmp_path_factory: pytest.TempPathFactory, place: str) -> None:
    """The certificates of all nodes of a cluster are verified, unless that is switched off."""
    with cluster(authority, tmp_path_factory.mktemp, place) as url:
        with caller(url, REDIS_CA_CERTS=authority.pem) as alice:
            assert served(alice) == (place == "loopback")
            if place == "loopback":
                assert len(alice.http.application.extensions["servers"].clients()) == 3
        with caller(url) as alice:
            assert not served(alice)
        with caller(url, REDIS_TLS_VERIFY="off") as alice:
            assert served(alice)


def served(alice: Caller) -> bool:
    """Whether sessions of several subjects are opened, kept alive, listed and revoked; else all of that fails."""
    answers = set()
    for number in range(8):  # in a cluster they are on different nodes
        someone = Caller(alice.http.application, f"{number}")
        opened = someone.post("/sessions")
        id = opened.json["session"]["id"] if opened.status_code == 201 else "A" * 32
        for call in (someone.heartbeat, lambda _: someone.get("/sessions"), someone.revoke):
            answers.add(call(id).status_code)
        if opened.status_code == 500:
            break
    assert answers in ({200}, {500})
    assert alice.get("/readyz").status_code == (200 if answers == {200} else 503)
    return answers == {200}


def test_unknown_authority(urls: dict[str, str]) -> None:
    """Certificates are verified unless it is switched off: one of an unknown authority is a 500."""
    with caller(urls["loopback"]) as alice:
        refused = alice.post("/sessions")
        assert (refused.status_code, refused.json["error"]) == (500, "Failed to open session")
        assert alice.get("/readyz").status_code == 503


def test_another_authority(urls: dict[str, str]) -> None:
    """Pinning one authority does not make another one trusted."""
    with caller(urls["loopback"], REDIS_CA_CERTS=Authority().pem) as alice:
        assert alice.post("/sessions").status_code == 500


@pytest.fixture
def system(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose own authorities are the test's."""
    (tmp_path / "system.crt").write_text(authority.pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "system.crt"))


def test_system(system: None, urls: dict[str, str]) -> None:
    """The machine's own authorities are trusted, unless others are pinned instead."""
    with caller(urls["loopback"]) as alice:
        assert served(alice)
    with caller(urls["loopback"], REDIS_CA_CERTS=Authority().pem) as alice:
        assert not served(alice)


@pytest.mark.parametrize("kind", ["sentinel", "cluster"])
def test_system_of_several(
    system: None, authority: Authority, tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    """The same goes for Sentinel and for a cluster."""
    place = {"sentinel": ("loopback", "loopback"), "cluster": "loopback"}[kind]
    with {"sentinel": sentinel, "cluster": cluster}[kind](authority, tmp_path_factory.mktemp, place) as url:
        with caller(url) as alice:
            assert served(alice)
        with caller(url, REDIS_CA_CERTS=Authority().pem) as alice:
            assert not served(alice)


def test_another_name(authority: Authority, urls: dict[str, str]) -> None:
    """A certificate for another host is refused although its authority is trusted."""
    with caller(urls["elsewhere"], REDIS_CA_CERTS=authority.pem) as alice:
        assert alice.post("/sessions").status_code == 500


@pytest.mark.parametrize("place", NAMES)
def test_not_verified(urls: dict[str, str], log: Log, place: str) -> None:
    """With REDIS_TLS_VERIFY=off any certificate will do, and a warning says so."""
    with caller(urls[place], REDIS_TLS_VERIFY="off") as alice:
        assert alice.post("/sessions").status_code == 201
    warning, opened = log.take()
    assert (warning["event"], warning["levelname"]) == ("redis_tls_not_verified", "WARNING")
    assert opened["event"] == "session_opened"


def test_verified_is_not_worth_a_line(authority: Authority, urls: dict[str, str], log: Log) -> None:
    """Nothing is logged about TLS where certificates are verified."""
    with caller(urls["loopback"], REDIS_CA_CERTS=authority.pem) as alice:
        assert alice.post("/sessions").status_code == 201
    assert log.names() == ["session_opened"]


@pytest.mark.parametrize("verify", ["on", "off"])
def test_served(authority: Authority, urls: dict[str, str], tmp_path: Path, verify: str) -> None:
    """Gunicorn's workers speak TLS too, and their log says where certificates are not verified."""
    trust = {"REDIS_TLS_VERIFY": "off"} if verify == "off" else {"REDIS_CA_CERTS": authority.pem.replace("\n", "\\n")}
    environ = {"REDIS_TLS_URL": urls["loopback"], "JWT_SECRET": SECRET, **trust}
    with gunicorn_logged(environ, tmp_path / "log") as (_, port):
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            connection.request("POST", "/sessions", headers={"Authorization": f"Bearer {token()}"})
            assert connection.getresponse().status == 201
    warned = "redis_tls_not_verified" in [line["event"] for line in log_lines(tmp_path / "log")]
    assert warned == (verify == "off")
