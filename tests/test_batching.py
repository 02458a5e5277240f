"""Callers that share round trips, under threads and under greenlets; then on a real Redis that gets hurt."""

import contextlib
import gc
import itertools
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.monkey import is_module_patched

from app.config import Config
from app.store import Renewal, SessionNotFound, SessionStore, StoreUnavailable, Unreadable, session_key
from app.store.batching import Abandoned, GroupCommit
from app.store.connect import POOL_SIZE, connect
from app.store.server import OnePrimary
from tests.servers import PERSISTENT, ROOT, RedisServer, running, until

# The suite itself is not patched, so greenlets have a process of their own, which runs the scenarios that it is told.
# One that hangs ends in a traceback or, where gevent cannot help any more, with the process.
GREENLETS = """
from gevent import Timeout, monkey
monkey.patch_all()
import json, signal, sys, traceback
from tests import test_batching
for line in sys.stdin:
    signal.alarm(60)
    failure = None
    try:
        with Timeout(40):
            getattr(test_batching, line.strip()).scenario()
    except BaseException:
        failure = traceback.format_exc()
    signal.alarm(0)
    print(json.dumps(failure), flush=True)
"""


@pytest.fixture(scope="module")
def greenlets() -> Iterator[Callable[[str], str | None]]:
    """Runs a scenario under greenlets; gives the traceback where it failed."""
    command = [sys.executable, "-W", "error", "-c", GREENLETS]
    with (
        running(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
        process.stdin as names,
        process.stdout as failures,
    ):

        def run(name: str) -> str | None:
            print(name, file=names, flush=True)
            return json.loads(failures.readline() or '"the process has ended"')

        yield run


def under(*kinds: str) -> Callable[[Callable[[], None]], Callable[..., None]]:
    """Makes a scenario a test that runs it under each kind of threads."""

    def decorate(scenario: Callable[[], None]) -> Callable[..., None]:
        @pytest.mark.parametrize("kind", kinds)
        def test(kind: str, request: pytest.FixtureRequest) -> None:
            if kind == "threads":
                scenario()
            else:
                failure = request.getfixturevalue("greenlets")(scenario.__name__)
                assert failure is None, failure

        test.__doc__ = scenario.__doc__
        test.scenario = scenario
        return test

    return decorate


both = under("threads", "greenlets")
on_redis = pytest.mark.usefixtures("redis_server")  # skips or fails where there is none


class Caller(threading.Thread):
    """A caller that makes one call in a thread of its own, which is a greenlet where gevent has patched threads."""

    def __init__(self, call: Callable[[Any], Any], argument: Any = None) -> None:
        super().__init__(daemon=True)
        self._call, self._argument = call, argument
        self.start()

    def run(self) -> None:
        if is_module_patched("threading"):  # elsewhere it would have the end of each thread search the whole heap
            self._greenlet = gevent.getcurrent()
        try:
            self._outcome = self._call(self._argument)
        except BaseException as error:
            self._outcome = error

    def kill(self) -> None:
        gevent.kill(self._greenlet)

    def outcome(self) -> Any:
        """What the call gave or raised."""
        self.join(60)
        assert not self.is_alive()
        return self._outcome


def outcomes(callers: Sequence[Caller]) -> list[Any]:
    return [caller.outcome() for caller in callers]


class Wire:
    """A server that answers a command with its negative, and each batch only when it is let through."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.in_flight = self.most_in_flight = 0
        self.failures: list[BaseException] = []  # what the next batches that are let through end in
        self._through = threading.Semaphore(0)
        self._commit = GroupCommit(self._send)

    def call(self, *commands: int) -> list[Caller]:
        """Submit commands, each by a caller of its own; all of them are sent or, but for the first, waiting."""
        before = self._seen()
        callers = [Caller(self._commit.submit, command) for command in commands]
        until(lambda: self.batches and self._seen() == before + len(commands))
        return callers

    def let_through(self, batches: int = 1) -> None:
        self._through.release(batches)

    def sent(self, batches: int) -> list[int]:
        """The latest batch, once so many of them have been sent."""
        until(lambda: len(self.batches) == batches)
        return self.batches[-1]

    def _seen(self) -> int:
        return sum(map(len, self.batches)) + len(self._commit._collecting.commands)

    def _send(self, commands: Sequence[int]) -> list[int | Exception]:
        self.batches.append([*commands])
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            assert self._through.acquire(timeout=5)
        finally:
            self.in_flight -= 1
        if self.failures:
            raise self.failures.pop(0)
        return [-command if command < 100 else ValueError(command) for command in commands]


@pytest.mark.timed
@both
def test_alone() -> None:
    """A command that comes alone goes out at once, by its caller's own hand, as a batch of one."""
    sent: list[tuple[list[int], int]] = []

    def send(commands: Sequence[int]) -> list[int]:
        sent.append(([*commands], threading.get_ident()))
        return [-command for command in commands]

    commit = GroupCommit(send)
    began = time.monotonic()
    assert [commit.submit(n) for n in range(1000)] == [-n for n in range(1000)]
    assert time.monotonic() - began < 1
    assert sent == [([n], threading.get_ident()) for n in range(1000)]


@both
def test_shared() -> None:
    """Callers that come while a batch is in flight share the next one."""
    wire = Wire()
    callers = wire.call(0) + wire.call(*range(1, 64))
    assert wire.batches == [[0]]
    wire.let_through(2)
    assert outcomes(callers) == [-n for n in range(64)]
    assert [sorted(batch) for batch in wire.batches] == [[0], [*range(1, 64)]]
    assert wire.most_in_flight == 1


@both
def test_order() -> None:
    """A batch holds its commands in the order in which they came."""
    wire = Wire()
    callers = [caller for command in range(20) for caller in wire.call(command)]
    wire.let_through(2)
    assert outcomes(callers) == [-n for n in range(20)]
    assert wire.batches == [[0], [*range(1, 20)]]


@both
def test_own_reply() -> None:
    """Of many callers with many commands each gets its own replies, and every command is sent once."""
    sent: Counter[tuple[int, int]] = Counter()
    in_flight = threading.Lock()

    def send(commands: Sequence[tuple[int, int]]) -> list[tuple[str, tuple[int, int]]]:
        assert in_flight.acquire(blocking=False)
        sent.update(commands)
        time.sleep(0)
        in_flight.release()
        return [("reply to", command) for command in commands]

    commit = GroupCommit(send)

    def submit_many(caller: int) -> bool:
        return all(commit.submit((caller, n)) == ("reply to", (caller, n)) for n in range(100))

    assert outcomes([Caller(submit_many, number) for number in range(64)]) == [True] * 64
    assert sent == Counter(itertools.product(range(64), range(100)))


@both
def test_bad_command() -> None:
    """A bad command fails its own caller and no other in the batch."""
    wire = Wire()
    callers = [caller for command in (0, 1, 100, 2) for caller in wire.call(command)]
    wire.let_through(2)
    first, second, bad, third = outcomes(callers)
    assert (first, second, third) == (0, -1, -2)
    assert isinstance(bad, ValueError) and bad.args == (100,)


@both
def test_failed_batch() -> None:
    """A batch that cannot be sent fails all of its callers and none of the next batch."""
    wire = Wire()
    wire.failures = [OSError("before"), OSError("this one")]
    before, these = wire.call(0), wire.call(1, 2, 3)
    wire.let_through()
    wire.sent(2)
    later = wire.call(4, 5)
    wire.let_through(2)
    assert [str(error) for error in outcomes(before + these)] == ["before"] + ["this one"] * 3
    assert outcomes(later) == [-4, -5]


@both
def test_stopped_sender() -> None:
    """What stops the leader stops no other caller: the batch is abandoned and the next one goes on."""
    wire = Wire()
    wire.failures = [ValueError(), SystemExit()]
    wire.call(0)
    leader, follower = wire.call(1) + wire.call(2)
    wire.let_through()
    wire.sent(2)
    later = wire.call(3, 4)
    wire.let_through(2)
    assert [type(error) for error in outcomes([leader, follower])] == [SystemExit, Abandoned]
    assert outcomes(later) == [-3, -4]


@under("greenlets")
def test_leader_killed_while_sending() -> None:
    """A leader that is killed while sending leaves its batch abandoned at once, and the next one goes on."""
    wire = Wire()
    wire.call(0)
    leader, *followers = [caller for command in (1, 2, 3) for caller in wire.call(command)]
    wire.let_through()
    assert wire.sent(2) == [1, 2, 3]
    later = wire.call(4, 5)
    leader.kill()
    assert [type(outcome) for outcome in outcomes([leader, *followers])] == [gevent.GreenletExit, Abandoned, Abandoned]
    assert sorted(wire.sent(3)) == [4, 5]
    wire.let_through()
    assert outcomes(later) == [-4, -5]
    assert wire.most_in_flight == 1


@under("greenlets")
def test_leader_killed_while_waiting() -> None:
    """A leader that is killed while waiting leaves its batch abandoned at once and never sent."""
    wire = Wire()
    first = wire.call(0)
    leader, *followers = [caller for command in (1, 2, 3) for caller in wire.call(command)]
    leader.kill()
    assert [type(outcome) for outcome in outcomes([leader, *followers])] == [gevent.GreenletExit, Abandoned, Abandoned]
    later = wire.call(4, 5)
    wire.let_through(3)
    assert outcomes(first + later) == [0, -4, -5]
    assert sorted(sum(wire.batches, [])) == [0, 4, 5]


@under("greenlets")
def test_one_at_a_time_after_a_kill() -> None:
    """Batches go one at a time also after a leader was killed while waiting."""
    wire = Wire()
    first = wire.call(0)
    for command in (1, 2):
        wire.call(command)[0].kill()
        gevent.sleep(0)
    later = wire.call(3) + wire.call(4)
    wire.let_through(2)
    assert outcomes(first + later) == [0, -3, -4]
    assert (wire.batches, wire.most_in_flight) == ([[0], [3, 4]], 1)


@under("greenlets")
def test_follower_killed() -> None:
    """A follower that is killed while waiting harms no other caller, and its command still goes out once."""
    wire = Wire()
    first = wire.call(0)
    leader, killed, follower = [caller for command in (1, 2, 3) for caller in wire.call(command)]
    killed.kill()
    assert isinstance(killed.outcome(), gevent.GreenletExit)
    wire.let_through(2)
    assert outcomes([*first, leader, follower]) == [0, -1, -3]
    assert wire.batches == [[0], [1, 2, 3]]


@under("greenlets")
def test_anything_may_happen() -> None:
    """Whichever callers are killed and whatever fails, no command is sent twice and each caller gets its own answer."""
    luck = random.Random(7)
    sent: Counter[int] = Counter()

    def send(commands: Sequence[int]) -> list[int]:
        sent.update(commands)
        gevent.sleep(luck.random() / 1000)
        if luck.random() < 0.2:
            raise OSError
        return [-command for command in commands]

    commit = GroupCommit(send)
    callers: list[Caller] = []
    for number in range(2000):
        callers.append(Caller(commit.submit, number))
        if luck.random() < 0.2:
            luck.choice(callers[-10:]).kill()
        if luck.random() < 0.2:
            gevent.sleep(luck.random() / 1000)
    seen: Counter[type] = Counter()
    for number, outcome in enumerate(outcomes(callers)):
        seen[type(outcome)] += 1
        assert outcome == -number or isinstance(outcome, (OSError, Abandoned, gevent.GreenletExit))
        assert sent[number] == 1 or sent[number] == 0 and isinstance(outcome, (Abandoned, gevent.GreenletExit))
    assert set(seen) == {int, OSError, Abandoned, gevent.GreenletExit}


@both
def test_no_thread() -> None:
    """It starts no thread of its own."""
    before = set(threading.enumerate())
    wire = Wire()
    callers = wire.call(0) + wire.call(1, 2, 3)
    assert set(threading.enumerate()) == before | set(callers)
    wire.let_through(2)
    outcomes(callers)
    assert set(threading.enumerate()) == before


@both
def test_no_leak() -> None:
    """Twenty thousand heartbeats, failing ones among them, leave nothing behind."""
    batches = itertools.count(1)

    def send(commands: Sequence[int]) -> Sequence[int]:
        time.sleep(0)
        if next(batches) % 100 == 0:
            raise OSError
        return commands

    commit = GroupCommit(send)

    def submit_many(times: int) -> None:
        for n in range(times):
            with contextlib.suppress(OSError):
                commit.submit(n)

    def left_after(times: int) -> tuple[int, int]:
        assert outcomes([Caller(submit_many, times) for _ in range(20)]) == [None] * 20
        gc.collect()
        return len(gc.get_objects()), sys.getallocatedblocks()

    left_after(100)
    objects, blocks = left_after(100)
    more_objects, more_blocks = left_after(1_000)
    assert more_objects - objects < 1_000
    assert more_blocks - blocks < 1_000


@contextlib.contextmanager
def own_store(**settings: Any) -> Iterator[tuple[RedisServer, SessionStore]]:
    """A Redis of one's own, which keeps its data when killed, and a store on it."""
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder), *PERSISTENT) as server:
        config = Config(redis_url=server.url, **settings)
        client = connect(config).clients()[0]
        yield server, SessionStore(config, OnePrimary(client))
        client.connection_pool.disconnect()


def opened(store: SessionStore, idle_timeout: int = 1800) -> str:
    return store.open("alice", login_method="token", idle_timeout=idle_timeout).id


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call gives, or that the store is not available, and the seconds it took."""
    began = time.monotonic()
    try:
        return call(), time.monotonic() - began
    except StoreUnavailable as error:
        return error, time.monotonic() - began


@pytest.mark.timed
@on_redis
@both
def test_redis_killed() -> None:
    """When Redis is killed under many callers each has an answer within 2 s, and a good one once Redis is back."""
    with own_store() as (server, store):
        id = opened(store)
        good = itertools.count()

        def beat_until_it_fails(_: None) -> list[float]:
            durations = []
            while True:
                outcome, seconds = timed(lambda: store.heartbeat("alice", id))
                durations.append(seconds)
                if isinstance(outcome, StoreUnavailable):
                    return durations
                assert outcome.expires_in == 1800
                next(good)

        callers = [Caller(beat_until_it_fails) for _ in range(32)]
        until(lambda: next(good) > 500)
        server.stop()
        assert all(max(durations) < 2 for durations in outcomes(callers))
        server.start()
        for renewal in outcomes([Caller(lambda _: store.heartbeat("alice", id)) for _ in range(32)]):
            assert renewal.expires_in == 1800


@on_redis
@both
def test_scripts_lost() -> None:
    """That Redis loses its scripts again and again under many callers is noticed by none of them."""
    with own_store() as (server, store):
        ids = [opened(store, 1000 + n) for n in range(16)]

        def beat(n: int) -> set[int]:
            return {store.heartbeat("alice", ids[n]).expires_in for _ in range(100)}

        callers = [Caller(beat, n) for n in range(16)]
        flushed = 0
        while any(caller.is_alive() for caller in callers):
            flushed += server.client.script_flush()
            time.sleep(0)
        assert outcomes(callers) == [{1000 + n} for n in range(16)]
        assert flushed > 10


@pytest.mark.timed
@on_redis
@both
def test_several_subjects() -> None:
    """Callers of several subjects share a round trip, one script call a subject, and each gets its own answer."""
    with own_store() as (server, store):
        subjects = [f"subject-{n}" for n in range(4)]
        ids = {
            (subject, seconds): store.open(subject, login_method="token", idle_timeout=seconds).id
            for subject in subjects
            for seconds in (1001, 1002, 1003)
        }
        server.client.hset(session_key(subjects[1], ids[subjects[1], 1002]), "idle", "never")
        store.revoke(subjects[2], ids[subjects[2], 1003])

        def beat(whose: tuple[str, int]) -> int:
            return store.heartbeat(whose[0], ids[whose]).expires_in

        beat((subjects[0], 1001))
        server.client.config_resetstat()
        server.process.send_signal(signal.SIGSTOP)
        first = Caller(beat, (subjects[0], 1001))
        time.sleep(0.1)
        order = random.Random(3).sample(list(ids), len(ids))
        callers = [Caller(beat, whose) for whose in order]
        time.sleep(0.1)
        server.process.send_signal(signal.SIGCONT)
        answers = dict(zip(order, outcomes(callers)))
        assert first.outcome() == 1001
        assert isinstance(answers.pop((subjects[1], 1002)), Unreadable)
        assert isinstance(answers.pop((subjects[2], 1003)), SessionNotFound)
        assert answers == {whose: whose[1] for whose in answers} and len(answers) == 10
        assert server.client.info("commandstats")["cmdstat_evalsha"]["calls"] == 1 + len(subjects)


@on_redis
@both
def test_redis_stalled() -> None:
    """While Redis hangs each of many callers has an answer within 2 s, and heartbeats go on when it does."""
    with own_store() as (server, store):
        id = opened(store)

        def beat(_: None) -> list[tuple[Any, float]]:
            return [timed(lambda: store.heartbeat("alice", id)) for _ in range(2)]

        server.process.send_signal(signal.SIGSTOP)
        for outcome, seconds in itertools.chain(*outcomes([Caller(beat) for _ in range(64)])):
            assert isinstance(outcome, StoreUnavailable)
            assert seconds < 2
        server.process.send_signal(signal.SIGCONT)
        renewal, seconds = timed(lambda: store.heartbeat("alice", id))
        assert isinstance(renewal, Renewal)
        assert seconds < 1


@pytest.mark.timed
@on_redis
@both
def test_redis_stalled_and_the_pool_in_use() -> None:
    """At the longest timeout allowed a heartbeat has its answer within 2 s, though others wait for Redis too."""
    with own_store(redis_timeout_seconds=0.5) as (server, store):
        id = opened(store)
        server.process.send_signal(signal.SIGSTOP)
        others, beats = [], []
        for _ in range(100):
            beats.append(Caller(lambda _: timed(lambda: store.heartbeat("alice", id))))
            if len(beats) % 2:
                others.append(Caller(lambda _: timed(lambda: store.get("alice", id))))
            time.sleep(0.02)
        outcomes(others)
        for outcome, seconds in outcomes(beats):
            assert isinstance(outcome, StoreUnavailable)
            assert seconds < 2


@on_redis
@under("greenlets")
def test_leader_killed_before_redis_answers() -> None:
    """A reply to a leader that was killed reaches no other caller, and no connection is lost with the leader."""
    with own_store() as (server, store):
        another, own = opened(store, 1000), opened(store, 2000)
        for _ in range(3 * POOL_SIZE):
            server.process.send_signal(signal.SIGSTOP)
            leader = Caller(lambda _: store.heartbeat("alice", another))
            gevent.sleep(0)
            leader.kill()
            assert isinstance(leader.outcome(), gevent.GreenletExit)
            server.process.send_signal(signal.SIGCONT)
            assert store.heartbeat("alice", own).expires_in == 2000


@on_redis
@under("greenlets")
def test_abandoned() -> None:
    """To callers whose leader was killed the store is not available."""
    with own_store() as (server, store):
        id = opened(store)
        server.process.send_signal(signal.SIGSTOP)
        first = Caller(lambda _: store.heartbeat("alice", id))
        gevent.sleep(0.01)  # it is sent
        leader, follower = (Caller(lambda _: store.heartbeat("alice", id)) for _ in range(2))
        leader.kill()
        assert isinstance(follower.outcome(), StoreUnavailable)
        server.process.send_signal(signal.SIGCONT)
        assert isinstance(first.outcome(), Renewal)
