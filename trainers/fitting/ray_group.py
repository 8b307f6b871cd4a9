"""A training by several workers under Ray Train, which no other file imports, since that takes most of a second.

Ray Train keeps a checkpoint per epoch under `run_dir/ray`, and the same folder resumes the run.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
from torch import distributed as dist

from records.errors import RelookError, UnavailableError, error_class, quoted_error
from records.settings import environment
from records.store import open_store
from trainers.fitting.channel import sender
from trainers.fitting.checkpoints import Checkpoint, further, load_checkpoint, save_checkpoint
from trainers.fitting.contact import require_contact
from trainers.fitting.job import Job
from trainers.fitting.one_worker import thread_variables
from trainers.fitting.workers import CHECKPOINT_FILE, GROUP_FOLDER, ProcessGroup, result_in
from trainers.optimization.strategies import StrategyRecipe, strategy_of
from trainers.settings import TrainersSettings

START_TIMEOUT_S = 300
"""A busy machine may need minutes to start processes that import torch; Ray Train's own limit is one."""
LOCAL_LOOK_S = 0.2
"""How often Ray Train looks after its workers where all of it runs on one machine."""


def fit_in_group(job: Job, channel: Any, use_gpu: bool) -> Checkpoint:
    """Train with `settings.workers.count` workers.

    Args:
        job: of several workers.
        channel: to the caller.
        use_gpu: whether each worker needs a GPU.
    Returns:
        The run's last checkpoint.
    Raises:
        UnavailableError: workers were lost more often than `workers.max_failures`.
        RelookError: what the training raised.
    """
    trainer = _trainer(job, channel, use_gpu)
    with _controller_environment():
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _reason(channel, error, job.run_dir) from error
    # The group ends normally after a fatal error of our own (see `_train_on_worker`), so success has to be checked
    # here.
    fatal = ray.get(channel.fatal.remote())
    if fatal is not None:
        name, message = fatal
        raise error_class(name)(message)
    # Not only Ray Train's own: the group has nothing to do where one worker finished the run.
    return result_in(job.run_dir)


def _trainer(job: Job, channel: Any, use_gpu: bool) -> ray.train.torch.TorchTrainer:
    settings = job.settings
    return ray.train.torch.TorchTrainer(
        _train_on_worker,
        # By reference: Ray Train's controller, which starts before the workers, need not load what only they use.
        train_loop_config={"job": ray.put(job), "channel": channel},
        scaling_config=ray.train.ScalingConfig(
            num_workers=_num_workers(settings),  # type: ignore[arg-type] # the stubs know no elastic pair
            use_gpu=use_gpu,
            resources_per_worker={"CPU": settings.workers.threads} | ({"GPU": 1} if use_gpu else {}),
        ),
        # The stubs know the RunConfig of Ray Train's first version only.
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=GROUP_FOLDER,
            storage_path=str(job.run_dir),
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
    channel = config["channel"]
    if ray.get(channel.fatal.remote()) is not None:
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
        data = opened(store, job.settings.model.frame)
        if group.local_rank == 0 and group.world_size > 1:
            dist.barrier()
        job.train(data, group, *sender(channel))
    except RelookError as error:
        ray.get(channel.fail.remote(type(error).__name__, str(error)))
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
