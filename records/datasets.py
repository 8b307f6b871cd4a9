"""Dataset versions: immutable parquet manifests that say which picture has which label on which side.

A version's id is the hash of what training sees (picture, group, side, label, rank), so equal
inputs give equal ids on every machine. Labels that came from doubt or flags join train only; a
group that has a side keeps it for good.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import sqlalchemy as sa

from records.errors import DataError, IntegrityError, UnknownIdError
from records.grouping import draw_side, draw_stratified
from records.ids import sha256_hex, utc_now
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.schemas import to_arrow
from records.store import Store
from records.types import (
    LABEL_RANK,
    Confirmation,
    Consent,
    DatasetRecord,
    Group,
    Image,
    ManifestRow,
    ResolvedLabel,
    Side,
    SourceLabel,
)

HASHED_COLUMNS = ["image_id", "group_id", "side", "label", "label_rank"]


@dataclass(frozen=True)
class DatasetVersion:
    """A dataset version in memory.

    Args:
        id: content hash, 64 hex characters.
        taxonomy_hash: of the taxonomy that its labels belong to.
        rows: one row per labelled picture, columns of ManifestRow, sorted by picture id.
    """

    id: str
    taxonomy_hash: str
    rows: pd.DataFrame = field(repr=False)

    def side(self, side: Side) -> pd.DataFrame:
        """Return the rows of one side, sorted by picture id, with a fresh index."""
        return self.rows[self.rows["side"] == side.value].reset_index(drop=True)

    @property
    def num_images(self) -> int:
        """Number of labelled pictures."""
        return len(self.rows)

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return int(self.rows["group_id"].nunique())


@dataclass(frozen=True)
class BuildReport:
    """What building a version left out, and why.

    Args:
        version: what was built.
        new_labels: pictures whose label came from an expert.
        held_out: expert labels that landed on a side other than train.
        outranked: expert labels that a stronger label contradicts; each is a case for adjudication.
        without_consent: labelled pictures whose consent does not cover training.
        ungrouped: labelled pictures that are in no group yet.
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
    """Build the dataset version of everything that is known now, and write it if it is new.

    Args:
        store: with the imported pictures and labels.
        resolved: what experts said, after consensus.
        round_number: the round that asks; 0 for an import.
        parent_id: the version that this one follows.
    Returns:
        The version and what was left out. Equal knowledge gives an equal id; the same id is written once.
    Raises:
        DataError: not one picture has a label.
    """
    with store.ledger.begin() as tx:
        candidates = _candidates(tx, resolved, round_number)
        if candidates.empty:
            raise DataError("no picture has a label yet; import a folder with a table of diagnoses first")
        images = _images(tx, candidates)
        usable = (images["consent"] == Consent.TRAINING.value) & images["group_id"].notna() & images["erased_at"].isna()
        best = _best_labels(candidates[candidates["image_id"].isin(images.index[usable])])
        best["group_id"] = best["image_id"].map(images["group_id"])
        _draw_missing_sides(tx, best, store.settings.split_salt)
        best["side"] = best["group_id"].map(_sides(tx))
        version = _version(best, store.taxonomy.hash)
        if tx.get(DatasetRecord, version.id) is None:
            _write_files(version, store.home.datasets / version.id)
            tx.add(_record(version, round_number, parent_id))
    expert = best[best["label_source"].str.startswith("expert:")]
    says = candidates[candidates["label_source"].str.startswith("expert:")]
    consent_missing = images["consent"] != Consent.TRAINING.value
    return BuildReport(
        version=version,
        new_labels=tuple(expert["image_id"]),
        held_out=tuple(expert.loc[expert["side"] != Side.TRAIN.value, "image_id"]),
        outranked=tuple(sorted(set(says["image_id"]) - set(expert["image_id"]) - set(images.index[~usable]))),
        without_consent=tuple(sorted(images.index[consent_missing])),
        ungrouped=tuple(sorted(images.index[images["group_id"].isna() & ~consent_missing])),
    )


def load_dataset(store: Store, dataset_id: str) -> DatasetVersion:
    """Load a version by its id or a prefix of at least 8 characters.

    Args:
        store: with the ledger and the files.
        dataset_id: id or prefix.
    Returns:
        The version, its file checked against its id.
    Raises:
        UnknownIdError: nothing, or more than one version, has that id.
        IntegrityError: the manifest was altered.
    """
    with store.ledger.read() as tx:
        found = [r for r in tx.find(DatasetRecord) if len(dataset_id) >= 8 and r.id.startswith(dataset_id)]
    if len(found) != 1:
        problem = "no dataset version has" if not found else f"{len(found)} dataset versions share"
        raise UnknownIdError(
            f"{problem} the id {dataset_id!r}; `relook data versions` lists them (8 characters are enough)"
        )
    record = found[0]
    path = store.home.datasets / record.id / "manifest.parquet"
    if not path.is_file():
        raise IntegrityError(f"the manifest of dataset version {record.id[:12]} is missing; restore it from a backup")
    rows = pq.read_table(path).to_pandas()
    if content_id(rows, record.taxonomy_hash) != record.id:
        raise IntegrityError(f"the manifest of dataset version {record.id[:12]} was altered; restore it from a backup")
    return DatasetVersion(record.id, record.taxonomy_hash, rows)


def content_id(rows: pd.DataFrame, taxonomy_hash: str) -> str:
    """Return the id of a manifest.

    Args:
        rows: with at least the columns picture, group, side, label and rank, sorted by picture id.
        taxonomy_hash: of the taxonomy the labels belong to.
    Returns:
        64 hex characters over exactly what training sees; who said it and when is not part of it.
    """
    text = rows[HASHED_COLUMNS].to_csv(index=False, lineterminator="\n")
    return sha256_hex(f"{taxonomy_hash}\n{text}".encode())


def _candidates(tx: Transaction, resolved: Iterable[ResolvedLabel], round_number: int) -> pd.DataFrame:
    table = TABLES[SourceLabel]
    query = sa.select(table.c.image_id, table.c.label, table.c.confirmation, table.c.source.label("label_source"))
    frame = pd.DataFrame(tx.connection.execute(query).mappings().all())
    if frame.empty:
        frame = pd.DataFrame(columns=["image_id", "label", "confirmation", "label_source"])
    frame["round"], frame["audit"] = 0, True
    experts = pd.DataFrame(
        [
            (r.image_id, r.label, r.confirmation.value, f"expert:{'+'.join(r.annotators)}", round_number, r.from_audit_sample)
            for r in resolved
            if r.label is not None
        ],
        columns=["image_id", "label", "confirmation", "label_source", "round", "audit"],
    )  # fmt: skip
    both = pd.concat([f for f in (frame, experts) if not f.empty] or [frame], ignore_index=True)
    both["label_rank"] = both["confirmation"].map(lambda value: LABEL_RANK[Confirmation(value)]).astype("int64")
    return both


def _images(tx: Transaction, candidates: pd.DataFrame) -> pd.DataFrame:
    table = TABLES[Image]
    query = sa.select(table.c.id, table.c.group_id, table.c.consent, table.c.erased_at)
    frame = pd.DataFrame(
        tx.connection.execute(query).mappings().all(), columns=["id", "group_id", "consent", "erased_at"]
    )
    merged = {group.id: group.merged_into for group in tx.find(Group) if group.merged_into is not None}
    while frame["group_id"].isin(merged).any():
        frame["group_id"] = frame["group_id"].map(lambda group_id: merged.get(group_id, group_id))
    return frame[frame["id"].isin(candidates["image_id"])].set_index("id")


def _best_labels(candidates: pd.DataFrame) -> pd.DataFrame:
    """Keep the strongest label of each picture; among equals the first imported stays."""
    order = candidates.assign(is_expert=candidates["label_source"].str.startswith("expert:"))
    order = order.sort_values(["image_id", "label_rank", "is_expert", "label_source"], kind="stable")
    return order.drop_duplicates("image_id").drop(columns="is_expert").reset_index(drop=True)


def _sides(tx: Transaction) -> dict[str, str | None]:
    return {group.id: group.side.value if group.side else None for group in tx.find(Group)}


def _draw_missing_sides(tx: Transaction, best: pd.DataFrame, salt: str) -> None:
    """Give every labelled group that has none its side, once.

    The first draw of a store is stratified; later ones go by hash. A group whose label came from
    doubt, a flag or a selection goes to train, so that it can never bias a held-out side.
    """
    known = _sides(tx)
    missing = best[best["group_id"].map(known).isna()]
    if missing.empty:
        return
    expert = missing["label_source"].str.startswith("expert:")
    doubtful = set(missing.loc[expert & ~missing["audit"].astype(bool), "group_id"])
    fresh = missing[~missing["group_id"].isin(doubtful)].sort_values("image_id").drop_duplicates("group_id")
    first = not any(known.values())
    if first:
        drawn = draw_stratified(dict(zip(fresh["group_id"], fresh["label"], strict=True)), salt)
    else:
        drawn = {group_id: draw_side(group_id, salt) for group_id in fresh["group_id"]}
    how = "stratified" if first else "hash"
    now = utc_now()
    table = TABLES[Group]
    values = [{"key": g, "new_side": s.value, "how": how, "now": now} for g, s in drawn.items()]
    values += [{"key": g, "new_side": Side.TRAIN.value, "how": "doubt", "now": now} for g in sorted(doubtful)]
    tx.connection.execute(
        sa.update(table)
        .where(table.c.id == sa.bindparam("key"), table.c.side.is_(None))
        .values(side=sa.bindparam("new_side"), drawn_by=sa.bindparam("how"), drawn_at=sa.bindparam("now")),
        values,
    )


def _version(best: pd.DataFrame, taxonomy_hash: str) -> DatasetVersion:
    rows = best[list(ManifestRow.model_fields)].sort_values("image_id", ignore_index=True)
    rows = rows.astype({"label_rank": np.int64, "round": np.int64})
    return DatasetVersion(content_id(rows, taxonomy_hash), taxonomy_hash, rows)


def _record(version: DatasetVersion, round_number: int, parent_id: str | None) -> DatasetRecord:
    return DatasetRecord(
        id=version.id,
        created_at=utc_now(),
        parent_id=parent_id if parent_id != version.id else None,
        taxonomy_hash=version.taxonomy_hash,
        num_images=version.num_images,
        num_groups=version.num_groups,
        round=round_number,
    )


def _write_files(version: DatasetVersion, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".manifest.parquet"
    pq.write_table(to_arrow(ManifestRow, version.rows), temporary)
    temporary.replace(folder / "manifest.parquet")
    summary = {
        "id": version.id,
        "taxonomy_hash": version.taxonomy_hash,
        "images": version.num_images,
        "groups": version.num_groups,
        "sides": {side.value: len(version.side(side)) for side in Side},
    }
    (folder / "dataset.json").write_text(json.dumps(summary, indent=2) + "\n")
