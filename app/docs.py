"""The API as a page, /docs: Swagger UI out of its package, which asks nobody else for anything."""

from pathlib import Path

import flask_swagger_ui  # type: ignore[import-untyped]
from flask import Blueprint

from app.schemas import APIResponse

FILES = Path(flask_swagger_ui.__file__).parent / "dist"
# The icons are in the style sheet, as data.
POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>session-heartbeat</title>
<link rel="icon" href="/docs/favicon-32x32.png">
<link rel="stylesheet" href="/docs/swagger-ui.css">
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</html>
"""
# The validator is a service elsewhere.
START = 'SwaggerUIBundle({url: "/openapi.json", dom_id: "#swagger-ui", validatorUrl: null})'

bp = Blueprint("docs", __name__, static_folder=FILES, static_url_path="/docs")


@bp.get("/docs")
def page() -> APIResponse:
    """Show the API as a page on which it can be tried.
    ---
    responses: {200: {description: Swagger UI, content: {text/html: {schema: {type: string}}}}}
    """
    return APIResponse(PAGE, mimetype="text/html", headers={"Content-Security-Policy": POLICY})


@bp.get("/docs/start.js")
def start() -> APIResponse:
    """The page's own script, since its policy permits none inside it."""
    return APIResponse(START, mimetype="text/javascript")
