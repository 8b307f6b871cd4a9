"""Kappas by hand, planted confusion matrices recovered, and anchoring of annotators who saw the prediction."""

import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from labeling.agreement import agreement, anchoring, cohen_kappa, fleiss_kappa, read_agreement
from labeling.consensus import annotator_confusion, contested, resolve
from records.store import Store
from records.types import Annotation, AnnotationKind, Arm, Confirmation, Prediction, ReviewItem

AddItems = Callable[..., list[ReviewItem]]
START = datetime(2026, 1, 1, tzinfo=UTC)
COUNT = itertools.count()


def said(image: str, annotator: str, label: str | None, *, blind: bool = False, item: str = "item") -> Annotation:
    number = next(COUNT)
    at = START + timedelta(seconds=number)
    return Annotation(
        id=f"{number:08d}",
        created_at=at,
        review_item_id=item,
        image_id=image,
        kind=AnnotationKind.CLASS if label else AnnotationKind.CANT_TELL,
        label=label,
        annotator=annotator,
        annotated_at=at,
        blind=blind,
        server="local",
        project_id=1,
        task_id=1,
        annotation_id=number,
        revision=str(number),
    )


def test_cohen_by_hand() -> None:
    # Cohen's table: yes/yes 20, yes/no 5, no/yes 10, no/no 15; po 0.7, pe 0.5, kappa 0.4.
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert cohen_kappa(pairs) == pytest.approx(0.4)
    assert cohen_kappa([("y", "y")]) is None
    assert cohen_kappa([]) is None


def test_fleiss_by_hand() -> None:
    # The worked example of Fleiss (1971) as it is commonly printed: 10 subjects, 14 raters, kappa 0.210.
    table = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    votes = [[str(code) for code, number in enumerate(row) for _ in range(number)] for row in table]
    assert fleiss_kappa(votes) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa([]) is None
    assert fleiss_kappa([["a", "a"]]) is None


def _simulated(confusion: dict[str, np.ndarray], truth: list[int], codes: list[str]) -> list[Annotation]:
    chance = np.random.default_rng(4)
    return [
        said(f"{number:04d}", annotator, codes[chance.choice(len(codes), p=matrix[true])])
        for number, true in enumerate(truth)
        for annotator, matrix in confusion.items()
    ]


def test_dawid_skene_recovers_planted_confusions_and_beats_the_majority() -> None:
    codes = ["bkl", "mel", "nv"]
    good = np.array([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]])
    # Two annotators who call most melanomas nevi outvote the careful ones where they meet.
    careless = np.array([[0.8, 0.1, 0.1], [0.1, 0.2, 0.7], [0.1, 0.1, 0.8]])
    planted = {"good 1": good, "good 2": good, "careless 1": careless, "careless 2": careless}
    truth = [int(t) for t in np.random.default_rng(1).integers(0, 3, 1500)]
    labels = _simulated(planted, truth, codes)
    found = annotator_confusion(labels)
    for annotator, matrix in planted.items():
        for true, named in itertools.product(range(3), range(3)):
            assert found[annotator][codes[true]][codes[named]] == pytest.approx(matrix[true, named], abs=0.06)

    def right(method: str) -> int:
        resolved = resolve(labels, method=method)  # type: ignore[arg-type]
        return sum(r.label == codes[truth[int(r.image_id)]] for r in resolved)

    assert right("dawid_skene") > right("majority") + 100
    one = resolve(labels, method="dawid_skene")[0]
    assert (one.method, one.confirmation) == ("dawid_skene", Confirmation.CONSENSUS)
    assert one.confidence is not None
    assert 0.5 < one.confidence <= 1.0


def test_an_adjudication_overrides_any_majority() -> None:
    labels = [said("i", "a", "mel"), said("i", "b", "nv")]
    assert list(contested(labels, 0.67)) == ["i"]
    assert contested([*labels, said("i", "c", "nv")], 0.6) == {}
    assert contested([said("j", "a", "mel"), said("j", "b", None)], 0.67) == {}
    labels += [said("i", "chief", "mel", item="decide"), said("i", "c", "nv"), said("i", "d", "nv")]
    (found,) = resolve(labels, adjudications={"decide"})
    assert (found.label, found.method, found.confirmation) == ("mel", "adjudication", Confirmation.CONSENSUS)
    # A later annotation by the adjudicator does not replace the decision.
    labels.append(said("i", "chief", "nv"))
    assert resolve(labels, adjudications={"decide"})[0].label == "mel"
    assert resolve(labels)[0].label == "nv"


def test_the_report_counts_images_with_two_annotators() -> None:
    labels = [said("i", "a", "mel"), said("i", "b", "mel"), said("j", "a", "nv"), said("j", "b", "mel")]
    found = agreement([*labels, said("k", "a", "nv")], {}, {}, ["mel", "nv"])
    assert found.images == 2
    assert found.cohen == {"a | b": 0.0}
    assert found.fleiss_by_class["mel"] == found.fleiss
    assert found.anchoring.difference is None


def test_anchoring_is_the_difference_of_agreeing_shares(store: Store, add_items: AddItems) -> None:
    items = add_items(1, overlays=False)
    with store.ledger.read() as tx:
        predictions = {p.id: p for p in tx.find(Prediction)}
    image, by_id = items[0].image_id, {items[0].id: items[0]}
    shown = [said(image, f"s{n}", "mel" if n < 18 else "nv", item=items[0].id) for n in range(20)]
    blind = [said(image, f"b{n}", "mel" if n < 10 else "nv", item="own", blind=True) for n in range(20)]
    found = anchoring([*shown, *blind, said(image, "c", None)], by_id, predictions)
    assert (found.shown, found.shown_agreeing, found.blind, found.blind_agreeing) == (20, 18, 20, 10)
    assert found.difference == pytest.approx(0.4)
    # Newcombe's method 10 by hand: Wilson intervals (0.699, 0.972) and (0.299, 0.701).
    assert found.interval == pytest.approx((0.115, 0.613), abs=2e-3)


def test_a_shown_prediction_is_that_of_the_review_item(store: Store, add_items: AddItems) -> None:
    """The newest prediction of an image is used only for an annotation without a review item of its own."""
    (item,) = add_items(1, overlays=False)
    with store.ledger.read() as tx:
        (shown,) = tx.find(Prediction)
    newer = shown.model_copy(update={"id": "newer", "label": "nv"})
    by_id, predictions = {item.id: item}, {shown.id: shown, "newer": newer}
    of_the_item = said(item.image_id, "a", "mel", item=item.id)
    own = said(item.image_id, "b", "mel", item="own", blind=True)
    found = anchoring([of_the_item, own], by_id, predictions)
    assert (found.shown, found.shown_agreeing) == (1, 1)
    assert (found.blind, found.blind_agreeing) == (1, 0)
    # Without both groups there is nothing to compare.
    alone = anchoring([of_the_item], by_id, predictions)
    assert (alone.shown, alone.blind, alone.difference, alone.interval) == (1, 0, None, None)
    alone = anchoring([own], by_id, predictions)
    assert (alone.shown, alone.blind, alone.difference, alone.interval) == (0, 1, None, None)
    # An image without any prediction says nothing about anchoring.
    assert anchoring([said("j", "a", "mel")], {}, {}).shown == 0


def test_unequal_shares_of_agreement_by_hand(store: Store, add_items: AddItems) -> None:
    (item,) = add_items(1, overlays=False)
    with store.ledger.read() as tx:
        predictions = {p.id: p for p in tx.find(Prediction)}
    shown = [said(item.image_id, f"s{n}", "mel" if n < 3 else "nv", item=item.id) for n in range(4)]
    blind = [said(item.image_id, f"b{n}", "mel" if n < 1 else "nv", item=item.id, blind=True) for n in range(5)]
    found = anchoring([*shown, *blind], {item.id: item}, predictions)
    assert (found.shown, found.shown_agreeing, found.blind, found.blind_agreeing) == (4, 3, 5, 1)
    assert found.difference == pytest.approx(3 / 4 - 1 / 5)


def test_the_report_is_read_from_the_ledger(store: Store, add_items: AddItems) -> None:
    items = add_items(3, overlays=False)
    labels = [said(items[0].image_id, name, "mel", item=items[0].id) for name in ("a", "b")]
    labels += [said(items[1].image_id, "a", "nv", item=items[1].id), said(items[1].image_id, "b", "mel", blind=True)]
    with store.ledger.begin() as tx:
        tx.add(*labels)
        served = tx.find(Prediction)
        # What a model in shadow said about an image was shown to nobody.
        tx.add(
            *(
                p.model_copy(update={"id": f"s{p.id[1:]}", "served": False, "label": "bcc", "arm": Arm.CANDIDATE})
                for p in served
            )
        )
    found = read_agreement(store)
    assert found.images == 2
    assert found.cohen == {"a | b": 0.0}
    assert set(found.fleiss_by_class) == set(store.taxonomy.codes)
    assert found.anchoring.model_dump(include={"shown", "shown_agreeing", "blind", "blind_agreeing"}) == {
        "shown": 3, "shown_agreeing": 2, "blind": 1, "blind_agreeing": 1,
    }  # fmt: skip
    by_id = {p.id: p for p in served}
    assert found == agreement(labels, {i.id: i for i in items}, by_id, store.taxonomy.codes)


def test_annotators_without_a_common_image_have_no_kappa() -> None:
    labels = [said("i", "a", "mel"), said("i", "b", "mel"), said("j", "c", "nv"), said("j", "d", "mel")]
    labels += [said("k", "a", "nv"), said("k", "b", None), said("l", "a", "nv"), said("l", "b", "nv")]
    found = agreement(labels, {}, {}, ["mel", "nv"])
    assert set(found.cohen) == {"a | b", "c | d"}
    assert found.images == 3
