"""A fit that waits for a lost node says so, once, and says when it goes on."""

import threading

import pytest

from trainers.fitting.scarcity import told_of_scarcity


def test_waiting_is_told_once_and_so_is_going_on(caplog: pytest.LogCaptureFixture) -> None:
    answers = iter([{"CPU": 4.0}, {"CPU": 2.0}, {"CPU": 2.0}, {"CPU": 3.0, "GPU": 1.0}])
    asked = threading.Event()

    def available() -> dict[str, float]:
        found = next(answers, None)
        if found is None:
            asked.set()
            return {"CPU": 3.0}
        return found

    with told_of_scarcity({"CPU": 3}, available, every_s=0.01):
        assert asked.wait(10)
    waits, goes_on = (record.getMessage() for record in caplog.records)
    assert "needs 3 CPUs and Ray has 2" in waits
    assert "--resume" in waits
    assert "goes on" in goes_on


def test_a_missing_gpu_is_named(caplog: pytest.LogCaptureFixture) -> None:
    asked = threading.Event()

    def available() -> dict[str, float]:
        if len(caplog.records) > 0:
            asked.set()
        return {"CPU": 8.0}

    with told_of_scarcity({"CPU": 2, "GPU": 2}, available, every_s=0.01):
        assert asked.wait(10)
    (waits,) = (record.getMessage() for record in caplog.records)
    assert "needs 2 GPUs and Ray has 0" in waits
