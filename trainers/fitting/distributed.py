"""The training loop on several processes or machines, under Ray Train; no other file imports Ray Train.

In: settings, a data plan, a store, a folder. Out: the same `TrainedModel` as `train` returns. Ray has to run already.
Each worker maps the pixels on its own node and computes its share of every batch as the strategy says (gloo on CPUs,
NCCL on GPUs). Ray Train keeps a checkpoint per epoch under `run_dir/ray`, and the same folder resumes the run, with
one worker too, which needs no Ray Train (`trainers.fitting.one_worker`). Epoch reports reach the caller while training
runs, see `trainers.fitting.channel`.
"""

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
from numpy.typing import NDArray
from torch import distributed as dist

from records.errors import ConfigError, RelookError, UnavailableError, error_class, quoted_error
from records.settings import environment
from records.store import Store, open_store
from trainers.augmentation import Policy
from trainers.fitting.channel import ReportThread, open_channel
from trainers.fitting.checkpoints import Checkpoint, further, load_checkpoint, save_checkpoint
from trainers.fitting.contact import require_contact
from trainers.fitting.epoch_report import OnEpoch, OnStep
from trainers.fitting.loop import TrainedModel, trained_model
from trainers.fitting.one_worker import Job, fit_on_one_worker, thread_variables
from trainers.fitting.training_data import DataPlan
from trainers.fitting.workers import CHECKPOINT_FILE, GROUP_FOLDER, ProcessGroup, threads_of
from trainers.optimization.strategies import StrategyRecipe, strategy_of
from trainers.settings import TrainersSettings

START_TIMEOUT_S = 300
"""A busy machine may need minutes to start processes that import torch; Ray Train's own limit is one."""
LOCAL_LOOK_S = 0.2
"""How often Ray Train looks after its workers where all of it runs on one machine."""


def fit_distributed(
    settings: TrainersSettings,
    plan: DataPlan,
    store: Store,
    run_dir: Path,
    *,
    policy: Policy,
    on_epoch: OnEpoch | None = None,
    on_step: OnStep | None = None,
    initial_weights: Mapping[str, NDArray[Any]] | None = None,
) -> TrainedModel:
    """Train on `settings.workers.count` processes, or go on with what the folder holds.

    Args:
        settings: the recipe, and how the workers execute it.
        plan: which images.
        store: with the images; its settings have to lead to the same store on every node.
        run_dir: the run's folder, on storage that every node sees.
        policy: of augmentation.
        on_epoch: called after every epoch, in a thread of this process; True stops the run.
        on_step: called in that thread every few seconds with the position within the epoch.
        initial_weights: parameters and buffers to start from, by name.
    Returns:
        The model after its best epoch.
    Raises:
        ConfigError: Ray has too few CPUs or GPUs for the workers.
        UnavailableError: more workers were lost than `settings.workers.max_failures`; the last checkpoint is kept.
        DivergedError: a loss or a logit is not finite.
        RefusedError: the folder holds another run.
    """
    use_gpu = _use_gpu(settings)
    settings = settings.with_values({"workers.threads": threads_of(settings.workers), "workers.use_gpu": use_gpu})
    _require_resources(settings, use_gpu)
    channel = open_channel()
    records, weights = store.portable_settings(), dict(initial_weights or {})
    job = Job(settings, plan, records, store.taxonomy, policy, weights, channel, run_dir.absolute())
    needed = _needed(settings, use_gpu)
    with warns_of_scarcity(needed, _resources), ReportThread(channel, on_epoch, on_step) as reports:
        if settings.workers.count == 1:
            checkpoint = fit_on_one_worker(job, use_gpu)
        else:
            checkpoint = _fit_in_group(job, run_dir, use_gpu)
    reports.raise_if_failed()
    return trained_model(checkpoint, settings, store.taxonomy)


def _fit_in_group(job: Job, run_dir: Path, use_gpu: bool) -> Checkpoint:
    trainer = _trainer(job.settings, job, run_dir, use_gpu)
    with _controller_environment():
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _reason(job.channel, error, run_dir) from error
    # The group ends normally after a fatal error of our own (see `_train_on_worker`), so success has to be checked
    # here.
    fatal = ray.get(job.channel.fatal.remote())
    if fatal is not None:
        name, message = fatal
        raise error_class(name)(message)
    if result.checkpoint is None:
        raise UnavailableError(f"the run in {run_dir} ended without a checkpoint")
    with result.checkpoint.as_directory() as folder:
        return load_checkpoint(Path(folder) / CHECKPOINT_FILE)


def _trainer(settings: TrainersSettings, job: Job, run_dir: Path, use_gpu: bool) -> ray.train.torch.TorchTrainer:
    return ray.train.torch.TorchTrainer(
        _train_on_worker,
        # By reference: Ray Train's controller, which starts before the workers, need not load what only they use.
        train_loop_config={"job": ray.put(job)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=_num_workers(settings),  # type: ignore[arg-type] # the stubs know no elastic pair
            use_gpu=use_gpu,
            resources_per_worker={"CPU": settings.workers.threads} | ({"GPU": 1} if use_gpu else {}),
        ),
        # The stubs know the RunConfig of Ray Train's first version only.
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=GROUP_FOLDER,
            storage_path=str(run_dir.absolute()),
            failure_config=ray.train.FailureConfig(max_failures=settings.workers.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": thread_variables(settings)},
        ),
    )


def _num_workers(settings: TrainersSettings) -> int | tuple[int, int]:
    if strategy_of(settings.workers).elastic:
        return (settings.workers.minimum, settings.workers.count)
    return settings.workers.count


class RayWorkerGroup(ProcessGroup):
    """The workers that Ray Train started; made inside one of them.

    Args:
        strategy: how they share the work.
        kept_in: the folder that Ray Train keeps checkpoints in.
    """

    def __init__(self, strategy: StrategyRecipe, kept_in: Path) -> None:
        context = ray.train.get_context()
        super().__init__(
            strategy,
            context.get_world_rank(),
            context.get_world_size(),
            ray.train.torch.get_device(),
            kept_in,
        )
        self.local_rank: int = context.get_local_rank()

    def save(self, checkpoint: Checkpoint) -> None:
        """Report the checkpoint of rank 0 to Ray Train; a barrier for all workers."""
        metrics = checkpoint.reports[-1] if checkpoint.reports else {}
        if self.rank != 0:
            ray.train.report(metrics)
            return
        if self.kept_in is not None and not self.kept_in.is_dir():
            # Ray Train would create the folder again, on whatever disk lies below a mount that is gone.
            raise UnavailableError(
                f"the checkpoint after {checkpoint.position} cannot be written: folder {self.kept_in} is gone; "
                "bring its storage back"
            )
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(checkpoint, Path(folder) / CHECKPOINT_FILE)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def load(self) -> Checkpoint | None:
        """Return the latest checkpoint of this run: Ray Train's, or one worker's in the run's folder."""
        found = ray.train.get_checkpoint()
        own = None
        if found is not None:
            with found.as_directory() as folder:
                own = load_checkpoint(Path(folder) / CHECKPOINT_FILE)
        alone = self.kept_in.parent / CHECKPOINT_FILE if self.kept_in is not None else None
        return further(own, load_checkpoint(alone) if alone is not None and alone.is_file() else None)


def _train_on_worker(config: dict[str, Any]) -> None:
    job: Job = ray.get(config["job"])
    if ray.get(job.channel.fatal.remote()) is not None:
        # Ray Train restarts a failed group. An error of our own (diverged, bad data) would only happen again.
        return
    group = RayWorkerGroup(strategy_of(job.settings.workers), job.run_dir / GROUP_FOLDER)
    store = open_store(job.records)

    try:
        if group.world_size > 1:
            # Over Ray's own connections: a worker that is still loading its modules is no reason to complain.
            ray.train.collective.barrier()
            require_contact(group.device, job.settings.workers.contact_timeout_s)
        # One process per node decodes while the others wait; afterwards they find everything in the node's cache.
        if group.local_rank != 0:
            dist.barrier()
        opened = job.plan.stream if job.settings.workers.data_source == "stream" else job.plan.open
        data = opened(store, job.settings.model.side_px)
        if group.local_rank == 0 and group.world_size > 1:
            dist.barrier()
        job.train(data, group)
    except RelookError as error:
        ray.get(job.channel.fail.remote(type(error).__name__, str(error)))
        raise
    finally:
        store.close()


@contextmanager
def _controller_environment() -> Iterator[None]:
    """Set environment variables that Ray Train's controller inherits from the caller; what the user has set wins."""
    wanted = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_TIMEOUT_S)}
    if len(ray.nodes()) == 1:  # type: ignore[no-untyped-call]
        # It would be one more process; on a single node there is nowhere to go when that node is preempted.
        wanted["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        # A worker that reported a checkpoint waits for the controller's next poll, two seconds by default.
        wanted["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = str(LOCAL_LOOK_S)
    with environment({name: value for name, value in wanted.items() if name not in os.environ}):
        yield


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


def _reason(channel: Any, error: Exception, run_dir: Path) -> RelookError:
    fatal = ray.get(channel.fatal.remote())
    if fatal is not None:
        name, message = fatal
        return error_class(name)(message)
    own = quoted_error(str(error))
    if own is not None:
        return own
    # Ray's first line says that workers failed, the last one of the quoted traceback says why.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lost = f"training was lost ({lines[-1][:200] if lines else type(error).__name__})"
    if not any((run_dir / GROUP_FOLDER).glob("checkpoint_*")):
        return UnavailableError(f"{lost} before its first checkpoint")
    return UnavailableError(f"{lost}; the last checkpoint is in {run_dir}, run it again with --resume")


LOOK_EVERY_S = 20.0
Resources = Mapping[str, float]

logger = logging.getLogger(__name__)


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
