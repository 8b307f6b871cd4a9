"""The generator: equal bytes for equal seeds, the official layout, several views per lesion, honest difficulty."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image as PillowImage
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import balanced_accuracy_score

from images.synth import SHARES, render, synthesize
from images.synth_lesion import LOOKALIKES, LOOKS, blend
from records.errors import ConfigError, DataError
from records.taxonomy import load_taxonomy


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def table_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "HAM10000_metadata.csv")


def test_equal_seeds_give_equal_bytes(tmp_path: Path) -> None:
    first = synthesize(tmp_path / "a", lesions=9, seed=3, width_px=100)
    second = synthesize(tmp_path / "b", lesions=9, seed=3, width_px=100)
    assert first.classes == second.classes
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    synthesize(tmp_path / "c", lesions=9, seed=4, width_px=100)
    ours, other = files_of(tmp_path / "a"), files_of(tmp_path / "c")
    images = [name for name in ours if name.endswith(".jpg")]
    assert images
    assert not any(ours[name] == other.get(name) for name in images)


def test_layout_is_the_official_one(generated: Path) -> None:
    table = table_of(generated)
    columns = ["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"]
    assert table.columns.tolist() == columns
    found = {p.stem: p for part in ("1", "2") for p in (generated / f"HAM10000_images_part_{part}").glob("*.jpg")}
    assert sorted(found) == sorted(table["image_id"])
    assert {p.parent.name for p in found.values()} == {"HAM10000_images_part_1", "HAM10000_images_part_2"}
    assert table["image_id"].min() == "ISIC_9000001"
    assert set(table["dx_type"]) <= {"histo", "follow_up", "consensus", "confocal"}
    for image_id, path in found.items():
        mask = np.asarray(PillowImage.open(generated / "masks" / f"{image_id}_segmentation.png"))
        with PillowImage.open(path) as image:
            assert image.format == "JPEG"
            assert image.size == (120, 90)
        assert mask.shape == (90, 120)
        assert set(np.unique(mask)) == {0, 255}


def test_lesions_have_several_images_and_one_diagnosis(generated: Path) -> None:
    lesions = table_of(generated).groupby("lesion_id")
    assert (lesions["dx"].nunique() == 1).all()
    assert set(lesions.size()) == {1, 2, 3}
    assert len(lesions) == 36


def test_classes_follow_their_shares(tmp_path: Path) -> None:
    report = synthesize(tmp_path / "data", lesions=20, seed=0, width_px=80, shares={"nv": 3.0, "mel": 1.0, "df": 0.01})
    counts = table_of(tmp_path / "data").groupby("dx")["lesion_id"].nunique().to_dict()
    assert counts == {"nv": 14, "mel": 5, "df": 1}
    assert report.images == len(table_of(tmp_path / "data"))
    assert list(report.classes) == ["nv", "mel", "df"]


def test_generator_and_taxonomy_know_the_same_classes() -> None:
    codes = sorted(load_taxonomy("ham10000").codes)
    assert sorted(LOOKS) == sorted(LOOKALIKES) == sorted(SHARES) == codes
    for code, others in LOOKALIKES.items():
        assert sum(others.values()) == pytest.approx(1.0), code
        assert code not in others


def test_views_of_a_lesion_differ_a_little() -> None:
    def mean_colour(number: int, view: int) -> np.ndarray:
        data = render("nv", seed=1, number=number, view=view)
        return np.asarray(PillowImage.open(io.BytesIO(data)).convert("RGB"), dtype=float).mean(axis=(0, 1))

    views = [mean_colour(2, view) for view in range(3)]
    others = [mean_colour(number, 0) for number in range(3, 9)]
    within = max(np.abs(views[0] - view).mean() for view in views[1:])
    between = np.mean([np.abs(views[0] - other).mean() for other in others])
    assert 0.2 < within < between


def test_size_is_a_parameter() -> None:
    small, large = (PillowImage.open(io.BytesIO(render("mel", seed=2, width_px=w))) for w in (200, 600))
    assert (small.size, large.size) == ((200, 150), (600, 450))


def test_a_killed_run_is_finished_and_a_finished_one_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    synthesize(folder, lesions=8, seed=1, width_px=80)
    whole = files_of(folder)
    (folder / "HAM10000_metadata.csv").unlink()
    next((folder / "masks").iterdir()).unlink()
    synthesize(folder, lesions=8, seed=1, width_px=80)
    assert files_of(folder) == whole
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    synthesize(folder, lesions=8, seed=1, width_px=80)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_the_folder_says_what_it_is(generated: Path) -> None:
    assert "not images" in json.loads((generated / "synth.json").read_text())["what"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lesions": 6}, "at least 7"),
        ({"seed": -1}, "0 or more"),
        ({"width_px": 20}, "at least 80"),
        ({"shares": {"zebra": 1.0}}, "no class 'zebra'"),
        ({"shares": {"nv": 0.0}}, "above 0"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        synthesize(tmp_path / "data", **{"lesions": 10, "seed": 1, **arguments})
    assert not (tmp_path / "data").exists()
    with pytest.raises(ConfigError, match="no class 'zebra'"):
        render("zebra", seed=1)


def test_other_peoples_folders_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        synthesize(tmp_path, lesions=8, seed=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt"]
    synthesize(tmp_path / "data", lesions=8, seed=1, width_px=80)
    with pytest.raises(DataError, match="other arguments"):
        synthesize(tmp_path / "data", lesions=8, seed=2, width_px=80)


def test_looks_blend_on_a_straight_line() -> None:
    assert blend(LOOKS["nv"], LOOKS["mel"], 0.0) == LOOKS["nv"]
    half = blend(LOOKS["nv"], LOOKS["mel"], 0.5)
    assert half.main == (127.0, 80.0, 58.0)
    assert half.veil == pytest.approx(0.3)


def test_colours_alone_do_not_tell_the_classes_apart() -> None:
    """The classes must be learnable, and not so easy that a look at the colours is enough."""

    def features(code: str, number: int) -> list[float]:
        image = PillowImage.open(io.BytesIO(render(code, seed=7, number=number, width_px=80))).convert("RGB")
        middle = np.asarray(image, dtype=float)[12:48, 20:60].reshape(-1, 3)
        return [*middle.mean(axis=0), *middle.std(axis=0), *np.percentile(middle, [5, 95], axis=0).ravel()]

    codes = list(LOOKS)
    x = np.array([features(code, 1000 * c + n) for c, code in enumerate(codes) for n in range(24)])
    y = np.repeat(np.arange(len(codes)), 24)
    train = np.arange(len(y)) % 3 != 0
    forest = RandomForestClassifier(60, random_state=0).fit(x[train], y[train])
    score = balanced_accuracy_score(y[~train], forest.predict(x[~train]))
    assert 0.3 < score < 0.85
