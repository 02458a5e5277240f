"""The life of a session, over HTTP."""

import re
from collections.abc import Callable

import pytest
import redis
from flask import Flask

from app.store import index_key, session_key
from tests.conftest import Caller, Clock, answer, immortal, milliseconds

NEVER_ISSUED = "A" * 32
GONE = {"success": False, "error": "Session not found"}
EXPIRED = {"success": False, "error": "Session not found or expired"}


def test_transcript(alice: Caller) -> None:
    """A session is opened, read, kept alive, listed and revoked, and then it is gone."""
    opened = alice.post("/sessions", json={"deviceName": "Kitchen tablet"})
    assert opened.status_code == 201
    session = opened.json["session"]
    id = session["id"]
    assert alice.read(id).json == {"success": True, "session": session}

    beat = alice.heartbeat(id)
    assert (beat.status_code, beat.json["success"]) == (200, True)
    [listed] = alice.get("/sessions").json["sessions"]
    changed = {"lastActivity": listed["lastActivity"], "expiresAt": beat.json["newExpiry"]}
    assert listed == {**session, **changed}
    assert listed["lastActivity"] >= session["lastActivity"]

    assert alice.revoke(id).status_code == 200
    assert (alice.heartbeat(id).status_code, alice.heartbeat(id).json) == (404, EXPIRED)
    assert (alice.read(id).status_code, alice.read(id).json) == (404, GONE)
    assert (alice.revoke(id).status_code, alice.revoke(id).json) == (404, GONE)
    assert alice.get("/sessions").json == {"success": True, "sessions": []}


def test_idle(alice: Caller, clock: Clock) -> None:
    """A session that is left alone for its idle timeout is gone."""
    id = alice.open()
    clock.sleep(clock.idle * 0.6)
    assert alice.heartbeat(id).status_code == 200
    clock.sleep(clock.idle * 0.6)
    assert alice.heartbeat(id).status_code == 200
    clock.sleep(clock.idle * 1.1)
    assert alice.heartbeat(id).json == EXPIRED
    assert alice.ids() == []


def test_expired_leaves_nothing(make_app: Callable[..., Flask], database: redis.Redis, clock: Clock) -> None:
    """After the absolute end of its last session a subject has no key left."""
    alice = Caller(make_app(session_absolute_seconds=clock.idle))
    alice.open()
    clock.sleep(clock.idle * 1.1)
    assert database.keys() == []


def test_reading_does_not_extend(alice: Caller, clock: Clock) -> None:
    """Neither reading a session nor listing it keeps it alive."""
    id = alice.open()
    before = alice.read(id).json["session"]
    clock.sleep(clock.idle * 0.6)
    assert alice.get("/sessions").json["sessions"] == [before]
    assert alice.read(id).json["session"] == before
    clock.sleep(clock.idle * 0.6)
    assert alice.read(id).status_code == 404


def test_own_idle_timeout(make_app: Callable[..., Flask], clock: Clock) -> None:
    """A caller's own idle timeout, shorter or longer than the configured one, holds from the opening on."""
    alice = Caller(make_app(session_idle_seconds=clock.idle * 2, session_absolute_seconds=clock.idle * 10))
    own = {alice.open(idleTimeoutSeconds=clock.idle * times): times for times in (1, 3)}
    own[alice.open()] = 2
    for session in alice.get("/sessions").json["sessions"]:
        remaining = milliseconds(session["expiresAt"]) - milliseconds(session["startedAt"])
        assert remaining == own[session["id"]] * clock.idle * 1000
    clock.sleep(clock.idle * 1.1)
    for id, times in own.items():
        beat = alice.heartbeat(id)
        assert beat.status_code == (404 if times == 1 else 200)
        if times > 1:
            activity = milliseconds(alice.read(id).json["session"]["lastActivity"])
            assert milliseconds(beat.json["newExpiry"]) - activity == times * clock.idle * 1000


def test_absolute_end(alice: Caller, clock: Clock) -> None:
    """Heartbeats extend a session up to its absolute end and not a millisecond further."""
    id = alice.open()
    end = milliseconds(alice.read(id).json["session"]["startedAt"]) + clock.absolute * 1000
    for _ in range(3):
        clock.sleep(clock.idle * 0.55)
        beat = alice.heartbeat(id)
        assert beat.status_code == 200
        assert milliseconds(beat.json["newExpiry"]) <= end
    assert milliseconds(beat.json["newExpiry"]) == end
    clock.sleep(clock.idle * 0.55)
    assert alice.heartbeat(id).json == EXPIRED


def test_own_idle_timeout_beyond_the_absolute_end(alice: Caller, clock: Clock) -> None:
    """An idle timeout longer than the absolute one does not reach beyond it."""
    session = alice.post("/sessions", json={"idleTimeoutSeconds": clock.idle * 100}).json["session"]
    assert milliseconds(session["expiresAt"]) == milliseconds(session["startedAt"]) + clock.absolute * 1000


def test_expiry_is_the_keys(alice: Caller, database: redis.Redis) -> None:
    """What callers are told of the expiry is what Redis holds, to the millisecond."""
    opened = alice.post("/sessions").json["session"]
    key = session_key("alice", opened["id"])
    assert milliseconds(opened["expiresAt"]) == database.pexpiretime(key)
    beat = alice.heartbeat(opened["id"])
    assert milliseconds(beat.json["newExpiry"]) == database.pexpiretime(key)
    assert alice.read(opened["id"]).json["session"]["expiresAt"] == beat.json["newExpiry"]


def test_seconds_to_the_expiry(make_app: Callable[..., Flask], clock: Clock) -> None:
    """A heartbeat says in whole seconds, rounded down, how long the session now has."""
    alice = Caller(make_app(session_absolute_seconds=clock.idle))
    id = alice.open()
    for pause in (0, clock.idle * 0.6):
        clock.sleep(pause)
        beat = alice.heartbeat(id)
        activity = alice.read(id).json["session"]["lastActivity"]
        remaining = milliseconds(beat.json["newExpiry"]) - milliseconds(activity)
        assert beat.headers["Session-Expires-In"] == str(remaining // 1000)


def test_full_idle_timeout_after_a_heartbeat(alice: Caller, clock: Clock) -> None:
    """Far from the absolute end a heartbeat gives the whole idle timeout."""
    assert alice.heartbeat(alice.open()).headers["Session-Expires-In"] == str(clock.idle)


def test_list_order(alice: Caller, clock: Clock) -> None:
    """The list is complete, the session that was active last comes first."""
    ids = []
    for _ in range(12):
        ids.append(alice.open())
        clock.sleep(0.005)
    assert alice.ids() == ids[::-1]
    assert alice.heartbeat(ids[3]).status_code == 200
    assert alice.ids() == [ids[3], *reversed(ids[4:]), *reversed(ids[:3])]


def test_list_tidies_up(make_app: Callable[..., Flask], database: redis.Redis, clock: Clock) -> None:
    """The list leaves out what has expired, and takes it out of the index."""
    alice = Caller(make_app(session_absolute_seconds=clock.idle * 10))
    dead, live = alice.open(), alice.open(idleTimeoutSeconds=clock.idle * 2)
    clock.sleep(clock.idle * 1.1)
    assert set(database.zrange(index_key("alice"), 0, -1)) == {dead, live}
    assert alice.ids() == [live]
    assert database.zrange(index_key("alice"), 0, -1) == [live]


def test_revoke_one(alice: Caller, database: redis.Redis) -> None:
    """Revoking a session leaves nothing of it, and the others alone."""
    revoked, other = alice.open(), alice.open()
    assert alice.revoke(revoked).status_code == 200
    assert alice.heartbeat(other).status_code == 200
    assert alice.ids() == [other]
    assert set(database.keys()) == {session_key("alice", other), index_key("alice")}
    assert database.zrange(index_key("alice"), 0, -1) == [other]


def test_revoke_all(alice: Caller, bob: Caller, database: redis.Redis) -> None:
    """Revoking all ends every session of the caller, leaves no key of theirs, and no other subject's session ends."""
    ids = [alice.open() for _ in range(3)]
    bobs = bob.open()
    assert alice.post("/sessions/revoke-all").status_code == 200
    assert [alice.heartbeat(id).status_code for id in ids] == [404] * 3
    assert bob.heartbeat(bobs).status_code == 200
    assert set(database.keys()) == {session_key("bob", bobs), index_key("bob")}


def test_revoke_all_of_none(alice: Caller, database: redis.Redis) -> None:
    """Revoking all where there is nothing to revoke succeeds and writes nothing."""
    assert alice.post("/sessions/revoke-all").status_code == 200
    assert database.keys() == []


def test_revoke_all_but_one(alice: Caller) -> None:
    """The session that is to be spared lives on, alone."""
    ids = [alice.open() for _ in range(3)]
    assert alice.post("/sessions/revoke-all", json={"exceptSessionId": ids[1]}).status_code == 200
    assert alice.ids() == [ids[1]]
    assert [alice.heartbeat(id).status_code for id in ids] == [404, 200, 404]


def test_revoke_all_but_an_unknown_one(alice: Caller, bob: Caller, database: redis.Redis) -> None:
    """Sparing a session that does not exist, or is another subject's, spares none of the caller's."""
    bobs = bob.open()
    for spared in (NEVER_ISSUED, bobs):
        alice.open()
        assert alice.post("/sessions/revoke-all", json={"exceptSessionId": spared}).status_code == 200
        assert alice.ids() == []
    assert set(database.keys()) == {session_key("bob", bobs), index_key("bob")}


@pytest.mark.parametrize("spared", ["", "short", "A" * 65, "A" * 31 + "}", "A" * 32 + "\n", None, 5, ["A" * 32]])
def test_revoke_all_but_a_malformed_one(alice: Caller, spared: object) -> None:
    """Sparing what cannot be an id is refused, and nothing is revoked."""
    id = alice.open()
    refused = alice.post("/sessions/revoke-all", json={"exceptSessionId": spared})
    assert refused.status_code == 422
    assert set(refused.json["details"]) == {"exceptSessionId"}
    assert alice.heartbeat(id).status_code == 200


@pytest.mark.parametrize("act, body", [(Caller.heartbeat, EXPIRED), (Caller.revoke, GONE), (Caller.read, GONE)])
def test_never_issued(alice: Caller, database: redis.Redis, act: Callable, body: dict[str, object]) -> None:
    """An id that was never issued is not found, and asking for it creates nothing."""
    response = act(alice, NEVER_ISSUED)
    assert (response.status_code, response.json) == (404, body)
    assert database.keys() == []


@pytest.mark.parametrize("act", [Caller.heartbeat, Caller.revoke, Caller.read])
def test_another_subjects(alice: Caller, bob: Caller, database: redis.Redis, act: Callable) -> None:
    """To other callers a session looks byte for byte like a missing one, and their attempts do nothing to it."""
    id = alice.open()
    before = alice.read(id).json, database.pexpiretime(session_key("alice", id)), set(database.keys())
    assert answer(act(bob, id)) == answer(act(bob, NEVER_ISSUED))
    assert (alice.read(id).json, database.pexpiretime(session_key("alice", id)), set(database.keys())) == before
    assert alice.heartbeat(id).status_code == 200


def test_limit(make_app: Callable[..., Flask], database: redis.Redis) -> None:
    """A subject at the limit opens no further session and loses none; other subjects are not affected."""
    app = make_app(session_limit=2)
    alice, bob = Caller(app), Caller(app, "bob")
    ids = {alice.open(), alice.open()}
    keys = set(database.keys())
    refused = alice.post("/sessions")
    assert (refused.status_code, refused.json) == (429, {"success": False, "error": "Too many sessions"})
    assert set(alice.ids()) == ids
    assert set(database.keys()) == keys
    bob.open()


@pytest.mark.parametrize("idle, expected", [((300, 1000), 300), ((1, 1000), 1), ((7000, 9000), 3600)])
@pytest.mark.parametrize("backend", ["fakeredis"], indirect=True)
def test_when_to_try_again(make_app: Callable[..., Flask], clock: Clock, idle: tuple[int, int], expected: int) -> None:
    """At the limit Retry-After is the time until the first session can expire, an hour at most; then there is room."""
    alice = Caller(make_app(session_limit=2, session_absolute_seconds=10_000))
    for seconds in reversed(idle):
        alice.open(idleTimeoutSeconds=seconds)
    retry_after = int(alice.post("/sessions").headers["Retry-After"])
    assert expected - 1 <= retry_after <= expected
    clock.sleep(max(retry_after, idle[0]))
    assert alice.post("/sessions").status_code == 201


def test_time_to_try_again_of_the_server(make_app: Callable[..., Flask], clock: Clock) -> None:
    """A heartbeat puts the time to try again off, on either store."""
    alice = Caller(make_app(session_limit=1, session_idle_seconds=clock.idle, session_absolute_seconds=3600))
    id = alice.open()
    clock.sleep(1.1)
    assert int(alice.post("/sessions").headers["Retry-After"]) == clock.idle - 1
    alice.heartbeat(id)
    assert int(alice.post("/sessions").headers["Retry-After"]) == clock.idle


@pytest.mark.parametrize(
    "end", [lambda alice: alice.revoke(alice.ids()[0]), lambda alice: alice.post("/sessions/revoke-all")]
)
def test_revoked_do_not_count(make_app: Callable[..., Flask], end: Callable) -> None:
    """A revoked session makes room under the limit."""
    alice = Caller(make_app(session_limit=2))
    alice.open(), alice.open()
    assert end(alice).status_code == 200
    alice.open()


def test_expired_do_not_count(make_app: Callable[..., Flask], database: redis.Redis, clock: Clock) -> None:
    """Sessions that have idled out make room under the limit, although the list was not asked for."""
    alice = Caller(make_app(session_limit=2, session_absolute_seconds=clock.idle * 10))
    alice.open(), alice.open(idleTimeoutSeconds=clock.idle * 3)
    clock.sleep(clock.idle * 1.1)
    alice.open()
    assert alice.post("/sessions").status_code == 429
    assert database.zcard(index_key("alice")) == 2


def test_index_lives_as_long_as_its_sessions(
    make_app: Callable[..., Flask], database: redis.Redis, clock: Clock
) -> None:
    """The index expires at its sessions' latest absolute end, also after a change of the configuration or a revoke."""
    ends = []
    for times in (3, 5, 1):
        alice = Caller(make_app(session_absolute_seconds=clock.absolute * times))
        started = milliseconds(alice.post("/sessions").json["session"]["startedAt"])
        ends.append(started + clock.absolute * times * 1000)
        assert database.pexpiretime(index_key("alice")) == max(ends)
    indexed = database.zrange(index_key("alice"), 0, -1, withscores=True)
    for id, end in indexed:
        assert end in ends
        assert alice.heartbeat(id).status_code == 200
    assert database.pexpiretime(index_key("alice")) == max(ends)
    alice.revoke(indexed[-1][0])
    assert database.pexpiretime(index_key("alice")) == sorted(ends)[1]


def test_nothing_stays_for_ever(make_app: Callable[..., Flask], database: redis.Redis) -> None:
    """Whatever is done, every key has a TTL."""
    app = make_app(session_limit=3)
    alice, bob = Caller(app), Caller(app, "bob")
    ids: list[str] = []
    for act in (
        lambda: ids.append(alice.open()),
        lambda: ids.append(alice.open(deviceName="d", location="l", loginMethod="m")),
        lambda: ids.append(alice.open()),
        lambda: alice.post("/sessions"),
        lambda: alice.heartbeat(ids[0]),
        lambda: alice.read(ids[0]),
        lambda: alice.ids(),
        lambda: bob.heartbeat(ids[0]),
        lambda: bob.revoke(ids[0]),
        lambda: alice.revoke(ids[0]),
        lambda: alice.heartbeat(ids[0]),
        lambda: alice.post("/sessions/revoke-all", json={"exceptSessionId": ids[1]}),
    ):
        act()
        assert immortal(database) == []
    assert alice.ids() == [ids[1]]


def test_ids(make_app: Callable[..., Flask]) -> None:
    """Ids are 32 characters of base64url, and no two are the same."""
    alice = Caller(make_app(session_limit=500))
    ids = [alice.open() for _ in range(500)]
    assert len(set(ids)) == 500
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{32}", id) for id in ids)


def test_location_header(alice: Caller) -> None:
    """The Location of a new session can be followed as it is."""
    opened = alice.post("/sessions")
    assert opened.headers["Location"] == f"/sessions/{opened.json['session']['id']}"
    assert alice.get(opened.headers["Location"]).json["session"] == opened.json["session"]


PEER, CLIENT, SPOOFED = "203.0.113.9", "198.51.100.7", "192.0.2.66"


@pytest.mark.parametrize(
    "proxies, forwarded, expected",
    [
        (0, None, PEER),
        (0, SPOOFED, PEER),
        (1, None, PEER),
        (1, CLIENT, CLIENT),
        (1, f"{SPOOFED}, {CLIENT}", CLIENT),
        (1, "2001:DB8::1", "2001:db8::1"),
        (1, f"::ffff:{CLIENT}", CLIENT),
        (1, f"{CLIENT}:51234", CLIENT),
        (1, f"{SPOOFED}:80, {CLIENT}:51234", CLIENT),
        (1, "[2001:db8::1]:443", "2001:db8::1"),
        (1, '"[2001:db8::1]:443"', "2001:db8::1"),
        (1, "[2001:db8::1]", "2001:db8::1"),
        (1, f"[::ffff:{CLIENT}]:443", CLIENT),
        (1, f"{CLIENT}:port", None),
        (1, "[<script>]:443", None),
        (0, f"{CLIENT}:51234", PEER),
        (1, "fe80::1%<script>", "fe80::1"),
        (1, f"{SPOOFED}, unknown", None),
        (1, "<script>", None),
        (2, CLIENT, PEER),
        (2, f"{CLIENT}, 192.0.2.1", CLIENT),
        (2, f"{SPOOFED}, {CLIENT}, 192.0.2.1", CLIENT),
    ],
)
def test_ip_address(make_app: Callable[..., Flask], proxies: int, forwarded: str | None, expected: str | None) -> None:
    """The address is what the outermost trusted proxy saw; what callers write into the headers is not believed."""
    alice = Caller(make_app(trusted_proxies=proxies))
    alice.headers |= {"X-Real-IP": SPOOFED, "Forwarded": f"for={SPOOFED}", "X-Forwarded-Host": SPOOFED}
    if forwarded:
        alice.headers["X-Forwarded-For"] = forwarded
    opened = alice.post("/sessions", environ_overrides={"REMOTE_ADDR": PEER})
    assert opened.json["session"].get("ipAddress") == expected
    assert opened.headers["Location"].startswith("/sessions/")


@pytest.mark.parametrize(
    "proxies, prefix, expected",
    [
        (1, "/api", "/api"),
        (1, "/a.b~c_d-e/V1", "/a.b~c_d-e/V1"),
        (2, "/api", "/api"),
        (1, "/forged, /api", "/api"),
        (0, "/api", ""),
        *(
            (1, bad, "")
            for bad in ("", "api", "/", "//evil.example", "/api/", "/a b", "/a%2fb", "/\xe9", "/api, //evil")
        ),
    ],
)
def test_location_behind_a_prefix(make_app: Callable[..., Flask], proxies: int, prefix: str, expected: str) -> None:
    """The Location has the prefix that a trusted proxy names, where it is one, and paths are matched as before."""
    alice = Caller(make_app(trusted_proxies=proxies))
    alice.headers["X-Forwarded-Prefix"] = prefix
    opened = alice.post("/sessions")
    path = f"/sessions/{opened.json['session']['id']}"
    assert opened.headers["Location"] == expected + path
    assert alice.post(f"{path}/heartbeat").status_code == 200
    assert alice.get(f"/api{path}").status_code == 404


ALWAYS = {"id", "startedAt", "lastActivity", "expiresAt", "loginMethod"}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"deviceName": "Küche 平板 🖥"},
        {"location": "Łódź"},
        {"loginMethod": "passkey"},
        {"deviceName": "d" * 128, "location": "l" * 128, "loginMethod": "m" * 64},
    ],
)
def test_unknown_fields_are_left_out(alice: Caller, given: dict[str, str]) -> None:
    """A session tells what was said of it, in every answer, and leaves out what is not known."""
    opened = alice.post("/sessions", json=given, environ_overrides={"REMOTE_ADDR": ""}).json["session"]
    assert set(opened) == ALWAYS | set(given)
    assert given.items() <= opened.items()
    assert opened["loginMethod"] == given.get("loginMethod", "token")
    assert opened["startedAt"] == opened["lastActivity"]
    assert alice.read(opened["id"]).json["session"] == opened
    assert alice.get("/sessions").json["sessions"] == [opened]
