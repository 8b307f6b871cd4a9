"""Measuring: what cannot be measured is None with a reason, and the verb stands in the group that rooms share."""

import csv
from pathlib import Path

import pytest

from bench.train.peers import Peers
from bench.train.raw import raw_rate
from records.datasets import build_version
from records.store import Store
from trainers.fitting.training_data import DataPlan, plan_data
from trainers.settings import ModelSettings, TrainersSettings, WorkersSettings


@pytest.fixture
def plan(filled_store: Store) -> DataPlan:
    return plan_data(build_version(filled_store).version, filled_store.taxonomy)


def test_the_table_names_the_images_of_the_plan(filled_store: Store, plan: DataPlan, tmp_path: Path) -> None:
    Peers(filled_store, TrainersSettings(), plan, tmp_path)
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows].count("train") == plan.num_train
    assert len(rows) == len(plan.image_ids)
    assert all(row["label"] in filled_store.taxonomy.codes for row in rows)


def test_what_cannot_be_measured_has_a_reason(filled_store: Store, plan: DataPlan, tmp_path: Path) -> None:
    unknown = Peers(filled_store, TrainersSettings(model=ModelSettings(name="custom_cnn_base")), plan, tmp_path)
    assert unknown.plain_rate() is None
    assert "knows custom_cnn, resnet18, efficientnet_lite0, not custom_cnn_base" in str(unknown.reasons)
    absent = Peers(filled_store, TrainersSettings(), plan, tmp_path)
    assert absent.lightning_rate(None) is None
    assert "unless --peers names" in absent.reasons["pipeline_over_lightning"]
    python = tmp_path / "lightning" / "bin" / "python"
    python.parent.mkdir(parents=True)
    assert absent.lightning_rate(tmp_path) is None
    assert "unless --peers names" in absent.reasons["pipeline_over_lightning"]
    python.symlink_to("/bin/false")
    assert absent.lightning_rate(tmp_path) is None
    assert "bench/train/lightning_script.py failed: no message" in absent.reasons["pipeline_over_lightning"]
    python.unlink()
    python.write_text("not a program")
    python.chmod(0o755)
    assert absent.lightning_rate(tmp_path) is None
    assert "did not run (OSError)" in absent.reasons["pipeline_over_lightning"]


def test_bare_steps_have_a_rate() -> None:
    settings = TrainersSettings(
        model=ModelSettings(side_px=32),
        batch_size=4,
        precision="fp32",
        workers=WorkersSettings(threads=1, use_gpu=False),
    )
    assert raw_rate(settings, 7, seconds=0.0) > 0
