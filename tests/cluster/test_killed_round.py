"""A round killed between two writes resumes to the same result; `bench.drills.kill_matrix` tests all points."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = 1
KILL_POINTS = {
    "begin": 12, "collect": 1, "version": 3, "tune": 1, "fit": 35, "evaluate": 11, "gate": 15, "rollout": 6,
    "select": 1, "push": 7,
}  # fmt: skip
"""Number of writes by step; a round can be killed before each of them."""


@pytest.mark.slow
def test_a_killed_round_ends_like_an_undisturbed_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.drills.kill_matrix", "--points", str(SHORT)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["different"] == {}
    assert found["killed"] == len(found["kill_points"]) == SHORT
    # All points are counted, so that a step with fewer writes, or a hook that misses writes, is noticed.
    assert found["writes_by_step"] == KILL_POINTS
    assert found["writes"] == sum(KILL_POINTS.values()) == 92
    assert found["reference"]["rounds_started"] == 1
    assert sum(found["reference"]["rollouts"].values()) == 1
    assert len(set(found["reference"]["review_items"])) == len(found["reference"]["review_items"]) == 5
