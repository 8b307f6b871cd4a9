"""Erasure: bytes, heat maps and personal data are deleted, ids and hashes stay."""

from collections.abc import Callable
from typing import Any

import pytest

from records import audit
from records.datasets import build_version, load_dataset
from records.erasure import PERSONAL, erase_image, erased_ids
from records.errors import UnknownIdError
from records.ids import sha256_hex
from records.store import Store
from records.types import AuditEvent, Image, Prediction, ReasonCode, ReviewItem, ReviewState

Sample = Callable[..., Any]


@pytest.fixture
def erasable(store: Store, sample: Sample) -> str:
    """A stored image with a prediction and an open review item that has a heat map."""
    image = store.blobs.put(b"the image")
    overlay = store.blobs.put(b"the heat map")
    with store.ledger.begin() as tx:
        tx.add(
            sample(Image, id=image, uri=store.blobs.uri(image), erased_at=None),
            sample(Prediction, image_id=image),
            sample(
                ReviewItem,
                image_id=image,
                overlay_blob=overlay,
                reasons=[ReasonCode.FLAGGED],
                state=ReviewState.NEW,
            ),
        )
    return image


def test_nothing_that_shows_the_image_or_names_the_person_stays(store: Store, erasable: str) -> None:
    report = erase_image(store, erasable, actor="key 1")
    assert (report.blobs, report.withdrawn, report.left_in_place) == (2, 1, None)
    assert not store.blobs.has(erasable)
    assert not store.blobs.has(sha256_hex(b"the heat map"))
    with store.ledger.read() as tx:
        image, (item,), (prediction,) = tx.require(Image, erasable), tx.find(ReviewItem), tx.find(Prediction)
        assert erased_ids(tx) == {erasable}
    assert image.erased_at is not None
    assert {getattr(image, name) for name in PERSONAL} == {None}
    assert (item.state, item.overlay_blob, item.comment) == (ReviewState.WITHDRAWN, None, None)
    assert (prediction.context, prediction.image_id) == ({}, erasable)
    assert audit.verify(store.ledger, store.home) == []


def test_erasing_again_is_no_second_event(store: Store, erasable: str) -> None:
    erase_image(store, erasable, actor="key 1")
    store.blobs.put(b"the image")  # as if the first run had been killed before it came to the blob
    assert erase_image(store, erasable, actor="key 1").withdrawn == 0
    assert not store.blobs.has(erasable)
    with store.ledger.read() as tx:
        assert tx.count(AuditEvent, where={"action": "image.erased"}) == 1


def test_a_dataset_version_is_loaded_without_what_was_erased(
    store: Store, add_labelled: Callable[..., None], image_id: Callable[[object], str]
) -> None:
    add_labelled(store, range(20))
    version = build_version(store).version
    report = erase_image(store, image_id(3), actor="key 1")
    assert report.left_in_place == "/none"
    loaded = load_dataset(store, version.id)
    assert (loaded.id, loaded.num_images) == (version.id, 19)
    assert image_id(3) not in set(loaded.rows["image_id"])
    assert build_version(store).version.id != version.id


def test_what_was_never_here_cannot_be_erased(store: Store) -> None:
    with pytest.raises(UnknownIdError, match="no Image has the id"):
        erase_image(store, "0" * 64, actor="key 1")
