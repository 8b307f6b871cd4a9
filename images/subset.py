"""A small, fair part of the training images: groups stay whole and classes keep their proportions."""

import numpy as np
import pandas as pd

from records.errors import DataError


def grouped_subset(rows: pd.DataFrame, max_images: int | None, seed: int) -> pd.DataFrame:
    """Take whole groups until about `max_images` images are chosen, each class in its proportion.

    A class gets its share of the images, rounded down, and at least one group, even where that
    group is larger than the share; so the subset may be larger than asked by a few images of rare
    classes and is otherwise at most that large.

    Args:
        rows: of one split; columns image_id, group_id, label; N >= 1.
        max_images: None, or at least N, takes all.
        seed: of the draw; a larger subset of the same seed is drawn in the same order.
    Returns:
        The chosen rows, in their order, with a fresh index.
    Raises:
        DataError: fewer images are allowed than there are classes.
    """
    if max_images is None or max_images >= len(rows):
        return rows.reset_index(drop=True)
    groups = rows.groupby("group_id", sort=True).agg(label=("label", "first"), size=("image_id", "size"))
    classes = sorted(groups["label"].unique())
    if max_images < len(classes):
        raise DataError(
            f"max_train_images is {max_images}, but {len(classes)} classes need an image each; "
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
