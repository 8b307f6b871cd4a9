"""The training loop, on plain torch.

In: settings, decoded images with labels, a taxonomy. Out: a `TrainedModel` with the weights of the epoch that
validated best. `train` is the entry; `_Run.next_epoch` is one epoch: optimizer steps, validation, checkpoint. The same
loop runs in one process and under Ray Train; rank, device and checkpoint storage come from its `WorkerGroup`.

Every random number is a function of the seed and the position (epoch, step), so a run that was killed and resumed ends
with the same weights as an uninterrupted one, on equal hardware, threads and precision. The loop does not calibrate,
evaluate or write bundles.
"""

import time
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from images.decode import DECODE_VERSION
from records.arrays import IntArray
from records.bundles import Geometry
from records.errors import DivergedError, UnavailableError
from records.memory import keep_freed_memory
from records.taxonomy import Taxonomy
from trainers.augmentation import Augmenter, Policy, load_policy
from trainers.augmentation.operations import Canvas
from trainers.fitting.checkpoints import Checkpoint, Weights, require_same_run
from trainers.fitting.epoch_report import EpochReport, OnEpoch, OnStep, best_epoch_of
from trainers.fitting.feeding import Feeder
from trainers.fitting.frozen import without_frozen
from trainers.fitting.part_threads import part_threads
from trainers.fitting.sharding import WeightAverage, full_tensor, restore_optimizer, to_local
from trainers.fitting.starting import starting_weights
from trainers.fitting.steps import LossWatch, Stepper, find_batch_size, validate
from trainers.fitting.training_data import Rgb, TrainingData, evenly_spaced, identity_of, pixel_statistics
from trainers.fitting.workers import (
    SingleWorker,
    WorkerGroup,
    any_of,
    compute_threads,
    feeders_of,
    mean_over,
    own_random_state,
    threads_of,
)
from trainers.optimization.distillation import build_distillation
from trainers.optimization.freezing import freeze
from trainers.optimization.losses import build_loss
from trainers.optimization.optimizers import build_optimizer
from trainers.optimization.schedulers import SCHEDULERS, build_scheduler, change_rate
from trainers.settings import ModelSettings, TrainersSettings
from trainers.tracking.tensorboard import EpochImages
from vision.networks import build_model
from vision.precision import training_precision
from vision.seeding import derive_seed

STATISTICS_IMAGES = 256
"""Number of training images on which the statistics of batch norm are measured after every epoch."""

__all__ = ["EpochReport", "TrainedModel", "TrainingData", "best_epoch_of", "train", "trained_model"]


@dataclass(frozen=True)
class TrainedModel:
    """What a run returns.

    Args:
        network: in evaluation mode, on the CPU, with the weights of the best epoch.
        geometry: how images become its input.
        reports: of all epochs.
        best_epoch: 1-based; the one that validated best by `settings.best_epoch_by`.
        num_threads: number of threads that each worker computed with.
        peers: facts about averaging with other sites; None without any.
    """

    network: nn.Module
    geometry: Geometry
    reports: list[EpochReport]
    best_epoch: int
    num_threads: int
    peers: dict[str, int] | None = None

    @property
    def best(self) -> EpochReport:
        """The report of the best epoch."""
        return self.reports[self.best_epoch - 1]

    def weights(self) -> dict[str, NDArray[Any]]:
        """Return copies of parameters and buffers by name."""
        return {name: value.numpy().copy() for name, value in self.network.state_dict().items()}


def geometry_of(chosen: ModelSettings, mean: Rgb, std: Rgb) -> Geometry:
    """Return how an image becomes the network's input, for pixels scaled by this mean and deviation."""
    side_px, crop, scaling = chosen.side_px, chosen.crop, chosen.pixel_scaling
    return Geometry(side_px=side_px, crop=crop, scaling=scaling, mean=mean, std=std, decode_version=DECODE_VERSION)


def trained_model(checkpoint: Checkpoint, settings: TrainersSettings, taxonomy: Taxonomy) -> TrainedModel:
    """Rebuild the model of a run's best epoch from its last checkpoint."""
    # Building a network draws random initial weights, which are replaced at once; `fork_rng` keeps this from changing
    # the state of the caller's random generator.
    with torch.random.fork_rng(devices=[]):
        network = build_model(settings.model.name, len(taxonomy.codes), **settings.model.options)
    network.load_state_dict(checkpoint.best)
    network.eval().requires_grad_(False)
    reports = checkpoint.epoch_reports()
    geometry = geometry_of(settings.model, checkpoint.mean, checkpoint.std)
    best = best_epoch_of(reports, settings.best_epoch_by)
    return TrainedModel(network, geometry, reports, best, threads_of(settings.workers))


def train(
    settings: TrainersSettings,
    data: TrainingData,
    taxonomy: Taxonomy,
    *,
    on_epoch: OnEpoch | None = None,
    on_step: OnStep | None = None,
    workers: WorkerGroup | None = None,
    policy: Policy | None = None,
    initial_weights: Mapping[str, NDArray[Any]] | None = None,
    images_dir: Path | None = None,
    pause_after: int | None = None,
) -> TrainedModel:
    """Train a model, or resume the run whose checkpoint the group holds.

    Args:
        settings: the recipe, and how this machine executes it.
        data: train and val images.
        taxonomy: gives class order and the key class.
        on_epoch: called on rank 0 after every epoch, when its checkpoint is saved; True stops the run.
        on_step: called on rank 0 after every step.
        workers: the group; default: this process alone, without checkpoints.
        policy: of augmentation; default: the one that the settings name.
        initial_weights: parameters and buffers to start from, by name; default: as `settings.model.weights` says.
        images_dir: gets event files for TensorBoard with images of every epoch; default: none.
        pause_after: number of epochs after which to return early; a later call resumes from the checkpoint.
            Default: all epochs.
    Returns:
        The model after its best epoch.
    Raises:
        DivergedError: a loss or a logit is not finite (names the step and the images).
        DataError: there is nothing to train on or to validate with.
        ConfigError: a setting cannot work here.
        RefusedError: the checkpoint belongs to another run.
        IntegrityError: the initial weights do not fit the network.
    """
    data.require_usable(len(taxonomy.codes))
    keep_freed_memory(of_any_size=True)
    group: WorkerGroup = workers or SingleWorker(use_gpu=settings.workers.use_gpu)
    policy = policy or load_policy(settings.augmentation)
    if initial_weights is None:
        start = starting_weights(settings.model, len(taxonomy.codes), settings.seed)
        initial_weights = start.values if start is not None else None
    with compute_threads(threads_of(settings.workers)), own_random_state(group.device):
        images = None
        if images_dir is not None and group.rank == 0:
            images = EpochImages(images_dir, settings, data, policy, len(taxonomy.codes))
        with closing(_Run(settings, data, taxonomy, group, policy, initial_weights, images)) as run:
            if on_step is not None and group.rank == 0:
                run.on_step = on_step
            while not run.finished and (pause_after is None or run.epochs_done < pause_after):
                report = run.next_epoch()
                if on_epoch is not None:
                    # Only rank 0 calls `on_epoch`, and `any_of` shares the result: all workers have to leave the loop
                    # in the same epoch, or the next collective would never complete.
                    stop = bool(on_epoch(report)) if group.rank == 0 else False
                    run.stop_if(any_of(group, stop))
    return trained_model(run.checkpoint(), settings, taxonomy)


class _Run:
    """The state of a run: everything that a checkpoint holds, and what is rebuilt from it."""

    def __init__(
        self,
        settings: TrainersSettings,
        data: TrainingData,
        taxonomy: Taxonomy,
        group: WorkerGroup,
        policy: Policy,
        initial_weights: Mapping[str, NDArray[Any]] | None,
        images: EpochImages | None,
    ) -> None:
        self._data = data
        self._taxonomy = taxonomy
        self._group = group
        self._images = images
        self.on_step: OnStep | None = None
        self._identity = identity_of(settings, data, taxonomy, policy, initial_weights)
        found = group.load()
        if found is not None:
            require_same_run(found, self._identity)
        self._found_batch = self._find_batch_size(settings, found)
        if self._found_batch is not None:
            settings = settings.with_values({"batch_size": self._found_batch})
        self._settings = settings
        self._reports = found.epoch_reports() if found else []
        self._stopped = found.finished if found else False
        # A resumed run takes them from its checkpoint, which `require_same_run` found to be of the same images.
        known = (found.mean, found.std) if found else settings.model.own_pixels
        mean, std = group.shared_pixels(*(known or pixel_statistics(data.pixels, data.train_index)))
        self._geometry = geometry_of(settings.model, mean, std)
        self._statistics_rows = _statistics_rows(data, group)
        # Order matters from here on. Weights are loaded before `wrap`, which may shard the parameters; the optimizer
        # is built after it, because its state has to refer to the sharded parameters.
        self._network = self._build_network(initial_weights, found)
        self._precision = training_precision(settings.precision, self._network, str(group.device))
        trained, self._data, self._scaled_by = without_frozen(
            self._network, data, self._geometry, policy, self._precision, group
        )
        wrapped = group.wrap(trained)
        self._feeder = self._build_feeder(Augmenter(policy, Canvas(settings.model.side_px, _to_bytes(mean))))
        self._optimizer = build_optimizer(self._network, settings.optimizer)
        self._scheduler = build_scheduler(
            self._optimizer,
            settings.scheduler,
            epochs=settings.epochs,
            steps_per_epoch=self._feeder.steps_per_epoch,
        )
        decay = settings.optimizer.ema_decay
        self._average = None if decay is None else WeightAverage(self._network, decay)
        self._step, self._loss_sum = (found.step, found.loss_sum) if found else (0, 0.0)
        self._kept = found.position if found else None
        # A checkpoint that is written before the first epoch ends has the initial weights as the best ones.
        self._best = found.best if found else _copy_to_cpu(self._network)
        if found:
            self._restore(found)
        if settings.workers.compile:
            # In place, so that the names of the parameters stay as they are.
            wrapped.compile()
        self._stepper = self._build_stepper(wrapped)

    @property
    def finished(self) -> bool:
        """Whether no epoch is left, or the run was stopped."""
        last = min(self._settings.epochs, self._settings.stop_after_epoch or self._settings.epochs)
        return self._stopped or len(self._reports) >= last

    @property
    def epochs_done(self) -> int:
        """Number of epochs that are done."""
        return len(self._reports)

    def close(self) -> None:
        """End the processes that feed the run, and its threads."""
        self._feeder.close()
        self._stepper.close()

    def next_epoch(self) -> EpochReport:
        """Train and validate one epoch, or the rest of a resumed one; keep the best weights and a checkpoint."""
        try:
            report = self._next_epoch()
        except DivergedError as error:
            raise DivergedError(f"epoch {len(self._reports) + 1}: {error}; {self._last_good()}") from error
        except torch.OutOfMemoryError as error:
            parts = 2 * self._settings.optimizer.accumulate_steps
            raise UnavailableError(
                f"epoch {len(self._reports) + 1}: {self._group.device} of worker {self._group.rank} is out of memory; "
                f"set trainers.optimizer.accumulate_steps={parts} (the same gradient in smaller parts), or take a "
                f"smaller network or trainers.model.side_px; {self._last_good()}"
            ) from error
        checkpoint = self._keep()
        if self._images is not None:
            self._images.write(checkpoint)
        return report

    def _next_epoch(self) -> EpochReport:
        started = time.perf_counter()
        num_images = (self._feeder.steps_per_epoch - self._step) * self._settings.images_per_step
        train_loss = self._train_epoch(len(self._reports))
        trained = time.perf_counter()
        # With a running mean of the weights (EMA), the averaged weights are validated and kept as the best ones. When
        # the block ends, the weights of the last step are back in place, and training continues from them.
        with self._average.in_place() if self._average else nullcontext():
            # The statistics of batch norm have to fit the weights that are validated, so they are measured with these
            # weights and averaged over the workers before the first validation batch.
            self._stepper.refresh_statistics(self._data.pixels, self._statistics_rows)
            self._group.average_buffers(self._network)
            scores = validate(self._stepper, self._data, self._taxonomy, self._group)
            validated = time.perf_counter()
            # The schedule moves before the report and the checkpoint, so that both hold its state after this epoch.
            self._move_scheduler(scores.balanced_accuracy)
            report = EpochReport(
                epoch=len(self._reports) + 1,
                train_loss=train_loss,
                val_loss=scores.loss,
                val_balanced_accuracy=scores.balanced_accuracy,
                val_accuracy=scores.accuracy,
                key_class_sensitivity=scores.key_class_sensitivity,
                val_macro_auc=scores.macro_auc,
                val_even_loss=scores.even_loss,
                learning_rate=self._optimizer.param_groups[0]["lr"],
                images_per_s=num_images / max(trained - started, 1e-9),
                seconds=time.perf_counter() - started,
                validation_seconds=validated - trained,
            )
            self._take_in(report)
        return report

    def _train_epoch(self, epoch: int) -> float:
        """Run the remaining steps of an epoch; return the mean loss of all its steps over all workers."""
        settings, steps = self._settings, self._feeder.steps_per_epoch
        # The rate is changed at the start of an epoch only. A run that is resumed within an epoch has the changed rate
        # in its optimizer state already and would multiply it twice.
        if self._step == 0:
            change_rate(self._optimizer, self._scheduler, settings.scheduler, epoch + 1)
        every = settings.workers.read_loss_every_steps
        watch = LossWatch(self._data.image_ids, self._step, self._loss_sum, every=every)
        for batch in self._feeder.epoch(epoch, self._step):
            # Dropout draws from torch's global generator. Seeding it by position makes a checkpoint independent of
            # the generator's state: a resumed epoch drops the same units.
            torch.manual_seed(derive_seed(settings.seed, epoch, self._step, self._group.rank, "torch"))
            watch.add(self._stepper.train_step(batch), batch)
            self._group.after_step(self._network, epoch, self._step + 1, steps)
            if self._average:
                self._average.update(epoch * steps + self._step)
            self._step += 1
            if self.on_step is not None:
                self.on_step(epoch, self._step, steps)
            kept_every = settings.workers.checkpoint_every_steps
            # The end of an epoch is saved by `next_epoch`, together with its validation figures.
            if kept_every and self._step % kept_every == 0 and self._step < steps:
                # The sum so far is part of the checkpoint, so that the epoch's mean loss is that of all its steps
                # even if another process finishes it.
                self._loss_sum = mean_over(self._group, watch.total())
                self._require_finite()
                self._keep()
        # A total is exact however often it was summed up over the workers, so it is divided last.
        loss = mean_over(self._group, watch.total()) / steps
        self._step, self._loss_sum = 0, 0.0  # the first step of the next epoch, as `_keep` saves it
        return loss

    def _require_finite(self) -> None:
        """Raise before weights with NaN or infinity are saved; at the end of an epoch, validation detects them."""
        if any_of(self._group, not all(bool(to_local(p).isfinite().all()) for p in self._network.parameters())):
            raise DivergedError(
                f"weights are not finite after step {self._step} of the epoch; lower trainers.optimizer.learning_rate"
            )

    def _keep(self) -> Checkpoint:
        checkpoint = self.checkpoint()
        self._group.save(checkpoint)
        self._kept = checkpoint.position
        return checkpoint

    def _last_good(self) -> str:
        # Named in the error, because after a diverged epoch this is the state that `--resume` starts from.
        if self._kept is None or self._group.kept_in is None:
            return "no checkpoint was kept before"
        return f"the last good checkpoint is after {self._kept}, in {self._group.kept_in}"

    def stop_if(self, stop: bool) -> None:
        """End the run early if asked to, and remember it."""
        if stop and not self.finished:
            self._stopped = True
            self._keep()

    def checkpoint(self) -> Checkpoint:
        """Return the checkpoint of the current position.

        All workers have to call it, because collecting sharded tensors is a collective operation.
        """
        return Checkpoint(
            identity=self._identity,
            reports=[report.model_dump() for report in self._reports],
            network=full_tensor(self._network.state_dict()),
            optimizer=full_tensor(self._optimizer.state_dict()),
            scheduler=self._scheduler.state_dict(),
            best=self._best,
            mean=self._geometry.mean,
            std=self._geometry.std,
            finished=self.finished,
            average=self._average.state() if self._average else None,
            step=self._step,
            loss_sum=self._loss_sum,
            batch_size=self._found_batch,
        )

    def _take_in(self, report: EpochReport) -> None:
        self._reports.append(report)
        best_epoch = best_epoch_of(self._reports, self._settings.best_epoch_by)
        # This runs inside the EMA block of `_next_epoch`, so the weights that are copied are those that were validated.
        if best_epoch == report.epoch:
            self._best = _copy_to_cpu(self._network)
        patience = self._settings.early_stop_patience_epochs
        self._stopped = self._stopped or (patience is not None and report.epoch - best_epoch >= patience)

    def _move_scheduler(self, score: float) -> None:
        moves = SCHEDULERS[self._settings.scheduler.name].moves
        if moves == "epoch":
            self._scheduler.step()
        elif moves == "score":
            self._scheduler.step(score)  # type: ignore[arg-type]

    def _build_network(self, initial_weights: Mapping[str, NDArray[Any]] | None, found: Checkpoint | None) -> nn.Module:
        # Initial weights depend on the seed only. `starting_weights` uses the same derived seed, so that tensors that
        # a weights file lacks are initialised as in a run without the file.
        torch.manual_seed(derive_seed(self._settings.seed, "network"))
        chosen = self._settings.model
        network = build_model(chosen.name, len(self._taxonomy.codes), **chosen.options)
        if initial_weights is not None:
            from vision.inference.loaded import load_weights

            load_weights(network, dict(initial_weights), "to start from")
        if found is not None:
            network.load_state_dict(found.network)
        freeze(network, self._settings.optimizer.trainable_blocks)
        return network.to(self._group.device).to(memory_format=torch.channels_last)

    def _find_batch_size(self, settings: TrainersSettings, found: Checkpoint | None) -> int | None:
        """Return the batch size of a run whose settings leave it open: its checkpoint's, or what fits here."""
        if settings.batch_size != "auto":
            return None
        if found is not None and found.batch_size is not None:
            return found.batch_size
        num_train = len(self._data.train_index)
        return find_batch_size(settings, self._group.device, len(self._taxonomy.codes), num_train)

    def _build_feeder(self, augmenter: Augmenter) -> Feeder:
        data, group = self._data, self._group
        return Feeder(
            data.pixels,
            data.labels,
            data.image_ids,
            data.train_index,
            augmenter,
            self._settings,
            feeders=0 if self._scaled_by is None else feeders_of(self._settings.workers, group.device),
            device=group.device,
            stream=data.stream,
            rank=group.rank,
            world_size=group.world_size,
        )

    def _build_stepper(self, wrapped: nn.Module) -> Stepper:
        settings, data = self._settings, self._data
        return Stepper(
            wrapped,
            self._optimizer,
            self._scheduler if SCHEDULERS[settings.scheduler.name].moves == "step" else None,
            build_loss(settings.loss, data.labels[data.train_index], self._taxonomy, sampler=settings.sampler),
            self._scaled_by,
            self._precision,
            self._group.device,
            settings.optimizer,
            halves=self._group.world_size == 1,
            distillation=build_distillation(data.lesson, settings.loss),
            # Steps on features that a frozen stage gave take a millisecond, which is not worth dividing.
            side_by_side=part_threads(wrapped, settings, self._group.device) if self._scaled_by is not None else None,
        )

    def _restore(self, found: Checkpoint) -> None:
        # Checkpoints hold full tensors, which are sharded again here. So a run can continue with another strategy or
        # another number of workers.
        restore_optimizer(self._optimizer, found.optimizer)
        self._scheduler.load_state_dict(found.scheduler)
        if self._average and found.average is not None:
            self._average.restore(found.average)


def _statistics_rows(data: TrainingData, group: WorkerGroup) -> IntArray:
    """Return this worker's part of the training images on which batch norm's statistics are measured."""
    measured = evenly_spaced(data.train_index, STATISTICS_IMAGES)
    # All workers get equally many images, and the remainder is left out: with sharded parameters (fsdp) a forward pass
    # is a collective operation, which all workers have to run equally often.
    shared = len(measured) // group.world_size * group.world_size
    return measured[:shared][group.rank :: group.world_size]


def _copy_to_cpu(network: nn.Module) -> Weights:
    return {name: full_tensor(value).to("cpu", copy=True) for name, value in network.state_dict().items()}


def _to_bytes(mean: Rgb) -> Rgb:
    red, green, blue = (float(round(255.0 * channel)) for channel in mean)
    return (red, green, blue)
