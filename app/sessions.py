"""The blueprint: every endpoint under /sessions."""

import re
from collections.abc import Callable
from typing import Any

from flask import Blueprint, Response, current_app, g, url_for

from app.auth import Caller, requires_token
from app.bodies import drain_body, load_body
from app.deadline import giving_way
from app.events import emit, peer_address
from app.metrics import counted
from app.responses import HeartbeatResponse, rfc3339
from app.schemas import SESSION_ID, HeartbeatManySchema, OpenSchema, RevokeAllSchema, SessionSchema
from app.store import ConnectionsBusy, Renewal, SessionNotFound, SessionStore, StoreUnavailable

ENDED = "Session not found or expired"  # at this a device opens a new session

bp = Blueprint("sessions", __name__, url_prefix="/sessions")
WELL_FORMED = re.compile(SESSION_ID)


def store() -> SessionStore:
    return current_app.extensions["session_store"]  # type: ignore[no-any-return]


def possible_id(id: str) -> str:
    """The id. Raises SessionNotFound for one that was never issued, so that Redis is not asked."""
    if not WELL_FORMED.fullmatch(id):
        raise SessionNotFound
    return id


def end_sessions(
    subject: str, id: str | None = None, *, except_id: str | None = None, refuse_earlier_tokens: bool = False
) -> int:
    """End one session of a subject, or all but one, or all; log and count it. Gives the number of those ended.

    With `refuse_earlier_tokens` tokens issued before open no session any more; not for one session alone.

    Raises SessionNotFound where that one is not there, and StoreUnavailable: then it may have been ended all the same.
    """
    try:
        if id is None:
            number = store().revoke_all(subject, except_id=except_id, refuse_earlier_tokens=refuse_earlier_tokens)
        else:
            store().revoke(subject, possible_id(id))
            number = 1
    except ConnectionsBusy:  # nothing was sent
        raise
    except StoreUnavailable:
        # Without a line the session would seem to have expired.
        emit("revoke_uncertain", subject=subject, session=id)
        raise
    counted().revoked(number)
    if id is None:
        kept_out: dict[str, Any] = {"refuse_earlier_tokens": True} if refuse_earlier_tokens else {}
        changes_nothing = not (number or refuse_earlier_tokens)  # and so can be repeated at will
        emit("sessions_revoked", subject=subject, limited=changes_nothing, number=number, **kept_out)
    else:
        emit("session_revoked", subject=subject, session=id)
    return number


def endpoint(
    method: str, rule: str, *, failed: str, not_found: str = "Session not found"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a view that needs a token, with what the published API says where it fails or finds no session."""

    def register(view: Callable[..., Any]) -> Callable[..., Any]:
        guarded: Any = requires_token(view)
        guarded.failed, guarded.not_found = failed, not_found
        bp.add_url_rule(rule, view_func=guarded, methods=[method])
        return view

    return register


@endpoint("POST", "/<session_id:id>/heartbeat", failed="Failed to update session", not_found=ENDED)
def heartbeat(id: str) -> Response:
    """Keep a session alive.

    Update session activity and extend the session expiry time. Typically called periodically to keep the session alive.
    A body is ignored.
    """
    drain_body()
    # Counted by its status, in Metrics.count_requests.
    renewal = store().heartbeat(g.caller.subject, possible_id(id))
    return HeartbeatResponse(renewal.expires_at_ms, renewal.expires_in)


@endpoint("POST", "/heartbeat", failed="Failed to update sessions")
def heartbeat_many() -> dict[str, Any]:
    """Keep many sessions alive.

    For gateways. The results are in the order of the ids.
    """
    ids = load_body(HeartbeatManySchema())["ids"]
    possible = list(filter(WELL_FORMED.fullmatch, ids))
    try:
        renewals = dict(zip(possible, store().heartbeat_many(g.caller.subject, possible)))
    except StoreUnavailable:
        counted().heartbeats("failed", len(ids))
        raise
    results = [heartbeat_result(id, renewals.get(id)) for id in ids]
    missing = sum(not result["success"] for result in results)
    counted().heartbeats("renewed", len(ids) - missing)
    counted().heartbeats("not_found", missing)
    if missing:
        emit("sessions_not_found", number=missing)
    return {"success": True, "message": "Sessions updated successfully", "results": results}


@endpoint("GET", "", failed="Failed to retrieve sessions")
def list_sessions() -> dict[str, Any]:
    """List the caller's live sessions, the most recently active first."""
    schema = SessionSchema()
    sessions = [schema.dump(session) for session in giving_way(store().list(g.caller.subject))]
    return {"success": True, "sessions": sessions}


@endpoint("POST", "", failed="Failed to open session")
def open_session() -> tuple[dict[str, Any], int, dict[str, str]]:
    """Open a session.

    The body and all of its fields are optional. Without `idleTimeoutSeconds` the session gets the service's own idle
    timeout. The address is the one that the request comes from, unless another than the subject sends it.
    """
    options = load_body(OpenSchema(current_app.extensions["config"].session_idle_max_seconds))
    caller: Caller = g.caller
    address = None if caller.actor else peer_address()  # a backend's address says nothing of the subject's device
    session = store().open(caller.subject, issued_at=caller.issued_at, ip_address=address, **options)
    counted().opened()
    emit("session_opened", session=session.id)
    if session.replaced_id:
        counted().replaced()
        emit("session_replaced", session=session.replaced_id)
    body = {"success": True, "message": "Session opened successfully", "session": SessionSchema().dump(session)}
    location = url_for("sessions.get_session", id=session.id)
    return body, 201, {"Location": location, "Session-Expires-In": str(session.expires_in)}


@endpoint("GET", "/<session_id:id>", failed="Failed to retrieve session")
def get_session(id: str) -> dict[str, Any]:
    """Read a session without extending it."""
    return {"success": True, "session": SessionSchema().dump(store().get(g.caller.subject, possible_id(id)))}


@endpoint("POST", "/<session_id:id>/revoke", failed="Failed to revoke session")
def revoke(id: str) -> dict[str, Any]:
    """End a session.

    No heartbeat brings it back. A body is ignored.
    """
    drain_body()
    end_sessions(g.caller.subject, id)
    return {"success": True, "message": "Session revoked successfully"}


@endpoint("POST", "/revoke-all", failed="Failed to revoke all sessions")
def revoke_all() -> tuple[dict[str, Any], int, dict[str, str]]:
    """End all of the caller's sessions, or all but one.

    The body is optional; `exceptSessionId` names the session to spare, and with `refuseEarlierTokens` those who were
    signed out cannot open new ones with the tokens that they hold.
    """
    number = end_sessions(g.caller.subject, **load_body(RevokeAllSchema()))
    body = {"success": True, "message": "All sessions revoked successfully"}
    return body, 200, {"Sessions-Revoked": str(number)}


def heartbeat_result(id: str, renewal: Renewal | None) -> dict[str, Any]:
    """One of many: like the answer to a single heartbeat, with the id."""
    if renewal is None:
        return {"id": id, "success": False, "error": ENDED}
    return {"id": id, "success": True, "newExpiry": rfc3339(renewal.expires_at_ms)}
