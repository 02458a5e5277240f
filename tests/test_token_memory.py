"""Tokens that were verified a moment ago are not verified again, and yet none is taken for longer than it is good."""

import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import time_machine
from flask import Flask

from app import auth
from app.auth import TokenInvalid, TokenVerifier
from app.config import Config
from tests.conftest import SECRET, Caller, Clock, token

OTHER_SECRET = "another-secret-of-more-than-thirty-two-bytes"
MakeApp = Callable[..., Flask]


class KeyRing:
    """Keys that change under the verifier's hands. A token that is remembered asks for none."""

    def __init__(self, *secrets: str) -> None:
        self.generation = 0
        self.secrets = secrets
        self.asked: Callable[[], None] = lambda: None
        self.verifications = 0

    def change(self, *secrets: str) -> None:
        self.secrets = secrets
        self.generation += 1

    def candidates(self, algorithm: str, key_id: str | None) -> Sequence[bytes]:
        self.verifications += 1
        given = [secret.encode() for secret in self.secrets]
        self.asked()
        return given


@pytest.fixture
def backend() -> str:
    """No token is Redis's business: the one in the process will do."""
    return "fakeredis"


@pytest.fixture
def keys() -> KeyRing:
    return KeyRing(SECRET)


@pytest.fixture
def verifier(config: Config, keys: KeyRing) -> TokenVerifier:
    return TokenVerifier(config, keys)


@pytest.fixture
def app(app: Flask, verifier: TokenVerifier) -> Flask:
    """The app with keys that count."""
    app.extensions["token_verifier"] = verifier
    return app


def refused(verifier: TokenVerifier, token: str) -> bool:
    try:
        return not verifier.verify(token)
    except TokenInvalid:
        return True


@pytest.fixture
def still() -> Iterator[time_machine.Traveller]:
    """A clock that only moves when it is told to, at a whole second."""
    with time_machine.travel(1_900_000_000, tick=False) as traveller:
        yield traveller


@pytest.mark.parametrize("leeway", [0, 30])
@pytest.mark.parametrize("lifetime", [10, 59, 60, 61, 100])
def test_expiry(make_app: MakeApp, still: time_machine.Traveller, leeway: int, lifetime: int) -> None:
    """A remembered token is taken until its exp, plus the leeway, and refused from that very moment on."""
    alice = Caller(make_app(jwt_leeway_seconds=leeway), exp=int(time.time()) + lifetime)
    assert alice.get("/sessions").status_code == 200
    still.shift(lifetime + leeway - 0.001)
    assert alice.get("/sessions").status_code == 200
    assert alice.get("/sessions").status_code == 200
    still.shift(0.001)
    assert alice.get("/sessions").status_code == 401
    still.shift(1)
    assert alice.get("/sessions").status_code == 401


def test_fraction_of_a_second(make_app: MakeApp, still: time_machine.Traveller) -> None:
    """An exp with a fraction is good for its whole seconds, remembered or not."""
    app = make_app(jwt_leeway_seconds=0)
    new, known = Caller(app, exp=int(time.time()) + 60.5, jti="1"), Caller(app, exp=int(time.time()) + 60.5, jti="2")
    still.shift(0.4)
    assert known.get("/sessions").status_code == 200
    still.shift(59.7)
    assert [each.get("/sessions").status_code for each in (new, known)] == [401, 401]


def test_verified_once_a_minute(app: Flask, keys: KeyRing, still: time_machine.Traveller) -> None:
    """The signature of a token in use is checked once a minute."""
    alice = Caller(app)
    counts = []
    for _ in range(25):
        assert alice.get("/sessions").status_code == 200
        counts.append(keys.verifications)
        still.shift(5)
    assert counts == [1] * 12 + [2] * 12 + [3]


def test_each_its_own(verifier: TokenVerifier, keys: KeyRing) -> None:
    """Tokens of several subjects, and several of one subject, are remembered apart."""
    tokens = {token(subject, jti=jti): subject for subject in ("alice", "bob") for jti in ("1", "2")}
    for _ in range(3):
        assert {each: verifier.verify(each).subject for each in tokens} == tokens
    assert keys.verifications == 4


@pytest.mark.parametrize("forged", ["header", "claims", "signature"])
def test_near_miss(verifier: TokenVerifier, forged: str) -> None:
    """A token that differs from a remembered one in any part is refused."""
    alices, bobs = token("alice"), token("bob", OTHER_SECRET, jti="1")
    assert verifier.verify(alices).subject == "alice"
    parts = dict(zip(("header", "claims", "signature"), alices.split(".")))
    parts[forged] = {"header": "e30"}.get(forged) or bobs.split(".")[1 if forged == "claims" else 2]
    assert refused(verifier, ".".join(parts.values()))
    assert verifier.verify(alices).subject == "alice"


def test_keys_change(verifier: TokenVerifier, keys: KeyRing) -> None:
    """When the keys change, everything that was remembered is verified anew."""
    staying, leaving = token("alice"), token("bob", OTHER_SECRET)
    keys.change(SECRET, OTHER_SECRET)
    for _ in range(2):
        assert (verifier.verify(staying).subject, verifier.verify(leaving).subject) == ("alice", "bob")
    keys.change(SECRET)
    keys.verifications = 0
    assert refused(verifier, leaving)
    for _ in range(2):
        assert verifier.verify(staying).subject == "alice"
    assert keys.verifications == 2


def test_keys_change_while_verifying(verifier: TokenVerifier, keys: KeyRing) -> None:
    """What was verified with keys that changed meanwhile is not remembered."""
    mine = token()
    keys.asked = lambda: keys.change(OTHER_SECRET)
    assert verifier.verify(mine).subject == "alice"
    assert refused(verifier, mine)


def test_keys_change_while_others_verify(verifier: TokenVerifier, keys: KeyRing) -> None:
    """What was verified with the keys before is not remembered when others know of the change already."""
    mine, others = token(), token("bob", OTHER_SECRET)

    def change() -> None:
        keys.asked = lambda: None
        keys.change(OTHER_SECRET)
        assert verifier.verify(others).subject == "bob"

    keys.asked = change
    assert verifier.verify(mine).subject == "alice"
    assert refused(verifier, mine)
    assert verifier.verify(others).subject == "bob"


@pytest.mark.parametrize(
    "bad", [{"secret": OTHER_SECRET}, {"exp": 1}, {"exp": None}, {"nbf": 4_000_000_000}, {"subject": ""}]
)
def test_rejected(verifier: TokenVerifier, keys: KeyRing, bad: dict[str, object]) -> None:
    """A token that is refused is never remembered, but checked each time."""
    refusable = token(**bad)
    assert [refused(verifier, refusable) for _ in range(3)] == [True] * 3
    assert keys.verifications == 3


def test_not_yet(make_app: MakeApp, clock: Clock) -> None:
    """A token that came too early is taken when its time has come."""
    alice = Caller(make_app(jwt_leeway_seconds=0), nbf=int(time.time()) + 20)
    assert alice.get("/sessions").status_code == 401
    clock.sleep(21)
    assert alice.get("/sessions").status_code == 200


def test_key_comes_later(verifier: TokenVerifier, keys: KeyRing) -> None:
    """A token whose key was not known is taken as soon as it is."""
    early = token("bob", OTHER_SECRET)
    assert refused(verifier, early)
    keys.change(SECRET, OTHER_SECRET)
    assert verifier.verify(early).subject == "bob"


def remembered_bytes(verifier: TokenVerifier, tokens: Iterator[str]) -> int:
    """The memory that is taken after so many tokens have been verified."""
    verifier.verify(token())  # whatever the libraries keep for good is not the tokens'
    tracemalloc.start(10)
    try:
        for each in tokens:
            verifier.verify(each)
        # What was made under this function: threads that other tests have left behind make something meanwhile.
        here = tracemalloc.Filter(True, __file__, all_frames=True)
        return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([here]).traces)
    finally:
        tracemalloc.stop()


LONG = [{"padding": "x" * 12_000}]
SHORT = [{}, {"subject": "\U0001f600" * 250}]  # of four bytes each


@pytest.mark.parametrize("kinds, number", [(LONG, 85), (SHORT, 1000)])
def test_bounded(
    monkeypatch: pytest.MonkeyPatch, config: Config, keys: KeyRing, kinds: list[dict[str, str]], number: int
) -> None:
    """Remembered tokens take what they may at the most, and more than half of it, whether they are long or short."""
    monkeypatch.setattr(auth, "REMEMBERED_BYTES", 500_000)
    tokens = (token(**kinds[n % len(kinds)], jti=str(n)) for n in range(number))
    taken = remembered_bytes(TokenVerifier(config, keys), tokens)
    assert 250_000 < taken <= 500_000 + 20_000  # and the one that is verified


def test_in_use_longest(monkeypatch: pytest.MonkeyPatch, config: Config, keys: KeyRing) -> None:
    """Where there is no more room the token that was not used for the longest time makes some."""
    monkeypatch.setattr(auth, "REMEMBERED_BYTES", 8_000)
    verifier, in_use = TokenVerifier(config, keys), token("in use")
    for number in range(50):
        assert verifier.verify(in_use).subject == "in use"
        assert verifier.verify(token(number)).subject == str(number)
    assert keys.verifications == 1 + 50
    assert verifier.verify(token(0)).subject == "0"
    assert keys.verifications == 1 + 51


def test_forgotten_after_a_minute(verifier: TokenVerifier, still: time_machine.Traveller) -> None:
    """What has not been used for a minute takes no room; the tokens had 400 KB."""

    def tokens() -> Iterator[str]:
        yield from (token(number, padding="x" * 6_000) for number in range(50))
        still.shift(60)
        yield token()

    assert remembered_bytes(verifier, tokens()) < 150_000


def test_many_at_once(monkeypatch: pytest.MonkeyPatch, config: Config, keys: KeyRing) -> None:
    """Callers at the same time, with more tokens than are remembered and keys that change, get their own subjects."""
    monkeypatch.setattr(auth, "REMEMBERED_BYTES", 8_000)
    verifier = TokenVerifier(config, keys)
    tokens = {token(number): str(number) for number in range(12)}

    def verify_all(number: int) -> bool:
        keys.change(SECRET)
        return all(verifier.verify(each).subject == subject for each, subject in tokens.items())

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(verify_all, range(200), timeout=20)) == [True] * 200


def test_revoked(app: Flask, keys: KeyRing) -> None:
    """A revoked session is gone at once, though the token is remembered."""
    alice = Caller(app)
    id = alice.open()
    assert alice.heartbeat(id).status_code == 200
    assert alice.post(f"/sessions/{id}/revoke").status_code == 200
    assert alice.heartbeat(id).status_code == 404
    assert keys.verifications == 1
