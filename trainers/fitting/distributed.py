"""A training in a Ray session, on one worker or on several; Ray has to run already.

In: a job. Out: the same `TrainedModel` as `train` returns. One worker is a task of Ray (`trainers.fitting.one_worker`);
more are a group under Ray Train (`trainers.fitting.ray_group`), each of which maps the pixels on its own node and
computes its share of every batch as the strategy says (gloo on CPUs, NCCL on GPUs). A run that either of them began
is finished by the other. Epoch reports reach the caller while training runs, see `trainers.fitting.channel`.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import ray

from records.errors import ConfigError
from trainers.fitting.channel import ReportThread, open_channel
from trainers.fitting.epoch_report import OnEpoch, OnStep
from trainers.fitting.job import Job
from trainers.fitting.loop import TrainedModel, trained_model
from trainers.fitting.one_worker import fit_on_one_worker
from trainers.fitting.workers import threads_of
from trainers.optimization.strategies import strategy_of
from trainers.settings import TrainersSettings

LOOK_EVERY_S = 20.0
Resources = Mapping[str, float]

logger = logging.getLogger(__name__)


def fit_distributed(job: Job, *, on_epoch: OnEpoch | None = None, on_step: OnStep | None = None) -> TrainedModel:
    """Train on `workers.count` processes, or go on with what the run's folder holds.

    Args:
        job: its folder is on storage that every node sees, and its records lead to the same store on each.
        on_epoch: called after every epoch, in a thread of this process; True stops the run.
        on_step: called in that thread every few seconds with the position within the epoch.
    Returns:
        The model after its best epoch.
    Raises:
        ConfigError: Ray has too few CPUs or GPUs for the workers.
        UnavailableError: more workers were lost than `workers.max_failures`; the last checkpoint is kept.
        DivergedError: a loss or a logit is not finite.
        RefusedError: the folder holds another run.
    """
    use_gpu = _use_gpu(job.settings)
    machinery = {"workers.threads": threads_of(job.settings.workers), "workers.use_gpu": use_gpu}
    settings = job.settings.with_values(machinery)
    _require_resources(settings, use_gpu)
    job = replace(job, settings=settings)
    channel, needed = open_channel(), _needed(settings, use_gpu)
    with warns_of_scarcity(needed, _resources), ReportThread(channel, on_epoch, on_step) as reports:
        if settings.workers.count == 1:
            checkpoint = fit_on_one_worker(job, channel, use_gpu)
        else:
            from trainers.fitting.ray_group import fit_in_group

            checkpoint = fit_in_group(job, channel, use_gpu)
    reports.raise_if_failed()
    return trained_model(checkpoint, settings, job.taxonomy)


def _use_gpu(settings: TrainersSettings) -> bool:
    if settings.workers.use_gpu != "auto":
        return settings.workers.use_gpu
    return _fewest_workers(settings)[0] <= _resources().get("GPU", 0)


def _fewest_workers(settings: TrainersSettings) -> tuple[int, str]:
    """Return how many workers have to be there before any of them trains, and the setting that says so."""
    if strategy_of(settings.workers).elastic:
        return settings.workers.minimum, "workers.minimum"
    return settings.workers.count, "workers.count"


def _resources() -> dict[str, float]:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def _needed(settings: TrainersSettings, use_gpu: bool) -> dict[str, float]:
    """Return what the fewest workers that may train together need."""
    workers, _ = _fewest_workers(settings)
    cpus = float(workers * threads_of(settings.workers))
    return {"CPU": cpus, "GPU": float(workers)} if use_gpu else {"CPU": cpus}


def _require_resources(settings: TrainersSettings, use_gpu: bool) -> None:
    resources = _resources()
    threads = threads_of(settings.workers)
    workers, field_name = _fewest_workers(settings)
    cpus = int(resources.get("CPU", 0))
    if workers * threads > cpus:
        raise ConfigError(
            f"{workers} workers with {threads} threads each need {workers * threads} CPUs "
            f"and Ray has {cpus}; lower trainers.{field_name} or set trainers.workers.threads="
            f"{max(1, cpus // workers)}"
        )
    gpus = int(resources.get("GPU", 0))
    if use_gpu and gpus < workers:
        raise ConfigError(
            f"{workers} workers need as many GPUs and Ray has {gpus}; "
            f"lower trainers.{field_name} or set trainers.workers.use_gpu=false"
        )


@contextmanager
def warns_of_scarcity(
    needed: Resources, available: Callable[[], Resources], *, every_s: float = LOOK_EVERY_S
) -> Iterator[None]:
    """Log a warning when the cluster becomes too small for the fit, and another when it is large enough again.

    Ray Train waits for a lost node in silence; without this a fit would seem to hang.

    Args:
        needed: CPUs and GPUs of all workers together, by Ray's names.
        available: asks the cluster what it has, taken or not.
        every_s: time between two looks, seconds.
    Yields:
        Nothing.
    """
    over = threading.Event()

    def look() -> None:
        waits = False
        while not over.wait(every_s):
            has = available()
            missing = [f"{need:g} {name}s and Ray has {has.get(name, 0):g}" for name, need in needed.items()
                       if has.get(name, 0) < need]  # fmt: skip
            if missing and not waits:
                logger.warning(
                    "the fit waits: it needs %s, so a node was lost; it goes on from its checkpoint once another is "
                    "there, or stop it and run it again with --resume and fewer workers", ", ".join(missing),
                )  # fmt: skip
            elif waits and not missing:
                logger.warning("the fit goes on: Ray has what it needs again")
            waits = bool(missing)

    # A daemon: a Ray call that hangs must not keep the process from exiting.
    watcher = threading.Thread(target=look, name="scarcity", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(timeout=5.0)
