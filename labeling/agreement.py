"""How far readers agree with each other, and how much the model's opinion draws them.

Kappa is 1 for full agreement and 0 for what chance would give; None where it says nothing, because
only one class was ever named.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from pydantic import BaseModel, ConfigDict, Field

from labeling.consensus import annotator_confusion, standing
from records.store import Store
from records.types import Annotation, AnnotationKind, Prediction, ReviewItem

_Z = 1.959963984540054  # two-splitd 95 %


class AnchoringReport(BaseModel):
    """How often readers say what the model said, by whether they saw it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blind: int = Field(ge=0, description="answers that name a class, given without the model's opinion")
    blind_agreeing: int = Field(ge=0)
    shown: int = Field(ge=0, description="answers that name a class, given with it")
    shown_agreeing: int = Field(ge=0)
    difference: float | None = Field(description="share agreeing, shown minus blind; above 0 = readers follow")
    interval: tuple[float, float] | None = Field(description="95 %, Newcombe's score method")


class AgreementReport(BaseModel):
    """What the answers that stand now say about their readers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int = Field(ge=0, description="with a class named by two readers or more")
    fleiss: float | None
    fleiss_by_class: dict[str, float | None] = Field(description="each class against the rest")
    cohen: dict[str, float | None] = Field(description="`reader | reader` to kappa over the images both read")
    readers: dict[str, dict[str, dict[str, float]]] = Field(description="reader to true to answered class, Dawid-Skene")
    anchoring: AnchoringReport


def read_agreement(store: Store) -> AgreementReport:
    """Return the report over all answers of a store."""
    with store.ledger.read() as tx:
        labels = tx.find(Annotation, order_by=("created_at", "id"))
        items = {i.id: i for i in tx.find(ReviewItem, where={"id": {row.review_item_id for row in labels}})}
        images = {row.image_id for row in labels}
        predictions = tx.find(Prediction, where={"image_id": images, "served": True}, order_by=("created_at",))
    return agreement(labels, items, {p.id: p for p in predictions}, store.taxonomy.codes)


def agreement(
    labels: Iterable[Annotation],
    items: Mapping[str, ReviewItem],
    predictions: Mapping[str, Prediction],
    codes: Sequence[str],
) -> AgreementReport:
    """Say how far readers agree.

    Args:
        labels: all rows that were ever read.
        items: review items by id.
        predictions: of the images, by id, oldest first.
        codes: classes in taxonomy order.
    Returns:
        All figures.
    """
    rows = list(labels)
    said: dict[str, dict[str, str]] = defaultdict(dict)
    for row in standing(rows):
        if row.kind == AnnotationKind.CLASS and row.label is not None:
            said[row.image_id][row.annotator] = row.label
    several = [by_reader for by_reader in said.values() if len(by_reader) > 1]
    readers = sorted({reader for by_reader in several for reader in by_reader})
    cohen = {}
    for one, other in combinations(readers, 2):
        both = [(by_reader[one], by_reader[other]) for by_reader in several if one in by_reader and other in by_reader]
        if both:
            cohen[f"{one} | {other}"] = cohen_kappa(both)
    answers = [list(by_reader.values()) for by_reader in several]
    return AgreementReport(
        images=len(several),
        fleiss=fleiss_kappa(answers),
        fleiss_by_class={c: fleiss_kappa([[str(a == c) for a in one] for one in answers]) for c in codes},
        cohen=cohen,
        readers=annotator_confusion(rows),
        anchoring=anchoring(standing(rows), items, predictions),
    )


def cohen_kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Return Cohen's kappa (1960) of two readers.

    Args:
        pairs: what both said about each image.
    Returns:
        At most 1; None if both only ever named one and the same class, or there is no image.

    >>> cohen_kappa([("a", "a"), ("a", "b"), ("b", "b"), ("b", "b")])
    0.5
    """
    if not pairs:
        return None
    total = len(pairs)
    observed = sum(one == other for one, other in pairs) / total
    first, second = Counter(one for one, _ in pairs), Counter(other for _, other in pairs)
    expected = sum(first[code] * second[code] for code in first) / total**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def fleiss_kappa(answers: Sequence[Sequence[str]]) -> float | None:
    """Return Fleiss' kappa (1971), also where images have different numbers of readers.

    Args:
        answers: what was said about each image, two answers and more each.
    Returns:
        At most 1; None if only one class was ever named, or there is no image.

    >>> round(fleiss_kappa([["a", "a"], ["a", "b"], ["b", "b"], ["b", "b"]]) or 0.0, 4)
    0.4667
    """
    if not answers:
        return None
    counts = [Counter(one) for one in answers]
    agreeing = [sum(n * (n - 1) for n in c.values()) / (c.total() * (c.total() - 1)) for c in counts]
    whole: Counter[str] = sum(counts, Counter())
    expected = sum((number / whole.total()) ** 2 for number in whole.values())
    observed = sum(agreeing) / len(agreeing)
    return None if expected == 1 else (observed - expected) / (1 - expected)


def anchoring(
    rows: Iterable[Annotation], items: Mapping[str, ReviewItem], predictions: Mapping[str, Prediction]
) -> AnchoringReport:
    """Compare readers who saw the model's answer with those who did not.

    Args:
        rows: standing answers.
        items: review items by id.
        predictions: by id; a read without a prediction of its own is held against its image's last.
    Returns:
        Counts, and the difference of shares with its interval if both kinds of answers exist.
    """
    by_image = {p.image_id: p.label for p in predictions.values()}
    count: Counter[tuple[bool, bool]] = Counter()
    for row in rows:
        item = items.get(row.review_item_id)
        asked = predictions.get(item.prediction_id or "") if item is not None else None
        label = asked.label if asked is not None else by_image.get(row.image_id)
        if row.kind == AnnotationKind.CLASS and label is not None:
            count[row.blind, row.label == label] += 1
    blind, shown = (count[kind, True] + count[kind, False] for kind in (True, False))
    difference, interval = None, None
    if blind and shown:
        difference = count[False, True] / shown - count[True, True] / blind
        interval = _newcombe((count[False, True], shown), (count[True, True], blind))
    return AnchoringReport(
        blind=blind,
        blind_agreeing=count[True, True],
        shown=shown,
        shown_agreeing=count[False, True],
        difference=difference,
        interval=interval,
    )


def _newcombe(one: tuple[int, int], other: tuple[int, int]) -> tuple[float, float]:
    """Return the 95 % interval of a difference of two shares (Newcombe 1998, method 10)."""
    (p, low_p, high_p), (q, low_q, high_q) = _wilson(*one), _wilson(*other)
    down, up = math.hypot(p - low_p, high_q - q), math.hypot(high_p - p, q - low_q)
    return p - q - down, p - q + up


def _wilson(hits: int, total: int) -> tuple[float, float, float]:
    share, square = hits / total, _Z**2
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = _Z / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total**2))
    return share, centre - half, centre + half
