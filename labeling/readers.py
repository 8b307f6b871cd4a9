"""A reader's card: how often an annotator is right, agrees, how fast they are, and how far a prediction moves them.

The figures are for the reader, who sees them first: a list of cards shows of each reader what they had done when they
last opened their own card, and nothing of a reader who never did.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from labeling.agreement import AnchoringReport, anchoring
from labeling.consensus import current
from labeling.gold import diagnoses
from records import audit
from records.cursors import set_position
from records.errors import DataError
from records.ids import utc_now
from records.store import Store
from records.types import Annotation, AnnotationKind, Cursor, Prediction, ReviewItem

ACTION = "reader_card.opened"
_CURSOR = "labeling.card "
_FEWEST_TIMES = 6
"""Times from which a 95 % interval of their median exists."""


class Share(BaseModel):
    """A share with its 95 % interval (Wilson)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hits: int = Field(ge=0)
    of: int = Field(ge=0)
    share: float | None = Field(default=None, ge=0, le=1, description="empty if there is nothing to count")
    interval: tuple[float, float] | None = None


class ReaderCard(BaseModel):
    """What the annotations of one annotator say about them; the newest of each image counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reader: str
    as_of: datetime = Field(description="annotations that were read later are not in it")
    annotations: int = Field(ge=0, description="images annotated, gold tasks included")
    gold: Share = Field(description="gold tasks whose confirmed diagnosis was named, of those where a class was")
    gold_undecided: int = Field(ge=0, description="gold tasks without a class: can't tell, or another diagnosis")
    malignant: Share = Field(description="gold tasks with a malignant diagnosis for which a malignant class was named")
    confusion: dict[str, dict[str, int]] = Field(
        description="gold tasks: confirmed diagnosis to what was named (class, cant_tell or other) to a number"
    )
    agreement: Share = Field(description="images where the class is that of most others who annotated the image")
    seconds: float | None = Field(description="median time of a task")
    seconds_interval: tuple[float, float] | None = Field(description="95 %, by order statistics")
    anchoring: AnchoringReport


class ReaderCards(BaseModel):
    """The cards of all readers who have opened their own, and the names of the others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cards: list[ReaderCard]
    unopened: list[str] = Field(description="annotators who have not opened their card; it is shown to nobody yet")


def open_card(store: Store, reader: str, *, actor: str) -> ReaderCard:
    """Return a reader's card as it is now, and note that they have seen it.

    Args:
        store: with the annotations.
        reader: e-mail address of the account in Label Studio.
        actor: who opened it, for the audit.
    Returns:
        The card.
    Raises:
        DataError: nobody of that name annotated anything.
    """
    now = utc_now()
    data = _Data(store)
    if reader not in data.readers:
        known = ", ".join(data.readers) or "nobody yet"
        raise DataError(f"{reader!r} has annotated nothing; annotators are {known}")
    found = data.card(reader, now)
    with store.ledger.begin() as tx:
        name, position = f"{_CURSOR}{reader}", {"opened_at": now.isoformat()}
        set_position(tx, name, position)
        audit.append(tx, actor=actor, action=ACTION, subject=reader, details={})
    return found


def list_cards(store: Store) -> ReaderCards:
    """Return the cards of all readers, each as of the moment at which its reader last opened it."""
    data = _Data(store)
    with store.ledger.read() as tx:
        opened = {c.name: str(c.position["opened_at"]) for c in tx.find(Cursor) if c.name.startswith(_CURSOR)}
    seen = {reader: opened.get(f"{_CURSOR}{reader}") for reader in data.readers}
    return ReaderCards(
        cards=[data.card(reader, datetime.fromisoformat(at)) for reader, at in seen.items() if at is not None],
        unopened=[reader for reader, at in seen.items() if at is None],
    )


class _Data:
    """What cards are computed from, read once."""

    def __init__(self, store: Store) -> None:
        with store.ledger.read() as tx:
            self._rows = tx.find(Annotation, order_by=("created_at", "id"))
            self._items = {i.id: i for i in tx.find(ReviewItem, where={"id": {r.review_item_id for r in self._rows}})}
            images = {row.image_id for row in self._rows}
            found = tx.find(Prediction, where={"image_id": images, "served": True}, order_by=("created_at",))
            self._truth = diagnoses(tx, {row.image_id for row in self._rows if row.gold})
        self._predictions = {prediction.id: prediction for prediction in found}
        self._malignant = frozenset(store.taxonomy.malignant_codes)
        self.readers = sorted({row.annotator for row in self._rows})

    def card(self, reader: str, as_of: datetime) -> ReaderCard:
        """Compute a card from what had been read at a moment."""
        rows = current(row for row in self._rows if row.created_at <= as_of)
        own = [row for row in rows if row.annotator == reader]
        gold = [(self._truth[row.image_id], row) for row in own if row.gold and row.image_id in self._truth]
        named = [(truth, row.label) for truth, row in gold if row.kind is AnnotationKind.CLASS]
        confusion: dict[str, Counter[str]] = defaultdict(Counter)
        for truth, row in gold:
            confusion[truth][str(row.label if row.kind is AnnotationKind.CLASS else row.kind.value)] += 1
        malignant = [label in self._malignant for truth, label in named if truth in self._malignant]
        median, interval = _median([row.lead_time_s for row in own if row.lead_time_s is not None])
        return ReaderCard(
            reader=reader,
            as_of=as_of,
            annotations=len(own),
            gold=_share([truth == label for truth, label in named]),
            gold_undecided=len(gold) - len(named),
            malignant=_share(malignant),
            confusion={truth: dict(sorted(counts.items())) for truth, counts in sorted(confusion.items())},
            agreement=_share(_agreeing(own, rows)),
            seconds=median,
            seconds_interval=interval,
            anchoring=anchoring(own, self._items, self._predictions),
        )


def _agreeing(own: Sequence[Annotation], rows: Collection[Annotation]) -> list[bool]:
    """Return per image of a reader whether most others say the same; ties of the others are left out."""
    others: Mapping[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row.label is not None:
            others[row.image_id][row.label] += 1
    found = []
    for row in own:
        if row.label is None:
            continue
        votes = others[row.image_id] - Counter([row.label])
        best = votes.most_common(2)
        if best and (len(best) == 1 or best[0][1] > best[1][1]):
            found.append(best[0][0] == row.label)
    return found


def _share(hits: Sequence[bool]) -> Share:
    from scipy.stats import binomtest

    if not hits:
        return Share(hits=0, of=0)
    low, high = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return Share(hits=sum(hits), of=len(hits), share=sum(hits) / len(hits), interval=(float(low), float(high)))


def _median(times_s: Sequence[float]) -> tuple[float | None, tuple[float, float] | None]:
    """Return the median and its 95 % interval, which holds for any distribution of the times."""
    from scipy.stats import binom

    ordered = sorted(times_s)
    if not ordered:
        return None, None
    if len(ordered) < _FEWEST_TIMES:
        return statistics.median(ordered), None
    # The largest rank whose order statistic is below the median with a probability of at least 97.5 %.
    rank: Any = binom.ppf(0.025, len(ordered), 0.5)
    return statistics.median(ordered), (ordered[int(rank) - 1], ordered[-int(rank)])
