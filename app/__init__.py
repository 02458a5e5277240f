"""The application factory."""

from typing import Any

import redis as redis_py
from flask import Flask, Response
from flask.json.provider import DefaultJSONProvider
from werkzeug.middleware.proxy_fix import ProxyFix

from app import cli, errors, health, sessions
from app.auth import TokenVerifier
from app.config import Config
from app.connection import connect
from app.keys import load_keys
from app.schemas import LARGEST_BODY
from app.store import SessionStore


class ContractJSON(DefaultJSONProvider):
    """Bodies as the API document prints them: fields in their order, a space behind colons and commas."""

    sort_keys = False

    def response(self, *args: Any, **kwargs: Any) -> Response:
        return Response(self.dumps(args[0] if args else kwargs), mimetype="application/json")


def create_app(config: Config, redis: "redis_py.Redis | None" = None) -> Flask:
    """The WSGI application for one configuration; `redis` stands in for the client that `config.redis_url` names."""
    app = Flask(__name__, static_folder=None)
    app.json = ContractJSON(app)
    app.config.update(
        MAX_CONTENT_LENGTH=LARGEST_BODY + 1,  # schemas.read_body says why the one
        PROVIDE_AUTOMATIC_OPTIONS=False,  # a 405 with Allow, in JSON like the rest
    )
    app.url_map.merge_slashes = False  # no redirect on any path
    app.extensions["config"] = config
    app.extensions["session_store"] = SessionStore(config, redis if redis is not None else connect(config))
    app.extensions["token_verifier"] = TokenVerifier(config, load_keys(config))
    app.register_blueprint(sessions.bp)
    app.register_blueprint(health.bp)
    app.cli.add_command(cli.token)
    errors.register(app)
    app.after_request(_secure)
    if config.trusted_proxies:
        app.wsgi_app = ProxyFix(  # type: ignore[method-assign]
            app.wsgi_app, x_for=config.trusted_proxies, x_proto=0, x_host=0, x_port=0, x_prefix=0
        )
    return app


def _secure(response: Response) -> Response:
    """No answer is to be stored (RFC 9111 §5.2.2.5) or taken for another type (OWASP ASVS 3.4.4)."""
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response
