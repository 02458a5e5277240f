"""Where signing keys come from (secrets, a PEM, or a key set refreshed in the background), and what each can verify."""

import json
import logging
import ssl
import threading
import time
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPMessage
from itertools import islice
from typing import IO, Any, NamedTuple
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

import jwt

from app.config import VERSION, Config, algorithms_of
from app.deadline import deadline, giving_way

log = logging.getLogger(__name__)

Key = bytes | jwt.algorithms.AllowedPublicKeys
# The most keys of a set that are tried for one token: each costs a verification.
MOST_TRIED = 8


class KeysUnavailable(Exception):
    """No signing key could ever be loaded."""


class FixedKeys:
    """Keys that come with the configuration and stay until the next start. They have no ids, and so fit any token's."""

    generation, loaded = 0, True

    def __init__(self, keys: Sequence[Key]) -> None:
        self._keys = keys

    def candidates(self, algorithm: str, key_id: str | None) -> Sequence[Key]:
        """The keys to try for a token: all of them."""
        return self._keys


class VerificationKey(NamedTuple):
    """A key of a key set: the JWS algorithms that it is for, and its id."""

    key: Key
    algorithms: Sequence[str]
    id: str | None


class JwksKeys:
    """A JWK Set (RFC 7517 §5) behind a URL, fetched by a thread of its own so that no request does.

    The last good keys stay while the issuer is down. A token with an unknown key id asks for a fetch and waits for it
    UNKNOWN_KEY_WAIT seconds at most. In the COOLDOWN seconds after a fetch such a token is refused at once, and the
    next fetch comes at their end. Where the set has a key without an id every token is tried with that, so no id is
    unknown, and a new key is found only by the refresh every REFRESH_EVERY seconds.

    `loaded` says whether there are keys: once there are some they stay. `error` says what was wrong with the last
    fetch, if anything. `generation` grows when the keys change, so that what was verified before can be forgotten.
    """

    REFRESH_EVERY = 300.0
    COOLDOWN = 30.0
    RETRY_EVERY = 5.0  # while there are no keys at all
    UNKNOWN_KEY_WAIT = 1.0

    def __init__(self, source: "JwksSource", report: Callable[[bool], None]) -> None:
        """`report` is told of each fetch whether it has succeeded."""
        self.generation, self.loaded, self.error = 0, False, f"{source.address}: no answer yet"
        self._source, self._report = source, report
        self._keys: list[VerificationKey] = []
        self._by_id: dict[str | None, list[VerificationKey]] = {}
        self._fetch_wanted, self._just_fetched = threading.Event(), threading.Event()
        threading.Thread(target=self._refresh_for_ever, name="jwks", daemon=True).start()
        # The first answers should not be 503 only because the key set is a moment away.
        self._just_fetched.wait(self.UNKNOWN_KEY_WAIT)

    def candidates(self, algorithm: str, key_id: str | None) -> Sequence[Key]:
        """The keys to try for a token, MOST_TRIED at most. Raises KeysUnavailable where none could ever be loaded."""
        named = self._named(key_id)
        if not named:
            self._fetch_wanted.set()
            self._just_fetched.wait(self.UNKNOWN_KEY_WAIT)
            named = self._named(key_id)
        if not self.loaded:
            raise KeysUnavailable
        return list(islice((key.key for key in named if algorithm in key.algorithms), MOST_TRIED))

    def _named(self, key_id: str | None) -> Sequence[VerificationKey]:
        # Neither a key nor a token needs an id (RFC 7517 §4.5, RFC 7515 §4.1.4), and two keys may have the same.
        return self._keys if key_id is None else [*self._by_id.get(key_id, ()), *self._by_id.get(None, ())]

    def _refresh_for_ever(self) -> None:
        while True:
            self._fetch_wanted.clear()
            self._refresh()
            self._just_fetched.set()
            time.sleep(self.COOLDOWN if self.loaded else self.RETRY_EVERY)
            self._just_fetched.clear()
            if self.loaded:
                self._fetch_wanted.wait(self.REFRESH_EVERY - self.COOLDOWN)

    def _refresh(self) -> None:
        # Whatever an issuer sends instead of a key set, the keys that are there stay in use.
        try:
            keys = list(_verification_keys(self._source.fetch()))
            if not keys:
                raise ValueError("none of its keys can verify a signature")
        except Exception as error:
            reason = f"{self._source.address}: {type(error).__name__}: {error}"
            self.error = "".join(filter(str.isprintable, reason))[:300]  # an issuer's words steer no terminal
            log.warning("key_set_not_refreshed", extra={"reason": self.error})
            self._report(False)
        else:
            self._use(keys)
            self.error = ""
            self._report(True)

    def _use(self, keys: list[VerificationKey]) -> None:
        if keys == self._keys:
            return
        by_id = defaultdict(list)
        for key in keys:
            by_id[key.id].append(key)
        self._keys, self._by_id, self.loaded = keys, by_id, True
        self.generation += 1
        without_id = Counter(name for key in by_id[None] for name in key.algorithms)
        if (number := max(without_id.values(), default=0)) > MOST_TRIED:
            log.warning("key_set_too_large", extra={"keys_without_id": number, "tried": MOST_TRIED})


class JwksSource:
    """Where a JWK Set is fetched: a URL, with its user and password if it has any, and CA certificates to trust."""

    TIMEOUT = 5.0  # seconds, for each read; twice as long for all of a fetch
    LARGEST = 1_000_000  # bytes

    def __init__(self, url: str, ca_certs: str | None = None) -> None:
        """CA certificates are PEM; without any the system's are trusted."""
        credentials, _, host = urlsplit(url).netloc.rpartition("@")
        full = urlsplit(url)._replace(netloc=host)
        self.address = full._replace(query="", fragment="").geturl()  # without what may be secret
        headers = {"User-Agent": f"session-heartbeat/{VERSION}", "Accept": "application/json"}
        self._request = Request(full.geturl(), headers=headers)
        if credentials:  # RFC 7617; not for the server that this one redirects to
            basic = b64encode(unquote_to_bytes(credentials)).decode()
            self._request.add_unredirected_header("Authorization", f"Basic {basic}")
        context = ssl.create_default_context(cadata=ca_certs)
        self._opener = build_opener(_HttpsRedirects, HTTPSHandler(context=context))

    def fetch(self) -> Any:
        """The answer, parsed as JSON. Raises OSError, http.client.HTTPException, ValueError and RecursionError."""
        # Each read is bounded, but an answer that trickles in could take for ever.
        with deadline(2 * self.TIMEOUT), self._opener.open(self._request, timeout=self.TIMEOUT) as response:
            answer: bytes = response.read(self.LARGEST + 1)
        if len(answer) > self.LARGEST:
            raise ValueError("larger than 1 MB")
        return json.loads(answer)


class _HttpsRedirects(HTTPRedirectHandler):
    """Follows redirects to https only: an attacker who can change the keys in transit can sign tokens."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        return super().redirect_request(req, fp, code, msg, headers, newurl) if newurl.startswith("https:") else None


def _verification_keys(fetched: Any) -> Iterator[VerificationKey]:
    """The keys of a set that are of use here; others, such as secrets, are to be ignored (RFC 7517 §5).

    Raises ValueError where it is no key set.
    """
    document = fetched if isinstance(fetched, dict) else {}
    if "jwks_uri" in document:  # OpenID Connect Discovery 1.0 §3, RFC 8414 §2
        address = urlsplit(str(document["jwks_uri"]))
        uri = address._replace(netloc=address.netloc.rpartition("@")[2]).geturl()
        raise ValueError(f"it is a discovery document; its key set is at {uri}")
    if not isinstance(members := document.get("keys"), list):
        raise ValueError("it is no key set")
    for data in giving_way(members):  # 10,000 keys take half a second
        # What stands in a key set can be anything; one odd key does not spoil the others.
        try:
            jwk = jwt.PyJWK(data)
            algorithms = [name for name in algorithms_of(jwk.key) if data.get("alg") in (None, name)]
            usable = jwk.public_key_use in (None, "sig") and "verify" in data.get("key_ops", ["verify"])
        except Exception:
            continue
        if usable and algorithms and isinstance(jwk.key_id, str | None):
            yield VerificationKey(jwk.key, algorithms, jwk.key_id)


Keys = FixedKeys | JwksKeys


def load_keys(config: Config, report: Callable[[bool], None]) -> Keys:
    """The keys that a configuration names; starts the background refresh of a key set, which reports to `report`."""
    if url := config.jwt_jwks_url:
        if config.jwt_jwks_http and url.startswith("http:"):
            log.warning("key_set_not_encrypted")
        return JwksKeys(JwksSource(url, config.jwt_jwks_ca_certs), report)
    public: Any = config.jwt_public_key
    return FixedKeys([public] if public else [secret.encode() for secret in config.jwt_secret])
