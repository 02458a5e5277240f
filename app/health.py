"""Liveness, which asks nobody, and readiness, which asks Redis."""

from flask import Blueprint, Response, current_app, jsonify

from app.errors import error, retry_after
from app.store import StoreUnavailable

bp = Blueprint("health", __name__)


@bp.get("/healthz")
def liveness() -> dict[str, str]:
    """Whether this process answers.
    ---
    responses: {200: {example: {status: ok}}}
    """
    return {"status": "ok"}


@bp.get("/readyz")
def readiness() -> Response:
    """Whether this process can serve sessions: Redis answers, within 1.5 seconds.
    ---
    responses:
      200: {example: {status: ok}}
      503:
        description: Not now
        headers: {Retry-After: {required: true, schema: {type: integer, minimum: 1}, description: Seconds}}
        example: {success: false, error: Redis does not answer, status: unavailable}
    """
    try:
        current_app.extensions["session_store"].ping()
    except StoreUnavailable:
        return error(503, "Redis does not answer", retry_after(1), status="unavailable")
    return jsonify(status="ok")
