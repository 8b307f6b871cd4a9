"""The candidate of a running service: which requests it sees, and what came of each.

In: batches that the champion answered. Out: what the candidate said of those rows that it may answer, too, and
counts of harm. A candidate that raises is counted; it never costs a caller their answer.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from records.arrays import UInt8Array
from records.errors import RelookError
from records.ids import sha256_hex
from records.store import Store
from records.types import Decision, ModelRecord, Prediction, ReasonCode, Rollout, RolloutStage
from serving.batches import CAUTION
from serving.holder import ServedModel, load_served
from serving.rollout.control import UNDER_WAY, current_rollout, roll_back, tally
from serving.rollout.harms import SLOW_FACTOR
from serving.settings import ServingSettings
from vision.inference.output import BatchOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beside:
    """What a candidate said of some rows of a batch."""

    rollout: Rollout
    model: ServedModel
    rows: tuple[int, ...]
    output: BatchOutput | None
    """None if it failed"""
    is_slow: bool


class Trial:
    """Follows the rollout that the ledger names. `refresh` runs in one thread; the rest in any.

    Args:
        store: with ledger and bundles.
        settings: precision and the batch sizes to warm up with.
    """

    def __init__(self, store: Store, settings: ServingSettings) -> None:
        self._store = store
        self._settings = settings
        self._running: tuple[Rollout, ServedModel] | None = None

    def refresh(self) -> None:
        """Follow the ledger; a candidate that cannot be loaded or fails its golden images is rolled back."""
        try:
            with self._store.ledger.read() as tx:
                named = current_rollout(tx)
                record = tx.get(ModelRecord, named.candidate_id) if named else None
            if named is None or record is None:
                self._running = None
                return
            known = self._running
            if known is not None and known[1].id == named.candidate_id:
                self._running = (named, known[1])
                return
            try:
                model = load_served(self._store, record, self._settings)
            except Exception as error:  # whatever is wrong with a candidate, it is taken back
                logger.exception("candidate %s cannot answer", named.candidate_id[:12])
                roll_back(self._store, actor="service", why=f"it could not be made ready: {error}")
                return
            self._running = (named, model)
        except RelookError as error:
            logger.error("the rollout stays as it is: %s", error)

    def rows_of(self, keys: Sequence[str], stage: RolloutStage) -> tuple[Rollout, ServedModel, tuple[int, ...]] | None:
        """Return the rows that the candidate sees at a stage, or None if there are none.

        Args:
            keys: per row what the split goes by: the lesion, else the image.
            stage: canary takes its share of keys, shadow every row.
        Returns:
            Rollout, candidate and row numbers.
        """
        running = self._running
        if running is None or running[0].stage is not stage:
            return None
        rollout, model = running
        rows = tuple(r for r, key in enumerate(keys) if stage is RolloutStage.SHADOW or in_canary(rollout, key))
        return (rollout, model, rows) if rows else None

    def ask(self, found: tuple[Rollout, ServedModel, tuple[int, ...]], pixels: UInt8Array, champion_s: float) -> Beside:
        """Ask the candidate about its rows.

        Args:
            found: from `rows_of`.
            pixels: [N, S, S, 3] of the rows alone, in the candidate's geometry.
            champion_s: how long the champion took for an image.
        Returns:
            What it said.
        """
        rollout, model, rows = found
        began_s = time.perf_counter()
        try:
            output = model.loaded.predict(pixels, gradcam=True)
        except Exception:
            logger.exception("candidate %s failed on a batch", model.id[:12])
            output = None
        each_s = (time.perf_counter() - began_s) / len(rows)
        return Beside(rollout, model, rows, output, each_s > SLOW_FACTOR * champion_s)

    def count(self, beside: Beside, pairs: Sequence[tuple[Prediction, Prediction | None]]) -> None:
        """Add up what was seen and stop asking a candidate that was taken back.

        Args:
            beside: what it said.
            pairs: per row the champion's answer, and the candidate's if it gave one.
        """
        updated = tally(self._store, beside.rollout.id, harms_of(beside.is_slow, pairs))
        if updated.stage not in UNDER_WAY:
            logger.error("candidate %s was rolled back: %s", beside.model.id[:12], updated.why)
            self._running = None


def in_canary(rollout: Rollout, key: str) -> bool:
    """Return whether a lesion or image belongs to the canary's share; widening keeps who was in."""
    return int(sha256_hex(f"{rollout.id}:{key}".encode())[:8], 16) % 100 < rollout.percent


def serves_candidate(champion: Prediction, candidate: Prediction) -> bool:
    """Return whether the candidate's answer goes out: unless it has none, or the champion is more cautious."""
    if ReasonCode.NON_FINITE in candidate.reasons:
        return False
    return CAUTION[candidate.decision] >= CAUTION[champion.decision]


def harms_of(is_slow: bool, pairs: Sequence[tuple[Prediction, Prediction | None]]) -> dict[str, tuple[int, int]]:
    """Count harms in a batch: kind to (how often looked, how often seen)."""
    answered = [(champion, candidate) for champion, candidate in pairs if candidate is not None]
    finite = [c for champion, c in answered if ReasonCode.NON_FINITE not in champion.reasons]
    referred = [c for champion, c in answered if {ReasonCode.REFER, ReasonCode.URGENT} & set(champion.reasons)]
    return {
        "error": (len(pairs), len(pairs) - len(answered)),
        "non_finite": (len(finite), sum(ReasonCode.NON_FINITE in c.reasons for c in finite)),
        "slow": (1, int(is_slow)),
        "downgrade": (len(referred), sum(c.decision is Decision.ANSWERED for c in referred)),
    }
