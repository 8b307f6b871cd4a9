"""Which rows a search sees: train and val, nothing else; optionally a small, fair part of train.

In: the rows of a dataset version. Out: rows. Groups stay whole and classes keep their proportions.
"""

from dataclasses import replace

import numpy as np
import pandas as pd

from records.datasets import DatasetVersion
from records.errors import ContractError, DataError
from records.types import Side

SEARCH_SIDES = (Side.TRAIN, Side.VAL)


def searched_part(dataset: DatasetVersion, max_train_images: int | None, seed: int) -> DatasetVersion:
    """Return what a search sees of a dataset version: val, and train or a part of it.

    Args:
        dataset: the version.
        max_train_images: of the part; None takes all.
        seed: of the draw.
    Returns:
        The version with these rows only, under its own id.
    Raises:
        DataError: train or val is empty, or fewer pictures are allowed than there are classes.
    """
    train, val = dataset.side(Side.TRAIN), dataset.side(Side.VAL)
    for name, rows in (("train", train), ("val", val)):
        if rows.empty:
            raise DataError(f"dataset {dataset.id[:12]} has no picture on the {name} side; import or label some")
    part = pd.concat([grouped_subset(train, max_train_images, seed), val], ignore_index=True)
    require_search_rows(part)
    return replace(dataset, rows=part)


def require_search_rows(rows: pd.DataFrame) -> None:
    """Refuse rows that no search may see.

    Args:
        rows: columns of ManifestRow.
    Raises:
        ContractError: a row is on another side than train or val (names the side and the picture).
    """
    foreign = rows[~rows["side"].isin([side.value for side in SEARCH_SIDES])]
    if not foreign.empty:
        first = foreign.iloc[0]
        raise ContractError(
            f"a search may read train and val only, but picture {first['image_id'][:12]} is on side {first['side']}"
        )


def grouped_subset(rows: pd.DataFrame, max_images: int | None, seed: int) -> pd.DataFrame:
    """Take whole groups until about `max_images` pictures are chosen, each class in its proportion.

    A class gets its share of the pictures, rounded down, and at least one group, even where that
    group is larger than the share; so the subset may be larger than asked by a few pictures of rare
    classes and is otherwise at most that large.

    Args:
        rows: of one side, columns of ManifestRow, N >= 1.
        max_images: None, or at least N, takes all.
        seed: of the draw; a larger subset of the same seed is drawn in the same order.
    Returns:
        The chosen rows, in their order, with a fresh index.
    Raises:
        DataError: fewer pictures are allowed than there are classes.
    """
    if max_images is None or max_images >= len(rows):
        return rows.reset_index(drop=True)
    groups = rows.groupby("group_id", sort=True).agg(label=("label", "first"), size=("image_id", "size"))
    classes = sorted(groups["label"].unique())
    if max_images < len(classes):
        raise DataError(
            f"tuning.max_train_images is {max_images}, but {len(classes)} classes need a picture each; "
            f"set it to at least {len(classes)}"
        )
    random = np.random.default_rng(seed)
    chosen: list[str] = []
    for label in classes:
        members = groups[groups["label"] == label]
        shuffled = members.iloc[random.permutation(len(members))]
        quota = int(max_images * members["size"].sum() / len(rows))
        fits = shuffled["size"].cumsum() <= quota
        fits.iloc[0] = True
        chosen.extend(shuffled.index[fits])
    return rows[rows["group_id"].isin(chosen)].reset_index(drop=True)
