"""What a search may see."""

import pandas as pd
import pytest

from records.errors import ContractError
from records.types import Split
from tuning.subset import require_search_rows


def rows(groups_per_class: dict[str, int], images_per_group: int = 2, split: Split = Split.TRAIN) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "image_id": f"{label}-{group}-{image}",
                "group_id": f"{label}-{group}",
                "label": label,
                "split": split.value,
            }
            for label, count in groups_per_class.items()
            for group in range(count)
            for image in range(images_per_group)
        ]
    )


ROWS = rows({"nv": 6, "mel": 3, "df": 1})


@pytest.mark.parametrize("split", [Split.CALIBRATION, Split.GATE, Split.TEST])
def test_rows_of_other_splits_are_refused(split):
    foreign = rows({"nv": 1}, split=split)

    with pytest.raises(ContractError, match=f"a search may read train and val only, .* is on split {split.value}"):
        require_search_rows(pd.concat([ROWS, foreign], ignore_index=True))


def test_train_and_val_rows_pass():
    require_search_rows(pd.concat([ROWS, rows({"nv": 1}, split=Split.VAL)], ignore_index=True))
