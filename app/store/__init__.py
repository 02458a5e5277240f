"""The session store: Redis keys whose TTL is the session's life. Knows nothing of HTTP."""

import functools
import logging
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote
from weakref import WeakKeyDictionary

import redis
from cachetools import LRUCache
from redis.exceptions import RedisError

from app.config import Config
from app.store.batching import Abandoned, GroupCommit
from app.store.connect import Servers
from app.store.runner import CHUNK, Call, Observe, Script, Scripts, about_a_record, described, within

log = logging.getLogger(__name__)


class SessionNotFound(Exception):
    """There is no live session with this id that belongs to this subject."""


class TooManySessions(Exception):
    """The subject has as many live sessions as the configuration allows."""


class StoreUnavailable(Exception):
    """Redis is down, slow, failing over, full or read-only: whether the session lives is not known."""


class Unreadable(StoreUnavailable):
    """A session's record, or a subject's index, is not what this service has written. It can still be revoked."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """A live session. Instants are integer milliseconds since the epoch, by Redis's clock."""

    id: str
    started_at_ms: int
    last_activity_ms: int
    expires_at_ms: int
    login_method: str
    device_name: str | None = None
    ip_address: str | None = None
    location: str | None = None


class Renewal(NamedTuple):
    """A session's new expiry and the time of its renewal, in ms since the epoch, both by Redis's clock."""

    expires_at_ms: int
    renewed_at_ms: int

    @property
    def expires_in(self) -> int:
        """Whole seconds until the expiry, rounded down so that nobody comes too late."""
        return (self.expires_at_ms - self.renewed_at_ms) // 1000


OPEN, GET, INDEX, HEARTBEAT = map(Script, ("open", "get", "index", "heartbeat"))
REVOKE = Script("revoke", repeatable=False)
PING_SECONDS = 1.5
LATEST_MS = 253_402_300_799_999  # the end of the year 9999, the last that RFC 3339 can write


class SessionStore:
    """The sessions of all subjects. Every method raises StoreUnavailable where Redis is in trouble."""

    def __init__(self, config: Config, servers: Servers, observe: Observe = lambda *_: None) -> None:
        self._config = config
        self._servers = servers
        self._scripts = Scripts(servers, config, observe)
        # One for each server, so that one which hangs holds up nobody else.
        self._heartbeats: WeakKeyDictionary[redis.Redis, GroupCommit] = WeakKeyDictionary()
        self._logged: LRUCache[str, bool] = LRUCache(1000)

    def open(
        self,
        subject: str,
        *,
        login_method: str,
        idle_timeout: int | None = None,
        device_name: str | None = None,
        ip_address: str | None = None,
        location: str | None = None,
    ) -> Session:
        """Start a session under a new id; `idle_timeout` is in seconds.

        Raises TooManySessions at the limit.
        """
        id = secrets.token_urlsafe(24)
        idle_ms = (idle_timeout or self._config.session_idle_seconds) * 1000
        absolute_ms = self._config.session_absolute_seconds * 1000
        known = {"login": login_method, "device": device_name, "ip": ip_address, "location": location}
        fields = [part for name, value in known.items() if value is not None for part in (name, value)]
        prefix = session_key(subject, "")
        keys = [index_key(subject), prefix + id]
        args: list[str | int] = [id, prefix, self._config.session_limit, idle_ms, absolute_ms, *fields]
        try:
            [reply] = self._run(OPEN, [(keys, args)], durably=True)
        except StoreUnavailable:
            # It may have been opened all the same: unknown to anybody, it would count against the limit.
            with suppress(StoreUnavailable):
                self._run(REVOKE, [_revocation(subject, id)])
            raise
        if isinstance(reply, Exception):
            raise self._unreadable(subject, None, reply)
        if reply is None:
            raise TooManySessions
        return self._session(subject, id, reply)

    def get(self, subject: str, id: str) -> Session:
        """Read a session without extending it. Raises SessionNotFound and Unreadable."""
        [reply] = self._run(GET, [([session_key(subject, id)], [])])
        if reply is None:
            raise SessionNotFound
        return self._session(subject, id, reply)

    def list(self, subject: str) -> Sequence[Session]:
        """The subject's live sessions, the most recently active first, without those that cannot be read."""
        ids, prefix = self._indexed(subject), session_key(subject, "")
        replies = self._run(GET, [([prefix + id], []) for id in ids])
        # Tidies the index. What is dead stays dead, so nobody can be in the way; where it fails the next list does it.
        dead = [id for id, reply in zip(ids, replies) if reply is None]
        with suppress(StoreUnavailable):
            self._run(REVOKE, [_revocation(subject, id) for id in dead])
        live = []
        for number, (id, reply) in enumerate(zip(ids, replies)):
            if reply is not None:
                with suppress(Unreadable):
                    live.append(self._session(subject, id, reply))
            if number % CHUNK == 0:
                time.sleep(0)
        return sorted(live, key=lambda session: session.last_activity_ms, reverse=True)

    def heartbeat(self, subject: str, id: str) -> Renewal:
        """Extend a session by its idle timeout, up to its absolute end; never creates one, never shortens one.

        Raises SessionNotFound and Unreadable.
        """
        key = session_key(subject, id)
        try:
            reply = self._batches(key).submit(((key,), ()))
        except (RedisError, OSError, Abandoned) as error:
            if about_a_record(error):
                raise self._unreadable(subject, id, error) from error
            raise StoreUnavailable(described(error)) from error
        if reply is None:
            raise SessionNotFound
        return Renewal(*reply)

    def heartbeat_many(self, subject: str, ids: Sequence[str]) -> Sequence[Renewal | None]:
        """Extend many sessions in one round trip; None stands for each that is not there.

        Raises Unreadable where that is true of any; the others are extended all the same.
        """
        replies = self._run(HEARTBEAT, [((session_key(subject, id),), ()) for id in ids])
        bad = [self._unreadable(subject, id, reply) for id, reply in zip(ids, replies) if isinstance(reply, Exception)]
        if bad:
            raise bad[0]
        return [Renewal(*reply) if reply is not None else None for reply in replies]

    def revoke(self, subject: str, id: str) -> None:
        """End a session. Raises SessionNotFound."""
        if self._run(REVOKE, [_revocation(subject, id)], durably=True) == [0]:
            raise SessionNotFound

    def revoke_all(self, subject: str, *, except_id: str | None = None) -> int:
        """End the subject's sessions, but for one where `except_id` is given; returns how many were alive."""
        ids = [id for id in self._indexed(subject) if id != except_id]
        return sum(self._run(REVOKE, [_revocation(subject, id) for id in ids], durably=True))

    def ping(self) -> None:
        """Ask Redis whether it is there. Of a cluster one primary is enough: the subjects of the others are served."""
        with unavailable(), within(PING_SECONDS):
            *others, last = self._servers.clients()
            for client in others:
                with suppress(RedisError, OSError), within(PING_SECONDS / (len(others) + 1)):
                    if client.ping():
                        return
            if not last.ping():
                raise redis.ResponseError("whatever answers there is no Redis")

    def _run(self, script: Script, calls: Sequence[Call], *, durably: bool = False) -> Sequence[Any]:
        with unavailable():
            return self._scripts.run(script, calls, durably=durably)

    def _indexed(self, subject: str) -> Sequence[str]:
        [ids] = self._run(INDEX, [([index_key(subject)], [])])
        if isinstance(ids, Exception):
            raise self._unreadable(subject, None, ids)
        return [id for id in ids if id.isascii()]  # others are none of ours, and may be no UTF-8

    def _session(self, subject: str, id: str, reply: Any) -> Session:
        try:
            if isinstance(reply, Exception):
                raise reply
            return _parsed(id, *reply)
        except (RedisError, ValueError) as error:
            raise self._unreadable(subject, id, error) from error

    def _unreadable(self, subject: str, id: str | None, error: Exception) -> Unreadable:
        """The condition to raise for a session, or for the index where `id` is None; each is logged once."""
        key = index_key(subject) if id is None else session_key(subject, id)
        if key not in self._logged:
            self._logged[key] = True
            known = {"subject": subject, "session": id}
            hashes = {name: self._config.pseudonym(value) for name, value in known.items() if value is not None}
            what = "index_unreadable" if id is None else "session_unreadable"
            log.error(what, extra={**hashes, "reason": str(error)})
        return Unreadable(described(error))

    def _batches(self, key: str) -> GroupCommit:
        client = self._scripts.client_for(HEARTBEAT, key)
        batches = self._heartbeats.get(client)
        if batches is None:
            send = functools.partial(self._scripts.try_each, HEARTBEAT)
            batches = self._heartbeats.setdefault(client, GroupCommit(send))
        return batches


def owner(subject: str) -> str:
    """The subject as it stands in key names: percent-encoded, so that none can forge another's key."""
    return quote(subject, safe="")


def session_key(subject: str, id: str) -> str:
    return f"session:{{{owner(subject)}}}:{id}"


def index_key(subject: str) -> str:
    return f"sessions:{{{owner(subject)}}}"


@contextmanager
def unavailable() -> Iterator[None]:
    """Whatever goes wrong between us and Redis is one condition to the caller: StoreUnavailable."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise StoreUnavailable(described(error)) from error


def _revocation(subject: str, id: str) -> Call:
    return [session_key(subject, id), index_key(subject)], [id]


def _parsed(id: str, flat: Sequence[str], expires_at_ms: int) -> Session:
    """Raises ValueError where a field is missing or odd."""
    fields = dict(zip(flat[::2], flat[1::2]))
    "".join((id, *flat)).encode()  # fails where there are lone surrogates, which stand for what is no UTF-8
    if "login" not in fields:
        raise ValueError("no login method")
    return Session(
        id=id,
        started_at_ms=_instant("started", fields.get("started")),
        last_activity_ms=_instant("active", fields.get("active")),
        expires_at_ms=_instant("expiry", str(expires_at_ms)),
        login_method=fields["login"],
        device_name=fields.get("device"),
        ip_address=fields.get("ip"),
        location=fields.get("location"),
    )


def _instant(name: str, text: str | None) -> int:
    if text is None or not re.fullmatch("[0-9]{1,15}", text) or int(text) > LATEST_MS:
        raise ValueError(f"{name} is no instant")
    return int(text)
