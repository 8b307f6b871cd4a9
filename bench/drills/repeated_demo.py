"""Run the demo repeatedly: every run must succeed and leave no process behind. Prints one JSON line per run.

.venv/bin/python -m bench.drills.repeated_demo --minutes 60
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from bench.drills.watched import watch


def main() -> int:
    """Run demos for the given minutes; stop at the first that fails or leaves a process running."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="start no further run after so many minutes")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.minutes * 60
    number = 0
    while number == 0 or time.monotonic() < deadline:
        number += 1
        with tempfile.TemporaryDirectory(prefix="relook-soak-") as home:
            measured = watch([sys.executable, "-m", "cluster.cli", "demo"], {"RELOOK_HOME": str(Path(home) / "home")})
        print(json.dumps({"run": number, **measured.as_json()}), flush=True)
        if measured.exit_code or measured.left_running:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
