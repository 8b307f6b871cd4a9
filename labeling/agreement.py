"""Agreement of annotators: Fleiss' and Cohen's kappa, confusion matrices, and the influence of a shown prediction.

Kappa is 1 for full agreement and 0 for the agreement that chance gives; it is None where it is undefined because only
one class was ever named.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from pydantic import BaseModel, ConfigDict, Field

from labeling.consensus import annotator_confusion, current
from records.store import Store
from records.types import Annotation, AnnotationKind, Prediction, ReviewItem


class AnchoringReport(BaseModel):
    """How often annotators name the predicted class, by whether they saw the prediction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blind: int = Field(ge=0, description="annotations that name a class, made without the prediction")
    blind_agreeing: int = Field(ge=0)
    shown: int = Field(ge=0, description="annotations that name a class, made with it")
    shown_agreeing: int = Field(ge=0)
    difference: float | None = Field(description="share agreeing, shown minus blind; above 0 = annotators follow")
    interval: tuple[float, float] | None = Field(description="95 %, Newcombe's score method")


class AgreementReport(BaseModel):
    """What the current annotations say about their annotators."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int = Field(ge=0, description="with a class named by two annotators or more")
    fleiss: float | None
    fleiss_by_class: dict[str, float | None] = Field(description="each class against the rest")
    cohen: dict[str, float | None] = Field(description="`annotator | annotator` to kappa over the images of both")
    annotators: dict[str, dict[str, dict[str, float]]] = Field(
        description="annotator to true class to named class to probability, by Dawid-Skene"
    )
    anchoring: AnchoringReport


def read_agreement(store: Store) -> AgreementReport:
    """Return the report over all annotations of a store."""
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
    """Compute the agreement report.

    Args:
        labels: all annotation rows of the ledger.
        items: review items by id.
        predictions: of the annotated images, by id, oldest first.
        codes: classes in taxonomy order.
    Returns:
        The report.
    """
    rows = list(labels)
    named: dict[str, dict[str, str]] = defaultdict(dict)
    for row in current(rows):
        if row.kind == AnnotationKind.CLASS and row.label is not None:
            named[row.image_id][row.annotator] = row.label
    several = [by_annotator for by_annotator in named.values() if len(by_annotator) > 1]
    annotators = sorted({annotator for by_annotator in several for annotator in by_annotator})
    cohen = {}
    for one, other in combinations(annotators, 2):
        both = [(labels_of[one], labels_of[other]) for labels_of in several if one in labels_of and other in labels_of]
        if both:
            cohen[f"{one} | {other}"] = cohen_kappa(both)
    votes = [list(by_annotator.values()) for by_annotator in several]
    return AgreementReport(
        images=len(several),
        fleiss=fleiss_kappa(votes),
        fleiss_by_class={code: fleiss_kappa([[str(v == code) for v in one] for one in votes]) for code in codes},
        cohen=cohen,
        annotators=annotator_confusion(rows),
        anchoring=anchoring(current(rows), items, predictions),
    )


def cohen_kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Return Cohen's kappa (1960) of two annotators.

    Args:
        pairs: the labels that both gave to each image.
    Returns:
        At most 1; None if both only ever named one and the same class, or there is no image.

    >>> cohen_kappa([("a", "a"), ("a", "b"), ("b", "b"), ("b", "b")])
    0.5
    """
    from sklearn.metrics import cohen_kappa_score

    # With a single class chance alone gives full agreement, and kappa is 0 / 0.
    if len({label for pair in pairs for label in pair}) < 2:
        return None
    return float(cohen_kappa_score([one for one, _ in pairs], [other for _, other in pairs]))


def fleiss_kappa(votes: Sequence[Sequence[str]]) -> float | None:
    """Return Fleiss' kappa (1971), also where images have different numbers of annotators.

    Args:
        votes: the labels that each image got, at least two per image.
    Returns:
        At most 1; None if only one class was ever named, or there is no image.

    >>> round(fleiss_kappa([["a", "a"], ["a", "b"], ["b", "b"], ["b", "b"]]) or 0.0, 4)
    0.4667
    """
    if not votes:
        return None
    counts = [Counter(one) for one in votes]
    agreeing = [sum(n * (n - 1) for n in c.values()) / (c.total() * (c.total() - 1)) for c in counts]
    whole: Counter[str] = sum(counts, Counter())
    expected = sum((number / whole.total()) ** 2 for number in whole.values())
    observed = sum(agreeing) / len(agreeing)
    return None if expected == 1 else (observed - expected) / (1 - expected)


def anchoring(
    rows: Iterable[Annotation], items: Mapping[str, ReviewItem], predictions: Mapping[str, Prediction]
) -> AnchoringReport:
    """Compare annotators who saw the model's prediction with those who did not.

    Args:
        rows: current annotations.
        items: review items by id.
        predictions: by id, oldest first.
    Returns:
        Counts, and the difference of shares with its interval if both groups have annotations.
    """
    # A further blind read has no prediction of its own; it is compared with the newest one of its image.
    by_image = {p.image_id: p.label for p in predictions.values()}
    count: Counter[tuple[bool, bool]] = Counter()
    for row in rows:
        item = items.get(row.review_item_id)
        prediction = predictions.get(item.prediction_id or "") if item is not None else None
        label = prediction.label if prediction is not None else by_image.get(row.image_id)
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
    """Return the 95 % interval of a difference of two shares, given as (hits, total) (Newcombe 1998, method 10)."""
    from scipy.stats import binomtest

    # From Wilson intervals of both shares; the usual interval of a difference is too narrow for few annotations.
    (p, low_p, high_p), (q, low_q, high_q) = (
        (hits / total, *binomtest(hits, total).proportion_ci(method="wilson")) for hits, total in (one, other)
    )
    down, up = math.hypot(p - low_p, high_q - q), math.hypot(high_p - p, q - low_q)
    return p - q - down, p - q + up
