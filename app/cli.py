"""Commands for operators and developers, under `flask --app wsgi`."""

import time

import click
import jwt
from flask import current_app
from flask.cli import with_appcontext

from app.config import Config


@click.command()
@click.argument("subject")
@click.option("--seconds", default=86400, show_default=True, help="How long the token is valid.")
@with_appcontext
def token(subject: str, seconds: int) -> None:
    """Print a token for SUBJECT, for development: only with JWT_SECRET."""
    config: Config = current_app.extensions["config"]
    if not config.jwt_secret:
        raise click.ClickException("only the issuer can sign tokens; JWT_SECRET is not set")
    claims = {config.jwt_subject_claim: subject, "exp": int(time.time()) + seconds}
    optional = {"iss": config.jwt_issuer, "aud": config.jwt_audience}
    claims.update({name: value for name, value in optional.items() if value})
    click.echo(jwt.encode(claims, config.jwt_secret[0], config.algorithms[0]))
