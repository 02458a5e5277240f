"""Which bearer tokens are taken and which are refused, over HTTP."""

import base64
import functools
import hmac
import json
import logging
import re
import socket
import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest
import redis
import time_machine
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flask import Flask
from werkzeug.test import TestResponse

from app.events import LineLimiter
from tests.conftest import SECRET, Log

ISSUER, AUDIENCE = "https://issuer.example", "sessions"
STRICT = {"jwt_issuer": ISSUER, "jwt_audience": (AUDIENCE,)}
NOW = 1_900_000_000

# RFC 6750 §3: in a description everything printable but the quote and the backslash.
CHALLENGE = re.compile(
    r'Bearer realm="sessions", error="invalid_token", error_description="[\x20-\x21\x23-\x5B\x5D-\x7E]+"'
)

MakeApp = Callable[..., Flask]


@pytest.fixture
def backend() -> str:
    """No token is Redis's business: the one in the process will do."""
    return "fakeredis"


@functools.cache
def private_key(kind: str) -> Any:
    """A key of the kind that an algorithm needs; the attacker's is of the issuer's kind."""
    if kind in ("RSA", "attacker"):
        return rsa.generate_private_key(65537, 2048)
    if kind == "Ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key({"P-256": ec.SECP256R1, "P-384": ec.SECP384R1, "P-521": ec.SECP521R1}[kind]())


def pem(kind: str) -> str:
    public = private_key(kind).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def public_key(kind: str) -> dict[str, Any]:
    """The settings of an app that verifies with a public key."""
    return {**STRICT, "jwt_secret": (), "jwt_public_key": private_key(kind).public_key()}


def rsa_app() -> dict[str, Any]:
    return public_key("RSA")


def claims(*without: str, **changed: object) -> dict[str, object]:
    """What a good token says, but for the claims left out or changed."""
    now = int(time.time())
    good = {"sub": "alice", "iss": ISSUER, "aud": AUDIENCE, "iat": now, "nbf": now, "exp": now + 600}
    return {name: value for name, value in {**good, **changed}.items() if name not in without}


def part(content: object) -> str:
    """A part of a compact JWS: bytes as they are, everything else as JSON."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def signed(payload: object, header: object = None, *, secret: str = SECRET, digest: str = "sha256") -> str:
    """Any payload under any header, with an HMAC that is right: a library would refuse to make most of these."""
    head = {"typ": "JWT", "alg": "HS256", **header} if isinstance(header, dict) else header
    text = f"{part(head if head is not None else {'alg': 'HS256'})}.{part(payload)}"
    return f"{text}.{part(hmac.digest(secret.encode(), text.encode(), digest))}"


def good(*without: str, **changed: object) -> str:
    return signed(claims(*without, **changed))


def good_of(size: int) -> str:
    """A good token of so many bytes."""
    about = (size - len(good())) * 3 // 4
    paddings = ("x" * number for number in range(about - 50, about))
    tokens = (signed(claims(padding=padding), {"kid": kid}) for padding in paddings for kid in ("a", "ab"))
    return next(token for token in tokens if len(token) == size)


def by_attacker(**header: object) -> str:
    """Signed with RS256, by another issuer."""
    return jwt.encode(claims(), private_key("attacker"), "RS256", headers=header)


def raw_exp(number: str) -> str:
    """A token whose expiry is spelled like this."""
    return signed(json.dumps(claims("exp"))[:-1].encode() + f', "exp": {number}}}'.encode())


def nested(depth: int) -> bytes:
    return b'{"a": ' + b"[" * depth + b"]" * depth + b"}"


def from_now(seconds: int) -> int:
    return int(time.time()) + seconds


def open_session(app: Flask, *authorization: str, path: str = "/sessions") -> TestResponse:
    return app.test_client().post(path, headers=[("Authorization", value) for value in authorization])


def take(app: Flask, token: str) -> int:
    """The status that a token is answered with."""
    return open_session(app, f"Bearer {token}").status_code


def assert_refused(response: TestResponse, database: redis.Redis, sentence: str) -> str:
    """A 401 in the contract's words that left nothing behind; gives its challenge."""
    assert response.status_code == 401, response.data
    assert response.content_type == "application/json"
    assert response.json == {"success": False, "error": sentence}
    assert database.keys() == []
    [challenge] = response.headers.getlist("WWW-Authenticate")
    return challenge


@pytest.mark.parametrize(
    "authorization",
    [
        pytest.param([], id="no header"),
        pytest.param([""], id="empty header"),
        pytest.param(["Basic YWxpY2U6c2VjcmV0"], id="another scheme"),
        pytest.param(["Bearer"], id="the scheme alone"),
        pytest.param(["Bearer   "], id="the scheme and spaces"),
        pytest.param(["Bearertoken"], id="no space"),
    ],
)
def test_missing(make_app: MakeApp, database: redis.Redis, authorization: list[str]) -> None:
    """Without credentials the challenge names the realm and no error (RFC 6750 §3.1)."""
    response = open_session(make_app(), *authorization)
    assert assert_refused(response, database, "Missing bearer token") == 'Bearer realm="sessions"'


def test_query_parameter(make_app: MakeApp, database: redis.Redis) -> None:
    """A token in the query string is no credential: it would end up in logs."""
    response = open_session(make_app(), path=f"/sessions?access_token={good()}")
    assert assert_refused(response, database, "Missing bearer token") == 'Bearer realm="sessions"'


def bad(id: str, token: Callable[[], str], settings: Callable[[], dict[str, Any]] = STRICT.copy) -> Any:
    return pytest.param(token, settings, id=id)


def bad_claims(id: str, *without: str, **changed: object) -> Any:
    return bad(id, lambda: good(*without, **changed))


@pytest.mark.parametrize(
    "token, settings",
    [
        bad("garbage", lambda: "garbage"),
        bad("not ASCII", lambda: "\xe9.\xe9.\xe9"),
        bad("two parts", lambda: good().rpartition(".")[0]),
        bad("four parts", lambda: good() + ".e30"),
        bad("an empty part", lambda: "..".join(good().split(".")[::2])),
        bad("spaces inside", lambda: good().replace(".", ". ")),
        bad("padded", lambda: good() + "="),
        bad("padded header", lambda: good().replace(".", "=.", 1)),
        bad("8 kB of garbage", lambda: "a" * 8192),
        bad("16,385 bytes", lambda: good_of(16_385)),
        # how it is signed
        bad("alg none", lambda: f"{part({'alg': 'none'})}.{part(claims())}."),
        bad("alg none, signed", lambda: signed(claims(), {"alg": "none"})),
        bad("alg NONE", lambda: f"{part({'alg': 'NONE'})}.{part(claims())}."),
        bad("alg NONE, signed", lambda: signed(claims(), {"alg": "NONE"})),
        bad("alg missing", lambda: signed(claims(), b"{}")),
        bad("alg not a string", lambda: signed(claims(), {"alg": ["HS256"]})),
        bad("wrong secret", lambda: signed(claims(), secret=SECRET[::-1])),
        bad("signature of another token", lambda: good(sub="bob").rpartition(".")[0] + "." + good().rpartition(".")[2]),
        bad("HS256 where RS256 is configured", lambda: good(), rsa_app),
        bad("public key as secret", lambda: signed(claims(), secret=pem("RSA")), rsa_app),
        bad("ES256 where RS256 is configured", lambda: jwt.encode(claims(), private_key("P-256"), "ES256"), rsa_app),
        bad("another key", by_attacker, rsa_app),
        bad("RS256 where HS256 is configured", by_attacker),
        bad(
            "HS512 with a secret of 32 bytes",
            lambda: signed(claims(), {"alg": "HS512"}, secret="s" * 32, digest="sha512"),
            lambda: {**STRICT, "jwt_secret": ("s" * 32,)},
        ),
        # header
        bad("header not JSON", lambda: signed(claims(), b"header")),
        bad("header not an object", lambda: signed(claims(), b'"HS256"')),
        bad("header nested deeply", lambda: signed(claims(), nested(2000))),
        bad("kid a number", lambda: signed(claims(), {"kid": 1})),
        bad("kid null", lambda: signed(claims(), {"kid": None})),
        bad("crit unknown", lambda: signed(claims(), {"crit": ["exp"], "exp": 1})),
        bad("crit empty", lambda: signed(claims(), {"crit": []})),
        bad("payload outside", lambda: signed(claims(), {"crit": ["b64"], "b64": False})),
        # payload
        bad("payload not JSON", lambda: signed(b"payload")),
        bad("payload not UTF-8", lambda: signed(b'{"sub": "\xff"}')),
        bad("payload a list", lambda: signed([claims()])),
        bad("payload a string", lambda: signed("alice")),
        bad("payload null", lambda: signed(None)),
        bad("payload nested deeply", lambda: signed(nested(2000))),
        # times
        bad("expired", lambda: good(exp=from_now(-31))),
        bad("nbf to come", lambda: good(nbf=from_now(60))),
        bad_claims("nbf a list", nbf=[]),
        bad("iat to come", lambda: good(iat=from_now(60))),
        bad_claims("iat a list", iat=[]),
        bad_claims("no exp", "exp"),
        bad_claims("exp null", exp=None),
        bad("exp a string", lambda: good(exp=str(from_now(600)))),
        bad("exp a list", lambda: good(exp=[from_now(600)])),
        bad_claims("exp true", exp=True),
        bad_claims("exp negative", exp=-1),
        bad("exp NaN", lambda: raw_exp("NaN")),
        bad("exp Infinity", lambda: raw_exp("Infinity")),
        bad("exp beyond a double", lambda: raw_exp("1e999")),
        bad("exp of 5000 digits", lambda: raw_exp("9" * 5000)),
        # issuer and audience
        bad_claims("wrong issuer", iss="https://attacker.example"),
        bad_claims("issuer in part", iss=ISSUER[:-1]),
        bad_claims("issuer a list", iss=[ISSUER]),
        bad_claims("no issuer", "iss"),
        bad_claims("wrong audience", aud="other"),
        bad_claims("audience in part", aud=AUDIENCE[:-1]),
        bad_claims("audience list without ours", aud=["other", "another"]),
        bad_claims("audience an object", aud={AUDIENCE: True}),
        bad_claims("no audience", "aud"),
        bad_claims("audience empty", aud=[]),
        bad_claims("no subject", "sub"),
        bad_claims("subject empty", sub=""),
        bad_claims("subject null", sub=None),
        bad_claims("subject true", sub=True),
        bad_claims("subject false", sub=False),
        bad_claims("subject a list", sub=["alice"]),
        bad_claims("subject an object", sub={"id": "alice"}),
        bad_claims("subject a float", sub=1.0),
        bad_claims("subject NaN", sub=float("nan")),
        bad_claims("subject of 257 characters", sub="a" * 257),
        bad_claims("subject of 257 digits", sub=10**256),
        bad_claims("subject with a lone surrogate", sub="\ud800"),
    ],
)
def test_bad_token(
    make_app: MakeApp, database: redis.Redis, token: Callable[[], str], settings: Callable[[], dict[str, Any]]
) -> None:
    """A bad token is refused in the words of RFC 6750 §3, and nothing is written."""
    response = open_session(make_app(**settings()), f"Bearer {token()}")
    assert CHALLENGE.fullmatch(assert_refused(response, database, "Invalid or expired token"))


def refused(make_app: MakeApp, log: Log, token: str, **settings: object) -> tuple[str, float, dict]:
    """The reason for a 401 in the log, how often the metrics count it, and the line."""
    app = make_app(**{**STRICT, **settings})
    log.take()
    assert take(app, token) == 401
    [line] = log.take()
    counted = f'tokens_refused_total{{reason="{line["reason"]}"}} '
    [sample] = [each for each in app.test_client().get("/metrics").text.splitlines() if each.startswith(counted)]
    return line["reason"], float(sample.removeprefix(counted)), line


@pytest.mark.parametrize(
    "reason, token",
    [
        ("missing", lambda: ""),
        ("malformed", lambda: "a.b"),
        ("malformed", lambda: good_of(16_385)),
        ("malformed", lambda: signed(claims(), {"kid": 1})),
        ("malformed", lambda: signed(claims(), b"header")),
        ("malformed", lambda: signed([claims()])),
        ("expired", lambda: good(exp=1)),
        ("not_yet_valid", lambda: good(nbf=from_now(60))),
        ("not_yet_valid", lambda: good(iat=from_now(60))),
        ("signature", lambda: signed(claims(), secret=SECRET[::-1])),
        ("signature", lambda: signed(claims(exp=1), secret=SECRET[::-1])),
        ("signature", lambda: signed(claims(), {"alg": "none"})),
        ("signature", by_attacker),
        ("issuer", lambda: good(iss=ISSUER + "/")),
        ("audience", lambda: good(aud="other")),
        ("claim", lambda: good("exp")),
        ("claim", lambda: good("iss")),
        ("claim", lambda: good("aud")),
        ("claim", lambda: good("sub")),
        ("claim", lambda: good(exp=str(from_now(600)))),
        ("claim", lambda: good(iat=[])),
        ("claim", lambda: good(jti=1)),
        ("subject", lambda: good(sub="")),
        ("subject", lambda: good(sub=True)),
        ("subject", lambda: good(sub="a" * 257)),
        ("subject", lambda: good(sub="\ud800")),
    ],
)
def test_reason(make_app: MakeApp, log: Log, reason: str, token: Callable[[], str]) -> None:
    """What was wrong with a token is one word, the same in the log and in the metric's label."""
    word, times, line = refused(make_app, log, token())
    assert (word, times, line["event"], line["endpoint"]) == (reason, 1, "token_refused", "sessions.open_session")


def test_reason_with_several_secrets(make_app: MakeApp, log: Log) -> None:
    """A signature with none of several secrets is told from a bad claim under one of them."""
    secrets = ("o" * 32, "n" * 32)
    assert refused(make_app, log, good(exp=1), jwt_secret=secrets)[0] == "signature"
    assert refused(make_app, log, signed(claims(exp=1), secret="n" * 32), jwt_secret=secrets)[0] == "expired"


@pytest.mark.parametrize(
    "given, shown",
    [
        ("the-key", "the-key"),
        ("a" * 100, "a" * 64),
        ("a\nb\x1b[31m\u202ec\u20ac", "ab[31mc\u20ac"),
        ("\x00" * 100 + "a", "a"),
    ],
)
def test_key_id_in_the_log(make_app: MakeApp, log: Log, given: str, shown: str) -> None:
    """A refused token's line has the first 64 printable characters of its key id, whatever it was refused for."""
    for bad in (signed(claims(), {"kid": given, "alg": "none"}), signed(claims(exp=1), {"kid": given})):
        assert refused(make_app, log, bad)[2]["key_id"] == shown


def test_no_key_id(make_app: MakeApp, log: Log) -> None:
    """The line of a token without a key id has none."""
    assert "key_id" not in refused(make_app, log, good(exp=1))[2]


def test_key_ids_are_one_kind(make_app: MakeApp, log: Log) -> None:
    """Thirty key ids are one label, and count as one kind of line."""
    app = make_app(**STRICT)
    quiet = logging.Logger("quiet")
    quiet.addHandler(logging.NullHandler())
    app.extensions["line_limiter"] = LineLimiter(quiet, clock=lambda: 0.0)
    for number in range(30):
        assert take(app, signed(claims(exp=1), {"kid": f"key-{number}"})) == 401
    assert log.names() == ["token_refused"] * 10
    text = app.test_client().get("/metrics").text
    assert 'tokens_refused_total{reason="expired"} 30.0' in text and "key-" not in text


def test_two_headers(make_app: MakeApp, database: redis.Redis) -> None:
    """Two Authorization headers are refused, even with the same good token."""
    response = open_session(make_app(**STRICT), *[f"Bearer {good()}"] * 2)
    assert CHALLENGE.fullmatch(assert_refused(response, database, "Invalid or expired token"))


@pytest.mark.parametrize("name", ["jku", "x5u", "jwk", "x5c"])
def test_key_in_header(make_app: MakeApp, database: redis.Redis, name: str) -> None:
    """A key that the token itself brings or points at is neither used nor fetched (RFC 8725 §3.10)."""
    jwk = jwt.algorithms.RSAAlgorithm.to_jwk(private_key("attacker").public_key(), as_dict=True)
    with socket.create_server(("127.0.0.1", 0)) as attacker:
        attacker.setblocking(False)
        url = f"http://127.0.0.1:{attacker.getsockname()[1]}/"
        value = {"jku": url, "x5u": url, "jwk": jwk, "x5c": [part(b"certificate")]}[name]
        response = open_session(make_app(**rsa_app()), f"Bearer {by_attacker(**{name: value, 'kid': 'attacker'})}")
        with pytest.raises(BlockingIOError):
            attacker.accept()
    assert CHALLENGE.fullmatch(assert_refused(response, database, "Invalid or expired token"))


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(lambda: good(), id="plain"),
        pytest.param(lambda: good(aud=["other", AUDIENCE]), id="audience list with ours"),
        pytest.param(lambda: good("iat", "nbf"), id="no iat, no nbf"),
        pytest.param(lambda: good(exp=time.time() + 600.5), id="exp with a fraction"),
        pytest.param(lambda: good(exp=10**30), id="exp long after the sun"),
        pytest.param(lambda: good(sub="a" * 256), id="subject of 256 characters"),
        pytest.param(lambda: good(sub="\u20ac" * 256), id="subject of 256 characters of three bytes"),
        pytest.param(lambda: good(sub="\U0001f600"), id="subject beyond the first plane"),
        pytest.param(lambda: good(sub="}:{*"), id="subject of punctuation"),
        pytest.param(lambda: good(sub=0), id="subject zero"),
        pytest.param(lambda: good(padding="x" * 6000), id="8 kB"),
        pytest.param(lambda: good_of(16_384), id="16,384 bytes"),
        pytest.param(lambda: signed(claims(), {"kid": "unknown"}), id="kid with a secret"),
        pytest.param(lambda: signed(claims(), {"typ": "at+jwt"}), id="typ at+jwt"),
    ],
)
def test_good_token(make_app: MakeApp, token: Callable[[], str]) -> None:
    """A token that is signed, timely, from our issuer and for us is taken."""
    assert take(make_app(**STRICT), token()) == 201


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER ", "Bearer   "])
def test_scheme(make_app: MakeApp, scheme: str) -> None:
    """The case of the scheme does not matter, nor do more spaces behind it (RFC 9110 §11.1, §11.4)."""
    assert open_session(make_app(**STRICT), scheme + good()).status_code == 201


def test_no_issuer_no_audience(make_app: MakeApp) -> None:
    """Issuer and audience are checked only where they are configured."""
    app = make_app()
    assert take(app, good(iss="anyone", aud="anything")) == take(app, good("iss", "aud")) == 201


def test_several_audiences(make_app: MakeApp) -> None:
    """A token for one of several audiences is taken, and one for none of them is not."""
    app = make_app(jwt_audience=("web", "ios"))
    statuses = {str(aud): take(app, good(aud=aud)) for aud in ("web", "ios", ["tv", "ios"], "tv", "web ios", ["we"])}
    assert list(statuses.values()) == [201, 201, 201, 401, 401, 401]


@pytest.mark.parametrize("algorithm, size", [("HS256", 32), ("HS384", 48), ("HS512", 64)])
def test_hmac(make_app: MakeApp, algorithm: str, size: int) -> None:
    """A secret as long as the hash verifies it (RFC 7518 §3.2), and one byte less does not."""
    token = signed(claims(), {"alg": algorithm}, secret="s" * size, digest=f"sha{algorithm[2:]}")
    assert take(make_app(jwt_secret=("s" * size,)), token) == 201
    shorter = signed(claims(), {"alg": algorithm}, secret="s" * (size - 1), digest=f"sha{algorithm[2:]}")
    assert take(make_app(jwt_secret=("s" * (size - 1),), jwt_algorithms=(algorithm,)), shorter) == 401


@pytest.mark.parametrize(
    "algorithm, kind",
    [
        *((algorithm, "RSA") for algorithm in ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")),
        ("ES256", "P-256"),
        ("ES384", "P-384"),
        ("ES512", "P-521"),
        ("EdDSA", "Ed25519"),
    ],
)
def test_public_key(make_app: MakeApp, algorithm: str, kind: str) -> None:
    """A PEM verifies every algorithm of its kind of key."""
    assert take(make_app(**public_key(kind)), jwt.encode(claims(), private_key(kind), algorithm)) == 201


def test_allow_list(make_app: MakeApp) -> None:
    """A configured list of algorithms shuts out the others that the key could verify."""
    app = make_app(**rsa_app(), jwt_algorithms=("RS512",))
    statuses = {name: take(app, jwt.encode(claims(), private_key("RSA"), name)) for name in ("RS256", "RS512")}
    assert statuses == {"RS256": 401, "RS512": 201}


def test_rotation(make_app: MakeApp) -> None:
    """Every one of several secrets is good while rotating, and no other."""
    old, new, other = ("o" * 32, "n" * 32, "x" * 32)
    app = make_app(jwt_secret=(old, new))
    assert [take(app, signed(claims(), secret=secret)) for secret in (old, new, other)] == [201, 201, 401]


@pytest.mark.parametrize("leeway", [0, 30, 300])
@pytest.mark.parametrize(
    "claim, last_good, first_bad", [("exp", 1, 0), ("nbf", 0, 1), ("iat", 0, 1)], ids=["exp", "nbf", "iat"]
)
def test_leeway(make_app: MakeApp, claim: str, last_good: int, first_bad: int, leeway: int) -> None:
    """Clocks may differ by the leeway, and not by a second more."""
    app = make_app(jwt_leeway_seconds=leeway)
    direction = -1 if claim == "exp" else 1
    with time_machine.travel(NOW, tick=False):
        statuses = [take(app, good(**{claim: NOW + direction * leeway + far})) for far in (last_good, first_bad)]
    assert statuses == [201, 401]


def test_expiry_between_two_requests(make_app: MakeApp) -> None:
    """A token that was good is refused once it has expired."""
    app = make_app(jwt_leeway_seconds=0)
    with time_machine.travel(NOW, tick=False) as traveller:
        token = good(exp=NOW + 60)
        assert take(app, token) == 201
        traveller.shift(60)
        assert take(app, token) == 401


def sessions(app: Flask, token: str) -> int:
    """How many sessions the token's subject has."""
    response = app.test_client().get("/sessions", headers={"Authorization": f"Bearer {token}"})
    return len(response.json["sessions"])


def test_integer_subject(make_app: MakeApp) -> None:
    """An integer and its digits are one subject."""
    app = make_app()
    assert take(app, good(sub=42)) == 201
    assert sessions(app, good(sub="42")) == sessions(app, good(sub=42)) == 1
    assert sessions(app, good(sub="042")) == 0


def test_subject_claim(make_app: MakeApp) -> None:
    """The subject is in the claim that the configuration names, and in no other."""
    app = make_app(jwt_subject_claim="userId")
    assert take(app, good(sub="alice", userId="bob")) == 201
    assert sessions(app, good("sub", userId="bob")) == 1
    assert sessions(app, good(userId="alice")) == 0
    assert take(app, good(sub="bob")) == 401
