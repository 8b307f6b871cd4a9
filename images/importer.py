"""Import a folder of labelled images: HAM10000's official layout, or any folder with a table.

    relook data import DIR [--columns dx=diagnosis,lesion=mole_id] [--in-place]

Output: images in the blob store and the pixel cache, ledger rows written in one transaction at the end, a dataset
version, and an `ImportReport` that lists every row that was left out. Running it again repeats no work, and a run that
was killed is simply run again.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.progress import Progress

from images.cache import PIXELS
from images.dicom_rows import with_tags
from images.grouping import NearPair, grouped_images, known_diagnoses, near_pairs
from images.import_plan import (
    IMPORT_ACTION,
    Entry,
    Plan,
    Reading,
    Refusal,
    Written,
    merge_same_bytes,
    usable_rows,
    without_guesses,
    write_import,
)
from images.intake import Intake
from images.layouts import read_source
from images.pairs import label_pair
from images.source_table import SourceRow, SourceTable, tables_of
from images.unpack import Place, opened
from records.datasets import DatasetVersion, build_version, load_dataset
from records.erasure import BLOBS, run_erasers
from records.errors import ConfigError, DataError
from records.frames import Frame
from records.ids import canonical_json, sha256_hex, utc_now
from records.keys import patient_hash
from records.store import Store
from records.taxonomy import Taxonomy
from records.types import AuditEvent, Consent, DatasetRecord, Image, Quarantined, SourceLabel

_SHOWN_LABELS = 5
WITHHELD_COLUMNS = ["image_id", "source_id", "group_id", "label"]


@dataclass(frozen=True)
class ImportReport:
    """Result of an import.

    Args:
        import_id: hash of the table's content; the same table has the same id.
        dataset_id: the version that was built; empty as long as no image has a label.
        images: images of the table that can be used.
        lesions: lesions among them; an image without a lesion counts as one.
        new_images: images that the ledger did not know.
        decoded: images that were decoded now.
        unlabelled: images without a label.
        classes: class code to number of images, including withheld ones.
        splits: split to number of images, including withheld ones.
        quarantined: rows that could not be used, each with its reason.
        near_duplicates: pairs that were found now; those of different diagnoses were not joined.
        same_bytes: (name, name of the first) of files that are the same image, byte for byte.
        withheld: labels of the withheld images, columns image_id, source_id, group_id, label.
        notes: sentences about values that were left out.
        layout: one sentence: which layout the folder was taken for, and why.
        unlisted: images of the folder that no row uses, and folders and links that cannot be read.
        seconds: duration.
    """

    import_id: str
    dataset_id: str
    images: int
    lesions: int
    new_images: int
    decoded: int
    unlabelled: int
    classes: dict[str, int]
    splits: dict[str, int]
    quarantined: list[Quarantined] = field(repr=False)
    near_duplicates: list[NearPair] = field(repr=False)
    same_bytes: list[tuple[str, str]] = field(repr=False)
    withheld: pd.DataFrame = field(repr=False)
    notes: list[str]
    layout: str
    unlisted: list[str] = field(repr=False)
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values, with only the number of withheld images, never their labels."""
        return {
            **self.__dict__,
            "quarantined": [q.model_dump(include={"source_id", "code", "reason"}) for q in self.quarantined],
            "near_duplicates": [pair.__dict__ for pair in self.near_duplicates],
            "withheld": len(self.withheld),
            "seconds": round(self.seconds, 2),
        }


def import_folder(
    store: Store,
    folder: Path,
    *,
    columns: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    table: Path | None = None,
    layout: str | None = None,
    in_place: bool = False,
    correct: bool = False,
    withhold_share: float = 0.0,
    frames: Sequence[Frame] = (),
    consent: Consent = Consent.TRAINING,
    to_train: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Import a folder of images with a table, and build the dataset version that follows.

    Args:
        store: gets the images and records.
        folder: images in any depth, and a table; or an archive of such a folder.
        columns: names of the table's columns where they differ from `source_table.COLUMNS`.
        labels: texts of the table to classes, where they are neither code, name nor alias of a class.
        table: the table, if it is not the only one.
        layout: one of `images.layouts.LAYOUTS`; None recognises it.
        in_place: True leaves the files where they are and stores only their path and hash.
        correct: True takes over labels that differ from stored ones of equal or higher rank, as further rows.
        withhold_share: share of the train-split groups of each class whose labels are kept out of the ledger, 0 to
            below 1; the same ones at every run.
        frames: for which the images are decoded into the cache at once.
        consent: what the people in the images agreed to.
        to_train: True puts every lesion that has no split yet into train.
        progress: gets a bar.
    Returns:
        The report.
    Raises:
        DataError: no folder, table, column or images, or no row can be used.
        ConfigError: `withhold_share` is out of range.
        TaxonomyError: the store has labels of another taxonomy, or `labels` names a class that there is not.
    """
    _require_arguments(store, labels or {}, withhold_share)
    with opened(folder, store.home.cache) as place:
        source = place.named(read_source(place.folder, columns, table, layout))
        if in_place:
            _require_files(source, place)
        reading = Reading(sha256_hex(source.content), dict(columns or {}), layout, source.layout, source.licences)
        return import_source(
            store,
            source,
            reading,
            labels=labels,
            in_place=in_place,
            correct=correct,
            withhold_share=withhold_share,
            frames=frames,
            consent=consent,
            to_train=to_train,
            progress=progress,
        )


def import_source(
    store: Store,
    source: SourceTable,
    reading: Reading,
    *,
    labels: Mapping[str, str] | None = None,
    in_place: bool = False,
    correct: bool = False,
    withhold_share: float = 0.0,
    frames: Sequence[Frame] = (),
    consent: Consent = Consent.TRAINING,
    to_train: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Import rows that were read, wherever they came from, and build the dataset version that follows.

    Args:
        store: as for `import_folder`, like all that is not named here.
        source: the rows.
        reading: how they were read, for the audit chain.
        labels: see `import_folder`.
        in_place: see `import_folder`.
        correct: see `import_folder`.
        withhold_share: see `import_folder`.
        frames: see `import_folder`.
        consent: see `import_folder`.
        to_train: see `import_folder`.
        progress: see `import_folder`.
    Returns:
        The report.
    Raises:
        DataError: no row can be used.
    """
    started = time.monotonic()
    # Rows that the table alone rules out are refused before any image is read, since reading is the slow part.
    labelled, of_folders = without_guesses(source, store.taxonomy, labels)
    rows, refusals, notes = usable_rows(labelled, store.taxonomy, labels)
    entries, unreadable = _take_in(store, rows, frames, in_place, progress)
    entries, of_tags = with_tags(store.home, entries)
    notes = [*of_folders, *notes, *of_tags, *_unknown_labels(labelled, refusals, store.taxonomy)]
    entries, same_bytes, conflicting = merge_same_bytes(entries)
    refusals += [*unreadable, *conflicting]
    plan = _plan(store, source, entries, refusals, reading, consent, withhold_share, correct, progress)
    plan = replace(plan, to_train=to_train)
    # Decoding took minutes and ran without a transaction; only this short part holds up other writers.
    with store.ledger.begin() as tx:
        written = write_import(tx, plan)
    # They were stored and decoded before an erasure that ran meanwhile.
    if written.erased:
        run_erasers(store, written.erased, (BLOBS, PIXELS))
    dataset_id, left_out = _build(store)
    notes = [*source.notes, *notes, *written.notes, *left_out, *_of_export(source, dataset_id), *_passed_over(source)]
    return _report(plan, written, dataset_id, same_bytes, notes, source, started)


def _unknown_labels(rows: Sequence[SourceRow], refusals: Sequence[Refusal], taxonomy: Taxonomy) -> list[str]:
    """Return a sentence that says which labels are no class, and how they are read as one."""
    unknown = {refusal.source_id for refusal in refusals if refusal.code == "unknown_class"}
    counts = Counter(row.label for row in rows if row.source_id in unknown and row.label is not None)
    if not counts:
        return []
    most = [f"{text!r} ({count})" for text, count in counts.most_common(_SHOWN_LABELS)]
    more = ", ..." if len(counts) > len(most) else ""
    example = label_pair(counts.most_common(1)[0][0], taxonomy.codes[0])
    return [f"labels that are no class: {', '.join(most)}{more}; --labels reads them as one, for example '{example}'"]


def _require_arguments(store: Store, labels: Mapping[str, str], withhold_share: float) -> None:
    for code in labels.values():
        store.taxonomy.index_of(code)
    if not 0.0 <= withhold_share < 1.0:
        raise ConfigError(f"withhold_share is {withhold_share}; it must be from 0 to below 1")


def _plan(
    store: Store,
    source: SourceTable,
    entries: Sequence[Entry],
    refusals: Sequence[Refusal],
    reading: Reading,
    consent: Consent,
    withhold_share: float,
    correct: bool,
    progress: Progress | None,
) -> Plan:
    if not entries:
        raise _nothing_usable(source, refusals)
    import_id = import_id_of(source, reading.columns)
    images = [_image(store, entry, import_id, consent) for entry in entries]
    pairs = _pairs(store, entries, images, progress)
    salt = store.settings.split_salt
    return Plan(import_id, entries, images, pairs, refusals, withhold_share, salt, store.taxonomy, reading, correct)


def _require_files(source: SourceTable, place: Place) -> None:
    if place.archive is not None or any(row.path is not None and not isinstance(row.path, Path) for row in source.rows):
        raise DataError(f"images in {source.path} are inside archives, which --in-place cannot name; leave it out")


def _of_export(source: SourceTable, dataset_id: str) -> list[str]:
    """Return a sentence if an export did not lead to the dataset version that it holds."""
    if source.exported_id in (None, dataset_id):
        return []
    return [
        f"the export holds dataset version {str(source.exported_id)[:12]}, and this home has {dataset_id[:12]} now: it "
        "has other images or labels, too, or another taxonomy than the export's taxonomy.yaml"
    ]


def _nothing_usable(source: SourceTable, refusals: Sequence[Refusal]) -> DataError:
    # The home was set up for other classes than the images have.
    is_other = all(refusal.code == "unknown_class" for refusal in refusals)
    hint = "; `relook taxonomy from DIR` proposes one of these classes" if is_other else ""
    return DataError(
        f"none of the {len(source.rows)} rows of {source.path} can be used; first: {refusals[0].reason}{hint}"
    )


def open_dataset(store: Store, data: str | None, *, progress: Progress | None = None) -> DatasetVersion:
    """Return the dataset that `--data` names, importing a folder if it has not been imported yet.

    Args:
        store: holds the datasets.
        data: a folder, a dataset id of 8 or more characters, or None for the newest version.
        progress: shows an import.
    Returns:
        The dataset version; for a folder, the version of everything known then.
    Raises:
        DataError: there is no data yet, or the folder cannot be imported.
        UnknownIdError: no dataset has that id.
    """
    if data is None:
        with store.ledger.read() as tx:
            newest = tx.find(DatasetRecord, order_by=("-created_at",), limit=1)
        if not newest:
            raise DataError("there is no data yet; give a folder or a dataset id with --data")
        return load_dataset(store, newest[0].id)
    folder = Path(data)
    if not folder.exists():
        if "/" in data or folder.suffix:
            raise DataError(f"there is no data folder {data}; give a folder, or the id of a dataset version")
        return load_dataset(store, data)
    with opened(folder, store.home.cache) as place:
        return _open_folder(store, place.folder, progress)


def _open_folder(store: Store, folder: Path, progress: Progress | None) -> DatasetVersion:
    table, columns, layout = _known_reading(store, folder)
    if _is_imported(store, import_id_of(read_source(folder, columns, table, layout), columns)):
        # A version of everything known now: annotations or other folders may have been added since the import.
        return build_version(store).version
    report = import_folder(store, folder, columns=columns, table=table, layout=layout, progress=progress)
    return load_dataset(store, report.dataset_id)


def _known_reading(store: Store, folder: Path) -> tuple[Path | None, dict[str, str] | None, str | None]:
    """Return table, columns and `--layout` of the folder's last import; None for each in a new folder."""
    # A folder is recognized by the hash of a table in it, so it may be moved, and `--columns` is needed only once.
    tables = {sha256_hex(path.read_bytes()): path for path in tables_of(folder)}
    with store.ledger.read() as tx:
        imports = tx.find(AuditEvent, where={"action": IMPORT_ACTION}, order_by=("-number",))
    for event in imports:
        path = tables.get(event.details.get("table", ""))
        if path is not None:
            return path, event.details["columns"] or None, event.details.get("layout")
    # Without a table at the top, what was read is compared with what the same layout reads now.
    known = {event.details.get("table") for event in imports}
    for layout in dict.fromkeys(event.details.get("layout") for event in imports):
        with suppress(DataError):
            if layout is not None and sha256_hex(read_source(folder, layout=layout).content) in known:
                return None, None, layout
    return None, None, None


def import_id_of(source: SourceTable, columns: Mapping[str, str] | None) -> str:
    """Return the id of an import, 16 hex characters: equal tables with equal columns have equal ids."""
    return sha256_hex(sha256_hex(source.content).encode() + canonical_json(dict(columns or {})).encode())[:16]


def _is_imported(store: Store, import_id: str) -> bool:
    """Return whether an import ended with every row used and every label recorded."""
    with store.ledger.read() as tx:
        done = tx.find(
            AuditEvent, where={"action": IMPORT_ACTION, "subject": import_id}, order_by=("-number",), limit=1
        )
    # Refused rows may have been repaired since, and withheld labels may be wanted now: such an import is repeated.
    return bool(done) and not done[0].details["quarantined"] and not done[0].details["withheld"]


def _take_in(
    store: Store, rows: Sequence[SourceRow], frames: Sequence[Frame], in_place: bool, progress: Progress | None
) -> tuple[list[Entry], list[Refusal]]:
    with store.ledger.read() as tx:
        known = tx.find(Image)
    intake = Intake(
        store,
        frames,
        in_place=in_place,
        known_hashes={i.id: i.perceptual_hash for i in known if i.perceptual_hash is not None},
        erased=frozenset(i.id for i in known if i.is_erased_for_good),
    )
    entries, refusals = [], []
    paths = [row.path for row in rows if row.path is not None]
    for row, taken in zip(rows, intake.run(paths, progress), strict=True):
        if taken.refusal is None:
            entries.append(Entry(row, taken))
        else:
            refusals.append(Refusal(row.source_id, taken.code, f"{row.source_id}: {taken.refusal}"))
    return entries, refusals


def _image(store: Store, entry: Entry, import_id: str, consent: Consent) -> Image:
    context, taken = entry.row.context, entry.taken
    return Image(
        id=taken.image_id,
        source_id=entry.row.source_id,
        uri=taken.uri,
        format=taken.format,
        width_px=taken.width_px,
        height_px=taken.height_px,
        lesion_id=context["lesion_id"],
        patient_hash=patient_hash(store.home, context["patient_id"]) if context["patient_id"] else None,
        age_years=entry.row.age_years,
        sex=context["sex"],
        localization=context["localization"],
        device=context["device"],
        site=context["site"],
        acquired_at=entry.row.acquired_at,
        provenance=f"import:{import_id}",
        consent=entry.row.consent or consent,
        perceptual_hash=taken.perceptual_hash,
        created_at=utc_now(),
    )


def _pairs(
    store: Store, entries: Sequence[Entry], images: Sequence[Image], progress: Progress | None
) -> list[NearPair]:
    """Compare the images without a group with each other and with those that have one."""
    # Pairs of grouped images were compared when the later one of them was imported.
    grouped = grouped_images(store)
    placed = {image.id for image in grouped}
    newcomers = list({image.id: image for image in images if image.id not in placed}.values())
    if not newcomers:
        return []
    diagnoses = known_diagnoses(store)
    diagnoses.update({entry.image_id: entry.row.label for entry in entries if entry.row.label is not None})
    found = near_pairs(store, newcomers, diagnoses, beside=grouped, progress=progress)
    # The groups of an export were made of such pairs, and of diagnoses that are not in it.
    stated = {entry.image_id for entry in entries if entry.row.group is not None}
    return [pair for pair in found if not {pair.first, pair.second} <= stated]


def _build(store: Store) -> tuple[str, list[str]]:
    """Build the version of everything imported; return its id and notes about what was left out."""
    with store.ledger.read() as tx:
        if not tx.count(SourceLabel):
            return "", ["no image has a label yet, so no dataset version was built"]
    try:
        built = build_version(store)
    except DataError as error:
        # What was imported is stored: an import that was written does not fail.
        return "", [f"no dataset version was built, because {error}"]
    notes = []
    if built.without_consent:
        notes.append(f"{len(built.without_consent)} labelled images lack the consent to train on them")
    if len(classes := built.version.rows["label"].unique()) == 1:
        count = len(built.version.rows)
        notes.append(
            f"all {count} labelled images are of the one class {classes[0]}, which leaves nothing to tell apart: a "
            "classifier needs images of two classes"
        )
    if empty := built.version.empty_splits:
        names = ", ".join(empty)
        notes.append(
            f"no labelled image is on the splits {names}, which training and its checks need: import more lesions, "
            "then `relook data split --redraw` (possible until something was trained)"
        )
    return built.version.id, notes


def _passed_over(source: SourceTable) -> list[str]:
    """Return a sentence about the files that no row uses, if there are any."""
    if not source.unlisted:
        return []
    first = ", ".join(source.unlisted[:3])
    return [f"{len(source.unlisted)} images or folders of the folder are in no row and were not imported: {first}"]


def _report(
    plan: Plan,
    written: Written,
    dataset_id: str,
    same_bytes: list[tuple[str, str]],
    notes: list[str],
    source: SourceTable,
    started: float,
) -> ImportReport:
    # Reversed, so that the first row about an image counts; images without a group joined two splits and do not.
    by_image = {entry.image_id: entry for entry in reversed(plan.entries) if entry.image_id in written.group_of}
    split_of = {i: written.split_of.get(group_id) for i, group_id in written.group_of.items()}
    withheld = [(e.image_id, e.row.source_id, written.group_of[e.image_id], e.row.label) for e in written.withheld]
    stored = {e.image_id: e.row.label for e in written.withheld if e.row.label} | dict(written.stored)
    unlabelled = [entry.row.source_id for image_id, entry in reversed(by_image.items()) if image_id not in stored]
    if unlabelled:
        first = ", ".join(unlabelled[:5]) + (", ..." if len(unlabelled) > 5 else "")
        notes = [*notes, f"{len(unlabelled)} images have no label: {first}"]
    return ImportReport(
        import_id=plan.import_id,
        dataset_id=dataset_id,
        images=len(by_image),
        lesions=len({entry.row.context["lesion_id"] or image_id for image_id, entry in by_image.items()}),
        new_images=written.new_images,
        decoded=sum(entry.taken.decoded for entry in plan.entries),
        unlabelled=len(unlabelled),
        classes=dict(sorted(Counter(stored[image_id] for image_id in by_image if image_id in stored).items())),
        splits=dict(sorted(Counter(split.value for split in split_of.values() if split is not None).items())),
        quarantined=written.quarantined,
        near_duplicates=list(plan.pairs),
        same_bytes=same_bytes,
        withheld=pd.DataFrame(withheld, columns=WITHHELD_COLUMNS),
        notes=notes,
        layout=source.layout,
        unlisted=source.unlisted,
        seconds=time.monotonic() - started,
    )
