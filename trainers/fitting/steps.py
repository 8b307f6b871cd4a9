"""The steps of an epoch: one optimizer step, the check of its loss, batch norm's statistics, validation.

A `Stepper` owns network, optimizer and loss; it knows nothing of epochs or checkpoints. `validate` shares the
validation images over a `WorkerGroup` and gathers the logits.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from records.arrays import Float32Array, IntArray, UInt8Array
from records.bundles import Geometry
from records.errors import DivergedError
from records.taxonomy import Taxonomy
from trainers.fitting.feeding import Batch, PixelSource
from trainers.fitting.sharding import to_local
from trainers.fitting.workers import WorkerGroup
from trainers.optimization.optimizers import OptimizerSettings
from trainers.optimization.strategies import no_sync
from vision.metrics.metrics import balanced_accuracy, class_rates, confusion_matrix
from vision.precision import Precision, autocast
from vision.preprocess import scale_pixels, to_tensor

if TYPE_CHECKING:
    from trainers.fitting.training_data import TrainingData
    from trainers.optimization.losses import LossFunction

SCORING_BATCH = 128
NAMED_IMAGES = 8


@dataclass(frozen=True)
class ValidationScores:
    """Figures on the validation images.

    Args:
        loss: mean cross-entropy.
        balanced_accuracy: over the classes that val has.
        accuracy: share of correct predictions.
        key_class_sensitivity: None without a key class, or without its images.
    """

    loss: float
    balanced_accuracy: float
    accuracy: float
    key_class_sensitivity: float | None


class Stepper:
    """Runs steps on one device.

    Args:
        network: wrapped for the group, on the device.
        optimizer: over its parameters.
        scheduler: moved after every step; None if it moves by epoch.
        loss: logits [N, C] and labels [N] -> mean.
        geometry: how images become input.
        precision: of the forward pass.
        device: where it computes.
        settings: accumulation, clipping and L1 are read from it.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        loss: "LossFunction",
        geometry: Geometry,
        precision: Precision,
        device: torch.device,
        settings: OptimizerSettings,
    ) -> None:
        self._network = network
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._loss = loss
        self._geometry = geometry
        self._precision = precision
        self._device = device
        self._settings = settings

    def train_step(self, batch: Batch) -> Tensor:
        """Take one optimizer step.

        Returns the loss, detached, on the device; its mean over the workers is the batch's.
        """
        self._network.train()
        self._optimizer.zero_grad(set_to_none=True)
        parts = batch.parts(self._settings.accumulate_steps)
        # Summed on the device: reading a number from a GPU would wait for it.
        total = torch.zeros((), device=self._device)
        for number, (part, weight) in enumerate(parts, 1):
            # Gradients of the parts add up locally; they are averaged over the workers once, with the last part,
            # instead of once per part.
            with no_sync(self._network, number < len(parts)):
                loss = self._batch_loss(part) * weight
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self._shape_gradients()
        self._optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()
        return total

    def _shape_gradients(self) -> None:
        """Clip the gradient, then add the one of L1: like weight decay it is no part of the loss and is not clipped."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self._settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self._settings.clip_norm)
        if self._settings.l1:
            with torch.no_grad():
                for parameter in parameters:
                    if parameter.ndim >= 2:
                        # Element-wise, so each process can do its own shard without a collective.
                        to_local(parameter.grad).add_(to_local(parameter).sign(), alpha=self._settings.l1)

    def _batch_loss(self, batch: Batch) -> Tensor:
        logits = self._logits(batch.pixels)
        loss = self._loss(logits, torch.from_numpy(batch.labels).to(self._device))
        if batch.partner_labels is None:
            return loss
        other = self._loss(logits, torch.from_numpy(batch.partner_labels).to(self._device))
        # For every loss with hard labels this equals the loss against the mixed label.
        return batch.share * loss + (1.0 - batch.share) * other

    def refresh_statistics(self, pixels: PixelSource, rows: IntArray) -> None:
        """Measure what batch norm uses in evaluation anew, on images as they are, with the weights as they are.

        The running means of training trail behind the weights and describe augmented, resampled images; after
        the few steps of a small dataset they are nowhere near (Wu and Johnson 2021 call this precise batch norm).

        Args:
            pixels: decoded images.
            rows: [n] this worker's share of the images to measure on; with fewer than 2, nothing changes.
        """
        norms = [module for module in self._network.modules() if isinstance(module, _BatchNorm)]
        if not norms or len(rows) < 2:
            return
        # Dropout stays off; only the norms below are set to training mode, so that they collect statistics.
        self._network.eval()
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            # With momentum None torch keeps a cumulative mean over all batches since the reset.
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over the batches below
            norm.train()
        # Batches of one size, so that every image counts the same.
        num_batches = -(-len(rows) // SCORING_BATCH)
        with torch.no_grad():
            for part in np.array_split(rows, num_batches):
                self._logits(pixels.take(part))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    def score(self, pixels: PixelSource, rows: IntArray) -> Float32Array:
        """Compute logits without augmentation, in evaluation mode.

        Args:
            pixels: decoded images.
            rows: [n] which of them.
        Returns:
            [n, C].
        """
        self._network.eval()
        parts = []
        with torch.no_grad():
            for start in range(0, len(rows), SCORING_BATCH):
                logits = self._logits(pixels.take(rows[start : start + SCORING_BATCH]))
                parts.append(logits.cpu().numpy())
        return np.concatenate(parts) if parts else np.empty((0, 0), dtype=np.float32)

    def _logits(self, pixels: UInt8Array) -> Tensor:
        inputs = scale_pixels(to_tensor(pixels).to(self._device, non_blocking=True), self._geometry)
        with autocast(self._precision, str(self._device)):
            logits: Tensor = self._network(inputs)
        return logits.float()


class LossWatch:
    """Sums losses and notices the first that is not finite, one step late so that a GPU never waits."""

    def __init__(self, image_ids: list[str], steps: int = 0, total: float = 0.0) -> None:
        self._image_ids = image_ids
        self._total = total
        self._steps = steps
        self._pending: tuple[Tensor, Batch] | None = None

    def add(self, loss: Tensor, batch: Batch) -> None:
        """Take in the loss of a step and look at the one before.

        Raises DivergedError: the loss before is not finite.
        """
        self._settle()
        self._pending = (loss, batch)

    def total(self) -> float:
        """Return the sum of the losses so far.

        Returns:
            A finite number.
        Raises:
            DivergedError: the last loss is not finite.
        """
        self._settle()
        return self._total

    def mean(self) -> float:
        """Return the mean loss so far.

        Returns:
            A finite number.
        Raises:
            DivergedError: the last loss is not finite.
        """
        return self.total() / max(self._steps, 1)

    def _settle(self) -> None:
        if self._pending is None:
            return
        loss, batch = self._pending
        self._pending = None
        self._steps += 1
        # The loss of the step before: a GPU has computed it by now, so reading it does not stall the queue.
        value = float(loss)
        if not np.isfinite(value):
            named = [self._image_ids[row] for row in batch.rows[:NAMED_IMAGES]]
            more = f" and {len(batch.rows) - len(named)} more" if len(batch.rows) > len(named) else ""
            raise DivergedError(
                f"the loss is {value} at step {self._steps} of the epoch, on images {', '.join(named)}{more}; "
                "lower trainers.optimizer.learning_rate, or look at these images"
            )
        self._total += value


def validate(stepper: Stepper, data: "TrainingData", taxonomy: Taxonomy, group: WorkerGroup) -> ValidationScores:
    """Score the val images, each worker its share, and gather the logits.

    Returns the scores, equal on every worker.
    Raises DivergedError: a logit is not finite.
    """
    rows, labels = data.val_index, data.labels[data.val_index]
    num_classes = len(taxonomy.codes)
    # Filled up to equal shares: with sharded parameters a forward pass is a collective, so all run equally many.
    filled = np.resize(rows, -(-len(rows) // group.world_size) * group.world_size)
    own = stepper.score(data.pixels, filled[group.rank :: group.world_size])
    gathered = np.empty((len(filled), num_classes), dtype=np.float32)
    # Rank r scored rows r, r + W, r + 2 W ...; writing them back with the same stride restores the order, and what
    # was filled up falls off the end.
    for rank, part in enumerate(group.gather(own)):
        gathered[rank :: group.world_size] = part.reshape(-1, num_classes)
    logits = gathered[: len(rows)]
    if not np.isfinite(logits).all():
        row = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
        raise DivergedError(
            f"the network's logits of val image {data.image_ids[rows[row]]} are not finite; "
            "lower trainers.optimizer.learning_rate"
        )
    confusion = confusion_matrix(labels, logits.argmax(axis=1), num_classes)
    key_class = taxonomy.key_class
    sensitivity = class_rates(confusion).sensitivity[taxonomy.index_of(key_class.code)] if key_class else np.nan
    return ValidationScores(
        loss=float(-log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels].mean()),
        balanced_accuracy=float(balanced_accuracy(confusion)),
        accuracy=float((logits.argmax(axis=1) == labels).mean()),
        key_class_sensitivity=None if np.isnan(sensitivity) else float(sensitivity),
    )
