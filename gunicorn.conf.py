"""How gunicorn serves the app. The command line and GUNICORN_CMD_ARGS win over what stands here."""

import contextlib
import fcntl
import glob
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading

import gevent

import gunicorn_edge

METRICS = "PROMETHEUS_MULTIPROC_DIR"
METRICS_PREFIX = "session-heartbeat-metrics-"  # of our folders' names
METRICS_ROOM = 1 << 20  # bytes for each worker, of which a fifth is taken at the start
SHARED_MEMORY = "/dev/shm"
REQUESTS_A_TURN = 16  # of a worker, before it looks what other clients have sent
READ_SECONDS = 20  # in which a client takes in what it is sent, or something of it

# A connection is a file, and the soft limit is often 1024.
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
with contextlib.suppress(ValueError):  # macOS has no hard limit, and refuses a soft one without end
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

# Greenlets: a client that sends slowly, or only keeps its connection open, holds up nobody else.
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
bind = addresses(port) if port.isdecimal() else ["127.0.0.1:8000"]  # what is no number is refused with all the rest

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

# gunicorn believes no header that says where a request came from or went to; TRUSTED_PROXIES is the app's. By default
# it does from localhost: SCRIPT_NAME, with which paths begin elsewhere, and others. Since it believes nothing from any
# address it need not look at addresses, which takes 5 microseconds a request.
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


def post_request(worker, req, environ, resp):
    """Give way to the others: a client that always has the next request ready would have a worker for itself."""
    if worker.nr % REQUESTS_A_TURN == 0:
        gunicorn_edge.give_way()


def on_starting(server):
    """Look at the environment and at Redis once, before any worker starts; a bad configuration ends here.

    In a process of its own: what the app imports must not be there before gevent has patched the worker.
    """
    if not worker_tmp_dir and not folders():
        server.log.error("No folder can be written to, and gunicorn needs one: neither %s nor TMPDIR", SHARED_MEMORY)
        sys.exit(1)
    if server.cfg.preload_app:
        server.log.error("--preload (preload_app) is refused: gevent has to patch a worker before the app is loaded")
        sys.exit(1)
    module = server.app.app_uri.partition(":")[0]
    environ = {name: value for name, value in os.environ.items() if name != METRICS}  # it counts nothing
    looked = subprocess.run([sys.executable, "-m", module], env=environ, stdout=subprocess.PIPE, text=True)
    for line in looked.stdout.splitlines():
        server.log.warning(line)
    if looked.returncode:
        sys.exit(1)


def when_ready(server):
    """Make ready what all workers share, before the first of them starts."""
    make_metrics_folder(server)
    # Those who do not read their answers are cut: a connection of theirs would last for ever.
    for listener in server.LISTENERS:
        if listener.sock.family != socket.AF_UNIX and hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, READ_SECONDS * 1000)


def folders():
    """Where files can be made: in memory first."""
    found = [worker_tmp_dir] if worker_tmp_dir else []
    with contextlib.suppress(OSError):  # on a read-only root file system there may be none
        found.append(tempfile.gettempdir())
    return found


def make_metrics_folder(server):
    """Make the folder where the workers' counters are added up. They begin at zero, which Prometheus knows how to take.

    Always one of our own: one that is given might be in use by others, or hold what we have counted before.
    """
    os.environ.pop(METRICS, None)
    server.metrics_folder = None
    for parent in folders():
        remove_dead_folders(parent)
    for parent in folders():
        with contextlib.suppress(OSError):
            if shutil.disk_usage(parent).free >= METRICS_ROOM * server.cfg.workers:
                # Under its name only when it is locked: until then it would look like one that was left behind.
                unnamed = tempfile.mkdtemp(prefix="new-", dir=parent)
                fcntl.flock(os.open(unnamed, os.O_RDONLY), fcntl.LOCK_EX)
                open(os.path.join(unnamed, "slots"), "x").close()
                folder = os.path.join(parent, METRICS_PREFIX + os.path.basename(unnamed).removeprefix("new-"))
                os.rename(unnamed, folder)
                server.metrics_folder = os.environ[METRICS] = folder
                return
    where = " or ".join(folders())
    server.log.warning(
        "No room for metrics in %s: each worker counts for itself, and /metrics is of one of them", where
    )


def remove_dead_folders(parent):
    """Remove our folders that killed masters have left behind: the living hold a lock on theirs."""
    for folder in glob.glob(os.path.join(glob.escape(parent), METRICS_PREFIX + "*")):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, lock)
            if os.fstat(lock).st_uid == os.geteuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


def post_worker_init(worker):
    """Log what gevent and threads would print: a JSON line, and ten of a kind a second at most.

    Being out of file descriptors, for one, ends no worker: gevent tries to accept connections again, at least once a
    second, and each failure is a traceback to it.
    """
    from app.events import LineLimiter  # not in the master, which gevent has not patched

    worker.log.limiter = LineLimiter(worker.log.error_log)
    hub = gevent.get_hub()
    handle_error = hub.handle_error
    hub.exception_stream = None

    def report(kind, error, trace):
        if not issubclass(kind, hub.NOT_ERROR) and worker.log.allows("unexpected_error", kind.__name__):
            # Of a system call that failed a traceback says no more than the error.
            exc_info = None if issubclass(kind, OSError) else (kind, error, trace)
            worker.log.error("unexpected_error", extra={"reason": str(error)}, exc_info=exc_info)

    def log_error(context, kind, error, trace):
        gevent.spawn(report, kind, error, trace)  # the hub itself may not wait for a lock
        handle_error(context, kind, error, trace)

    hub.handle_error = log_error
    threading.excepthook = lambda args: report(args.exc_type, args.exc_value, args.exc_traceback)


def on_exit(server):
    """Leave nothing behind."""
    if server.metrics_folder:
        shutil.rmtree(server.metrics_folder, ignore_errors=True)
