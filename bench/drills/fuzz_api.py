"""Fuzz a real service: schemathesis over its OpenAPI contract, then malformed uploads.

.venv/bin/python -m bench.drills.fuzz_api --uploads 10000 --examples 200

Starts `relook serve` with a small model in a temporary folder. Prints one JSON object; the exit code is 1 if
schemathesis finds anything, an upload gets a 5xx response, a process dies, or the processes' memory grows by more than
5 % between the first third of the uploads and the end.
"""

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.processes import processes_with
from bench.serve.malformed import malformed_upload
from records.settings import RecordsSettings
from records.store import open_store
from serving.access.keys import admin_token
from serving.client import Client

ROOT = Path(__file__).resolve().parents[2]
SEED = 2026
START_TIMEOUT_S = 180.0
GROWTH_ALLOWED = 0.05


def main() -> int:
    """Run both halves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uploads", type=int, default=10_000, help="malformed uploads")
    parser.add_argument("--examples", type=int, default=200, help="of schemathesis, for each operation and phase")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="relook-fuzz-") as folder:
        home = Path(folder) / "home"
        _make_model(home, Path(folder) / "images")
        with _served(home) as (url, process):
            report = {
                "contract": contract(url, home, options.examples),
                "uploads": uploads(url, process, options.uploads),
            }
    failed = [name for name, part in report.items() if not part["holds"]]
    print(json.dumps({**report, "failed": failed}, indent=2))
    return 1 if failed else 0


def contract(url: str, home: Path, examples: int) -> dict[str, Any]:
    """Run schemathesis against the published contract."""
    with contextlib.closing(open_store(RecordsSettings(home=home))) as store:
        token = admin_token(store.home)
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "--config-file", str(ROOT / "tests" / "serving" / "schemathesis.toml"),
        "run", f"{url}/openapi.json", "--header", f"Authorization: Bearer {token}", "--seed", str(SEED),
        "--max-examples", str(examples), "--no-color", "--continue-on-failure", "--workers", "1",
        "--suppress-health-check", "all", "--generation-database", "none",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=home)
    counted = re.search(r"^\s*(\d+) generated.*$", done.stdout, re.MULTILINE)
    if done.returncode != 0:
        print(done.stdout[-20_000:], file=sys.stderr)
    cases = int(counted[1]) if counted else 0
    return {"cases": counted[0].strip() if counted else "", "holds": done.returncode == 0 and cases > 0}


def uploads(url: str, process: psutil.Process, count: int) -> dict[str, Any]:
    """Send malformed uploads; watch responses, processes and memory."""
    statuses: Counter[int] = Counter()
    faults: list[str] = []
    replicas = processes_with("ServeReplica:relook:", below=process)
    early_mb, slowest_s = 0.0, 0.0
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        for number in range(count):
            # Not from the start: the first uploads import decoders and fill caches, which is no leak.
            if number == count // 3:
                early_mb = _memory_mb(replicas)
            upload = malformed_upload(SEED, number)
            headers = {"Content-Type": upload.content_type} if upload.content_type else {}
            started = time.monotonic()
            response = http.post(upload.path, content=upload.body, headers=headers)
            slowest_s = max(slowest_s, time.monotonic() - started)
            statuses[response.status_code] += 1
            is_problem = response.headers["content-type"].startswith("application/problem+json")
            if response.status_code >= 500 or (response.status_code >= 400 and not is_problem):
                faults.append(f"upload {number}: {response.status_code} {response.text[:200]}")
    alive = bool(replicas) and all(replica.is_running() for replica in replicas)
    growth = _memory_mb(replicas) / early_mb - 1 if alive else None
    return {
        "statuses": {str(status): statuses[status] for status in sorted(statuses)},
        "faults": faults[:20],
        "slowest_s": round(slowest_s, 3),
        "processes": len(replicas),
        "memory_growth": None if growth is None else round(growth, 4),
        "holds": not faults and growth is not None and growth <= GROWTH_ALLOWED,
    }


def _memory_mb(processes: list[psutil.Process]) -> float:
    return float(sum(process.memory_info().rss for process in processes)) / 1e6


def _relook(home: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    subprocess.run(command, env=_environ(home), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def _make_model(home: Path, images: Path) -> None:
    _relook(home, "data", "synth", str(images), "--lesions", "80")
    _relook(home, "data", "import", str(images))
    _relook(home, "train", "--set", "trainers.epochs=2")
    (path,) = (home / "bundles").iterdir()
    _relook(home, "promote", path.name, "--provisional")


@contextlib.contextmanager
def _served(home: Path) -> Iterator[tuple[str, psutil.Process]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "cluster.cli", "serve", "--port", str(port)]
    with (home / "serve.log").open("w") as log:
        service = subprocess.Popen(
            command, env=_environ(home), cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            with Client(url, retry_s=START_TIMEOUT_S) as client:
                client.model()
            yield url, psutil.Process(service.pid)
        finally:
            service.terminate()
            service.wait(60)


def _environ(home: Path) -> dict[str, str]:
    return {**os.environ, "RELOOK_HOME": str(home)}


if __name__ == "__main__":
    sys.exit(main())
