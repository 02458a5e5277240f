"""Where signing keys come from: secrets, a PEM, or a key set refreshed in the background."""

import http.client
import json
import logging
import math
import threading
import time
from collections.abc import Sequence
from typing import IO, Any
from urllib.request import HTTPRedirectHandler, Request, build_opener

import gevent
import jwt
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from app.config import Config

log = logging.getLogger(__name__)

# What a signature is checked with: a secret, a parsed public key, or one bound to its algorithm.
Key = bytes | jwt.PyJWK | jwt.algorithms.AllowedPublicKeys


class KeysUnavailable(Exception):
    """No signing key could ever be loaded."""


class FixedKeys:
    """Keys that come with the configuration and stay until the next start."""

    generation, fetched_at = 0, 0.0

    def __init__(self, keys: Sequence[Key]) -> None:
        self._keys = keys

    def candidates(self, key_id: str | None) -> Sequence[Key]:
        return self._keys


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

    def __init__(self, url: str) -> None:
        self.generation = 0  # grows when the keys change: what was verified under an older one is to be forgotten
        self.fetched_at = 0.0  # seconds since the epoch
        self._request = Request(url, headers={"Accept": "application/json"})
        self._opener = build_opener(_HttpsRedirects)
        self._key_set: dict[str, Any] = {}
        self._keys: list[tuple[str | None, Key]] = []
        self._asking = threading.Lock()
        self._asked = threading.Event()
        self._asked_at = -math.inf
        self._answered = threading.Event()  # set when the fetch that was last asked for has ended
        threading.Thread(target=self._refresh_for_ever, name="jwks", daemon=True).start()
        # The first answers should not be 503 only because the key set is a moment away.
        self._answered.wait(self.UNKNOWN_KEY_WAIT)

    def candidates(self, key_id: str | None) -> Sequence[Key]:
        """The keys to try for a `kid` (RFC 7515 §4.1.4). Raises KeysUnavailable where none could ever be loaded."""
        if not self._matching(key_id):
            self._ask_for_fetch()
        if not self._keys:
            raise KeysUnavailable
        return self._matching(key_id)

    def _matching(self, key_id: str | None) -> Sequence[Key]:
        # Neither a key nor a token needs an id (RFC 7517 §4.5, RFC 7515 §4.1.4), and two keys may have the same.
        return [key for id, key in self._keys if key_id is None or id in (None, key_id)]

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
            self._asked.wait(self.REFRESH_EVERY if self._keys else self.RETRY_EVERY)

    def _refresh(self) -> None:
        # Whatever an issuer sends instead of a key set, the keys that are there stay in use.
        try:
            # FETCH_TIMEOUT bounds each read only: an answer that trickles in could take for ever.
            with gevent.Timeout(2 * self.FETCH_TIMEOUT, TimeoutError):
                key_set = self._fetch()
            found = [key for data in key_set["keys"] if (key := _signing_key(data))]
        except Exception as error:
            log.warning("key_set_not_refreshed", extra={"reason": type(error).__name__})
            return
        self.fetched_at = time.time()
        if not found:
            log.warning("key_set_not_refreshed", extra={"reason": "it has no signing key"})
        elif key_set != self._key_set:
            self._key_set = key_set
            self._keys = found
            self.generation += 1

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


def _signing_key(data: Any) -> tuple[str | None, Key] | None:
    """A key of a set and its id, or None where it is of no use here, such as a secret (RFC 7517 §5: to be ignored)."""
    try:
        jwk = jwt.PyJWK(data)
        usable = jwk.public_key_use in (None, "sig") and "verify" in data.get("key_ops", ["verify"])
        # A secret is bytes, and a private key signs: only a public key verifies.
        if not usable or not hasattr(jwk.key, "verify") or not isinstance(jwk.key_id, str | None):
            return None
        # PyJWT would bind a key that names no algorithm to one: an RSA key to RS256.
        return jwk.key_id, jwk if "alg" in data else jwk.key
    # What stands in a key set can be anything; one odd key does not spoil the others.
    except Exception:
        return None


Keys = FixedKeys | JwksKeys


def load_keys(config: Config) -> Keys:
    """The keys that a configuration names; starts the background refresh of a key set."""
    if config.jwt_jwks_url:
        return JwksKeys(config.jwt_jwks_url)
    if config.jwt_public_key:
        key = load_pem_public_key(config.jwt_public_key.encode())
        return FixedKeys([key])  # type: ignore[list-item]  # config.py accepts RSA, EC and Ed25519 only
    return FixedKeys([secret.encode() for secret in config.jwt_secret])
