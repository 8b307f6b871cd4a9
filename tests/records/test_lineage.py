from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from records.datasets import build_version
from records.errors import IntegrityError, UnknownIdError
from records.ids import utc_now
from records.ledger.tables import TABLES
from records.lineage import trace
from records.store import Store
from records.types import (
    Annotation,
    Confirmation,
    Consent,
    DatasetRecord,
    Decision,
    Flag,
    FlagReason,
    Image,
    ModelRecord,
    ModelStatus,
    Outcome,
    Prediction,
    ReasonCode,
    ResolvedLabel,
    ReviewItem,
)

PREDICTION, MODEL_1, MODEL_2 = "aaaa0000" + "1" * 24, "bbbb0000" + "1" * 56, "cccc0000" + "2" * 56


@pytest.fixture
def history(
    store: Store, sample: Callable[..., Any], add_labelled: Callable[..., None], image_id: Callable[[object], str]
) -> str:
    """One flagged image: predicted, reviewed, flagged, annotated, used to train the next model."""
    add_labelled(store, range(20), "nv")
    add_labelled(store, ["asked"], None, source_id="ISIC_1")
    first = build_version(store).version
    image, start = image_id("asked"), utc_now() - timedelta(hours=1)

    def at(minutes: int) -> dict[str, Any]:
        return {"created_at": start + timedelta(minutes=minutes)}

    with store.ledger.begin() as tx:
        tx.add(
            sample(ModelRecord, id=MODEL_1, dataset_id=first.id, round=1, status=ModelStatus.RETIRED, **at(0)),
            sample(
                Prediction, id=PREDICTION, image_id=image, model_id=MODEL_1, model_status="champion",
                decision=Decision.REVIEW, label="nv", confidence=0.51, **at(1),
            ),
            sample(
                ReviewItem, image_id=image, prediction_id=PREDICTION, reasons=[ReasonCode.FLAGGED, ReasonCode.REFER],
                project_id=3, task_id=7, pushed_at=start + timedelta(minutes=3), **at(2),
            ),
            sample(
                Flag, prediction_id=PREDICTION, reason=FlagReason.WRONG_LABEL, caller="clinic",
                suggested_label="mel", **at(2),
            ),
            sample(
                Annotation, image_id=image, annotator="anna", kind="class", label="mel", deleted=False, **at(4)
            ),
            sample(
                Outcome, prediction_id=PREDICTION, diagnosis="mel", confirmation=Confirmation.HISTOPATHOLOGY, **at(5)
            ),
        )  # fmt: skip
    said = ResolvedLabel(image_id=image, label="mel", confirmation=Confirmation.SINGLE_READER, annotators=["anna"])
    second = build_version(store, resolved=[said], round_number=2, parent_id=first.id).version
    with store.ledger.begin() as tx:
        created = {"created_at": utc_now(), "status_changed_at": utc_now()}
        values = {"id": MODEL_2, "dataset_id": second.id, "round": 2, "status": ModelStatus.CHAMPION} | created
        tx.add(sample(ModelRecord, 1, architecture="custom_cnn", **values))
    return image


def test_a_flagged_image_is_followed_to_the_model_that_learned_from_it(store: Store, history: str) -> None:
    for subject, kind in ((PREDICTION, "prediction"), (PREDICTION[:8], "prediction"), (history, "image")):
        found = trace(store, subject)
        assert (found.kind, found.subject) == (kind, history if kind == "image" else PREDICTION)
        kinds = [step.kind for step in found.steps]
        assert kinds == [
            "image",
            "prediction",
            "flag",
            "review_item",
            "task",
            "annotator",
            "outcome",
            "dataset",
            "model",
        ]
        assert [step.at for step in found.steps] == sorted(step.at for step in found.steps)
    texts = {step.kind: step.text for step in found.steps}
    assert texts["image"].startswith("image (ISIC_1) stored")
    assert texts["prediction"] == "review by model bbbb00001111 (champion): nv at 0.51"
    assert texts["flag"] == "flagged wrong_label by clinic, suggests mel"
    assert texts["review_item"] == "sent to annotators: flagged, refer"
    assert texts["task"] == "task 7 in project 3 of Label Studio"
    assert texts["annotator"] == "anna said mel"
    assert texts["outcome"] == "turned out to be mel (histopathology)"
    assert texts["dataset"].endswith("as mel on split train (annotator:anna)")
    assert texts["model"].startswith("model cccc00002222 (custom_cnn) trained on dataset")
    assert texts["model"].endswith("in round 2, champion")


def test_a_model_is_followed_back_to_its_dataset(store: Store, history: str) -> None:
    found = trace(store, MODEL_1[:8])
    assert (found.kind, found.subject) == ("model", MODEL_1)
    texts = {step.kind: step.text for step in found.steps}
    assert texts["dataset"].endswith("20 images in 20 groups")
    assert texts["prediction"] == "made 1 predictions; status retired since then"
    assert "prediction" not in {step.kind for step in trace(store, MODEL_2).steps}


def test_many_predictions_of_a_model_are_not_all_counted(
    store: Store, history: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("records.lineage._COUNTED", 0)
    texts = {step.kind: step.text for step in trace(store, MODEL_1).steps}
    assert texts["prediction"] == "made more than 0 predictions; status retired since then"


def test_annotations_without_a_class_or_deleted_are_shown(
    store: Store, history: str, sample: Callable[..., Any]
) -> None:
    with store.ledger.begin() as tx:
        tx.add(
            sample(Annotation, 1, image_id=history, kind="cant_tell", label=None, other_text=None, deleted=False),
            sample(Annotation, 2, image_id=history, kind="other", label=None, other_text="a tattoo", deleted=False),
            sample(Annotation, 3, image_id=history, deleted=True, annotator="ben"),
            sample(Prediction, 5, image_id=history, decision=Decision.RETAKE, label=None, confidence=None),
        )
    texts = {step.text for step in trace(store, history).steps}
    assert {"ben deleted the annotation"} < texts
    assert any(text.endswith("said cant_tell") for text in texts)
    assert any(text.endswith("said a tattoo") for text in texts)
    assert any(text.startswith("retake") and text.endswith("no label") for text in texts)


@pytest.mark.parametrize(
    ("subject", "said"), [("aaaa", "too short"), ("dddddddd", "nothing has the id"), ("", "short")]
)
def test_ids_that_name_nothing_are_refused(store: Store, history: str, subject: str, said: str) -> None:
    with pytest.raises(UnknownIdError, match=said):
        trace(store, subject)


def test_a_prefix_that_two_things_share_is_refused(store: Store, history: str, sample: Callable[..., Any]) -> None:
    with store.ledger.begin() as tx:
        tx.add(sample(Prediction, 9, id="bbbb0000" + "9" * 24))
    with pytest.raises(UnknownIdError, match="2 things share the id 'bbbb0000'"):
        trace(store, "bbbb0000")


def test_a_lost_manifest_is_named(store: Store, history: str) -> None:
    with store.ledger.read() as tx:
        (dataset, *_) = tx.find(DatasetRecord)
    (store.home.datasets / dataset.id / "manifest.parquet").unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        trace(store, history)


def test_versions_that_repeat_a_row_are_not_opened_and_the_trace_is_the_same(
    store: Store, add_labelled: Callable[..., None], image_id: Callable[[object], str]
) -> None:
    add_labelled(store, range(6))
    versions = [build_version(store).version.id]
    for number, change in enumerate(("labelled", "added", "left out", "nothing but a round"), start=1):
        said = {"confirmation": Confirmation.HISTOPATHOLOGY, "annotators": ["a"], "from_audit_sample": True}
        resolved = [ResolvedLabel.model_validate({"image_id": image_id(0), "label": "mel", **said})]
        if change == "added":
            add_labelled(store, [6])
        if change == "left out":
            with store.ledger.begin() as tx:
                tx.update(Image, image_id(1), consent=Consent.REVIEW)
        if change == "nothing but a round":
            resolved.append(resolved[0].model_copy(update={"image_id": image_id(2), "label": "nv"}))
        made = build_version(store, resolved=resolved, round_number=number, parent_id=versions[-1]).version
        versions.append(made.id)
    images = [image_id(number) for number in range(7)]
    by_changes = [trace(store, image) for image in images]
    with store.ledger.begin() as tx:
        numbers = {record.id: record.num_changes for record in tx.find(DatasetRecord)}
        assert [numbers[version] for version in versions] == [None, 1, 1, 1, 1]
        tx.connection.execute(sa.update(TABLES[DatasetRecord]).values(num_changes=None))
    assert [trace(store, image) for image in images] == by_changes
    steps = [[step.id for step in found.steps if step.kind == "dataset"] for found in by_changes]
    assert steps[1] == versions[:3]
    assert steps[6] == versions[2:]
    with store.ledger.begin() as tx:
        tx.connection.execute(
            sa.update(TABLES[DatasetRecord]).where(TABLES[DatasetRecord].c.round > 0).values(num_changes=1)
        )
    (store.home.datasets / versions[1] / "manifest.parquet").unlink()
    assert trace(store, image_id(3)) == by_changes[3]
    with pytest.raises(IntegrityError, match="is missing"):
        trace(store, image_id(0))
