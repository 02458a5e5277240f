"""The session store: Redis keys whose TTL is the session's life. Knows nothing of HTTP."""

import logging
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from cachetools import LRUCache

from app.config import Config
from app.deadline import giving_way
from app.store.connect import Servers
from app.store.errors import ConnectionsBusy as ConnectionsBusy
from app.store.errors import StoreUnavailable as StoreUnavailable
from app.store.errors import Unreadable as Unreadable
from app.store.errors import described
from app.store.runner import Observe, Runner
from app.store.scripts import GET, HEARTBEAT, INDEX, OPEN, REVOKE, REVOKE_ALL, Script
from app.store.scripts import Renewal as Renewal
from app.store.shared import SharedRoundTrips

log = logging.getLogger(__name__)

LATEST_MS = 253_402_300_799_999  # the end of the year 9999, the last that RFC 3339 can write
SIGNED_OUT_SECONDS = 30 * 86400  # that a sign-out is remembered at the least


class SessionNotFound(Exception):
    """There is no live session with this id that belongs to this subject."""


class TooManySessions(Exception):
    """The subject has as many live sessions as the configuration allows, of which none can expire for `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds


class SignedOut(Exception):
    """The token is not from after the second of its subject's sign-out, or does not say when it was issued."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """A live session. Instants are integer milliseconds since the epoch, by Redis's clock.

    `replaced_id` is told when it is opened: the id of the session that made room for it, if any did.
    """

    id: str
    started_at_ms: int
    last_activity_ms: int
    expires_at_ms: int
    login_method: str
    device_name: str | None = None
    ip_address: str | None = None
    location: str | None = None
    replaced_id: str | None = None

    @property
    def expires_in(self) -> int:
        """Whole seconds from the last activity to the expiry, as for a renewal."""
        return Renewal(self.expires_at_ms, self.last_activity_ms).expires_in


PROBED = [f"session-probe:{number}" for number in range(64)]  # keys enough that each primary of a cluster has one


class SessionStore:
    """The sessions of all subjects. Every method but one raises StoreUnavailable where Redis is in trouble."""

    def __init__(self, config: Config, servers: Servers, observe: Observe = lambda *_: None) -> None:
        self._config = config
        self._runner = Runner(servers, config, observe)
        self._shared = SharedRoundTrips(self._runner)
        self._logged: LRUCache[str, bool] = LRUCache(1000)

    def open(
        self,
        subject: str,
        *,
        login_method: str,
        issued_at: int | None = None,
        idle_timeout: int | None = None,
        device_name: str | None = None,
        ip_address: str | None = None,
        location: str | None = None,
    ) -> Session:
        """Start a session under a new id; `idle_timeout` is in seconds.

        `issued_at` says when the subject's token was issued, in seconds since the epoch; None where another one acts.
        Raises TooManySessions at the limit, and SignedOut where the token is not from after the subject's sign-out.
        """
        id = secrets.token_urlsafe(24)
        prefix = session_key(subject, "")
        args: list[str | int] = [  # in the order of open.lua's ARGV
            id,
            prefix,
            self._config.session_limit,
            (idle_timeout or self._config.session_idle_seconds) * 1000,
            self._config.session_absolute_seconds * 1000,
            "" if issued_at is None else issued_at,
            self._config.session_limit_policy,
        ]
        for name, value in (
            ("login", login_method),
            ("device", device_name),
            ("ip", ip_address),
            ("location", location),
        ):
            if value is not None:
                args += (name, value)
        try:
            reply = self._call(OPEN, subject, [prefix + id, signed_out_key(subject)], args, durable=True)
        except ConnectionsBusy:
            raise
        except StoreUnavailable:
            # It may have been opened all the same: with an id that was never told it would count against the limit.
            with suppress(StoreUnavailable):
                self._call(REVOKE, subject, [prefix + id], [id])
            raise
        if isinstance(reply, int):
            raise TooManySessions(reply / 1000)
        if reply == "SIGNED_OUT":
            raise SignedOut
        return self._session(subject, id, reply)

    def get(self, subject: str, id: str) -> Session:
        """Read a session without extending it. Raises SessionNotFound and Unreadable."""
        [reply] = self._runner.each_key(GET, [session_key(subject, id)])
        if reply is None:
            raise SessionNotFound
        return self._session(subject, id, reply)

    def list(self, subject: str) -> Sequence[Session]:
        """The subject's live sessions, the most recently active first, without those that cannot be read."""
        indexed, prefix = self._call(INDEX, subject), session_key(subject, "")
        ids = [id for id in indexed if id.isascii()]  # others are none of ours, and may be no UTF-8
        replies = self._runner.each_key(GET, [prefix + id for id in ids])
        dead = [id for id, reply in zip(ids, replies) if reply is None]
        if dead:
            # Tidies the index. What is dead stays dead, so this is in no one's way; if it fails the next list does it.
            with suppress(StoreUnavailable):
                self._call(REVOKE, subject, [prefix + id for id in dead], dead)
        live = []
        for id, reply in giving_way(zip(ids, replies)):
            if reply is not None:
                with suppress(Unreadable):
                    live.append(self._session(subject, id, reply))
        return sorted(live, key=lambda session: session.last_activity_ms, reverse=True)

    def heartbeat(self, subject: str, id: str) -> Renewal:
        """Extend a session by its idle timeout, up to its absolute end; never creates one, never shortens one.

        Raises SessionNotFound and Unreadable.
        """
        try:
            renewal: Renewal | None = self._shared.heartbeat(session_key(subject, id))
        except Unreadable as error:
            self._log_once(error, subject, id)
            raise
        if renewal is None:
            raise SessionNotFound
        return renewal

    def heartbeat_many(self, subject: str, ids: Sequence[str]) -> Sequence[Renewal | None]:
        """Extend many sessions in one round trip; None stands for each that is not there.

        Raises Unreadable where that is true of any; the others are extended all the same.
        """
        prefix = session_key(subject, "")
        renewals = self._runner.each_key(HEARTBEAT, [prefix + id for id in ids])
        for id, renewal in zip(ids, renewals):
            if isinstance(renewal, Unreadable):
                self._log_once(renewal, subject, id)
                raise renewal
        return renewals

    def revoke(self, subject: str, id: str) -> None:
        """End a session. Raises SessionNotFound."""
        if self._call(REVOKE, subject, [session_key(subject, id)], [id], durable=True) == 0:
            raise SessionNotFound

    def revoke_all(self, subject: str, *, except_id: str | None = None, refuse_earlier_tokens: bool = False) -> int:
        """End the subject's sessions, but for one where `except_id` is given; returns how many were alive.

        With `refuse_earlier_tokens` tokens that were issued before now open no session any more.
        """
        kept_ms = max(SIGNED_OUT_SECONDS, self._config.session_absolute_seconds) * 1000 if refuse_earlier_tokens else 0
        keys = [signed_out_key(subject), session_key(subject, "")]
        number: int = self._call(REVOKE_ALL, subject, keys, [except_id or "", kept_ms], durable=True)
        return number

    def takes_writes(self) -> bool:
        """Whether Redis runs scripts and takes writes to keys that begin with `session`. Raises nothing."""
        return self._shared.takes_writes(PROBED)

    def _call(
        self,
        script: Script,
        subject: str,
        keys: Sequence[str] = (),
        args: Sequence[str | int] = (),
        *,
        durable: bool = False,
    ) -> Any:
        """Run a script whose first key is the subject's index.

        Logs and raises Unreadable where that, or the instant of a sign-out, is not what this service has written.
        """
        try:
            return self._runner.call(script, [index_key(subject), *keys], args, durable=durable)
        except Unreadable as error:
            self._log_once(error, subject)
            raise

    def _session(self, subject: str, id: str, reply: Any) -> Session:
        if not isinstance(reply, Unreadable):
            try:
                return _parsed(id, *reply)
            except (KeyError, ValueError) as error:
                reply = Unreadable(described(error))
        self._log_once(reply, subject, id)
        raise reply

    def _log_once(self, error: Unreadable, subject: str, id: str | None = None) -> None:
        """Log that a session, or where `id` is None the subject's index, cannot be read, unless that was logged."""
        known = {"subject": subject} if id is None else {"subject": subject, "session": id}
        hashes = {name: self._config.pseudonym(value) for name, value in known.items()}
        key = " ".join(hashes.values())
        if key not in self._logged:
            self._logged[key] = True
            what = "index_unreadable" if id is None else "session_unreadable"
            log.error(what, extra={**hashes, "reason": str(error)})


def owner(subject: str) -> str:
    """The subject as it stands in key names: percent-encoded, so that none can forge another's key."""
    return quote(subject, safe="")


def session_key(subject: str, id: str) -> str:
    return f"session:{{{owner(subject)}}}:{id}"


def index_key(subject: str) -> str:
    return f"sessions:{{{owner(subject)}}}"


def signed_out_key(subject: str) -> str:
    return f"sessions-signed-out:{{{owner(subject)}}}"


def _parsed(id: str, flat: Sequence[str], expires_at_ms: int, replaced_id: str | None = None) -> Session:
    """Raises KeyError where a field is missing, ValueError where one is odd."""
    fields = dict(zip(flat[::2], flat[1::2]))
    "".join((id, *flat)).encode()  # fails where there are lone surrogates, which stand for what is no UTF-8
    session = Session(
        id=id,
        started_at_ms=int(fields["started"]),
        last_activity_ms=int(fields["active"]),
        expires_at_ms=expires_at_ms,
        login_method=fields["login"],
        device_name=fields.get("device"),
        ip_address=fields.get("ip"),
        location=fields.get("location"),
        replaced_id=replaced_id,
    )
    for instant in (session.started_at_ms, session.last_activity_ms, session.expires_at_ms):
        if not 0 <= instant <= LATEST_MS:
            raise ValueError(f"{instant} is no instant")
    return session
