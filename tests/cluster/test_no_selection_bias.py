"""For any order of events: labels of selected or flagged images never evaluate, and no annotation replaces a biopsy."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cluster import monitor
from cluster.labels import resolved_labels
from labeling.reads import add_adjudications, plan_reads
from labeling.settings import LabelingSettings
from records.datasets import DatasetVersion, build_version
from records.ids import new_id, sha256_hex, utc_now
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import (
    LABEL_RANK,
    Annotation,
    AnnotationKind,
    Confirmation,
    Consent,
    Decision,
    FlagReason,
    Group,
    Image,
    Outcome,
    Prediction,
    ReasonCode,
    ReviewItem,
    ReviewState,
    SourceLabel,
    Split,
)
from serving.outbox import PredictionRows, write_flag, write_outcome, write_predictions
from serving.schemas import FlagRequest, OutcomeRequest

BIOPSIED, READ, UNKNOWN = range(10), range(10, 20), range(20, 32)
LABELS = ("mel", "nv", "bcc")
READERS = ("ann", "ben", "cleo")
DOUBTS = (ReasonCode.REFER, ReasonCode.LOW_CONFIDENCE, ReasonCode.URGENT)
WORK = LabelingSettings(blind_share=0.3)
BY_READERS = (Confirmation.CONSENSUS, Confirmation.SINGLE_READER)

images = st.integers(0, 31)
labels = st.sampled_from(LABELS)
events = st.one_of(
    st.tuples(st.just("predict"), images, st.sets(st.sampled_from(DOUBTS), max_size=2), st.booleans()),
    st.tuples(st.just("flag"), images),
    st.tuples(st.just("choose"), images, st.sampled_from([ReasonCode.SELECTED, ReasonCode.LABEL_NOISE])),
    st.tuples(st.just("push")),
    st.tuples(st.just("annotate"), st.integers(0, 9), st.sampled_from(READERS), labels),
    st.tuples(st.just("edit"), st.integers(0, 9), labels),
    st.tuples(st.just("delete"), st.integers(0, 9)),
    st.tuples(st.just("disagree")),
    st.tuples(st.just("outcome"), images, labels, st.sampled_from(list(Confirmation)[:-1])),
    st.tuples(st.just("round")),
)


def _image_id(number: int) -> str:
    return sha256_hex(f"image {number}".encode())


def _group_id(number: int) -> str:
    """Unlabelled images share a lesion with labelled ones, with each other, or have their own."""
    owner = number - 20 if 20 <= number < 24 else number - 10 if 24 <= number < 28 else number // 2 * 2
    return sha256_hex(f"group {owner if number >= 20 else number}".encode())[:16]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with 20 labelled images, four on each split, and 12 without a label."""
    home = tmp_path_factory.mktemp("imported") / "home"
    store, now = open_store(RecordsSettings(home=home)), utc_now()
    with store.ledger.begin() as tx:
        splits = {_group_id(n): list(Split)[n % 5] for n in (*BIOPSIED, *READ)}
        for one in sorted({_group_id(n) for n in range(32)}):
            drawn = {"split": splits[one], "drawn_by": "given", "drawn_at": now} if one in splits else {}
            tx.add(Group(id=one, created_at=now, **drawn))
        for n in range(32):
            tx.add(
                Image(
                    id=_image_id(n), uri="file:///none", format="jpeg", width_px=1, height_px=1, group_id=_group_id(n),
                    provenance="import:1", consent=Consent.TRAINING, created_at=now,
                )
            )  # fmt: skip
        for n in (*BIOPSIED, *READ):
            how = Confirmation.HISTOPATHOLOGY if n in BIOPSIED else Confirmation.SINGLE_READER
            tx.add(
                SourceLabel(
                    id=f"import {n}", image_id=_image_id(n), label=LABELS[n % 3], confirmation=how, source="import:1",
                    created_at=now,
                )
            )  # fmt: skip
    assert build_version(store).version.num_images == 20
    store.close()
    return home


@dataclass
class History:
    """A store to which events are applied through the functions of the product."""

    store: Store
    parent: DatasetVersion | None = None
    rounds: int = 0
    annotations: int = 0
    splits: dict[str, str] = field(default_factory=dict)

    def apply(self, event: tuple[Any, ...]) -> None:
        getattr(self, event[0])(*event[1:])

    def predict(self, number: int, doubts: set[ReasonCode], is_drawn: bool) -> None:
        reasons = [*sorted(doubts), *([ReasonCode.AUDIT_SAMPLE] if is_drawn else [])]
        now = utc_now()
        prediction = Prediction(
            id=new_id(), request_id=new_id(), created_at=now, caller="local", image_id=_image_id(number),
            consent=Consent.TRAINING, model_id="m" * 64, model_status="champion", engine="torch", precision="fp32",
            num_threads=1, settings_hash="", label="nv", confidence=0.5, latency_ms=1, reasons=reasons,
            decision=Decision.REVIEW if reasons else Decision.ANSWERED,
        )  # fmt: skip
        item = ReviewItem(
            id=new_id(), created_at=now, prediction_id=prediction.id, image_id=prediction.image_id, reasons=reasons,
            priority=1.0, due=now + timedelta(hours=1) if ReasonCode.URGENT in reasons else None,
            selection_probability=0.5 if is_drawn else None,
        )  # fmt: skip
        write_predictions(self.store, [PredictionRows(prediction, None, item if reasons else None)])

    def flag(self, number: int) -> None:
        for prediction in self._find(Prediction, image_id=_image_id(number))[-1:]:
            wrong = FlagRequest(reason=FlagReason.WRONG_LABEL, suggested_label="mel")
            is_open = [ReviewState.NEW, ReviewState.PUSHED]
            before = self._find(ReviewItem, image_id=prediction.image_id, state=is_open)
            _, item = write_flag(self.store, prediction, wrong, "local", None)
            assert not item.blind or all(one.blind for one in before), "a blind reader must not see a flag"

    def choose(self, number: int, reason: ReasonCode) -> None:
        item = ReviewItem(id=new_id(), created_at=utc_now(), image_id=_image_id(number), reasons=[reason], priority=1.0)
        with self.store.ledger.begin() as tx:
            tx.add(item)

    def push(self) -> None:
        plan_reads(self.store, WORK)
        with self.store.ledger.begin() as tx:
            for item in tx.find(ReviewItem, where={"state": ReviewState.NEW}):
                tx.update(ReviewItem, item.id, state=ReviewState.PUSHED, pushed_at=utc_now())

    def annotate(self, which: int, reader: str, label: str) -> None:
        items = self._find(ReviewItem, state=[ReviewState.PUSHED, ReviewState.ANSWERED])
        if items:
            item = items[which % len(items)]
            self._add_annotation(item, reader, annotation=self.annotations + 1, label=label)
            with self.store.ledger.begin() as tx:
                tx.update(ReviewItem, item.id, state=ReviewState.ANSWERED)

    def edit(self, which: int, label: str) -> None:
        self._revise(which, label=label)

    def delete(self, which: int) -> None:
        self._revise(which, deleted=True)

    def disagree(self) -> None:
        add_adjudications(self.store, WORK.adjudicate_below)

    def outcome(self, number: int, diagnosis: str, confirmation: Confirmation) -> None:
        for prediction in self._find(Prediction, image_id=_image_id(number))[-1:]:
            request = OutcomeRequest(diagnosis=diagnosis, confirmation=confirmation, observed_at=prediction.created_at)
            write_outcome(self.store, prediction, request, "local")

    def round(self) -> None:
        self.rounds += 1
        resolved = resolved_labels(self.store)
        parent = self.parent.id if self.parent else None
        self.parent = build_version(self.store, resolved=resolved, round_number=self.rounds, parent_id=parent).version
        self._check_version(self.parent)
        self._check_live()

    def _check_version(self, version: DatasetVersion) -> None:
        by_chance = self._by_chance()
        biopsies = self._biopsies()
        for row in version.rows.to_dict("records"):
            image_id, source = row["image_id"], row["label_source"]
            assert self.splits.setdefault(row["group_id"], row["split"]) == row["split"], "a split never changes"
            if image_id in biopsies:
                may_be = biopsies[image_id] if row["split"] == Split.TRAIN else {LABELS[_number(image_id) % 3]}
                assert row["label"] in may_be, "an annotation replaced a histopathology result"
            if row["split"] == Split.TRAIN or source.startswith("import:"):
                continue
            assert source.startswith("annotator:"), f"outcomes are no random sample: {source}"
            readers = set(source.removeprefix("annotator:").split("+"))
            assert (image_id, row["label"]) in {(one.image_id, one.label) for one in by_chance}
            assert readers <= {one.annotator for one in by_chance if one.image_id == image_id}

    def _check_live(self) -> None:
        drawn = {item.id: item for item in self._find(ReviewItem) if ReasonCode.AUDIT_SAMPLE in item.reasons}
        blind = {(row.image_id, row.label) for row in self._current_rows() if row.blind and row.review_item_id in drawn}
        for row in monitor._audited(self.store):
            assert row.image.id in {item.image_id for item in drawn.values()}
            found = [o for o in self._find(Outcome, image_id=row.image.id) if o.confirmation not in BY_READERS]
            best = min((LABEL_RANK[o.confirmation] for o in found), default=None)
            strongest = {o.diagnosis for o in found if LABEL_RANK[o.confirmation] == best}
            assert row.truth in strongest if found else (row.image.id, row.truth) in blind

    def _by_chance(self) -> list[Annotation]:
        """Blind annotations of review items that were drawn at random and for no other reason."""
        items = {item.id: item for item in self._find(ReviewItem)}
        rows = self._current_rows()
        return [row for row in rows if row.blind and items[row.review_item_id].reasons == [ReasonCode.AUDIT_SAMPLE]]

    def _biopsies(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for one in self._find(SourceLabel, confirmation=Confirmation.HISTOPATHOLOGY):
            if one.image_id in {_image_id(n) for n in BIOPSIED} or one.source.startswith("outcome:"):
                found.setdefault(one.image_id, set()).add(one.label)
        return found

    def _current_rows(self) -> list[Annotation]:
        newest = {row.annotation_id: row for row in self._find(Annotation)}
        return [row for row in newest.values() if not row.deleted]

    def _find(self, record_type: Any, **where: Any) -> list[Any]:
        with self.store.ledger.read() as tx:
            return list(tx.find(record_type, where=where or None, order_by=("created_at", "id")))

    def _add_annotation(self, item: ReviewItem, reader: str, annotation: int, **changes: Any) -> None:
        self.annotations += 1
        now = utc_now()
        values = {
            "id": new_id(), "created_at": now, "review_item_id": item.id, "image_id": item.image_id,
            "kind": AnnotationKind.CLASS, "annotator": reader, "annotated_at": now, "blind": item.blind,
            "server": "local", "project_id": 1, "task_id": 1, "annotation_id": annotation,
            "revision": str(self.annotations),
        }  # fmt: skip
        with self.store.ledger.begin() as tx:
            tx.add(Annotation.model_validate(values | changes))

    def _revise(self, which: int, **changes: Any) -> None:
        current = self._current_rows()
        if current:
            row = current[which % len(current)]
            (item,) = self._find(ReviewItem, id=row.review_item_id)
            self._add_annotation(item, row.annotator, row.annotation_id, **({"label": row.label} | changes))


def _number(image_id: str) -> int:
    return next(n for n in range(32) if _image_id(n) == image_id)


@contextmanager
def _history(imported: Path, folder: Path) -> Iterator[History]:
    home = folder / new_id()
    shutil.copytree(imported, home)
    store = open_store(RecordsSettings(home=home))
    try:
        yield History(store)
    finally:
        store.close()
        shutil.rmtree(home)


def _drawn_and_flagged() -> list[tuple[Any, ...]]:
    """An image is drawn, read blind, flagged, and annotated again by someone who sees the prediction."""
    drawn = [("predict", 30, set(), True), ("push",), ("annotate", 0, "ann", "nv")]
    return [*drawn, ("flag", 30), ("push",), ("annotate", 1, "ben", "mel"), ("round",)]


@pytest.mark.slow
@example(history=_drawn_and_flagged())
@example(history=[("predict", 0, set(), True), ("outcome", 0, "bcc", Confirmation.HISTOPATHOLOGY),
                  ("outcome", 0, "mel", Confirmation.SINGLE_READER), ("round",)])  # fmt: skip
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(history=st.lists(events, min_size=12, max_size=30))
def test_selected_and_flagged_images_never_evaluate_and_no_annotation_replaces_a_biopsy(
    history: list[tuple[Any, ...]], imported: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with _history(imported, tmp_path_factory.getbasetemp()) as made:
        for event in history:
            made.apply(event)
        made.round()
