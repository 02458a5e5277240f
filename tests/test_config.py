"""The configuration: what is refused and in which words, what the defaults are, and that the README tells the same."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa, x25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from app.config import Config, ConfigError
from tests.servers import ROOT, free_port

SECRET = "s" * 32
REDIS = "redis://localhost:6379/0"
GOOD = {"REDIS_URL": REDIS, "JWT_SECRET": SECRET}
KEY_SOURCES = ("JWT_SECRET", "JWT_PUBLIC_KEY", "JWT_JWKS_URL")
VARIABLES = [each.name.upper() for each in fields(Config)]

# What the contract says.
DEFAULTS = {
    "redis_tls_url": None,
    "redis_timeout_seconds": 0.5,
    "jwt_secret": (),
    "jwt_public_key": None,
    "jwt_jwks_url": None,
    "jwt_algorithms": (),
    "jwt_issuer": None,
    "jwt_audience": (),
    "jwt_jwks_http": False,
    "jwt_jwks_ca_certs": None,
    "jwt_admin_scope": None,
    "jwt_leeway_seconds": 30,
    "jwt_subject_claim": "sub",
    "session_idle_seconds": 1800,
    "session_idle_max_seconds": 86400,
    "session_absolute_seconds": 2592000,
    "session_limit": 100,
    "session_limit_policy": "refuse",
    "trusted_proxies": 0,
    "port": 8000,
    "web_concurrency": os.cpu_count(),
}


def pem_of(private_key: Any) -> str:
    public = private_key.public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode().strip()


def certificate_of(private_key: Any) -> str:
    """A self-signed certificate, in PEM."""
    name, now = x509.Name([]), datetime.now(timezone.utc)
    builder = x509.CertificateBuilder(name, name, private_key.public_key(), 1, now, now + timedelta(hours=1))
    return builder.sign(private_key, SHA256()).public_bytes(Encoding.PEM).decode().strip()


RSA_KEY = rsa.generate_private_key(65537, 2048)
RSA_PEM = pem_of(RSA_KEY)
CERTIFICATE = certificate_of(RSA_KEY)
RSA_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """A good environment with some variables changed; another source of keys takes the secret's place."""
    kept = {} if changes.keys() & set(KEY_SOURCES) else {"JWT_SECRET": SECRET}
    return {"REDIS_URL": REDIS, **kept, **changes}


def problems(environ: Mapping[str, str]) -> list[str]:
    """What an environment is refused for; the message has nothing else in it."""
    with pytest.raises(ConfigError) as refusal:
        Config.from_env(environ)
    assert str(refusal.value).splitlines()[1:] == [f"  {problem}" for problem in refusal.value.problems]
    return refusal.value.problems


WHOLE_NUMBERS = {
    "JWT_LEEWAY_SECONDS": (0, 300),
    "SESSION_IDLE_SECONDS": (1, 315360000),
    "SESSION_IDLE_MAX_SECONDS": (1, 315360000),
    "SESSION_ABSOLUTE_SECONDS": (1, 315360000),
    "SESSION_LIMIT": (1, 1000),
    "TRUSTED_PROXIES": (0, 16),
    "REDIS_WAIT_REPLICAS": (0, 5),
    "PORT": (1, 65535),
    "WEB_CONCURRENCY": (1, 1024),
}


def bad_value(variable: str, value: str, rule: str) -> Any:
    return pytest.param(variable, value, rule, id=f"{variable}={value[:30]}")


@pytest.mark.parametrize(
    "variable, value, rule",
    [
        bad_value(variable, value, f"Must be greater than or equal to {least} and less than or equal to {most}.")
        for variable, (least, most) in WHOLE_NUMBERS.items()
        for value in (str(least - 1), str(most + 1))
    ]
    + [
        bad_value(variable, value, "Not a valid integer.")
        for variable in WHOLE_NUMBERS
        for value in ("many", "1.5", "1e3", "0x10", "9" * 5000)
    ]
    + [
        bad_value(
            "REDIS_TIMEOUT_SECONDS", value, "Must be greater than or equal to 0.05 and less than or equal to 0.5."
        )
        for value in ("0", "0.04", "0.51", "-1")
    ]
    + [
        bad_value("REDIS_TIMEOUT_SECONDS", "1 s", "Not a valid number."),
        bad_value("REDIS_TIMEOUT_SECONDS", "nan", "Special numeric values (nan or infinity) are not permitted."),
    ]
    + [
        bad_value(variable, value, "must be on or off")
        for variable in ("REDIS_TLS_VERIFY", "JWT_JWKS_HTTP")
        for value in ("yes", "0", "OFF")
    ]
    + [
        bad_value("CORS_ORIGINS", value, "must be origins such as https://app.example.com, separated by spaces")
        for value in (
            "*",
            "app.example.com",
            "https://app.example.com/",
            "https://a.example https://B.example",
            "null",
            "https://*.example.com",
            "https://",
            "https://[::1",
            "https://user@app.example.com",
        )
    ]
    + [
        bad_value("SESSION_LIMIT_POLICY", value, "Must be one of: refuse, replace.")
        for value in ("evict", "Replace", "on")
    ]
    + [
        bad_value("JWT_ADMIN_SCOPE", value, "must be one scope: printable ASCII without space, quote and backslash")
        for value in ("two words", "a,\x7f", 'a"b', "a\\b", "\u00e9", "a\nb")
    ]
    + [bad_value("JWT_ALGORITHMS", "none", "none cannot be used with this JWT_SECRET, but HS256 can")],
)
def test_refused_value(variable: str, value: str, rule: str) -> None:
    """A refusal names the variable, its value and the rule."""
    assert problems(environment({variable: value})) == [f"{variable}={value!r}: {rule}"]


def bad_secret(id: str, variable: str, value: str, rule: str) -> Any:
    return pytest.param(variable, value, rule, id=f"{variable}-{id}")


PEM_RULE = "must be a PEM public key: RSA of 2048 bits or more, EC or Ed25519"
REDIS_RULE = (
    "must look like redis://user:password@host:6379/0, with user and password percent-encoded; no option is taken "
    "here, and TLS is up to REDIS_TLS_VERIFY and REDIS_CA_CERTS"
)
REDISS_RULE = REDIS_RULE.replace("redis:", "rediss:")
SENTINEL_RULE = "must look like redis+sentinel://user:password@host:26379,host:26379/service/0"
CLUSTER_RULE = "must look like redis+cluster://user:password@host:6379,host:6379"
JWKS_RULE = "must be an https:// address"
CA_RULE = "must be a PEM certificate or the path of a file with it"


@pytest.mark.parametrize(
    "variable, value, rule",
    [
        bad_secret(id, variable, value, rule)
        for variable in ("REDIS_URL", "REDIS_TLS_URL")
        for id, value, rule in [
            ("no scheme", "user:hunter2@host:6379", "must start with redis://"),
            ("another scheme", "https://user:hunter2@host", "must start with redis://"),
            ("port not a number", "redis://user:hunter2@host:port/0", REDIS_RULE),
            ("port too big", "redis://user:hunter2@host:65536/0", REDIS_RULE),
            ("host that can be none", "redis://user:hunter2@a..b:6379/0", REDIS_RULE),
            ("half an address", "redis://user:hunter2@[::1/0", REDIS_RULE),
            ("# in the password", "redis://user:hunter2#x@host:6379/0", REDIS_RULE),
            ("/ in the password", "redis://:hunter2/x@host:6379/0", REDIS_RULE),
            ("? in the password", "rediss://:hunter2?x@host:6379/0", REDISS_RULE),
            ("a line break in the password", "redis://:hunter2\nx@host:6379/0", REDIS_RULE),
            ("@ in the password", "valkey://:hunter2@x@host:6379/0", REDIS_RULE),
            ("@ in a cluster's password", "redis+cluster://:hunter2@x@host,other", CLUSTER_RULE),
            ("database not a number", "redis://user:hunter2@host/zero", REDIS_RULE),
            ("path", "rediss://user:hunter2@host/0/1", REDISS_RULE),
            ("timeout", "redis://user:hunter2@host/0?socket_timeout=60", REDIS_RULE),
            ("verification off", "rediss://user:hunter2@host/0?ssl_cert_reqs=none", REDISS_RULE),
            ("database option not a number", "redis://user:hunter2@host?db=zero", REDIS_RULE),
            ("another database", "redis+sentinel://hunter2/main/0?db=1", SENTINEL_RULE),
            ("a cluster's database", "redis+cluster://hunter2?db=1", CLUSTER_RULE),
            ("memory's database", "memory://?db=1", "must look like memory://"),
            ("option without value", "redis://user:hunter2@host/0?hunter2", REDIS_RULE),
            ("not UTF-8", "redis://user:hunter2\udcff@host", "is not UTF-8"),
        ]
    ]
    + [
        bad_secret(id, "JWT_JWKS_URL", value, JWKS_RULE)
        for id, value in [
            ("no scheme", "hunter2.example/jwks"),
            ("ftp", "ftp://user:hunter2@issuer.example/jwks"),
            ("no host", "https:///hunter2"),
            ("half an address", "https://[::1/hunter2 "),
            ("no address", "https://[:::]/hunter2"),
            ("a file", "file:///hunter2"),
        ]
    ]
    + [
        bad_secret("no host", "REDIS_URL", "redis+sentinel:///hunter2/0", SENTINEL_RULE),
        bad_secret("no service", "REDIS_URL", "redis+sentinel://hunter2/", SENTINEL_RULE),
        bad_secret("a database", "REDIS_URL", "redis+cluster://hunter2/0", CLUSTER_RULE),
        bad_secret("two hosts", "REDIS_URL", "redis://hunter2,other/0", REDIS_RULE),
        *(
            bad_secret(id, variable, value, CA_RULE)
            for variable in ("REDIS_CA_CERTS", "JWT_JWKS_CA_CERTS")
            for id, value in [
                ("no file", "/hunter2"),
                ("a folder", "/"),
                ("a file without one", __file__),
                ("cut", CERTIFICATE[:-60]),
                ("a key", RSA_PEM),
            ]
        ),
        bad_secret("short", "METRICS_TOKEN", "hunter2", "must be 16 or more letters, digits and -._~+/, or off"),
        bad_secret("a space", "METRICS_TOKEN", "hunter2 hunter2 hunter2", "must be 16 or more letters, digits and"),
        bad_secret("short", "LOG_KEY", "hunter2", "Shorter than minimum length 16."),
        bad_secret("short", "JWT_SECRET", "hunter2" * 4, "every secret must have 32 bytes or more"),
        bad_secret("one short", "JWT_SECRET", f"{SECRET} hunter2", "every secret must have 32 bytes or more"),
        bad_secret("not UTF-8", "JWT_SECRET", SECRET + "\udcff", "is not UTF-8"),
        bad_secret("garbage", "JWT_PUBLIC_KEY", "hunter2", PEM_RULE),
        bad_secret("not UTF-8", "JWT_PUBLIC_KEY", RSA_PEM + "\udcff", "is not UTF-8"),
        bad_secret("cut", "JWT_PUBLIC_KEY", RSA_PEM[:-60], PEM_RULE),
        bad_secret(
            "private",
            "JWT_PUBLIC_KEY",
            RSA_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
            PEM_RULE,
        ),
        bad_secret("RSA of 1024 bits", "JWT_PUBLIC_KEY", pem_of(rsa.generate_private_key(65537, 1024)), PEM_RULE),
        bad_secret("DSA", "JWT_PUBLIC_KEY", pem_of(dsa.generate_private_key(1024)), PEM_RULE),
        bad_secret("X25519", "JWT_PUBLIC_KEY", pem_of(x25519.X25519PrivateKey.generate()), PEM_RULE),
        bad_secret("Ed448", "JWT_PUBLIC_KEY", pem_of(ed448.Ed448PrivateKey.generate()), PEM_RULE),
        bad_secret("P-256K", "JWT_PUBLIC_KEY", pem_of(ec.generate_private_key(ec.SECP256K1())), PEM_RULE),
    ],
)
def test_refused_secret(variable: str, value: str, rule: str) -> None:
    """A refusal of what holds a secret names the variable and the rule, and repeats nothing of the value."""
    [problem] = problems(environment({variable: value}))
    assert problem.startswith(f"{variable}: {rule}")
    assert not any(word in problem for word in ("hunter2", value, value.splitlines()[-1], "udcff"))


@pytest.mark.parametrize("variable", VARIABLES)
def test_not_utf8(variable: str) -> None:
    """Bytes that are no UTF-8, which Python reads as lone surrogates, are refused in every variable."""
    assert any(
        problem.startswith(variable) and problem.endswith(": is not UTF-8")
        for problem in problems({**GOOD, variable: "1\udcff"})
    )


RSA_ONES = "RS256, RS384, RS512, PS256, PS384, PS512"
HTTP_RULE = "JWT_JWKS_URL: must be an https:// address; http:// to another machine needs JWT_JWKS_HTTP=on"
ADMIN_RULE = "JWT_ADMIN_SCOPE: needs JWT_ISSUER and JWT_AUDIENCE, unless tokens are signed with JWT_SECRET"
REDIS_CA_RULE = "REDIS_CA_CERTS: is of use with rediss:// only, and not with REDIS_TLS_VERIFY=off"


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"REDIS_URL": ""}, "REDIS_URL: must be set"),
        (
            {"REDIS_URL": "memory://", "WEB_CONCURRENCY": "2"},
            "REDIS_URL: memory:// is one process's own; it needs WEB_CONCURRENCY=1 and REDIS_WAIT_REPLICAS=0",
        ),
        ({"JWT_SECRET": ""}, "JWT_SECRET, JWT_PUBLIC_KEY, JWT_JWKS_URL: exactly one must be set, not none"),
        (
            {"JWT_SECRET": SECRET, "JWT_JWKS_URL": "https://issuer.example"},
            "JWT_SECRET, JWT_PUBLIC_KEY, JWT_JWKS_URL: exactly one must be set, not JWT_SECRET and JWT_JWKS_URL",
        ),
        (
            {"JWT_SECRET": SECRET, "JWT_PUBLIC_KEY": RSA_PEM, "JWT_JWKS_URL": "https://issuer.example"},
            "JWT_SECRET, JWT_PUBLIC_KEY, JWT_JWKS_URL: exactly one must be set, not "
            "JWT_SECRET and JWT_PUBLIC_KEY and JWT_JWKS_URL",
        ),
        ({"JWT_ALGORITHMS": "none"}, "JWT_ALGORITHMS='none': none cannot be used with this JWT_SECRET, but HS256 can"),
        (
            {"JWT_ALGORITHMS": "HS256 RS256"},
            "JWT_ALGORITHMS='HS256 RS256': RS256 cannot be used with this JWT_SECRET, but HS256 can",
        ),
        (
            {"JWT_ALGORITHMS": "HS256,HS384,HS512"},
            "JWT_ALGORITHMS='HS256 HS384 HS512': HS384, HS512 cannot be used with this JWT_SECRET, but HS256 can",
        ),
        (
            {"JWT_SECRET": f"{'s' * 64} {SECRET}", "JWT_ALGORITHMS": "HS512"},
            "JWT_ALGORITHMS='HS512': HS512 cannot be used with this JWT_SECRET, but HS256 can",
        ),
        (
            {"JWT_PUBLIC_KEY": RSA_PEM, "JWT_ALGORITHMS": "RS256 HS256"},
            f"JWT_ALGORITHMS='RS256 HS256': HS256 cannot be used with this JWT_PUBLIC_KEY, but {RSA_ONES} can",
        ),
        (
            {"JWT_PUBLIC_KEY": RSA_PEM, "JWT_ALGORITHMS": "ES256"},
            f"JWT_ALGORITHMS='ES256': ES256 cannot be used with this JWT_PUBLIC_KEY, but {RSA_ONES} can",
        ),
        (
            {"JWT_JWKS_URL": "https://issuer.example", "JWT_ALGORITHMS": "HS256"},
            f"JWT_ALGORITHMS='HS256': HS256 cannot be used with this JWT_JWKS_URL, but {RSA_ONES}, "
            "ES256, ES384, ES512, EdDSA can",
        ),
        (
            {"REDIS_URL": "memory://", "WEB_CONCURRENCY": "1", "REDIS_WAIT_REPLICAS": "1"},
            "REDIS_URL: memory:// is one process's own; it needs WEB_CONCURRENCY=1 and REDIS_WAIT_REPLICAS=0",
        ),
        (
            {"REDIS_URL": "rediss://host", "REDIS_CA_CERTS": CERTIFICATE, "REDIS_TLS_VERIFY": "off"},
            REDIS_CA_RULE,
        ),
        (
            {"REDIS_CA_CERTS": CERTIFICATE},
            REDIS_CA_RULE,
        ),
        (
            {"REDIS_URL": "redis+cluster://host", "REDIS_CA_CERTS": CERTIFICATE},
            REDIS_CA_RULE,
        ),
        *(
            ({"JWT_JWKS_URL": url}, HTTP_RULE)
            for url in (
                "http://issuer.example/jwks",
                "http://localhost.example",
                "http://127.0.0.1.example:80/jwks",
                "http://localhost:1@issuer.example/jwks",
            )
        ),
        (
            {"JWT_PUBLIC_KEY": RSA_PEM, "JWT_ADMIN_SCOPE": "admin", "JWT_ISSUER": "me"},
            ADMIN_RULE,
        ),
        (
            {"JWT_JWKS_URL": "https://issuer.example", "JWT_ADMIN_SCOPE": "admin", "JWT_AUDIENCE": "us"},
            ADMIN_RULE,
        ),
        (
            {"SESSION_IDLE_SECONDS": "100000"},
            "SESSION_IDLE_SECONDS=100000: must not be more than SESSION_IDLE_MAX_SECONDS=86400",
        ),
    ],
    ids=lambda each: "+".join(each) if isinstance(each, dict) else each.rpartition(": ")[2][:40],
)
def test_refused_combination(changes: dict[str, str], problem: str) -> None:
    """What no single variable can say is refused too, naming all that play a part."""
    assert problems(environment(changes)) == [problem]


BAD = {
    "REDIS_URL": "http://user:hunter2@host",
    "REDIS_TLS_URL": "rediss://user:hunter2@host/zero",
    "REDIS_TIMEOUT_SECONDS": "60",
    "JWT_SECRET": "hunter2",
    "JWT_PUBLIC_KEY": "hunter2",
    "JWT_JWKS_URL": "issuer.example/hunter2",
    "JWT_LEEWAY_SECONDS": "1h",
    "SESSION_IDLE_SECONDS": "0",
    "SESSION_IDLE_MAX_SECONDS": "-1",
    "SESSION_ABSOLUTE_SECONDS": "never",
    "SESSION_LIMIT": "0",
    "TRUSTED_PROXIES": "all",
    "REDIS_CA_CERTS": "/hunter2",
    "REDIS_TLS_VERIFY": "no",
    "JWT_JWKS_HTTP": "yes",
    "JWT_JWKS_CA_CERTS": "hunter2",
    "REDIS_WAIT_REPLICAS": "6",
    "CORS_ORIGINS": "*",
    "METRICS_TOKEN": "hunter2",
    "LOG_KEY": "hunter2",
    "PORT": "http",
    "WEB_CONCURRENCY": "0",
}
COMPLAINTS = [*BAD, "JWT_SECRET, JWT_PUBLIC_KEY, JWT_JWKS_URL"]


def assert_lists_every_problem_once(message: str) -> None:
    lines = re.findall(r"^  (\S.*?)(?:='.*?')?: .+$", message, re.MULTILINE)
    assert sorted(lines) == sorted(COMPLAINTS)
    assert "hunter2" not in message


def test_all_at_once() -> None:
    """All problems are listed at once, so that one round of corrections is enough."""
    assert_lists_every_problem_once("\n".join(f"  {problem}" for problem in problems(BAD)))


def run(command: str, environ: Mapping[str, str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a shell's command that sees this environment only, and this Python first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {"PATH": path, "PORT": str(free_port()), **environ}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, shell=True, cwd=ROOT, env=env, start_new_session=True, **pipes) as process:
        try:
            stdout, stderr = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # a server that runs after all, with its workers
            raise
    return process.returncode, stdout, stderr


PROCFILE = (ROOT / "Procfile").read_text().strip().removeprefix("web: ")


@pytest.mark.parametrize("command", ["python -c 'import wsgi'", PROCFILE])
def test_exit(command: str) -> None:
    """A bad environment ends the process with 1, every problem once and no traceback, before any worker starts."""
    code, stdout, stderr = run(command, BAD)
    assert code == 1
    assert_lists_every_problem_once(stderr)
    assert not re.search("Traceback|Booting worker", stdout + stderr)


def test_defaults() -> None:
    """What is not set has the contract's default."""
    config = Config.from_env(GOOD)
    assert {name: getattr(config, name) for name in DEFAULTS} == {**DEFAULTS, "jwt_secret": (SECRET,)}


@pytest.mark.parametrize("empty", ["", "  "])
def test_empty(empty: str) -> None:
    """An empty variable counts as not set."""
    assert Config.from_env({**dict.fromkeys(VARIABLES, empty), **GOOD}) == Config.from_env(GOOD)


def test_surrounding_space() -> None:
    """Space around a value does not count."""
    assert Config.from_env({name: f" {value}\n" for name, value in GOOD.items()}) == Config.from_env(GOOD)


@pytest.mark.parametrize("variable", WHOLE_NUMBERS)
def test_limits(variable: str) -> None:
    """The least and the most that a rule names are themselves allowed."""
    wide = {"SESSION_IDLE_SECONDS": "1", "SESSION_IDLE_MAX_SECONDS": "315360000"}
    for limit in WHOLE_NUMBERS[variable]:
        assert getattr(Config.from_env({**GOOD, **wide, variable: str(limit)}), variable.lower()) == limit


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://user:p%40ss@host:6380/15",
        "redis://user:p:ss+=@host",
        "rediss://:secret@host/",
        "unix:///run/redis.sock?db=1",
        "redis://[::1]:6379/0",
        "redis+sentinel://:p%40ss@one:26379,two/main/3",
        "rediss+sentinel://one,[::1]:26380/main",
        "redis+cluster://user:p%23ss@one:6379,two:6379",
        "rediss+cluster://clustercfg.example.com:6379",
    ],
)
def test_redis_url(url: str) -> None:
    """The usual ways to name a Redis are taken as they are."""
    assert Config.from_env({**GOOD, "REDIS_URL": url}).redis_url == url


@pytest.mark.parametrize("name, scheme", [("valkey", "redis"), ("valkeys", "rediss")])
def test_valkey_url(name: str, scheme: str) -> None:
    """valkey:// and valkeys:// are other names of redis:// and rediss://."""
    assert Config.from_env({**GOOD, "REDIS_URL": f"{name}://:s@host/1"}).redis_url == f"{scheme}://:s@host/1"


def test_redis_tls_url() -> None:
    """REDIS_TLS_URL is preferred to REDIS_URL, and enough by itself."""
    tls = {"REDIS_TLS_URL": "rediss://host:6380/0", "JWT_SECRET": SECRET}
    assert Config.from_env({**tls, "REDIS_URL": REDIS}).redis_url == "rediss://host:6380/0"
    assert Config.from_env(tls).redis_url == "rediss://host:6380/0"


@pytest.mark.parametrize(
    "url", ["https://issuer.example/jwks", "http://localhost:8080/jwks", "http://127.0.0.1/jwks", "http://[::1]/jwks"]
)
def test_jwks_url(url: str) -> None:
    """A key set is fetched over TLS, or from this very machine."""
    assert Config.from_env(environment({"JWT_JWKS_URL": url})).jwt_jwks_url == url


def test_jwks_http() -> None:
    """A key set is fetched over http from another machine where JWT_JWKS_HTTP says so."""
    config = Config.from_env(environment({"JWT_JWKS_URL": "http://issuer:8080/jwks", "JWT_JWKS_HTTP": "on"}))
    assert (config.jwt_jwks_url, config.jwt_jwks_http) == ("http://issuer:8080/jwks", True)


@pytest.mark.parametrize("variable", ["REDIS_CA_CERTS", "JWT_JWKS_CA_CERTS"])
def test_ca_certs(tmp_path: Path, variable: str) -> None:
    """CA certificates are PEM, with line breaks as they are or spelled out, or the path of a file with it."""
    (tmp_path / "ca.crt").write_text(f"{CERTIFICATE}\nF\u0151tan\u00fas\u00edtv\u00e1ny\n{CERTIFICATE}")
    values = {
        CERTIFICATE: 1,
        CERTIFICATE.replace("\n", "\\n"): 1,
        CERTIFICATE.replace("\n", "\\r\\n"): 1,
        str(tmp_path / "ca.crt"): 2,
    }
    environ = environment({"REDIS_URL": "rediss://host", "JWT_JWKS_URL": "https://issuer.example"})
    loaded = [getattr(Config.from_env({**environ, variable: value}), variable.lower()) for value in values]
    assert loaded == [f"{CERTIFICATE}\n" * number for number in values.values()]


def test_audiences() -> None:
    """Several audiences are separated by spaces."""
    assert Config.from_env({**GOOD, "JWT_AUDIENCE": "web  https://api.example/"}).jwt_audience == (
        "web",
        "https://api.example/",
    )


@pytest.mark.parametrize("quote", ["'", '"'])
@pytest.mark.parametrize("variable", VARIABLES)
def test_quotes(variable: str, quote: str) -> None:
    """Quotes around a value, which a file for docker keeps, are refused in every variable."""
    value = f"{quote}{GOOD.get(variable, 'on')}{quote}"
    found = problems({**GOOD, variable: value})
    assert any(each.startswith(variable) and each.endswith(": must not stand in quotes") for each in found)
    assert SECRET not in "".join(found)


def test_quotes_within() -> None:
    """A quote at one end only, or within, is a part of the value."""
    assert Config.from_env({**GOOD, "LOG_KEY": '\'sixteen "letters"'}).log_key == '\'sixteen "letters"'


PRINTED = {
    "line breaks spelled out": RSA_PEM.replace("\n", "\\n"),
    "Windows' line breaks": RSA_PEM.replace("\n", "\r\n"),
    "Windows' line breaks spelled out": RSA_PEM.replace("\n", "\\r\\n"),
    "spaces for line breaks": RSA_PEM.replace("\n", " "),
    "base64 alone": "".join(RSA_PEM.splitlines()[1:-1]),
    "PKCS #1": RSA_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.PKCS1).decode(),
    "certificate": CERTIFICATE,
    "certificate on one line": CERTIFICATE.replace("\n", "\\n"),
    "base64 of a certificate alone": "".join(CERTIFICATE.splitlines()[1:-1]),
}


@pytest.mark.parametrize("way", PRINTED)
def test_public_key_as_printed(way: str) -> None:
    """A public key is taken in each form in which issuers print it."""
    printed, plain = (Config.from_env(environment({"JWT_PUBLIC_KEY": pem})) for pem in (PRINTED[way], RSA_PEM))
    assert printed == plain


@pytest.mark.parametrize(
    "changes, algorithms",
    [
        ({"JWT_SECRET": SECRET}, ("HS256",)),
        ({"JWT_SECRET": "s" * 48}, ("HS256", "HS384")),
        ({"JWT_SECRET": "s" * 64}, ("HS256", "HS384", "HS512")),
        ({"JWT_SECRET": f"{'s' * 64} {SECRET}"}, ("HS256",)),
        ({"JWT_SECRET": "\u20ac" * 16}, ("HS256", "HS384")),
        ({"JWT_SECRET": "s" * 64, "JWT_ALGORITHMS": "HS512"}, ("HS512",)),
        ({"JWT_PUBLIC_KEY": RSA_PEM}, RSA_ALGORITHMS),
        ({"JWT_PUBLIC_KEY": RSA_PEM, "JWT_ALGORITHMS": "RS256, PS256"}, ("RS256", "PS256")),
        ({"JWT_PUBLIC_KEY": pem_of(ec.generate_private_key(ec.SECP256R1()))}, ("ES256",)),
        ({"JWT_PUBLIC_KEY": pem_of(ec.generate_private_key(ec.SECP384R1()))}, ("ES384",)),
        ({"JWT_PUBLIC_KEY": pem_of(ec.generate_private_key(ec.SECP521R1()))}, ("ES512",)),
        ({"JWT_PUBLIC_KEY": pem_of(ed25519.Ed25519PrivateKey.generate())}, ("EdDSA",)),
        ({"JWT_JWKS_URL": "https://issuer.example"}, (*RSA_ALGORITHMS, "ES256", "ES384", "ES512", "EdDSA")),
    ],
    ids="+".join,
)
def test_algorithms(changes: dict[str, str], algorithms: tuple[str, ...]) -> None:
    """The algorithms are those configured, or all that the key can verify: one family in any case."""
    assert Config.from_env(environment(changes)).algorithms == algorithms


def readme_defaults() -> dict[str, str]:
    """The table of the README's section Configure: a default for each variable."""
    section = re.search(r"^## Configure\n(.*?)(?=^## |\Z)", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| (`[A-Z_`, ]+`) \| (.*?) \|", section[1], re.MULTILINE)
    found = {}
    for names, texts in rows:
        variables, defaults = names.replace("`", "").split(", "), texts.replace("`", "").split(", ")
        found.update(zip(variables, defaults if len(defaults) > 1 else defaults * len(variables)))
    return found


def code_default(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "–" if value in (None, "", ()) else str(value)


def test_readme() -> None:
    """The README's table has the variables that the code reads, with their defaults."""
    code = {name: code_default(each.default) for name, each in zip(VARIABLES, fields(Config))}
    # What depends on the rest or on the machine stands there in words.
    words = {"REDIS_URL": "– (required)", "JWT_ALGORITHMS": "by key", "WEB_CONCURRENCY": "cores"}
    assert readme_defaults() == {**code, **words}


def test_example() -> None:
    """.env.example names every variable, sets those that it sets to their defaults, and is refused for its secret."""
    lines = re.findall(r"^(#? ?)([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert {name for _, name, _ in lines} == set(VARIABLES)
    example = {name: value for comment, name, value in lines if not comment}
    assert problems(example) == ["JWT_SECRET: every secret must have 32 bytes or more"]
    assert replace(Config.from_env({**example, **GOOD}), redis_url=REDIS) == Config.from_env(GOOD)
