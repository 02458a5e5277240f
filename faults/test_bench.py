"""The benchmark runs and has something to say."""

import json
import signal
import subprocess
import sys

from tests.servers import ROOT, required

FIGURES = {
    "heartbeats per second, 64 connections",
    "stock empty route per second",
    "empty route under gunicorn.conf.py per second",
    "plain heartbeats per second",
    "heartbeat ÷ stock empty route",
    "heartbeat ÷ empty route under gunicorn.conf.py",
    "heartbeat ÷ plain heartbeat",
    "RS256 ÷ HS256",
    "ES256 ÷ HS256",
    "10,000 tokens ÷ one token",
    "alone: latency, ms",
    "alone: latency ÷ plain heartbeat's",
    "sessions per second by calls of 1000",
    "calls of 1000 ÷ single calls",
    "10,000 sessions ÷ 1,000 sessions",
    "bytes in Redis per session",
    "p50, ms",
    "p99, ms",
    "p99 ÷ stock empty route's",
    "worker memory before, MiB",
    "worker memory after, MiB",
    "round trips per heartbeat, alone",
    "round trips per heartbeat, 64 connections",
}


def test_smoke() -> None:
    """A short run gives every figure, and each is more than zero."""
    required("wrk")
    required("redis-server")
    command = [sys.executable, "bench/run.py", "--smoke", "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            output, errors = process.communicate(timeout=180)
        finally:
            process.send_signal(signal.SIGINT)  # unlike SIGTERM it lets the servers be stopped
    assert process.returncode == 0, errors
    figures = json.loads(output)
    assert set(figures) == FIGURES
    assert [name for name, value in figures.items() if not value > 0] == []
