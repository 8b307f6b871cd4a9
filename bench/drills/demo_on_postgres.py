"""The whole demo twice: on SQLite and files, and on a real PostgreSQL and an S3 endpoint. The summaries must be equal.

PostgreSQL is Debian's, run as an unprivileged user with a password on a TCP port; the S3 endpoint is `moto`'s server,
in an environment of its own (`--moto` names an existing one). Both runs are made independent of the clock: requests
are sent one after another, trials run to completion, and the audit sample is off. What still differs (times, ids of
predictions, amount of background traffic) is left out of the comparison and listed.

    python -m bench.drills.demo_on_postgres [--lesions 260] [--moto VENV] [--keep FOLDER]
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.serve.peers import free_port

MOTO = "moto[s3,server]==5.2.5"
POSTGRES = Path("/usr/lib/postgresql/15/bin")
POSTGRES_USER = "postgres"
BUCKET = "relook"
STEADY = (
    "demo.concurrency=1",
    "serving.audit_share=0",
    "tuning.scheduler=none",
    "tuning.max_concurrent=1",
    "demo.withhold_share=0.4",
    "demo.requests=90",
    "trainers.epochs=3",
    "tuning.trials=2",
    "tuning.trial_epochs=2",
    "tuning.confirm_seeds=1",
    "serving.start_timeout_s=900",
    "tuning.max_train_images=120",
    "round.select_budget=5",
)
BY_NATURE = (
    "seconds",
    "served",
    "label_studio.tasks_pushed",
    "swap.requests",
    "swap.wait_s",
    "swap.model_id",
    "trace.prediction_id",
    "trace.steps",
)
"""Parts of a summary that differ even between two demos on the same database."""


def wait_for(port: int, timeout_s: float = 60.0) -> None:
    """Wait until something listens on a port of this machine."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens on port {port} after {timeout_s:g} s")


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Run a PostgreSQL of our own.

    Yields:
        Its SQLAlchemy URL, password included.
    """
    password, port = secrets.token_hex(12), free_port()
    # PostgreSQL refuses to run as root, and an unprivileged user cannot read below a private temporary folder.
    folder.mkdir()
    folder.chmod(0o755)
    data = folder / "data"
    data.mkdir()
    secret = folder / "password"
    secret.write_text(password)
    run_as: dict[str, Any] = (
        {"user": POSTGRES_USER, "group": POSTGRES_USER, "extra_groups": []} if os.geteuid() == 0 else {}
    )
    if run_as:
        for path in (data, secret):
            shutil.chown(path, POSTGRES_USER, POSTGRES_USER)
    initdb: list[str | Path] = [
        POSTGRES / "initdb",
        "-D",
        data,
        "-U",
        "relook",
        "--auth=scram-sha-256",
        f"--pwfile={secret}",
        "-E",
        "UTF8",
    ]
    subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, cwd=data, **run_as)
    options = ["-h", "127.0.0.1", "-p", str(port), "-k", "", "-c", "max_connections=200"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [POSTGRES / "postgres", "-D", data, *options], stdout=log, stderr=log, cwd=data, **run_as
        )
    try:
        wait_for(port)
        yield f"postgresql+psycopg://relook:{password}@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        server.wait(timeout=60)


@contextlib.contextmanager
def object_store(venv: Path, folder: Path) -> Iterator[str]:
    """Run an S3 endpoint with one bucket.

    Yields:
        The URL of the bucket, as `RELOOK_BLOBS` takes it.
    """
    if not (venv / "bin" / "moto_server").exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([venv / "bin" / "pip", "install", "--quiet", MOTO], check=True)
    port = free_port()
    with (folder / "objects.log").open("w") as log:
        server = subprocess.Popen(
            [venv / "bin" / "moto_server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
    try:
        wait_for(port)
        make = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
        with urllib.request.urlopen(make, timeout=30):
            pass
        yield f"s3://{BUCKET}/blobs?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    finally:
        server.terminate()
        server.wait(timeout=60)


def run_demo(home: Path, lesions: int, places: dict[str, str]) -> tuple[dict[str, Any], float]:
    """Run the demo in a home; return its summary and how long it took, seconds.

    Raises:
        SystemExit: the demo failed.
    """
    variables = {
        "RELOOK_HOME": str(home),
        "RELOOK_SERVING__PORT": str(free_port()),
        "RELOOK_LABELING__PORT": "0",
        "AWS_ACCESS_KEY_ID": "relook",
        "AWS_SECRET_ACCESS_KEY": "relook",
        "AWS_EC2_METADATA_DISABLED": "true",
        **places,
    }
    settings = [part for setting in (*STEADY, f"demo.synth_lesions={lesions}") for part in ("--set", setting)]
    began = time.monotonic()
    command = [sys.executable, "-m", "cluster.cli"]
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [*command, "demo", "--json", *settings], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    seconds = time.monotonic() - began
    if done.returncode != 0:
        raise SystemExit(f"the demo in {home} ended with {done.returncode}")
    verified = subprocess.run(
        [*command, "audit", "verify", "--json"], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    if not json.loads(verified.stdout)["whole"]:
        raise SystemExit(f"the audit chain of {home} is broken")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary, seconds


def comparable(summary: dict[str, Any]) -> dict[str, Any]:
    """Flatten a summary without what always differs; counts of the traffic that must be 0 stay."""
    flat: dict[str, Any] = {"served.failed": summary["served"]["failed"]}

    def add(prefix: str, value: Any) -> None:
        if prefix in BY_NATURE:
            return
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else key, inner)
        elif isinstance(value, list):
            for number, inner in enumerate(value):
                add(f"{prefix}.{number}", inner)
        else:
            flat[prefix] = value

    add("", summary)
    return flat


def main() -> int:
    """Run both demos and print the differences as JSON; exit with 0 if there are none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lesions", type=int, default=260, help="lesions to generate")
    parser.add_argument("--moto", type=Path, help="environment with moto's server; default: a new one")
    parser.add_argument("--keep", type=Path, help="empty folder that keeps homes and logs; default: they are removed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="relook-postgres-") as scratch:
        os.chmod(scratch, 0o755)
        folder = (arguments.keep or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        venv = (arguments.moto or folder / "moto").resolve()
        with postgres(folder / "postgres") as database, object_store(venv, folder) as blobs:
            there, there_s = run_demo(
                folder / "home-there", arguments.lesions, {"RELOOK_DATABASE": database, "RELOOK_BLOBS": blobs}
            )
        left = [path for path in (folder / "home-there" / "blobs").rglob("*") if path.is_file()]
        local_database = (folder / "home-there" / "ledger.db").exists()
        here, here_s = run_demo(folder / "home-here", arguments.lesions, {})
    one, other = comparable(here), comparable(there)
    different = {
        key: [one.get(key), other.get(key)]
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    }
    print(
        json.dumps(
            {
                "compared": len(one),
                "different": different,
                "not_compared": BY_NATURE,
                "sqlite_and_files_s": round(here_s),
                "postgres_and_s3_s": round(there_s),
                "files_beside_the_bucket": len(left),
                "sqlite_beside_postgres": local_database,
                "rounds": there["rounds"],
            },
            indent=2,
        )
    )
    return 1 if different or left or local_database else 0


if __name__ == "__main__":
    sys.exit(main())
