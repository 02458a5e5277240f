"""What Prometheus asks for: counted in every worker, added up by whichever answers."""

from hmac import compare_digest

from flask import Blueprint, Request, Response, current_app, request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from app import metric_files
from app.auth import TokenMissing, bearer_token
from app.errors import TOKEN_INVALID, TOKEN_MISSING, error

bp = Blueprint("metrics", __name__)

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2)
METHODS = frozenset(["GET", "HEAD", "OPTIONS", "POST"])
OUTCOMES = {200: "renewed", 404: "not_found", 500: "failed"}


class Metrics:
    """The metrics of one app. Labels have few values: route rules, never paths, and reasons, never names."""

    def __init__(self) -> None:
        metric_files.share_values()
        self.registry = registry = CollectorRegistry()
        self._requests = Histogram(
            "http_request_duration_seconds",
            "Requests by route rule, method and status, and how long they took.",
            ["route", "method", "status"],
            registry=registry,
            buckets=SECONDS,
        )
        # prometheus_client takes longer to find a child than to count.
        self._children: dict[tuple[str, str, int], Histogram] = {}
        heartbeats = Counter("heartbeats", "Heartbeats by outcome.", ["outcome"], registry=registry)
        self.heartbeats = {outcome: heartbeats.labels(outcome) for outcome in OUTCOMES.values()}
        self.opened = Counter("sessions_opened", "Sessions opened.", registry=registry)
        self.revoked = Counter("sessions_revoked", "Sessions revoked.", registry=registry)
        self.refused = Counter("tokens_refused", "Tokens refused, by reason.", ["reason"], registry=registry)
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
        self.keys_fetched = Gauge(
            "key_set_fetched_timestamp_seconds",
            "When the key set was last fetched; 0 where keys are configured.",
            registry=registry,
            multiprocess_mode="mostrecent",
        )

    def request(self, request: Request, status: int, seconds: float) -> None:
        """Count a request that has been answered."""
        rule = request.url_rule
        # Any word can be sent as a method.
        method = request.method if request.method in METHODS else "other"
        labels = (rule.rule if rule else "none", method, status)
        child = self._children.get(labels)
        if child is None:
            child = self._children[labels] = self._requests.labels(*labels)
        child.observe(seconds)
        if request.endpoint == "sessions.heartbeat" and status in OUTCOMES:
            self.heartbeats[OUTCOMES[status]].inc()

    def round_trip(self, script: str, size: int, seconds: float) -> None:
        """Count a round trip to Redis with `size` calls of a script."""
        self._round_trips.labels(script).observe(seconds)
        if script == "heartbeat":
            self._batches.observe(size)


@bp.get("/metrics")
def metrics() -> Response:
    """Metrics for Prometheus, of all workers, or of the one that answers where they have no folder to share."""
    config, counted = current_app.extensions["config"], current_app.extensions["metrics"]
    if config.metrics_token and (sentence := _refused(config.metrics_token)):
        return error(401, sentence, {"WWW-Authenticate": 'Bearer realm="metrics"'})
    counted.keys_fetched.set(current_app.extensions["keys"].fetched_at)
    registry = metric_files.of_all_workers() or counted.registry
    return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST, headers={"Cache-Control": "no-store"})


def _refused(token: str) -> str | None:
    """What is wrong with the caller's token. It is none of an issuer's, and so not counted with those."""
    try:
        given = bearer_token(request.environ)
    except TokenMissing:
        return TOKEN_MISSING
    return None if compare_digest(given.encode(), token.encode()) else TOKEN_INVALID
