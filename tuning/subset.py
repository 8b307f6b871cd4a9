"""Which rows a search sees: train and val, nothing else; optionally a small, fair part of train.

In: the rows of a dataset version. Out: rows.
"""

from dataclasses import replace

import pandas as pd

from images.grouping import grouped_subset
from records.datasets import DatasetVersion
from records.errors import ContractError, DataError
from records.types import Split

SEARCH_SPLITS = (Split.TRAIN, Split.VAL)


def searched_part(dataset: DatasetVersion, max_train_images: int | None, seed: int) -> DatasetVersion:
    """Return what a search sees of a dataset version: val, and train or a part of it.

    Args:
        dataset: the version.
        max_train_images: of the part; None takes all.
        seed: of the draw.
    Returns:
        The version with these rows only, under its own id.
    Raises:
        DataError: train or val is empty, or fewer images are allowed than there are classes.
    """
    train, val = dataset.split(Split.TRAIN), dataset.split(Split.VAL)
    for name, rows in (("train", train), ("val", val)):
        if rows.empty:
            raise DataError(f"dataset {dataset.id[:12]} has no image on the {name} split; import or label some")
    part = pd.concat([grouped_subset(train, max_train_images, seed), val], ignore_index=True)
    require_search_rows(part)
    return replace(dataset, rows=part)


def require_search_rows(rows: pd.DataFrame) -> None:
    """Refuse rows that no search may see.

    Args:
        rows: columns of ManifestRow.
    Raises:
        ContractError: a row is on another split than train or val (names the split and the image).
    """
    foreign = rows[~rows["split"].isin([split.value for split in SEARCH_SPLITS])]
    if not foreign.empty:
        first = foreign.iloc[0]
        raise ContractError(
            f"a search may read train and val only, but image {first['image_id'][:12]} is on split {first['split']}"
        )
