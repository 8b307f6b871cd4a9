"""What is known of the labelled pictures: their strongest labels, their groups and their sides.

In: the ledger and what experts said. Out: frames with one row per picture, which `records.datasets`
turns into a version. Sides that are missing are drawn here, once and for good.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import sqlalchemy as sa

from records.errors import DataError, IntegrityError
from records.grouping import draw_side, draw_stratified
from records.ids import utc_now
from records.ledger import Transaction
from records.ledger.tables import TABLES, any_of
from records.store import Store
from records.types import LABEL_RANK, Confirmation, Consent, Group, Image, ResolvedLabel, Side, SourceLabel

_ROWS_AT_ONCE = 50_000


@dataclass(frozen=True)
class Known:
    """One consistent view of the labelled pictures.

    Args:
        pictures: group_id and consent by picture id, of every labelled picture that is not erased.
        strongest: the strongest label of every usable picture, with group_id and side.
        rows: the same, except that on held-out sides labels from doubt do not count.
    """

    pictures: pd.DataFrame
    strongest: pd.DataFrame
    rows: pd.DataFrame


def read_known(store: Store, experts: pd.DataFrame) -> Known:
    """Read the labelled pictures in one view.

    Args:
        store: with the imported pictures and labels.
        experts: of `expert_labels`.
    Returns:
        What is known; `side` is missing where a group has none yet.
    Raises:
        DataError: not one picture has a label that may be used.
        TaxonomyError: a label is not a class of the store's taxonomy.
        IntegrityError: a picture is in a group that the ledger does not know.
    """
    images, groups, sources = TABLES[Image].c, TABLES[Group].c, TABLES[SourceLabel].c
    with store.ledger.read() as tx:
        labels = _frame(tx, sources.image_id, sources.label, sources.confirmation, sources.source.label("label_source"))
        pictures = _frame(tx, images.id, images.group_id, images.consent, where=images.erased_at.is_(None))
        sides = _frame(tx, groups.id, groups.side).set_index("id")["side"]
        merged = _frame(tx, groups.id, groups.merged_into, where=groups.merged_into.is_not(None))
    # An outcome is as little a random sample as a doubt is: who is suspected is biopsied.
    labels = labels.assign(round=0, independent=labels["label_source"].str.startswith("import:"))
    labels = pd.concat([frame for frame in (labels, experts) if not frame.empty] or [labels], ignore_index=True)
    labels["independent"] = labels["independent"].astype(bool)
    for label in labels["label"].unique():
        store.taxonomy.index_of(label)
    pictures = pictures[pictures["id"].isin(labels["image_id"])].set_index("id")
    pictures["group_id"] = _after_merges(pictures["group_id"], dict(merged.itertuples(index=False)))
    usable = pictures.index[(pictures["consent"] == Consent.TRAINING.value) & pictures["group_id"].notna()]
    labels = labels[labels["image_id"].isin(usable)]
    if labels.empty:
        why = f"none of {len(pictures)} labelled pictures has both consent for training and a group"
        raise DataError(
            f"{why if len(pictures) else 'no picture has a label yet'}; import a folder with diagnoses first"
        )
    labels = labels.assign(group_id=labels["image_id"].map(pictures["group_id"]))
    unknown = labels.loc[~labels["group_id"].isin(sides.index), "group_id"]
    if not unknown.empty:
        raise IntegrityError(f"the ledger has pictures in a group {unknown.iloc[0]!r} that it does not know")
    strongest = _strongest(labels.assign(side=labels["group_id"].map(sides)))
    biased = ~strongest["independent"] & strongest["side"].notna() & (strongest["side"] != Side.TRAIN.value)
    others = labels[labels["independent"] & labels["image_id"].isin(strongest.loc[biased, "image_id"])]
    rows = pd.concat([strongest[~biased], _strongest(others.assign(side=others["group_id"].map(sides)))])
    return Known(pictures, strongest, rows.sort_values("image_id", ignore_index=True))


def expert_labels(resolved: Iterable[ResolvedLabel], round_number: int) -> pd.DataFrame:
    """Return what experts said as a frame; pictures that nobody could tell are not in it.

    Args:
        resolved: after consensus.
        round_number: the round that asks.
    Returns:
        One row per picture. `independent` is true for labels from the audit sample alone.
    """
    said = [
        {
            "image_id": r.image_id,
            "label": r.label,
            "confirmation": r.confirmation.value,
            "label_source": f"expert:{'+'.join(r.annotators)}",
            "round": round_number,
            "independent": r.from_audit_sample,
        }
        for r in resolved
        if r.label is not None
    ]
    return pd.DataFrame(said, columns=["image_id", "label", "confirmation", "label_source", "round", "independent"])


def _frame(
    tx: Transaction, *columns: sa.ColumnElement[Any], where: sa.ColumnElement[bool] | None = None
) -> pd.DataFrame:
    """Return columns as text, read in parts so that a million rows fit."""
    query = sa.select(*columns) if where is None else sa.select(*columns).where(where)
    result = tx.connection.execute(query.execution_options(yield_per=_ROWS_AT_ONCE))
    names = list(result.keys())
    # By column: pandas asks each row object in turn what it is, which takes ten times as long.
    parts = [pd.DataFrame(dict(zip(names, zip(*part), strict=True)), dtype="str") for part in result.partitions()]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=names, dtype="str")


def _after_merges(group_ids: pd.Series, merged: dict[str, str]) -> pd.Series:
    while group_ids.isin(list(merged)).any():
        group_ids = group_ids.map(lambda group_id: merged.get(group_id, group_id))
    return group_ids


def _strongest(labels: pd.DataFrame) -> pd.DataFrame:
    """Keep the strongest label of each picture; among equals the first imported stays."""
    order = labels.assign(
        label_rank=labels["confirmation"].map(lambda value: LABEL_RANK[Confirmation(value)]).astype("int64"),
        is_expert=labels["label_source"].str.startswith("expert:"),
    )
    order = order.sort_values(["image_id", "label_rank", "is_expert", "label_source", "label"])
    return order.drop_duplicates("image_id").drop(columns="is_expert").reset_index(drop=True)


def draw_sides(tx: Transaction, undrawn: pd.DataFrame, salt: str) -> None:
    """Give every labelled group that has none its side, once.

    The first draw of a store is stratified; later ones go by hash. A group whose label came from
    doubt, a flag, a selection or an outcome goes to train, so that it can never bias a held-out side.

    Args:
        tx: a write transaction.
        undrawn: rows of `Known` whose group has no side; one that got its side meanwhile keeps it.
        salt: setting `records.split_salt`.
    """
    table = TABLES[Group]
    doubtful = set(undrawn.loc[~undrawn["independent"], "group_id"])
    fresh = undrawn[~undrawn["group_id"].isin(doubtful)].sort_values("image_id").drop_duplicates("group_id")
    first = tx.connection.scalar(sa.select(table.c.id).where(table.c.side.is_not(None)).limit(1)) is None
    if first:
        drawn = draw_stratified(dict(zip(fresh["group_id"], fresh["label"], strict=True)), salt)
    else:
        drawn = {group_id: draw_side(group_id, salt) for group_id in fresh["group_id"]}
    draws = [(side, "stratified" if first else "hash", [g for g in drawn if drawn[g] == side]) for side in Side]
    for side, how, members in [*draws, (Side.TRAIN, "doubt", sorted(doubtful))]:
        tx.connection.execute(
            sa.update(table)
            .where(any_of(table.c.id, members, tx.connection.dialect), table.c.side.is_(None))
            .values(side=side.value, drawn_by=how, drawn_at=utc_now())
        )
