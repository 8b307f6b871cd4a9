"""Dataset versions: immutable parquet manifests of images with their groups, splits and labels.

A version's id is the hash of what training sees (image, group, split, label, rank), so equal inputs give equal ids on
every machine. Labels of images that were selected for doubt, flags or outcomes are used on the train split only. A
group keeps the split that it has.
"""

import hashlib
import json
import shutil
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import sqlalchemy as sa
from pyarrow import csv

from records import audit
from records.changes import MOST, Claim, claim, forget, settle
from records.durable import make_folders, replacing, write_file
from records.erasure import unusable_ids
from records.errors import IntegrityError, RefusedError, UnknownIdError
from records.ids import new_id
from records.labelled import Known, annotations, by_image, draw_splits, known_of, read_rows, with_new_splits
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.schemas import from_arrow, to_arrow
from records.store import Store
from records.types import (
    TRAINABLE,
    DatasetChange,
    DatasetRecord,
    Group,
    ManifestRow,
    ModelRecord,
    ResolvedLabel,
    RoundRecord,
    Split,
)

HASHED_COLUMNS = ["image_id", "group_id", "split", "label", "label_rank"]
MANIFEST = "manifest.parquet"
_ROWS_AT_ONCE = 50_000
_MOST_EXAMINED = 3 * MOST  # images of a version that is made from its parent; beyond, reading everything is as fast
_ROWS_OF_A_GROUP = 10_000  # per parquet row group; rows are sorted by image, so a lookup reads one row group


@dataclass(frozen=True)
class DatasetVersion:
    """A dataset version in memory; two are equal if their ids are.

    Args:
        id: content hash, 64 hex characters.
        taxonomy_hash: hash of the taxonomy that its labels belong to.
        rows: one row per labelled image, columns of ManifestRow, sorted by image id.
    """

    id: str
    taxonomy_hash: str
    rows: pd.DataFrame = field(repr=False, compare=False)

    @property
    def empty_splits(self) -> tuple[Split, ...]:
        """Splits without an image."""
        return tuple(split for split in Split if split not in set(self.rows["split"]))

    def split(self, split: Split) -> pd.DataFrame:
        """Return the rows of one split, sorted by image id, with a fresh index."""
        return self.rows[self.rows["split"] == split.value].reset_index(drop=True)

    @property
    def num_images(self) -> int:
        """Number of labelled images."""
        return len(self.rows)

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return int(self.rows["group_id"].nunique())


@dataclass(frozen=True)
class BuildReport:
    """A version that was built, and what was left out of it.

    Args:
        version: the version.
        new_labels: images whose strongest label came from an annotator.
        held_out: the `new_labels` that are on a split other than train. Of these, only labels from the audit sample
            are in the version; any other image keeps its earlier label, if it has one.
        outranked: images whose annotator label is not in the version because a label that is at least as strong
            contradicts it; each needs adjudication.
        without_consent: labelled images whose consent does not cover training.
        ungrouped: labelled images that are in no group yet.
    """

    version: DatasetVersion
    new_labels: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    outranked: tuple[str, ...] = ()
    without_consent: tuple[str, ...] = ()
    ungrouped: tuple[str, ...] = ()


def build_version(
    store: Store, *, resolved: Sequence[ResolvedLabel] = (), round_number: int = 0, parent_id: str | None = None
) -> BuildReport:
    """Build a dataset version from all labels in the ledger and `resolved`, and write it if it is new.

    Args:
        store: its ledger holds the imported images and labels.
        resolved: consensus of the annotations.
        round_number: the round that builds it; 0 for an import.
        parent_id: the previous version; labels that it already has keep the round that added them.
    Returns:
        The version and what was left out. Equal labels, groups and splits give an equal id, which is written once.
    Raises:
        DataError: no image has a usable label.
        TaxonomyError: a label is not a class of the store's taxonomy.
        IntegrityError: an image is in a group that the ledger does not know.
    """
    annotators = annotations(resolved, round_number)
    with store.ledger.begin() as tx:
        claimed = claim(tx)
    made = _from_base(store, claimed, annotators, parent_id) or _from_all(store, annotators, parent_id)
    known = made.known
    no_consent = ~known.images["consent"].isin([consent.value for consent in TRAINABLE])
    without_consent = tuple(sorted(known.images.loc[no_consent, "image_id"]))
    ungrouped = tuple(sorted(known.images.loc[known.images["group_id"].isna() & ~no_consent, "image_id"]))
    version = _write(
        store, made, round_number, parent_id, lambda tx: settle(tx, claimed, made.id, [*without_consent, *ungrouped])
    )
    is_new = known.strongest["label_source"].str.startswith("annotator:")
    is_held_out = is_new & (known.strongest["split"].fillna(Split.TRAIN.value) != Split.TRAIN.value)
    return BuildReport(
        version=version,
        new_labels=tuple(known.strongest.loc[is_new, "image_id"]),
        held_out=tuple(known.strongest.loc[is_held_out, "image_id"]),
        outranked=_outranked(annotators, known.strongest),
        without_consent=without_consent,
        ungrouped=ungrouped,
    )


def redraw_splits(store: Store) -> BuildReport:
    """Draw the splits of all labelled groups again, as at a first import, and build the version that follows.

    Versions with the earlier splits are removed: a model that was trained on one of them could be measured on images
    that it has seen.

    Args:
        store: its ledger holds the labels and groups.
    Returns:
        As of `build_version`.
    Raises:
        RefusedError: something was trained or searched on these splits, or a table gave them.
        DataError: no image has a usable label.
    """
    groups = TABLES[Group]
    with store.ledger.begin() as tx:
        # Runs are local, models and rounds may be those of other machines.
        if any(store.home.runs.iterdir()) or tx.count(ModelRecord) or tx.count(RoundRecord):
            raise RefusedError(
                "splits cannot be drawn again after a training or a search, whose models would be measured on images "
                "that they have seen; import into a new home (RELOOK_HOME)"
            )
        if tx.count(Group, where={"drawn_by": "given"}):
            raise RefusedError(
                "a table gave these splits, so they are not drawn again; import it without its split column into a new "
                "home (RELOOK_HOME)"
            )
        tx.connection.execute(
            sa.update(groups).where(groups.c.split.is_not(None)).values(split=None, drawn_by=None, drawn_at=None)
        )
        removed = [record.id for record in tx.find(DatasetRecord)]
        tx.connection.execute(sa.delete(TABLES[DatasetRecord]))
        forget(tx)
        audit.append(tx, actor="local", action="data.redrawn", subject="splits", details={"removed": removed})
    for dataset_id in removed:
        shutil.rmtree(store.home.datasets / dataset_id, ignore_errors=True)
    return build_version(store)


def load_dataset(store: Store, dataset_id: str) -> DatasetVersion:
    """Load a version by its id or a prefix of at least 8 characters, without images that were erased, or
    whose consent was lowered, since.

    Raises UnknownIdError if no version or more than one has this id or prefix, and IntegrityError if the manifest is
    missing, cannot be read or does not match its id.
    """
    with store.ledger.read() as tx:
        found = [r for r in tx.find(DatasetRecord) if len(dataset_id) >= 8 and r.id.startswith(dataset_id)]
        gone = unusable_ids(tx)
    if len(found) != 1:
        problem = "no dataset version has" if not found else f"{len(found)} dataset versions share"
        raise UnknownIdError(
            f"{problem} the id {dataset_id!r}; `relook data versions` lists them (8 characters are enough)"
        )
    record = found[0]
    rows = read_manifest(store, record.id).to_pandas()
    if content_id(rows, record.taxonomy_hash) != record.id:
        raise IntegrityError(f"the manifest of dataset version {record.id[:12]} was altered; restore it from a backup")
    # These images are dropped after the check, because the id is the hash of all rows, theirs included.
    if gone:
        rows = rows[~rows["image_id"].isin(list(gone))].reset_index(drop=True)
    return DatasetVersion(record.id, record.taxonomy_hash, rows)


def read_manifest(store: Store, dataset_id: str, *, filters: pc.Expression | None = None) -> pa.Table:
    """Read the manifest of a version, or the rows that `filters` selects, without checking it against its id.

    Rows are in the schema of ManifestRow, sorted by image id. Raises IntegrityError if the file is missing or is not a
    manifest.
    """
    with _reading(dataset_id):
        table = pq.read_table(store.home.datasets / dataset_id / MANIFEST, filters=filters)
    _require_columns(table.schema.names, dataset_id)
    return table


def find_in_manifest(store: Store, dataset_id: str, image_id: str) -> ManifestRow | None:
    """Return the row of one image in a version, None if the version does not have it.

    Only the row group that can hold it is read. Raises IntegrityError if the file is missing or is not a manifest.
    """
    with _reading(dataset_id), pq.ParquetFile(store.home.datasets / dataset_id / MANIFEST) as file:
        _require_columns(file.schema_arrow.names, dataset_id)
        groups = [file.metadata.row_group(group).column(0).statistics for group in range(file.num_row_groups)]
        # Rows are sorted by image id, so at most one row group can hold it: the first whose largest id is not smaller.
        group = bisect_left(groups, image_id, key=lambda statistics: str(statistics.max))
        if group == len(groups) or image_id < str(groups[group].min):
            return None
        rows = file.read_row_group(group)
    at = pc.index(rows["image_id"], image_id).as_py()
    return None if at < 0 else from_arrow(ManifestRow, rows.slice(at, 1))[0]


@contextmanager
def _reading(dataset_id: str) -> Generator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise IntegrityError(
            f"the manifest of dataset version {dataset_id[:12]} is missing; restore it from a backup"
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise IntegrityError(
            f"the manifest of dataset version {dataset_id[:12]} cannot be read; restore it from a backup"
        ) from error


def _require_columns(names: Sequence[str], dataset_id: str) -> None:
    if list(names) != list(ManifestRow.model_fields):
        raise IntegrityError(f"the manifest of dataset version {dataset_id[:12]} was altered; restore it from a backup")


def content_id(rows: pd.DataFrame, taxonomy_hash: str) -> str:
    """Return the id of a manifest: the SHA-256 of what training sees, as 64 hex characters.

    `rows` has at least the columns image, group, split, label and rank, sorted by image id. Who labelled an image and
    when is not part of the id.
    """
    digest = _digest(taxonomy_hash)
    # Hashed in parts, so that the text of a million rows is never in memory at once; the result is the same.
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[HASHED_COLUMNS].iloc[start : start + _ROWS_AT_ONCE]
        digest.update(_csv(pa.Table.from_pandas(part, preserve_index=False)))
    return digest.hexdigest()


def _digest(taxonomy_hash: str) -> "hashlib._Hash":
    return hashlib.sha256(f"{taxonomy_hash}\n{','.join(HASHED_COLUMNS)}\n".encode())


def _csv(part: pa.Table) -> pa.Buffer | bytes:
    """Return rows as CSV, in which only a text with a separator, a quote or a line break is quoted."""
    part = part.select(HASHED_COLUMNS)
    try:
        # Ten times as fast as pandas, with the same result; it refuses what needs quotes.
        plain = csv.WriteOptions(include_header=False, quoting_style="none")
        csv.write_csv(part, text := pa.BufferOutputStream(), plain)
        return text.getvalue()
    except pa.ArrowInvalid:
        return part.to_pandas().to_csv(index=False, header=False, lineterminator="\n").encode()


@dataclass(frozen=True)
class _Made:
    """A version before it is written.

    Args:
        id: of its rows.
        table: all rows.
        known: what was examined for it.
        compared: rows of its parent and its own, which hold everything in which the two differ; None: no parent.
    """

    id: str
    table: pa.Table
    known: Known
    compared: tuple[pa.Table, pa.Table] | None


def _from_all(store: Store, annotators: pd.DataFrame, parent_id: str | None) -> _Made:
    """Make a version of everything in the ledger."""
    known = _known(store, annotators, None)
    before = None if parent_id is None else read_manifest(store, parent_id)
    table = _table(_keep_rounds(known.rows, before))
    digest = _digest(store.taxonomy.hash)
    for start in range(0, len(table), _ROWS_AT_ONCE):
        digest.update(_csv(table.slice(start, _ROWS_AT_ONCE)))
    return _Made(digest.hexdigest(), table, known, None if before is None else (before, table))


def _from_base(store: Store, claimed: Claim, annotators: pd.DataFrame, parent_id: str | None) -> _Made | None:
    """Make a version of its parent and what changed since; None if that is not known, or very much."""
    if parent_id is None or claimed.base != parent_id or claimed.images is None:
        return None
    with store.ledger.read() as tx:
        parent = tx.get(DatasetRecord, parent_id)
    if parent is None or parent.taxonomy_hash != store.taxonomy.hash:
        return None
    before = read_manifest(store, parent_id)
    # Annotations come from outside, so every image that has or had one is examined.
    had = before.filter(pc.starts_with(before["label_source"], "annotator:"))["image_id"]
    examined = {*claimed.images, *annotators["image_id"], *had.to_pylist()}
    if len(examined) > _MOST_EXAMINED:
        return None
    known = _known(store, annotators, examined)
    old = before.filter(pc.is_in(before["image_id"], value_set=pa.array(sorted(examined), pa.string())))
    new = _table(_keep_rounds(known.rows, old))
    was, now, parts = _digest(parent.taxonomy_hash), _digest(parent.taxonomy_hash), list[pa.Table]()
    for part, replaced in _replaced(before, old["image_id"], new):
        text = _csv(part)
        was.update(text)
        now.update(text if replaced is part else _csv(replaced))
        parts.append(replaced)
    table = pa.concat_tables(parts)
    # Nothing follows from a manifest that was altered; without a row there is a sentence to raise.
    if was.hexdigest() != parent_id or not len(table):
        return None
    return _Made(now.hexdigest(), table, known, (old, new))


def _replaced(before: pa.Table, old: pa.ChunkedArray, new: pa.Table) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Yield the parts of a manifest, each as it was and as it is with the rows `new` instead of those of images `old`.

    A part that stays as it is comes twice as the same object.
    """
    starts = range(0, len(before), _ROWS_AT_ONCE)
    added, edges = new["image_id"].to_pylist(), [before["image_id"][start].as_py() for start in starts[1:]]
    cuts = [0, *(bisect_left(added, edge) for edge in edges), len(added)]
    for start, first, end in zip(starts, cuts, cuts[1:], strict=False):
        part = before.slice(start, _ROWS_AT_ONCE)
        stays = pc.invert(pc.is_in(part["image_id"], value_set=old))
        if first == end and pc.all(stays).as_py():
            yield part, part
        else:
            parts = [part.filter(stays), new.slice(first, end - first)]
            yield part, pa.concat_tables(parts).sort_by("image_id")


def _known(store: Store, annotators: pd.DataFrame, among: AbstractSet[str] | None) -> Known:
    """Return the labelled images, of the given ones or all, after missing splits were drawn."""
    partly, rows = among is not None, read_rows(store, among)
    known = known_of(store, rows, annotators, partly=partly)
    # Reading and drawing take long, so a write transaction only writes what was drawn. What else changed meanwhile
    # belongs to the next version.
    while not (undrawn := known.rows[known.rows["split"].isna()]).empty:
        draw_splits(store, undrawn)
        rows = with_new_splits(store, rows, among)
        known = known_of(store, rows, annotators, partly=partly)
    return known


def _outranked(annotators: pd.DataFrame, strongest: pd.DataFrame) -> tuple[str, ...]:
    both = annotators.merge(strongest, on="image_id", suffixes=("", "_strongest"))
    return tuple(sorted(both.loc[both["label"] != both["label_strongest"], "image_id"]))


def _keep_rounds(rows: pd.DataFrame, before: pa.Table | None) -> pd.DataFrame:
    """Set `round` of labels that the parent version already has to the round that added them."""
    if before is None:
        return rows
    said = ["image_id", "label", "label_source"]
    added = before.filter(pc.greater(before["round"], 0)).select([*said, "round"]).to_pandas()
    had = rows["image_id"].isin(added["image_id"])
    # A changed label is a new one and gets the round that changed it.
    merged = rows[had].merge(added, on=said, how="left", suffixes=("", "_before"))
    rounds = rows["round"].to_numpy(copy=True)
    rounds[had.to_numpy()] = merged["round_before"].fillna(merged["round"])
    return rows.assign(round=rounds)


def _table(rows: pd.DataFrame) -> pa.Table:
    rows = by_image(rows[list(ManifestRow.model_fields)])
    return to_arrow(ManifestRow, rows.astype({"label_rank": "int64", "round": "int64"}))


def _write(
    store: Store, made: _Made, round_number: int, parent_id: str | None, within: Callable[[Transaction], None]
) -> DatasetVersion:
    """Write the files and then the record, so that there is never a record without its manifest.

    `within` is called in the transaction that writes the record, or if the version is its parent in all columns.
    """
    folder = store.home.datasets / made.id
    with store.ledger.read() as tx:
        recorded = tx.get(DatasetRecord, made.id) is not None
    if recorded and (folder / MANIFEST).is_file():
        # Its manifest is kept, also if something else than its id says differs: that is examined again the next time.
        if parent_id == made.id and made.compared is not None and changed_images(*made.compared) == []:
            with store.ledger.begin() as tx:
                within(tx)
        return load_dataset(store, made.id)
    make_folders(folder)
    version = DatasetVersion(made.id, store.taxonomy.hash, made.table.to_pandas())
    # The summary is for people and other tools; Relook itself reads the manifest and the record.
    summary = {
        "id": version.id,
        "taxonomy_hash": version.taxonomy_hash,
        "images": version.num_images,
        "groups": version.num_groups,
        "splits": {split.value: int((version.rows["split"] == split.value).sum()) for split in Split},
    }
    write_file(folder / "dataset.json", json.dumps(summary, indent=2) + "\n")
    with replacing(folder / MANIFEST) as temporary:
        pq.write_table(made.table, temporary, row_group_size=_ROWS_OF_A_GROUP)
    changed = None if made.compared is None or parent_id == made.id else changed_images(*made.compared)
    with store.ledger.begin() as tx:
        if tx.get(DatasetRecord, version.id) is None:
            record = DatasetRecord(
                id=version.id,
                created_at=tx.now_after(DatasetRecord),
                parent_id=parent_id if parent_id != version.id else None,
                taxonomy_hash=version.taxonomy_hash,
                num_images=version.num_images,
                num_groups=version.num_groups,
                round=round_number,
                num_changes=None if changed is None else len(changed),
            )
            tx.add(record, *(DatasetChange(id=new_id(), dataset_id=version.id, image_id=i) for i in changed or ()))
        within(tx)
    return version


def changed_images(before: pa.Table, after: pa.Table) -> list[str] | None:
    """Return the images whose rows differ between two manifests, or that only one has; None if they are very many."""
    old, new = before["image_id"], after["image_id"]
    apart: list[pa.ChunkedArray] = []
    if not old.equals(new):
        held, kept = pc.is_in(old, value_set=new), pc.is_in(new, value_set=old)
        apart = [old.filter(pc.invert(held)), new.filter(pc.invert(kept))]
        before, after = before.filter(held), after.filter(kept)
    # Both are sorted by image, so the rows of an image that both have are at the same place.
    differs = [pc.fill_null(pc.not_equal(before[name], after[name]), True) for name in ManifestRow.model_fields]
    apart.append(after["image_id"].filter(reduce(pc.or_, differs)))
    if sum(map(len, apart)) > MOST:
        return None
    return sorted(image_id for part in apart for image_id in part.to_pylist())
