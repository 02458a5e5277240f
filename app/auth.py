"""Who is calling: bearer tokens (RFC 6750) verified as JWTs (RFC 7519), and the subject they name."""

import functools
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jwt
from cachetools import TLRUCache
from flask import current_app, g, request

from app.config import Config
from app.keys import Keys

# RFC 7515 §7.1: three parts of base64url without padding.
COMPACT_JWS = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
LONGEST_SUBJECT = 256
# For so long a verified token is trusted without being verified again.
REMEMBERED_SECONDS = 60
REMEMBERED_TOKENS = 16_384


class TokenMissing(Exception):
    """The request carries no bearer token."""


class TokenInvalid(Exception):
    """The token is malformed, expired, of another issuer or not signed by one of our keys; `str()` says which."""


class _Verified(NamedTuple):
    subject: str
    exp: float


def _forget_at(key: tuple[int, str], verified: _Verified, now: float) -> float:
    return min(verified.exp, now + REMEMBERED_SECONDS)


class TokenVerifier:
    """Tells the subject of a token, or why there is none."""

    def __init__(self, config: Config, keys: Keys) -> None:
        self._keys = keys
        # Verified tokens: the signature is checked once a minute at most, not with every heartbeat.
        self._verified = TLRUCache[tuple[int, str], _Verified](REMEMBERED_TOKENS, _forget_at, timer=time.time)
        self._lock = threading.Lock()
        self._claim = config.jwt_subject_claim
        # Not the module's own decoder: its options are shared by all who import it.
        self._jwt = jwt.PyJWT(
            {
                "require": ["exp", self._claim],
                "verify_sub": False,  # PyJWT refuses integers; the contract takes them
                "verify_aud": bool(config.jwt_audience),
                "enforce_minimum_key_length": True,
            }
        )
        self._checks: dict[str, Any] = {
            "algorithms": config.algorithms,
            "issuer": config.jwt_issuer,
            "audience": config.jwt_audience,
            "leeway": config.jwt_leeway_seconds,
        }

    def verify(self, token: str) -> str:
        """The subject that a token names.

        Raises TokenInvalid where it is to be refused, KeysUnavailable where there is no key to check it with.
        """
        # What older keys have verified is remembered under an older generation, and so not found any more.
        key = self._keys.generation, token
        with self._lock:
            try:
                return self._verified[key].subject
            except KeyError:
                pass
        verified = self._verify(token)
        with self._lock:
            self._verified[key] = verified
        return verified.subject

    def _verify(self, token: str) -> _Verified:
        if not COMPACT_JWS.fullmatch(token):
            raise TokenInvalid("The token is malformed")
        claims = self._claims(token)
        return _Verified(self._subject(claims), claims["exp"])

    def _claims(self, token: str) -> Any:
        try:
            candidates = self._keys.candidates(jwt.get_unverified_header(token).get("kid"))
            for key in candidates:
                try:
                    return self._jwt.decode(token, key, **self._checks)
                # Signed with another key, or for another kind of key (a TypeError where this is a bare one).
                except (jwt.InvalidAlgorithmError, jwt.InvalidKeyError, jwt.InvalidSignatureError, TypeError):
                    continue
        except jwt.ExpiredSignatureError:
            raise TokenInvalid("The token has expired") from None
        # PyJWT lets the last three escape for odd headers and payloads.
        except (jwt.PyJWTError, ValueError, OverflowError, RecursionError):
            raise TokenInvalid("The token is not valid here") from None
        raise TokenInvalid("The token is not signed with a known key")

    def _subject(self, claims: Any) -> str:
        subject, exp = claims[self._claim], claims["exp"]
        if type(exp) not in (int, float):  # PyJWT takes "1893456000" too; RFC 7519 §2 wants a number
            raise TokenInvalid("The token is not valid here")
        if type(subject) not in (str, int) or not 0 < len(str(subject)) <= LONGEST_SUBJECT:
            raise TokenInvalid("The subject is not valid")
        try:
            str(subject).encode()
        except UnicodeEncodeError:  # a lone surrogate is no character (RFC 8259 §8.2)
            raise TokenInvalid("The subject is not valid") from None
        return str(subject)


def bearer_token(environ: Mapping[str, Any]) -> str:
    """The token of a request's Authorization header, the only place it is looked for (RFC 6750 §2.1).

    Raises TokenMissing where there is none or the scheme is another one.
    """
    header: str = environ.get("HTTP_AUTHORIZATION", "")
    scheme, _, token = header.partition(" ")
    token = token.strip(" ")
    if scheme.lower() != "bearer" or not token:
        raise TokenMissing
    return token


def requires_token(view: Callable[..., Any]) -> Callable[..., Any]:
    """Let a view run only with a valid token; the subject is then in `g.subject`.

    Raises what `bearer_token` and `TokenVerifier.verify` raise.
    """

    @functools.wraps(view)
    def guarded(**kwargs: Any) -> Any:
        g.subject = current_app.extensions["token_verifier"].verify(bearer_token(request.environ))
        return view(**kwargs)

    return guarded
