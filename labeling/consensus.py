"""Consensus: one label from the annotations of an image, by majority or Dawid-Skene; an adjudication overrules both.

Pure functions over annotations; nothing is read from a store or written to it. An image whose best label is not
supported by more than half stays without a label.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from records.types import Annotation, AnnotationKind, Confirmation, ResolvedLabel

ConsensusMethod = Literal["majority", "dawid_skene"]


def resolve(
    labels: Iterable[Annotation],
    audit_items: Collection[str] = frozenset(),
    *,
    adjudications: Collection[str] = frozenset(),
    method: ConsensusMethod = "majority",
) -> list[ResolvedLabel]:
    """Return one resolved label per image that has a current annotation, sorted by image id.

    Args:
        labels: all annotation rows of the ledger in any order, tombstones and old revisions included.
        audit_items: ids of review items that came from the random audit sample and from nothing else.
        adjudications: ids of review items that ask for an adjudication; their newest annotation that names a class
            overrides all others.
        method: `majority`, or `dawid_skene`, which weighs annotators by how well they tell the classes apart.
    Returns:
        Of each annotator only the newest annotation counts. The label is the class with more than half of the votes
        (or of the Dawid-Skene probability), and None where there is none: a tie, only `can't tell`, or only `other`.
        Two or more annotators who agree make the confirmation a consensus.
    """
    rows = sorted(labels, key=lambda label: (label.created_at, label.id))
    by_image = _by_image(current(rows))
    beliefs = dawid_skene(by_image) if method == "dawid_skene" else {}
    # Not from `current`: whoever adjudicated an image may have read it as well, and a later read of theirs must not
    # replace the decision.
    decisions = {row.image_id: row for row in _undeleted(rows) if row.review_item_id in adjudications and row.label}
    return [
        _resolve_one(image_id, by_image[image_id], audit_items, decisions.get(image_id), beliefs.get(image_id))
        for image_id in sorted(by_image)
    ]


def current(labels: Iterable[Annotation]) -> list[Annotation]:
    """Return each annotator's newest annotation of each image, leaving out what was deleted."""
    return list({(row.image_id, row.annotator): row for row in _undeleted(labels)}.values())


def contested(labels: Iterable[Annotation], threshold: float) -> dict[str, list[Annotation]]:
    """Return the images whose most frequent class has too small a share of the votes.

    Args:
        labels: all annotation rows of the ledger.
        threshold: smallest share of the annotators who named a class that has to agree, 0 to 1.
    Returns:
        Image id to its current annotations, of images for which at least two annotators named a class.
    """
    found = {}
    for image_id, rows in sorted(_by_image(current(labels)).items()):
        votes = _votes(rows)
        if votes.total() >= 2 and max(votes.values()) < threshold * votes.total():
            found[image_id] = rows
    return found


def dawid_skene(by_image: Mapping[str, list[Annotation]]) -> dict[str, dict[str, float]]:
    """Return the probability of each class from all annotations and annotators' errors (Dawid and Skene 1979).

    Args:
        by_image: current annotations by image id.
    Returns:
        Image id to class to probability, of images for which a class was named.
    """
    fitted = _fit(by_image)
    rows = {} if fitted is None else fitted.probas_.to_dict("index")
    return {str(image_id): {str(code): float(p) for code, p in row.items()} for image_id, row in rows.items()}


def annotator_confusion(labels: Iterable[Annotation]) -> dict[str, dict[str, dict[str, float]]]:
    """Return each annotator's confusion matrix as Dawid-Skene estimates it.

    Args:
        labels: all annotation rows of the ledger.
    Returns:
        Annotator to true class to named class to probability.
    """
    fitted = _fit(_by_image(current(labels)))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (annotator, named), row in fitted.errors_.iterrows() if fitted is not None else ():
        for true, probability in row.items():
            found.setdefault(str(annotator), {}).setdefault(str(true), {})[str(named)] = float(probability)
    return found


def _fit(by_image: Mapping[str, list[Annotation]]) -> Any:
    """Fit crowd-kit's Dawid-Skene to all annotations that name a class; None if there is none."""
    import pandas as pd
    from crowdkit.aggregation import DawidSkene

    said = [
        {"task": image_id, "worker": row.annotator, "label": row.label}
        for image_id, rows in sorted(by_image.items())
        for row in rows
        if row.kind == AnnotationKind.CLASS
    ]
    if not said:
        return None
    with warnings.catch_warnings():
        # crowd-kit 1.4 calls pandas in a way that pandas 3.1 deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        return DawidSkene(n_iter=100, tol=1e-6).fit(pd.DataFrame(said))


def _undeleted(labels: Iterable[Annotation]) -> list[Annotation]:
    """Return the newest revision of each annotation that was not deleted, oldest annotation first."""
    # Two clocks: `created_at` is Relook's and orders the revisions of one annotation; `annotated_at` is Label
    # Studio's and orders annotations. A pull may read an older annotation after a newer one.
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
    return Counter(row.label for row in rows if row.kind == AnnotationKind.CLASS and row.label is not None)


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
