"""The predictor: micro-batches from concurrent requests, one transaction per batch.

    request -> take in, decode (threads) -> queue -> forward pass (a thread per core), storage of images beside it
            -> triage, commit (one thread) -> response

Batch size adapts to load: a request on an idle service is computed at once, and while all cores are computing, the
requests that arrive form the next batch. A batch that computes alone uses all cores; batches that compute at the same
time use one core each. A prediction is returned only after its rows are committed. No Ray and no HTTP here.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch

from images.decode import CostlyError, decode_frames, decode_if_cheap
from records import tracing
from records.arrays import UInt8Array
from records.context import Value, context_of
from records.errors import UnavailableError
from records.frames import Frame
from records.images import is_dicom
from records.parts import in_parts
from records.store import Store
from records.types import Consent, Prediction, RolloutStage
from serving.holder import ModelHolder, cores_of
from serving.images import take_in
from serving.messages import PredictionRequest, ServingState, StoredPrediction
from serving.outbox import StoredImage, review_of
from serving.recording import Job, Recorder, Result, allowed_jobs, pixels_of, same_image
from serving.rollout.candidate import CandidateOutput, CandidateRows, CandidateRunner
from serving.settings import ServingSettings
from vision.inference.output import BatchOutput

logger = logging.getLogger(__name__)

# Costly images wait for each other, not for the threads of others: as many as are decoded at once, and a short queue.
COSTLY_THREADS = 2
MAX_COSTLY = 8
CHECKPOINT_S = 120.0
"""How often SQLite's log is copied into its file, so that no commit has to, seconds.

The first commit after it waits for the disk, since SQLite then begins its log again; so it is not done more often.
"""

T = TypeVar("T")


Decode = Callable[[bytes, Collection[Frame]], dict[Frame, UInt8Array]]


@dataclass(frozen=True, slots=True)
class _QueuedJob:
    """A job and the future of its request."""

    job: Job
    done: "asyncio.Future[StoredPrediction]" = field(repr=False)


class Predictor:
    """Predicts with the model that the ledger names. All public methods must be called from one event loop.

    Args:
        store: with ledger and blobs.
        settings: batching, threads and rules of triage.
    """

    def __init__(self, store: Store, settings: ServingSettings) -> None:
        self._store = store
        self._settings = settings
        self._holder = ModelHolder(store, settings)
        self._queue: asyncio.Queue[_QueuedJob] = asyncio.Queue()
        # A job that was taken from the queue but needs another model than its batch; it starts the next batch.
        self._held_back: _QueuedJob | None = None
        # (caller, idempotency key) -> the running task of the first request with that key.
        self._in_flight: dict[tuple[str, str], asyncio.Task[StoredPrediction]] = {}
        self._loops: list[asyncio.Task[None]] = []
        # asyncio keeps only weak references to tasks, so running ones are kept here until they end.
        self._background: set[asyncio.Task[None]] = set()
        self._cores = cores_of(settings)
        # A slot is held from the forward pass to the commit, a core only during the forward pass. One slot more than
        # cores lets a batch compute while another waits for its commit. With more slots, batches would leave the
        # queue earlier and smaller, only to wait for the write thread: more latency, no more throughput.
        self._slots = asyncio.Semaphore(self._cores + 1)
        self._free_cores = asyncio.Semaphore(self._cores)
        self._num_computing = 0
        self._decode_threads = ThreadPoolExecutor(settings.decode_threads, "decode")
        self._costly_threads = ThreadPoolExecutor(COSTLY_THREADS, "costly")
        self._num_costly = 0
        self._forward_threads = ThreadPoolExecutor(self._cores, "forward")
        # One write thread: SQLite runs one write transaction at a time, so a second thread would only wait.
        self._write_thread = ThreadPoolExecutor(1, "write")
        # Loading a model takes seconds, and shadow predictions may be slow. Each has a thread of its own, so that
        # neither delays requests.
        self._poll_thread = ThreadPoolExecutor(1, "poll")
        self._shadow_thread = ThreadPoolExecutor(1, "shadow")
        self._candidate = CandidateRunner(store, settings)
        self._is_mirroring = False
        self._recorder = Recorder(store, settings, self._decode_threads)
        self._followed = 0
        self._follows = False

    async def start(self) -> None:
        """Load the serving model, then start the batch loop and the polling of the ledger."""
        await self._in(self._poll_thread, self._refresh)
        loops = (self._poll_ledger(), self._run_batches(), self._empty_log())
        self._loops = [asyncio.create_task(loop) for loop in loops]

    async def stop(self) -> None:
        """Finish running batches and end all threads."""
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, *self._background, return_exceptions=True)
        for pool in (
            self._decode_threads,
            self._costly_threads,
            self._forward_threads,
            self._write_thread,
            self._poll_thread,
            self._shadow_thread,
        ):
            pool.shutdown(wait=False, cancel_futures=True)

    def state(self) -> ServingState:
        """Return which model serves, or why none does."""
        return self._holder.state()

    @property
    def generation(self) -> int:
        """Generation of the ledger that predictions made so far may have followed; see `records.models.generation`."""
        return max(self._holder.generation, self._candidate.generation)

    @property
    def lags(self) -> bool:
        """Whether the ledger names a model that could not be loaded here."""
        return self._holder.is_stuck

    async def follow(self, generation: int) -> None:
        """Follow the ledger at once if another replica has seen a later generation of it.

        Raises UnavailableError if what the ledger names cannot be served here.
        """
        if self._followed >= generation:
            return
        await self._in(self._poll_thread, self._refresh, generation)
        if not self._follows:
            raise UnavailableError(f"this replica cannot serve the newest model: {self._holder.state().detail}")

    def check(self) -> None:
        """Raise UnavailableError if a loop of the predictor has ended, which only a bug can cause."""
        for task in self._loops:
            if task.done():
                raise UnavailableError(f"the predictor stopped: {task.exception() or 'cancelled'}")

    async def predict(self, request: PredictionRequest) -> StoredPrediction:
        """Predict one image.

        A request with the idempotency key of an earlier request gets the prediction of that request, even if the
        earlier request is still running.

        Args:
            request: the image and its context.
        Returns:
            The prediction, after its commit.
        Raises:
            ImageError: the image cannot be used.
            RefusedError: the idempotency key was used for another image.
            UnavailableError: no model serves, or the ledger cannot be reached.
        """
        if request.idempotency_key is None:
            return await self._predict(request)
        key = (request.caller, request.idempotency_key)
        # No `await` between lookup and insert, so two requests of one event loop cannot both find the key free.
        # Requests in different replicas can; then the unique constraint in the ledger decides, see `Recorder.record`.
        task = self._in_flight.get(key)
        if task is None:
            task = asyncio.create_task(self._predict(request))
            self._in_flight[key] = task
            task.add_done_callback(lambda _: self._in_flight.pop(key, None))
            # A caller that disconnects must not cancel the task, because other callers may wait for it.
            return await asyncio.shield(task)
        stored = await asyncio.shield(task)
        image = await self._in(self._decode_threads, self._take_in, request)
        return same_image(stored, image)

    async def _predict(self, request: PredictionRequest) -> StoredPrediction:
        with tracing.span("decode", request.request_id):
            try:
                prepared = await self._in(self._decode_threads, self._prepare, request, decode_if_cheap)
            except CostlyError:
                prepared = await self._prepare_costly(request)
        if isinstance(prepared, StoredPrediction):
            return prepared
        queued = _QueuedJob(prepared, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(queued)
        return await queued.done

    async def _prepare_costly(self, request: PredictionRequest) -> Job | StoredPrediction:
        if self._num_costly >= MAX_COSTLY:
            raise UnavailableError(f"{MAX_COSTLY} images that are costly to decode are waiting already")
        self._num_costly += 1
        try:
            return await self._in(self._costly_threads, self._prepare, request, decode_frames)
        finally:
            self._num_costly -= 1

    def _prepare(self, request: PredictionRequest, decode: Decode) -> Job | StoredPrediction:
        """Return a decoded job, or the stored prediction of a repeated request. Runs in a thread for decoding."""
        arrived_s = time.perf_counter()
        if decode is decode_if_cheap and is_dicom(request.image):
            raise CostlyError
        image = self._take_in(request)
        if request.idempotency_key is not None or request.repeated:
            repeated = self._stored(request, image)
            if repeated is not None:
                return same_image(repeated, image)
        # The job keeps this model even if the models are swapped: its pixels have the size that this model needs.
        model = self._holder.current
        consent = (request.context.consent or self._settings.default_consent) if self._settings.keep else Consent.NONE
        frame = model.document.geometry.frame
        # A costly image is decoded once for all who will need it; others are decoded for further frames on demand.
        shown = frame.shown(self._settings.overlay_side_px)
        further = (shown, *self._candidate.frames()) if decode is decode_frames else ()
        decoded = decode(image.data, sorted({frame, *further}))
        return Job(request, image, consent, model, decoded[frame], arrived_s, decoded=decoded)

    def _stored(self, request: PredictionRequest, image: StoredImage) -> StoredPrediction | None:
        """Return the prediction of an earlier attempt, if it was written."""
        if request.idempotency_key is not None:
            return self._recorder.repeated(request)
        attempted = {"image_id": image.id, "request_id": request.request_id, "served": True}
        with self._store.ledger.read() as tx:
            found = tx.find(Prediction, where=attempted, limit=1)
            return StoredPrediction(found[0], review_of(tx, found[0])) if found else None

    def _take_in(self, request: PredictionRequest) -> StoredImage:
        return take_in(self._store, request.image, self._settings.max_pixels)

    async def _poll_ledger(self) -> None:
        while True:
            await asyncio.sleep(self._settings.model_poll_s)
            try:
                await self._in(self._poll_thread, self._refresh)
            except Exception:
                # What cannot be read now is read at the next poll; a loop that ended would stop the service.
                logger.exception("the ledger was not followed")

    async def _empty_log(self) -> None:
        while True:
            await asyncio.sleep(CHECKPOINT_S)
            try:
                await asyncio.to_thread(self._store.ledger.checkpoint)
            except UnavailableError:
                # Commits copy the log where this cannot.
                logger.exception("the ledger's log was not copied into its file")

    def _refresh(self, until: int | None = None) -> None:
        """Follow the ledger; with `until` only if this generation was not reached meanwhile."""
        if until is not None and self._followed >= until:
            return
        self._holder.refresh()
        self._recorder.follow_drift()
        # Read after the model, so what the candidate follows is at least as new.
        self._follows = self._candidate.refresh() and self._holder.follows
        if self._follows:
            self._followed = self._holder.generation

    async def _run_batches(self) -> None:
        while True:
            # A slot and a core are acquired before the batch is gathered, so that jobs that arrive while this loop
            # waits for a core still join the batch.
            await self._slots.acquire()
            await self._free_cores.acquire()
            batch = await self._gather()
            num_threads = 1
            # A batch gets all cores if no other batch computes and no job waits, and then it keeps them to its end:
            # the number of threads cannot be changed during a forward pass, and a second pass on one of its cores
            # would delay it at every operator, at which its threads wait for each other. A batch too small to gain by
            # all cores leaves the others to the next one.
            worth = len(batch) >= batch[0].job.model.all_cores_from
            if worth and self._num_computing == 0 and self._queue.empty():
                num_threads = self._cores
                for _ in range(num_threads - 1):
                    await self._free_cores.acquire()
            self._num_computing += 1
            task = asyncio.create_task(self._compute(batch, num_threads))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _gather(self) -> list[_QueuedJob]:
        """Wait for a job, then collect further jobs for the same model, up to `max_batch_size` in all."""
        first = self._held_back or await self._queue.get()
        self._held_back = None
        batch = [first]
        deadline_s = time.perf_counter() + self._settings.batch_wait_ms / 1000
        while len(batch) < self._settings.max_batch_size:
            try:
                left_s = deadline_s - time.perf_counter()
                queued = self._queue.get_nowait() if left_s <= 0 else await asyncio.wait_for(self._queue.get(), left_s)
            except (asyncio.QueueEmpty, TimeoutError):
                break
            # During a model swap the queue holds jobs for both models. `asyncio.Queue` cannot put a job back at the
            # front, so the first job for the other model is kept here and starts the next batch. This preserves the
            # order of arrival.
            if queued.job.model.loaded is not first.job.model.loaded:
                self._held_back = queued
                break
            batch.append(queued)
        return batch

    async def _compute(self, batch: list[_QueuedJob], num_threads: int) -> None:
        # Images are stored while the network computes; the commit waits for both.
        keeping = asyncio.create_task(self._keep(batch))
        try:
            parts = await self._in(self._forward_threads, in_parts, batch, partial(self._forward, num_threads))
        except Exception as error:
            logger.exception("a forward pass failed")
            _fail(batch, error)
            self._slots.release()
            return
        finally:
            # The cores are released as soon as the forward pass ends, the slot only after the commit.
            self._num_computing -= 1
            for _ in range(num_threads):
                self._free_cores.release()
        try:
            # One part, unless a job failed: then it has its error, and the others are computed without it.
            kept = dict(zip(map(id, batch), await keeping, strict=True))
            for part in parts:
                if isinstance(part.result, Exception):
                    _fail(part.members, part.result)
                else:
                    await self._commit(part.members, [kept[id(queued)] for queued in part.members], *part.result)
        finally:
            self._slots.release()

    async def _keep(self, batch: Sequence[_QueuedJob]) -> list[Consent | Exception]:
        """Store the images of a batch, shared among the threads for decoding; see `Recorder.keep`."""
        jobs = [queued.job for queued in batch]
        if all(job.consent is Consent.NONE for job in jobs):
            return [Consent.NONE] * len(jobs)
        share = -(-len(jobs) // self._settings.decode_threads)
        shares = [jobs[start : start + share] for start in range(0, len(jobs), share)]
        found = await asyncio.gather(*(self._in(self._decode_threads, self._recorder.keep, some) for some in shares))
        return list(chain.from_iterable(found))

    def _forward(self, num_threads: int, batch: Sequence[_QueuedJob]) -> tuple[BatchOutput, CandidateOutput | None]:
        jobs = [queued.job for queued in batch]
        # The setting applies to the calling thread only, so every forward pass sets it.
        torch.set_num_threads(num_threads)
        began_s, began_ns = time.perf_counter(), time.time_ns()
        known = known_of(jobs)
        output = jobs[0].model.loaded.predict(np.stack([job.pixels for job in jobs]), gradcam=True, context=known)
        each_s = (time.perf_counter() - began_s) / len(jobs)
        ids = [job.request.request_id for job in jobs]
        tracing.record("forward", ids, began_ns, time.time_ns(), images=len(jobs), threads=num_threads)
        selected = self._candidate.select(assignment_keys(jobs), RolloutStage.CANARY)
        if selected is None:
            return output, None
        # A canary predicts before the response is sent, because its prediction may be the one that is returned.
        pixels = np.stack([pixels_of(jobs[row], selected.model) for row in selected.rows])
        return output, self._candidate.predict(selected, pixels, each_s, [known[row] for row in selected.rows])

    async def _commit(
        self,
        batch: Sequence[_QueuedJob],
        kept: Sequence[Consent | Exception],
        output: BatchOutput,
        candidate: CandidateOutput | None,
    ) -> None:
        jobs, began_ns = [queued.job for queued in batch], time.time_ns()
        try:
            record = self._recorder.record
            results = await self._in(self._write_thread, record, jobs, kept, output, candidate, self._candidate)
        except Exception as error:
            # The ledger cannot be reached, so every request of the batch fails, and callers can send them again.
            logger.exception("a batch was not written")
            _fail(batch, error)
            return
        ids = [job.request.request_id for job in jobs]
        tracing.record("commit", ids, began_ns, time.time_ns(), images=len(jobs))
        # Results are returned only after the commit, so a crash cannot lose a prediction that a caller has seen.
        for queued, result in zip(batch, results, strict=True):
            # A request that was cancelled has a cancelled future; its prediction stays stored.
            if queued.done.done():
                continue
            if isinstance(result, Exception):
                queued.done.set_exception(result)
            else:
                queued.done.set_result(result)
        self._mirror(allowed_jobs(jobs, kept), results)

    def _mirror(self, jobs: list[Job], results: list[Result]) -> None:
        """Predict a served batch with a candidate in shadow, in the background."""
        # At most one batch is mirrored at a time. Under load the others are skipped, so that a slow candidate neither
        # delays requests nor builds up a queue; its guardrails need only a sample of the traffic.
        selected = None if self._is_mirroring else self._candidate.select(assignment_keys(jobs), RolloutStage.SHADOW)
        if selected is None:
            return
        self._is_mirroring = True
        task = asyncio.create_task(self._in(self._shadow_thread, self._predict_shadow, selected, jobs, results))
        self._background.add(task)
        task.add_done_callback(self._mirrored)

    def _mirrored(self, task: "asyncio.Task[None]") -> None:
        self._is_mirroring = False
        self._background.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a mirrored batch was not written", exc_info=task.exception())

    def _predict_shadow(self, selected: CandidateRows, jobs: list[Job], results: list[Result]) -> None:
        pixels = np.stack([pixels_of(job, selected.model) for job in jobs])
        # Infinity switches the comparison of latency off: a shadow prediction shares its cores with served batches,
        # so its time does not measure the candidate.
        candidate = self._candidate.predict(selected, pixels, float("inf"), known_of(jobs))
        self._recorder.record_shadow(jobs, results, candidate, self._candidate)

    async def _in(self, pool: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


def known_of(jobs: Sequence[Job]) -> list[dict[str, Value]]:
    """Return what is known about the image of each job beside its pixels."""
    return [context_of(job.request.context) for job in jobs]


def assignment_keys(jobs: list[Job]) -> list[str]:
    """Return for each job the key that assigns it to champion or canary.

    The key is the lesion id, so that all images of a lesion get the same model, or the image id if no lesion is given.
    """
    return [job.request.context.lesion_id or job.image.id for job in jobs]


def _fail(batch: Sequence[_QueuedJob], error: Exception) -> None:
    for queued in batch:
        if not queued.done.done():
            queued.done.set_exception(error)
