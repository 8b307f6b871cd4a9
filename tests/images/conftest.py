"""Generated images that the data tests share, and small helpers to change copies of them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from images.synth import synthesize

LESIONS = 36


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated data folder; not to be changed."""
    folder = tmp_path_factory.mktemp("generated") / "data"
    synthesize(folder, lesions=LESIONS, seed=5, width_px=120)
    return folder


@pytest.fixture
def copied(generated: Path, tmp_path: Path) -> Path:
    """A copy of the generated folder that a test may change."""
    return Path(shutil.copytree(generated, tmp_path / "data"))


@pytest.fixture
def change_table(copied: Path) -> Callable[[Callable[[pd.DataFrame], pd.DataFrame]], Path]:
    """Rewrite the table of the copied folder; returns the folder."""

    def change(edit: Callable[[pd.DataFrame], pd.DataFrame]) -> Path:
        path = copied / "HAM10000_metadata.csv"
        edit(pd.read_csv(path, dtype=str, keep_default_na=False)).to_csv(path, index=False)
        return copied

    return change
