"""The blueprint: every endpoint under /sessions."""

import re
from ipaddress import ip_address
from typing import Any

from flask import Blueprint, Response, current_app, g, request, url_for
from werkzeug.routing import BaseConverter

from app.auth import requires_token
from app.events import emit
from app.schemas import (
    SESSION_ID,
    Answer,
    HeartbeatManySchema,
    OpenSchema,
    RevokeAllSchema,
    SessionSchema,
    ignore_body,
    load_body,
    rfc3339,
)
from app.store import Renewal, SessionStore

bp = Blueprint("sessions", __name__, url_prefix="/sessions")


# Written out, since building it with json takes a tenth of the time that the whole heartbeat takes.
RENEWED = '{"success": true, "message": "Session updated successfully", "newExpiry": "%s"}'


class SessionIdConverter(BaseConverter):
    """Lets through what could be an id that we made; everything else is no session, and Redis is not asked."""

    regex = SESSION_ID


@bp.record_once
def _prepare(state: Any) -> None:
    state.app.url_map.converters["session_id"] = SessionIdConverter


def store() -> SessionStore:
    return current_app.extensions["session_store"]  # type: ignore[no-any-return]


@bp.post("/<session_id:id>/heartbeat")
@requires_token
def heartbeat(id: str) -> Response:
    """Keep a session alive."""
    ignore_body()
    renewal = store().heartbeat(g.subject, id)
    response = Answer(RENEWED % rfc3339(renewal.expires_at_ms))
    response.headers.add("Session-Expires-In", str(renewal.expires_in))
    return response


@bp.post("/heartbeat")
@requires_token
def heartbeat_many() -> dict[str, Any]:
    """Keep many sessions alive."""
    ids = load_body(HeartbeatManySchema())["ids"]
    possible = [id for id in ids if re.fullmatch(SESSION_ID, id)]
    renewals = dict(zip(possible, store().heartbeat_many(g.subject, possible)))
    results = [heartbeat_result(id, renewals.get(id)) for id in ids]
    return {"success": True, "message": "Sessions updated successfully", "results": results}


@bp.get("")
@requires_token
def list_sessions() -> dict[str, Any]:
    """List the caller's live sessions."""
    return {"success": True, "sessions": SessionSchema(many=True).dump(store().list(g.subject))}


@bp.post("")
@requires_token
def open_session() -> tuple[dict[str, Any], int, dict[str, str]]:
    """Open a session."""
    options = load_body(OpenSchema(current_app.extensions["config"].session_idle_max_seconds))
    session = store().open(g.subject, ip_address=peer_address(), **options)
    emit("session_opened", subject=g.subject, session=session.id)
    body = {"success": True, "message": "Session opened successfully", "session": SessionSchema().dump(session)}
    return body, 201, {"Location": url_for("sessions.get_session", id=session.id)}


@bp.get("/<session_id:id>")
@requires_token
def get_session(id: str) -> dict[str, Any]:
    """Read a session without extending it."""
    return {"success": True, "session": SessionSchema().dump(store().get(g.subject, id))}


@bp.post("/<session_id:id>/revoke")
@requires_token
def revoke(id: str) -> dict[str, Any]:
    """End a session."""
    ignore_body()
    store().revoke(g.subject, id)
    emit("session_revoked", subject=g.subject, session=id)
    return {"success": True, "message": "Session revoked successfully"}


@bp.post("/revoke-all")
@requires_token
def revoke_all() -> dict[str, Any]:
    """End all of the caller's sessions, or all but one."""
    number = store().revoke_all(g.subject, **load_body(RevokeAllSchema()))
    emit("sessions_revoked", subject=g.subject, number=number)
    return {"success": True, "message": "All sessions revoked successfully"}


def heartbeat_result(id: str, renewal: Renewal | None) -> dict[str, Any]:
    """One of many: like the answer to a single heartbeat, with the id."""
    if renewal is None:
        return {"id": id, "success": False, "error": "Session not found or expired"}
    return {"id": id, "success": True, "newExpiry": rfc3339(renewal.expires_at_ms)}


def peer_address() -> str | None:
    """The caller's IP address, or None where a proxy names something else."""
    try:
        return str(ip_address(request.remote_addr or ""))
    except ValueError:
        return None
