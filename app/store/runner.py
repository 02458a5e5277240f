"""Runs Lua scripts on the servers that hold their keys: one round trip, bounded in time, whatever state Redis is in."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import gevent
import redis
from gevent.monkey import is_module_patched
from redis.exceptions import AskError, NoScriptError, RedisError, ResponseError

from app.config import Config
from app.store.connect import Servers

log = logging.getLogger(__name__)

CHUNK = 50  # commands or sessions that are worked on before a worker's other requests have their turn

# A call of a script: its keys, then its arguments.
Call = tuple[Sequence[str], Sequence[str | int]]
Command = tuple[str | int, ...]
# Told of every round trip: the script, the number of its calls, and the seconds it took.
Observe = Callable[[str, int, float], None]


class Script:
    """A Lua file and the name that Redis keeps it under."""

    def __init__(self, name: str, *, repeatable: bool = True) -> None:
        """A script is `repeatable` where running it again after a lost reply does no harm and gives the same reply."""
        self.name = name
        self.repeatable = repeatable
        self.source = (Path(__file__).parent / "lua" / f"{name}.lua").read_text()
        self.sha = hashlib.sha1(self.source.encode()).hexdigest()

    def by_name(self, call: Call) -> Command:
        return ("EVALSHA", self.sha, len(call[0]), *call[0], *call[1])

    def in_full(self, call: Call) -> Command:
        return ("EVAL", self.source, len(call[0]), *call[0], *call[1])


class Confirmation:
    """Whether a primary's replicas have a write, so that whichever of them takes over has it too.

    All attached replicas have to confirm. One that disappears may just have been promoted, while the others confirm
    what will be thrown away: so nothing is confirmed until it has been gone for SETTLED seconds; after that the
    remaining ones suffice. One that hangs, and so lacks even the write before this one, counts as gone.
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
        # For all that a call takes: a connection out of the pool, or a new one, and a second try for lost scripts.
        self._seconds = config.redis_timeout_seconds + 0.1
        self._confirmations: WeakKeyDictionary[redis.Redis, Confirmation] = WeakKeyDictionary()
        self._in_trouble: set[tuple[str, redis.Redis | None]] = set()

    def run(self, script: Script, calls: Sequence[Call], *, durably: bool = False) -> list[Any]:
        """Run a script for each call, in one round trip; `durably` where it must not be lost in a failover.

        A reply is an error where `about_a_record` says so. Raises RedisError or OSError where any fails otherwise or
        the replicas do not confirm in time; it may then have taken effect.
        """
        if not calls:
            return []
        confirmation = self._confirmation(script, calls) if durably and self._replicas else None
        replies = self.try_each(script, calls, confirmation.commands if confirmation else ())
        for reply in replies:
            if isinstance(reply, Exception) and not about_a_record(reply):
                raise reply
        if confirmation:
            confirmed = confirmation.given(*replies[len(calls) :])
            error = None if confirmed else ResponseError("not confirmed by enough replicas")
            self._notice("replicas", self._servers.client_for(calls[0][0][0]), error)
            if error:
                raise error
        return replies[: len(calls)]

    def client_for(self, script: Script, key: str) -> redis.Redis:
        """The client of the server that holds a key. Where nobody knows which that is, this is logged and raised."""
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
        """Run a script for each call, then the commands in `last`, in one round trip; a reply or an error for each.

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
        errors = (reply for reply in replies if isinstance(reply, Exception) and not about_a_record(reply))
        self._notice(script.name, client, next(errors, None))
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
            replies[len(calls)] = 0  # not confirmed: WAIT asked the replicas of the server that redirected us
        return replies

    def _follow(self, redirection: AskError, command: Command) -> Any:
        """Gives a reply or an error, and raises none: the rest of the batch has nothing to do with it."""
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
                log.error("redis_unavailable", extra={"script": what, "reason": described(error)})
        elif self._in_trouble and (over := self._in_trouble & {where, (what, None)}):
            self._in_trouble -= over
            log.warning("redis_available", extra={"script": what})


def _send(client: redis.Redis, commands: Sequence[Command], *, again: bool) -> list[Any]:
    """What redis-py's pipeline does, at half its cost: it is built for more kinds of commands than one.

    If the connection breaks they are sent once more where `again`; the server may have run them already.
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
        # Where a reply did not come the connection has been closed: the reply will not be taken for another caller's.
        pool.release(connection)


def _exchange(connection: Any, commands: Sequence[Command]) -> list[Any]:
    replies = []
    try:
        for first in range(0, len(commands), CHUNK):
            connection.send_packed_command(connection.pack_commands(commands[first : first + CHUNK]))
            time.sleep(0)  # gives way to the worker's other requests
        for number in range(1, len(commands) + 1):
            replies.append(_reply(connection))
            if number % CHUNK == 0:
                time.sleep(0)
    except BaseException:  # the replies that have not been read are not to be taken for another caller's
        connection.disconnect()
        raise
    return replies


def _reply(connection: Any) -> Any:
    try:
        return connection.read_response()
    except ResponseError as error:
        return error


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Give up after so long, whatever takes the time: name resolution, handshakes, sentinels, the queue for the pool.

    Only under gevent, as in every worker; elsewhere the sockets' own timeouts have to do.
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


def about_a_record(error: Exception) -> bool:
    """Whether an error says that a key holds something else than it should, and nothing of the server."""
    return isinstance(error, ResponseError) and str(error).startswith(("WRONGTYPE ", "UNREADABLE "))


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
