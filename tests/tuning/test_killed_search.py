"""A search that is killed goes on and decides as one that nobody killed; `bench.drills.chaos_tune` kills more often.

Part of the soak, since it starts Ray three times. In the suite, `test_ray_search` and `test_population` interrupt a
search under Ray or cut off its journal, and go on.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.soak
def test_a_killed_search_decides_as_one_that_was_left_alone() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "bench.drills.chaos_tune",
            "--rounds",
            "1",
            "--kills",
            "1",
            "--at-a-time",
            "1",
            "--epoch-s",
            "0.1",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert (found["victims"], found["kills_took_effect"], found["wrong"]) == (["driver"], 1, [])
    # Every trial has its first decision, so that a search which lost its trials is seen.
    assert found["decisions"] >= 9
