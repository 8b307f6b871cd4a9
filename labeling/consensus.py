"""From what several readers said to one label: majority or Dawid-Skene, and adjudication above both.

Pure functions over annotator labels: nothing is read, stored or asked. An image without a label that
more than half support stays without one, which is what asks for an adjudication.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from records.types import Annotation, AnswerKind, Confirmation, ResolvedLabel

ConsensusMethod = Literal["majority", "dawid_skene"]


def resolve(
    labels: Iterable[Annotation],
    audit_items: Collection[str] = frozenset(),
    *,
    adjudications: Collection[str] = frozenset(),
    method: ConsensusMethod = "majority",
) -> list[ResolvedLabel]:
    """Return one resolution per image.

    Args:
        labels: all rows that were ever read, in any order, tombstones and old revisions included.
        audit_items: ids of review items that came from the random audit sample and from nothing else.
        adjudications: ids of review items that ask to decide between readers; their newest answer that names a
            class stands above the others.
        method: `majority`, or `dawid_skene`, which weighs readers by how well they tell the classes apart.
    Returns:
        Sorted by image id, one for each image with at least one answer that still stands. Of each
        reader only the newest answer counts. The label is the class that more than half support (of those
        who named a class, or of the probability), and empty where there is none: a tie, only `can't
        tell`, or only `other`. Two and more who agree are a consensus.
    """
    rows = sorted(labels, key=lambda label: (label.created_at, label.id))
    by_image = _by_image(standing(rows))
    beliefs = dawid_skene(by_image) if method == "dawid_skene" else {}
    decisions = {row.image_id: row for row in _alive(rows) if row.review_item_id in adjudications and row.label}
    return [
        _resolve_one(image_id, by_image[image_id], audit_items, decisions.get(image_id), beliefs.get(image_id))
        for image_id in sorted(by_image)
    ]


def standing(labels: Iterable[Annotation]) -> list[Annotation]:
    """Return each reader's newest answer about each image, without what was deleted."""
    return list({(row.image_id, row.annotator): row for row in _alive(labels)}.values())


def contested(labels: Iterable[Annotation], threshold: float) -> dict[str, list[Annotation]]:
    """Return the images whose readers agree too little.

    Args:
        labels: all rows that were ever read.
        threshold: smallest share of those who named a class that has to agree.
    Returns:
        Image id to its standing answers, where two and more named a class.
    """
    found = {}
    for image_id, rows in sorted(_by_image(standing(labels)).items()):
        votes = _votes(rows)
        if votes.total() >= 2 and max(votes.values()) < threshold * votes.total():
            found[image_id] = rows
    return found


def dawid_skene(by_image: Mapping[str, list[Annotation]]) -> dict[str, dict[str, float]]:
    """Return how probable each class is, given who said what and how each reader errs (Dawid and Skene 1979).

    Args:
        by_image: standing answers by image.
    Returns:
        Image id to class to probability, of images for which a class was named.
    """
    fitted = _fit(by_image)
    rows = {} if fitted is None else fitted.probas_.to_dict("index")
    return {str(image_id): {str(code): float(p) for code, p in row.items()} for image_id, row in rows.items()}


def annotator_confusion(labels: Iterable[Annotation]) -> dict[str, dict[str, dict[str, float]]]:
    """Return how each reader answers where the truth is one class, as Dawid-Skene estimates it.

    Args:
        labels: all rows that were ever read.
    Returns:
        Reader to true class to answered class to probability.
    """
    fitted = _fit(_by_image(standing(labels)))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (reader, answered), row in fitted.errors_.iterrows() if fitted is not None else ():
        for true, probability in row.items():
            found.setdefault(str(reader), {}).setdefault(str(true), {})[str(answered)] = float(probability)
    return found


def _fit(by_image: Mapping[str, list[Annotation]]) -> Any:
    """Fit crowd-kit's Dawid-Skene to all answers that name a class; None if there is none."""
    import pandas as pd
    from crowdkit.aggregation import DawidSkene

    said = [
        {"task": image_id, "worker": row.annotator, "label": row.label}
        for image_id, rows in sorted(by_image.items())
        for row in rows
        if row.answer == AnswerKind.CLASS
    ]
    if not said:
        return None
    with warnings.catch_warnings():
        # crowd-kit 1.4 calls pandas in a way that pandas 3.1 announces to end.
        warnings.simplefilter("ignore", DeprecationWarning)
        return DawidSkene(n_iter=100, tol=1e-6).fit(pd.DataFrame(said))


def _alive(labels: Iterable[Annotation]) -> list[Annotation]:
    """Return the newest revision of each annotation that was not deleted, oldest answer first."""
    rows = sorted(labels, key=lambda label: (label.created_at, label.id))
    last_row = {(row.server, row.review_item_id, row.annotation_id): row for row in rows}
    alive = [row for row in last_row.values() if not row.deleted]
    return sorted(alive, key=lambda row: (row.annotated_at, row.created_at, row.id))


def _by_image(rows: Iterable[Annotation]) -> dict[str, list[Annotation]]:
    by_image: dict[str, list[Annotation]] = defaultdict(list)
    for row in rows:
        by_image[row.image_id].append(row)
    return by_image


def _votes(rows: Iterable[Annotation]) -> Counter[str]:
    return Counter(row.label for row in rows if row.answer == AnswerKind.CLASS and row.label is not None)


def _resolve_one(
    image_id: str,
    rows: list[Annotation],
    audit_items: Collection[str],
    decision: Annotation | None,
    beliefs: Mapping[str, float] | None,
) -> ResolvedLabel:
    votes = _votes(rows)
    best, agreeing = votes.most_common(1)[0] if votes else (None, 0)
    support, method = (agreeing / votes.total() if votes else 0.0), "majority"
    if decision is not None and decision.label is not None:
        best, support, method = decision.label, 1.0, "adjudication"
    elif beliefs:
        best = max(sorted(beliefs), key=lambda code: beliefs[code])
        support, method = min(beliefs[best], 1.0), "dawid_skene"
    decided = support > 0.5
    counted = rows if decision is None else [*rows, decision]
    together = method == "adjudication" or (best is not None and votes[best] > 1)
    return ResolvedLabel(
        image_id=image_id,
        label=best if decided else None,
        confirmation=Confirmation.CONSENSUS if decided and together else Confirmation.SINGLE_READER,
        confidence=support if votes else None,
        method=method,
        annotators=sorted(row.annotator for row in rows),
        annotation_ids=sorted(row.id for row in rows),
        from_audit_sample=all(row.review_item_id in audit_items for row in counted),
    )
