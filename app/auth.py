"""Who is calling: bearer tokens (RFC 6750) verified as JWTs (RFC 7519), and the subject they name."""

import functools
import re
import threading
import time
from base64 import urlsafe_b64decode
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import jwt
from cachetools import TTLCache, cached
from flask import current_app, g, request
from werkzeug.exceptions import BadRequest

from app.config import Config
from app.keys import Key, Keys

LONGEST_TOKEN = 16_384  # bytes
LONGEST_SUBJECT = 256
# A lone surrogate is no character (RFC 8259 §8.2).
SUBJECT = re.compile(rf"[^\ud800-\udfff]{{1,{LONGEST_SUBJECT}}}")
# Where issuers put scopes: RFC 8693 §4.2, and what some of them do.
SCOPE_CLAIMS = ("scope", "scp", "permissions", "roles")
# Seconds a verified token is trusted without checking its signature again.
REMEMBERED_SECONDS = 60
REMEMBERED_BYTES = 16_000_000
# The most that an entry takes besides the characters of token and subject: 610 bytes were measured, and up to 1,000
# where entries change often.
ENTRY_BYTES = 1_100
# What PyJWT finds wrong, in the words of the log and the metrics; everything else is malformed.
REASONS: dict[type[Exception], str] = {
    jwt.ExpiredSignatureError: "expired",
    jwt.ImmatureSignatureError: "not_yet_valid",
    jwt.InvalidSignatureError: "signature",
    jwt.InvalidAlgorithmError: "signature",
    jwt.InvalidKeyError: "signature",
    jwt.InvalidIssuerError: "issuer",
    jwt.InvalidAudienceError: "audience",
    jwt.MissingRequiredClaimError: "claim",
    jwt.InvalidIssuedAtError: "claim",
    jwt.exceptions.InvalidJTIError: "claim",
    jwt.exceptions.InvalidSubjectError: "subject",
}


class TokenMissing(Exception):
    """The request carries no bearer token."""


class TokenInvalid(Exception):
    """The token is refused.

    `reason` is the log's and the metrics' word for why, `key_id` what can be printed of its header's `kid`: 64
    characters at the most, chosen by the caller.
    """

    def __init__(self, reason: str, key_id: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.key_id = "".join(filter(str.isprintable, key_id))[:64]


class InsufficientScope(Exception):
    """The token may not act for other subjects than its own."""


class Caller(NamedTuple):
    """What a token says of its bearer; in a call for another `subject`, the token's own is the `actor`.

    `expires_at`, with the leeway, and `issued_at` are in whole seconds since the epoch. The latter is 0 where the token
    does not say, so that every sign-out refuses it, and None where an `actor` acts.
    """

    token: str
    expires_at: int
    subject: str
    issued_at: int | None
    may_act: bool
    actor: str | None = None


class TokenVerifier:
    """Verifies bearer JWTs and returns what they say of the caller."""

    def __init__(self, config: Config, keys: Keys) -> None:
        self._keys, self._config = keys, config
        self._algorithms = config.algorithms
        self._decode = functools.partial(
            jwt.decode,
            algorithms=self._algorithms,
            issuer=config.jwt_issuer,
            audience=config.jwt_audience,
            leeway=config.jwt_leeway_seconds,
            options={
                "require": ["exp", config.jwt_subject_claim],
                "verify_sub": False,  # PyJWT refuses integers, which some issuers send
                "verify_aud": bool(config.jwt_audience),
                "enforce_minimum_key_length": True,
            },
        )
        remembered = TTLCache[tuple[int, str], Caller](
            REMEMBERED_BYTES,
            REMEMBERED_SECONDS,
            timer=time.time,
            getsizeof=lambda caller: ENTRY_BYTES + len(caller.token) + 4 * len(caller.subject),  # 4 bytes a character
        )
        # When the keys change so does their generation, and no older entry is found any more.
        remember = cached(remembered, key=lambda token: (keys.generation, token), lock=threading.Lock())
        self._remembered: Callable[[str], Caller] = remember(self._verify)

    def verify(self, token: str) -> Caller:
        """The caller who sends a token.

        Raises TokenInvalid where it is to be refused, KeysUnavailable where there is no key to check it with.
        """
        caller = self._remembered(token)
        # One that has expired since is verified anew, for the error to raise.
        return caller if time.time() < caller.expires_at else self._verify(token)

    def _verify(self, token: str) -> Caller:
        if len(token) > LONGEST_TOKEN or "=" in token:  # PyJWT takes padding; RFC 7515 §2 has none
            raise TokenInvalid("malformed")
        key_id: str | None = None
        try:
            # The header alone, to choose the key; the token is parsed once, with that key.
            header = jwt.get_unverified_header(token.partition(".")[0] + "..")
            algorithm, key_id = header.get("alg"), header.get("kid")
            if algorithm not in self._algorithms:
                raise jwt.InvalidAlgorithmError
            claims = self._decode(token, _signing_key(token, algorithm, self._keys.candidates(algorithm, key_id)))
            if type(claims["exp"]) not in (int, float):  # PyJWT takes "1893456000" too; RFC 7519 §2 wants a number
                raise jwt.MissingRequiredClaimError("exp")
            subject = claims[self._config.jwt_subject_claim]
            if type(subject) not in (str, int) or not SUBJECT.fullmatch(str(subject)):
                raise jwt.exceptions.InvalidSubjectError
        # PyJWT lets the others escape for odd headers and payloads.
        except (jwt.PyJWTError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise TokenInvalid(REASONS.get(type(error), "malformed"), key_id or "") from None
        expires_at = int(claims["exp"]) + self._config.jwt_leeway_seconds  # PyJWT leaves fractions of a second out
        return Caller(token, expires_at, str(subject), max(0, int(claims.get("iat", 0))), self._may_act(claims))

    def _may_act(self, claims: dict[str, Any]) -> bool:
        given = [claims.get(name) for name in SCOPE_CLAIMS]
        lists = [scopes.split(" ") if isinstance(scopes, str) else scopes for scopes in given]
        wanted = self._config.jwt_admin_scope
        return wanted is not None and any(isinstance(scopes, list) and wanted in scopes for scopes in lists)


def _signing_key(token: str, algorithm: str, candidates: Sequence[Key]) -> Key:
    """The key that can have signed a token. Raises jwt.InvalidSignatureError where it is none of them."""
    if len(candidates) == 1:
        return candidates[0]
    # One of several is found here: PyJWT would parse the token anew for each.
    signed, _, signature = token.rpartition(".")
    raw = urlsafe_b64decode(signature + "==")
    check = jwt.get_algorithm_by_name(algorithm)
    for key in candidates:
        if check.verify(signed.encode(), check.prepare_key(key), raw):
            return key
    raise jwt.InvalidSignatureError


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
    """Let a view run only with a valid token; `g.caller` then says who calls, and for which subject.

    Raises what `bearer_token` and `TokenVerifier.verify` raise, InsufficientScope where the query names a subject, be
    it the caller's own, and the token may not act for others, and BadRequest where it names several or an impossible
    one.
    """

    @functools.wraps(view)
    def guarded(**kwargs: Any) -> Any:
        environ = request.environ
        g.caller = current_app.extensions["token_verifier"].verify(bearer_token(environ))
        if environ.get("QUERY_STRING"):
            _act_for_subject(request.query_string)
        return view(**kwargs)

    return guarded


def _act_for_subject(query: bytes) -> None:
    # Werkzeug would make "%FF" of what is no UTF-8.
    fields = parse_qs(query.decode(errors="surrogateescape"), keep_blank_values=True, errors="surrogateescape")
    if not (named := fields.get("subject")):
        return
    valid = len(named) == 1 and SUBJECT.fullmatch(named[0])
    caller: Caller = g.caller
    # Before it is checked: the log's line about a refusal names the actor and the subject.
    g.caller = caller._replace(subject=named[0] if valid else "", issued_at=None, actor=caller.subject)
    if not caller.may_act:
        raise InsufficientScope
    if not valid:
        raise BadRequest
