"""What each lever of training gains for a linear head on frozen features, alone against the base, on val.

.venv/bin/python -m bench.train.heads [--seeds 3] [--levers "EMA 0.99" "whole image" ...]

The base is the preset `ham10000_cpu` with its network frozen: EfficientNet-Lite0 from ImageNet at 128 px, images as
they are, 30 epochs of AdamW, the last one taken. Training is `trainers.fitting.loop.train`; the features of a network
and crop are computed by its first training and kept for the others. Temperature, bias and weight of the context are
fitted on val, as `relook train` does. A difference is the mean over the seeds, each against the base of the same
seed; its 95 % interval resamples the lesions of val and holds for these seeds. Other splits are not read.
"""

import argparse
import os
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from bench.train.gains import Judge
from cluster.presets import PRESETS
from cluster.sources import load_settings
from images.importer import open_dataset
from records.arrays import Float32Array, FloatArray
from records.context import ContextHead, Known, context_of_image
from records.datasets import DatasetVersion
from records.store import Store, find_images, open_store
from records.types import Split
from trainers.fitting import loop
from trainers.fitting.context import calibrated, fitted_context, probabilities_of
from trainers.fitting.feeding import PixelSource
from trainers.fitting.frozen import front_and_rest, without_frozen
from trainers.fitting.training_data import plan_data
from trainers.settings import TrainersSettings
from vision.preprocess import scale_pixels, to_tensor
from vision.views import MAX_VIEWS, viewed

BATCH = 64
BASE: dict[str, Any] = {
    "optimizer.trainable_blocks": 0, "augmentation": "none", "epochs": 30, "optimizer.name": "adamw",
    "optimizer.learning_rate": 1e-3, "best_epoch_by": "last", "workers.threads": 1,
}  # fmt: skip
LEVERS: dict[str, dict[str, Any]] = {
    "base": {},
    "whole image": {"model.crop": "whole"},
    "EMA 0.99": {"optimizer.ema_decay": 0.99},
    "EMA 0.999": {"optimizer.ema_decay": 0.999},
    "label smoothing 0.05": {"loss.label_smoothing": 0.05},
    "label smoothing 0.1": {"loss.label_smoothing": 0.1},
    "logit-adjusted loss": {"loss.name": "logit_adjusted"},
    "sampler balanced": {"sampler": "balanced"},
    "EfficientNet-Lite1": {"model.name": "efficientnet_lite1"},
    "EfficientNet-Lite2": {"model.name": "efficientnet_lite2"},
}


@dataclass
class Features:
    """Features of one network and crop, computed by the first training; stands in for `without_frozen`."""

    rows: PixelSource | None = None
    seconds: float = field(default=0.0)

    def __call__(self, network: Any, data: Any, *given: Any) -> Any:
        """Return head and features as `without_frozen` does."""
        if self.rows is not None:
            return front_and_rest(network)[1], replace(data, pixels=self.rows), None
        began = time.perf_counter()
        left, found, scaled_by = without_frozen(network, data, *given)
        self.rows, self.seconds = found.pixels, time.perf_counter() - began
        return left, found, scaled_by


@dataclass
class Heads:
    """Trains heads and gives their logits of val."""

    store: Store
    dataset: DatasetVersion
    settings: TrainersSettings
    kept: dict[tuple[str, str], Features] = field(default_factory=dict)

    def train(self, values: dict[str, Any], seed: int) -> tuple[loop.TrainedModel, Float32Array]:
        """Return the model of a lever, and its logits of val, [m, C]."""
        settings = self.settings.with_values({**BASE, **values, "seed": seed})
        data = plan_data(self.dataset, self.store.taxonomy).open(self.store, settings.model.frame)
        features = self.kept.setdefault((settings.model.name, settings.model.crop.value), Features())
        with patch.object(loop, "without_frozen", features):
            trained = loop.train(settings, data, self.store.taxonomy)
        assert features.rows is not None
        rest = front_and_rest(trained.network)[1]
        with torch.inference_mode():
            logits: Float32Array = rest(torch.from_numpy(features.rows.take(data.val_index))).numpy()
        return trained, logits

    def views(self, model: loop.TrainedModel) -> Float32Array:
        """Return features of every view of val, [8, m, D]."""
        plan = plan_data(self.dataset, self.store.taxonomy)
        data, front, parts = plan.open(self.store, model.geometry.frame), front_and_rest(model.network)[0], []
        with torch.inference_mode():
            for start in range(0, len(data.val_index), BATCH):
                pixels = data.pixels.take(data.val_index[start : start + BATCH])
                inputs = scale_pixels(to_tensor(pixels), model.geometry)
                parts.append(torch.stack([front(viewed(inputs, view)) for view in range(MAX_VIEWS)]).numpy())
        return np.concatenate(parts, axis=1)

    def probabilities(self, logits: Float32Array, context: ContextHead | None = None) -> FloatArray:
        """Return calibrated probabilities of val over the class shares of val, [m, C], which sum to 1."""
        rows = self.dataset.split(Split.VAL)
        known: list[Known] = [
            context_of_image(one) for one in find_images(self.store, [str(one) for one in rows["image_id"]])
        ]
        labels = np.array([self.store.taxonomy.index_of(str(label)) for label in rows["label"]])
        values = logits.astype(np.float64)
        calibration, head = calibrated(values, labels, self.store.taxonomy, context, known)
        return probabilities_of(values, calibration, head, known)


def read_otherwise(heads: Heads, models: list[loop.TrainedModel], logits: list[Float32Array]) -> dict[str, list[Any]]:
    """Return probabilities of the base's models with 8 views, and with context."""
    views = torch.from_numpy(heads.views(models[0]))
    with torch.inference_mode():
        seen = [front_and_rest(model.network)[1](views).mean(dim=0).numpy() for model in models]
    context = fitted_context(heads.store, plan_data(heads.dataset, heads.store.taxonomy), True)
    return {
        "8 views": [heads.probabilities(one) for one in seen],
        "context": [heads.probabilities(one, context) for one in logits],
        "context and 8 views": [heads.probabilities(one, context) for one in seen],
    }


def main() -> None:
    """Print one line for each lever, as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--levers", nargs="+", choices=list(LEVERS), default=list(LEVERS))
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=NUMBER", help="of the base, for all rows")
    options = parser.parse_args()
    BASE.update({name: float(value) for name, value in (one.split("=") for one in options.set)})
    with closing(open_store(load_settings(environ=os.environ).records)) as store:
        dataset = open_dataset(store, None)
        heads, judge = Heads(store, dataset, PRESETS["ham10000_cpu"]().trainers), Judge.of(store, dataset)
        for name in dict.fromkeys(("base", *options.levers)):
            began = time.perf_counter()
            models, logits = zip(*(heads.train(LEVERS[name], seed) for seed in range(options.seeds)), strict=True)
            told = {"rate": round(models[0].best.images_per_s), "seconds": round(time.perf_counter() - began)}
            print(judge.row(name, [heads.probabilities(one) for one in logits]), told, flush=True)
            if name == "base":
                for other, found in read_otherwise(heads, list(models), list(logits)).items():
                    print(judge.row(other, found), flush=True)
        print({f"{name} {crop}": round(one.seconds) for (name, crop), one in heads.kept.items()}, "s for features")


if __name__ == "__main__":
    main()
