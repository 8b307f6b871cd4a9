"""The second half of a batch: triage, rows, one transaction.

In: jobs with their model's output. Out: predictions that are committed to the ledger, or the error of a job. It runs
in the write thread of the predictor and does not use its queues.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat

import numpy as np

from images.decode import decode_frame
from records.arrays import Float32Array, FloatArray, UInt8Array
from records.errors import RefusedError, UnavailableError
from records.frames import Frame
from records.ids import hash_of, new_id, utc_now
from records.parts import attempt, each_in_parts
from records.store import Store
from records.types import Arm, Consent, Decision, Prediction, ReviewItem
from serving.context import effect_of
from serving.drift import drifting_sources, key_of, source_of
from serving.holder import ServedModel
from serving.images import allowed_consents, gradcam_map
from serving.messages import HeatMap, PredictionRequest, StoredPrediction
from serving.outbox import (
    PredictionRows,
    StoredImage,
    find_repeated,
    image_row,
    review_of,
    review_row,
    write_predictions,
)
from serving.rollout.candidate import CandidateOutput, CandidateRunner, serves_candidate
from serving.schemas import ContextEffect
from serving.settings import ServingSettings
from serving.triage import TriageRules, Verdict, audit_draw_of, triage
from vision.inference.output import BatchOutput
from vision.inference.suitability import Suitability, assess

logger = logging.getLogger(__name__)

Result = StoredPrediction | Exception
Computed = tuple[PredictionRows, HeatMap | None]


@dataclass(frozen=True, slots=True)
class Job:
    """One request, decoded for the model that was serving when it arrived."""

    request: PredictionRequest
    image: StoredImage
    consent: Consent
    """as asked for; `Recorder.keep` returns what is allowed"""
    model: ServedModel
    pixels: UInt8Array
    """[S, S, 3] in the geometry of `model`"""
    arrived_s: float
    """of `time.perf_counter`"""
    arm: Arm = Arm.CHAMPION
    rollout_id: str | None = None
    decoded: Mapping[Frame, UInt8Array] = field(default_factory=dict, repr=False)
    """further frames of a costly image: neither the write thread nor a forward thread may wait for its decoding"""


class Recorder:
    """Turns outputs into stored predictions.

    Args:
        store: with ledger and blobs.
        settings: rules of triage, and how overlays are drawn.
        drawing: threads that draw the overlays of responses, the most expensive part of recording.
    """

    def __init__(self, store: Store, settings: ServingSettings, drawing: Executor) -> None:
        self._store = store
        self._settings = settings
        self._settings_hash = hash_of(settings.model_dump(mode="json"))
        self._rules = TriageRules(settings.low_confidence, settings.max_set_size, settings.audit_share)
        raised = min(1.0, settings.audit_share * settings.drift_sampling)
        self._drift_rules = replace(self._rules, audit_share=raised, drifts=True)
        self._drifting: frozenset[str] = frozenset()
        self._drawing = drawing

    def follow_drift(self) -> None:
        """Read which sources have changed, for the images from now on; what was known stays if that fails."""
        with suppress(UnavailableError):
            self._drifting = drifting_sources(self._store)

    def keep(self, jobs: Sequence[Job]) -> list[Consent | Exception]:
        """Store the images of some jobs, as far as their consent allows; it may run beside their forward pass.

        Args:
            jobs: of one batch, or a share of it.
        Returns:
            Per job the consent that it may use, or its error.
        """
        if not jobs:
            return []
        wanted = [job.consent for job in jobs]
        allowed = attempt(partial(allowed_consents, self._store, [job.image.id for job in jobs]), wanted)
        if isinstance(allowed, Exception):
            return [allowed] * len(jobs)
        return [attempt(partial(self._keep, job), consent) for job, consent in zip(jobs, allowed, strict=True)]

    def _keep(self, job: Job, consent: Consent) -> Consent:
        if consent is not Consent.NONE:
            # The blob is written before the transaction. A crash in between leaves a blob without a row, which is
            # harmless. The other order could leave a row that refers to a missing blob.
            self._store.blobs.put(job.image.data)
        return consent

    def record(
        self,
        batch: Sequence[Job],
        kept: Sequence[Consent | Exception],
        output: BatchOutput,
        candidate: CandidateOutput | None = None,
        runner: CandidateRunner | None = None,
    ) -> list[Result]:
        """Decide about a batch and commit it in one transaction, or in several if a job fails.

        Args:
            batch: N jobs of one model.
            kept: what `keep` returned for them.
            output: of that model, N rows.
            candidate: a canary's output for some rows; the more cautious of two predictions is served.
            runner: counts the guardrails of `candidate`.
        Returns:
            Per job the committed prediction, or the error of this job alone.
        Raises:
            UnavailableError: the ledger cannot be reached.
        """
        batch = allowed_jobs(batch, kept)
        known = _suitability(batch, output)
        suitable = [one if isinstance(one, Exception) else of for one, of in zip(kept, known, strict=True)]
        # Heat maps that callers wait for are drawn in parallel; the write thread waits, which keeps commits in order of
        # batches. Without one the work is too little to hand over.
        mapped = self._drawing.map if any(job.request.explain for job in batch) else map
        computed = list(mapped(self._computed, batch, repeat(output), range(len(batch)), suitable))
        if not self._settings.keep:
            return [each if isinstance(each, Exception) else _stored(each, None) for each in computed]
        unserved: dict[int, PredictionRows] = {}
        if candidate is not None and runner is not None:
            pairs = attempt(partial(self._choose, batch, computed, runner), candidate)
            if isinstance(pairs, UnavailableError):
                raise pairs
            if isinstance(pairs, Exception):
                logger.error("a batch is served without its candidate", exc_info=pairs)
            else:
                computed, unserved = pairs
        rows = {row: each[0] for row, each in enumerate(computed) if not isinstance(each, Exception)}

        def write(some: Sequence[int]) -> Sequence[ReviewItem | None]:
            # The served rows and the other halves of the pairs commit together: a pair is never stored by half.
            others = [unserved[row] for row in some if row in unserved]
            return write_predictions(self._store, [*(rows[row] for row in some), *others])[: len(some)]

        written = dict(zip(rows, each_in_parts(list(rows), write), strict=True))
        return [
            self._result(job, each, written.get(row))
            for row, (job, each) in enumerate(zip(batch, computed, strict=True))
        ]

    def record_shadow(
        self, batch: Sequence[Job], served: Sequence[Result], candidate: CandidateOutput, runner: CandidateRunner
    ) -> None:
        """Commit what a candidate in shadow predicted, as unserved predictions, and count its guardrails."""
        computed = self._compute_candidate(batch, candidate, Arm.SHADOW)
        pairs = []
        for row, shadow in zip(candidate.selected.rows, computed, strict=True):
            champion = served[row]
            if isinstance(champion, StoredPrediction):
                pairs.append((champion.prediction, None if shadow is None else shadow[0].prediction))
        rows = [_unserved(shadow[0].prediction) for shadow in computed if shadow is not None]
        for found in each_in_parts(rows, partial(write_predictions, self._store)):
            if isinstance(found, Exception):
                logger.error("a prediction in shadow was not written", exc_info=found)
        runner.count(candidate, pairs)

    def repeated(self, request: PredictionRequest) -> StoredPrediction | None:
        """Return the stored prediction with a request's idempotency key, or None."""
        found = find_repeated(self._store, request.caller, request.idempotency_key or "")
        if found is None:
            return None
        with self._store.ledger.read() as tx:
            return StoredPrediction(found, review_of(tx, found))

    def _choose(
        self,
        batch: Sequence[Job],
        computed: list[Computed | Exception],
        runner: CandidateRunner,
        candidate: CandidateOutput,
    ) -> tuple[list[Computed | Exception], dict[int, PredictionRows]]:
        """Return what is served per job, and by job the half of its pair that is stored and not served."""
        chosen, unserved, pairs = list(computed), {}, []
        canary = self._compute_candidate(batch, candidate, Arm.CANDIDATE)
        for row, other in zip(candidate.selected.rows, canary, strict=True):
            champion = computed[row]
            if isinstance(champion, Exception):
                continue
            pairs.append((champion[0].prediction, None if other is None else other[0].prediction))
            if other is None:
                continue
            if serves_candidate(champion[0].prediction, other[0].prediction):
                chosen[row], other = other, champion
            unserved[row] = _unserved(other[0].prediction)
        runner.count(candidate, pairs)
        return chosen, unserved

    def _compute_candidate(self, batch: Sequence[Job], candidate: CandidateOutput, arm: Arm) -> list[Computed | None]:
        selected, output = candidate.selected, candidate.output
        if output is None:
            return [None] * len(selected.rows)
        jobs = []
        for row in selected.rows:
            # Not the champion's pixels if the two geometries differ.
            pixels = pixels_of(batch[row], selected.model)
            job = replace(batch[row], model=selected.model, arm=arm, rollout_id=selected.rollout.id, pixels=pixels)
            jobs.append(job)
        suitable = _suitability(jobs, output)
        found = [self._computed(job, output, row, suitable[row]) for row, job in enumerate(jobs)]
        for each in found:
            if isinstance(each, Exception):
                logger.error("candidate %s failed on an image", selected.model.id[:12], exc_info=each)
        return [None if isinstance(each, Exception) else each for each in found]

    def _result(self, job: Job, computed: Computed | Exception, written: ReviewItem | Exception | None) -> Result:
        if isinstance(computed, Exception):
            return computed
        if isinstance(written, RefusedError) and job.request.idempotency_key:
            # Another replica committed this idempotency key meanwhile.
            return attempt(lambda refused: self._repeated(job, refused), written)
        return written if isinstance(written, Exception) else _stored(computed, written)

    def _repeated(self, job: Job, refused: RefusedError) -> StoredPrediction:
        repeated = self.repeated(job.request)
        if repeated is None:
            raise refused
        return same_image(repeated, job.image)

    def _computed(
        self, job: Job, output: BatchOutput, row: int, suitable: Suitability | Exception
    ) -> Computed | Exception:
        """Return the rows of one job, or its error."""
        if isinstance(suitable, Exception):
            return suitable
        return attempt(lambda known: self._compute(job, output, row, known), suitable)

    def _compute(self, job: Job, output: BatchOutput, row: int, suitable: Suitability) -> Computed:
        draw = audit_draw_of(job.image.id, self._settings.audit_salt)
        document = job.model.document
        rules = self._rules_of(job)
        verdict = triage(output.probabilities[row], document.taxonomy, document.operating, rules, draw, suitable)
        effect = effect_of(output, row, document) if verdict.label else None
        prediction = self._prediction(job, verdict, output.probabilities[row], output.num_threads, effect)
        target = document.taxonomy.index_of(verdict.label) if verdict.label else None
        values = output.maps[row, target] if output.maps is not None and target is not None else None
        heat_map = self._heat_map(job, verdict, values)
        if job.consent is Consent.NONE:
            return PredictionRows(prediction, None, None), heat_map
        review = None
        if verdict.decision in (Decision.REVIEW, Decision.URGENT):
            review = review_row(prediction, verdict, values, document.geometry.crop, self._settings.urgent_due_h)
        image = image_row(self._store, job.image, job.request.context, job.consent, prediction.created_at)
        return PredictionRows(prediction, image, review, job.image), heat_map

    def _rules_of(self, job: Job) -> TriageRules:
        if not self._drifting:
            return self._rules
        source = source_of(job.request.organisation, job.request.context.model_dump(include={"site", "device"}))
        return self._drift_rules if key_of(source) in self._drifting else self._rules

    def _heat_map(self, job: Job, verdict: Verdict, values: Float32Array | None) -> HeatMap | None:
        if not job.request.explain or values is None or verdict.label is None:
            return None
        shown = framed(job, job.model.document.geometry.frame.shown(self._settings.overlay_side_px))
        return gradcam_map(job.model.loaded, shown, values, verdict.label, self._settings.overlay_alpha)

    def _prediction(
        self, job: Job, verdict: Verdict, probabilities: FloatArray, num_threads: int, effect: ContextEffect | None
    ) -> Prediction:
        request, model = job.request, job.model
        has_label = verdict.label is not None
        codes = model.document.taxonomy.codes
        return Prediction(
            id=new_id(),
            request_id=request.request_id,
            created_at=utc_now(),
            caller=request.caller,
            organisation=request.organisation,
            idempotency_key=request.idempotency_key,
            image_id=job.image.id,
            consent=job.consent,
            # Without consent nothing is kept that says whose image it was.
            context={} if job.consent is Consent.NONE else _stored_context(request),
            model_id=model.id,
            model_status=model.status,
            arm=job.arm,
            rollout_id=job.rollout_id,
            engine=model.loaded.engine,
            precision=model.loaded.precision,
            num_threads=num_threads,
            settings_hash=self._settings_hash,
            label=verdict.label,
            confidence=verdict.confidence,
            probabilities=dict(zip(codes, probabilities.tolist(), strict=True)) if has_label else None,
            context_effect=None if effect is None else effect.model_dump(mode="json"),
            prediction_set=list(verdict.prediction_set),
            out_of_distribution_score=verdict.suitability.ood_score,
            quality_score=verdict.suitability.quality_score,
            quality_reason=verdict.suitability.quality_reason,
            decision=verdict.decision,
            reasons=list(verdict.reasons),
            latency_ms=(time.perf_counter() - job.arrived_s) * 1000,
        )


def pixels_of(job: Job, model: ServedModel) -> UInt8Array:
    """Return a job's pixels in a model's geometry, [S, S, 3]."""
    return framed(job, model.document.geometry.frame)


def framed(job: Job, frame: Frame) -> UInt8Array:
    """Return what a frame takes of a job's image, [H, W, 3]; decoded only if it was not decoded for that frame."""
    if job.model.document.geometry.frame == frame:
        return job.pixels
    found = job.decoded.get(frame)
    return decode_frame(job.image.data, frame) if found is None else found


def allowed_jobs(batch: Sequence[Job], kept: Sequence[Consent | Exception]) -> list[Job]:
    """Return jobs with the consent that they may use, which is none for one whose image could not be stored."""
    consents = [Consent.NONE if isinstance(one, Exception) else one for one in kept]
    return [
        job if job.consent is consent else replace(job, consent=consent)
        for job, consent in zip(batch, consents, strict=True)
    ]


def same_image(stored: StoredPrediction, image: StoredImage) -> StoredPrediction:
    """Return a repeated request's stored prediction; RefusedError if its key was used for another image."""
    if stored.prediction.image_id != image.id:
        raise RefusedError("this Idempotency-Key was used for another image; use a fresh one for each image")
    return stored


def _unserved(prediction: Prediction) -> PredictionRows:
    """Return the rows of a prediction that no caller gets: without image and review item."""
    return PredictionRows(prediction.model_copy(update={"served": False}), None, None)


def _stored(computed: Computed, review: ReviewItem | None) -> StoredPrediction:
    rows, heat_map = computed
    return StoredPrediction(rows.prediction, review, heat_map)


def _suitability(batch: Sequence[Job], output: BatchOutput) -> list[Suitability | Exception]:
    checks = batch[0].model.loaded.checks

    def check(rows: Sequence[int]) -> list[Suitability]:
        images = [batch[row].image for row in rows]
        sides_px = [min(image.width_px, image.height_px) for image in images]
        return assess(checks, output.take(rows), np.stack([batch[row].pixels for row in rows]), sides_px)

    return each_in_parts(range(len(batch)), check)


def _stored_context(request: PredictionRequest) -> dict[str, str | float | None]:
    """Return the context for the prediction's row; the patient's id is never stored in clear."""
    given = request.context.model_dump(mode="json", exclude={"patient_id", "consent"}, exclude_none=True)
    return {name: value if isinstance(value, (int, float)) else str(value) for name, value in given.items()}
