"""The session store: Redis keys whose TTL is the session's life. Knows nothing of HTTP."""

import functools
import hashlib
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import quote

import redis
from redis.exceptions import NoScriptError, RedisError, ResponseError

from app.config import Config
from app.group_commit import Abandoned, GroupCommit


class SessionNotFound(Exception):
    """There is no live session with this id that belongs to this subject."""


class TooManySessions(Exception):
    """The subject has as many live sessions as the configuration allows."""


class StoreUnavailable(Exception):
    """Redis is down, slow, failing over, full or read-only: whether the session lives is not known."""


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


class Script:
    """A Lua file and the name that Redis keeps it under."""

    def __init__(self, name: str) -> None:
        self.source = (Path(__file__).parent / "lua" / f"{name}.lua").read_text()
        self.sha = hashlib.sha1(self.source.encode()).hexdigest()


OPEN, GET, HEARTBEAT, REVOKE = (Script(name) for name in ("open", "get", "heartbeat", "revoke"))

# A call of a script: its keys, then its arguments.
Call = tuple[Sequence[str], Sequence[str | int]]


class Scripts:
    """Runs scripts on a Redis."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client

    def run(self, script: Script, keys: Sequence[str], args: Sequence[str | int] = ()) -> Any:
        """Run a script once."""
        return self.run_each(script, [(keys, args)])[0]

    def run_each(self, script: Script, calls: Sequence[Call]) -> list[Any]:
        """Run a script for each call, in one round trip. Raises StoreUnavailable where any of them fails."""
        if not calls:
            return []
        with unavailable():
            replies = self.try_each(script, calls)
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
            return replies

    def try_each(self, script: Script, calls: Sequence[Call]) -> list[Any]:
        """Run a script for each call, in one round trip; two where Redis has lost the script. Gives replies or errors.

        It loses its scripts in every restart and failover, so that is no error. EVAL brings one back wherever its
        keys live; SCRIPT LOAD would go to all primaries of a cluster and fail with the first dead one.
        """
        replies = self._send([("EVALSHA", script.sha, len(keys), *keys, *args) for keys, args in calls])
        lost = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if lost:
            again = self._send([("EVAL", script.source, len(calls[i][0]), *calls[i][0], *calls[i][1]) for i in lost])
            for i, reply in zip(lost, again):
                replies[i] = reply
        return replies

    def _send(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """What redis-py's pipeline does, at half its cost: it is built for more kinds of commands than one."""
        pool = self._redis.connection_pool
        connection = pool.get_connection()
        try:
            return _exchange(connection, commands)
        except redis.ConnectionError:
            # The server may have closed the connection while it was idle, which shows only now.
            return _exchange(connection, commands)
        finally:
            # Where a reply did not come the connection has been closed: no other caller will find it there.
            pool.release(connection)


def _exchange(connection: Any, commands: Sequence[Sequence[Any]]) -> list[Any]:
    connection.send_packed_command(connection.pack_commands(commands))
    return [_reply(connection) for _ in commands]


def _reply(connection: Any) -> Any:
    try:
        return connection.read_response()
    except ResponseError as error:
        return error


class SessionStore:
    """The sessions of all subjects. Every method raises StoreUnavailable where Redis is in trouble."""

    def __init__(self, config: Config, client: redis.Redis) -> None:
        self._redis = client
        self._scripts = Scripts(client)
        self._heartbeats = GroupCommit(functools.partial(self._scripts.try_each, HEARTBEAT))
        self._idle_timeout = config.session_idle_seconds
        self._absolute_timeout = config.session_absolute_seconds
        self._limit = config.session_limit

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
        idle_ms = (idle_timeout or self._idle_timeout) * 1000
        described = {"login": login_method, "device": device_name, "ip": ip_address, "location": location}
        fields = [part for name, value in described.items() if value is not None for part in (name, value)]
        prefix = session_key(subject, "")
        reply = self._scripts.run(
            OPEN,
            [index_key(subject), prefix + id],
            [id, prefix, self._limit, idle_ms, self._absolute_timeout * 1000, *fields],
        )
        if reply is None:
            raise TooManySessions
        started_at_ms, expires_at_ms = reply
        return Session(
            id=id,
            started_at_ms=started_at_ms,
            last_activity_ms=started_at_ms,
            expires_at_ms=expires_at_ms,
            login_method=login_method,
            device_name=device_name,
            ip_address=ip_address,
            location=location,
        )

    def get(self, subject: str, id: str) -> Session:
        """Read a session without extending it. Raises SessionNotFound."""
        reply = self._scripts.run(GET, [session_key(subject, id)])
        if reply is None:
            raise SessionNotFound
        return _session(id, reply)

    def list(self, subject: str) -> Sequence[Session]:
        """The subject's live sessions, the most recently active first."""
        ids = self._indexed(subject)
        replies = self._scripts.run_each(GET, [([session_key(subject, id)], []) for id in ids])
        self._forget(subject, [id for id, reply in zip(ids, replies) if reply is None])
        live = [_session(id, reply) for id, reply in zip(ids, replies) if reply is not None]
        return sorted(live, key=lambda session: session.last_activity_ms, reverse=True)

    def heartbeat(self, subject: str, id: str) -> Renewal:
        """Extend a session by its idle timeout, up to its absolute end. Raises SessionNotFound; never creates."""
        try:
            reply = self._heartbeats.submit(((session_key(subject, id),), ()))
        except (RedisError, OSError, Abandoned) as error:
            raise StoreUnavailable(f"{type(error).__name__}: {error}") from error
        if reply is None:
            raise SessionNotFound
        return Renewal(*reply)

    def heartbeat_many(self, subject: str, ids: Sequence[str]) -> Sequence[Renewal | None]:
        """Extend many sessions in one round trip; None stands for each that is not there."""
        replies = self._scripts.run_each(HEARTBEAT, [((session_key(subject, id),), ()) for id in ids])
        return [Renewal(*reply) if reply is not None else None for reply in replies]

    def revoke(self, subject: str, id: str) -> None:
        """End a session. Raises SessionNotFound."""
        if not self._scripts.run(REVOKE, [session_key(subject, id), index_key(subject)], [id]):
            raise SessionNotFound

    def revoke_all(self, subject: str, *, except_id: str | None = None) -> int:
        """End the subject's sessions, but for one where `except_id` is given; returns how many were alive."""
        ids = [id for id in self._indexed(subject) if id != except_id]
        return sum(
            self._scripts.run_each(REVOKE, [([session_key(subject, id), index_key(subject)], [id]) for id in ids])
        )

    def ping(self) -> None:
        """Ask Redis whether it is there."""
        with unavailable():
            self._redis.ping()

    def _indexed(self, subject: str) -> Sequence[str]:
        with unavailable():
            pipeline = self._redis.pipeline(transaction=False)
            # Changes nothing, but is refused by a replica, which cannot know what has been opened or revoked.
            pipeline.zrem(index_key(subject), "")
            pipeline.zrange(index_key(subject), 0, -1)
            return cast(Sequence[str], pipeline.execute()[1])

    def _forget(self, subject: str, dead: Sequence[str]) -> None:
        """Tidy the index. What has died stays dead, so nothing can come between the reading and this."""
        if dead:
            with unavailable():
                self._redis.zrem(index_key(subject), *dead)


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
        raise StoreUnavailable(f"{type(error).__name__}: {error}") from error


def _session(id: str, reply: Sequence[Any]) -> Session:
    flat, expires_at_ms = reply
    fields = dict(zip(flat[::2], flat[1::2]))
    return Session(
        id=id,
        started_at_ms=int(fields["started"]),
        last_activity_ms=int(fields["active"]),
        expires_at_ms=expires_at_ms,
        login_method=fields["login"],
        device_name=fields.get("device"),
        ip_address=fields.get("ip"),
        location=fields.get("location"),
    )
