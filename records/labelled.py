"""The labelled images: their strongest labels, their groups and their splits.

Input: the ledger and the consensus of the annotators. Output: frames with one row per image, from which
`records.datasets` builds a version. Missing splits are drawn here, once.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
import sqlalchemy as sa

from records.errors import DataError, IntegrityError
from records.grouping import draw_split, draw_stratified
from records.ids import utc_now
from records.ledger import Transaction
from records.ledger.tables import TABLES, any_of
from records.store import Store
from records.types import LABEL_RANK, TRAINABLE, Group, Image, ResolvedLabel, SourceLabel, Split

_ROWS_AT_ONCE = 50_000
_RANKS = {confirmation.value: rank for confirmation, rank in LABEL_RANK.items()}
_IMAGE, _GROUP, _SOURCE = TABLES[Image].c, TABLES[Group].c, TABLES[SourceLabel].c

_CORRECTION = re.compile(r"correction:(\d+):")
T = TypeVar("T")


def correction_number(source: str) -> int:
    """Return how many corrections of an image a row is the last of; 0 for an import."""
    found = _CORRECTION.match(source)
    return int(found[1]) if found else 0


def counting(rows: Sequence[T], source_of: Callable[[T], str]) -> list[T]:
    """Return the rows of one image that count: of the imported ones those of the last correction, and all outcomes."""
    newest = max((correction_number(source_of(row)) for row in rows), default=0)
    return [r for r in rows if source_of(r).startswith("outcome:") or correction_number(source_of(r)) == newest]


@dataclass(frozen=True)
class Known:
    """One consistent view of the labelled images.

    Args:
        images: image_id, group_id and consent of every labelled image that is not erased.
        strongest: the strongest label of every usable image, with group_id and split.
        rows: the same, except that on held-out splits only independent labels count: those that were imported or come
            from the audit sample.
    """

    images: pd.DataFrame
    strongest: pd.DataFrame
    rows: pd.DataFrame


@dataclass(frozen=True)
class Rows:
    """What the ledger holds of labels, images and groups: the rows that count, as text."""

    labels: pd.DataFrame
    images: pd.DataFrame
    groups: pd.DataFrame


def read_rows(store: Store, among: AbstractSet[str] | None = None) -> Rows:
    """Read labels, images and groups in one view, of the given images or of all."""
    with store.ledger.read() as tx:
        of_labels, of_images = (_among(tx, column, among) for column in (_SOURCE.image_id, _IMAGE.id))
        said = (_SOURCE.image_id, _SOURCE.label, _SOURCE.confirmation, _SOURCE.source.label("label_source"))
        labels = _frame(tx, *said, where=of_labels)
        owned = (_IMAGE.id.label("image_id"), _IMAGE.group_id, _IMAGE.consent)
        images = _frame(tx, *owned, where=sa.and_(_IMAGE.erased_at.is_(None), of_images))
        groups = _groups(tx, None if among is None else set(images["group_id"].dropna()))
    return Rows(_counting_rows(labels), images, groups)


def with_new_splits(store: Store, rows: Rows, among: AbstractSet[str] | None = None) -> Rows:
    """Read the groups again, after splits were drawn; labels and images stay as they were.

    Rows of groups are never deleted and a merge leaves where its images went, so every group of these images is found.
    """
    with store.ledger.read() as tx:
        return replace(rows, groups=_groups(tx, None if among is None else set(rows.images["group_id"].dropna())))


def known_of(store: Store, read: Rows, annotators: pd.DataFrame, *, partly: bool = False) -> Known:
    """Return the labelled images; `split` is missing where a group has none yet.

    Args:
        store: its taxonomy has the classes.
        read: the imported images and labels.
        annotators: the frame from `annotations`.
        partly: whether `read` holds some images only, of which none may have a usable label.
    Returns:
        The view.
    Raises:
        DataError: no image has a usable label.
        TaxonomyError: a label is not a class of the store's taxonomy.
        IntegrityError: an image is in a group that the ledger does not know.
    """
    labels, images, groups = read.labels, read.images, read.groups
    # Outcomes are no random sample either: lesions that look suspicious are the ones that get a biopsy.
    labels = labels.assign(round=0, independent=labels["label_source"].str.startswith(("import:", "correction:")))
    # An empty frame has object columns, and concat would turn the typed columns of the other into objects.
    labels = pd.concat([part for part in (labels, annotators) if len(part)] or [labels], ignore_index=True)
    for label in labels["label"].unique():
        store.taxonomy.index_of(label)
    labels = labels.merge(images, on="image_id").merge(_after_merges(groups), on="group_id", how="left")
    lost = labels.loc[labels["group_id"].notna() & labels["target_id"].isna(), "group_id"]
    if not lost.empty:
        raise IntegrityError(f"the ledger has images in a group {lost.iloc[0]!r} that it does not know")
    labels = labels.assign(group_id=labels["target_id"]).drop(columns="target_id")
    owned = labels[["image_id", "group_id", "consent"]].drop_duplicates("image_id")
    labels = labels[labels["consent"].isin([consent.value for consent in TRAINABLE]) & labels["group_id"].notna()]
    if labels.empty and not partly:
        why = f"none of {len(owned)} labelled images has both consent for training and a group"
        raise DataError(f"{why if len(owned) else 'no image has a label yet'}; import a folder with diagnoses first")
    strongest = _strongest(labels)
    # An image on a held-out split keeps an independent label even if a biased one is stronger: the model had a part in
    # choosing which images get biased labels, and it must not be measured on its own choice.
    biased = ~strongest["independent"] & strongest["split"].notna() & (strongest["split"] != Split.TRAIN.value)
    others = labels[labels["independent"] & labels["image_id"].isin(list(strongest.loc[biased, "image_id"]))]
    rows = pd.concat([strongest[~biased], _strongest(others)]) if biased.any() else strongest
    return Known(owned, strongest, by_image(rows))


def _counting_rows(labels: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `source_labels` that count; see `counting`."""
    if not labels["label_source"].str.startswith("correction:").any():
        return labels
    number = labels["label_source"].str.extract(_CORRECTION.pattern, expand=False).fillna("0").astype("int64")
    newest = number.groupby(labels["image_id"]).transform("max")
    return labels[(number == newest) | labels["label_source"].str.startswith("outcome:")]


def annotations(resolved: Iterable[ResolvedLabel], round_number: int) -> pd.DataFrame:
    """Return resolved annotations as a frame with one row per image, without images that have no class.

    Column `independent` is true for labels that come from the audit sample alone.
    """
    said = [
        {
            "image_id": r.image_id,
            "label": r.label,
            "confirmation": r.confirmation.value,
            "label_source": f"annotator:{'+'.join(r.annotators)}",
            "round": round_number,
            "independent": r.from_audit_sample,
        }
        for r in resolved
        if r.label is not None
    ]
    return pd.DataFrame(said, columns=["image_id", "label", "confirmation", "label_source", "round", "independent"])


def _frame(tx: Transaction, *columns: sa.ColumnElement[Any], where: sa.ColumnElement[bool]) -> pd.DataFrame:
    """Return columns of text, read in parts so that a million rows fit into memory."""
    result = tx.connection.execute(sa.select(*columns).where(where))
    schema = pa.schema([(name, pa.string()) for name in result.keys()])  # noqa: SIM118 - it is no mapping
    parts = [schema.empty_table()]
    # Tuples of the driver, turned into columns of Arrow: text needs no conversion, and a row object of SQLAlchemy and
    # then of pandas for each takes three times as long as the reading itself.
    while rows := result.cursor.fetchmany(_ROWS_AT_ONCE) if result.cursor is not None else ():
        parts.append(pa.table([pa.array(column, pa.string()) for column in zip(*rows, strict=True)], schema=schema))
    result.close()
    frame: pd.DataFrame = pa.concat_tables(parts).to_pandas()
    return frame


def _among(tx: Transaction, column: sa.Column[Any], keys: AbstractSet[str] | None) -> sa.ColumnElement[bool]:
    return sa.true() if keys is None else any_of(column, keys, tx.connection.dialect)


def _groups(tx: Transaction, wanted: AbstractSet[str] | None) -> pd.DataFrame:
    """Return the groups with these ids and those that they were merged into, or all."""
    columns = (_GROUP.id.label("group_id"), _GROUP.split, _GROUP.merged_into)
    parts = [_frame(tx, *columns, where=_among(tx, _GROUP.id, wanted))]
    while wanted is not None and (wanted := set(parts[-1]["merged_into"].dropna()) - set(pd.concat(parts)["group_id"])):
        parts.append(_frame(tx, *columns, where=_among(tx, _GROUP.id, wanted)))
    return pd.concat(parts, ignore_index=True)


def by_image(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows sorted by image, with a fresh index."""
    # Most callers have sorted them before, and comparing neighbours is far cheaper than sorting a million texts.
    if rows["image_id"].is_monotonic_increasing:
        return rows.reset_index(drop=True)
    return rows.sort_values("image_id", ignore_index=True)


def _after_merges(groups: pd.DataFrame) -> pd.DataFrame:
    """Return group_id, the id of the group that holds its images now, and the split of that group."""
    moved = groups[groups["merged_into"].notna()]
    into: dict[str, str] = dict(zip(moved["group_id"], moved["merged_into"], strict=True))
    # Groups may have been merged several times: follow each chain to its end.
    for group_id in into:
        while into[group_id] in into:
            into[group_id] = into[into[group_id]]
    kept = groups[groups["merged_into"].isna()]
    taken = moved.assign(target_id=moved["group_id"].map(into)).drop(columns="split")
    taken = taken.merge(kept[["group_id", "split"]].rename(columns={"group_id": "target_id"}), on="target_id")
    columns = ["group_id", "target_id", "split"]
    return pd.concat([kept.assign(target_id=kept["group_id"])[columns], taken[columns]])


def _strongest(labels: pd.DataFrame) -> pd.DataFrame:
    """Keep the strongest label of each image, sorted by image; among equals the first imported one."""
    labels = labels.assign(label_rank=labels["confirmation"].map(_RANKS).astype("int64"))
    # Most images have one label, and sorting only the others is what makes a million rows fast.
    several = labels["image_id"].duplicated(keep=False)
    contested = labels[several]
    contested = contested.assign(is_annotator=contested["label_source"].str.startswith("annotator:"))
    contested = contested.sort_values(["image_id", "label_rank", "is_annotator", "label_source", "label"])
    decided = contested.drop_duplicates("image_id").drop(columns="is_annotator")
    return by_image(pd.concat([labels[~several], decided]))


def draw_splits(store: Store, undrawn: pd.DataFrame) -> None:
    """Draw the split of every labelled group that has none, by the setting `records.split_salt`.

    The first draw of a store is stratified; later ones go by hash. A group whose label came from doubt, a flag, a
    selection or an outcome goes to train, so that it can never bias a held-out split. Where another process makes the
    first draw meanwhile, nothing is drawn: read the rows again.

    Args:
        store: its groups get their splits.
        undrawn: rows of `Known` whose group has no split; a group that got its split meanwhile keeps it.
    """
    table, salt = TABLES[Group], store.settings.split_salt
    any_drawn = sa.select(table.c.id).where(table.c.split.is_not(None)).limit(1)
    # Millions of groups take minutes. No writer waits for that, and PostgreSQL ends a write transaction that stands
    # still for a third of `records.busy_timeout_s`.
    with store.ledger.read() as tx:
        first = tx.connection.scalar(any_drawn) is None
    doubtful = set(undrawn.loc[~undrawn["independent"], "group_id"])
    fresh = undrawn[~undrawn["group_id"].isin(doubtful)].sort_values("image_id").drop_duplicates("group_id")
    if first:
        drawn = draw_stratified(dict(zip(fresh["group_id"], fresh["label"], strict=True)), salt)
    else:
        drawn = {group_id: draw_split(group_id, salt) for group_id in fresh["group_id"]}
    draws = [(split, "stratified" if first else "hash", [g for g in drawn if drawn[g] == split]) for split in Split]
    draws.append((Split.TRAIN, "doubt", sorted(doubtful)))
    with store.ledger.begin() as tx:
        if first and tx.connection.scalar(any_drawn) is not None:
            return
        for split, how, members in draws:
            for start in range(0, len(members), _ROWS_AT_ONCE):
                some = any_of(table.c.id, members[start : start + _ROWS_AT_ONCE], tx.connection.dialect)
                tx.connection.execute(
                    sa.update(table)
                    .where(some, table.c.split.is_(None))
                    .values(split=split.value, drawn_by=how, drawn_at=utc_now())
                )
