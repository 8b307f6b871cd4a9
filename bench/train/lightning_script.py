"""The recipe of `plain_script.py` in Lightning, with its number formats: the peer of `python -m bench train`.

Needs an environment of its own, which bench/peers/install.py makes:

    DIR/lightning/bin/python bench/train/lightning_script.py TABLE --model resnet18 --side 64 --max-steps 40
"""

import argparse
import csv
import json
import logging
import time
import warnings
from pathlib import Path

import lightning
import numpy as np
import torch
from plain_script import MODELS, Images, build, transforms
from torch import nn
from torch.utils.data import DataLoader, WeightedRandomSampler

WARM_UP_STEPS = 3


class Recipe(lightning.LightningModule):
    """Network, loss, optimizer and schedule of the plain script, in channels-last memory."""

    def __init__(self, network: nn.Module, learning_rate: float, steps: int) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.learning_rate, self.steps = learning_rate, steps

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images.to(memory_format=torch.channels_last)), labels)

    def configure_optimizers(self) -> dict[str, object]:
        """Return SGD with OneCycle."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.learning_rate, total_steps=self.steps + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Clock(lightning.Callback):
    """Times the steps after the first ones."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0
        self.steps = -WARM_UP_STEPS

    def on_train_batch_end(self, *_: object) -> None:
        """Note when a step is over."""
        self.steps += 1
        if self.steps == 0:
            self.began = time.perf_counter()
        self.ended = time.perf_counter()


def main() -> None:
    """Train for some steps, then print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path, help="columns path, label, split")
    parser.add_argument("--model", choices=MODELS, default="resnet18")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--max-steps", type=int, default=40)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lightning.seed_everything(0, verbose=False)
    rows = list(csv.DictReader(options.table.open()))
    classes = sorted({row["label"] for row in rows})
    train = Images([r for r in rows if r["split"] == "train"], classes, transforms(options.side, augment=True))
    counts = np.bincount(train.labels, minlength=len(classes))
    weights = torch.tensor((np.maximum(counts, 1) ** -0.5)[train.labels])
    loader = DataLoader(
        train,
        batch_size=options.batch,
        sampler=WeightedRandomSampler(weights, len(train)),
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        drop_last=True,
    )
    clock = Clock()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=options.max_steps,
        max_epochs=-1,
        precision="bf16-mixed" if options.precision == "bf16" else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    trainer.fit(Recipe(build(options.model, len(classes)), options.learning_rate, options.max_steps), loader)
    print(json.dumps({"model": options.model, "images_s": clock.steps * options.batch / (clock.ended - clock.began)}))


if __name__ == "__main__":
    main()
