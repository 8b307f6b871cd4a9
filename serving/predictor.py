"""The predictor: micro-batches from requests, one transaction per batch, then the answers.

    request -> take in, decode (threads) -> queue -> forward passes (a thread per core)
            -> triage, overlays, commit (one thread) -> answers

A batch that computes alone has all cores; batches that compute at once have one core each, so that none waits
for another's threads. While all cores compute the next batch gathers, so batches grow with load and a lone
request waits for nobody. An answer leaves only after its rows are committed. No Ray and no HTTP here.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from images.decode import decode_square
from records.errors import RefusedError, UnavailableError
from records.store import Store
from records.types import Consent, Rollout, RolloutStage
from serving.holder import ModelHolder, ServedModel
from serving.images import take_in, was_erased
from serving.messages import PredictionRequest, ServingState, StoredPrediction
from serving.outbox import StoredImage
from serving.recording import Job, Recorder, pixels_of, same_image
from serving.rollout.trial import Beside, Trial
from serving.settings import ServingSettings, compute_threads
from vision.inference.output import BatchOutput

logger = logging.getLogger(__name__)

T = TypeVar("T")
Found = tuple[Rollout, ServedModel, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A job and who waits for it."""

    job: Job
    done: "asyncio.Future[StoredPrediction]" = field(repr=False)


class Predictor:
    """Answers requests with the model that the ledger names. Use it within one event loop.

    Args:
        store: with ledger and blobs.
        settings: of this room.
    """

    def __init__(self, store: Store, settings: ServingSettings) -> None:
        self._store = store
        self._settings = settings
        self._holder = ModelHolder(store, settings)
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._held: _Waiting | None = None
        self._under_way: dict[tuple[str, str], asyncio.Task[StoredPrediction]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._settling: set[asyncio.Task[None]] = set()
        self._cores = compute_threads(settings.predictor_cpus)
        # Every core may compute a batch while another waits for its commit; more would only grow latency.
        self._slots = asyncio.Semaphore(self._cores + 1)
        self._free_cores = asyncio.Semaphore(self._cores)
        self._num_computing = 0
        self._decode_threads = ThreadPoolExecutor(settings.decode_threads, "decode")
        self._forward_threads = ThreadPoolExecutor(self._cores, "forward")
        self._write_thread = ThreadPoolExecutor(1, "write")
        self._poll_thread = ThreadPoolExecutor(1, "poll")
        self._shadow_thread = ThreadPoolExecutor(1, "shadow")
        self._trial = Trial(store, settings)
        self._is_mirroring = False
        self._recorder = Recorder(store, settings, self._decode_threads)

    async def start(self) -> None:
        """Load the model that answers and begin to take requests."""
        await self._in(self._poll_thread, self._refresh)
        self._tasks = [asyncio.create_task(self._follow_ledger()), asyncio.create_task(self._run_batches())]

    async def stop(self) -> None:
        """Finish what is under way and end all threads."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._settling, return_exceptions=True)
        for pool in (
            self._decode_threads,
            self._forward_threads,
            self._write_thread,
            self._poll_thread,
            self._shadow_thread,
        ):
            pool.shutdown(wait=False, cancel_futures=True)

    def state(self) -> ServingState:
        """Return which model answers, or why none does."""
        return self._holder.state()

    def check(self) -> None:
        """Raise UnavailableError if a loop of the predictor has ended, which only a bug can do."""
        for task in self._tasks:
            if task.done():
                raise UnavailableError(f"the predictor stopped: {task.exception() or 'cancelled'}")

    async def predict(self, request: PredictionRequest) -> StoredPrediction:
        """Answer a request.

        Args:
            request: one image and what is known about it.
        Returns:
            The answer, after it was committed. A request with the idempotency key of another one gets
            that one's answer, also while it is under way.
        Raises:
            ImageError: the image cannot be used.
            RefusedError: the idempotency key was used for another image.
            UnavailableError: no model answers, or the ledger does not.
        """
        if request.idempotency_key is None:
            return await self._predict(request)
        key = (request.caller, request.idempotency_key)
        task = self._under_way.get(key)
        if task is None:
            task = asyncio.create_task(self._predict(request))
            self._under_way[key] = task
            task.add_done_callback(lambda _: self._under_way.pop(key, None))
            return await asyncio.shield(task)
        answered = await asyncio.shield(task)
        image = await self._in(self._decode_threads, self._take_in, request)
        return same_image(answered, image)

    async def _predict(self, request: PredictionRequest) -> StoredPrediction:
        prepared = await self._in(self._decode_threads, self._prepare, request)
        if isinstance(prepared, StoredPrediction):
            return prepared
        waiting = _Waiting(prepared, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(waiting)
        return await waiting.done

    def _prepare(self, request: PredictionRequest) -> Job | StoredPrediction:
        arrived_s = time.perf_counter()
        image = self._take_in(request)
        if request.idempotency_key is not None:
            repeated = self._recorder.repeated(request)
            if repeated is not None:
                return same_image(repeated, image)
        model = self._holder.current
        consent = (request.context.consent or self._settings.default_consent) if self._settings.keep else Consent.NONE
        pixels = decode_square(image.data, model.document.geometry.side_px)
        if consent is not Consent.NONE and was_erased(self._store, image.id):
            consent = Consent.NONE
        if consent is not Consent.NONE:
            # Before the transaction: a blob without a row is harmless, a row without its blob is not.
            self._store.blobs.put(image.data)
        return Job(request, image, consent, model, pixels, arrived_s)

    def _take_in(self, request: PredictionRequest) -> StoredImage:
        return take_in(self._store, request.image, self._settings.max_pixels)

    async def _follow_ledger(self) -> None:
        while True:
            await asyncio.sleep(self._settings.model_poll_s)
            await self._in(self._poll_thread, self._refresh)

    def _refresh(self) -> None:
        self._holder.refresh()
        self._trial.refresh()

    async def _run_batches(self) -> None:
        while True:
            # A slot and a core first: while none is free, the batch grows.
            await self._slots.acquire()
            await self._free_cores.acquire()
            batch = await self._gather()
            self._num_computing += 1
            is_alone = self._num_computing == 1 and self._queue.empty()
            task = asyncio.create_task(self._answer(batch, self._cores if is_alone else 1))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)

    async def _answer(self, batch: list[_Waiting], num_threads: int) -> None:
        try:
            output, beside = await self._in(self._forward_threads, self._forward, batch, num_threads)
        except Exception as error:
            logger.exception("a forward pass failed")
            _fail(batch, error)
            self._slots.release()
            return
        finally:
            self._num_computing -= 1
            self._free_cores.release()
        await self._settle(batch, output, beside)

    async def _gather(self) -> list[_Waiting]:
        """Wait for a job and take what queued up with it, all for the same model."""
        first = self._held or await self._queue.get()
        self._held = None
        batch = [first]
        deadline_s = time.perf_counter() + self._settings.batch_wait_ms / 1000
        while len(batch) < self._settings.max_batch_size:
            try:
                left_s = deadline_s - time.perf_counter()
                found = self._queue.get_nowait() if left_s <= 0 else await asyncio.wait_for(self._queue.get(), left_s)
            except (asyncio.QueueEmpty, TimeoutError):
                break
            if found.job.model.loaded is not first.job.model.loaded:
                self._held = found
                break
            batch.append(found)
        return batch

    async def _settle(self, batch: list[_Waiting], output: BatchOutput, beside: Beside | None) -> None:
        try:
            jobs = [waiting.job for waiting in batch]
            results = await self._in(self._write_thread, self._recorder.record, jobs, output, beside, self._trial)
        except Exception as error:
            logger.exception("a batch was not written")
            _fail(batch, error)
        else:
            for waiting, result in zip(batch, results, strict=True):
                if waiting.done.done():
                    continue
                if isinstance(result, RefusedError):
                    waiting.done.set_exception(result)
                else:
                    waiting.done.set_result(result)
            self._mirror(jobs, results)
        finally:
            self._slots.release()

    def _mirror(self, jobs: list[Job], results: list[StoredPrediction | RefusedError]) -> None:
        """Show a candidate in shadow what was answered, off the request's path; a batch is left out while one runs."""
        found = None if self._is_mirroring else self._trial.rows_of(split_keys(jobs), RolloutStage.SHADOW)
        if found is None:
            return
        self._is_mirroring = True
        task = asyncio.create_task(self._in(self._shadow_thread, self._ask_shadow, found, jobs, results))
        self._settling.add(task)
        task.add_done_callback(self._mirrored)

    def _mirrored(self, task: "asyncio.Task[None]") -> None:
        self._is_mirroring = False
        self._settling.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a mirrored batch was not written", exc_info=task.exception())

    def _ask_shadow(self, found: Found, jobs: list[Job], results: list[StoredPrediction | RefusedError]) -> None:
        beside = self._trial.ask(found, np.stack([pixels_of(job, found[1]) for job in jobs]), float("inf"))
        self._recorder.record_shadow(jobs, results, beside, self._trial)

    def _forward(self, batch: list[_Waiting], num_threads: int) -> tuple[BatchOutput, Beside | None]:
        jobs = [waiting.job for waiting in batch]
        torch.set_num_threads(num_threads)
        began_s = time.perf_counter()
        output = jobs[0].model.loaded.predict(np.stack([job.pixels for job in jobs]), gradcam=True)
        each_s = (time.perf_counter() - began_s) / len(jobs)
        found = self._trial.rows_of(split_keys(jobs), RolloutStage.CANARY)
        if found is None:
            return output, None
        pixels = np.stack([pixels_of(jobs[row], found[1]) for row in found[2]])
        return output, self._trial.ask(found, pixels, each_s)

    async def _in(self, pool: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


def split_keys(jobs: list[Job]) -> list[str]:
    """Return what a canary's split goes by: the lesion, so that its images stay together, else the image."""
    return [job.request.context.lesion_id or job.image.id for job in jobs]


def _fail(batch: list[_Waiting], error: Exception) -> None:
    for waiting in batch:
        if not waiting.done.done():
            waiting.done.set_exception(error)
