"""Event files, read back by TensorBoard's own reader: scalars, settings and images, also of a run that was resumed."""

import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from records.datasets import DatasetVersion, build_version
from records.erasure import EVENT_IMAGES, RECORDS_PLACES, SHOWN_IMAGES, run_erasers
from records.store import Store
from trainers.fitting.epoch_report import EpochReport
from trainers.fitting.fit import METRICS_FILE, fit
from trainers.settings import ModelSettings, TrainersSettings, WorkersSettings
from trainers.tracking import tensorboard
from trainers.tracking.tensorboard import FOLDER, EventFiles

SETTINGS = TrainersSettings(
    model=ModelSettings(side_px=32),
    epochs=3,
    batch_size=32,
    precision="fp32",
    workers=WorkersSettings(threads=1, use_gpu=False),
    augmentation="flips",
)
SCALARS = {
    "loss/train", "loss/val", "val/balanced_accuracy", "val/macro_auc", "val/even_loss", "val/accuracy",
    "val/key_class_sensitivity", "learning_rate", "speed/images_per_s", "speed/epoch_s",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_was_said() -> Iterator[None]:
    tensorboard._said.clear()
    yield
    tensorboard._said.clear()


@pytest.fixture(scope="module")
def dataset(filled_store: Store) -> DatasetVersion:
    return build_version(filled_store).version


@pytest.fixture(scope="module")
def run_dir(filled_store: Store, dataset: DatasetVersion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended in its second epoch, and was resumed by another process."""
    folder = tmp_path_factory.mktemp("run")

    def die(report: EpochReport) -> bool:
        if report.epoch == 2:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        fit(filled_store, SETTINGS, dataset, run_dir=folder, use_ray=False, on_epoch=die)
    # What a kill between the checkpoint and the report leaves.
    lines = (folder / METRICS_FILE).read_text().splitlines()
    (folder / METRICS_FILE).write_text(f"{lines[0]}\n{lines[1][:20]}")
    fit(filled_store, SETTINGS, dataset, run_dir=folder, use_ray=False)
    return folder


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def test_each_epoch_has_its_scalars(run_dir: Path) -> None:
    events = read(run_dir / FOLDER)
    assert set(events.Tags()["scalars"]) == SCALARS
    reports = [EpochReport.model_validate_json(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]
    found = {event.step: event.value for event in events.Scalars("val/balanced_accuracy")}
    assert found == {report.epoch: pytest.approx(report.val_balanced_accuracy) for report in reports}
    assert sorted(found) == [1, 2, 3]


def test_settings_are_hyper_parameters(run_dir: Path) -> None:
    contents = read(run_dir / FOLDER).PluginTagToContent(metadata.PLUGIN_NAME)
    assert set(contents) == {metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG}
    started = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    assert started.hparams["model.name"].string_value == "custom_cnn"
    assert started.hparams["batch_size"].number_value == 32
    assert started.hparams["max_train_images"].string_value == "None"
    assert set(started.hparams) == set(SETTINGS.flat())


def test_images_of_each_epoch(run_dir: Path, dataset: DatasetVersion) -> None:
    events = read(run_dir / EVENT_IMAGES)
    assert set(events.Tags()["images"]) == {"train/augmented", "val/grad_cam"}
    for name in events.Tags()["images"]:
        shown = events.Images(name)
        assert [event.step for event in shown] == [1, 2, 3]
        pixels = [np.asarray(Image.open(io.BytesIO(event.encoded_image_string))) for event in shown]
        assert {one.shape for one in pixels} == {(64, 128, 3)}
        assert (shown[0].height, shown[0].width) == (64, 128)
        # Another draw, or other weights, in each epoch.
        assert not np.array_equal(pixels[0], pixels[1])
    listed = json.loads((run_dir / EVENT_IMAGES / SHOWN_IMAGES).read_text())
    splits = dataset.rows.set_index("image_id").loc[listed, "split"]
    assert splits.value_counts().to_dict() == {"train": 8, "val": 8}


def test_images_do_not_change_what_is_trained(
    run_dir: Path, filled_store: Store, dataset: DatasetVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed = [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]
    monkeypatch.setattr(tensorboard.EpochImages, "write", lambda self, checkpoint: None)
    fit(filled_store, SETTINGS, dataset, run_dir=tmp_path, use_ray=False)
    plain = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [one["val_loss"] for one in plain] == [one["val_loss"] for one in resumed]


def test_an_erased_image_leaves_the_event_files(run_dir: Path, store: Store) -> None:
    kept, gone = (store.home.runs / name / EVENT_IMAGES for name in ("train-kept", "train-gone"))
    for folder, image_id in ((kept, "a" * 64), (gone, "b" * 64)):
        folder.mkdir(parents=True)
        (folder / SHOWN_IMAGES).write_text(json.dumps([image_id]))
        (folder / "events.out.tfevents.1").write_bytes(b"pixels")
    (place,) = [place for place in RECORDS_PLACES if place.name == "event files"]
    run_erasers(store, ["b" * 64], [place])
    assert kept.is_dir()
    assert not gone.exists()


@pytest.mark.parametrize("fault", ["no package", "a file is where the folder should be", "full disk"])
def test_what_cannot_be_written_is_said_once_and_stops_nothing(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events = EventFiles(tmp_path / FOLDER, SETTINGS.flat())
    if fault == "no package":
        monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    elif fault == "full disk":
        (tmp_path / FOLDER).mkdir()
        monkeypatch.setattr(tensorboard.socket, "gethostname", lambda: "x" * 300)  # a name that no disk takes
    else:
        (tmp_path / FOLDER).write_text("")
    events.scalars(1, {"loss/train": 1.0})
    events.scalars(2, {"loss/train": 0.5})
    events.complete([])
    said = capsys.readouterr().err
    assert len(re.findall("TensorBoard", said)) == 1
    assert ("pip install 'relook[tracking]'" in said) == (fault == "no package")


def test_a_step_is_written_once(tmp_path: Path) -> None:
    events = EventFiles(tmp_path, {}, told=[1])
    for step in (1, 2, 2, 3):
        events.scalars(step, {"loss/train": float(step)})
    events.complete([])
    assert [event.step for event in read(tmp_path).Scalars("loss/train")] == [2, 3]
