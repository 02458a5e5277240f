"""The application factory."""

import re

from flask import Flask
from flask_cors import CORS

from app import cli, errors, events, operations, sessions
from app.auth import TokenVerifier
from app.config import Config
from app.keys import load_keys
from app.metrics import Metrics
from app.routing import APIFlask, TrustedProxies
from app.store import SessionStore
from app.store.batching import GroupCommit, run_once
from app.store.connect import Servers, connect

EXPOSED_HEADERS = [
    "Location",
    "Retry-After",
    "Session-Expires-In",
    "Sessions-Revoked",
    "WWW-Authenticate",
    "X-Request-Id",
]


def create_app(config: Config, servers: Servers | None = None) -> Flask:
    """The WSGI application for one configuration; `servers` stand in for those that `config.redis_url` names."""
    app = APIFlask()
    # Without CORS an OPTIONS is a 405 with Allow, in JSON like the rest.
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = bool(config.cors_origins)
    app.extensions["config"] = config
    servers = servers or connect(config)
    metrics = app.extensions["metrics"] = Metrics()
    metrics.count_requests(app)
    keys = load_keys(config, metrics.key_set_fetched)
    app.extensions["line_limiter"] = events.LineLimiter(events.log)
    app.extensions["scrapes"] = GroupCommit(run_once)
    app.extensions["servers"] = servers
    app.extensions["session_store"] = SessionStore(config, servers, metrics.round_trip)
    app.extensions["keys"] = keys
    app.extensions["token_verifier"] = TokenVerifier(config, keys)
    for blueprint in (sessions.bp, operations.bp, cli.bp):
        app.register_blueprint(blueprint)
    if config.metrics_token != "off":
        app.register_blueprint(operations.metrics_bp)
    errors.register(app)
    if config.cors_origins:
        CORS(
            app,
            resources=r"/sessions.*",
            # Compiled: flask-cors guesses whether a string is a pattern.
            origins=[re.compile(re.escape(origin) + r"\Z") for origin in config.cors_origins],
            methods=["GET", "POST"],
            allow_headers="*",  # what the page asks for: tracing adds headers of its own
            expose_headers=EXPOSED_HEADERS,
            max_age=600,
            always_send=False,
        )
    if config.trusted_proxies:
        app.wsgi_app = TrustedProxies(app.wsgi_app, config.trusted_proxies, x_proto=0)  # type: ignore[method-assign]
    return app
