"""The application factory."""

from collections.abc import Callable
from typing import Any

import redis as redis_py
from flask import Flask, Request
from flask.sessions import SessionInterface
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.routing import MapAdapter

from app import cli, errors, health, sessions
from app.auth import TokenVerifier
from app.config import Config
from app.connection import Single, connect
from app.keys import load_keys
from app.schemas import LARGEST_BODY, Answer, ContractJSON
from app.store import SessionStore


class NoCookies(SessionInterface):
    """Flask's own sessions, in cookies, are not what this service is about."""

    def open_session(self, app: Flask, request: Request) -> None:
        return None


class Service(Flask):
    """Flask without what this API has no use for: a tenth of an empty route's time."""

    json_provider_class = ContractJSON
    response_class = Answer
    session_interface = NoCookies()

    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """No function of ours is a coroutine."""
        return func

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """Routes by path and method; what is asked of Host and subdomains elsewhere makes no difference here."""
        if request is None:
            return None
        return self.url_map.bind(
            "localhost", request.root_path or "/", path_info=request.path, default_method=request.method
        )


def create_app(config: Config, redis: "redis_py.Redis | None" = None) -> Flask:
    """The WSGI application for one configuration; `redis` stands in for the client that `config.redis_url` names."""
    app = Service(__name__, static_folder=None)
    app.config.update(
        MAX_CONTENT_LENGTH=LARGEST_BODY + 1,  # schemas.read_body says why the one
        PROVIDE_AUTOMATIC_OPTIONS=False,  # a 405 with Allow, in JSON like the rest
    )
    app.url_map.merge_slashes = False  # no redirect on any path
    app.extensions["config"] = config
    servers = Single(redis) if redis is not None else connect(config)
    app.extensions["servers"] = servers
    app.extensions["session_store"] = SessionStore(config, servers)
    app.extensions["token_verifier"] = TokenVerifier(config, load_keys(config))
    app.register_blueprint(sessions.bp)
    app.register_blueprint(health.bp)
    app.cli.add_command(cli.token)
    errors.register(app)
    if config.trusted_proxies:
        app.wsgi_app = ProxyFix(  # type: ignore[method-assign]
            app.wsgi_app, x_for=config.trusted_proxies, x_proto=0, x_host=0, x_port=0, x_prefix=0
        )
    return app
