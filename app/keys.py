"""Where signing keys come from (secrets, a PEM, or a key set refreshed in the background), and what each can verify."""

import http.client
import json
import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple
from urllib.request import HTTPRedirectHandler, Request, build_opener

import gevent
import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from app.config import EC_ALGORITHMS, HMAC_KEY_BYTES, RSA_ALGORITHMS, Config
from app.deadline import give_way

log = logging.getLogger(__name__)

Key = bytes | jwt.algorithms.AllowedPublicKeys
# A token that fits more keys of a set than this is tried with the first of them only: each costs a verification.
MOST_TRIED = 8


class KeysUnavailable(Exception):
    """No signing key could ever be loaded."""


class VerificationKey(NamedTuple):
    """What signatures are verified with: the JWS algorithms that it is for, and its id in a key set."""

    key: Key
    algorithms: Sequence[str]
    id: str | None = None


class KeySet:
    """Keys by what a token's header says about the one that signed it."""

    def __init__(self, keys: Sequence[VerificationKey] = ()) -> None:
        self.ids = {key.id for key in keys}
        self._fitting: dict[str, list[Key]] = defaultdict(list)
        self._named: dict[tuple[str, str | None], list[Key]] = defaultdict(list)
        for key in keys:
            for algorithm in key.algorithms:
                self._fitting[algorithm].append(key.key)
                self._named[algorithm, key.id].append(key.key)

    def candidates(self, algorithm: str, key_id: str | None) -> Sequence[Key]:
        """The keys that can have signed a token."""
        # Neither a key nor a token needs an id (RFC 7517 §4.5, RFC 7515 §4.1.4), and two keys may have the same.
        if key_id is None:
            return self._fitting.get(algorithm, ())
        return [*self._named.get((algorithm, key_id), ()), *self._named.get((algorithm, None), ())]

    def most_without_id(self) -> int:
        """The largest number of keys without an id that can verify the same algorithm."""
        return max((len(keys) for (_, id), keys in self._named.items() if id is None), default=0)


class FixedKeys:
    """Keys that come with the configuration and stay until the next start."""

    generation, fetched_at, loaded = 0, 0.0, True

    def __init__(self, keys: Sequence[VerificationKey]) -> None:
        self._keys = KeySet(keys)

    def candidates(self, algorithm: str, key_id: str | None) -> Sequence[Key]:
        """The keys to try for a token."""
        return self._keys.candidates(algorithm, None)


class JwksKeys:
    """A JWK Set (RFC 7517 §5) behind a URL, fetched by a thread of its own so that no request does.

    The last good keys stay while the issuer is down. A token with an unknown key id asks for a fetch, at most one
    in COOLDOWN seconds, and waits for it UNKNOWN_KEY_WAIT seconds at most; a token with a known one never waits. Where
    the set has a key without an id every token is tried with that, so no id is unknown, and a new key is found only by
    the refresh every REFRESH_EVERY seconds.
    """

    REFRESH_EVERY = 300.0
    RETRY_EVERY = 5.0  # while there are no keys at all
    FETCH_TIMEOUT = 5.0
    LARGEST = 1_000_000  # bytes of the issuer's answer
    COOLDOWN = 30.0
    UNKNOWN_KEY_WAIT = 1.0

    def __init__(self, url: str, report: Callable[[float | None], None] = lambda _: None) -> None:
        """`report` is told when a fetch has succeeded, in seconds since the epoch, or None where it has failed."""
        self.generation = 0  # grows when the keys change: what was verified under an older one is to be forgotten
        self.fetched_at = 0.0  # seconds since the epoch
        self._request = Request(url, headers={"Accept": "application/json"})
        self._opener = build_opener(_HttpsRedirects)
        self._report = report
        self._fetched: Any = None
        self._keys = KeySet()
        self._asking = threading.Lock()
        self._asked = threading.Event()
        self._asked_at = -math.inf
        self._answered = threading.Event()  # set when the fetch that was last asked for has ended
        threading.Thread(target=self._refresh_for_ever, name="jwks", daemon=True).start()
        # The first answers should not be 503 only because the key set is a moment away.
        self._answered.wait(self.UNKNOWN_KEY_WAIT)

    @property
    def loaded(self) -> bool:
        """Whether there are keys: once there are some they stay."""
        return bool(self._keys.ids)

    def candidates(self, algorithm: str, key_id: str | None) -> Sequence[Key]:
        """The keys to try for a token, MOST_TRIED at most. Raises KeysUnavailable where none could ever be loaded."""
        if not self.loaded or key_id is not None and not self._keys.ids & {key_id, None}:
            self._ask_for_fetch()
        if not self.loaded:
            raise KeysUnavailable
        return self._keys.candidates(algorithm, key_id)[:MOST_TRIED]

    def _ask_for_fetch(self) -> None:
        with self._asking:
            if time.monotonic() - self._asked_at >= self.COOLDOWN:
                self._asked_at = time.monotonic()
                # Not the fetch that may be under way: the issuer may have answered it before it knew the key.
                self._answered = threading.Event()
                self._asked.set()
        self._answered.wait(self.UNKNOWN_KEY_WAIT)

    def _refresh_for_ever(self) -> None:
        while True:
            self._asked.clear()
            answered = self._answered
            self._refresh()
            answered.set()
            self._asked.wait(self.REFRESH_EVERY if self.loaded else self.RETRY_EVERY)

    def _refresh(self) -> None:
        # Whatever an issuer sends instead of a key set, the keys that are there stay in use.
        try:
            # FETCH_TIMEOUT bounds each read only: an answer that trickles in could take for ever.
            with gevent.Timeout(2 * self.FETCH_TIMEOUT, TimeoutError):
                fetched = self._fetch()
            if fetched != self._fetched:
                keys = list(_verification_keys(fetched["keys"]))
                if not keys:
                    raise ValueError("it has no signing key")
                self._use(KeySet(keys))
                self._fetched = fetched
        except Exception as error:
            log.warning("key_set_not_refreshed", extra={"reason": type(error).__name__})
            self._report(None)
            return
        self.fetched_at = time.time()
        self._report(self.fetched_at)

    def _use(self, keys: KeySet) -> None:
        self._keys = keys
        self.generation += 1
        if (number := keys.most_without_id()) > MOST_TRIED:
            log.warning("key_set_too_large", extra={"keys_without_id": number, "tried": MOST_TRIED})

    def _fetch(self) -> Any:
        """The issuer's answer, parsed. Raises OSError, http.client.HTTPException and ValueError."""
        with self._opener.open(self._request, timeout=self.FETCH_TIMEOUT) as response:
            answer: bytes = response.read(self.LARGEST + 1)
        if len(answer) > self.LARGEST:
            raise ValueError("larger than 1 MB")
        return json.loads(answer)


class _HttpsRedirects(HTTPRedirectHandler):
    """Follows redirects to https only: whoever can change the keys in transit can sign tokens."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> Request | None:
        return super().redirect_request(req, fp, code, msg, headers, newurl) if newurl.startswith("https:") else None


def _verification_keys(members: Sequence[Any]) -> Iterator[VerificationKey]:
    """The keys of a set that are of use here; others, such as secrets, are to be ignored (RFC 7517 §5)."""
    for data in members:
        give_way()  # 10,000 keys take half a second
        try:
            jwk = jwt.PyJWK(data)
            algorithms = _algorithms(jwk.key)
            usable = jwk.public_key_use in (None, "sig") and "verify" in data.get("key_ops", ["verify"])
        # What stands in a key set can be anything; one odd key does not spoil the others.
        except Exception:
            continue
        if data.get("alg") is not None:
            algorithms = [name for name in algorithms if name == data["alg"]]
        if usable and algorithms and isinstance(jwk.key_id, str | None):
            yield VerificationKey(jwk.key, algorithms, jwk.key_id)


def _algorithms(key: Any) -> Sequence[str]:
    """The JWS algorithms (RFC 7518 §3.1, RFC 8037) that a public key can verify; a private key signs, and has none."""
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= 2048:
        return RSA_ALGORITHMS
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in EC_ALGORITHMS:
        return [EC_ALGORITHMS[key.curve.name]]
    return ["EdDSA"] if isinstance(key, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey) else ()


Keys = FixedKeys | JwksKeys


def load_keys(config: Config, report: Callable[[float | None], None] = lambda _: None) -> Keys:
    """The keys that a configuration names; starts the background refresh of a key set, which reports to `report`."""
    if config.jwt_jwks_url:
        return JwksKeys(config.jwt_jwks_url, report)
    if config.jwt_public_key:
        key: Any = load_pem_public_key(config.jwt_public_key.encode())
        return FixedKeys([VerificationKey(key, _algorithms(key))])
    secrets = [secret.encode() for secret in config.jwt_secret]
    return FixedKeys(
        [VerificationKey(key, [name for name, least in HMAC_KEY_BYTES.items() if least <= len(key)]) for key in secrets]
    )
