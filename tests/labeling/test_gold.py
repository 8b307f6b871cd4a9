"""Gold tasks look like other blind tasks and never count as labels; readers see their own card first."""

import itertools
import json
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.labels import resolved_labels
from images.grouping import known_diagnoses
from labeling.batches import Beside, prepare
from labeling.cli import app
from labeling.consensus import current
from labeling.project import Project
from labeling.readers import list_cards, open_card
from labeling.reads import add_adjudications, plan_reads
from labeling.settings import LabelingSettings
from records.errors import DataError
from records.ids import hash_of, new_id, utc_now
from records.store import Store
from records.types import (
    Annotation,
    AnnotationKind,
    AuditEvent,
    Confirmation,
    Consent,
    Group,
    Image,
    ReasonCode,
    ReviewItem,
    ReviewState,
    SourceLabel,
    Split,
)
from tests.labeling.conftest import make_image, write_item

NUMBERS = itertools.count(1)
GOLD = LabelingSettings(blind_share=1.0, gold_share=0.3, readers=("a@x.org", "b@x.org"))


def add_known(store: Store, number: int, label: str = "nv", **changes: Any) -> str:
    """Write a training image with a confirmed diagnosis; changes make it one that may not be asked about."""
    split, confirmation = changes.pop("split", Split.TRAIN), changes.pop("confirmation", Confirmation.HISTOPATHOLOGY)
    now, data = utc_now(), make_image(5000 + number)
    group = Group(id=f"{number:016x}", split=split, created_at=now)
    image = Image(
        id=store.blobs.put(data), uri="", format="jpeg", width_px=96, height_px=72, provenance="import:1",
        created_at=now, group_id=group.id, consent=Consent.TRAINING,
    )  # fmt: skip
    image = image.model_copy(update={"uri": store.blobs.uri(image.id), **changes})
    source = SourceLabel(
        id=new_id(), image_id=image.id, label=label, confirmation=confirmation, source="import:1", created_at=now
    )
    with store.ledger.begin() as tx:
        tx.add(group, image, source)
    return image.id


def add_waiting(store: Store, count: int) -> None:
    """Write review items with fixed ids, without images, which planning does not read."""
    with store.ledger.begin() as tx:
        for number in range(count):
            item_id = hash_of(["waiting", number])[:32]
            tx.add(
                ReviewItem(
                    id=item_id, created_at=utc_now(), image_id=hash_of(number), reasons=[ReasonCode.LOW_CONFIDENCE],
                    priority=float(number),
                )
            )  # fmt: skip


def gold_items(store: Store) -> list[ReviewItem]:
    with store.ledger.read() as tx:
        return [item for item in tx.find(ReviewItem) if ReasonCode.GOLD in item.reasons]


def test_the_stated_share_is_mixed_in_and_nobody_is_asked_twice(store: Store) -> None:
    known = {add_known(store, number) for number in range(50)}
    barred = [
        add_known(store, 100, split=Split.TEST),
        add_known(store, 101, confirmation=Confirmation.SINGLE_READER),
        add_known(store, 102, consent=Consent.NONE),
        add_known(store, 103, erased_at=utc_now()),
    ]
    sent = write_item(store, make_image(5200), None, 1.0)  # an image that a caller sent
    with store.ledger.begin() as tx:
        tx.update(ReviewItem, sent.id, state=ReviewState.ANSWERED)
    add_waiting(store, 120)
    assert plan_reads(store, GOLD.model_copy(update={"gold_share": 0.0})) == 0
    assert gold_items(store) == [], "the default asks no gold task"
    planned = plan_reads(store, GOLD)
    gold = gold_items(store)
    assert len(gold) == planned
    # Of 120 blind tasks and their gold tasks 0.3 are gold; four standard deviations on either side.
    assert 0.19 < len(gold) / (120 + len(gold)) < 0.39
    assert {item.image_id for item in gold} <= known
    assert not {item.image_id for item in gold} & {*barred, sent.image_id}
    asked = Counter((item.reader, item.image_id) for item in gold)
    assert max(asked.values()) == 1
    assert {reader for reader, _ in asked} == set(GOLD.readers)
    assert plan_reads(store, GOLD) == 0, "planning again adds none"
    assert all(item.blind and item.prediction_id is None for item in gold)


def test_a_gold_task_is_like_the_task_of_any_blind_item(store: Store) -> None:
    for number in range(8):
        add_known(store, number)
    for number in range(8):
        write_item(store, make_image(number), None, 1.0 + number)
    plan_reads(store, GOLD.model_copy(update={"gold_share": 0.5, "readers": ()}))
    with store.ledger.read() as tx:
        waiting = tx.find(ReviewItem, where={"state": ReviewState.NEW})
    batch = prepare(store, waiting, Project(id=1, marker="m"), LabelingSettings(), Beside("c" * 64))
    by_kind: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for item, document in zip(batch.items, batch.documents, strict=True):
        by_kind[ReasonCode.GOLD in item.reasons].append(document)
    assert len(by_kind[True]) == len(by_kind[False]) == 8
    shapes = [
        {
            (tuple(d["data"]), tuple(d["meta"]), d["data"]["why"], len(d["data"]["relook_item"]), str(type(d)))
            for d in by_kind[kind]
        }
        for kind in (True, False)
    ]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == 1
    assert "relook_model" not in by_kind[False][0]["meta"], "which model predicted tells it from the others"
    assert "gold" not in json.dumps(by_kind[True][0]).lower().replace(by_kind[True][0]["data"]["image"].lower(), "")
    scores = [sorted(d["predictions"][0]["score"] for d in by_kind[kind]) for kind in (True, False)]
    assert scores[0] == scores[1]


def said(store: Store, item: ReviewItem, annotator: str, label: str | None, seconds: float | None = None) -> None:
    """Record an annotation as a pull does."""
    now = utc_now()
    gold = ReasonCode.GOLD in item.reasons
    with store.ledger.begin() as tx:
        tx.add(
            Annotation(
                id=new_id(), created_at=now, review_item_id=item.id, image_id=item.image_id,
                kind=AnnotationKind.CLASS if label else AnnotationKind.CANT_TELL, label=label, annotator=annotator,
                annotated_at=now, lead_time_s=seconds, blind=True, gold=gold, server="local", project_id=1, task_id=1,
                annotation_id=next(NUMBERS), revision=new_id(),
            )
        )  # fmt: skip


@pytest.fixture
def asked(store: Store) -> list[ReviewItem]:
    """Ten gold tasks: six melanomas and four naevi."""
    items = []
    for number, label in enumerate(["mel"] * 6 + ["nv"] * 4):
        image_id = add_known(store, number, label)
        items.append(
            ReviewItem(
                id=new_id(), created_at=utc_now(), image_id=image_id, reasons=[ReasonCode.GOLD], priority=1.0,
                blind=True,
            )
        )  # fmt: skip
    with store.ledger.begin() as tx:
        tx.add(*items)
    return items


def test_gold_annotations_are_kept_and_count_as_no_label(store: Store, asked: list[ReviewItem]) -> None:
    for item in asked:
        said(store, item, "a@x.org", "bcc")
        said(store, item, "b@x.org", "df")
    with store.ledger.read() as tx:
        assert len(current(tx.find(Annotation))) == 20
    assert resolved_labels(store) == []
    assert add_adjudications(store, 0.67) == 0, "readers who differ about a gold task ask for no decision"
    assert set(known_diagnoses(store).values()) == {"mel", "nv"}


def test_a_card_says_what_the_reader_did_and_the_reader_sees_it_first(store: Store, asked: list[ReviewItem]) -> None:
    labels = ["mel"] * 4 + ["nv", None, "nv", "nv", "nv", "mel"]
    for number, (item, label) in enumerate(zip(asked, labels, strict=True)):
        said(store, item, "a@x.org", label, 10.0 + number)
    for item in asked[:4]:
        said(store, item, "b@x.org", "mel")
    hidden = list_cards(store)
    assert (hidden.cards, hidden.unopened) == ([], ["a@x.org", "b@x.org"])
    card = open_card(store, "a@x.org", actor="test")
    assert (card.annotations, card.gold.hits, card.gold.of, card.gold_undecided) == (10, 7, 9, 1)
    # Wilson's interval of 7 of 9, by hand: (0.4526, 0.9368).
    assert card.gold.interval == pytest.approx((0.4526, 0.9368), abs=2e-4)
    assert card.confusion == {"mel": {"cant_tell": 1, "mel": 4, "nv": 1}, "nv": {"mel": 1, "nv": 3}}
    assert (card.malignant.hits, card.malignant.of) == (4, 5)
    assert (card.agreement.hits, card.agreement.of) == (4, 4)
    # The 2nd and the 9th of ten times: coverage 0.979.
    assert (card.seconds, card.seconds_interval) == (14.5, (11.0, 18.0))
    assert card.anchoring.shown == 0
    listed = list_cards(store)
    assert [(one.reader, one.gold) for one in listed.cards] == [("a@x.org", card.gold)]
    assert listed.unopened == ["b@x.org"]
    # What came after is in nobody's list until the reader opens the card again.
    with store.ledger.begin() as tx:
        more = asked[0].model_copy(update={"id": new_id(), "image_id": add_later(tx, "nv")})
        tx.add(more)
    said(store, more, "a@x.org", "nv")
    assert list_cards(store).cards[0].annotations == 10
    assert open_card(store, "a@x.org", actor="test").annotations == 11
    assert list_cards(store).cards[0].annotations == 11
    with store.ledger.read() as tx:
        opened = tx.find(AuditEvent, where={"action": "reader_card.opened"})
    assert [event.subject for event in opened] == ["a@x.org"] * 2
    with pytest.raises(DataError, match=r"'c@x.org' has annotated nothing; annotators are a@x.org, b@x.org"):
        open_card(store, "c@x.org", actor="test")


def add_later(tx: Any, label: str) -> str:
    image_id = hash_of(["later", label])
    tx.add(
        SourceLabel(
            id=new_id(), image_id=image_id, label=label, confirmation=Confirmation.CONFOCAL, source="import:2",
            created_at=utc_now() - timedelta(days=1),
        )
    )  # fmt: skip
    return image_id


def test_a_corrected_diagnosis_counts_at_once(store: Store, asked: list[ReviewItem]) -> None:
    said(store, asked[0], "a@x.org", "bcc")
    assert open_card(store, "a@x.org", actor="test").gold.hits == 0
    with store.ledger.begin() as tx:
        tx.add(
            SourceLabel(
                id=new_id(), image_id=asked[0].image_id, label="bcc", confirmation=Confirmation.HISTOPATHOLOGY,
                source="correction:1:import:2", created_at=utc_now(),
            )
        )  # fmt: skip
    assert open_card(store, "a@x.org", actor="test").gold.hits == 1


def test_the_verb_prints_cards(store: Store, asked: list[ReviewItem]) -> None:
    def run(*arguments: str) -> Any:
        composed = SimpleNamespace(records=store.settings, labeling=GOLD)
        return CliRunner().invoke(app, ["label", "readers", *arguments], obj=lambda config, preset, sets: composed)

    said(store, asked[0], "a@x.org", "mel")
    assert "relook label readers --reader a@x.org" in run().stderr
    assert json.loads(run("--reader", "a@x.org", "--json").stdout)["gold"]["hits"] == 1
    shown = run("--reader", "a@x.org").stdout
    assert "1 of 1" in shown
    assert [card["reader"] for card in json.loads(run("--json").stdout)["cards"]] == ["a@x.org"]
