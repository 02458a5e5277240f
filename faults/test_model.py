"""Eight clients that open, renew and end the same sessions while these expire, checked against a model."""

import math
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.config import Config
from app.store import SessionNotFound, SessionStore, TooManySessions, index_key, session_key
from app.store.connect import connect
from faults.load import Figures
from tests.conftest import SECRET
from tests.servers import RedisServer, until

ROUNDS, CLIENTS, LIMIT = 10_000, 8, 5
IDLE, ABSOLUTE = 1, 2  # seconds
SUBJECTS = ("alice", "bob")
WEIGHTS = {"heartbeat": 60, "open": 20, "revoke": 8, "revoke_all": 2, "list": 6, "audit": 4}
# In one step: how many sessions each subject has, and which keys would stay for ever.
AUDIT = """
local counts, immortal = {}, {}
for i, prefix in ipairs(ARGV) do
  counts[i] = #redis.call("KEYS", prefix .. "*")
end
for _, key in ipairs(redis.call("KEYS", "*")) do
  if redis.call("PTTL", key) == -1 then
    immortal[#immortal + 1] = key
  end
end
return { counts, immortal }
"""


class Model:
    """What all clients together know: an end that one of them was told of holds for whatever begins after it."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self.outcomes: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._opened: dict[str, dict[str, int]] = {subject: {} for subject in SUBJECTS}
        self._ended: dict[str, float] = {}

    def some_id(self, subject: str, lot: random.Random) -> str:
        """One of the latest sessions, dead ones among them."""
        with self._lock:
            return lot.choice(list(self._opened[subject])[-2 * LIMIT :] or ["A" * 32])

    def opened(self, subject: str, id: str, started_at_ms: int) -> None:
        with self._lock:
            self._opened[subject][id] = started_at_ms
            self.outcomes["opened"] += 1

    def ended(self, ids: list[str], outcome: str) -> None:
        """The sessions were over before now."""
        with self._lock:
            self.outcomes[outcome] += 1
            for id in ids:
                self._ended.setdefault(id, time.monotonic())

    def alive(self, subject: str, ids: list[str], began: float, at_ms: float, outcome: str) -> None:
        """A caller that asked after `began` was told that these live."""
        with self._lock:
            self.outcomes[outcome] += 1
            for id in ids:
                assert self._ended.get(id, math.inf) >= began, f"{id} was over and came back"
                assert at_ms <= self._opened[subject].get(id, math.inf) + ABSOLUTE * 1000, f"{id} outlived its end"

    def known(self, subject: str) -> list[str]:
        with self._lock:
            return list(self._opened[subject])

    def audit(self) -> None:
        counts, immortal = self.server.client.eval(AUDIT, 0, *(session_key(subject, "") for subject in SUBJECTS))
        assert max(counts) <= LIMIT and immortal == []
        with self._lock:
            self.outcomes["audit"] += 1


class Client:
    """One of several callers that race."""

    def __init__(self, store: SessionStore, model: Model, seed: int) -> None:
        self.store, self.model, self.lot = store, model, random.Random(seed)

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            act = self.lot.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            getattr(self, act)(self.lot.choice(SUBJECTS))
            time.sleep(self.lot.random() * 0.01)

    def open(self, subject: str) -> None:
        try:
            session = self.store.open(subject, login_method="token")
        except TooManySessions:
            self.model.ended([], "limit reached")
        else:
            self.model.opened(subject, session.id, session.started_at_ms)

    def heartbeat(self, subject: str) -> None:
        id, began = self.model.some_id(subject, self.lot), time.monotonic()
        try:
            renewal = self.store.heartbeat(subject, id)
        except SessionNotFound:
            self.model.ended([id], "heartbeat 404")
        else:
            self.model.alive(subject, [id], began, renewal.expires_at_ms, "heartbeat 200")

    def revoke(self, subject: str) -> None:
        id = self.model.some_id(subject, self.lot)
        try:
            self.store.revoke(subject, id)
        except SessionNotFound:
            self.model.ended([id], "revoke 404")
        else:
            self.model.ended([id], "revoke 200")

    def revoke_all(self, subject: str) -> None:
        before = self.model.known(subject)
        self.store.revoke_all(subject)
        self.model.ended(before, "revoke-all")

    def list(self, subject: str) -> None:
        began = time.monotonic()
        sessions = self.store.list(subject)
        assert len(sessions) <= LIMIT
        self.model.alive(subject, [session.id for session in sessions], began, 0, "list")

    def audit(self, subject: str) -> None:
        self.model.audit()


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("t")) as server:
        yield server


def _listed(store: SessionStore, subject: str) -> set[str]:
    return {session.id for session in store.list(subject)}


@pytest.mark.parametrize("stores", [CLIENTS, 1])
def test_model(server: RedisServer, stores: int, figures: Figures) -> None:
    """A session that a caller was told is over stays over, and Redis never holds too much or anything for ever.

    Each client has a store of its own, or all share one, whose heartbeats then share round trips.
    """
    config = Config(
        redis_url=server.url,
        jwt_secret=(SECRET,),
        session_idle_seconds=IDLE,
        session_absolute_seconds=ABSOLUTE,
        session_limit=LIMIT,
    )
    servers = [connect(config) for _ in range(stores)]
    shared = [SessionStore(config, each) for each in servers]
    model, began = Model(server), time.monotonic()
    clients = [Client(shared[i % stores], model, seed=i) for i in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        for done in [pool.submit(client.run, ROUNDS // CLIENTS) for client in clients]:
            done.result()
    seconds = time.monotonic() - began
    for subject in SUBJECTS:
        # One may expire between the two steps, and is tidied by the next list.
        until(lambda: _listed(shared[0], subject) == set(server.client.zrange(index_key(subject), 0, -1)))
    model.audit()
    time.sleep(ABSOLUTE + 0.1)
    assert server.client.keys() == []
    for each in servers:
        each.clients()[0].connection_pool.disconnect()
    told = ", ".join(f"{name} {number}" for name, number in sorted(model.outcomes.items()))
    figures(f"{ROUNDS} rounds, {CLIENTS} clients, {stores} stores, {seconds:.1f} s: {told}; 0 contradictions")
    assert min(model.outcomes[name] for name in ("heartbeat 200", "heartbeat 404", "revoke 200", "revoke-all")) > 0
