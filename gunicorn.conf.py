"""How gunicorn serves the app. The command line and GUNICORN_CMD_ARGS win over what stands here."""

import contextlib
import gc
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile

import gevent

import gunicorn_edge
import gunicorn_metrics

SHARED_MEMORY = "/dev/shm"
# After so many requests, or an answer of more bytes, a worker looks for what has newly arrived on its connections.
REQUESTS_A_TURN = 16
LARGE_ANSWER = 64 * 1024
READ_SECONDS = 20  # a client that takes in nothing of what it is sent for so long is cut (TCP_USER_TIMEOUT, tcp(7))

# A connection is a file, and the soft limit is often 1024.
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
with contextlib.suppress(ValueError):  # macOS has no hard limit, and refuses a soft one without end
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

# Greenlets: a client that sends slowly, or only keeps its connection open, holds up no other client.
worker_class = "gunicorn_edge.Worker"
logger_class = "gunicorn_edge.Logger"
workers = int(os.environ.get("WEB_CONCURRENCY") or os.cpu_count() or 1)
worker_connections = 10_000


def addresses(port):
    """All addresses of this machine, by IPv4 and by IPv6 where it has both: the networks of some platforms are IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::", 0))
            ipv6_alone = probe.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)  # as net.ipv6.bindv6only says
    except OSError:
        return [f"0.0.0.0:{port}"]
    return [f"0.0.0.0:{port}", f"[::]:{port}"] if ipv6_alone else [f"[::]:{port}"]


port = os.environ.get("PORT", "").strip()
bind = addresses(port) if port.isdecimal() else ["127.0.0.1:8000"]  # app/config.py refuses what is no number

# A token of 16 KB fits in one field. gunicorn_edge.py bounds the head as a whole.
limit_request_field_size = 17 * 1024

# sendfile would send the body of a file apart from its head.
sendfile = False

# A proxy would lose a request that it sends on a connection which we are closing, so it has to be the first to close:
# AWS's closes after 60 seconds, nginx's after 60, Heroku's after 90. Without a proxy, idle clients are ours to cut off.
keepalive = 100 if os.environ.get("TRUSTED_PROXIES", "0").strip() not in ("", "0") else 5
timeout = 30
# A PaaS kills what has not stopped after 30 seconds, and where connections are idle gunicorn takes all of this time.
graceful_timeout = 10

# For the files that tell whether a worker is alive. Memory also where nothing else can be written to.
worker_tmp_dir = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None

# A socket in the home folder through which the server could be steered.
control_socket_disable = True

# gunicorn believes no header that says where a request came from or went to: that is TRUSTED_PROXIES, in the app. By
# default it does from localhost: SCRIPT_NAME, with which paths begin elsewhere, and others. With the first two settings
# empty the "*" trusts nobody; it spares looking at addresses, which takes 5 microseconds a request.
forwarder_headers = ""
secure_scheme_headers = {}
forwarded_allow_ips = "*"

# Logs are a stream on stdout (https://12factor.net/logs), a JSON object a line, UTC.
logconfig_dict = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "json": {
            "()": "pythonjsonlogger.json.JsonFormatter",
            "fmt": "%(levelname)s %(name)s %(message)s %(process)d",
            "rename_fields": {"levelname": "level", "name": "logger", "message": "event", "process": "pid"},
            "timestamp": "time",
        }
    },
    "handlers": {"stdout": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "json"}},
    "root": {"level": "INFO", "handlers": ["stdout"]},
    "loggers": {"gunicorn.error": {"propagate": True, "handlers": []}},
}


def post_worker_init(worker):
    """Prepare a worker that has loaded the app."""
    gunicorn_edge.log_uncaught(worker)
    gunicorn_edge.settings_at_hand(worker.cfg)
    # What is there from the start stays: not looking through it halves the time, 5 %, that collecting garbage takes.
    gc.collect()
    gc.freeze()


def post_request(worker, req, environ, resp):
    """Give way to the others: a client that always has the next request ready would have a worker for itself.

    After most requests only to those whose requests or replies are there already, which takes a microsecond and saves
    more than that: the next request often arrives meanwhile, and more heartbeats share a round trip.
    """
    if worker.nr % REQUESTS_A_TURN == 0 or (resp and resp.sent > LARGE_ANSWER):
        gunicorn_edge.give_way()
    else:
        gevent.sleep(0)


def on_starting(server):
    """Look at the environment and at Redis once, before any worker starts; a bad configuration ends here.

    In a process of its own: what the app imports must not be there before gevent has patched the worker.
    """
    # A folder that is given might be in use by others, or hold what we have counted before.
    os.environ.pop(gunicorn_metrics.FOLDER, None)
    if not folders():
        server.log.error("No folder can be written to, and gunicorn needs one: neither %s nor TMPDIR", SHARED_MEMORY)
        sys.exit(1)
    if server.cfg.preload_app:
        server.log.error("--preload (preload_app) is refused: gevent has to patch a worker before the app is loaded")
        sys.exit(1)
    module = server.app.app_uri.partition(":")[0]
    looked = subprocess.run([sys.executable, "-m", module], stdout=subprocess.PIPE, text=True)
    for line in looked.stdout.splitlines():
        server.log.warning(line)
    if looked.returncode:
        sys.exit(1)


def folders():
    """Where files can be made: in memory first."""
    found = [worker_tmp_dir] if worker_tmp_dir else []
    with contextlib.suppress(OSError):  # on a read-only root file system there may be none
        found.append(tempfile.gettempdir())
    return found


def when_ready(server):
    """Make ready what all workers share, before the first of them starts."""
    server.metrics_folder = gunicorn_metrics.make_folder(folders(), server.cfg.workers)
    if server.metrics_folder:
        os.environ[gunicorn_metrics.FOLDER] = server.metrics_folder
    else:
        text = "No room for metrics in %s: each worker counts for itself, and /metrics is of one of them"
        server.log.warning(text, " or ".join(folders()))
    # Clients that do not read their answers are cut: their connections would last for ever.
    for listener in server.LISTENERS:
        if listener.sock.family != socket.AF_UNIX and hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, READ_SECONDS * 1000)


def on_exit(server):
    """Leave nothing behind."""
    if server.metrics_folder:
        shutil.rmtree(server.metrics_folder, ignore_errors=True)
