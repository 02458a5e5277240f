"""The shape and the headers of every answer."""

import functools
from datetime import datetime, timezone
from typing import Any

from flask import Response
from flask.json.provider import DefaultJSONProvider

# No answer is to be stored (RFC 9111 §5.2.2.5) or taken for another type than its own (OWASP ASVS 3.4.4).
COMMON_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class APIResponse(Response):
    """With the headers that every answer has; JSON, unless a mimetype is given."""

    default_mimetype = "application/json"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.headers.update(COMMON_HEADERS)


# Written out, since building it with json takes a tenth of the time that the whole heartbeat takes.
HEARTBEAT_BODY = '{"success": true, "message": "Session updated successfully", "newExpiry": "%s"}'


class HeartbeatResponse(APIResponse):
    """The answer to a heartbeat, with all of its headers worked out here.

    Werkzeug would look whether there is a body, how long it is and whether it may be sent, which takes a quarter of
    the time of all the rest of Flask.
    """

    def __init__(self, expires_at_ms: int, expires_in: int) -> None:
        body = HEARTBEAT_BODY % rfc3339(expires_at_ms)
        head = [
            ("Content-Type", self.default_mimetype),
            ("Content-Length", str(len(body))),
            *COMMON_HEADERS.items(),
            ("Session-Expires-In", str(expires_in)),
        ]
        Response.__init__(self, [body.encode()], headers=head)

    def __call__(self, environ: Any, start_response: Any) -> Any:
        start_response(self.status, self.headers.to_wsgi_list())
        return self.response


class ContractJSON(DefaultJSONProvider):
    """Bodies as the API document prints them: fields in their order, a space behind colons and commas."""

    sort_keys = False

    def response(self, *args: Any, **kwargs: Any) -> APIResponse:
        return APIResponse(self.dumps(args[0] if args else kwargs))


@functools.lru_cache(1024)  # sessions that are renewed together mostly share their expiry
def rfc3339(ms: int) -> str:
    """Milliseconds since the epoch as RFC 3339: UTC, ending in Z, with milliseconds."""
    at = datetime.fromtimestamp(ms // 1000, timezone.utc).replace(microsecond=ms % 1000 * 1000)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
