"""The session store: Redis keys whose TTL is the session's life. Knows nothing of HTTP."""

import functools
import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote
from weakref import WeakKeyDictionary

import gevent
import redis
from gevent.monkey import is_module_patched
from redis.exceptions import AskError, NoScriptError, RedisError, ResponseError

from app.config import Config
from app.connection import Servers
from app.group_commit import Abandoned, GroupCommit

log = logging.getLogger(__name__)


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

    def __init__(self, name: str, *, repeatable: bool = True) -> None:
        """`repeatable` is what does no harm, and says the same, when it is sent again after its reply was lost."""
        self.name = name
        self.repeatable = repeatable
        self.source = (Path(__file__).parent / "lua" / f"{name}.lua").read_text()
        self.sha = hashlib.sha1(self.source.encode()).hexdigest()

    def by_name(self, call: "Call") -> "Command":
        return ("EVALSHA", self.sha, len(call[0]), *call[0], *call[1])

    def in_full(self, call: "Call") -> "Command":
        return ("EVAL", self.source, len(call[0]), *call[0], *call[1])


OPEN, GET, INDEX, HEARTBEAT = map(Script, ("open", "get", "index", "heartbeat"))
REVOKE = Script("revoke", repeatable=False)

# A call of a script: its keys, then its arguments.
Call = tuple[Sequence[str], Sequence[str | int]]
Command = tuple[str | int, ...]
# Told of every round trip: the script, the number of its calls, and the seconds it took.
Observe = Callable[[str, int, float], None]
PING_SECONDS = 1.5


class Confirmation:
    """Whether a primary's replicas have a write, so that whichever of them takes over has it too.

    All that are attached have to say so. One that has left may just have been promoted, with the others still
    confirming what will be thrown away; only after SETTLED seconds is it taken for lost, and the rest will do. One
    that hangs, and so has not got the write before this one either, counts as having left.
    """

    SETTLED = 5.0
    WAIT_MS = 100

    def __init__(self, least: int, role: Sequence[Any]) -> None:
        """`role` is the primary's reply to ROLE: its kind, its offset, and address, port and offset of its replicas."""
        self._least = least
        self._offset, self._attached = 0, 0
        self._fewer_since: float | None = None
        if role[0] == "master":
            self._offset, self._attached = role[1], len(role[2])

    @property
    def commands(self) -> Sequence[Command]:
        """What to send behind a write, on the same connection."""
        return ("WAIT", max(self._least, self._attached), self.WAIT_MS), ("ROLE",)

    def given(self, confirmed: int, role: Sequence[Any]) -> bool:
        """Whether the replies to `commands` are enough."""
        if role[0] != "master":  # since a moment ago
            return False
        before, now = self._attached, time.monotonic()
        attached = sum(int(offset) >= self._offset for _, _, offset in role[2])
        self._offset = role[1]
        if attached < self._attached and self._fewer_since is None:
            self._fewer_since = now
        elif attached >= self._attached or now - (self._fewer_since or now) >= self.SETTLED:
            self._attached, self._fewer_since = attached, None
        return confirmed >= max(self._least, min(before, self._attached))


class Scripts:
    """Runs scripts on the servers that hold their keys. All calls of one run belong to one slot."""

    def __init__(self, servers: Servers, config: Config, observe: Observe) -> None:
        self._observe = observe
        self._servers = servers
        self._replicas = config.redis_wait_replicas
        # A call to Redis with all that it takes: a connection out of the pool, or a new one, and lost scripts.
        self._seconds = config.redis_timeout_seconds + 0.1
        self._confirmations: WeakKeyDictionary[redis.Redis, Confirmation] = WeakKeyDictionary()
        self._in_trouble: set[tuple[str, redis.Redis | None]] = set()

    def run(self, script: Script, calls: Sequence[Call], *, durably: bool = False) -> list[Any]:
        """Run a script for each call, in one round trip; `durably` where it must not be lost in a failover.

        Raises StoreUnavailable where any fails or the replicas do not confirm in time; it may then have taken effect.
        """
        if not calls:
            return []
        with unavailable():
            confirmation = self._confirmation(script, calls) if durably and self._replicas else None
            replies = self.try_each(script, calls, confirmation.commands if confirmation else ())
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
            if confirmation:
                given = confirmation.given(*replies[len(calls) :])
                error = None if given else redis.ResponseError("not confirmed by enough replicas")
                self._notice("replicas", self._servers.client_for(calls[0][0][0]), error)
                if error:
                    raise error
        return replies[: len(calls)]

    def client_for(self, script: Script, key: str) -> redis.Redis:
        """The client of the server that holds a key. That nobody knows which it is, is trouble too, and raised."""
        try:
            return self._servers.client_for(key)
        except (RedisError, OSError) as error:
            self._notice(script.name, None, error)
            raise

    def _confirmation(self, script: Script, calls: Sequence[Call]) -> Confirmation:
        client = self.client_for(script, calls[0][0][0])
        if client not in self._confirmations:
            try:
                with within(self._seconds):
                    role = client.execute_command("ROLE")
            except (RedisError, OSError) as error:
                self._notice("replicas", client, error)
                raise
            self._confirmations[client] = Confirmation(self._replicas, role)
        return self._confirmations[client]

    def try_each(self, script: Script, calls: Sequence[Call], last: Sequence[Command] = ()) -> list[Any]:
        """Run a script for each call, and `last` a Confirmation's commands, in one round trip. Gives replies or errors.

        It takes two round trips where Redis has lost the script, as it does in every restart and failover. EVAL
        brings one back wherever its keys live; SCRIPT LOAD would go to all primaries and fail with the first dead one.
        """
        client, began = None, time.perf_counter()
        try:
            with within(self._seconds):
                client = self._servers.client_for(calls[0][0][0])
                replies = self._try_each(client, script, calls, last)
        except (RedisError, OSError) as error:
            self._notice(script.name, client, error)
            raise
        finally:
            self._observe(script.name, len(calls), time.perf_counter() - began)
        self._notice(script.name, client, next((reply for reply in replies if isinstance(reply, Exception)), None))
        return replies

    def _try_each(
        self, client: redis.Redis, script: Script, calls: Sequence[Call], last: Sequence[Command]
    ) -> list[Any]:
        replies = _send(client, [*(script.by_name(call) for call in calls), *last], again=script.repeatable)
        lost = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if lost:
            again = _send(client, [*(script.in_full(calls[i]) for i in lost), *last], again=script.repeatable)
            for i, reply in zip([*lost, *range(len(calls), len(replies))], again):
                replies[i] = reply
        # MOVED and ASK, while a cluster moves slots; MovedError is an AskError to redis-py.
        moved = [i for i, reply in enumerate(replies[: len(calls)]) if isinstance(reply, AskError)]
        for i in moved:
            replies[i] = self._follow(replies[i], script.in_full(calls[i]))
        if moved and last:
            replies[len(calls)] = 0  # to WAIT: the replicas that were asked are another server's
        return replies

    def _follow(self, redirection: AskError, command: Command) -> Any:
        """A reply or an error: the other calls of a batch have nothing to do with where this one went."""
        try:
            return self._servers.follow(redirection, command)
        except (RedisError, OSError) as error:
            return error

    def _notice(self, what: str, client: redis.Redis | None, error: Exception | None) -> None:
        """Log trouble once when it begins and once when it is over.

        For each script, since a full Redis refuses only some, and each server, since a cluster seldom fails as a whole;
        `client` is None where nobody knows which server it would be.
        """
        where = (what, client)
        if error is not None:
            self._servers.failed(error)
            if where not in self._in_trouble:
                self._in_trouble.add(where)
                log.error("redis_unavailable", extra={"script": what, "reason": _described(error)})
        elif self._in_trouble and (over := self._in_trouble & {where, (what, None)}):
            self._in_trouble -= over
            log.warning("redis_available", extra={"script": what})


def _send(client: redis.Redis, commands: Sequence[Command], *, again: bool) -> list[Any]:
    """What redis-py's pipeline does, at half its cost: it is built for more kinds of commands than one.

    Where the connection breaks they are sent `again`, if that may be: who breaks it has perhaps done them already.
    """
    pool = client.connection_pool
    connection = pool.get_connection()
    try:
        return _exchange(connection, commands)
    except redis.ConnectionError:
        if not again:
            raise
        return _exchange(connection, commands)
    finally:
        # Where a reply did not come the connection has been closed: no other caller will find it there.
        pool.release(connection)


def _exchange(connection: Any, commands: Sequence[Command]) -> list[Any]:
    connection.send_packed_command(connection.pack_commands(commands))
    return [_reply(connection) for _ in commands]


def _reply(connection: Any) -> Any:
    try:
        return connection.read_response()
    except ResponseError as error:
        return error


class SessionStore:
    """The sessions of all subjects. Every method raises StoreUnavailable where Redis is in trouble."""

    def __init__(self, config: Config, servers: Servers, observe: Observe = lambda *_: None) -> None:
        self._config = config
        self._servers = servers
        self._scripts = Scripts(servers, config, observe)
        # One for each server, so that one which hangs holds up nobody else.
        self._heartbeats: WeakKeyDictionary[redis.Redis, GroupCommit] = WeakKeyDictionary()

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
        described = {"login": login_method, "device": device_name, "ip": ip_address, "location": location}
        fields = [part for name, value in described.items() if value is not None for part in (name, value)]
        prefix = session_key(subject, "")
        keys = [index_key(subject), prefix + id]
        args: list[str | int] = [id, prefix, self._config.session_limit, idle_ms, absolute_ms, *fields]
        try:
            [reply] = self._scripts.run(OPEN, [(keys, args)], durably=True)
        except StoreUnavailable:
            # It may be there all the same. Nobody gets to know of it, and yet it would count against the limit.
            with suppress(StoreUnavailable):
                self._scripts.run(REVOKE, [_revocation(subject, id)])
            raise
        if reply is None:
            raise TooManySessions
        return _session(id, reply)

    def get(self, subject: str, id: str) -> Session:
        """Read a session without extending it. Raises SessionNotFound."""
        [reply] = self._scripts.run(GET, [([session_key(subject, id)], [])])
        if reply is None:
            raise SessionNotFound
        return _session(id, reply)

    def list(self, subject: str) -> Sequence[Session]:
        """The subject's live sessions, the most recently active first."""
        ids = self._indexed(subject)
        replies = self._scripts.run(GET, [([session_key(subject, id)], []) for id in ids])
        # The index is tidied: what has died stays dead, so nothing can have come in between. It need not be now.
        dead = [id for id, reply in zip(ids, replies) if reply is None]
        with suppress(StoreUnavailable):
            self._scripts.run(REVOKE, [_revocation(subject, id) for id in dead])
        live = [_session(id, reply) for id, reply in zip(ids, replies) if reply is not None]
        return sorted(live, key=lambda session: session.last_activity_ms, reverse=True)

    def heartbeat(self, subject: str, id: str) -> Renewal:
        """Extend a session by its idle timeout, up to its absolute end. Raises SessionNotFound; never creates."""
        key = session_key(subject, id)
        try:
            reply = self._batches(key).submit(((key,), ()))
        except (RedisError, OSError, Abandoned) as error:
            raise StoreUnavailable(_described(error)) from error
        if reply is None:
            raise SessionNotFound
        return Renewal(*reply)

    def heartbeat_many(self, subject: str, ids: Sequence[str]) -> Sequence[Renewal | None]:
        """Extend many sessions in one round trip; None stands for each that is not there."""
        replies = self._scripts.run(HEARTBEAT, [((session_key(subject, id),), ()) for id in ids])
        return [Renewal(*reply) if reply is not None else None for reply in replies]

    def revoke(self, subject: str, id: str) -> None:
        """End a session. Raises SessionNotFound."""
        if self._scripts.run(REVOKE, [_revocation(subject, id)], durably=True) == [0]:
            raise SessionNotFound

    def revoke_all(self, subject: str, *, except_id: str | None = None) -> int:
        """End the subject's sessions, but for one where `except_id` is given; returns how many were alive."""
        ids = [id for id in self._indexed(subject) if id != except_id]
        return sum(self._scripts.run(REVOKE, [_revocation(subject, id) for id in ids], durably=True))

    def ping(self) -> None:
        """Ask Redis whether it is there. Of a cluster one primary is enough: the subjects of the others are served."""
        with unavailable(), within(PING_SECONDS):
            *others, last = self._servers.clients()
            for client in others:
                with suppress(RedisError, OSError), within(PING_SECONDS / (len(others) + 1)):
                    client.ping()
                    return
            last.ping()

    def _indexed(self, subject: str) -> Sequence[str]:
        return self._scripts.run(INDEX, [([index_key(subject)], [])])[0]  # type: ignore[no-any-return]

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
def within(seconds: float) -> Iterator[None]:
    """Give up after so long, whatever it is that takes its time: names, handshakes, sentinels, a crowd.

    That takes gevent, which is everywhere in a worker; where it is not only the sockets' timeouts count.
    Raises redis.TimeoutError, and only here: inside, redis-py would take that for one of its own and try again.
    """
    if not is_module_patched("socket"):
        yield
        return
    timeout = gevent.Timeout(seconds)
    try:
        with timeout:
            yield
    except gevent.Timeout as late:
        if late is not timeout:
            raise
        raise redis.TimeoutError(f"no answer within {seconds:g} s") from None


@contextmanager
def unavailable() -> Iterator[None]:
    """Whatever goes wrong between us and Redis is one condition to the caller: StoreUnavailable."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise StoreUnavailable(_described(error)) from error


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _revocation(subject: str, id: str) -> Call:
    return [session_key(subject, id), index_key(subject)], [id]


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
