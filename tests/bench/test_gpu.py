"""`python -m bench gpu` in its short form on the CPU: every measurement is made, or says why it is not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.measures import SHORT, GpuBench

ROOT = Path(__file__).parents[2]


def check(found: dict[str, Any], names: set[str]) -> None:
    """Every measurement was made that needs neither a GPU nor hours."""
    assert set(found["reasons"]) == {"ddp_images_s", "gpu_tests", "dissertation_rows"}
    assert all(found[name] is None for name in found["reasons"])
    assert set(found["raw_images_s"]) == {f"{name}_{precision}" for name in names for precision in ("bf16", "fp32")}
    for name in ("raw_images_s", "pipeline_images_s", "feeder_images_s"):
        assert min(found[name].values()) > 0
    assert set(found["pipeline_over_raw"]) == set(found["maps_against_captum"]) == names
    assert max(found["maps_against_captum"].values()) <= 1e-4
    assert set(found["predictor"]) == {"batch_1", "batch_1_with_maps", "batch_8", "batch_8_with_maps"}
    assert found["closeness_to_cpu"] == {"probabilities": 0.0, "maps": 0.0}
    assert found["decoded_images_s"] > 0
    served = found["served"]
    assert min(served.values()) > 0
    assert served["share_of_raw"] == pytest.approx(served["images_s"] / served["raw_images_s"], abs=0.01)


@pytest.mark.long
def test_the_smallest_network_is_measured_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.gpu.measures.SHORT", SHORT[:1])
    check(GpuBench("cpu", True, 9999.0, tmp_path).run(), {"custom_cnn_32"})


@pytest.mark.soak
def test_the_short_form_measures_on_a_cpu_without_ray(tmp_path: Path) -> None:
    code = (
        "import sys; from bench.__main__ import app; from cluster.cli import run; "
        "code = run(['gpu', '--device', 'cpu', '--short', '--limit-s', '9999', '--json'], app, 'bench'); "
        "sys.exit(code or 'ray' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RELOOK_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    check(json.loads(done.stdout), {"custom_cnn_32", "custom_cnn_64"})


def test_the_predictor_of_the_service_is_measured_beside_a_fake_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.gpu.measures.SHORT", SHORT[:1])
    found = GpuBench("cpu", True, 9999.0, tmp_path, only=("served",), fake_s=0.5).run()
    assert found["reasons"] == {}
    assert "raw_images_s" not in found
    served = found["served"]
    assert served["raw_images_s"] == 128.0
    # One batch at a time; where the first and the last batch begin and end makes the rate of few batches inexact.
    assert 0 < served["share_of_raw"] < 1.5
    assert served["p50_ms"] >= 500


def test_a_machine_without_a_gpu_gets_one_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = GpuBench("cuda", True, 400.0, tmp_path).run()
    assert set(found["reasons"].values()) == {"torch sees no GPU here; --device cpu measures the CPU"}
    assert all(found[name] is None for name in found["reasons"])


def test_what_no_time_is_left_for_is_said(tmp_path: Path) -> None:
    found = GpuBench("cpu", True, -1.0, tmp_path).run()
    assert set(found["reasons"].values()) == {"no time was left of -1 s"}
