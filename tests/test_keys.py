"""Signing keys from an issuer's key set, over HTTP on both sides."""

import base64
import contextlib
import json
import re
import ssl
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from flask import Flask
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from werkzeug.test import TestResponse

from app import create_app
from app.config import Config
from app.keys import JwksKeys, JwksSource
from tests.servers import ROOT, until
from tests.test_tls import Authority

SHARED_SECRET = "known-to-whoever-reads-the-key-set"


class Issuer:
    """A key set on loopback, in whatever state a test wants it."""

    def __init__(self) -> None:
        self.keys: list[object] = []
        self.body: bytes | None = None  # sent instead of the keys
        self.status = 200
        self.headers: dict[str, str] = {}
        self.delay = 0.0
        self.requests = 0
        self.asked: Any = {}  # the headers of the last request
        self._port = 0
        self.start()
        self.url = f"http://127.0.0.1:{self._port}/jwks"

    def start(self) -> None:
        issuer = self
        self._stopping = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.requests += 1
                issuer.asked = self.headers
                body = json.dumps({"keys": issuer.keys}).encode() if issuer.body is None else issuer.body
                issuer._stopping.wait(issuer.delay)
                with contextlib.suppress(ConnectionError):  # the caller has given up
                    self.send_response(issuer.status)
                    for name, value in issuer.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def use_tls(self, certificate: Path, private_key: Path) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, private_key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://localhost:{self._port}/jwks"

    def stop(self) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Key:
    """A key pair of the issuer's."""

    id: str
    algorithm: str = "ES256"

    def __post_init__(self) -> None:
        self._private: Any = {
            "RS256": lambda: rsa.generate_private_key(65537, 2048),
            "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
            "EdDSA": ed25519.Ed25519PrivateKey.generate,
        }[self.algorithm]()

    def jwk(self, *, private: bool = False, **members: object) -> dict[str, Any]:
        kind = {"RS256": RSAAlgorithm, "ES256": ECAlgorithm, "EdDSA": OKPAlgorithm}[self.algorithm]
        key = self._private if private else self._private.public_key()
        return {**kind.to_jwk(key, as_dict=True), "kid": self.id, **members}

    def token(self, *, algorithm: str = "", padding: str = "", **header: str | None) -> str:
        """A token under this key's id, unless the header names another one or None."""
        named = {name: value for name, value in {"kid": self.id, **header}.items() if value is not None}
        claims = {"sub": "alice", "exp": int(time.time()) + 86400, "padding": padding}
        return jwt.encode(claims, self._private, algorithm or self.algorithm, headers=named)


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    yield issuer
    issuer.stop()


@pytest.fixture
def key(issuer: Issuer) -> Key:
    """A key that is in the issuer's key set."""
    key = Key("first")
    issuer.keys = [key.jwk()]
    return key


def app_of(issuer: Issuer, url: str = "", **settings: object) -> Flask:
    settings["jwt_jwks_url"] = url or issuer.url
    return create_app(Config(redis_url="memory://", web_concurrency=1, **settings))


def ask(app: Flask, token: str) -> TestResponse:
    return app.test_client().get("/sessions", headers={"Authorization": f"Bearer {token}"})


def status(app: Flask, token: str) -> int:
    return ask(app, token).status_code


def timed(app: Flask, token: str) -> tuple[int, float]:
    """The status of an answer and the seconds that it took."""
    begun = time.perf_counter()
    return status(app, token), time.perf_counter() - begun


@pytest.fixture
def cooled_down(monkeypatch: pytest.MonkeyPatch) -> Callable[[Flask], None]:
    """Waits for the end of the cool-down that an app's first fetch has begun, which is a short one."""
    monkeypatch.setattr(JwksKeys, "COOLDOWN", 0.05)
    return lambda app: until(lambda: not app.extensions["keys"]._just_fetched.is_set())


@pytest.fixture
def often_refreshed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JwksKeys, "COOLDOWN", 0.01)
    monkeypatch.setattr(JwksKeys, "REFRESH_EVERY", 0.02)


def hmac_token(**header: str) -> str:
    return jwt.encode({"sub": "alice", "exp": int(time.time()) + 600}, SHARED_SECRET, "HS256", headers=header)


def oct_jwk(id: str) -> dict[str, str]:
    """The secret as a key set would hold it."""
    return json.loads(jwt.algorithms.HMACAlgorithm.to_jwk(SHARED_SECRET.encode())) | {"kid": id}


def answers(**state: object) -> Callable[[Issuer], None]:
    """Puts an issuer into a state."""
    return lambda issuer: vars(issuer).update(state)


# What an issuer may do instead of answering with keys that can be used.
TROUBLES = [
    pytest.param(answers(status=500), id="500"),
    pytest.param(answers(body=b"<h1>It works!</h1>"), id="garbage"),
    pytest.param(answers(body=b"[" * 100_000), id="nested deeply"),
    pytest.param(answers(body=b""), id="nothing"),
    pytest.param(answers(body=b"[]"), id="a list"),
    pytest.param(answers(body=b"{}"), id="no member keys"),
    pytest.param(answers(body=b'{"keys": {"a": 1}}'), id="keys an object"),
    pytest.param(answers(body=b'{"keys": [{"kid": "first"}, null]}'), id="broken keys"),
    pytest.param(answers(keys=[]), id="no keys"),
    pytest.param(answers(keys=[Key("first").jwk(use="enc")]), id="encryption keys"),
    pytest.param(answers(keys=[oct_jwk("first")]), id="symmetric keys"),
    pytest.param(
        answers(body=json.dumps({"keys": [Key("first").jwk()], "padding": "x" * 1_000_000}).encode()), id="1 MB"
    ),
    pytest.param(Issuer.stop, id="gone"),
]


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_accepted(issuer: Issuer, algorithm: str) -> None:
    """A token that a key of the set has signed is accepted, whatever kind of key it is."""
    key = Key("first", algorithm)
    issuer.keys = [Key("other").jwk(), key.jwk(use="sig", alg=algorithm)]
    app = app_of(issuer)
    assert status(app, key.token()) == 200
    assert status(app, Key("first", algorithm).token()) == 401
    assert issuer.requests == 1


def test_rotation(issuer: Issuer, key: Key, cooled_down: Callable[[Flask], None]) -> None:
    """The first token under a new key makes for one fetch and is accepted; the key that has left is refused."""
    app = app_of(issuer)
    cooled_down(app)
    new = Key("second")
    issuer.keys = [new.jwk()]
    assert status(app, key.token()) == 200
    assert status(app, new.token()) == 200
    assert issuer.requests == 2
    assert status(app, key.token()) == 401


@pytest.mark.parametrize("trouble", TROUBLES)
def test_last_good_keys(
    issuer: Issuer, key: Key, trouble: Callable[[Issuer], None], cooled_down: Callable[[Flask], None]
) -> None:
    """The keys stay in use while the issuer sends none."""
    app = app_of(issuer)
    cooled_down(app)
    trouble(issuer)
    assert status(app, Key("unknown").token()) == 401  # after a fetch
    assert status(app, key.token()) == 200
    assert status(app, Key("first").token()) == 401


def test_almost_1_mb(issuer: Issuer, key: Key) -> None:
    """A key set of 1,000,000 bytes is taken."""
    empty = len(json.dumps({"keys": issuer.keys, "padding": ""}))
    issuer.body = json.dumps({"keys": issuer.keys, "padding": "x" * (1_000_000 - empty)}).encode()
    assert status(app_of(issuer), key.token()) == 200


ENDLESS = """
from gevent import monkey
monkey.patch_all()
import socket, threading, time
from app.keys import JwksKeys, JwksSource
listener = socket.create_server(("127.0.0.1", 0))
def pour():
    connection = listener.accept()[0]
    connection.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\n")
    try:
        while True:
            connection.sendall(b" " * 65536)
            poured.append(65536)
    except OSError:
        ended.set()
poured, ended = [], threading.Event()
threading.Thread(target=pour, daemon=True).start()
JwksKeys(JwksSource(f"http://127.0.0.1:{listener.getsockname()[1]}/"), print)
assert ended.wait(5), "it reads on"
assert sum(poured) < 20_000_000, sum(poured)
"""


def test_endless_key_set() -> None:
    """An answer without an end is given up after 1 MB."""
    subprocess.run([sys.executable, "-c", ENDLESS], cwd=ROOT, timeout=30, check=True)


def test_redirect(issuer: Issuer, key: Key) -> None:
    """No redirect leads to plain http: an attacker who can change the keys in transit can sign tokens."""
    other = Issuer()
    other.keys, issuer.status, issuer.headers = issuer.keys, 302, {"Location": other.url}
    assert ask(app_of(issuer), key.token()).status_code == 503
    assert other.requests == 0
    other.stop()


def test_many_unknown_keys(
    issuer: Issuer, key: Key, monkeypatch: pytest.MonkeyPatch, cooled_down: Callable[[Flask], None]
) -> None:
    """Fifty unknown key ids at once are one fetch, and all of those within the cool-down none."""
    app = app_of(issuer)
    cooled_down(app)
    monkeypatch.setattr(JwksKeys, "COOLDOWN", 30.0)
    tokens = [key.token(kid=f"unknown-{n}") for n in range(50)]
    with ThreadPoolExecutor(50) as callers:
        assert set(callers.map(lambda token: status(app, token), tokens)) == {401}
    assert issuer.requests == 2
    assert {status(app, token) for token in tokens} == {401}
    assert issuer.requests == 2


def test_cool_down_ends(issuer: Issuer, key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for in the cool-down is fetched at its end, without another token."""
    monkeypatch.setattr(JwksKeys, "COOLDOWN", 0.2)
    app = app_of(issuer)
    late = Key("late")
    assert status(app, late.token()) == 401
    issuer.keys.append(late.jwk())
    until(lambda: issuer.requests > 1)
    until(lambda: status(app, late.token()) == 200)


@pytest.mark.timed
def test_hanging_issuer(issuer: Issuer, key: Key, cooled_down: Callable[[Flask], None]) -> None:
    """While the issuer hangs, unknown key ids wait a second and known ones not at all."""
    app = app_of(issuer)
    cooled_down(app)
    issuer.delay = 60
    with ThreadPoolExecutor(20) as callers:
        unknown = [callers.submit(timed, app, key.token(kid=f"unknown-{n}")) for n in range(20)]
        until(lambda: issuer.requests == 2)
        known = [timed(app, key.token()) for _ in range(5)]
        assert not any(call.done() for call in unknown)
        assert {status for status, _ in known} == {200}
        assert statistics.median(seconds for _, seconds in known) < 0.5
        assert {call.result()[0] for call in unknown} == {401}
        assert max(call.result()[1] for call in unknown) < 3


@pytest.mark.timed
@pytest.mark.parametrize("trouble", [*TROUBLES, pytest.param(answers(delay=60.0), id="hanging")])
def test_no_key_ever(
    issuer: Issuer, key: Key, trouble: Callable[[Issuer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any key the answer is 503, not 401, until the issuer is there."""
    monkeypatch.setattr(JwksKeys, "RETRY_EVERY", 0.02)
    monkeypatch.setattr(JwksSource, "TIMEOUT", 0.1)
    monkeypatch.setattr(JwksKeys, "UNKNOWN_KEY_WAIT", 0.1)
    healthy = dict(vars(issuer))
    trouble(issuer)
    app = app_of(issuer)
    for token in (key.token(), key.token(kid=None)):
        response = ask(app, token)
        assert response.status_code == 503
        assert response.content_type == "application/json"
        assert response.json == {"success": False, "error": "Signing keys not available"}
        assert int(response.headers["Retry-After"]) > 0
        assert "WWW-Authenticate" not in response.headers
    assert status(app, "garbage") == 401
    if trouble is Issuer.stop:
        issuer.start()
    else:
        vars(issuer).update({name: healthy[name] for name in ("keys", "body", "status", "delay")})
    until(lambda: status(app, key.token()) == 200)


@pytest.mark.parametrize("algorithms", [("ES256", "ES256"), ("ES256", "RS256"), ("RS256", "ES256"), ("EdDSA", "RS256")])
def test_without_key_id(issuer: Issuer, algorithms: tuple[str, str]) -> None:
    """A token without a key id is tried against every key of the set."""
    keys = [Key(f"key-{n}", algorithm) for n, algorithm in enumerate(algorithms)]
    issuer.keys = [key.jwk() for key in keys]
    app = app_of(issuer)
    assert [status(app, key.token(kid=None)) for key in keys] == [200, 200]
    assert status(app, Key("other").token(kid=None)) == 401
    assert issuer.requests == 1


@pytest.mark.parametrize("kid", ["first", None])
def test_key_without_id(issuer: Issuer, kid: str | None) -> None:
    """A key of the set that has no id, which is optional (RFC 7517 §4.5), is tried for every token."""
    key = Key("first", "RS256")
    issuer.keys = [{name: value for name, value in key.jwk().items() if name != "kid"}]
    app = app_of(issuer)
    assert status(app, key.token(kid=kid)) == 200
    assert status(app, Key("first", "RS256").token(kid=kid)) == 401
    assert issuer.requests == 1


def test_one_id_for_two_keys(issuer: Issuer) -> None:
    """Keys of different kinds may share an id (RFC 7517 §4.5)."""
    keys = [Key("first", algorithm) for algorithm in ("ES256", "RS256")]
    issuer.keys = [key.jwk() for key in keys]
    app = app_of(issuer)
    assert [status(app, key.token()) for key in keys] == [200, 200]


@pytest.mark.parametrize("algorithm", ["RS256", "RS512", "PS256"])
def test_rsa_key_without_algorithm(issuer: Issuer, algorithm: str) -> None:
    """An RSA key that names no algorithm verifies all of its family, and one that does only that one."""
    free, bound = Key("free", "RS256"), Key("bound", "RS256")
    issuer.keys = [free.jwk(), bound.jwk(alg="RS256")]
    app = app_of(issuer)
    assert status(app, free.token(algorithm=algorithm)) == 200
    assert status(app, bound.token(algorithm=algorithm)) == (200 if algorithm == "RS256" else 401)


DRIPPING = """
from gevent import monkey
monkey.patch_all()
import socket, sys, threading, time
from app.keys import JwksKeys, JwksSource
JwksSource.TIMEOUT = JwksKeys.UNKNOWN_KEY_WAIT = JwksKeys.RETRY_EVERY = 0.1
listener = socket.create_server(("127.0.0.1", 0))
asked = []
def drip(connection):
    connection.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\n")
    while True:
        time.sleep(0.05)
        connection.sendall(b" ")
def serve():
    while True:
        asked.append(listener.accept()[0])
        threading.Thread(target=drip, args=asked[-1:], daemon=True).start()
threading.Thread(target=serve, daemon=True).start()
JwksKeys(JwksSource(f"http://127.0.0.1:{listener.getsockname()[1]}/"), print)
end = time.monotonic() + 10
while len(asked) < 3 and time.monotonic() < end:
    time.sleep(0.05)
sys.exit(len(asked) < 3)
"""


def test_dripping_issuer() -> None:
    """A fetch that never ends, though something comes all the time, is given up, and the next one begins."""
    assert subprocess.run([sys.executable, "-c", DRIPPING], cwd=ROOT, timeout=30).returncode == 0


def verifications(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with each signature that is checked from now on."""
    counted: list[object] = []
    verify = OKPAlgorithm.verify

    def counting(self: OKPAlgorithm, *args: Any) -> bool:
        counted.append(args)
        return verify(self, *args)

    monkeypatch.setattr(OKPAlgorithm, "verify", counting)
    return counted


def many_keys(number: int) -> list[dict[str, Any]]:
    """So many keys without an id; tokens are signed with few of them, and all of them verify."""
    key = Key("", "EdDSA").jwk()
    return [{"kty": "OKP", "crv": "Ed25519", "x": key["x"]}] * number


@pytest.mark.parametrize("number", [100, 10_000])
def test_few_keys_are_tried(issuer: Issuer, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A token without a key id costs eight verifications at the most, however many keys there are."""
    issuer.keys = many_keys(number)
    app = app_of(issuer)
    until(lambda: status(app, Key("", "EdDSA").token(kid=None)) == 401)
    counted = verifications(monkeypatch)
    token = Key("", "EdDSA").token(kid=None, padding="x" * 5_000)
    assert (len(token) > 6_000, status(app, token), len(counted)) == (True, 401, 8)


def test_known_id_among_many(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that names its key is verified with that one only."""
    keys = [Key(f"key-{number}", "EdDSA") for number in range(20)]
    issuer.keys = [key.jwk() for key in keys]
    app = app_of(issuer)
    counted = verifications(monkeypatch)
    assert (status(app, keys[19].token()), len(counted)) == (200, 1)


def test_unfit_keys_are_not_tried(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of another kind, or bound to another algorithm, are not among the eight."""
    key = Key("mine", "EdDSA")
    others = [Key(f"other-{number}") for number in range(10)]
    issuer.keys = [*(other.jwk() for other in others), key.jwk()]
    app = app_of(issuer)
    counted = verifications(monkeypatch)
    assert (status(app, key.token(kid=None)), len(counted)) == (200, 1)


def test_more_keys_without_id_than_are_tried(issuer: Issuer, caplog: pytest.LogCaptureFixture) -> None:
    """A set with more than eight keys without an id for an algorithm is a warning, once for each such set."""
    issuer.keys = many_keys(8)
    app_of(issuer)
    assert "key_set_too_large" not in caplog.text
    issuer.keys = many_keys(9)
    app = app_of(issuer)
    for _ in range(3):
        assert status(app, Key("", "EdDSA").token(kid=None)) == 401
    [warning] = [record for record in caplog.records if record.getMessage() == "key_set_too_large"]
    assert (warning.levelname, warning.keys_without_id, warning.tried) == ("WARNING", 9, 8)


def test_key_id_of_another_key(issuer: Issuer, key: Key) -> None:
    """A token that names one key and is signed with another is refused."""
    other = Key("second")
    issuer.keys.append(other.jwk())
    assert status(app_of(issuer), key.token(kid="second")) == 401


def test_symmetric_key(issuer: Issuer, key: Key) -> None:
    """A symmetric key in the set verifies nothing and spoils no other key."""
    issuer.keys.insert(0, oct_jwk("symmetric"))
    app = app_of(issuer)
    assert status(app, hmac_token(kid="symmetric")) == status(app, hmac_token()) == 401
    assert status(app, hmac_token(kid="first")) == 401
    assert status(app, key.token()) == status(app, key.token(kid=None)) == 200


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_private_key(issuer: Issuer, algorithm: str) -> None:
    """A private key that was published by mistake verifies nothing and spoils no other key."""
    leaked, key = Key("leaked", algorithm), Key("first", algorithm)
    issuer.keys = [leaked.jwk(private=True, key_ops=["sign", "verify"]), key.jwk()]
    app = app_of(issuer)
    assert status(app, leaked.token()) == status(app, leaked.token(kid=None)) == 401
    assert status(app, key.token(kid=None)) == 200


@pytest.mark.parametrize("purpose", [{"use": "enc"}, {"key_ops": ["encrypt"]}], ids="".join)
def test_encryption_key(issuer: Issuer, key: Key, purpose: dict[str, object]) -> None:
    """A key that is there for encryption verifies no signature (RFC 7517 §4.2, §4.3)."""
    encryption = Key("encryption")
    issuer.keys.append(encryption.jwk(**purpose))
    app = app_of(issuer)
    assert status(app, encryption.token()) == status(app, encryption.token(kid=None)) == 401


@pytest.mark.parametrize(
    "member",
    [
        pytest.param(5, id="not an object"),
        pytest.param({"kid": "odd"}, id="no type"),
        pytest.param({"kid": "odd", "kty": "EC", "crv": "P-256"}, id="no point"),
        pytest.param({"kid": "odd", "kty": "AKP"}, id="unknown type"),
        pytest.param(Key("odd").jwk(alg="ECDH-ES"), id="unknown algorithm"),
        pytest.param(Key("odd").jwk(alg="none"), id="algorithm none"),
        pytest.param(Key("odd").jwk(alg=["ES256"]), id="algorithm a list"),
        pytest.param(Key("odd").jwk(kid=["odd"]), id="id a list"),
    ],
)
def test_unusable_key(issuer: Issuer, key: Key, member: object) -> None:
    """A member of the set that is no usable key is ignored, and the others are used (RFC 7517 §5)."""
    issuer.keys.insert(0, member)
    app = app_of(issuer)
    assert status(app, key.token()) == status(app, key.token(kid=None)) == 200


@pytest.mark.usefixtures("often_refreshed")
def test_replaced_key(issuer: Issuer, key: Key) -> None:
    """A key that was replaced under the same id is noticed at the next refresh."""
    app = app_of(issuer)
    assert status(app, key.token()) == 200
    new = Key(key.id)
    issuer.keys = [new.jwk()]
    until(lambda: status(app, new.token()) == 200)
    assert status(app, key.token()) == 401


@pytest.mark.usefixtures("often_refreshed")
def test_unchanged_set(issuer: Issuer, key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the set stays the same, tokens that were verified are not verified anew after a refresh."""
    app, token = app_of(issuer), Key("first", "EdDSA")
    issuer.keys.append(token.jwk())
    until(lambda: status(app, token.token()) == 200)
    counted, mine = verifications(monkeypatch), token.token(padding="x")
    for _ in range(3):
        requests = issuer.requests
        assert status(app, mine) == 200
        until(lambda: issuer.requests > requests + 2)
    assert len(counted) == 1


def test_request(issuer: Issuer, key: Key) -> None:
    """The issuer is asked for JSON, by a name that firewalls do not take for a script's."""
    app_of(issuer)
    assert issuer.asked["Accept"] == "application/json"
    assert re.fullmatch(r"session-heartbeat/\d+\.\d+\.\d+", issuer.asked["User-Agent"])
    assert "Authorization" not in issuer.asked


def test_credentials(issuer: Issuer, key: Key) -> None:
    """User and password in the key set's address are sent as RFC 7617 says, percent-decoded."""
    url = issuer.url.replace("//", "//user:p%40ss@")
    assert status(app_of(issuer, url), key.token()) == 200
    assert issuer.asked["Authorization"] == "Basic " + base64.b64encode(b"user:p@ss").decode()


DISCOVERY = {"issuer": "https://issuer.example", "jwks_uri": "https://issuer.example/jwks.json"}


def not_refreshed(issuer: Issuer, caplog: pytest.LogCaptureFixture) -> Any:
    """The first line about this issuer's key set; those of other tests may still be asked for theirs."""
    refused = (record for record in caplog.records if record.getMessage() == "key_set_not_refreshed")
    return next(record for record in refused if record.reason.startswith(f"{issuer.url}: "))


@pytest.mark.parametrize(
    "trouble, cause",
    [
        (answers(status=404), "HTTPError: HTTP Error 404: Not Found"),
        (answers(status=302, headers={"Location": "http://elsewhere.example/"}), "HTTPError: HTTP Error 302: Found"),
        (answers(body=b"<!DOCTYPE html><html>"), "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
        (answers(body=b"[]"), "ValueError: it is no key set"),
        (answers(body=b"{}"), "ValueError: it is no key set"),
        (answers(body=b'{"keys": {"a": 1}}'), "ValueError: it is no key set"),
        (
            answers(body=json.dumps(DISCOVERY).encode()),
            "ValueError: it is a discovery document; its key set is at https://issuer.example/jwks.json",
        ),
        (
            answers(body=b'{"jwks_uri": "https://user:p@issuer.example/jwks.json"}'),
            "ValueError: it is a discovery document; its key set is at https://issuer.example/jwks.json",
        ),
        (answers(keys=[]), "ValueError: none of its keys can verify a signature"),
        (answers(keys=[oct_jwk("first")]), "ValueError: none of its keys can verify a signature"),
        (answers(body=b" " * 1_000_001), "ValueError: larger than 1 MB"),
        (Issuer.stop, "URLError: <urlopen error [Errno 111] Connection refused>"),
    ],
)
def test_what_is_wrong(
    issuer: Issuer, caplog: pytest.LogCaptureFixture, trouble: Callable[[Issuer], None], cause: str
) -> None:
    """The log and the doctor say what is wrong with a key set: its address, without what is secret in it, and why."""
    trouble(issuer)
    app = app_of(issuer, issuer.url.replace("//", "//user:hunter2@") + "?code=hunter2")
    said = f"{issuer.url}: {cause}"
    warning = not_refreshed(issuer, caplog)
    assert (warning.levelname, warning.reason) == ("WARNING", said)
    assert f"No signing key could be loaded: {said}" in app.test_cli_runner().invoke(args=["doctor"]).output
    assert "key_set_fetched_timestamp_seconds 0.0" in app.test_client().get("/metrics").text


def test_slow_issuer(issuer: Issuer, key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor says where no answer has come yet."""
    monkeypatch.setattr(JwksKeys, "UNKNOWN_KEY_WAIT", 0.1)
    issuer.delay = 60
    output = app_of(issuer).test_cli_runner().invoke(args=["doctor"]).output
    assert f"failure  No signing key could be loaded: {issuer.url}: no answer yet" in output


def test_terminal_escapes(issuer: Issuer, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing that an issuer sends can steer a terminal or fill a log."""
    issuer.body = json.dumps({"jwks_uri": "\x1b[2J\n" + "x" * 1000}).encode()
    app = app_of(issuer)
    warning = not_refreshed(issuer, caplog)
    assert warning.reason.isprintable() and len(warning.reason) < 400
    assert "\x1b" not in app.test_cli_runner().invoke(args=["doctor"]).output


@pytest.mark.usefixtures("often_refreshed")
def test_empty_set_is_not_fetched(issuer: Issuer, key: Key) -> None:
    """The time of the last fetch, on which operators alarm, stands still while a set has no key that can be used."""
    app = app_of(issuer)

    def fetched_at() -> str:
        lines = app.test_client().get("/metrics").text.splitlines()
        return next(line for line in lines if line.startswith("key_set_fetched_timestamp_seconds"))

    first = fetched_at()
    until(lambda: fetched_at() != first)
    for empty in ([], [oct_jwk("first")]):
        issuer.keys = empty
        requests = issuer.requests
        until(lambda: issuer.requests > requests + 2)
        before = fetched_at()
        until(lambda: issuer.requests > requests + 6)
        assert fetched_at() == before
    issuer.keys = [key.jwk()]
    until(lambda: fetched_at() != before)


def test_private_authority(issuer: Issuer, key: Key, folder: Path) -> None:
    """JWT_JWKS_CA_CERTS names the authority of an issuer inside a company."""
    authority = Authority()
    issuer.use_tls(*authority.issue(folder, x509.DNSName("localhost")))
    assert status(app_of(issuer, issuer.url, jwt_jwks_ca_certs=authority.pem), key.token()) == 200


def test_redirect_to_https(issuer: Issuer, key: Key, folder: Path) -> None:
    """A redirect to https is followed, and the password is not for the server that it leads to."""
    authority, other = Authority(), Issuer()
    other.use_tls(*authority.issue(folder, x509.DNSName("localhost")))
    other.keys, issuer.status, issuer.headers = issuer.keys, 302, {"Location": other.url}
    app = app_of(issuer, issuer.url.replace("//", "//user:password@"), jwt_jwks_ca_certs=authority.pem)
    assert status(app, key.token()) == 200
    assert "Authorization" in issuer.asked and "Authorization" not in other.asked
    other.stop()


def test_unknown_authority(issuer: Issuer, key: Key, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A key set of an issuer whose certificate cannot be verified is refused, and the log says why."""
    issuer.use_tls(*Authority().issue(folder, x509.DNSName("localhost")))
    app = app_of(issuer, issuer.url, jwt_jwks_ca_certs=Authority().pem)
    assert status(app, key.token()) == 503
    assert issuer.requests == 0
    warning = not_refreshed(issuer, caplog)
    assert warning.reason.startswith(issuer.url) and "certificate verify failed" in warning.reason


def test_http_from_another_machine(issuer: Issuer, key: Key, caplog: pytest.LogCaptureFixture) -> None:
    """A key set over plain http from another machine is logged, and from this one it is not."""
    app_of(issuer)
    assert "key_set_not_encrypted" not in caplog.text
    # 0.0.0.0 leads to this machine, too, but is none of the names that are taken for it.
    app = app_of(issuer, issuer.url.replace("127.0.0.1", "0.0.0.0"), jwt_jwks_http=True)
    [warning] = [record for record in caplog.records if record.getMessage() == "key_set_not_encrypted"]
    assert (warning.levelname, status(app, key.token())) == ("WARNING", 200)
