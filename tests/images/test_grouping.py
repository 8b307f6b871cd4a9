"""Groups of images that came in by other ways than an import: served ones that annotators labelled."""

import io
from pathlib import Path

import pytest
from PIL import Image as PillowImage

from images.grouping import group_images, known_diagnoses
from images.importer import import_folder
from images.synth import render
from records.errors import UnknownIdError
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
        annotator="a", kind=AnnotationKind.CLASS if label else AnnotationKind.CANT_TELL, server="s", project_id=1, task_id=1,
        annotation_id=1, revision=new_id(),
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


def test_patients_are_told_apart_by_a_salted_hash(store: Store) -> None:
    assert patient_hash(store.home, "P1") != patient_hash(store.home, "P2")
    assert patient_hash(store.home, "P1") == patient_hash(store.home, "P1")
    assert len(patient_hash(store.home, "P1")) == 64
