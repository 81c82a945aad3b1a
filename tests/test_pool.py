"""The pool by itself: which session a request gets, which ones end, and that none is lost.

The sessions are stand-ins without a process, so hundreds of them can come and go in a second.
"""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import pytest
from harness import WAIT_S, wait_until
from hypothesis import given, settings, strategies as st

import cc2api

CALLER = cc2api.Caller("caller", b"")
KEY = cc2api.PoolKey(CALLER, ())
PIDS = itertools.count(1)


class StubProcess:
    """Lives until it is told to end."""

    def __init__(self) -> None:
        self.pid = next(PIDS)
        self.started_at = time.monotonic()
        self.told: list[str] = []
        self.stopped = False

    def is_alive(self) -> bool:
        return not self.told

    def is_stopped(self) -> bool:
        return self.stopped

    def kill(self) -> None:
        self.told.append("kill")

    def close_stdin(self) -> None:
        self.told.append("close_stdin")

    def close(self) -> None:
        self.told.append("close")


class StubSession:
    """A session as the pool sees it; `messages` is its distance from any request."""

    def __init__(self, name: str = "", *, spare: bool = False, messages: int | None = 0) -> None:
        self.name = name
        self.process = StubProcess()
        self.key = None if spare else KEY
        self.messages = messages
        self.is_new = False
        self.turns = 0

    def __repr__(self) -> str:
        return self.name

    def distance(self, request: cc2api.SessionRequest, *, may_rewind: bool) -> int | None:
        if request.wants_new and not self.is_new:
            return None
        return self.messages

    def warm_up(self, deadline: cc2api.Deadline) -> None:
        self.is_new = False

    def read_last_lines(self) -> None:
        pass


class Gone(Exception):
    """The client of a request has left."""


def to_request(on_wait: Any = cc2api.no_hook) -> cc2api.SessionRequest:
    deadline = cc2api.Deadline(WAIT_S, on_wait, TimeoutError())
    return cc2api.SessionRequest(cc2api.WARMUP_TURNS[0], KEY, deadline)


class Clock:
    """time.monotonic, which passes only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def to_fleet(sessions: dict[Any, str], **chosen: Any) -> cc2api.Fleet:
    """Return a fleet of sessions in their states, entered in this order."""
    fleet = cc2api.Fleet(cc2api.Settings(**chosen))
    for session, state in sessions.items():
        fleet.move(session, state)
    return fleet


SPARE_COST = cc2api.SPARE_COST_MESSAGES
NEAREST = [
    # processes kept, distances of idle sessions, of the spare, busy ones; who is taken
    ("none is there", 4, [], None, 0, None),
    ("the only one", 4, [7], None, 0, "idle 0"),
    ("the one that costs least", 4, [7, 3, 5], None, 0, "idle 1"),
    ("the longest idle of equal ones", 4, [3, 3], None, 0, "idle 0"),
    ("none that cannot serve it", 4, [None, 9], None, 0, "idle 1"),
    ("none can serve it", 4, [None, None], None, 0, None),
    ("a spare costs one more while few are used", 4, [3], 1, 0, "spare"),
    ("and equal costs go to the conversation that was there first", 4, [2], 1, 0, "idle 0"),
    ("a conversation that goes on beats a spare", 4, [1], 1, 0, "idle 0"),
    ("with as many used as are kept, a spare is one more process", 3, [3, 4], 1, 0, "idle 0"),
    ("worth it only for a long conversation", 3, [SPARE_COST + 2, 99], 1, 0, "spare"),
    ("and not for one message less", 3, [SPARE_COST + 1, 99], 1, 0, "idle 0"),
    ("busy ones count as used", 3, [3], 1, 1, "idle 0"),
    ("with one process kept none but the spare is kept idle", 1, [3], 1, 0, "idle 0"),
    ("with none kept", 0, [], 1, 0, "spare"),
]


@pytest.mark.parametrize(
    ("why", "kept", "idle", "spare", "busy", "taken"), NEAREST, ids=[row[0] for row in NEAREST]
)
def test_the_nearest_session(
    why: str, kept: int, idle: list[int | None], spare: int | None, busy: int, taken: str | None
) -> None:
    sessions: dict[Any, str] = {}
    for number, messages in enumerate(idle):
        sessions[StubSession(f"idle {number}", messages=messages)] = "idle"
    if spare is not None:
        sessions[StubSession("spare", spare=True, messages=spare)] = "spare"
    for number in range(busy):
        sessions[StubSession(f"busy {number}")] = "busy"
    found = to_fleet(sessions, processes=kept).nearest(to_request(), may_rewind=True)
    assert (found and repr(found)) == taken, why


def test_a_stopped_session_is_killed_and_passed_over() -> None:
    near = StubSession("near", messages=1)
    far = StubSession("far", messages=2)
    near.process.stopped = True
    fleet = to_fleet({near: "idle", far: "idle"})
    assert repr(fleet.nearest(to_request(), may_rewind=True)) == "far"
    assert near.process.told == ["kill"]


LONG = cc2api.IDLE_TIMEOUT_S + 1
EVICTED = [
    # processes kept, slots, seconds that each is idle, spares, busy, incoming; who is ended
    ("nothing is over", 4, 8, [1, 1], 1, 0, False, []),
    ("a burst's processes stay for a while", 2, 8, [1, 1, 1], 1, 0, False, []),
    ("and go when they were long idle", 2, 8, [LONG, LONG, 1], 1, 0, False, ["idle 0", "idle 1"]),
    ("as many as are over", 3, 8, [LONG, LONG, LONG], 1, 0, False, ["idle 0"]),
    ("what is kept stays however long", 4, 8, [LONG, LONG, LONG], 1, 0, False, []),
    ("without a free slot the longest idle go", 4, 2, [3, 2, 1], 0, 0, False, ["idle 0"]),
    ("busy ones take slots", 4, 2, [3, 2, 1], 0, 1, False, ["idle 0", "idle 1"]),
    ("so does one that is about to start", 4, 2, [3, 2], 0, 0, True, ["idle 0"]),
    ("with none kept an unused one goes, too", 0, 8, [LONG], 1, 0, False, ["idle 0"]),
]


@pytest.mark.parametrize(
    ("why", "kept", "slots", "idle", "spares", "busy", "incoming", "ended"),
    EVICTED,
    ids=[row[0] for row in EVICTED],
)
def test_which_sessions_are_evicted(
    clock: Clock,
    why: str,
    kept: int,
    slots: int,
    idle: list[float],
    spares: int,
    busy: int,
    incoming: bool,
    ended: list[str],
) -> None:
    fleet = to_fleet({}, processes=kept, max_concurrency=slots)
    now = clock.now
    sessions: list[Any] = []
    for number, seconds in enumerate(idle):
        session: Any = StubSession(f"idle {number}")
        clock.now = now - seconds
        fleet.move(session, "idle")
        sessions.append(session)
    clock.now = now
    for state, number in (("spare", spares), ("busy", busy)):
        for _ in range(number):
            session = StubSession(state, spare=state == "spare")
            fleet.move(session, state)
    fleet.evict(incoming=incoming)
    assert [repr(s) for s in sessions if s.process.told] == ended, why
    assert all(s.process.told in ([], ["close_stdin"]) for s in sessions)


def test_old_and_dead_sessions_are_evicted(clock: Clock) -> None:
    old, dead, fresh = StubSession("old"), StubSession("dead"), StubSession("fresh")
    old.process.started_at = clock.now - cc2api.MAX_SESSION_AGE_S
    dead.process.told.append("died")
    fleet = to_fleet({old: "idle", dead: "idle", fresh: "idle"})
    fleet.evict()
    assert [repr(s) for s in fleet.in_state("ending")] == ["old", "dead"]
    assert [repr(s) for s in fleet.in_state("idle")] == ["fresh"]


def test_an_ending_session_gets_its_grace_and_then_is_killed(clock: Clock) -> None:
    session: Any = StubSession()
    alive = True
    session.process.is_alive = lambda: alive
    fleet = to_fleet({session: "idle"})
    fleet.end(session)
    clock.now += cc2api.EXIT_GRACE_S - 0.1
    assert fleet.reap() == []
    assert session.process.told == ["close_stdin"]
    clock.now += 0.1
    assert fleet.reap() == []
    assert session.process.told == ["close_stdin", "kill"]
    alive = False
    assert fleet.reap() == [session]
    assert fleet.in_state(*cc2api.STATES) == []


class WatchedFleet(cc2api.Fleet):
    """Writes down who was given which session, in the order in which that was decided."""

    def __init__(self, chosen: cc2api.Settings) -> None:
        super().__init__(chosen)
        self.given: list[tuple[cc2api.SessionRequest, Any]] = []

    def nearest(self, request: cc2api.SessionRequest, *, may_rewind: bool) -> Any:
        session = super().nearest(request, may_rewind=may_rewind)
        if session:
            self.given.append((request, session))
        return session


class Client:
    """A request on a thread of its own, which waits for a session."""

    def __init__(self, pool: cc2api.Pool) -> None:
        self.is_gone = False
        self.request = to_request(self.on_wait)
        self.session: Any = None
        self.was_served = False
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self.acquire, args=[pool])
        self.thread.start()

    def on_wait(self) -> None:
        if self.is_gone:
            raise Gone

    def acquire(self, pool: cc2api.Pool) -> None:
        try:
            self.session = pool.acquire(self.request)
            self.was_served = True
        except (Gone, cc2api.ApiError) as exc:
            self.error = exc


class PoolRun:
    """A pool with clients that come, leave and give back, and processes that die or do not start.

    What a step cannot do now it leaves.
    """

    def __init__(self) -> None:
        self.started: list[Any] = []
        self.ended: list[Any] = []
        self.clients: list[Client] = []
        self.fails_to_start = False
        self.fleet = WatchedFleet(cc2api.Settings(processes=2, max_concurrency=SLOTS))
        self.pool = cc2api.Pool(self.start, self.fleet, self.ended.append)

    def start(self) -> Any:
        if self.fails_to_start:
            raise OSError("no process today")
        session = StubSession(spare=True)
        session.is_new = True
        self.started.append(session)
        return session

    def holding(self) -> list[Client]:
        return [client for client in self.clients if client.session is not None]

    def waiting(self) -> list[Client]:
        return [client for client in self.clients if client.thread.is_alive()]

    def come(self, number: int) -> None:
        client = Client(self.pool)
        self.clients.append(client)

        def is_in_order() -> bool:
            """It is served or stands in the queue, so that the next one comes after it."""
            _, queued = self.pool.snapshot()
            return not client.thread.is_alive() or queued >= len(self.waiting())

        wait_until(is_in_order)

    def give_back(self, number: int) -> None:
        self.release(number, usable=True)

    def give_up(self, number: int) -> None:
        self.release(number, usable=False)

    def release(self, number: int, *, usable: bool) -> None:
        holding = self.holding()
        if holding:
            client = holding[number % len(holding)]
            session = client.session
            client.session = None
            session.key = KEY
            session.is_new = False
            session.turns += 1
            self.pool.release(session, usable=usable)

    def leave(self, number: int) -> None:
        waiting = self.waiting()
        if waiting:
            waiting[number % len(waiting)].is_gone = True

    def die(self, number: int) -> None:
        held = [client.session for client in self.holding()]
        for session in list(self.started):
            if session not in held:
                session.process.told.append("died")

    def stop_starting(self, number: int) -> None:
        self.fails_to_start = True

    def start_again(self, number: int) -> None:
        self.fails_to_start = False

    def check(self) -> None:
        lent = [client.session for client in self.holding()]
        assert len(lent) == len(set(lent)), "a session is lent to one request"
        pids, _ = self.pool.snapshot()
        assert len(pids["busy"]) <= SLOTS
        arrival = [client.request for client in self.clients]
        served = [arrival.index(request) for request, _ in list(self.fleet.given)]
        assert served == sorted(served), "who came first is served first"

    def close(self) -> None:
        """Close the pool; who has a session notices that its process was killed."""
        closing = threading.Thread(target=self.pool.close)
        closing.start()
        while closing.is_alive():
            self.release(0, usable=False)
            closing.join(0.001)

        for client in self.clients:
            client.thread.join(WAIT_S)
            assert not client.thread.is_alive()
            assert client.was_served or client.error, "every client is answered"
        assert set(self.ended) == set(self.started), "every process is ended"
        assert all(session.process.told.count("close") == 1 for session in self.started)
        pids, waiting = self.pool.snapshot()
        assert waiting == 0
        assert not any(pids.values())


SLOTS = 3
STEPS = st.tuples(
    st.sampled_from(
        [
            *(PoolRun.come, PoolRun.come, PoolRun.give_back, PoolRun.give_up),
            *(PoolRun.leave, PoolRun.die, PoolRun.stop_starting, PoolRun.start_again),
        ]
    ),
    st.integers(0, 9),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(STEPS, max_size=25))
def test_no_session_is_lent_twice_and_none_is_lost(steps: list[Any]) -> None:
    run = PoolRun()
    try:
        for step, number in steps:
            step(run, number)
            run.check()
    finally:
        run.close()


def test_a_session_that_is_assigned_in_the_last_moment_is_not_lost() -> None:
    """The client of the request that it was assigned to leaves at that very moment."""
    sessions = iter([StubSession(spare=True)])
    fleet = cc2api.Fleet(cc2api.Settings(processes=4, max_concurrency=1))
    pool = cc2api.Pool(lambda: next(sessions), fleet, lambda session: None)  # type: ignore[arg-type, return-value]
    session: Any = pool.acquire(to_request())
    session.key = KEY

    def leave_when_assigned() -> None:
        if not fleet.in_state("idle"):
            pool.release(session, usable=True)
            raise Gone

    with pytest.raises(Gone):
        pool.acquire(to_request(leave_when_assigned))
    pids, _ = pool.snapshot()
    assert (pids["idle"], pids["busy"]) == ([session.process.pid], [])
    pool.close()
