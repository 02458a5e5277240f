"""Runs Lua scripts, for one caller or for many: one round trip, bounded in time, whatever state Redis is in."""

import functools
import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import redis
from redis.exceptions import AskError, MovedError, NoScriptError, RedisError, ResponseError, TryAgainError

from app.config import Config
from app.deadline import deadline
from app.store.batching import Abandoned, GroupCommit, SharedCall
from app.store.connect import POOL_SIZE, Servers
from app.store.outages import Outages, described
from app.store.replicas import ReplicaAcks

KEYS_PER_CALL = 100  # Redis serves no other caller while a script runs
PROBE_SECONDS = 1.5

Command = tuple[str | int, ...]
# Told of every round trip: the script, the number of keys, and the seconds it took.
Observe = Callable[[str, int, float], None]


class StoreUnavailable(Exception):
    """Redis is down, slow, failing over, full or read-only: whether the session lives is not known."""


class Unreadable(StoreUnavailable):
    """A session's record, or a subject's index, is not what this service has written. It can still be revoked."""


class Call(NamedTuple):
    """One call of a script. All its keys are in one slot."""

    keys: Sequence[str]
    args: Sequence[str | int] = ()


class Script:
    """A Lua file and the hash that Redis keeps it under."""

    def __init__(
        self, name: str, *, repeatable: bool = True, per_key: Callable[[list[Any]], list[Any]] | None = None
    ) -> None:
        """A script is `repeatable` where running it again after a lost reply does no harm and gives the same reply.

        `per_key` makes one reply for each key out of the reply of a script that takes any number of them.
        """
        self.name, self.repeatable, self.per_key = name, repeatable, per_key
        self.source = (Path(__file__).parent / "lua" / f"{name}.lua").read_text()
        self.sha = hashlib.sha1(self.source.encode()).hexdigest()

    def evalsha(self, call: Call) -> Command:
        return ("EVALSHA", self.sha, len(call.keys), *call.keys, *call.args)

    def eval(self, call: Call) -> Command:
        return ("EVAL", self.source, len(call.keys), *call.keys, *call.args)


class Runner:
    """Runs scripts on the servers that hold their keys. Every public method raises StoreUnavailable.

    A reply is an Unreadable where Redis says that a key is not what it should be. Only `join`, which gives a single
    reply, raises it.
    """

    def __init__(self, servers: Servers, config: Config, observe: Observe) -> None:
        self._observe = observe
        self._servers = servers
        self._outages = Outages(servers)
        self._replicas = config.redis_wait_replicas
        # The deadline of a whole call: getting a connection, and a second round trip for scripts that Redis has lost.
        self._call_timeout = config.redis_timeout_seconds + 0.1
        self._acks: WeakKeyDictionary[redis.Redis, ReplicaAcks] = WeakKeyDictionary()
        # One for each server, so that one which hangs holds up no caller of another.
        self._batches: WeakKeyDictionary[redis.Redis, GroupCommit] = WeakKeyDictionary()
        # Of each pool one connection is kept for the heartbeats and one for the probe, which need no more: however many
        # other calls are waiting, these are not refused.
        self._free_connections: WeakKeyDictionary[redis.Redis, threading.BoundedSemaphore] = WeakKeyDictionary()
        self._connection_timeout = config.redis_timeout_seconds / 2
        self._probing: SharedCall[None] = SharedCall()

    def calls(self, script: Script, calls: Sequence[Call], *, durable: bool = False) -> list[Any]:
        """Run a script for each of several calls, which belong to one slot; `durable` where replicas must have it.

        Raises StoreUnavailable where any fails or the replicas do not acknowledge in time; it may then have taken
        effect.
        """
        if not calls:
            return []
        with _unavailable():
            client = self._client_for(script, calls[0].keys[0])
            with self._connection(client):
                acks = self._acks_of(client) if durable and self._replicas else None
                replies = _none_failed(self._run(client, script, calls, acks.commands if acks else ()))
            if acks:
                *replies, acknowledged, role = replies
                sufficient = acks.sufficient(acknowledged, role)
                error = None if sufficient else ResponseError("not acknowledged by enough replicas")
                self._outages.log_transition("replicas", client, error)
                if error:
                    raise error
            return replies

    def each_key(self, script: Script, keys: Sequence[str]) -> list[Any]:
        """Run a script over any number of keys of one subject; a reply for each."""
        return self.calls(script, _split_into_calls(keys))

    def join(self, script: Script, group: str, key: str) -> Any:
        """Run a script over a key together with whatever other callers ask of its server. Raises Unreadable.

        Keys of one `group` are in one slot. Always called with the same script: the batches of a server are bound to
        the first one.
        """
        with _unavailable():
            client = self._client_for(script, key)
            batches = self._batches.get(client)
            if batches is None:
                send = functools.partial(self._send_batch, script)
                batches = self._batches.setdefault(client, GroupCommit(send))
            return batches.submit((client, group, key))

    def probe(self, script: Script, keys: Sequence[str]) -> None:
        """Run a script, which replies 0, over one of these keys on each server until one takes it, for 1.5 s at most.

        One primary of a cluster is enough: the subjects of that one are served. Callers that probe at the same time
        share the result.
        """
        with _unavailable():
            self._probing(functools.partial(self._probe, script, keys))

    def _probe(self, script: Script, keys: Sequence[str]) -> None:
        failure: Exception | None = None
        tried = set()
        with deadline(PROBE_SECONDS):
            for key in keys:
                try:
                    client = self._servers.client_for(key)
                    if client not in tried:
                        tried.add(client)
                        if _none_failed(self._run(client, script, [Call([key])])) == [0]:
                            return
                        raise ResponseError("what answers there is no Redis")
                except (RedisError, OSError) as error:
                    failure = failure or error
            if failure:
                raise failure

    @contextmanager
    def _connection(self, client: redis.Redis) -> Iterator[None]:
        """Take one of the server's connections for calls other than heartbeats and the probe.

        Raises StoreUnavailable where none is free in time. That is no trouble of the server's, and not logged as such.
        """
        free = self._free_connections.setdefault(client, threading.BoundedSemaphore(POOL_SIZE - 2))
        if not free.acquire(timeout=self._connection_timeout):
            raise StoreUnavailable("too many calls at once")
        try:
            yield
        finally:
            free.release()

    def _client_for(self, script: Script, key: str) -> redis.Redis:
        try:
            return self._servers.client_for(key)
        except (RedisError, OSError) as error:
            self._outages.log_transition(script.name, None, error)
            raise

    def _acks_of(self, client: redis.Redis) -> ReplicaAcks:
        if client not in self._acks:
            try:
                with deadline(self._call_timeout):
                    [role] = _none_failed(_send(client, [("ROLE",)], repeatable=True))
            except (RedisError, OSError) as error:
                self._outages.log_transition("replicas", client, error)
                raise
            self._acks[client] = ReplicaAcks(self._replicas, role)
        return self._acks[client]

    def _send_batch(self, script: Script, batch: Sequence[tuple[redis.Redis, str, str]]) -> list[Any]:
        """A reply for each key in the batch; there is one call for each group in it."""
        places: dict[str, list[int]] = {}
        for place, (_, group, _) in enumerate(batch):
            places.setdefault(group, []).append(place)
        calls = [call for group in places.values() for call in _split_into_calls([batch[place][2] for place in group])]
        replies = dict(zip(itertools.chain(*places.values()), self._run(batch[0][0], script, calls)))
        return [replies[place] for place in range(len(batch))]

    def _run(
        self, client: redis.Redis, script: Script, calls: Sequence[Call], last: Sequence[Command] = ()
    ) -> list[Any]:
        """A reply or an error for each call, or each key where the script takes many; then for each command in `last`.

        Raises RedisError or OSError where there are no replies.
        """
        began = time.perf_counter()
        try:
            with deadline(self._call_timeout):
                replies = self._replies(client, script, calls, last)
        except (RedisError, OSError) as error:
            self._outages.log_transition(script.name, client, error)
            raise
        finally:
            self._observe(script.name, sum(len(call.keys) for call in calls), time.perf_counter() - began)
        failure = None
        for place, reply in enumerate(replies):
            if isinstance(reply, ResponseError) and str(reply).startswith(("WRONGTYPE ", "UNREADABLE ")):
                replies[place] = Unreadable(str(reply))  # about what a key holds, not about the server
            elif isinstance(reply, Exception):
                failure = failure or reply
        self._outages.log_transition(script.name, client, failure)
        return replies

    def _replies(
        self, client: redis.Redis, script: Script, calls: Sequence[Call], last: Sequence[Command]
    ) -> list[Any]:
        answered = _exchange(client, script, calls, last)
        replies = [one for each in zip(calls, answered) for one in self._settle(client, script, *each)]
        if last and any(isinstance(reply, AskError) for reply in answered):
            answered[len(calls)] = 0  # WAIT asked the replicas of the server that redirected us
        return replies + answered[len(calls) :]

    def _settle(self, client: redis.Redis, script: Script, call: Call, reply: Any) -> list[Any]:
        """The replies in that to one call. Where a cluster moves the slot they are fetched from where the keys are.

        It refuses a call with TRYAGAIN or ASK where one of several keys has moved already or is not there: then each
        goes alone. To redis-py MOVED is an AskError, too.
        """
        moving = isinstance(reply, AskError | TryAgainError) and not isinstance(reply, MovedError)
        if moving and script.per_key and len(call.keys) > 1:
            alone = [Call([key]) for key in call.keys]
            each_alone = zip(alone, _exchange(client, script, alone))
            return [one for each in each_alone for one in self._settle(client, script, *each)]
        if isinstance(reply, AskError):
            try:
                reply = self._servers.follow(reply, script.eval(call))
            except (RedisError, OSError) as error:  # the rest of the round trip has nothing to do with it
                reply = error
        if script.per_key is None:
            return [reply]
        return [reply] * len(call.keys) if isinstance(reply, Exception) else script.per_key(reply)


@contextmanager
def _unavailable() -> Iterator[None]:
    """What goes wrong between us and Redis is one condition to the caller: StoreUnavailable."""
    try:
        yield
    except (RedisError, OSError, Abandoned) as error:
        raise StoreUnavailable(described(error)) from error


def _split_into_calls(keys: Sequence[str]) -> list[Call]:
    return [Call(keys[first : first + KEYS_PER_CALL]) for first in range(0, len(keys), KEYS_PER_CALL)]


def _none_failed(replies: list[Any]) -> list[Any]:
    for reply in replies:
        if isinstance(reply, Exception) and not isinstance(reply, Unreadable):
            raise reply
    return replies


def _exchange(client: redis.Redis, script: Script, calls: Sequence[Call], last: Sequence[Command] = ()) -> list[Any]:
    """One round trip; two where Redis has lost the script, as it does in every restart and failover.

    EVAL brings it back wherever its keys live; SCRIPT LOAD would go to all primaries and fail with the first dead one.
    """
    replies = _send(client, [*map(script.evalsha, calls), *last], script.repeatable)
    lost = [place for place, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
    if lost:
        again = _send(client, [*(script.eval(calls[place]) for place in lost), *last], script.repeatable)
        for place, reply in zip([*lost, *range(len(calls), len(replies))], again):
            replies[place] = reply
    return replies


def _send(client: redis.Redis, commands: Sequence[Command], repeatable: bool) -> list[Any]:
    """A reply or an error for each command, in one round trip.

    Repeated where the connection breaks, since Redis closes idle ones. A time-out is not: the next try would hang, too.
    """

    def send() -> list[Any]:
        if len(commands) == 1:  # a tenth faster than a pipeline
            try:
                return [client.execute_command(*commands[0])]
            except ResponseError as error:
                return [error]
        pipeline = client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return pipeline.execute(raise_on_error=False)

    try:
        return send()
    except redis.ConnectionError:
        if repeatable:
            return send()
        raise
