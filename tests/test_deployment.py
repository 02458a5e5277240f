"""The Procfile's own line in a PaaS's environment."""

import os
import subprocess
import sys
from pathlib import Path

import requests

from tests.conftest import SECRET, token
from tests.servers import ROOT, free_port, running, until
from tests.test_tls import authority, urls  # noqa: F401  # fixtures: a Redis with a certificate of its own making


def test_procfile(urls: dict[str, str], tmp_path: Path) -> None:  # noqa: F811
    """Port, workers, a self-signed Redis and a router in front: the first heartbeat is a 200, and SIGTERM ends it."""
    [line] = (ROOT / "Procfile").read_text().splitlines()
    port = free_port()
    environ = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PORT": str(port),
        "WEB_CONCURRENCY": "2",
        "REDIS_URL": "redis://127.0.0.1:1",  # which a PaaS sets, too
        "REDIS_TLS_URL": urls["loopback"],
        "REDIS_TLS_VERIFY": "off",
        "JWT_SECRET": SECRET,
        "TRUSTED_PROXIES": "1",
    }
    address = f"http://127.0.0.1:{port}"
    headers = {"Authorization": f"Bearer {token()}", "X-Forwarded-For": "198.51.100.1, 203.0.113.9"}
    command = line.removeprefix("web: ").split()
    with running(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL) as process:
        until(lambda: requests.get(f"{address}/readyz").status_code == 200)
        session = requests.post(f"{address}/sessions", headers=headers).json()["session"]
        assert session["ipAddress"] == "203.0.113.9"
        assert requests.post(f"{address}/sessions/{session['id']}/heartbeat", headers=headers).status_code == 200
        process.terminate()
        assert process.wait(12) == 0
