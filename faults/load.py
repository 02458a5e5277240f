"""A load of callers on a live service, which remembers every answer."""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import requests

from tests.conftest import token

# Keeps a line with what was measured, for the end of the report.
Figures = Callable[[str], None]


@cache
def headers(subject: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(subject)}"}


@dataclass
class Load:
    """Threads that keep sessions of some subjects alive and, where asked for, open and revoke others, for a block."""

    address: str
    subjects: list[str]
    churn: bool = False
    answers: list[tuple[float, str, int, float]] = field(default_factory=list)
    opened: dict[str, str] = field(default_factory=dict)
    revoked: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.sessions = {subject: self.open(subject) for subject in self.subjects}

    def open(self, subject: str) -> str:
        return requests.post(f"{self.address}/sessions", headers=headers(subject), timeout=10).json()["session"]["id"]

    def __enter__(self) -> "Load":
        targets = [(self._beat, subject) for subject in self.subjects] + [(self._churn, "churn")] * self.churn
        self._threads = [threading.Thread(target=target, args=(subject,)) for target, subject in targets]
        for thread in self._threads:
            thread.start()
        time.sleep(1)
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(15)
            assert not thread.is_alive()

    def _beat(self, subject: str) -> None:
        with requests.Session() as http:
            while not self._over.is_set():
                self._ask(http, subject, f"/{self.sessions[subject]}/heartbeat")
                time.sleep(0.02)

    def _churn(self, subject: str) -> None:
        """Open sessions, and revoke every other one; only what was acknowledged counts."""
        with requests.Session() as http:
            for number in itertools.count():
                if self._over.is_set():
                    return
                owner = f"{subject}-{number}"
                response = self._ask(http, owner, "")
                if response.status_code == 201:
                    id = response.json()["session"]["id"]
                    if number % 2:
                        self.opened[owner] = id
                    elif self._ask(http, owner, f"/{id}/revoke").status_code == 200:
                        self.revoked[owner] = id
                time.sleep(0.01)

    def _ask(self, http: requests.Session, subject: str, path: str) -> requests.Response:
        began = time.monotonic()
        response = http.post(f"{self.address}/sessions{path}", headers=headers(subject), timeout=10)
        with self._lock:
            self.answers.append((began, subject, response.status_code, time.monotonic() - began))
        return response

    def statuses(self) -> Counter:
        return Counter(status for _, _, status, _ in self.answers)

    def all_is_well(self) -> bool:
        """Whether no caller was in trouble in about the last second."""
        return {status for _, _, status, _ in self.answers[-200:]} <= {200, 201}

    def slowest(self) -> float:
        return max(seconds for *_, seconds in self.answers)

    def trouble(self, subjects: list[str] | None = None) -> float:
        """Seconds from the first 500 to the end of the last one."""
        failed = [
            (at, at + took) for at, who, status, took in self.answers if status == 500 and who in (subjects or [who])
        ]
        return max(end for _, end in failed) - min(at for at, _ in failed) if failed else 0.0

    def lost(self) -> tuple[int, int]:
        """How many acknowledged opens are gone, and how many acknowledged revokes have come back."""

        def alive(owner: str, id: str) -> bool:
            response = requests.get(f"{self.address}/sessions/{id}", headers=headers(owner), timeout=10)
            assert response.status_code in (200, 404)
            return response.status_code == 200

        opens = sum(not alive(owner, id) for owner, id in self.opened.items())
        revokes = sum(alive(owner, id) for owner, id in self.revoked.items())
        return opens, revokes

    def check(self, *allowed: int) -> None:
        """No live session was called gone, no token bad, no request went unanswered, and none took 2 seconds."""
        assert set(self.statuses()) <= {200, 201, *allowed}, self.statuses()
        assert self.slowest() < 2
