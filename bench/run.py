"""Measures the heartbeat against empty routes and a plain heartbeat, in about three minutes, on loopback only.

    python bench/run.py [--json] [--smoke]

Needs wrk and redis-server. Prints a table, or JSON with --json; --smoke only shows that everything works, in seconds.
"""

import argparse
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from app.config import Config  # noqa: E402
from app.store import SessionStore, session_key  # noqa: E402
from app.store.server import OnePrimary  # noqa: E402
from tests.servers import RedisServer, free_port, running, until  # noqa: E402

SUBJECT = "bench"
SECRET = "a-secret-for-the-benchmark-and-nothing-else"


OURS = ("-c", str(ROOT / "gunicorn.conf.py"))
# What a plain install does. The folder of the service is another one: gunicorn would find our gunicorn.conf.py.
STOCK = ("-k", "gevent", "--http-parser", "python", "--no-control-socket")


class Service:
    """One WSGI app under gunicorn."""

    def __init__(
        self,
        stack: ExitStack,
        app: str,
        workers: int,
        options: Sequence[str] = OURS,
        folder: Path = ROOT,
        **environ: str,
    ) -> None:
        self.port = free_port()
        self._number = workers
        env = {**os.environ, "PORT": str(self.port), "WEB_CONCURRENCY": str(workers), **environ}
        command = [sys.executable, "-m", "gunicorn", app, *options, "--log-level", "warning"]
        env["PYTHONPATH"] = str(ROOT)
        self._process = stack.enter_context(running(command, cwd=folder, env=env, stdout=subprocess.DEVNULL))

    def wait_until_ready(self) -> None:
        """Several services start faster together than one after the other."""
        until(lambda: len(self._workers()) == self._number and self._answers(), 60)

    def stop(self) -> None:
        self._process.terminate()

    def drive(self, requests: Path, connections: int, seconds: float, body: Path | None = None) -> dict[str, float]:
        """Send requests as fast as answers come back. A request that fails ends the benchmark."""
        threads = str(min(connections, 2))
        command = ["wrk", "-t", threads, "-c", str(connections), "-d", f"{seconds}s", "--timeout", "10s", "-s"]
        command += [str(ROOT / "bench/load.lua"), f"http://127.0.0.1:{self.port}", "--", str(requests)]
        command += [str(body)] if body else []
        output = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30, check=True).stdout
        result: dict[str, float] = json.loads(output.splitlines()[-1])
        if result["errors"] or not result["requests"]:
            raise SystemExit(f"{result['errors']:.0f} of {result['requests']:.0f} requests failed")
        return result

    def memory_mib(self) -> float:
        """Resident memory of the workers together."""
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self._workers())
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def _workers(self) -> list[str]:
        pid = self._process.pid
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()

    def _answers(self) -> bool:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
            connection.request("GET", "/")
            return connection.getresponse().status > 0


class Bench:
    """The servers, the requests and the figures."""

    def __init__(self, stack: ExitStack, folder: Path, smoke: bool) -> None:
        self._folder = folder
        self._seconds = 1 if smoke else 2
        self._rounds = 1 if smoke else 5
        self._many = 10_000 if smoke else 1_000_000
        self._connections = 2 if smoke else 64
        workers = 1 if smoke else 2
        self.redis = stack.enter_context(RedisServer(folder))
        keys = {"RS256": rsa.generate_private_key(65537, 2048), "ES256": ec.generate_private_key(ec.SECP256R1())}
        self._signers = {"HS256": SECRET, **{name: _private_pem(key) for name, key in keys.items()}}
        ours = {"REDIS_URL": self.redis.url, "SESSION_LIMIT": "1000"}
        self.ours = Service(stack, "wsgi:app", workers, JWT_SECRET=SECRET, **ours)
        self.asymmetric = {
            name: Service(stack, "wsgi:app", workers, JWT_PUBLIC_KEY=_public_pem(key), **ours)
            for name, key in keys.items()
        }
        self.stock = Service(stack, "bench.empty:app", workers, STOCK, folder)
        self.empty = Service(stack, "bench.empty:app", workers)
        self.plain = Service(stack, "bench.plain:app", workers, JWT_SECRET=SECRET, REDIS_URL=self.redis.url)
        self._services = [self.ours, *self.asymmetric.values(), self.stock, self.empty, self.plain]
        for service in self._services:
            service.wait_until_ready()

    def stop(self) -> None:
        """Have all services stop at the same time."""
        for service in self._services:
            service.stop()

    def figures(self) -> dict[str, Any]:
        self._fill(1000)
        one = self._requests("one", 1000)
        asymmetric = {name: self._requests(name, 1000, algorithm=name) for name in self.asymmetric}
        distinct = self._requests("distinct", 10_000, tokens=10_000)
        batch, batch_body = self._batch(1000)
        self._drive(self.ours, one)
        memory_before = self.ours.memory_mib()
        seen: dict[str, list[dict[str, float]]] = defaultdict(list)
        for _ in range(self._rounds):
            seen["stock"].append(self._drive(self.stock, one))
            seen["empty"].append(self._drive(self.empty, one))
            seen["plain"].append(self._drive(self.plain, one))
            seen["ours"].append(self._drive(self.ours, one))
            for name, service in self.asymmetric.items():
                seen[name].append(self._drive(service, asymmetric[name]))
            seen["distinct"].append(self._drive(self.ours, distinct))
            seen["plain, alone"].append(self._drive(self.plain, one, connections=1))
            seen["ours, alone"].append(self._drive(self.ours, one, connections=1))
            seen["batch"].append(self._drive(self.ours, batch, connections=8, body=batch_body))
        memory_after = self.ours.memory_mib()
        trips = {n: self._round_trips(one, n) for n in (1, 64)}
        few_sessions, many_sessions = (self._requests(f"{n}", 100_000, sessions=n) for n in (1000, self._many))
        seen["few"] = [self._drive(self.ours, few_sessions) for _ in range(self._rounds)]
        self._fill(self._many)
        seen["many"] = [self._drive(self.ours, many_sessions) for _ in range(self._rounds)]
        rate = {name: [r["per_second"] for r in results] for name, results in seen.items()}
        ms = {name: [r["mean_ms"] for r in results] for name, results in seen.items()}
        per_second = {name: statistics.median(rates) for name, rates in rate.items()}
        return {
            "heartbeats per second, 64 connections": per_second["ours"],
            "stock empty route per second": per_second["stock"],
            "empty route under gunicorn.conf.py per second": per_second["empty"],
            "plain heartbeats per second": per_second["plain"],
            "heartbeat ÷ stock empty route": ratio(rate["ours"], rate["stock"]),
            "heartbeat ÷ empty route under gunicorn.conf.py": ratio(rate["ours"], rate["empty"]),
            "heartbeat ÷ plain heartbeat": ratio(rate["ours"], rate["plain"]),
            "RS256 ÷ HS256": ratio(rate["RS256"], rate["ours"]),
            "ES256 ÷ HS256": ratio(rate["ES256"], rate["ours"]),
            "10,000 tokens ÷ one token": ratio(rate["distinct"], rate["ours"]),
            "alone: latency, ms": statistics.median(ms["ours, alone"]),
            "alone: latency ÷ plain heartbeat's": ratio(ms["ours, alone"], ms["plain, alone"]),
            "sessions per second by calls of 1000": per_second["batch"] * 1000,
            "calls of 1000 ÷ single calls": ratio(rate["batch"], rate["ours"]) * 1000,
            f"{self._many:,} sessions ÷ 1,000 sessions": ratio(rate["many"], rate["few"]),
            "bytes in Redis per session": self._bytes_per_session(),
            "p50, ms": statistics.median(r["p50_ms"] for r in seen["ours"]),
            "p99, ms": statistics.median(r["p99_ms"] for r in seen["ours"]),
            "p99 ÷ stock empty route's": ratio(*([r["p99_ms"] for r in seen[name]] for name in ("ours", "stock"))),
            "worker memory before, MiB": memory_before,
            "worker memory after, MiB": memory_after,
            "round trips per heartbeat, alone": trips[1],
            "round trips per heartbeat, 64 connections": trips[64],
        }

    def _drive(self, service: Service, requests: Path, connections: int = 64, **options: Any) -> dict[str, float]:
        return service.drive(requests, min(connections, self._connections), self._seconds, **options)

    def _fill(self, number: int) -> None:
        """Sessions 1 to `number` of one subject, in an otherwise empty Redis."""
        fill = self.redis.client.register_script((ROOT / "bench/fill.lua").read_text())
        for first in range(1, number + 1, 20_000):
            fill(args=[session_key(SUBJECT, ""), first, min(first + 19_999, number)])

    def _requests(self, name: str, lines: int, sessions: int = 1000, algorithm: str = "HS256", tokens: int = 1) -> Path:
        """A file for load.lua: `lines` heartbeats over so many sessions and tokens, in turn."""
        signed = [self._token(algorithm, number) for number in range(tokens)]
        ids = [f"{1 + i * sessions // lines if sessions > lines else 1 + i % sessions:032d}" for i in range(lines)]
        path = self._folder / name
        path.write_text("".join(f"{signed[i % tokens]} /sessions/{id}/heartbeat\n" for i, id in enumerate(ids)))
        return path

    def _batch(self, sessions: int) -> tuple[Path, Path]:
        requests, body = self._folder / "batch", self._folder / "body"
        requests.write_text(f"{self._token('HS256')} /sessions/heartbeat\n")
        body.write_text(json.dumps({"ids": [f"{i:032d}" for i in range(1, sessions + 1)]}))
        return requests, body

    def _token(self, algorithm: str, number: int = 0) -> str:
        claims = {"sub": SUBJECT, "exp": int(time.time()) + 3600, "jti": f"{number:032d}"}
        return jwt.encode(claims, self._signers[algorithm], algorithm)

    def _round_trips(self, requests: Path, connections: int) -> float:
        """Reads that Redis did from its sockets, by its own count, for each heartbeat."""
        before = self._redis_reads()
        heartbeats = self._drive(self.ours, requests, connections)["requests"]
        return (self._redis_reads() - before) / heartbeats

    def _redis_reads(self) -> int:
        return int(self.redis.client.info("stats")["total_reads_processed"])

    def _bytes_per_session(self) -> float:
        """What a thousand subjects with three sessions each take, indexes included."""
        self.redis.client.flushall()
        store = SessionStore(Config(redis_url=self.redis.url), OnePrimary(self.redis.client))
        store.open("warm-up", login_method="token")
        before = self.redis.client.info("memory")["used_memory"]
        for i in range(3000):
            store.open(
                str(uuid.UUID(int=i // 3)), login_method="token", device_name="Pixel 9 Pro", ip_address="203.0.113.195"
            )
        return (self.redis.client.info("memory")["used_memory"] - before) / 3000


def ratio(ones: list[float], others: list[float]) -> float:
    """The median of the ratios within each round: between rounds the machine changes."""
    return statistics.median(one / other for one, other in zip(ones, others))


def _private_pem(key: Any) -> str:
    pem: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem.decode()


def _public_pem(key: Any) -> str:
    pem: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--smoke", action="store_true", help="one short round, for a look whether it works")
    options = parser.parse_args()
    if missing := [program for program in ("wrk", "redis-server") if not shutil.which(program)]:
        raise SystemExit(f"missing: {', '.join(missing)} (apt-get install wrk redis-server)")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(stack, folder, options.smoke)
        figures = bench.figures()
        bench.stop()
    if options.json:
        print(json.dumps(figures, ensure_ascii=False, indent=2))
    else:
        for name, value in figures.items():
            print(f"{name:45} {value:>12,.2f}")


if __name__ == "__main__":
    main()
