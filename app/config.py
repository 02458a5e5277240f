"""The configuration: one frozen `Config`, parsed once from the environment."""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

# RFC 7518 §3.2: an HMAC key is at least as long as the hash it is used with.
HMAC_KEY_BYTES = {"HS256": 32, "HS384": 48, "HS512": 64}
RSA_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
EC_ALGORITHMS = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
PUBLIC_KEY_ALGORITHMS = (*RSA_ALGORITHMS, *EC_ALGORITHMS.values(), "EdDSA")
# Each scheme, and what its path may be.
REDIS_SCHEMES = {
    "redis": r"/?|/[0-9]+",
    "rediss": r"/?|/[0-9]+",
    "unix": r"/.+",
    "redis+sentinel": r"/[^/]+(/[0-9]+)?",
    "redis+cluster": r"/?",
    "memory": r"/?",
}
LONGEST_SECONDS = 10 * 365 * 86400


class ConfigError(ValueError):
    """The environment is refused; `str()` names every problem, a line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("Refused configuration:\n" + "\n".join(f"  {p}" for p in problems))
        self.problems = problems


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """A parser for a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text) or not least <= int(text) <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        return int(text)

    return parse


def parse_timeout_seconds(text: str) -> float:
    """At most 0.5: a round trip is given 0.1 seconds more, a list takes three, and the contract allows 2 seconds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.05 <= value <= 0.5:
        raise ValueError("must be a number of seconds from 0.05 to 0.5")
    return value


def parse_words(text: str) -> tuple[str, ...]:
    """A list, separated by spaces or commas."""
    return tuple(text.replace(",", " ").split())


def parse_secrets(text: str) -> tuple[str, ...]:
    """HMAC secrets, separated by spaces; RFC 7518 §3.2 says how long they have to be."""
    found = tuple(text.split())
    if any(len(secret.encode()) < HMAC_KEY_BYTES["HS256"] for secret in found):
        raise ValueError("every secret must have 32 bytes or more")
    return found


def parse_redis_url(text: str) -> str:
    """The address of Redis; nothing in it may undo the timeouts that bound every answer."""
    scheme = text.partition("://")[0]
    if scheme not in REDIS_SCHEMES:
        raise ValueError("must start with " + ", ".join(f"{scheme}://" for scheme in REDIS_SCHEMES))
    try:
        url = urlsplit(text)
        if scheme not in ("unix", "memory"):
            for host, _ in addresses_of(text):
                host.encode("idna")
    except ValueError:
        raise ValueError("is not a URL") from None
    if not re.fullmatch(REDIS_SCHEMES[scheme], url.path):
        raise ValueError("must end in a database number, as in redis://host:6379/0, or redis+sentinel://…/service/0")
    if url.query and scheme not in ("redis", "rediss", "unix"):
        raise ValueError("takes nothing after a ?; Sentinel's database is in the path: redis+sentinel://…/service/0")
    if not re.fullmatch(r"(db=[0-9]+)?", url.query):
        raise ValueError("takes no option after the ? but db, as in unix:///run/redis.sock?db=1")
    return text


def addresses_of(url: str) -> list[tuple[str, int]]:
    """The hosts and ports that a URL of Redis names, one or several. Raises ValueError where it names none."""
    port = 26379 if url.startswith("redis+sentinel") else 6379
    addresses = [urlsplit(f"//{part}") for part in urlsplit(url).netloc.rpartition("@")[2].split(",")]
    if len(addresses) > 1 and not url.startswith("redis+") or not all(a.hostname for a in addresses):
        raise ValueError("names no address")
    return [(address.hostname or "", address.port or port) for address in addresses]


def parse_ca_certs(text: str) -> str:
    """Authorities to trust: PEM (RFC 7468), or the path of a file with it."""
    pem = text.replace("\\n", "\n")
    if not pem.startswith("-----BEGIN CERTIFICATE-----") and not os.path.isfile(text):
        raise ValueError("must be a PEM certificate or the path of a file")
    return pem


def parse_public_key(text: str) -> str:
    """A public key in PEM (RFC 7468 §13)."""
    # A PaaS keeps a PEM on one line, with \n spelled out.
    pem = text.replace("\\n", "\n")
    try:
        algorithms_of(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("must be a PEM public key: RSA of 2048 bits or more, EC or Ed25519") from None
    return pem


def parse_jwks_url(text: str) -> str:
    """The key set's address. Only https: whoever can change the keys in transit can sign tokens."""
    url = urlsplit(text)
    loopback = url.hostname in ("localhost", "127.0.0.1", "::1")
    if not url.hostname or not (url.scheme == "https" or url.scheme == "http" and loopback):
        raise ValueError("must be an https:// address; http:// only on this machine")
    return text


def matching(pattern: str, rule: str) -> Callable[[str], str]:
    """A parser for text that matches a pattern from its beginning to its end."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError(rule)
        return text

    return parse


def parse_on_off(text: str) -> bool:
    """A switch."""
    return matching("on|off", "must be on or off")(text) == "on"


def parse_origins(text: str) -> tuple[str, ...]:
    """Scheme, host and port, and nothing behind them (RFC 6454 §6.2)."""
    rule = "must be origins such as https://app.example.com, separated by spaces"
    return tuple(map(matching(r"https?://[a-z0-9.-]+(:[0-9]+)?", rule), parse_words(text)))


def algorithms_of(pem: str) -> tuple[str, ...]:
    """The JWS algorithms (RFC 7518 §3.1, RFC 8037) that a PEM public key can verify.

    Raises ValueError where it is no public key or one of another kind.
    """
    key = load_pem_public_key(pem.encode())
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= 2048:
        return RSA_ALGORITHMS
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in EC_ALGORITHMS:
        return (EC_ALGORITHMS[key.curve.name],)
    if isinstance(key, ed25519.Ed25519PublicKey):
        return ("EdDSA",)
    raise ValueError("unsupported key")


def setting(parse: Callable[[str], Any], default: Any = None, *, secret: bool = False) -> Any:
    """A field of `Config`; a `secret` one is never repeated in a message."""
    return field(default=default, metadata={"parse": parse, "secret": secret})


@dataclass(frozen=True, kw_only=True)
class Config:
    """What one environment says. Each field is the variable of the same name in capitals."""

    redis_url: str = setting(parse_redis_url, "", secret=True)
    redis_tls_url: str | None = setting(parse_redis_url, secret=True)
    redis_timeout_seconds: float = setting(parse_timeout_seconds, 0.5)
    redis_ca_certs: str | None = setting(parse_ca_certs, secret=True)
    redis_tls_verify: bool = setting(parse_on_off, True)
    redis_wait_replicas: int = setting(whole_number(0, 5), 0)
    jwt_secret: tuple[str, ...] = setting(parse_secrets, (), secret=True)
    jwt_public_key: str | None = setting(parse_public_key, secret=True)
    jwt_jwks_url: str | None = setting(parse_jwks_url)
    jwt_algorithms: tuple[str, ...] = setting(parse_words, ())
    jwt_issuer: str | None = setting(str)
    jwt_audience: str | None = setting(str)
    jwt_leeway_seconds: int = setting(whole_number(0, 300), 30)
    jwt_subject_claim: str = setting(str, "sub")
    session_idle_seconds: int = setting(whole_number(1, LONGEST_SECONDS), 1800)
    session_idle_max_seconds: int = setting(whole_number(1, LONGEST_SECONDS), 86400)
    session_absolute_seconds: int = setting(whole_number(1, LONGEST_SECONDS), 2592000)
    session_limit: int = setting(whole_number(1, 10000), 100)
    trusted_proxies: int = setting(whole_number(0, 16), 0)
    cors_origins: tuple[str, ...] = setting(parse_origins, ())
    metrics_token: str | None = setting(
        matching(r"[\w.~+/=-]{16,}|off", "must be 16 or more letters, digits and -._~+/=, or off"), secret=True
    )
    log_key: str | None = setting(matching("(?s:.{16,})", "must have 16 characters or more"), secret=True)
    port: int = setting(whole_number(1, 65535), 8000)  # gunicorn's own; here so that a bad one is listed with the rest
    web_concurrency: int = setting(whole_number(1, 1024), os.cpu_count() or 1)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> "Config":
        """Parse an environment; a variable that is empty counts as not set.

        Raises ConfigError naming every problem at once: the variable, its value and the rule.
        """
        problems: list[str] = []
        values = {}
        given = {each.name: text for each in fields(cls) if (text := environ.get(each.name.upper(), "").strip())}
        for each in fields(cls):
            if text := given.get(each.name, ""):
                try:
                    text.encode()
                    values[each.name] = each.metadata["parse"](text)
                except UnicodeEncodeError:
                    problems.append(f"{each.name.upper()}: is not UTF-8")
                except ValueError as rule:
                    shown = "" if each.metadata["secret"] else f"={text!r}"
                    problems.append(f"{each.name.upper()}{shown}: {rule}")
        config = cls(**{**values, "redis_url": values.get("redis_tls_url") or values.get("redis_url", "")})
        problems += config._conflicts(given)
        if problems:
            raise ConfigError(problems)
        return config

    def _conflicts(self, given: Mapping[str, str]) -> list[str]:
        """Problems of a combination. A variable that was given and refused is not reported as missing, too."""
        sources = [name for name in ("jwt_secret", "jwt_public_key", "jwt_jwks_url") if name in given]
        listed = ", ".join(sources).upper()
        problems = []
        if not given.keys() & {"redis_url", "redis_tls_url"}:
            problems.append("REDIS_URL: must be set")
        if self.redis_url.startswith("memory://") and self.web_concurrency > 1:
            problems.append("REDIS_URL: memory:// is one process's own; it needs WEB_CONCURRENCY=1")
        if len(sources) != 1:
            problems.append(
                "JWT_SECRET, JWT_PUBLIC_KEY, JWT_JWKS_URL: exactly one must be set, "
                + (f"not {len(sources)}: {listed}" if sources else "none is")
            )
        elif getattr(self, sources[0]) and (
            unfit := [a for a in self.jwt_algorithms if a not in self._possible_algorithms()]
        ):
            problems.append(
                f"JWT_ALGORITHMS={' '.join(self.jwt_algorithms)!r}: {', '.join(unfit)} cannot be used with {listed}"
            )
        if self.redis_wait_replicas and self.redis_url.startswith("memory://"):
            problems.append("REDIS_WAIT_REPLICAS: memory:// has no replicas")
        if self.redis_ca_certs and not self.redis_tls_verify:
            problems.append("REDIS_CA_CERTS: is of no use with REDIS_TLS_VERIFY=off")
        if self.redis_ca_certs and self.redis_url and not self.redis_url.startswith("rediss://"):
            problems.append("REDIS_CA_CERTS: is of use with rediss:// only; nothing else is encrypted")
        if self.session_idle_seconds > self.session_idle_max_seconds:
            problems.append(
                f"SESSION_IDLE_SECONDS={self.session_idle_seconds}: must not be more than "
                f"SESSION_IDLE_MAX_SECONDS={self.session_idle_max_seconds}"
            )
        return problems

    def _possible_algorithms(self) -> tuple[str, ...]:
        if self.jwt_secret:
            shortest = min(len(secret.encode()) for secret in self.jwt_secret)
            return tuple(name for name, least in HMAC_KEY_BYTES.items() if least <= shortest)
        return algorithms_of(self.jwt_public_key) if self.jwt_public_key else PUBLIC_KEY_ALGORITHMS

    @property
    def pseudonym_key(self) -> bytes:
        """The key of the hashes in logs: the same in every worker, and only as secret as what it is made from."""
        return (self.log_key or " ".join(["log", self.redis_url, *self.jwt_secret])).encode()

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The allow-list, of one family: what is configured, or else all that the key can verify."""
        return self.jwt_algorithms or self._possible_algorithms()
