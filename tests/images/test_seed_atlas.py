"""`relook data import --seed-atlas`: a few confirmed images of each class go to train, and nothing held out does."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

from cluster.cli import run
from images.importer import import_folder
from records.datasets import load_dataset
from records.frames import Frame
from records.store import Store
from records.types import Group, Image, Split


def _atlas(folder: Path, codes: tuple[str, ...]) -> Path:
    """Three images of each class, in a folder per class."""
    for number, code in enumerate(codes * 3):
        (folder / code).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        image = PillowImage.fromarray(pixels).resize((80, 80), PillowImage.Resampling.BICUBIC)
        image.save(folder / code / f"a{number}.png")
    return folder


def test_an_atlas_goes_to_train_and_what_was_held_out_stays_so(
    store: Store, images_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = import_folder(store, images_folder, frames=(Frame(32),))
    rows = load_dataset(store, report.dataset_id).rows
    held = rows[rows["split"] == Split.TEST.value].iloc[0]
    with store.ledger.read() as tx:
        name = tx.require(Image, held["image_id"]).source_id
    atlas = _atlas(tmp_path / "atlas", store.taxonomy.codes)
    shutil.copy(next(images_folder.rglob(f"{name}.jpg")), atlas / held["label"] / "known.jpg")

    home = ["--set", f"records.home={store.home.root}", "--json"]
    assert run(["data", "import", "--seed-atlas", str(atlas), *home]) == 0
    said = json.loads(capsys.readouterr().out)
    assert "1 lesions were on held-out splits before and stay there, so training does not see them" in said["notes"]
    fresh = load_dataset(store, said["dataset_id"]).rows
    before = dict(zip(rows["image_id"], rows["split"], strict=True))
    splits = {row.image_id: row.split for row in fresh.itertuples()}
    assert {image_id: splits[image_id] for image_id in before} == before
    added = fresh[~fresh["image_id"].isin(rows["image_id"])]
    assert len(added) == 3 * len(store.taxonomy.codes)
    assert set(added["split"]) == {Split.TRAIN.value}
    with store.ledger.read() as tx:
        drawn = {group.drawn_by for group in tx.find(Group) if group.id in set(added["group_id"])}
    assert drawn == {"given"}

    # Two folders at once would leave open which of them is the atlas.
    assert run(["data", "import", str(images_folder), "--seed-atlas", str(atlas), *home]) == 2
    assert "or an atlas, with --seed-atlas DIR" in json.loads(capsys.readouterr().out)["error"]["message"]
