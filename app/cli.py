"""Commands for operators and developers, under `flask --app wsgi`."""

import logging
import time
from typing import Any

import click
import jwt
from flask import Blueprint, current_app
from flask.cli import AppGroup

from app import doctor, events
from app.auth import LONGEST_SUBJECT
from app.config import Config
from app.responses import rfc3339
from app.sessions import store
from app.store import SessionNotFound, StoreUnavailable

bp = Blueprint("cli", __name__, cli_group=None)
# Commands say themselves what is wrong. Where no log is configured Python would print the log's warnings beside that.
logging.getLogger("app").addHandler(logging.NullHandler())


@bp.cli.command()
@click.argument("subject")
@click.option("--seconds", default=86400, show_default=True, help="How long the token is valid.")
def token(subject: str, seconds: int) -> None:
    """Print a token for SUBJECT, for development: only with JWT_SECRET."""
    config: Config = current_app.extensions["config"]
    if not config.jwt_secret:
        raise click.ClickException("only the issuer can sign tokens; JWT_SECRET is not set")
    if not 0 < len(subject) <= LONGEST_SUBJECT:
        raise click.ClickException(f"a subject has 1 to {LONGEST_SUBJECT} characters")
    claims = {config.jwt_subject_claim: subject, "exp": int(time.time()) + seconds}
    optional = {"iss": config.jwt_issuer, "aud": next(iter(config.jwt_audience), None)}
    claims.update({name: value for name, value in optional.items() if value})
    click.echo(jwt.encode(claims, config.jwt_secret[0], config.algorithms[0]))


class OneLineErrors(AppGroup):
    """Commands for which trouble in Redis is an error of one line and not a traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except StoreUnavailable as error:
            raise click.ClickException(f"Redis is in trouble: {error}") from error


@bp.cli.group(cls=OneLineErrors)
def sessions() -> None:
    """See and end the sessions of a subject."""


@sessions.command("list")
@click.argument("subject")
def list_sessions(subject: str) -> None:
    """Print SUBJECT's live sessions, the most recently active first."""
    for session in store().list(subject):
        described = [session.login_method, session.device_name, session.ip_address, session.location]
        times = f"active {rfc3339(session.last_activity_ms)}  expires {rfc3339(session.expires_at_ms)}"
        click.echo(_printable(f"{session.id}  {times}  {', '.join(filter(None, described))}"))


@sessions.command()
@click.argument("subject")
@click.option("--id", help="Only this session.")
def revoke(subject: str, id: str | None) -> None:
    """End SUBJECT's sessions, or one of them."""
    if id is None:
        click.echo(f"{store().revoke_all(subject)} revoked")
        return
    try:
        store().revoke(subject, id)
    except SessionNotFound:
        raise click.ClickException("there is no such session") from None
    click.echo("1 revoked")


@bp.cli.command()
@click.argument("value")
def pseudonym(value: str) -> None:
    """Print what stands in the logs for VALUE, a subject or a session id."""
    click.echo(events.pseudonym(value))


@bp.cli.command("doctor")
def doctor_() -> None:
    """Check all that has to be right before going live: a line each; exit code 1 where something is not."""
    failed = False
    for finding in doctor.examine(current_app):
        click.echo(f"{finding.level:8} {finding.text}")
        failed |= finding.level == "failure"
    raise SystemExit(failed)


def _printable(text: str) -> str:
    """Without control characters, which could steer a terminal: the callers choose these names."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
