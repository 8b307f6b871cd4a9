"""Groups of images that were not imported but served and then annotated; subsets of whole groups."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image as PillowImage

from images.grouping import group_images, grouped_subset, known_diagnoses
from images.importer import import_folder
from images.synth import render
from records.errors import DataError, UnknownIdError
from records.ids import new_id, utc_now
from records.keys import patient_hash
from records.store import Store
from records.types import Annotation, AnnotationKind, Confirmation, Group, Image, SourceLabel, Split


def serve(store: Store, data: bytes, **context: str) -> str:
    """Put an image into the ledger as the service does."""
    image_id = store.blobs.put(data)
    image = Image(
        id=image_id, uri=store.blobs.uri(image_id), format="jpeg", width_px=200, height_px=150, provenance="served",
        created_at=utc_now(), **context,
    )  # fmt: skip
    with store.ledger.begin() as tx:
        tx.add(image)
    return image_id


def group_of(store: Store, image_id: str) -> str | None:
    with store.ledger.read() as tx:
        return tx.require(Image, image_id).group_id


def recompressed(data: bytes) -> bytes:
    out = io.BytesIO()
    PillowImage.open(io.BytesIO(data)).save(out, "JPEG", quality=72)
    return out.getvalue()


def annotator(image_id: str, label: str | None) -> Annotation:
    now = utc_now()
    return Annotation(
        id=new_id(), created_at=now, annotated_at=now, review_item_id="r", image_id=image_id, label=label,
        annotator="a", kind=AnnotationKind.CLASS if label else AnnotationKind.CANT_TELL, server="s", project_id=1,
        task_id=1, annotation_id=1, revision=new_id(),
    )  # fmt: skip


def test_served_images_form_groups_without_a_split(store: Store) -> None:
    first = serve(store, render("nv", seed=1))
    second = serve(store, render("mel", seed=2), lesion_id="L1")
    third = serve(store, render("mel", seed=3), lesion_id="L1")
    assert group_images(store, [first, second, third, first]) == 3
    assert group_of(store, second) == group_of(store, third) != group_of(store, first)
    with store.ledger.read() as tx:
        assert {(g.split, g.drawn_by) for g in tx.find(Group)} == {(None, None)}
    assert group_images(store, [first, second]) == 0
    assert group_images(store, []) == 0


def test_a_served_copy_joins_the_imported_lesion(store: Store, generated: Path) -> None:
    import_folder(store, generated)
    with store.ledger.read() as tx:
        known = tx.find(Image, order_by=("id",))[0]
    copy = serve(store, recompressed(store.blobs.get(known.id)))
    assert group_images(store, [copy]) == 1
    assert group_of(store, copy) == known.group_id


def test_an_image_can_connect_two_groups_that_have_no_split(store: Store) -> None:
    first = serve(store, render("nv", seed=1), lesion_id="L1")
    second = serve(store, render("nv", seed=2), patient_hash="p")
    group_images(store, [first, second])
    assert group_of(store, first) != group_of(store, second)
    bridge = serve(store, render("nv", seed=3), lesion_id="L1", patient_hash="p")
    assert group_images(store, [bridge]) == 1
    assert group_of(store, first) == group_of(store, second) == group_of(store, bridge)
    with store.ledger.read() as tx:
        groups = {g.id: g.merged_into for g in tx.find(Group)}
    assert sorted(map(bool, groups.values())) == [False, True]


def test_an_image_that_would_join_two_splits_gets_no_group(store: Store) -> None:
    first = serve(store, render("nv", seed=1), lesion_id="L1")
    second = serve(store, render("nv", seed=2), patient_hash="p")
    group_images(store, [first, second])
    with store.ledger.begin() as tx:
        for image_id, split in ((first, Split.TRAIN), (second, Split.TEST)):
            image = tx.require(Image, image_id)
            tx.update(Group, image.group_id or "", split=split)
    bridge = serve(store, render("nv", seed=3), lesion_id="L1", patient_hash="p")
    assert group_images(store, [bridge]) == 0
    assert group_of(store, bridge) is None


def test_diagnoses_prefer_the_strongest_source_and_unanimous_annotators(store: Store) -> None:
    ids = [store.blobs.put(bytes([n])) for n in range(4)]
    now = utc_now()
    with store.ledger.begin() as tx:
        tx.add(annotator(ids[0], "nv"), annotator(ids[0], "mel"), annotator(ids[1], "nv"), annotator(ids[2], None))
        tx.add(annotator(ids[3], "df"))
        for label, confirmation in (("mel", Confirmation.HISTOPATHOLOGY), ("bkl", Confirmation.CONSENSUS)):
            tx.add(
                SourceLabel(
                    id=new_id(), image_id=ids[3], label=label, confirmation=confirmation, source="x", created_at=now
                )
            )
    assert known_diagnoses(store) == {ids[1]: "nv", ids[3]: "mel"}


def test_unknown_images_are_named(store: Store) -> None:
    with pytest.raises(UnknownIdError, match="import it first"):
        group_images(store, ["f" * 64])


def test_patients_are_distinguished_by_a_keyed_hash(store: Store) -> None:
    assert patient_hash(store.home, "P1") != patient_hash(store.home, "P2")
    assert patient_hash(store.home, "P1") == patient_hash(store.home, "P1")
    assert len(patient_hash(store.home, "P1")) == 64


def training_rows(groups_per_class: dict[str, int], images_per_group: int = 2) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"image_id": f"{label}-{group}-{image}", "group_id": f"{label}-{group}", "label": label}
            for label, count in groups_per_class.items()
            for group in range(count)
            for image in range(images_per_group)
        ]
    )


ROWS = training_rows({"nv": 60, "mel": 30, "df": 10})


def test_groups_stay_whole_and_classes_keep_their_share():
    chosen = grouped_subset(ROWS, 100, seed=0)

    assert len(chosen) <= 100
    assert (chosen.groupby("group_id").size() == 2).all()
    assert chosen["label"].value_counts().to_dict() == {"nv": 60, "mel": 30, "df": 10}


def test_a_rare_class_keeps_at_least_one_group():
    chosen = grouped_subset(training_rows({"nv": 100, "df": 1}, images_per_group=3), 20, seed=0)

    assert (chosen["label"] == "df").sum() == 3
    assert len(chosen) <= 20 + 3


def test_the_draw_depends_on_the_seed_and_a_larger_one_contains_it():
    small, other, large = (grouped_subset(ROWS, n, seed=s) for n, s in ((60, 1), (60, 2), (120, 1)))

    assert small.equals(grouped_subset(ROWS, 60, seed=1))
    assert set(small["group_id"]) != set(other["group_id"])
    assert set(small["group_id"]) <= set(large["group_id"])


def test_the_order_of_the_rows_decides_nothing():
    shuffled = ROWS.iloc[np.random.default_rng(0).permutation(len(ROWS))]

    assert set(grouped_subset(shuffled, 60, seed=1)["image_id"]) == set(grouped_subset(ROWS, 60, seed=1)["image_id"])


@pytest.mark.parametrize("limit", [None, 200, 10_000])
def test_a_limit_that_is_not_reached_changes_nothing(limit):
    assert grouped_subset(ROWS, limit, seed=0).equals(ROWS)


def test_fewer_images_than_classes_are_refused():
    with pytest.raises(DataError, match=r"max_train_images is 2, but 3 classes need an image each"):
        grouped_subset(ROWS, 2, seed=0)
