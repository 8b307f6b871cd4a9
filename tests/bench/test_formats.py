"""Both number formats are measured for a network, and the one that training takes is named."""

import json
import math

import pytest

from bench.train import formats


def test_a_network_is_measured_in_both_formats(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(formats, "SECONDS", 0.0)
    monkeypatch.setattr("vision.precision.has_native_bf16", lambda device: True)
    monkeypatch.setattr("sys.argv", ["formats", "--side", "32", "--networks", "custom_cnn_base", "mobilenet_v3"])
    formats.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["network"], row["chosen"]) for row in rows] == [("custom_cnn_base", "bf16"), ("mobilenet_v3", "fp32")]
    for row in rows:
        for kind in ("step", "forward"):
            assert set(row[kind]) == {"bf16", "fp32"}
            assert all(math.isfinite(rate) and rate > 0 for rate in row[kind].values())
