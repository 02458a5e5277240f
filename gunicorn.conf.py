"""How gunicorn serves the app. PORT is its own: it listens on 0.0.0.0:$PORT, or on 127.0.0.1:8000 without one."""

import os
import subprocess
import sys

from gunicorn.glogging import Logger

# Greenlets: a client that sends slowly, or only keeps its connection open, holds up nobody else.
worker_class = "gevent"
workers = int(os.environ.get("WEB_CONCURRENCY") or os.cpu_count() or 1)
worker_connections = 10_000

# Also the time in which the headers of a request have to arrive. A proxy keeps its connections open for a minute
# and would lose requests on one that is closed under its hands; without a proxy in front, slow clients are ours to cut.
keepalive = 75 if os.environ.get("TRUSTED_PROXIES", "0").strip() not in ("", "0") else 5
timeout = 30
# A PaaS kills what has not stopped after 30 seconds, and idle connections would take all that they are given.
graceful_timeout = 10

# A socket in the home folder through which the server could be steered.
control_socket_disable = True

# Logs are a stream on stdout (https://12factor.net/logs).
logconfig_dict = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
    "handlers": {"stdout": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "line"}},
    "root": {"level": "INFO", "handlers": ["stdout"]},
    "loggers": {"gunicorn.error": {"propagate": True, "handlers": []}},
}


class logger_class(Logger):
    """Without the access log: preparing a line costs a tenth of a heartbeat, even where none is written."""

    def access(self, *args):
        pass


def on_starting(server):
    """Refuse a bad configuration once and as a whole, with exit code 1, before any worker starts.

    In a process of its own: what the app imports must not be there before gevent has patched the worker.
    """
    module = server.app.app_uri.partition(":")[0]
    if subprocess.run([sys.executable, "-c", f"import {module}"]).returncode:
        sys.exit(1)
