"""A fit by one worker: a task of Ray, without Ray Train's controller and its group, which take longer to start.

The task trains as a process without Ray does, checkpoint in the run's folder included. One that dies is started again
by Ray and goes on from there.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

import ray

from images.cache import PixelCache
from records.errors import RelookError, UnavailableError, quoted_error
from records.home import open_home
from records.memory import return_freed_memory
from records.store import open_store
from trainers.fitting.channel import sender
from trainers.fitting.checkpoints import Checkpoint
from trainers.fitting.job import Job
from trainers.fitting.training_data import TrainingData
from trainers.fitting.workers import CHECKPOINT_FILE, SingleWorker, result_in, threads_of
from trainers.settings import TrainersSettings

TASK_NAME = "relook_fit"
"""What process lists show of the task: `ray::relook_fit`."""


def fit_on_one_worker(job: Job, channel: Any, use_gpu: bool) -> Checkpoint:
    """Train in a task of Ray.

    Args:
        job: of one worker.
        channel: to the caller.
        use_gpu: whether the task needs a GPU.
    Returns:
        The run's last checkpoint.
    Raises:
        UnavailableError: the task was lost more often than `workers.max_failures`.
        RelookError: what the training raised.
    """
    workers = job.settings.workers
    # Ray gives the next fit the same process, which has imported torch already; a local session ends one that is idle
    # for a minute. One that used a GPU ends with its task, which frees all of the GPU's memory.
    task = ray.remote(max_calls=1 if use_gpu else 0)(_train_in_task).options(
        name=TASK_NAME,
        num_cpus=threads_of(workers),
        num_gpus=1 if use_gpu else 0,
        max_retries=workers.max_failures,
        runtime_env={"env_vars": thread_variables(job.settings)},
    )
    running = task.remote(job, channel)
    try:
        ray.get(running)
    except ray.exceptions.RayError as error:
        # What the training raised is the cause, or, where the job could not be unpacked, only quoted.
        own = getattr(error, "cause", None)
        if not isinstance(own, RelookError):
            own = quoted_error(str(error))
        if own is not None:
            raise own from None
        if isinstance(error, ray.exceptions.RayTaskError):
            raise
        raise _lost(job.run_dir, error) from error
    except BaseException:
        # Ctrl-C: the task would go on without anyone who waits for it.
        ray.cancel(running, force=True)
        raise
    return result_in(job.run_dir)


def thread_variables(settings: TrainersSettings) -> dict[str, str]:
    """Return the environment of a process that trains."""
    # Ray sets one thread per actor by default, and OpenMP reads the variable once, when it is loaded.
    # Threads that wait for each other spin for microseconds, then sleep: on two cores shared with a service, training
    # was 2.3 times as fast so as with OpenMP's default of spinning for milliseconds, and 4 % slower on idle cores.
    threads = str(threads_of(settings.workers))
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "GOMP_SPINCOUNT": "2000",
        "NO_ALBUMENTATIONS_UPDATE": "1",
    }


def _train_in_task(job: Job, channel: Any) -> None:
    try:
        job.train(_opened(job), SingleWorker(job.run_dir, job.settings.workers.use_gpu), *sender(channel))
    finally:
        # The process may wait for a next fit: after one of ResNet-18 it holds 0.66 GB instead of 1.22.
        return_freed_memory()


def _opened(job: Job) -> TrainingData:
    """Map the pixels; only a node that has not decoded them yet opens the store, which takes a second."""
    frame = job.settings.model.frame
    if job.settings.workers.data_source == "stream":
        with closing(open_store(job.records)) as store:
            return job.plan.stream(store, frame)
    cache = PixelCache(open_home(job.records.home).cache, frame)
    if cache.missing(job.plan.image_ids):
        with closing(open_store(job.records)) as store:
            return job.plan.open(store, frame)
    return job.plan.mapped(cache)


def _lost(run_dir: Path, error: Exception) -> UnavailableError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    lost = f"training was lost ({type(error).__name__}: {reason})"
    if not (run_dir / CHECKPOINT_FILE).is_file():
        return UnavailableError(f"{lost} before its first checkpoint")
    return UnavailableError(f"{lost}; the last checkpoint is in {run_dir}, run it again with --resume")
