"""Permanent deletion in all rooms: by retention period, and on a person's request.

`records` decides what may be deleted; this module adds the places of the other rooms that hold images.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.settings import Settings
from images.cache import PIXELS, blank_pixels
from labeling.deletion import tasks_place
from records import audit
from records.blobs import open_blobs
from records.consent import lower_consent
from records.datasets import find_in_manifest
from records.durable import replacing
from records.erasure import (
    RECORDS_PLACES,
    Erasure,
    Place,
    blank_last,
    bury,
    delete_quarantined,
    erase_images,
    erased_ids,
    note_in_backups,
    run_erasers,
)
from records.errors import DataError
from records.home import Home
from records.keys import patient_hash
from records.ledger import open_ledger
from records.retention import Retention, apply_retention, remove_unnamed_blobs
from records.store import Store, database_url
from records.types import Consent, DatasetRecord, Image, ModelRecord
from records.types.base import LINE
from serving.erasure import serving_places

ACTOR = "relook erase"


def places(settings: Settings) -> tuple[Place, ...]:
    """Return every place that holds images or words about the people in them."""
    return (*serving_places(settings.serving), DEMO, tasks_place(settings.labeling))


def retain(store: Store, settings: Settings, advance: Callable[[int, int], None]) -> Retention:
    """Delete served images and predictions whose retention period has ended; `advance` gets (done, total).

    First it finishes erasures: of runs that were killed, and of images that another node erased. RefusedError if
    another deletion is running, IntegrityError if the manifest of a dataset version is missing (nothing was deleted),
    UnavailableError if a place cannot be reached (run it again).
    """
    with store.ledger.read() as tx:
        gone = erased_ids(tx)
    remove_unnamed_blobs(store)
    # Without the ledger's file: rewriting it costs much, and rows are erased in one transaction or not at all.
    run_erasers(store, gone, [place for place in places(settings) if place.where != "ledger.db"])
    forget = partial(blank_pixels, store.home.cache)
    return apply_retention(store, actor="relook retention", forget=forget, advance=advance)


def images_to_erase(
    store: Store, image_ids: Sequence[str], patient_id: str | None, names: Sequence[str] = ()
) -> list[str]:
    """Return the sorted ids of the images that a person's request is about.

    Args:
        store: with the images.
        image_ids: full ids; whether there are such images is checked when they are erased.
        patient_id: adds all images of this patient; named as in imports and requests.
        names: adds the images that were imported under these names.
    Returns:
        Ids, also of erased images: erasing them again finishes what a killed run left.
    Raises:
        DataError: no image is named, or none of this patient exists.
    """
    found = set(image_ids)
    # The ledger holds no patient ids, only their keyed hash.
    if patient_id is not None:
        with store.ledger.read() as tx:
            theirs = tx.find(Image, where={"patient_hash": patient_hash(store.home, LINE.keep(patient_id))})
        if not theirs:
            raise DataError("no image of this patient is here; name images by their ids if it came without one")
        found |= {image.id for image in theirs}
    with store.ledger.read() as tx:
        found |= {image.id for image in tx.find(Image, where={"source_id": list(names)})}
    # A name without an image may still be that of a quarantined row.
    if not found and not names:
        raise DataError("name images by their whole ids, or a patient with --patient")
    return sorted(found)


def erase(
    store: Store,
    settings: Settings,
    image_ids: Sequence[str],
    advance: Callable[[int], None],
    names: Sequence[str] = (),
) -> Erasure:
    """Erase images on a person's request, and the quarantined rows of these names.

    `advance` gets the number of images whose rows are erased.
    UnknownIdError if nothing here has one of the ids, UnavailableError if a place cannot be reached; run it again.
    """
    # Rows of images that were never stored: nothing but their name says whose they are.
    with store.ledger.begin() as tx:
        if rows := delete_quarantined(tx, names):
            # Before the commit: a run that is killed in between finds the rows again.
            note_in_backups(store, rows)
            details = {"rows": len(rows)}
            audit.append(tx, actor=ACTOR, action="quarantine.erased", subject="rows by name", details=details)
    return erase_images(store, image_ids, actor=ACTOR, places=places(settings), advance=advance)


def take_back_consent(store: Store, settings: Settings, image_ids: Sequence[str], consent: Consent) -> Erasure | None:
    """Lower the consent of images; `none` erases them, and what was removed is returned.

    UnknownIdError if there is no such image, RefusedError if one has a lower consent.
    """
    if consent is Consent.NONE:
        return erase(store, settings, image_ids, lambda done: None)
    for image_id in image_ids:
        lower_consent(store, image_id, consent, actor="relook consent")
    return None


def models_trained_on(store: Store, image_ids: Collection[str]) -> list[str]:
    """Return the ids of registered models whose dataset version holds one of the images."""
    with store.ledger.read() as tx:
        datasets, models = tx.find(DatasetRecord), tx.find(ModelRecord)
    holds = {d.id for d in datasets if any(find_in_manifest(store, d.id, image_id) for image_id in image_ids)}
    return sorted(model.id for model in models if model.dataset_id in holds)


def sentence(found: Retention, *, dry_run: bool) -> str:
    """Describe what was deleted, or with `dry_run` would be."""
    if found.images_before is None and found.predictions_before is None:
        return "everything is kept; records.keep_images_days and records.keep_predictions_days say for how long"
    lines, gone = [], "would be deleted" if dry_run else "deleted"
    if found.images_before is not None:
        lines.append(
            f"images last sent before {found.images_before:%Y-%m-%d %H:%M}: {found.images} with "
            f"{found.overlays} heat maps {gone}, {found.images_needed} needed and kept"
        )
    if found.predictions_before is not None:
        lines.append(
            f"predictions made before {found.predictions_before:%Y-%m-%d %H:%M}: {found.predictions} "
            f"{gone}, {found.predictions_needed} needed and kept"
        )
    return "\n".join(lines)


def _erase_demo(store: Store, image_ids: Collection[str]) -> int:
    """Remove images from the truth of a demo, and from homes of earlier demos, which it moved aside."""
    changed = _remove_rows(store.home.demo / "truth.parquet", image_ids)
    for folder in sorted((store.home.demo / "earlier").glob("*/ledger.db")):
        changed += _erase_earlier(store, folder.parent, image_ids)
    return changed


def _erase_earlier(store: Store, folder: Path, image_ids: Collection[str]) -> int:
    settings, taxonomy = store.settings, store.taxonomy
    home = Home(folder)
    own = settings.model_copy(update={"home": folder, "database": None, "blobs": None})
    # Not `open_store`: the keys of its audit chain stayed with the home that it was moved out of.
    with closing(open_ledger(database_url(own, home))) as ledger:
        earlier = Store(own, home, taxonomy, ledger, open_blobs(str(home.blobs)))
        with ledger.begin() as tx:
            known = [image_id for image_id in image_ids if tx.get(Image, image_id) is not None]
            for image_id in known:
                bury(tx, image_id, earlier.blobs.uri(image_id))
        if known:
            run_erasers(earlier, known, (*RECORDS_PLACES, PIXELS))
            with ledger.begin() as tx:
                blank_last(tx, known)
    # An earlier demo keeps its files flat: what was its folder `demo` lies beside its ledger.
    return _remove_rows(folder / "truth.parquet", image_ids) + len(known)


def _remove_rows(path: Path, image_ids: Collection[str]) -> int:
    if not path.is_file():
        return 0
    rows = pq.read_table(path)
    kept = rows.filter(pc.invert(pc.field("image_id").isin(list(image_ids))))
    if kept.num_rows < rows.num_rows:
        with replacing(path) as temporary:
            pq.write_table(kept, temporary)
    return int(rows.num_rows - kept.num_rows)


DEMO = Place("demo", "demo", "names and classes of withheld images, and homes of earlier demos", _erase_demo)
