"""The application factory."""

import functools
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote, urlsplit

from flask import Flask, Request
from flask_cors import CORS
from werkzeug.exceptions import NotFound
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.routing import MapAdapter

from app import cli, errors, events, operations, sessions
from app.auth import TokenVerifier
from app.bodies import LARGEST_BODY
from app.config import Config
from app.keys import load_keys
from app.metrics import Metrics
from app.responses import APIResponse, ContractJSON
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


class APIFlask(Flask):
    """Flask with the API's JSON and answers, and routes that do not look at the Host header."""

    json_provider_class = ContractJSON
    response_class = APIResponse

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """Match path and method only. A slash that is written %2F is no separator (RFC 3986 §2.2)."""
        if request is None:
            return None
        environ = request.environ
        if environ["PATH_INFO"].startswith("//"):  # which Werkzeug takes for a single slash
            raise NotFound
        path = request.path
        if "%2" in environ.get("RAW_URI", ""):
            path = unquote(re.sub("%2f", "%252F", urlsplit(environ["RAW_URI"]).path, flags=re.IGNORECASE))
        # Made here: Map.bind would encode the name of the host anew.
        return MapAdapter(self.url_map, "localhost", request.root_path or "/", "", "http", path, request.method)


class TrustedProxies(ProxyFix):
    """The caller's address as the outermost proxy saw it, and the prefix that the nearest one has cut off the path."""

    PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        # The last of several: not every proxy adds one, and the first may be the caller's own.
        prefix = environ.get("HTTP_X_FORWARDED_PREFIX", "").rpartition(",")[2].strip()
        if self.PREFIX.fullmatch(prefix):
            environ["SCRIPT_NAME"] = prefix
        return super().__call__(environ, start_response)


def create_app(config: Config, servers: Servers | None = None) -> Flask:
    """The WSGI application for one configuration; `servers` stand in for those that `config.redis_url` names."""
    app = APIFlask(__name__, static_folder=None)
    app.config.update(
        MAX_CONTENT_LENGTH=LARGEST_BODY + 1,  # bodies.read_body says why the one
        # Without CORS an OPTIONS is a 405 with Allow, in JSON like the rest.
        PROVIDE_AUTOMATIC_OPTIONS=bool(config.cors_origins),
    )
    app.ensure_sync = functools.lru_cache(app.ensure_sync)  # type: ignore[method-assign]  # looks at each view once
    app.url_map.merge_slashes = app.url_map.strict_slashes = False  # no redirect on any path
    app.url_map.converters["session_id"] = sessions.SessionIdConverter
    app.extensions["config"] = config
    servers = servers or connect(config)
    counted = app.extensions["metrics"] = Metrics()
    counted.count_requests(app)
    keys = load_keys(config, counted.key_set_fetched)
    app.extensions["line_limiter"] = events.LineLimiter(events.log)
    app.extensions["scrapes"] = GroupCommit(run_once)
    app.extensions["servers"] = servers
    app.extensions["session_store"] = SessionStore(config, servers, counted.round_trip)
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
