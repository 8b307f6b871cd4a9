"""Build the Dockerfile's image for real, and train and serve in it as its unprivileged user.

    sudo .venv/bin/python -m bench.drills.image [--base IMAGE] [--volume HOST:CONTAINER ...]

Needs root, `buildah` and `debootstrap` from Debian's packages; no daemon and no registry. Unless `--base` names an
image, the base is a minimal Debian with its Python 3.11 in place of the image that the Dockerfile names. Volumes are
mounted read-only while the image is built, such as a pip.conf that names an index. Prints one JSON object; the exit
code is 1 if a command fails in the container, or the service does not predict.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.serve.peers import free_port
from images.synth import synthesize

ROOT = Path(__file__).resolve().parents[2]
TAG = "localhost/relook"
START_LIMIT_S = 240.0
COMMANDS = (
    "relook --version",
    "python -c 'import relook; relook.train'",
    "relook data synth /tmp/images --lesions 60",
    "relook data import /tmp/images",
    "relook train --set trainers.epochs=1 --set trainers.model.side_px=32",
    "relook promote --provisional $(ls /data/bundles)",
    "relook doctor --json",
)
READS_ONLY = ("relook doctor --json",)
"""Says what is missing, such as Label Studio, which is a container of its own; its exit code is no failure."""


def debian(folder: Path) -> str:
    """Make the base: a minimal Debian with Python, under the name that the Dockerfile's commands expect."""
    packages = "python3,python3-venv,ca-certificates"
    command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(folder)]
    subprocess.run(command, stdout=sys.stderr, check=True)
    (folder / "usr/bin/python").symlink_to("python3")
    container = _buildah("from", "scratch")
    _buildah("copy", container, str(folder), "/")
    _buildah("commit", container, "localhost/python:3.11")
    _buildah("rm", container)
    return "localhost/python:3.11"


def build(base: str, volumes: Sequence[str]) -> float:
    """Build the image; return how long it took, seconds."""
    began = time.monotonic()
    command = ["buildah", "bud", "--isolation", "chroot", "--network", "host", "--format", "docker", "--tag", TAG]
    command += [word for volume in volumes for word in ("--volume", f"{volume}:ro")]
    command += ["--build-arg", f"PYTHON_IMAGE={base}", "--file", str(ROOT / "cluster/deploy/Dockerfile"), str(ROOT)]
    subprocess.run(command, stdout=sys.stderr, check=True)
    return time.monotonic() - began


def run(container: str, command: str, port: int = 0) -> subprocess.Popen[bytes]:
    """Start a shell command in a container, as the image's user; its output goes to stderr."""
    variables = ["--env", f"RELOOK_SERVING__PORT={port}"] if port else []
    words = ["buildah", "run", "--isolation", "chroot", "--network", "host", *variables, container, "--"]
    return subprocess.Popen([*words, "sh", "-c", command], stdout=sys.stderr, stderr=sys.stderr)


def predict(port: int, image: Path) -> dict[str, Any]:
    """Ask the service about an image once it is ready."""
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        with suppress(OSError):
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/predictions",
                data=image.read_bytes(),
                headers={"Content-Type": "image/jpeg"},
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                found: dict[str, Any] = json.load(response)
                return found
        if time.monotonic() > deadline:
            raise SystemExit(f"the service in the container predicted nothing within {START_LIMIT_S:g} s")
        time.sleep(1.0)


def served(container: str) -> dict[str, Any]:
    """Start the service in a container, predict a generated image, stop the service, and return the prediction."""
    port = free_port()
    server = run(container, "echo $$ > /tmp/pid; exec relook serve", port)
    try:
        with tempfile.TemporaryDirectory(prefix="relook-image-") as name:
            synthesize(Path(name), lesions=10, seed=1)
            found = predict(port, next(Path(name).rglob("*.jpg")))
        return {"decision": found["decision"], "model_id": found["model"]["id"]}
    finally:
        # Its process, not buildah's: the service ends its Ray.
        run(container, "kill -INT $(cat /tmp/pid)").wait()
        server.wait(timeout=120)


def _buildah(*words: str) -> str:
    done = subprocess.run(["buildah", *words], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def main() -> int:
    """Build, run the commands, serve and predict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="image to build from; default: a Debian that is made here")
    parser.add_argument("--volume", action="append", default=[], help="HOST:CONTAINER, while the image is built")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("debootstrap and buildah's chroot isolation need root")
    result: dict[str, Any] = {"commands": {}}
    with tempfile.TemporaryDirectory(prefix="relook-image-") as name:
        base = arguments.base or debian(Path(name) / "debian")
    result["build_s"] = round(build(base, arguments.volume))
    container = _buildah("from", TAG)
    try:
        for command in COMMANDS:
            code = run(container, command).wait()
            result["commands"][command] = code
        result["prediction"] = served(container)
    finally:
        _buildah("rm", container)
    failed = [command for command, code in result["commands"].items() if code and command not in READS_ONLY]
    result["holds"] = not failed and bool(result["prediction"]["decision"])
    print(json.dumps(result))
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
