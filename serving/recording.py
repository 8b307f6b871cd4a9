"""What becomes of a computed batch: triage, overlays, rows, one transaction.

In: jobs with their model's output. Out: answers that are in the ledger, or why one is not. It runs in
the writing thread of the predictor and knows nothing of queues.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np

from images.decode import decode_square
from records.arrays import Float32Array, FloatArray, UInt8Array
from records.errors import RefusedError
from records.ids import hash_of, new_id, utc_now
from records.store import Store
from records.types import Arm, Consent, Decision, Prediction
from serving.holder import ServedModel
from serving.images import draw_map, gradcam_map
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
from serving.rollout.trial import Beside, Trial, serves_candidate
from serving.settings import ServingSettings
from serving.triage import TriageRules, Verdict, audit_draw_of, triage
from vision.inference.output import BatchOutput
from vision.inference.suitability import Suitability, assess


@dataclass(frozen=True, slots=True)
class Job:
    """One request, decoded for the model that was answering when it came."""

    request: PredictionRequest
    image: StoredImage
    consent: Consent
    model: ServedModel
    pixels: UInt8Array
    arrived_s: float
    """of `time.perf_counter`"""
    arm: Arm = Arm.CHAMPION


class Recorder:
    """Turns outputs into stored answers.

    Args:
        store: with ledger and blobs.
        settings: rules of triage, and how overlays are drawn.
        drawing: threads that draw overlays, which costs most of all this.
    """

    def __init__(self, store: Store, settings: ServingSettings, drawing: Executor) -> None:
        self._store = store
        self._settings = settings
        self._settings_hash = hash_of(settings.model_dump(mode="json"))
        self._rules = TriageRules(settings.low_confidence, settings.max_set_size, settings.audit_share)
        self._drawing = drawing

    def record(
        self, batch: Sequence[Job], output: BatchOutput, beside: Beside | None = None, trial: Trial | None = None
    ) -> list[StoredPrediction | RefusedError]:
        """Decide about a batch and write it down.

        Args:
            batch: N jobs of one model.
            output: of that model, N rows.
            beside: what a candidate said of some of them; of two answers the more cautious one is served.
            trial: that counts what it did.
        Returns:
            N answers that are committed; an error where a key was used for another image.
        Raises:
            UnavailableError: the ledger or the blob store does not answer; nothing was answered then.
        """
        suitable = _suitability(batch, output)
        made = list(self._drawing.map(self._answer, batch, repeat(output), range(len(batch)), suitable))
        if not self._settings.keep:
            return [StoredPrediction(answer.prediction, None, heat_map) for answer, heat_map in made]
        unserved: list[PredictionRows] = []
        if beside is not None and trial is not None:
            made, unserved = self._beside(batch, made, beside, trial)
        try:
            reviews = write_predictions(self._store, [*(answer for answer, _ in made), *unserved])[: len(made)]
        except RefusedError:
            # Another replica answered one of the keys in the meantime: only that one is repeated.
            return [self._write_alone(job, *rows) for job, rows in zip(batch, made, strict=True)]
        return [
            StoredPrediction(answer.prediction, review, heat_map)
            for (answer, heat_map), review in zip(made, reviews, strict=True)
        ]

    def record_shadow(
        self, batch: Sequence[Job], served: Sequence[StoredPrediction | RefusedError], beside: Beside, trial: Trial
    ) -> None:
        """Write down what a mirrored candidate said, as answers that nobody got, and count its harm."""
        candidates = self._candidates(batch, beside, Arm.SHADOW)
        pairs = []
        for row, answer in zip(beside.rows, candidates, strict=True):
            champion = served[row]
            if isinstance(champion, StoredPrediction):
                pairs.append((champion.prediction, None if answer is None else answer[0].prediction))
        rows = [
            PredictionRows(_unserved(answer[0].prediction), None, None) for answer in candidates if answer is not None
        ]
        write_predictions(self._store, rows)
        trial.count(beside, pairs)

    def _beside(
        self,
        batch: Sequence[Job],
        made: list[tuple[PredictionRows, HeatMap | None]],
        beside: Beside,
        trial: Trial,
    ) -> tuple[list[tuple[PredictionRows, HeatMap | None]], list[PredictionRows]]:
        """Return the answers to serve, and those of the pairs that are only kept."""
        chosen, unserved, pairs = list(made), [], []
        for row, candidate in zip(beside.rows, self._candidates(batch, beside, Arm.CANDIDATE), strict=True):
            champion = made[row]
            pairs.append((champion[0].prediction, None if candidate is None else candidate[0].prediction))
            if candidate is None:
                continue
            takes = serves_candidate(champion[0].prediction, candidate[0].prediction)
            chosen[row] = candidate if takes else champion
            other = champion if takes else candidate
            unserved.append(PredictionRows(_unserved(other[0].prediction), None, None))
        trial.count(beside, pairs)
        return chosen, unserved

    def _candidates(
        self, batch: Sequence[Job], beside: Beside, arm: Arm
    ) -> list[tuple[PredictionRows, HeatMap | None] | None]:
        if beside.output is None:
            return [None] * len(beside.rows)
        jobs = [replace(batch[row], model=beside.model, arm=arm) for row in beside.rows]
        known = [pixels_of(job, beside.model) for job in jobs]
        jobs = [replace(job, pixels=pixels) for job, pixels in zip(jobs, known, strict=True)]
        suitable = _suitability(jobs, beside.output)
        return [self._answer(job, beside.output, row, suitable[row]) for row, job in enumerate(jobs)]

    def repeated(self, request: PredictionRequest) -> StoredPrediction | None:
        """Return the answer that was given to a request's idempotency key before, if any."""
        found = find_repeated(self._store, request.caller, request.idempotency_key or "")
        if found is None:
            return None
        with self._store.ledger.read() as tx:
            return StoredPrediction(found, review_of(tx, found))

    def _write_alone(
        self, job: Job, answer: PredictionRows, heat_map: HeatMap | None
    ) -> StoredPrediction | RefusedError:
        try:
            (review,) = write_predictions(self._store, [answer])
        except RefusedError as error:
            repeated = self.repeated(job.request) if job.request.idempotency_key else None
            try:
                return error if repeated is None else same_image(repeated, job.image)
            except RefusedError as other_image:
                return other_image
        return StoredPrediction(answer.prediction, review, heat_map)

    def _answer(
        self, job: Job, output: BatchOutput, row: int, suitable: Suitability
    ) -> tuple[PredictionRows, HeatMap | None]:
        draw = audit_draw_of(job.image.id, self._settings.audit_salt)
        document = job.model.document
        verdict = triage(output.probabilities[row], document.taxonomy, document.operating, self._rules, draw, suitable)
        prediction = self._prediction(job, verdict, output.probabilities[row], output.num_threads)
        target = document.taxonomy.index_of(verdict.label) if verdict.label else None
        values = output.maps[row, target] if output.maps is not None and target is not None else None
        heat_map = self._heat_map(job, verdict, values)
        if job.consent is Consent.NONE:
            return PredictionRows(prediction, None, None), heat_map
        review = None
        if verdict.decision in (Decision.REVIEW, Decision.URGENT):
            overlay = heat_map.png if heat_map else self._overlay(job, values)
            blob = self._store.blobs.put(overlay) if overlay else None
            review = review_row(prediction, verdict, blob, self._settings.urgent_due_h)
        image = image_row(self._store, job.image, job.request.context, job.consent, prediction.created_at)
        return PredictionRows(prediction, image, review, job.image), heat_map

    def _heat_map(self, job: Job, verdict: Verdict, values: Float32Array | None) -> HeatMap | None:
        if not job.request.explain or values is None or verdict.label is None:
            return None
        side_px, alpha = self._settings.overlay_side_px, self._settings.overlay_alpha
        return gradcam_map(job.model.loaded, job.image.data, values, verdict.label, side_px, alpha)

    def _overlay(self, job: Job, values: Float32Array | None) -> bytes | None:
        if values is None:
            return None
        return draw_map(job.image.data, values, self._settings.overlay_side_px, self._settings.overlay_alpha)

    def _prediction(self, job: Job, verdict: Verdict, probabilities: FloatArray, num_threads: int) -> Prediction:
        request, model = job.request, job.model
        has_answer = verdict.label is not None
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
            context=_said(request),
            model_id=model.id,
            model_status=model.status,
            arm=job.arm,
            engine=model.loaded.engine,
            precision=model.loaded.precision,
            num_threads=num_threads,
            settings_hash=self._settings_hash,
            label=verdict.label,
            confidence=verdict.confidence,
            probabilities=dict(zip(codes, probabilities.tolist(), strict=True)) if has_answer else None,
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
    side_px = model.document.geometry.side_px
    return job.pixels if job.pixels.shape[0] == side_px else decode_square(job.image.data, side_px)


def _unserved(prediction: Prediction) -> Prediction:
    return prediction.model_copy(update={"served": False})


def _suitability(batch: Sequence[Job], output: BatchOutput) -> list[Suitability]:
    sides_px = [min(job.image.width_px, job.image.height_px) for job in batch]
    return assess(batch[0].model.loaded.checks, output, np.stack([job.pixels for job in batch]), sides_px)


def same_image(answered: StoredPrediction, image: StoredImage) -> StoredPrediction:
    """Return a repeated answer, if it was about this image.

    Args:
        answered: that was found for the request's idempotency key.
        image: of the request.
    Returns:
        The answer.
    Raises:
        RefusedError: the key was used for another image.
    """
    if answered.prediction.image_id != image.id:
        raise RefusedError("this Idempotency-Key was used for another image; use a fresh one for each image")
    return answered


def _said(request: PredictionRequest) -> dict[str, str | float | None]:
    said = request.context.model_dump(mode="json", exclude={"patient_id", "consent"}, exclude_none=True)
    return {name: value if isinstance(value, (int, float)) else str(value) for name, value in said.items()}
