"""The candidate of a rollout, run beside the champion in the same process.

In: batches that the champion predicted. Out: the candidate's output for the rows that its traffic share covers, and
guardrail counts in the ledger. A candidate that raises an error is counted; the champion's prediction is served.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from records.arrays import UInt8Array
from records.context import Known
from records.errors import RelookError
from records.frames import Frame
from records.ids import sha256_hex
from records.models import UNDER_WAY, current_rollout, generation
from records.store import Store
from records.types import Decision, ModelRecord, Prediction, ReasonCode, Rollout, RolloutStage
from serving.holder import ServedModel, load_served
from serving.rollout.control import add_counts, roll_back
from serving.rollout.guardrails import SLOW_FACTOR
from serving.settings import ServingSettings
from serving.triage import CAUTION
from vision.inference.output import BatchOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CandidateRows:
    """The rows of a batch that a candidate predicts, too."""

    rollout: Rollout
    model: ServedModel
    rows: tuple[int, ...]


@dataclass(frozen=True)
class CandidateOutput:
    """A candidate's output for its rows of a batch."""

    selected: CandidateRows
    output: BatchOutput | None
    """None if the forward pass raised an error"""
    is_slow: bool


class CandidateRunner:
    """Loads and runs the candidate of the current rollout. `refresh` runs in one thread; the rest in any."""

    def __init__(self, store: Store, settings: ServingSettings) -> None:
        self._store = store
        self._settings = settings
        # Replaced as a whole and never changed in place, so readers in other threads need no lock.
        self._running: tuple[Rollout, ServedModel] | None = None
        self.generation = 0
        """of the ledger whose rollout is followed; see `records.models.generation`"""

    def refresh(self) -> bool:
        """Follow the ledger; a candidate that cannot be loaded or fails its golden images is rolled back.

        Returns False if the ledger could not be followed.
        """
        try:
            with self._store.ledger.read() as tx:
                named = current_rollout(tx)
                record = tx.get(ModelRecord, named.candidate_id) if named else None
                number = generation(tx)
            if named is None or record is None:
                self.generation, self._running = number, None
                return True
            known = self._running
            if known is not None and known[1].id == named.candidate_id:
                # The same network; only stage or traffic share may have changed.
                self.generation, self._running = number, (named, known[1])
                return True
            try:
                model = load_served(self._store, record, self._settings)
            except Exception as error:  # any failure of a candidate ends its rollout, not the service
                logger.exception("candidate %s cannot serve", named.candidate_id[:12])
                roll_back(self._store, named.id, actor="service", why=f"it could not be made ready: {error}")
                return True
            self.generation, self._running = number, (named, model)
            return True
        except RelookError as error:
            logger.error("the rollout stays as it is: %s", error)
            return False

    def frames(self) -> tuple[Frame, ...]:
        """Return what the candidate sees of an image; empty if there is none."""
        running = self._running
        return () if running is None else (running[1].document.geometry.frame,)

    def select(self, keys: Sequence[str], stage: RolloutStage) -> CandidateRows | None:
        """Select the rows of a batch that the candidate predicts.

        Args:
            keys: assignment key per row, see `assignment_keys`.
            stage: `CANARY` selects the traffic share, `SHADOW` every row.
        Returns:
            The rows; None if there are none or the rollout is at another stage.
        """
        running = self._running
        if running is None or running[0].stage is not stage:
            return None
        rollout, model = running
        rows = tuple(r for r, key in enumerate(keys) if stage is RolloutStage.SHADOW or in_canary(rollout, key))
        return CandidateRows(rollout, model, rows) if rows else None

    def predict(
        self, selected: CandidateRows, pixels: UInt8Array, champion_s: float, context: Sequence[Known] | None = None
    ) -> CandidateOutput:
        """Run the candidate's forward pass.

        Args:
            selected: N rows.
            pixels: [N, S, S, 3] of these rows, in the candidate's geometry.
            champion_s: the champion's time per image, seconds; infinity if the times are not compared.
            context: [N] what is known about each image.
        Returns:
            The output; an error is logged and becomes `output=None`.
        """
        began_s = time.perf_counter()
        try:
            output = selected.model.loaded.predict(pixels, gradcam=True, context=context)
        except Exception:
            logger.exception("candidate %s failed on a batch", selected.model.id[:12])
            output = None
        each_s = (time.perf_counter() - began_s) / len(selected.rows)
        return CandidateOutput(selected, output, each_s > SLOW_FACTOR * champion_s)

    def count(self, result: CandidateOutput, pairs: Sequence[tuple[Prediction, Prediction | None]]) -> None:
        """Add a batch to the guardrail counts, and stop running a candidate that was rolled back.

        Args:
            result: the candidate's output.
            pairs: per row the champion's prediction, and the candidate's or None if it failed.
        """
        selected = result.selected
        updated = add_counts(self._store, selected.rollout.id, guardrail_counts(result.is_slow, pairs))
        running = self._running
        # Late counts of a rollout that has ended must not stop the candidate of the next one.
        if updated.stage not in UNDER_WAY and running is not None and running[0].id == updated.id:
            logger.error("the rollout of model %s has ended: %s", selected.model.id[:12], updated.why)
            # Without waiting for the next `refresh`: until then the candidate would get further requests.
            self._running = None


def in_canary(rollout: Rollout, key: str) -> bool:
    """Return whether a lesion or image is in the traffic share; a larger share keeps all of the smaller one."""
    return int(sha256_hex(f"{rollout.id}:{key}".encode())[:8], 16) % 100 < rollout.percent


def serves_candidate(champion: Prediction, candidate: Prediction) -> bool:
    """Return whether the candidate's prediction is served: it is finite and at least as cautious as the champion's."""
    if ReasonCode.NON_FINITE in candidate.reasons:
        return False
    return CAUTION[candidate.decision] >= CAUTION[champion.decision]


def guardrail_counts(
    is_slow: bool, pairs: Sequence[tuple[Prediction, Prediction | None]]
) -> dict[str, tuple[int, int]]:
    """Return guardrail -> (observations, events) of a batch."""
    predicted = [(champion, candidate) for champion, candidate in pairs if candidate is not None]
    # A guardrail observes only images where the champion's behaviour makes the event possible: an image that is not
    # finite for the champion, too, says nothing against the candidate.
    finite = [c for champion, c in predicted if ReasonCode.NON_FINITE not in champion.reasons]
    referred = [c for champion, c in predicted if {ReasonCode.REFER, ReasonCode.URGENT} & set(champion.reasons)]
    return {
        "error": (len(pairs), len(pairs) - len(predicted)),
        "non_finite": (len(finite), sum(ReasonCode.NON_FINITE in c.reasons for c in finite)),
        # One observation per batch: images of one forward pass are slow together, so they are not independent.
        "slow": (1, int(is_slow)),
        "downgrade": (len(referred), sum(c.decision is Decision.ANSWERED for c in referred)),
    }
