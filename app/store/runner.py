"""Runs Lua scripts, for one caller or for many: one round trip, bounded in time, whatever state Redis is in."""

import functools
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import redis
from redis.exceptions import AskError, NoScriptError, RedisError, ResponseError, TryAgainError

from app.config import Config
from app.deadline import deadline
from app.store.connect import POOL_SIZE, Servers
from app.store.errors import ConnectionsBusy, StoreUnavailable, Unreadable
from app.store.outages import Outages
from app.store.replicas import ReplicaAcks
from app.store.scripts import Command, Script

KEYS_PER_CALL = 100  # Redis serves no other caller while a script runs

# Told of every exchange: the script, the number of keys, and the seconds it took. It is one round trip, or a few where
# a script is lost, a slot has moved or replicas have to acknowledge.
Observe = Callable[[str, int, float], None]


class _Server:
    """What is known of one server."""

    def __init__(self, replicas: int) -> None:
        # Heartbeats and probes need one connection of the pool each. However many other calls are waiting, they are not
        # refused.
        self.free_connections = threading.BoundedSemaphore(POOL_SIZE - 2)
        self.acks = ReplicaAcks(replicas)


class Runner:
    """Runs scripts on the servers that hold their keys. Every public method raises StoreUnavailable.

    The keys of one call are in one slot. An Unreadable is raised, or is the reply where there are several, where Redis
    says that a key is not what it should be.
    """

    def __init__(self, servers: Servers, config: Config, observe: Observe) -> None:
        self._observe = observe
        self._servers = servers
        self._outages = Outages(servers)
        self._replicas = config.redis_wait_replicas
        # The deadline of a whole call: getting a connection, and a second round trip for scripts that Redis has lost.
        self._call_timeout = config.redis_timeout_seconds + 0.1
        self._connection_timeout = config.redis_timeout_seconds / 2
        self._known: WeakKeyDictionary[redis.Redis, _Server] = WeakKeyDictionary()  # a failover makes new clients

    def client_for(self, script: Script, key: str) -> redis.Redis:
        """The client of the server that holds a key; it is wanted for a script."""
        try:
            return self._servers.client_for(key)
        except (RedisError, OSError) as error:
            raise self._outages.failed(script.name, None, error) from error

    def _server(self, client: redis.Redis) -> _Server:
        return self._known.get(client) or self._known.setdefault(client, _Server(self._replicas))

    def run_batch(self, script: Script, batch: Sequence[tuple[redis.Redis, str]]) -> list[Any]:
        """A reply or an error for each key of one server. Those of a subject, whose slot is one, share a call."""
        by_slot: defaultdict[str, list[str]] = defaultdict(list)
        for _, key in batch:
            by_slot[key.partition("}")[0]].append(key)
        client, groups = batch[0][0], list(by_slot.values())
        with self._bounded(script, client):
            replies = self._run_over(client, script, groups)
        by_key = dict(zip(itertools.chain(*groups), self._judged(script, client, replies)))
        return [by_key[key] for _, key in batch]

    def _run_over(self, client: redis.Redis, script: Script, groups: Sequence[Sequence[str]]) -> list[Any]:
        """A reply or an error of Redis for each key; those of a group are in one slot."""
        step = KEYS_PER_CALL
        calls = [keys[first : first + step] for keys in groups for first in range(0, len(keys), step)]
        with self._timed(script, sum(map(len, groups))):
            return self._exchange(client, script, calls)

    @contextmanager
    def _bounded(self, script: Script, client: redis.Redis) -> Iterator[None]:
        """Bounded in time. Raises StoreUnavailable where there is no reply."""
        try:
            with deadline(self._call_timeout):
                yield
        except (RedisError, OSError) as error:
            raise self._outages.failed(script.name, client, error) from error

    @contextmanager
    def _timed(self, script: Script, number: int) -> Iterator[None]:
        """An exchange about so many keys, which is counted."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._observe(script.name, number, time.perf_counter() - began)

    def _judged(self, script: Script, client: redis.Redis, replies: list[Any]) -> list[Any]:
        """The same list, with an Unreadable or a StoreUnavailable in the place of each error of Redis."""
        failed = False
        for place, reply in enumerate(replies):
            if isinstance(reply, Exception):
                if str(reply).startswith(("WRONGTYPE ", "UNREADABLE ")):
                    replies[place] = Unreadable(str(reply))  # about what a key holds, not about the server
                else:
                    replies[place] = self._outages.failed(script.name, client, reply)
                    failed = True
        if not failed:
            self._outages.succeeded(script.name, client)
        return replies

    def _exchange(self, client: redis.Redis, script: Script, calls: Sequence[Sequence[str]]) -> list[Any]:
        """A reply or an error for each key. One round trip; two where Redis has lost the script, as after restarts.

        EVAL brings it back wherever its keys live; SCRIPT LOAD would go to all primaries and fail with the first dead
        one. Where a cluster moves the slot, a call with several keys is refused, and each of them goes alone.
        """
        answered = _send(client, [script.evalsha(keys) for keys in calls], script.repeatable)
        if any(isinstance(reply, NoScriptError) for reply in answered):
            answered = _send(client, [script.eval(keys) for keys in calls], script.repeatable)
        replies: list[Any] = []
        for keys, reply in zip(calls, answered):
            if isinstance(reply, AskError | TryAgainError) and len(keys) > 1:
                replies += self._exchange(client, script, [[key] for key in keys])
                continue
            if isinstance(reply, AskError):
                reply = self._follow(reply, script.eval(keys))
            replies += script.per_key(reply) if isinstance(reply, list) else [reply] * len(keys)
        return replies

    def _follow(self, redirection: AskError, command: Command) -> Any:
        """The reply or the error of the server that a cluster names. To redis-py MOVED is an AskError, too."""
        try:
            return self._servers.follow(redirection, command)
        except (RedisError, OSError) as error:  # the rest of the round trip has nothing to do with it
            return error

    def each_key(self, script: Script, keys: Sequence[str]) -> list[Any]:
        """Run a script that takes any number of keys, and replies for each, over keys of one subject.

        In the place of a key that is not what it should be stands an Unreadable.
        """
        if not keys:
            return []
        client = self.client_for(script, keys[0])
        with self._bounded(script, client), self._connection(self._server(client)):
            replies = self._run_over(client, script, [keys])
        for reply in self._judged(script, client, replies):
            if isinstance(reply, StoreUnavailable) and not isinstance(reply, Unreadable):
                raise reply
        return replies

    def call(
        self, script: Script, keys: Sequence[str], args: Sequence[str | int] = (), *, durable: bool = False
    ) -> Any:
        """Run a script once; `durable` where replicas must have what it writes. Raises Unreadable.

        Where it raises StoreUnavailable, as when replicas do not acknowledge in time, it may have taken effect; not
        where that is a ConnectionsBusy.
        """
        client = self.client_for(script, keys[0])
        server = self._server(client)
        # Not EVALSHA: only where one script runs over many keys, or again and again, is the shorter command worth a
        # second try where Redis has lost the script.
        command = script.eval(keys, args)
        send = functools.partial(_send, client, repeatable=script.repeatable)
        acknowledged = None
        with self._bounded(script, client), self._connection(server), self._timed(script, len(keys)):
            if durable and self._replicas:  # a cluster's redirection is an error: WAIT is about this server's replicas
                reply, acknowledged = server.acks.write(send, command)
            else:
                [reply] = send([command])
                if isinstance(reply, AskError):
                    reply = self._follow(reply, command)
        [reply] = self._judged(script, client, [reply])
        if isinstance(reply, StoreUnavailable):
            raise reply
        if acknowledged is False:
            raise self._outages.failed("replicas", client, ResponseError("not acknowledged by enough replicas"))
        if acknowledged:
            self._outages.succeeded("replicas", client)
        return reply

    @contextmanager
    def _connection(self, server: _Server) -> Iterator[None]:
        """Take one of the server's connections for calls other than single heartbeats and probes.

        Raises ConnectionsBusy where none is free in time. That is no trouble of the server's, and not logged as such.
        """
        if not server.free_connections.acquire(timeout=self._connection_timeout):
            raise ConnectionsBusy("too many calls at once")
        try:
            yield
        finally:
            server.free_connections.release()


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
