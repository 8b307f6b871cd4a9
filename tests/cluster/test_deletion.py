"""`relook retention` and `relook erase`: what they report and delete, decoded pixels included."""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.cli import run
from cluster.deletion import places
from cluster.settings import Settings
from images.cache import PixelCache
from records import audit
from records.frames import Frame
from records.home import FOLDERS
from records.ids import utc_now
from records.keys import patient_hash
from records.store import Store
from records.types import AuditEvent, Consent, Image

Json = Callable[..., dict[str, Any]]


@pytest.fixture
def relook(store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Json:
    """Run a verb on the store's home and return its JSON."""
    monkeypatch.setenv("RELOOK_HOME", str(store.home.root))

    def verb(*arguments: str, code: int = 0) -> dict[str, Any]:
        assert run([*arguments, "--json"]) == code
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return verb


def add_image(store: Store, name: str, **changes: Any) -> str:
    """Add a served image, 100 days old, with its decoded pixels."""
    image = store.blobs.put(name.encode())
    values = {
        "uri": store.blobs.uri(image), "format": "jpeg", "width_px": 8, "height_px": 8, "provenance": "served",
        "created_at": utc_now() - timedelta(days=100), **changes,
    }  # fmt: skip
    with store.ledger.begin() as tx:
        tx.add(Image(id=image, **values))
    PixelCache(store.home.cache, Frame(8)).append([image], np.full((1, 8, 8, 3), 7, dtype=np.uint8))
    return image


def test_retention_reports_deletes_and_reports_again(store: Store, relook: Json) -> None:
    image, days = add_image(store, "a"), ("--set", "records.keep_images_days=30")
    assert relook("retention")["images_before"] is None
    assert relook("retention", "--dry-run", *days)["images"] == 1
    assert store.blobs.has(image)
    done = relook("retention", *days)
    assert (done["dry_run"], done["images"], done["predictions_before"]) == (False, 1, None)
    assert not store.blobs.has(image)
    assert PixelCache(store.home.cache, Frame(8)).missing([image]) == [image]
    assert relook("retention", *days)["images"] == 0
    shorter = (*days, "--set", "records.keep_predictions_days=3")
    assert "at least as long as its image" in relook("retention", *shorter, code=2)["error"]["message"]
    assert audit.verify(store.ledger, store.home) == []


HOLDS_NO_PERSON = {
    "datasets": "hashes, class codes and names of annotators: a version's id is the hash of its rows",
    "keys": "secrets",
    "logs": "ids of requests, images and models; no names and no content of requests",
}


def test_every_folder_of_the_home_has_an_eraser_or_a_reason() -> None:
    """A new folder fails here until it is in the register."""
    named = {name for place in places(Settings()) for name in place.where.split(", ")}
    assert set(FOLDERS) - named == set(HOLDS_NO_PERSON)
    assert len({place.name for place in places(Settings())}) == len(places(Settings()))


def test_consent_is_taken_back_by_a_verb(store: Store, relook: Json) -> None:
    image = add_image(store, "a", consent=Consent.TRAINING)
    assert relook("consent", image, "--to", "review")["consent"] == "review"
    with store.ledger.read() as tx:
        assert tx.require(Image, image).consent is Consent.REVIEW
    relook("consent", image, "--to", "none")
    assert not store.blobs.has(image)
    assert relook("erase", "--list")["images"] == [image]


def test_retention_finishes_what_a_killed_erasure_left(store: Store, relook: Json) -> None:
    image = add_image(store, "a")
    relook("erase", image)
    store.blobs.put(b"a")
    PixelCache(store.home.cache, Frame(8)).append([image], np.full((1, 8, 8, 3), 7, dtype=np.uint8))
    orphan, young = store.blobs.put(b"no row names it"), store.blobs.put(b"nor this one, yet")
    week_ago = (utc_now() - timedelta(days=8)).timestamp()
    os.utime(next(store.home.blobs.rglob(orphan)), (week_ago, week_ago))
    relook("retention")
    assert list(store.blobs.ids()) == [young]
    assert PixelCache(store.home.cache, Frame(8)).missing([image]) == [image]


def test_everything_of_a_person_is_erased(store: Store, relook: Json, tmp_path: Path) -> None:
    hashed = patient_hash(store.home, "P-17")
    theirs = [add_image(store, name, patient_hash=hashed) for name in ("a", "b")]
    file = tmp_path / "c.jpg"
    in_place = add_image(store, "c", patient_hash=hashed, uri=file.as_uri())
    other = add_image(store, "d")
    assert relook("erase", "--patient", "P-17", "--dry-run")["images"] == sorted([*theirs, in_place])
    done = relook("erase", "--patient", "P-17")
    # Three blobs: the image that was imported in place had been sent, too.
    assert (done["blobs"], done["left_in_place"], done["models"]) == (3, [str(file)], [])
    assert not [image for image in (*theirs, in_place) if store.blobs.has(image)]
    assert store.blobs.has(other)
    assert PixelCache(store.home.cache, Frame(8)).missing([*theirs, other]) == theirs
    with store.ledger.read() as tx:
        assert tx.count(AuditEvent, where={"action": "image.erased"}) == 3
    assert "no image of this patient" in relook("erase", "--patient", "P-17", code=2)["error"]["message"]
    assert relook("erase", theirs[0])["images"] == [theirs[0]], "a killed run is finished by id"
    assert "name images" in relook("erase", code=2)["error"]["message"]
    assert "no Image has the id" in relook("erase", "0" * 64, code=2)["error"]["message"]
