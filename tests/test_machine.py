"""The store against a model of it in Python, over histories that Hypothesis makes up, on a clock that it moves."""

from dataclasses import dataclass, replace

import fakeredis
import time_machine
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from app.config import Config
from app.store import SessionNotFound, SessionStore, TooManySessions, index_key, session_key
from app.store.server import OnePrimary
from tests.conftest import SECRET

IDLE, ABSOLUTE, LIMIT = 30, 100, 3  # seconds, seconds, sessions
START = 1_800_000_000_000  # milliseconds since the epoch
SUBJECTS = st.sampled_from(["alice", "bob", "b}{o*b"])


@dataclass(frozen=True)
class Known:
    """A session as the model has it; the idle timeout and instants are in milliseconds."""

    idle: int
    started: int
    active: int

    @property
    def expiry(self) -> int:
        return min(self.active + self.idle, self.started + ABSOLUTE * 1000)


class Machine(RuleBasedStateMachine):
    """A store and its model, side by side."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.clock = time_machine.travel(0, tick=False)
        self.traveller = self.clock.start()
        self.now = START
        self.move()
        self.redis = fakeredis.FakeRedis(server=fakeredis.FakeServer(server_type="redis"), decode_responses=True)
        config = Config(
            redis_url="memory://",
            jwt_secret=(SECRET,),
            session_idle_seconds=IDLE,
            session_absolute_seconds=ABSOLUTE,
            session_limit=LIMIT,
        )
        self.store = SessionStore(config, OnePrimary(self.redis))
        self.known: dict[tuple[str, str], Known] = {}

    def teardown(self) -> None:
        self.redis.close()
        self.clock.stop()

    def move(self) -> None:
        """Set the clock, to the middle of a millisecond: seconds in floating point are not exact."""
        self.traveller.move_to((self.now + 0.5) / 1000)

    def live(self, subject: str) -> dict[str, Known]:
        return {id: known for (whose, id), known in self.known.items() if whose == subject}

    @rule(target=ids, subject=SUBJECTS, idle=st.sampled_from([None, 1, 10, 500]))
    def open(self, subject: str, idle: int | None) -> str:
        """Opens unless the subject is at the limit."""
        try:
            session = self.store.open(subject, login_method="token", idle_timeout=idle)
        except TooManySessions as refusal:
            live = self.live(subject)
            assert len(live) == LIMIT
            assert refusal.seconds == (min(known.expiry for known in live.values()) - self.now) / 1000
            return "A" * 32
        assert len(self.live(subject)) < LIMIT
        known = self.known[subject, session.id] = Known((idle or IDLE) * 1000, self.now, self.now)
        assert (session.started_at_ms, session.expires_at_ms) == (self.now, known.expiry)
        return session.id

    @rule(subject=SUBJECTS, id=ids)
    def heartbeat(self, subject: str, id: str) -> None:
        """Renews what is alive and the subject's own."""
        try:
            renewal = self.store.heartbeat(subject, id)
        except SessionNotFound:
            assert (subject, id) not in self.known
        else:
            known = self.known[subject, id] = replace(self.known[subject, id], active=self.now)
            assert renewal == (known.expiry, self.now)

    @rule(subject=SUBJECTS, some=st.lists(ids, max_size=4))
    def heartbeat_many(self, subject: str, some: list[str]) -> None:
        """Does the same for many."""
        renewals = self.store.heartbeat_many(subject, some)
        for id, renewal in zip(some, renewals, strict=True):
            assert (renewal is not None) == ((subject, id) in self.known)
            if renewal is not None:
                known = self.known[subject, id] = replace(self.known[subject, id], active=self.now)
                assert renewal.expires_at_ms == known.expiry

    @rule(subject=SUBJECTS, id=ids)
    def get(self, subject: str, id: str) -> None:
        """Reads without extending."""
        try:
            session = self.store.get(subject, id)
        except SessionNotFound:
            assert (subject, id) not in self.known
        else:
            known = self.known[subject, id]
            seen = (session.started_at_ms, session.last_activity_ms, session.expires_at_ms)
            assert seen == (known.started, known.active, known.expiry)

    @rule(subject=SUBJECTS)
    def list(self, subject: str) -> None:
        """Lists what is alive, the most recently active first, and tidies the index."""
        sessions = self.store.list(subject)
        assert {session.id for session in sessions} == set(self.live(subject))
        activities = [session.last_activity_ms for session in sessions]
        assert activities == sorted(activities, reverse=True)
        assert set(self.redis.zrange(index_key(subject), 0, -1)) == set(self.live(subject))

    @rule(subject=SUBJECTS, id=ids)
    def revoke(self, subject: str, id: str) -> None:
        """Ends what is alive and the subject's own."""
        try:
            self.store.revoke(subject, id)
        except SessionNotFound:
            assert (subject, id) not in self.known
        else:
            del self.known[subject, id]

    @rule(subject=SUBJECTS, spared=st.none() | ids)
    def revoke_all(self, subject: str, spared: str | None) -> None:
        """Ends all of a subject's sessions but one, and says how many were alive."""
        ended = set(self.live(subject)) - {spared}
        assert self.store.revoke_all(subject, except_id=spared) == len(ended)
        for id in ended:
            del self.known[subject, id]

    @precondition(lambda self: self.known)
    @rule(seconds=st.sampled_from([1, 9, 10, 29, 30, 31, 70, 99, 100, 101]))
    def advance(self, seconds: int) -> None:
        """Time ends what was not renewed; the millisecond of an expiry itself is not tested."""
        self.now += seconds * 1000 + 1
        self.move()
        self.known = {key: known for key, known in self.known.items() if known.expiry > self.now}

    @invariant()
    def keys_agree(self) -> None:
        """Redis holds the live sessions, an index that names them all, and nothing that stays for ever."""
        keys = set(self.redis.keys())
        assert {key for key in keys if key.startswith("session:")} == {session_key(*key) for key in self.known}
        for subject, id in self.known:
            assert id in self.redis.zrange(index_key(subject), 0, -1)
        assert [key for key in keys if self.redis.pttl(key) < 0] == []


Machine.TestCase.settings = settings(
    deadline=None, max_examples=50, stateful_step_count=40, suppress_health_check=list(HealthCheck), database=None
)
TestMachine = Machine.TestCase
