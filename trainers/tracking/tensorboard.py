"""TensorBoard's event files of a run, in its folder: scalars and settings, and images of what each epoch saw.

`EventFiles` is written by the caller's process, `EpochImages` by the process that trains (rank 0), each into a folder
of its own: TensorBoard follows one writer per folder. Neither ever stops a training: what cannot be written is said
once, and nothing more is written. The records are written here and not by TensorBoard's `SummaryWriter`, whose thread
blocks `flush` for ever once the disk is full.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from records.arrays import UInt8Array
from records.durable import write_file
from records.erasure import SHOWN_IMAGES
from records.errors import RelookError
from records.progress import say

if TYPE_CHECKING:
    from torch import nn

    from trainers.augmentation import Policy
    from trainers.fitting.checkpoints import Checkpoint
    from trainers.fitting.epoch_report import EpochReport
    from trainers.fitting.training_data import TrainingData
    from trainers.settings import TrainersSettings

FOLDER = "tensorboard"
SHOWN = 8
"""Images of train and of val that are shown: two rows of four."""
MOST_EPOCHS = 200
"""Epochs with images; of a longer run every second, third, ... one, since each takes about 0.1 MB."""
_COLUMNS = 4
_NAMES = {
    "train_loss": "loss/train",
    "val_loss": "loss/val",
    "val_balanced_accuracy": "val/balanced_accuracy",
    "val_macro_auc": "val/macro_auc",
    "val_even_loss": "val/even_loss",
    "val_accuracy": "val/accuracy",
    "key_class_sensitivity": "val/key_class_sensitivity",
    "learning_rate": "learning_rate",
    "images_per_s": "speed/images_per_s",
    "seconds": "speed/epoch_s",
}
_numbers = count()
_said: set[str] = set()


def scalars_of(report: "EpochReport") -> dict[str, float]:
    """Return the figures of an epoch by the names under which TensorBoard and MLflow show them."""
    values = report.model_dump(include=set(_NAMES))
    return {_NAMES[name]: float(value) for name, value in values.items() if value is not None}


class EventFiles:
    """The scalars and settings of a run.

    Args:
        folder: gets the event files, one per process that works on the run.
        settings: by dotted names; TensorBoard lists them as hyper-parameters.
        told: epochs that an earlier process has written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], told: Iterable[int] = ()) -> None:
        self._folder, self._settings, self._told = folder, settings, set(told)
        self._writer: _Writer | None = None

    def epoch(self, report: "EpochReport") -> None:
        """Write an epoch."""
        self.scalars(report.epoch, scalars_of(report))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write figures of a step, which stays unnoticed if it was written before."""
        if step not in self._told:
            self._told.add(step)
            _unless_it_fails(self._folder, lambda: self._open().scalars(step, values))

    def complete(self, reports: Iterable["EpochReport"]) -> None:
        """Write the epochs that were not told, because a process was killed before it could."""
        for report in reports:
            self.epoch(report)

    def _open(self) -> "_Writer":
        if self._writer is None:
            self._writer = _Writer(self._folder)
            self._writer.settings(self._settings)
        return self._writer


class EpochImages:
    """Images of each epoch: training images as it augments them, and Grad-CAM of the same val images.

    Args:
        folder: gets event files, and the ids of the images that they show.
        settings: of the run.
        data: of the run.
        policy: of augmentation.
        num_classes: C.
    """

    def __init__(
        self, folder: Path, settings: "TrainersSettings", data: "TrainingData", policy: "Policy", num_classes: int
    ) -> None:
        self._folder, self._settings, self._data = folder, settings, data
        self._policy, self._num_classes = policy, num_classes
        self._every = -(-settings.epochs // MOST_EPOCHS)
        self._train, self._val = (_spaced(rows) for rows in (data.train_index, data.val_index))
        self._writer: _Writer | None = None
        self._network: nn.Module | None = None

    def write(self, checkpoint: "Checkpoint") -> None:
        """Write the images of the epoch that a checkpoint was taken after."""
        if checkpoint.epochs_done % self._every == 0:
            _unless_it_fails(self._folder, lambda: self._write(checkpoint))

    def _write(self, checkpoint: "Checkpoint") -> None:
        if self._writer is None:
            self._writer = _Writer(self._folder)
            # Before the first image: an erasure finds by this list what has to go.
            shown = {self._data.image_ids[row] for row in (*self._train, *self._val)}
            earlier = self._folder / SHOWN_IMAGES
            shown |= set(json.loads(earlier.read_text())) if earlier.is_file() else set()
            write_file(earlier, json.dumps(sorted(shown)))
        epoch = checkpoint.epochs_done
        self._writer.image(epoch, "train/augmented", _tiled(self._augmented(epoch)))
        self._writer.image(epoch, "val/grad_cam", _tiled(self._maps(checkpoint)))

    def _augmented(self, epoch: int) -> UInt8Array:
        from trainers.augmentation.preview import policy_grid

        ids = [self._data.image_ids[row] for row in self._train]
        pixels, seed = self._data.pixels.take(self._train), self._settings.seed
        return policy_grid(self._policy, pixels, ids, draws=1, seed=seed, first_epoch=epoch)[:, 1]

    def _maps(self, checkpoint: "Checkpoint") -> UInt8Array:
        import torch

        from images.overlay import overlay
        from records.bundles import Geometry
        from trainers.evaluation.faithfulness import target_maps
        from vision.networks import build_model
        from vision.preprocess import scale_pixels, to_tensor

        chosen, pixels = self._settings.model, self._data.pixels.take(self._val)
        if self._network is None:
            # Building draws weights, which must not change what the run draws.
            with torch.random.fork_rng(devices=[]):
                self._network = build_model(chosen.name, self._num_classes, **chosen.options).eval()
        self._network.load_state_dict({name: value.detach().cpu() for name, value in checkpoint.network.items()})
        geometry = Geometry(
            side_px=chosen.side_px,
            crop=chosen.crop,
            scaling=chosen.pixel_scaling,
            mean=checkpoint.mean,
            std=checkpoint.std,
        )
        inputs = scale_pixels(to_tensor(pixels), geometry)
        labels = torch.from_numpy(self._data.labels[self._val])
        maps = target_maps(self._network, inputs, labels)
        return np.stack([overlay(image, heat_map) for image, heat_map in zip(pixels, maps, strict=True)])


class _Writer:
    """One event file. It is open only while something is written, so no process has to close it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._path = folder / name
        self._add(file_version="brain.Event:2")

    def settings(self, values: Mapping[str, Any]) -> None:
        """Write the settings as hyper-parameters."""
        from torch.utils.tensorboard.summary import hparams

        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in values.items()
        }
        experiment, started, _ = hparams(plain, {"val/balanced_accuracy": 0.0, "loss/val": 0.0})  # type: ignore[no-untyped-call]
        for summary in (experiment, started):
            self._add(summary=summary)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write figures of a step."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        figures = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(summary=Summary(value=figures), step=step)

    def image(self, step: int, name: str, pixels: UInt8Array) -> None:
        """Write an image [H, W, 3] of a step."""
        import cv2
        from tensorboard.compat.proto.summary_pb2 import Summary

        _, jpeg = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
        image = Summary.Image(
            height=pixels.shape[0], width=pixels.shape[1], colorspace=3, encoded_image_string=jpeg.tobytes()
        )
        self._add(summary=Summary(value=[Summary.Value(tag=name, image=image)]), step=step)

    def _add(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        with self._path.open("ab") as file:
            RecordWriter(file).write(Event(wall_time=time.time(), **content).SerializeToString())


def _unless_it_fails(folder: Path, write: Callable[[], None]) -> None:
    if str(folder) in _said:
        return
    try:
        write()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "tensorboard":
            raise
        _said.add(str(folder))
        _say_once("no event files for TensorBoard are written; pip install 'relook[tracking]' brings what writes them")
    except (OSError, RelookError, RuntimeError, ValueError) as error:
        _said.add(str(folder))
        _say_once(f"{folder} gets no more event files for TensorBoard ({error}); the training goes on")


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        say(text)


def _spaced(rows: Any) -> Any:
    from trainers.fitting.training_data import evenly_spaced

    return evenly_spaced(rows, SHOWN)


def _tiled(images: UInt8Array | Sequence[UInt8Array]) -> UInt8Array:
    """Lay images of one size out in rows of four, on white."""
    side_px = images[0].shape[0]
    num_rows, num_columns = -(-len(images) // _COLUMNS), min(_COLUMNS, len(images))
    sheet = np.full((num_rows * side_px, num_columns * side_px, 3), 255, dtype=np.uint8)
    for number, image in enumerate(images):
        top, left = number // _COLUMNS * side_px, number % _COLUMNS * side_px
        sheet[top : top + side_px, left : left + side_px] = image
    return sheet
