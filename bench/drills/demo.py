"""Wall time and memory of the demo, measured from outside, as one JSON object.

.venv/bin/python -m bench.drills.demo [--data DIR] [--keep DIR]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.drills.watched import watch


def main() -> int:
    """Run the demo in a home of its own and print time and memory; the exit code is the demo's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of images; default: generated ones")
    parser.add_argument("--keep", type=Path, help="home to keep; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="relook-bench-") as temporary:
        home = arguments.keep or Path(temporary) / "home"
        command = [sys.executable, "-m", "cluster.cli", "demo"]
        measured = watch(
            [*command, "--data", arguments.data] if arguments.data else command, {"RELOOK_HOME": str(home)}
        )
        summary = home / "demo" / "summary.json"
        stages = json.loads(summary.read_text())["seconds"] if summary.is_file() else {}
    print(
        json.dumps(
            {**machine(), "data": arguments.data or "generated", **measured.as_json(), "stages_s": stages}, indent=2
        )
    )
    return measured.exit_code


def machine() -> dict[str, Any]:
    """Return what the figures depend on: cores, memory, commit."""
    import psutil

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    memory_gb = round(psutil.virtual_memory().total / 1e9)
    return {"cores": os.cpu_count(), "memory_gb": memory_gb, "commit": commit.stdout.strip()}


if __name__ == "__main__":
    sys.exit(main())
