"""Commands for operators and developers, under `flask --app wsgi`."""

import json
import logging
import sys
import time
from typing import Any

import click
import jwt
from flask import Blueprint, Flask, current_app
from flask.cli import AppGroup, with_appcontext

from app import doctor, events
from app.auth import LONGEST_SUBJECT, SUBJECT
from app.config import Config, ConfigError
from app.responses import rfc3339
from app.schemas import SessionSchema
from app.sessions import end_sessions, store
from app.store import SessionNotFound, StoreUnavailable
from app.store.expiries import Expiry, NotEnabled, expiries

bp = Blueprint("cli", __name__, cli_group=None)
ROW = "{:32}  {:24}  {:24}  {:24}  {}"  # of the list of sessions
# Commands say themselves what is wrong. Where no log is configured Python would print the log's warnings beside that.
logging.getLogger("app").addHandler(logging.NullHandler())


def commands_only(error: ConfigError) -> Flask:
    """An app for commands, made of what is left of a refused environment; it answers no request."""
    app = Flask("app")
    app.register_blueprint(bp)
    app.extensions.update(config=error.config, problems=error.problems)

    @app.before_request
    def refuse() -> None:
        raise error

    return app


def _stop_at_problems(prefix: str = "") -> None:
    """End the command where variables that begin so are refused."""
    if problems := [each for each in current_app.extensions.get("problems", []) if each.startswith(prefix)]:
        raise click.ClickException("; ".join(problems))


def _subject(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """A subject that there can be, or None where the command can do without."""
    if value is not None and not SUBJECT.fullmatch(value):
        raise click.ClickException(f"a subject has 1 to {LONGEST_SUBJECT} characters of UTF-8")
    return value


@bp.cli.command()
@click.argument("subject", callback=_subject)
@click.option("--seconds", default=86400, show_default=True, help="How long the token is valid.")
def token(subject: str, seconds: int) -> None:
    """Print a token for SUBJECT, for development: only with JWT_SECRET."""
    config: Config = current_app.extensions["config"]
    _stop_at_problems("JWT_")
    if not config.jwt_secret:
        raise click.ClickException("only the issuer can sign tokens; JWT_SECRET is not set")
    now = int(time.time())
    claims: dict[str, Any] = {config.jwt_subject_claim: subject, "iat": now, "exp": now + seconds}
    if config.jwt_issuer:
        claims["iss"] = config.jwt_issuer
    if config.jwt_audience:
        claims["aud"] = config.jwt_audience
    click.echo(jwt.encode(claims, config.jwt_secret[0], config.algorithms[0]))


class OneLineErrors(AppGroup):
    """Commands for which trouble in Redis is an error of one line and not a traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except StoreUnavailable as error:
            raise click.ClickException(f"Redis is in trouble: {error}") from error


@bp.cli.group(cls=OneLineErrors)
@with_appcontext
def sessions() -> None:
    """See and end the sessions of a subject."""
    _stop_at_problems()


@sessions.command("list")
@click.argument("subject", callback=_subject)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of them, each as in GET /sessions.")
def list_sessions(subject: str, as_json: bool) -> None:
    """Print SUBJECT's live sessions, the most recently active first; exit code 1 where there is none."""
    found = SessionSchema(many=True).dump(store().list(subject))
    if as_json:
        click.echo(json.dumps(found))
    elif found:
        click.echo(ROW.format("session", "started", "last active", "expires", "login, device, address, location"))
        for each in found:
            described = [each[name] for name in ("loginMethod", "deviceName", "ipAddress", "location") if name in each]
            times = each["startedAt"], each["lastActivity"], each["expiresAt"]
            line = ROW.format(each["id"], *times, ", ".join(described))
            # Callers choose these names, and control characters could steer a terminal.
            click.echo("".join(filter(str.isprintable, line)))
    click.echo(f"live sessions: {len(found)}", err=as_json)
    raise SystemExit(not found)


@sessions.command()
@click.argument("subject", callback=_subject)
@click.option("--id", help="Only this session.")
@click.option("--refuse-earlier-tokens", is_flag=True, help="Let no token that was issued until now open a new one.")
def revoke(subject: str, id: str | None, refuse_earlier_tokens: bool) -> None:
    """End SUBJECT's sessions, or one of them. The line that the service would log goes to stderr."""
    if id is not None and refuse_earlier_tokens:
        raise click.UsageError("--id and --refuse-earlier-tokens do not go together")
    try:
        with events.logged_to(sys.stderr):
            click.echo(f"{end_sessions(subject, id, refuse_earlier_tokens=refuse_earlier_tokens)} revoked")
    except SessionNotFound:
        raise click.ClickException("there is no such session") from None


@sessions.command()
@click.argument("subject", required=False, callback=_subject)
def watch(subject: str | None) -> None:
    """Print a JSON line for each session that expires, of SUBJECT or of all, for as long as this runs."""
    try:
        for each in expiries(current_app.extensions["servers"], subject):
            if isinstance(each, Expiry):
                line = {"time": rfc3339(int(time.time() * 1000)), "subject": each.subject, "session": each.id}
                click.echo(json.dumps(line))
            else:
                click.echo(each, err=True)
    except NotEnabled:
        todo = "add Kx to it on each server, as in: redis-cli CONFIG SET notify-keyspace-events Kx"
        raise click.ClickException(f"Redis's notify-keyspace-events does not tell of expiries; {todo}") from None


@bp.cli.command(context_settings={"ignore_unknown_options": True})  # ids may begin with -
@click.argument("value")
def pseudonym(value: str) -> None:
    """Print what stands in the logs for VALUE, a subject or a session id."""
    config: Config = current_app.extensions["config"]
    _stop_at_problems("LOG_KEY")
    if not (config.log_key or config.jwt_secret):
        if not config.redis_url:
            raise click.ClickException("LOG_KEY or JWT_SECRET must be set, as the service has it")
        _stop_at_problems()  # a secret that was refused, if any, would be the key, and not the URL of Redis
    click.echo(config.pseudonym(value))


@bp.cli.command("doctor")
def doctor_() -> None:
    """Check all that has to be right before going live: a line each; exit code 1 where there is a failure."""
    failed = False
    refused = [doctor.Finding("failure", problem) for problem in current_app.extensions.get("problems", [])]
    for finding in refused or doctor.examine(current_app):
        click.echo(f"{finding.level:8} {finding.text}")
        failed |= finding.level == "failure"
    raise SystemExit(failed)
