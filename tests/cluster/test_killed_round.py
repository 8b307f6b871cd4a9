"""A round that is killed between two writes goes on to the same end; `bench/kill_matrix.py` kills between all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = 3


@pytest.mark.slow
def test_a_killed_round_ends_as_one_that_was_left_alone() -> None:
    done = subprocess.run(
        [sys.executable, "bench/kill_matrix.py", "--points", str(SHORT)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["different"] == {}
    assert found["killed"] == len(found["kill_points"]) == SHORT
    # Kill points are counted, so that a step which loses its writes, or a hook which loses its grip, is seen.
    assert set(found["writes_by_step"]) == {
        *("begin", "collect", "version", "tune", "fit", "evaluate", "gate", "rollout", "select", "push")
    }
    assert found["writes"] >= 60
    assert found["reference"]["rounds_started"] == 1
    assert sum(found["reference"]["rollouts"].values()) == 1
    assert len(set(found["reference"]["questions"])) == len(found["reference"]["questions"]) == 5
