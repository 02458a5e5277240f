"""What is counted for Prometheus, in methods that are named after what happened."""

import re
import time
from collections.abc import Callable

from flask import Flask, Request, Response, current_app, request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from app import metric_files

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2)
BEGAN = "session_heartbeat.began"  # in the environ of a request
METHODS = frozenset(["GET", "HEAD", "OPTIONS", "POST"])
# Why a token is refused; docs/operate.md says what each word means.
REFUSALS = "missing malformed signature expired not_yet_valid issuer audience claim subject scope signed_out".split()
OUTCOMES = {200: "renewed", 404: "not_found", 500: "failed"}


class Metrics:
    """The metrics of one app. Labels have few values: route templates, never paths, and reasons, never names."""

    def __init__(self) -> None:
        metric_files.share_values()
        self.registry = registry = CollectorRegistry()
        self._requests = Histogram(
            "http_request_duration_seconds",
            "Requests by route, method and status, and how long they took.",
            ["route", "method", "status"],
            registry=registry,
            buckets=SECONDS,
        )
        # prometheus_client takes longer to find a child than to count.
        self._children: dict[tuple[str, str, int], Histogram] = {}
        heartbeats = Counter("heartbeats", "Heartbeats by outcome.", ["outcome"], registry=registry)
        self._heartbeats = {outcome: heartbeats.labels(outcome) for outcome in OUTCOMES.values()}
        self._opened = Counter("sessions_opened", "Sessions opened.", registry=registry)
        self._revoked = Counter("sessions_revoked", "Sessions revoked.", registry=registry)
        self._replaced = Counter("sessions_replaced", "Sessions ended to make room for others.", registry=registry)
        self._limits = Counter("session_limits_reached", "Sessions not opened, at the limit.", registry=registry)
        self._refused = Counter("tokens_refused", "Tokens refused, by reason.", ["reason"], registry=registry)
        for reason in REFUSALS:
            self._refused.labels(reason)
        self._batches = Histogram(
            "heartbeat_batch_size",
            "Heartbeats that shared a round trip.",
            registry=registry,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
        )
        self._round_trips = Histogram(
            "redis_round_trip_seconds",
            "How long Redis took, by script.",
            ["script"],
            registry=registry,
            buckets=SECONDS,
        )
        self._keys_fetched = Gauge(
            "key_set_fetched_timestamp_seconds",
            "When a worker last fetched the key set; 0 before the first time, and where keys are configured.",
            registry=registry,
            multiprocess_mode="max",
        )
        self._keys_failed = Counter("key_set_failures", "Fetches that gave no signing key.", registry=registry)

    def count_requests(self, app: Flask) -> None:
        """Have every request of an app counted. Register it first: so it times what other hooks do, too."""
        # Each access through Flask's proxy takes a microsecond; getting the request behind it, once, an eighth of one.
        here: Callable[[], Request] = request._get_current_object  # type: ignore[attr-defined]

        def begin() -> None:
            here().environ[BEGAN] = time.perf_counter()

        def end(response: Response) -> Response:
            this, status = here(), response.status_code
            labels = (this.url_rule.rule if this.url_rule else "none", this.method, status)
            child = self._children.get(labels) or self._child(*labels)
            child.observe(time.perf_counter() - this.environ[BEGAN])
            if this.endpoint == "sessions.heartbeat" and status in OUTCOMES:
                self.heartbeats(OUTCOMES[status])
            return response

        app.before_request(begin)
        app.after_request(end)

    def _child(self, rule: str, method: str, status: int) -> Histogram:
        route = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule)
        if method not in METHODS:  # any word can be sent as a method, and is not remembered
            return self._requests.labels(route, "other", status)
        return self._children.setdefault((rule, method, status), self._requests.labels(route, method, status))

    def heartbeats(self, outcome: str, number: int = 1) -> None:
        """Count heartbeats: `renewed`, `not_found` or `failed`."""
        self._heartbeats[outcome].inc(number)

    def opened(self) -> None:
        self._opened.inc()

    def revoked(self, number: int) -> None:
        self._revoked.inc(number)

    def replaced(self) -> None:
        """Count a session that made room for another of its subject."""
        self._replaced.inc()

    def limit_reached(self) -> None:
        """Count a session that was not opened, since its subject has too many."""
        self._limits.inc()

    def token_refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def key_set_fetched(self, succeeded: bool) -> None:
        """Note when the key set was fetched, or count that it could not be."""
        if succeeded:
            self._keys_fetched.set_to_current_time()
        else:
            self._keys_failed.inc()

    def round_trip(self, script: str, size: int, seconds: float) -> None:
        """Count a round trip to Redis with `size` calls of a script."""
        self._round_trips.labels(script).observe(seconds)
        if script == "heartbeat":
            self._batches.observe(size)


def counted() -> Metrics:
    """The metrics of the app that is at work."""
    return current_app.extensions["metrics"]  # type: ignore[no-any-return]
