"""The Python interface: every example of docs/python.md runs, and what the calls promise holds.

The examples run once, in one home, and the tests use what they left.
"""

import inspect
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import relook
from records.progress import stderr

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "python.md").read_text()
BLOCK = re.compile(r"(<!-- needs Ray -->\n)?```python\n(.*?)```", re.DOTALL)
CALLS = (
    "open_home", "import_images", "train", "combine", "tune", "evaluate", "load_model", "explain", "select",
    "sync_labels", "run_round",
)  # fmt: skip

# Importing Ray raises its own deprecation warnings.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")


def run_block(code: str, names: dict[str, Any]) -> None:
    line = PAGE[: PAGE.index(code)].count("\n")
    # Empty lines before, so that a traceback names the line of the page.
    exec(compile("\n" * line + code, "docs/python.md", "exec"), names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty working folder."""
    before = os.getcwd()
    made = tmp_path_factory.mktemp("python")
    os.chdir(made)
    yield made
    os.chdir(before)


@pytest.fixture(scope="module")
def names(folder: Path, one_thread: None) -> Iterator[dict[str, Any]]:
    """The variables that the examples without Ray leave."""
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\..*")
        for needs_ray, code in BLOCK.findall(PAGE):
            if not needs_ray:
                run_block(code, found)
    yield found
    found["home"].close()


def test_the_page_has_every_call_with_an_example() -> None:
    examples = "\n".join(code for _, code in BLOCK.findall(PAGE))
    assert [name for name in CALLS if f"relook.{name}(" not in examples] == []
    assert [name for name in CALLS if f"| `{name}(" not in PAGE] == []
    assert set(CALLS) < set(relook.__all__)


def test_the_examples_do_what_the_page_says(names: dict[str, Any], folder: Path) -> None:
    assert names["home"].settings.trainers.optimizer.momentum == 0.9
    assert sum(names["report"].splits.values()) == names["report"].images
    assert names["model"].report.is_file()
    shares = {member.model_id: member.weight for member in names["both"].bundle.document.members}
    assert shares == {names["model"].id: pytest.approx(2 / 3), names["other"].id: pytest.approx(1 / 3)}
    assert names["both"].bundle.document.views == names["model"].bundle.document.views
    low, high = names["figures"].balanced_accuracy_ci
    assert 0 <= low <= high <= 1
    assert names["loaded"].id == names["model"].id
    assert names["chosen"].selected == 5
    assert names["outcome"].record.finished_at is not None
    assert set(names["outcome"].results) >= {"collect", "fit", "gate", "push"}
    assert len(names["scores"]) == 2
    with Image.open(folder / "why.png") as drawn:
        assert drawn.size == (512, 512)


def test_predictions_are_those_of_the_command(names: dict[str, Any], folder: Path) -> None:
    from cluster.cli import run

    some = folder / "some"
    some.mkdir()
    for path in names["files"]:
        (some / path.name).symlink_to(path.absolute())
    model = names["model"]
    where = ["--set", f"records.home={folder / 'my-home'}"]
    assert run(["predict", str(model.path), str(some), "--out", str(folder / "out.csv"), *where]) == 0
    import pandas as pd

    by_command = pd.read_csv(folder / "out.csv").set_index("image")
    for one in names["predictions"]:
        row = by_command.loc[Path(one.image).name]
        assert (row["decision"], row["label"]) == (one.decision, one.label)
        assert [row[f"p_{code}"] for code in model.classes] == pytest.approx(list(one.probabilities.values()), abs=1e-6)


def test_every_way_to_give_an_image_is_the_same_image(names: dict[str, Any]) -> None:
    # A JPEG is decoded at a reduced scale, an array is not, so values differ a little.
    path, *others = [names["predictions"][0], *names["same"]]
    for other in others:
        assert list(other.probabilities.values()) == pytest.approx(list(path.probabilities.values()), abs=0.02)
    assert names["same"][0].probabilities == pytest.approx(path.probabilities, abs=1e-6)
    assert names["same"][1].probabilities == names["same"][2].probabilities


def test_a_prediction_has_what_a_notebook_needs(names: dict[str, Any]) -> None:
    found = names["loaded"].predict(names["files"], heat_maps=True)
    for one in found:
        assert sum(one.probabilities.values()) == pytest.approx(1)
        assert one.heat_map.shape == (32, 32)
        assert 0 <= one.heat_map.min() <= one.heat_map.max() <= 1
        assert one.ood_score > 0
        assert set(one.prediction_set) <= set(names["model"].classes)
    table = found.to_frame()
    assert list(table["image"]) == [str(path) for path in names["files"]]
    assert {"label", "decision", "prediction_set", "ood_score", "p_mel"} <= set(table.columns)
    assert names["loaded"].predict([]).to_frame().empty


def test_heat_maps_are_arrays_over_the_image(names: dict[str, Any]) -> None:
    why, against = names["why"], names["against"]
    assert why.heat_map.shape == why.image.shape[:2] == why.overlay().shape[:2]
    assert 0 <= why.heat_map.min() <= why.heat_map.max() <= 1
    assert why.image.dtype == why.overlay().dtype == np.uint8
    assert against.values.min() < 0 <= against.heat_map.min()
    by_name = relook.explain(names["model"].path, names["files"][0])
    assert np.array_equal(by_name.heat_map, why.heat_map)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (b"not an image", "image 0: "),
        (np.zeros((4, 4, 3)), "image 0: an array is float64"),
        (np.zeros((4, 4, 4), dtype=np.uint8), "uint8"),
        (object(), "object is not a list of images"),
        ([3], "image 0: a int is not an image"),
        ("photos", "is a folder; give its files"),
        (["absent.jpg"], "cannot be read"),
    ],
)
def test_what_is_no_image_is_refused_with_a_sentence(names: dict[str, Any], image: Any, sentence: str) -> None:
    with pytest.raises(relook.DataError, match=re.escape(sentence)):
        names["model"].predict(image)


def test_an_unreadable_image_can_keep_its_row(names: dict[str, Any]) -> None:
    good = names["files"][0]
    rows = names["model"].predict([good, b"broken", "absent.jpg", good], errors="keep")
    assert [one.error is None for one in rows] == [True, False, False, True]
    assert rows[0].probabilities == pytest.approx(rows[3].probabilities)
    assert list(rows.to_frame()["error"].notna()) == [False, True, True, False]


def test_turned_transparent_and_grey_pillow_images_are_read_as_their_files(names: dict[str, Any], folder: Path) -> None:
    turned = Image.open(names["files"][0])
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif, quality=95)
    clear = Image.open(names["files"][0]).convert("RGBA")
    clear.putalpha(120)
    clear.save(folder / "clear.png")
    for made in (folder / "turned.jpg", folder / "clear.png"):
        by_path, by_image = names["model"].predict([made, Image.open(made)])
        assert list(by_path.probabilities.values()) == pytest.approx(list(by_image.probabilities.values()), abs=0.02)
    for mode in ("L", "CMYK", "P"):
        assert names["model"].predict(Image.open(names["files"][0]).convert(mode))[0].error is None


def test_wrong_arguments_name_what_is_right(names: dict[str, Any]) -> None:
    home, model = names["home"], names["model"]
    with pytest.raises(relook.ConfigError, match=r"did you mean trainers\.epochs"):
        relook.train(home, set={"trainers.epoch": 3})
    with pytest.raises(relook.ConfigError, match="give it to open_home"):
        relook.train(home, set={"records.home": "elsewhere"})
    with pytest.raises(relook.RefusedError, match="were trained on dataset"):
        # The round built a version of the same images, so the settings are those of the first training.
        relook.train(home, model.bundle.document.dataset_id)
    with pytest.raises(relook.ConfigError, match="2 numbers above 0"):
        relook.combine(home, [model, names["other"]], weights=[1])
    with pytest.raises(relook.ConfigError, match=r"did you mean trainers\.views"):
        relook.combine(home, [model, names["other"]], set={"trainers.view": 2})
    with pytest.raises(relook.ConfigError, match="train, val, calibration, gate, test"):
        relook.evaluate(home, model, split="hold-out")  # type: ignore[arg-type]
    with pytest.raises(relook.ConfigError, match="gradcam"):
        relook.explain(model, names["files"][0], method="magic")
    with pytest.raises(relook.TaxonomyError, match="unknown class"):
        relook.explain(model, names["files"][0], target="cat")
    with pytest.raises(relook.ConfigError, match="least_confidence"):
        relook.select(home, model, rule="luck")
    with pytest.raises(relook.ConfigError, match="at least 1 image"):
        relook.select(home, model, budget=0)
    with pytest.raises(relook.ConfigError, match="raise or keep"):
        model.predict(names["files"], errors="ignore")
    with pytest.raises(AttributeError, match="no attribute 'tran'"):
        relook.tran  # noqa: B018


def test_settings_of_other_types_are_taken_as_written(folder: Path) -> None:
    values = {
        "labeling.readers": ("a@example.org", "b@example.org"),
        "trainers.early_stop_patience_epochs": None,
        "serving.page": False,
        "trainers.optimizer.learning_rate": 1e-5,
        "tuning.space": ["optimizer.learning_rate=1e-3..1e-1"],
    }
    with relook.open_home(folder / "typed", set=values) as home:
        assert home.settings.labeling.readers == ("a@example.org", "b@example.org")
        assert home.settings.trainers.early_stop_patience_epochs is None
        assert home.settings.serving.page is False
        assert home.settings.trainers.optimizer.learning_rate == 1e-5
        assert home.with_settings({"trainers.epochs": 7}).trainers.epochs == 7
        assert home.settings.tuning.space == ("optimizer.learning_rate=1e-3..1e-1",)
    home.close()


def test_every_call_has_types_and_a_docstring() -> None:
    public = [getattr(relook, name) for name in CALLS] + [relook.Model.predict, relook.Model.explain]
    for call in public:
        signature = inspect.signature(call)
        assert inspect.getdoc(call), call
        untyped = [p.name for p in signature.parameters.values() if p.name != "self" and p.annotation is p.empty]
        assert untyped == [], call
        assert signature.return_annotation is not signature.empty, call
        described = inspect.getdoc(call) or ""
        if call is not relook.Model.explain:
            names = [p.name for p in signature.parameters.values() if p.name not in ("self", "set")]
            assert [name for name in names if f"{name}: " not in described] == [], call
            assert "Returns:" in described, call


def test_importing_loads_neither_torch_nor_ray() -> None:
    script = (
        "import sys, relook; heavy = {'torch', 'ray', 'pandas', 'sklearn', 'sqlalchemy'}; "
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_room_imports_the_python_interface() -> None:
    # Import-linter knows packages only.
    rooms = ("records", "images", "vision", "trainers", "tuning", "serving", "labeling", "cluster")
    files = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    importing = re.compile(r"^\s*(import relook|from relook)\b", re.MULTILINE)
    assert [str(path) for path in files if importing.search(path.read_text())] == []


def test_progress_is_on_stderr(names: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    assert not stderr.is_terminal
    relook.evaluate(names["home"], names["model"])
    out, err = capfd.readouterr()
    assert out == ""
    assert "Predicting val" in err


@pytest.mark.soak
def test_the_example_of_a_search(names: dict[str, Any], ray_session: object) -> None:
    codes = [code for needs_ray, code in BLOCK.findall(PAGE) if needs_ray]
    assert len(codes) == 1
    run_block(codes[0], names)
    search = names["search"]
    assert len(search.report.leaderboard) == 2
    assert search.page.is_file()
    assert search.model.classes == names["model"].classes
