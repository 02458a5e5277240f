"""From a request to its route: which path is meant, and what proxies may say of it."""

import re
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote, urlsplit

from flask import Flask, Request
from werkzeug.exceptions import NotFound
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.routing import BaseConverter, MapAdapter

from app.responses import APIResponse, ContractJSON


class SessionIdConverter(BaseConverter):
    """Matches a segment of a path that is not the name of another endpoint, so GET /sessions/heartbeat is a 405."""

    regex = r"(?!(?:heartbeat|revoke-all)\Z)[^/]+"
    part_isolating = True  # Werkzeug takes the slash in the pattern for one that it matches


class APIFlask(Flask):
    """Flask with the API's JSON and answers, and routes that do not look at the Host header."""

    json_provider_class = ContractJSON
    response_class = APIResponse

    def __init__(self) -> None:
        super().__init__("app", static_folder=None)
        self.url_map.merge_slashes = self.url_map.strict_slashes = False  # no redirect on any path
        self.url_map.converters["session_id"] = SessionIdConverter

    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """No view is asynchronous, and to look at each anew takes a microsecond."""
        return func

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
