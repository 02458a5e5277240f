"""Liveness, which asks nobody, and readiness, which asks Redis."""

from flask import Blueprint, Response, current_app, jsonify

from app.store import StoreUnavailable

bp = Blueprint("health", __name__)


@bp.get("/healthz")
def liveness() -> dict[str, str]:
    """Whether this process answers."""
    return {"status": "ok"}


@bp.get("/readyz")
def readiness() -> Response | tuple[Response, int]:
    """Whether this process can serve sessions: Redis answers, within the configured timeout."""
    try:
        current_app.extensions["session_store"].ping()
    except StoreUnavailable:
        return jsonify(status="unavailable", success=False, error="Redis does not answer"), 503
    return jsonify(status="ok")
