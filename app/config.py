"""The configuration: one frozen `Config`, loaded once from the environment by a marshmallow schema."""

import dataclasses
import hmac
import os
import re
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key
from cryptography.x509 import load_der_x509_certificate, load_pem_x509_certificates
from marshmallow import EXCLUDE, Schema, ValidationError
from marshmallow.fields import Boolean, Field, Float, Function, Integer
from marshmallow.validate import Length, OneOf, Range, Regexp

VERSION = "1.0.0"  # as in setup.cfg, which is not there where only the app was copied
# RFC 7518 §3.2: an HMAC key is at least as long as the hash it is used with.
HMAC_KEY_BYTES = {"HS256": 32, "HS384": 48, "HS512": 64}
RSA_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
EC_ALGORITHMS = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
PUBLIC_KEY_ALGORITHMS = (*RSA_ALGORITHMS, *EC_ALGORITHMS.values(), "EdDSA")
KEY_SOURCES = ("JWT_SECRET", "JWT_PUBLIC_KEY", "JWT_JWKS_URL")
LONGEST_SECONDS = 10 * 365 * 86400

_USER = r"([^@/?#\s]*@)?"
_HOST = r"([\w-]{1,63}(\.[\w-]{1,63})*\.?|\[[\da-fA-F:.]+\])(:\d{1,5})?"
_HOSTS = rf"{_HOST}(,{_HOST})*"
# For each scheme the pattern of the rest of the URL, and an example. With rediss for redis it is the same over TLS.
REDIS_URLS = {
    "redis": (rf"{_USER}{_HOST}(/[0-9]*)?(\?db=[0-9]+)?", "user:password@host:6379/0"),
    "unix": (rf"{_USER}/[^?#]+(\?db=[0-9]+)?", "/run/redis.sock?db=0"),
    "redis+sentinel": (rf"{_USER}{_HOSTS}/[^/?#]+(/[0-9]+)?", "user:password@host:26379,host:26379/service/0"),
    "redis+cluster": (rf"{_USER}{_HOSTS}/?", "user:password@host:6379,host:6379"),
    "memory": (r"/?", ""),
}

# Python reads bytes that are not UTF-8 as lone surrogates.
UTF8 = Regexp(r"[^\ud800-\udfff]*\Z", error="is not UTF-8")
# A shell takes quotes away; docker's --env-file does not, and they would become a part of a secret.
UNQUOTED = Regexp(r"""(?s:(?!(["']).*\1\Z))""", error="must not stand in quotes")
HTTP_URL = Regexp(rf"https?://{_USER}{_HOST}([/?]\S*)?\Z", error="must be an https:// address")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
ORIGIN = Regexp(  # RFC 6454 §6.2
    r"[a-z][a-z0-9+.-]*://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:[0-9]+)?\Z",
    error="must be origins such as https://app.example.com, separated by spaces",
)
# RFC 6749 §3.3, without its separator.
SCOPE = Regexp(r"[!#-\[\]-~]+\Z", error="must be one scope: printable ASCII without space, quote and backslash")
METRICS_TOKEN = Regexp(  # RFC 6750 §2.1
    r"([\w.~+/-]{16,}=*|off)\Z", re.ASCII, error="must be 16 or more letters, digits and -._~+/, or off"
)


class ConfigError(ValueError):
    """The environment is refused; `str()` names every problem, a line each. `config` is what the rest of it says."""

    def __init__(self, problems: list[str], config: "Config") -> None:
        super().__init__("Refused configuration:\n" + "\n".join(f"  {p}" for p in problems))
        self.problems = problems
        self.config = config


def on_off() -> Boolean:
    return Boolean(truthy={"on"}, falsy={"off"}, error_messages={"invalid": "must be on or off"})


def parse_words(text: str) -> tuple[str, ...]:
    """A list, separated by spaces or commas."""
    return tuple(text.replace(",", " ").split())


def parse_http_url(text: str) -> str:
    """An address of http or https."""
    HTTP_URL(text)
    try:
        urlsplit(text)
    except ValueError:
        raise ValidationError(str(HTTP_URL.error)) from None
    return text


def parse_origins(text: str) -> tuple[str, ...]:
    return tuple(map(ORIGIN, parse_words(text)))


def parse_secrets(text: str) -> tuple[str, ...]:
    """HMAC secrets, separated by spaces; RFC 7518 §3.2 says how long they have to be."""
    secrets = tuple(text.split())
    if any(len(secret.encode()) < HMAC_KEY_BYTES["HS256"] for secret in secrets):
        raise ValidationError("every secret must have 32 bytes or more")
    return secrets


def parse_redis_url(text: str) -> str:
    """The address of Redis. No option in it may undo the timeouts that bound every answer."""
    scheme, _, rest = text.partition("://")
    scheme = scheme.replace("valkey", "redis")
    plain = scheme.replace("rediss", "redis")
    if plain not in REDIS_URLS:
        known = ", ".join(f"{known}://" for known in REDIS_URLS)
        raise ValidationError(f"must start with {known}, or with rediss for redis over TLS")
    pattern, example = REDIS_URLS[plain]
    url = f"{scheme}://{rest}"
    with suppress(ValueError):  # a port above 65535
        if re.fullmatch(pattern, rest) and addresses_of(url):
            return url
    rule = f"must look like {scheme}://{example}, with user and password percent-encoded"
    raise ValidationError(f"{rule}; no option is taken here, and TLS is up to REDIS_TLS_VERIFY and REDIS_CA_CERTS")


def addresses_of(url: str) -> list[tuple[str, int]]:
    """The hosts and ports that a URL of Redis names. Raises ValueError where a port is not one."""
    default = 26379 if "+sentinel:" in url else 6379
    parts = [urlsplit(f"//{part}") for part in urlsplit(url).netloc.rpartition("@")[2].split(",")]
    return [(part.hostname or "", part.port or default) for part in parts]


def credentials_of(url: str) -> dict[str, str | None]:
    """The user and the password in a URL of Redis, as redis-py takes them."""
    user, password = urlsplit(url).username, urlsplit(url).password
    return {"username": unquote(user or "") or None, "password": unquote(password or "") or None}


def parse_ca_certs(text: str) -> str:
    """The PEM (RFC 7468) of CA certificates, out of a PEM, in which \\n may stand for a line break, or of a file."""
    try:
        given = text.replace("\\r", "").replace("\\n", "\n").encode()
        pem = given if given.startswith(b"-----BEGIN") else Path(text).read_bytes()
        certificates = load_pem_x509_certificates(pem)
    except (ValueError, OSError):
        raise ValidationError("must be a PEM certificate or the path of a file with it") from None
    # Without the text that may stand between them: ssl takes ASCII only.
    return "".join(each.public_bytes(Encoding.PEM).decode() for each in certificates)


def parse_public_key(text: str) -> PublicKeyTypes:
    """The key in a PEM (RFC 7468) of a public key or an X.509 certificate, or in its base64 alone.

    A PaaS keeps a PEM on one line, with \\n spelled out.
    """
    base64 = re.sub(r"-----(BEGIN|END) (CERTIFICATE|(RSA )?PUBLIC KEY)-----|\\[rn]|\s", "", text)
    with suppress(ValueError, UnsupportedAlgorithm):
        der = b64decode(base64, validate=True)
        try:
            key = load_der_public_key(der)
        except ValueError:
            key = load_der_x509_certificate(der).public_key()
        if algorithms_of(key):
            return key
    raise ValidationError("must be a PEM public key: RSA of 2048 bits or more, EC or Ed25519")


def algorithms_of(key: object) -> tuple[str, ...]:
    """The JWS algorithms (RFC 7518 §3.1, RFC 8037) that a public key can verify; none for any other object."""
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= 2048:
        return RSA_ALGORITHMS
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in EC_ALGORITHMS:
        return (EC_ALGORITHMS[key.curve.name],)
    if isinstance(key, ed25519.Ed25519PublicKey):
        return ("EdDSA",)
    return ()


def setting(parse: Field[Any] | Callable[[str], Any], default: Any = None, *, secret: bool = False) -> Any:
    """A field of `Config` and how it is loaded: by marshmallow, or by a function that raises its ValidationError.

    A `secret` one is never repeated in a message.
    """
    loaded = parse if isinstance(parse, Field) else Function(deserialize=parse)
    loaded.pre_load = [UTF8, UNQUOTED]
    return dataclasses.field(default=default, metadata={"loaded": loaded, "secret": secret})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What one environment says. Each field is the variable of the same name in capitals.

    But for `redis_url`: that is REDIS_TLS_URL where it is set.
    """

    redis_url: str = setting(parse_redis_url, "", secret=True)
    redis_tls_url: str | None = setting(parse_redis_url, secret=True)
    # At most 0.5: a round trip is given 0.1 seconds more, a list takes three, and no answer may take 2 seconds.
    redis_timeout_seconds: float = setting(Float(validate=Range(0.05, 0.5)), 0.5)
    redis_ca_certs: str | None = setting(parse_ca_certs, secret=True)
    redis_tls_verify: bool = setting(on_off(), True)
    redis_wait_replicas: int = setting(Integer(validate=Range(0, 5)), 0)
    jwt_secret: tuple[str, ...] = setting(parse_secrets, (), secret=True)
    jwt_public_key: PublicKeyTypes | None = setting(parse_public_key, secret=True)
    jwt_jwks_url: str | None = setting(parse_http_url, secret=True)
    jwt_jwks_http: bool = setting(on_off(), False)
    jwt_jwks_ca_certs: str | None = setting(parse_ca_certs, secret=True)
    jwt_algorithms: tuple[str, ...] = setting(parse_words, ())
    jwt_issuer: str | None = setting(str)
    jwt_audience: tuple[str, ...] = setting(lambda text: tuple(text.split()), ())
    jwt_admin_scope: str | None = setting(SCOPE)
    jwt_leeway_seconds: int = setting(Integer(validate=Range(0, 300)), 30)
    jwt_subject_claim: str = setting(str, "sub")
    session_idle_seconds: int = setting(Integer(validate=Range(1, LONGEST_SECONDS)), 1800)
    session_idle_max_seconds: int = setting(Integer(validate=Range(1, LONGEST_SECONDS)), 86400)
    session_absolute_seconds: int = setting(Integer(validate=Range(1, LONGEST_SECONDS)), 2592000)
    session_limit: int = setting(Integer(validate=Range(1, 1000)), 100)
    session_limit_policy: str = setting(OneOf(["refuse", "replace"]), "refuse")
    trusted_proxies: int = setting(Integer(validate=Range(0, 16)), 0)
    cors_origins: tuple[str, ...] = setting(parse_origins, ())
    metrics_token: str | None = setting(METRICS_TOKEN, secret=True)
    log_key: str | None = setting(Length(16), secret=True)
    # gunicorn.conf.py reads these two itself. Here a bad one is listed with the rest, and the number of workers is
    # checked against Redis.
    port: int = setting(Integer(validate=Range(1, 65535)), 8000)
    web_concurrency: int = setting(Integer(validate=Range(1, 1024)), os.cpu_count() or 1)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> "Config":
        """Load an environment; a variable that is empty counts as not set.

        Raises ConfigError naming every problem at once: the variable, its value and the rule.
        """
        settings = {each.name.upper(): each.metadata for each in dataclasses.fields(cls)}
        schema = Schema.from_dict({name: each["loaded"] for name, each in settings.items()})
        given = {name: text.strip() for name, text in environ.items() if text.strip()}
        problems: list[str] = []
        try:
            loaded = schema().load(given, unknown=EXCLUDE)
        except ValidationError as refusal:
            loaded = refusal.valid_data
            for name, [rule] in refusal.messages_dict.items():
                problems.append(f"{name}: {rule}" if settings[name]["secret"] else f"{name}={given[name]!r}: {rule}")
        # A PaaS may set both; the one over TLS is taken.
        loaded["REDIS_URL"] = loaded.get("REDIS_TLS_URL") or loaded.get("REDIS_URL", "")
        config = cls(**{name.lower(): value for name, value in loaded.items()})
        problems += config._conflicts(given.keys())
        if problems:
            raise ConfigError(problems, config)
        return config

    def _conflicts(self, given: Set[str]) -> Iterator[str]:
        """Problems of a combination. A variable that was given and refused is not reported as missing, too."""
        if not given & {"REDIS_URL", "REDIS_TLS_URL"}:
            yield "REDIS_URL: must be set"
        if self.redis_url.startswith("memory:") and (self.web_concurrency > 1 or self.redis_wait_replicas):
            yield "REDIS_URL: memory:// is one process's own; it needs WEB_CONCURRENCY=1 and REDIS_WAIT_REPLICAS=0"
        verified = self.redis_url.startswith("rediss") and self.redis_tls_verify
        if self.redis_ca_certs and self.redis_url and not verified:
            yield "REDIS_CA_CERTS: is of use with rediss:// only, and not with REDIS_TLS_VERIFY=off"
        key_set = urlsplit(self.jwt_jwks_url or "")
        if key_set.scheme == "http" and not (self.jwt_jwks_http or key_set.hostname in LOOPBACK):
            yield "JWT_JWKS_URL: must be an https:// address; http:// to another machine needs JWT_JWKS_HTTP=on"
        # Any other API of the issuer may have a scope of that name.
        if self.jwt_admin_scope and not ("JWT_SECRET" in given or {"JWT_ISSUER", "JWT_AUDIENCE"} <= given):
            yield "JWT_ADMIN_SCOPE: needs JWT_ISSUER and JWT_AUDIENCE, unless tokens are signed with JWT_SECRET"
        if (idle := self.session_idle_seconds) > (most := self.session_idle_max_seconds):
            yield f"SESSION_IDLE_SECONDS={idle}: must not be more than SESSION_IDLE_MAX_SECONDS={most}"
        sources = [name for name in KEY_SOURCES if name in given]
        if len(sources) != 1:
            yield f"{', '.join(KEY_SOURCES)}: exactly one must be set, not {' and '.join(sources) or 'none'}"
        elif getattr(self, sources[0].lower()):
            possible = self._possible_algorithms()
            if unfit := ", ".join(name for name in self.jwt_algorithms if name not in possible):
                rule = f"{unfit} cannot be used with this {sources[0]}, but {', '.join(possible)} can"
                yield f"JWT_ALGORITHMS={' '.join(self.jwt_algorithms)!r}: {rule}"

    def _possible_algorithms(self) -> tuple[str, ...]:
        if self.jwt_secret:
            shortest = min(len(secret.encode()) for secret in self.jwt_secret)
            return tuple(name for name, least in HMAC_KEY_BYTES.items() if least <= shortest)
        if self.jwt_public_key:
            return algorithms_of(self.jwt_public_key)
        return PUBLIC_KEY_ALGORITHMS

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The allow-list: what is configured, or else all that the key can verify; never HMAC beside public keys."""
        return self.jwt_algorithms or self._possible_algorithms()

    def pseudonym(self, value: str) -> str:
        """What stands for a subject or a session id in the logs: 64 bits of HMAC-SHA256 (RFC 2104), in hex.

        The key is LOG_KEY, or else all of JWT_SECRET, or without one the URL of Redis: when that changes so do these.
        """
        key = self.log_key or " ".join(["log", *(self.jwt_secret or [self.redis_url])])
        return hmac.digest(key.encode(), value.encode(), "sha256").hex()[:16]
