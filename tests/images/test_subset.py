"""How a smaller part of the training images is drawn."""

import numpy as np
import pandas as pd
import pytest

from images.subset import grouped_subset
from records.errors import DataError


def rows(groups_per_class: dict[str, int], images_per_group: int = 2) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"image_id": f"{label}-{group}-{image}", "group_id": f"{label}-{group}", "label": label}
            for label, count in groups_per_class.items()
            for group in range(count)
            for image in range(images_per_group)
        ]
    )


ROWS = rows({"nv": 60, "mel": 30, "df": 10})


def test_groups_stay_whole_and_classes_keep_their_share():
    chosen = grouped_subset(ROWS, 100, seed=0)

    assert len(chosen) <= 100
    assert (chosen.groupby("group_id").size() == 2).all()
    assert chosen["label"].value_counts().to_dict() == {"nv": 60, "mel": 30, "df": 10}


def test_a_rare_class_keeps_at_least_one_group():
    chosen = grouped_subset(rows({"nv": 100, "df": 1}, images_per_group=3), 20, seed=0)

    assert (chosen["label"] == "df").sum() == 3
    assert len(chosen) <= 20 + 3


def test_the_draw_depends_on_the_seed_and_a_larger_one_contains_it():
    small, other, large = (grouped_subset(ROWS, n, seed=s) for n, s in ((60, 1), (60, 2), (120, 1)))

    assert small.equals(grouped_subset(ROWS, 60, seed=1))
    assert set(small["group_id"]) != set(other["group_id"])
    assert set(small["group_id"]) <= set(large["group_id"])


def test_the_order_of_the_rows_decides_nothing():
    shuffled = ROWS.iloc[np.random.default_rng(0).permutation(len(ROWS))]

    assert set(grouped_subset(shuffled, 60, seed=1)["image_id"]) == set(grouped_subset(ROWS, 60, seed=1)["image_id"])


@pytest.mark.parametrize("limit", [None, 200, 10_000])
def test_a_limit_that_is_not_reached_changes_nothing(limit):
    assert grouped_subset(ROWS, limit, seed=0).equals(ROWS)


def test_fewer_images_than_classes_are_refused():
    with pytest.raises(DataError, match=r"max_train_images is 2, but 3 classes need an image each"):
        grouped_subset(ROWS, 2, seed=0)
