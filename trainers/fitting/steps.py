"""The steps of an epoch: one optimizer step, the check of its loss, batch norm's statistics, validation.

A `Stepper` owns network, optimizer and loss; it knows nothing of epochs or checkpoints. `validate` shares the
validation images over a `WorkerGroup` and gathers the logits.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from records.arrays import Float32Array, IntArray
from records.bundles import Geometry
from records.errors import DivergedError
from records.taxonomy import Taxonomy
from trainers.fitting.feeding import Batch, PixelSource
from trainers.fitting.memory import DEFAULT_BATCH, doublings, first_that_fits, halvings, largest_batch
from trainers.fitting.sharding import to_local
from trainers.fitting.workers import WorkerGroup
from trainers.optimization.freezing import freeze, frozen_modules
from trainers.optimization.optimizers import OptimizerSettings, build_optimizer
from trainers.optimization.strategies import no_sync
from vision.metrics.metrics import balanced_accuracy, class_rates, confusion_matrix, one_vs_rest_auc
from vision.networks import build_model
from vision.precision import Precision, autocast, training_precision
from vision.preprocess import scale_pixels, to_tensor

if TYPE_CHECKING:
    from trainers.fitting.part_threads import PartThreads
    from trainers.fitting.training_data import TrainingData
    from trainers.optimization.distillation import Distillation
    from trainers.optimization.losses import LossFunction
    from trainers.settings import TrainersSettings

SCORING_BATCH = 128
SCORING_BATCH_ON_CPU = 32
"""No slower than 128, with which validating ResNet-18 at 64 px took more memory than training it."""
NAMED_IMAGES = 8

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class ValidationScores:
    """Figures on the validation images.

    Args:
        loss: mean cross-entropy.
        balanced_accuracy: over the classes that val has.
        accuracy: share of correct predictions.
        key_class_sensitivity: None without a key class, or without its images.
        macro_auc: mean one-against-rest AUC; None if no class of val has an AUC.
        even_loss: mean over the classes of their mean cross-entropy.
    """

    loss: float
    balanced_accuracy: float
    accuracy: float
    key_class_sensitivity: float | None
    macro_auc: float | None
    even_loss: float


class Stepper:
    """Runs steps on one device.

    Args:
        network: wrapped for the group, on the device.
        optimizer: over its parameters.
        scheduler: moved after every step; None if it moves by epoch.
        loss: logits [N, C] and labels [N] -> mean.
        geometry: how images become input; None if they are input as they are.
        precision: of the forward pass.
        device: where it computes.
        settings: accumulation, clipping and L1 are read from it.
        halves: whether fewer images are computed at once when the device runs out of memory; not where other
            processes wait in the middle of the same step.
        distillation: adds a teacher's part to the loss; None without one.
        side_by_side: computes parts of a batch at once; None computes them one after the other.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        loss: "LossFunction",
        geometry: Geometry | None,
        precision: Precision,
        device: torch.device,
        settings: OptimizerSettings,
        *,
        halves: bool = True,
        distillation: "Distillation | None" = None,
        side_by_side: "PartThreads | None" = None,
    ) -> None:
        self._network = network
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._loss = loss
        self._distillation = distillation
        self._side_by_side = side_by_side
        self._geometry = geometry
        self._precision = precision
        self._device = device
        self._settings = settings
        self._halves = halves
        self._parts = settings.accumulate_steps
        self._frozen = frozen_modules(network)
        self._scored_at_once = SCORING_BATCH_ON_CPU if device.type == "cpu" else SCORING_BATCH

    def train_step(self, batch: Batch) -> Tensor:
        """Take one optimizer step.

        Returns the loss, detached, on the device; its mean over the workers is the batch's.
        """
        self._network.train()
        for module in self._frozen:
            module.training = False
        count = len(batch.rows)
        total, parts = first_that_fits(
            lambda parts: self._gradient(batch, parts), doublings(self._parts, count) if self._halves else [self._parts]
        )
        if parts != self._parts:
            logger.warning(
                "out of memory on %s with %d images at once: they are computed %d at a time from now on, and their "
                "gradients add up", self._device, -(-count // self._parts), -(-count // parts),
            )  # fmt: skip
            self._parts = parts
        self._shape_gradients()
        self._optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()
        return total

    def _gradient(self, batch: Batch, num_parts: int) -> Tensor:
        """Compute the gradient of a batch in parts; return the loss."""
        self._optimizer.zero_grad(set_to_none=True)
        if self._side_by_side is not None:
            return self._side_by_side.add_gradient(self._batch_loss, batch.parts(num_parts * self._side_by_side.count))
        parts = batch.parts(num_parts)
        # Summed on the device: reading a number from a GPU would wait for it.
        total = torch.zeros((), device=self._device)
        for number, (part, weight) in enumerate(parts, 1):
            # Gradients of the parts add up locally; they are averaged over the workers once, with the last part,
            # instead of once per part.
            with no_sync(self._network, number < len(parts)):
                loss = self._batch_loss(part) * weight
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
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
        loss = self._loss(logits, self._on_device(batch.labels))
        if batch.partner_labels is not None:
            other = self._loss(logits, self._on_device(batch.partner_labels))
            # For every loss with hard labels this equals the loss against the mixed label.
            loss = batch.share * loss + (1.0 - batch.share) * other
        if self._distillation is None:
            return loss
        return self._distillation.added(loss, logits, batch.rows, batch.partner_rows, batch.share)

    def close(self) -> None:
        """End the threads that compute parts."""
        if self._side_by_side is not None:
            self._side_by_side.close()

    def refresh_statistics(self, pixels: PixelSource, rows: IntArray) -> None:
        """Measure what batch norm uses in evaluation anew, on images as they are, with the weights as they are.

        The running means of training trail behind the weights and describe augmented, resampled images; after
        the few steps of a small dataset they are nowhere near (Wu and Johnson 2021 call this precise batch norm).

        Args:
            pixels: decoded images.
            rows: [n] this worker's share of the images to measure on; with fewer than 2, nothing changes.
        """
        frozen = {id(module) for module in self._frozen}
        norms = [
            module for module in self._network.modules() if isinstance(module, _BatchNorm) and id(module) not in frozen
        ]
        if not norms or len(rows) < 2:
            return
        # Dropout stays off; only the norms below are set to training mode, so that they collect statistics.
        self._network.eval()
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            # With momentum None torch keeps a cumulative mean over all batches since the reset: the plain mean.
            norm.momentum = None
            norm.train()

        def measure(at_once: int) -> None:
            for norm in norms:
                norm.reset_running_stats()
            # Batches of one size, so that every image counts the same.
            for part in np.array_split(rows, -(-len(rows) // at_once)):
                self._logits(pixels.take(part))

        self._scored(measure)
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

        def logits(at_once: int) -> list[Tensor]:
            starts = range(0, len(rows), at_once)
            return [self._logits(pixels.take(rows[start : start + at_once])) for start in starts]

        # A GPU computes a batch while the next is read; it is waited for once, here.
        parts = self._scored(logits)
        return torch.cat(parts).cpu().numpy() if parts else np.empty((0, 0), dtype=np.float32)

    def _scored(self, compute: Callable[[int], Result]) -> Result:
        """Compute without gradients, with as many images at once as fit."""
        sizes = halvings(self._scored_at_once) if self._halves else [self._scored_at_once]
        with torch.no_grad():
            result, self._scored_at_once = first_that_fits(compute, sizes)
        return result

    def _on_device(self, labels: IntArray) -> Tensor:
        # Not waited for: a copy that blocks waits for all that the GPU has to do before it.
        return torch.from_numpy(labels).to(self._device, non_blocking=True)

    def _logits(self, rows: NDArray[Any]) -> Tensor:
        inputs = to_tensor(rows).to(self._device, non_blocking=True)
        if self._geometry is not None:
            inputs = scale_pixels(inputs, self._geometry)
        with autocast(self._precision, str(self._device)):
            logits: Tensor = self._network(inputs)
        return logits.float()


class LossWatch:
    """Sums losses and notices the first that is not finite.

    A GPU computes behind the loop, and reading a loss waits for it; so losses are read several steps at a time.

    Args:
        image_ids: of the training data.
        steps: taken before.
        total: of their losses.
        every: number of losses that are read together.
    """

    def __init__(self, image_ids: list[str], steps: int = 0, total: float = 0.0, *, every: int = 1) -> None:
        self._image_ids = image_ids
        self._total = total
        self._steps = steps
        self._every = every
        self._pending: list[tuple[Tensor, IntArray]] = []

    def add(self, loss: Tensor, batch: Batch) -> None:
        """Take in the loss of a step and look at those before, if there are enough.

        Raises DivergedError: a loss before is not finite.
        """
        if len(self._pending) >= self._every:
            self._settle()
        self._pending.append((loss, batch.rows))

    def total(self) -> float:
        """Return the sum of the losses so far.

        Returns:
            A finite number.
        Raises:
            DivergedError: a loss is not finite.
        """
        self._settle()
        return self._total

    def _settle(self) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        values = torch.stack([loss for loss, _ in pending]).tolist()
        for value, (_, rows) in zip(values, pending, strict=True):
            self._steps += 1
            if not np.isfinite(value):
                named = [self._image_ids[row] for row in rows[:NAMED_IMAGES]]
                more = f" and {len(rows) - len(named)} more" if len(rows) > len(named) else ""
                raise DivergedError(
                    f"the loss is {value} at step {self._steps} of the epoch, on images {', '.join(named)}{more}; "
                    "lower trainers.optimizer.learning_rate, or look at these images"
                )
            self._total += value


def find_batch_size(settings: "TrainersSettings", device: torch.device, num_classes: int, num_train: int) -> int:
    """Return the batch size that `auto` means on a device: the largest with which a step fits into a GPU's memory."""
    if device.type != "cuda":
        return DEFAULT_BATCH
    side_px, random = settings.model.side_px, np.random.default_rng(0)
    network = build_model(settings.model.name, num_classes, **settings.model.options)
    network = network.to(device).to(memory_format=torch.channels_last)
    freeze(network, settings.optimizer.trainable_blocks)
    stepper = Stepper(
        network,
        build_optimizer(network, settings.optimizer),
        None,
        nn.CrossEntropyLoss(),
        Geometry(side_px=side_px),
        training_precision(settings.precision, network, str(device)),
        device,
        settings.optimizer,
        halves=False,
    )

    def take_step(size: int) -> None:
        pixels = random.integers(0, 256, (size, side_px, side_px, 3), dtype=np.uint8)
        # Twice: the optimizer makes its state in the first step, and the second one needs memory beside it.
        for _ in range(2):
            stepper.train_step(Batch(pixels, random.integers(0, num_classes, size), np.arange(size)))

    return largest_batch(take_step, num_train)


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
    logs = log_softmax(logits.astype(np.float64), axis=1)
    losses = -logs[np.arange(len(labels)), labels]
    aucs = one_vs_rest_auc(labels, np.exp(logs))
    return ValidationScores(
        loss=float(losses.mean()),
        balanced_accuracy=float(balanced_accuracy(confusion)),
        accuracy=float((logits.argmax(axis=1) == labels).mean()),
        key_class_sensitivity=None if np.isnan(sensitivity) else float(sensitivity),
        macro_auc=float(np.nanmean(aucs)) if np.isfinite(aucs).any() else None,
        even_loss=float(np.mean([losses[labels == each].mean() for each in np.unique(labels)])),
    )
