"""Majority by hand: which annotations count, and when there is no label."""

import itertools
import random
from datetime import UTC, datetime, timedelta

import pytest

from labeling.consensus import resolve
from records.types import Annotation, AnnotationKind, Confirmation

START = datetime(2026, 1, 1, tzinfo=UTC)
COUNT = itertools.count()


def said(annotator: str, label: str | None, *, annotation: int | None = None, **changes: object) -> Annotation:
    """One row; `None` is can't tell. Each call is a second later than the one before."""
    number = next(COUNT)
    at = START + timedelta(seconds=number)
    row = Annotation(
        id=f"{number:08d}",
        created_at=at,
        review_item_id="item",
        image_id="image",
        kind=AnnotationKind.CLASS if label else AnnotationKind.CANT_TELL,
        label=label,
        annotator=annotator,
        annotated_at=at,
        server="local",
        project_id=1,
        task_id=1,
        annotation_id=number if annotation is None else annotation,
        revision=str(number),
    )
    return row.model_copy(update=changes)


def test_one_annotator_is_a_single_reader() -> None:
    (found,) = resolve([said("a", "mel")])
    assert (found.image_id, found.label, found.confirmation) == ("image", "mel", Confirmation.SINGLE_READER)
    assert found.annotators == ["a"]
    assert not found.from_audit_sample


def test_two_who_agree_are_a_consensus() -> None:
    (found,) = resolve([said("a", "mel"), said("b", "mel"), said("c", "nv")])
    assert (found.label, found.confirmation) == ("mel", Confirmation.CONSENSUS)
    assert found.annotators == ["a", "b", "c"]
    assert len(found.annotation_ids) == 3


@pytest.mark.parametrize(
    "labels",
    [["mel", "nv"], [None], [None, None], ["mel", "mel", "nv", "bcc"], ["mel", "mel", "nv", "nv", None]],
)
def test_no_majority_is_no_label(labels: list[str | None]) -> None:
    (found,) = resolve([said(f"annotator {n}", label) for n, label in enumerate(labels)])
    assert found.label is None
    assert found.confirmation is Confirmation.SINGLE_READER


def test_cant_tell_does_not_outvote_a_class() -> None:
    (found,) = resolve([said("a", "mel"), said("b", None), said("c", None)])
    assert (found.label, found.confirmation) == ("mel", Confirmation.SINGLE_READER)


def test_other_is_no_class() -> None:
    (found,) = resolve([said("a", None, kind=AnnotationKind.OTHER, other_text="a wart")])
    assert found.label is None


def test_the_newest_revision_counts() -> None:
    (found,) = resolve([said("a", "mel", annotation=7), said("a", "nv", annotation=7)])
    assert found.label == "nv"


def test_an_annotators_newest_annotation_counts() -> None:
    (found,) = resolve([said("a", "mel"), said("a", "nv"), said("b", "nv")])
    assert (found.label, found.confirmation, found.annotators) == ("nv", Confirmation.CONSENSUS, ["a", "b"])


def test_a_tombstone_ends_an_annotation_and_an_older_one_counts_again() -> None:
    first, second = said("a", "mel", annotation=1), said("a", "nv", annotation=2)
    gone = said("a", "nv", annotation=2, deleted=True)
    assert resolve([second, gone]) == []
    (found,) = resolve([first, second, gone])
    assert found.label == "mel"


def test_only_the_audit_sample_may_be_held_out() -> None:
    rows = [said("a", "mel", review_item_id="drawn"), said("b", "mel", review_item_id="flagged")]
    assert resolve(rows[:1], audit_items={"drawn"})[0].from_audit_sample
    assert not resolve(rows, audit_items={"drawn"})[0].from_audit_sample


def test_a_decision_from_elsewhere_is_no_label_of_the_audit_sample() -> None:
    rows = [said("chief", "mel", review_item_id="decide"), said("chief", "nv", review_item_id="drawn")]
    (found,) = resolve(rows, {"drawn"}, adjudications={"decide"})
    assert (found.label, found.from_audit_sample) == ("mel", False)
    assert resolve(rows, {"drawn"})[0].from_audit_sample


def test_order_does_not_matter() -> None:
    rows = [said(f"r{n % 3}", "mel" if n % 2 else "nv", image_id=f"image {n % 4}", annotation=n % 9) for n in range(24)]
    expected = resolve(rows)
    assert [found.image_id for found in expected] == sorted({row.image_id for row in rows})
    for seed in range(5):
        shuffled = random.Random(seed).sample(rows, len(rows))
        assert resolve(shuffled) == expected


def test_confidence_and_method_are_stated() -> None:
    (found,) = resolve([said("a", "mel"), said("b", "mel"), said("c", "nv")])
    assert (found.confidence, found.method) == (pytest.approx(2 / 3), "majority")
    (alone,) = resolve([said("a", "mel")])
    assert (alone.confidence, alone.method) == (1.0, "majority")
    (nobody,) = resolve([said("a", None)])
    assert (nobody.label, nobody.confidence) == (None, None)
    labels = [said("a", "mel"), said("b", "mel"), said("c", "nv")]
    (believed,) = resolve(labels, method="dawid_skene")
    assert believed.method == "dawid_skene"
    assert believed.confidence is not None
    assert 0.5 < believed.confidence <= 1.0
