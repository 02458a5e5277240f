"""What the service says of itself: liveness, readiness, metrics, and the API as a document and as a page."""

import platform
from collections.abc import Iterator
from hmac import compare_digest
from pathlib import Path

import flask_swagger_ui  # type: ignore[import-untyped]
from flask import Blueprint, Response, current_app, jsonify, request, send_from_directory
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from app import metric_files
from app.config import VERSION
from app.errors import TOKEN_INVALID, TOKEN_MISSING, error, retry_after
from app.metrics import counted
from app.responses import APIResponse

HERE = Path(__file__).parent
PAGE = HERE / "swagger"
SWAGGER_UI = Path(flask_swagger_ui.__file__).parent / "dist"
# The icons are in the style sheet, as data.
POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

CHALLENGE = {"WWW-Authenticate": 'Bearer realm="metrics"'}

bp = Blueprint("operations", __name__)
metrics_bp = Blueprint("metrics", __name__)


@bp.get("/healthz")
def liveness() -> dict[str, str]:
    """Whether this process answers; asks nothing else."""
    return {"status": "ok"}


@bp.get("/readyz")
def readiness() -> Response:
    """Whether this process can serve sessions: it has signing keys, and Redis takes writes."""
    if not current_app.extensions["keys"].loaded:
        return error(503, headers=retry_after(5), status="unavailable")
    if not current_app.extensions["session_store"].takes_writes():
        return error(503, "Redis not available", retry_after(1), status="unavailable")
    return jsonify(status="ok")


class AllMetrics(Collector):
    """What has been counted, by all workers or, where they have no folder to share, by this one; and what is so now."""

    def collect(self) -> Iterator[Metric]:
        build = {"version": VERSION, "python": platform.python_version()}
        yield InfoMetricFamily("session_heartbeat_build", "What is running.", build)
        # Before the counters are read: waiting for Redis must not make their values old.
        up = current_app.extensions["session_store"].takes_writes()
        yield GaugeMetricFamily("redis_up", "Whether Redis takes writes from the worker that was asked.", int(up))
        yield from (metric_files.of_all_workers() or counted().registry).collect()


@metrics_bp.get("/metrics")
def metrics() -> Response:
    """Metrics for Prometheus."""
    # This token is none of an issuer's, and so not counted with those where it is refused.
    if expected := current_app.extensions["config"].metrics_token:
        given = request.authorization
        if given is None or given.type != "bearer":
            return error(401, TOKEN_MISSING, CHALLENGE)
        if not compare_digest((given.token or "").encode(), expected.encode()):
            return error(401, TOKEN_INVALID, CHALLENGE)
    text = current_app.extensions["scrapes"].submit(lambda: generate_latest(AllMetrics()))
    return APIResponse(text, content_type=CONTENT_TYPE_LATEST)


@bp.get("/openapi.json")
def openapi() -> APIResponse:
    """OpenAPI 3.1, written by hand and served as it stands; tests/test_openapi.py holds it to the app."""
    return APIResponse((HERE / "openapi.json").read_text())


# The page's addresses are relative, so that it works behind a proxy that serves it under a prefix.
@bp.get("/docs", strict_slashes=True)
def docs() -> APIResponse:
    """The API as a page on which it can be tried: Swagger UI out of its package, which asks no other server."""
    page = (PAGE / "index.html").read_text()
    return APIResponse(page, mimetype="text/html", headers={"Content-Security-Policy": POLICY})


@bp.get("/docs/<path:name>")
def page_file(name: str) -> Response:
    """The page's own script, since its policy permits none inside it, and style; all else is Swagger UI's."""
    return send_from_directory(PAGE if name in ("start.js", "page.css") else SWAGGER_UI, name)
