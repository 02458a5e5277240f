"""The application factory."""

import time
from collections.abc import Sequence

import redis as redis_py
from flask import Flask, Request, Response
from flask.globals import request_ctx
from flask_cors import CORS
from werkzeug.exceptions import NotFound
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.routing import MapAdapter

from app import cli, errors, events, metrics, operations, sessions
from app.auth import TokenVerifier
from app.bodies import LARGEST_BODY
from app.config import Config
from app.keys import load_keys
from app.metrics import Metrics
from app.responses import APIResponse, ContractJSON
from app.store import SessionStore
from app.store.connect import OnePrimary, connect


class LeanFlask(Flask):
    """Flask minus steps of each request that this API does not need: a fourteenth of an empty route's time."""

    json_provider_class = ContractJSON
    response_class = APIResponse

    def full_dispatch_request(self) -> Response:
        """Answer a request and count it, without `request_started` and `before_request`, which the app does not use."""
        began = time.perf_counter()
        try:
            answer = self.dispatch_request()
        except Exception as error:
            answer = self.handle_user_exception(error)
        response = self.finalize_request(answer)
        seconds = time.perf_counter() - began
        self.extensions["metrics"].request(request_ctx.request, response.status_code, seconds)
        return response

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """Match path and method only; Flask would look at the Host header, too."""
        if request is None:
            return None
        if request.environ["PATH_INFO"].startswith("//"):  # which Werkzeug takes for a single slash
            raise NotFound
        return self.url_map.bind(
            "localhost", request.root_path or "/", path_info=request.path, default_method=request.method
        )


def create_app(config: Config, redis: "redis_py.Redis | None" = None) -> Flask:
    """The WSGI application for one configuration; `redis` stands in for the client that `config.redis_url` names."""
    app = LeanFlask(__name__, static_folder=None)
    app.config.update(
        MAX_CONTENT_LENGTH=LARGEST_BODY + 1,  # bodies.read_body says why the one
        # Without CORS an OPTIONS is a 405 with Allow, in JSON like the rest.
        PROVIDE_AUTOMATIC_OPTIONS=bool(config.cors_origins),
    )
    app.url_map.merge_slashes = False  # no redirect on any path
    app.url_map.converters["session_id"] = sessions.SessionIdConverter
    app.extensions["config"] = config
    servers = OnePrimary(redis) if redis is not None else connect(config)
    keys = load_keys(config)
    app.extensions["line_limiter"] = events.LineLimiter(events.log)
    app.extensions["metrics"] = Metrics()
    app.extensions["servers"] = servers
    app.extensions["session_store"] = SessionStore(config, servers, app.extensions["metrics"].round_trip)
    app.extensions["keys"] = keys
    app.extensions["token_verifier"] = TokenVerifier(config, keys)
    for blueprint in (sessions.bp, operations.bp, cli.bp):
        app.register_blueprint(blueprint)
    if config.metrics_token != "off":
        app.register_blueprint(metrics.bp)
    errors.register(app)
    if config.cors_origins:
        _enable_cors(app, config.cors_origins)
    if config.trusted_proxies:
        app.wsgi_app = ProxyFix(app.wsgi_app, config.trusted_proxies, x_proto=0)  # type: ignore[method-assign]
    return app


def _enable_cors(app: Flask, origins: Sequence[str]) -> None:
    """Answer preflights from these origins, and expose the headers that devices use."""
    CORS(
        app,
        resources=r"/sessions.*",
        origins=list(origins),
        methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
        expose_headers=["Location", "Retry-After", "Session-Expires-In", "WWW-Authenticate", "X-Request-Id"],
        max_age=600,
        always_send=False,
    )
