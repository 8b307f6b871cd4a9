"""`relook evaluate` and `relook explain` from the command line, on generated images."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from cluster.sources import load_settings
from images.importer import open_dataset
from records.errors import ConfigError, DataError, ImageError, IntegrityError, TaxonomyError, UnknownIdError
from records.models import register
from records.types import AuditEvent
from trainers.cli import app


@pytest.fixture(scope="module")
def bundle(filled_store, make_bundle):
    made = make_bundle(filled_store, "custom_cnn", side_px=32, dataset_id=open_dataset(filled_store, None).id)
    with filled_store.ledger.begin() as tx:
        register(tx, made)
    return made


@pytest.fixture(scope="module")
def run(filled_store):
    root = typer.Typer()
    root.add_typer(app)

    @root.callback()
    def with_settings(ctx: typer.Context) -> None:
        home = f"records.home={filled_store.home.root}"
        ctx.obj = lambda config, preset, sets: load_settings(config, preset, (home, *sets))

    def call(*arguments):
        result = CliRunner().invoke(root, [str(argument) for argument in arguments])
        if result.exception is not None:
            raise result.exception
        return result.stdout

    return call


@pytest.fixture
def some_image(images_folder):
    return next(iter(sorted(images_folder.rglob("ISIC_*.jpg"))))


def test_evaluate_prints_every_promised_key(run, bundle):
    printed = json.loads(run("evaluate", bundle.id[:10], "--json"))
    promised = {
        "model_id", "images", "lesions", "balanced_accuracy", "balanced_accuracy_ci", "accuracy", "macro_auc", "ece",
        "per_class", "key_class",
    }  # fmt: skip
    assert promised <= set(printed)
    assert printed["model_id"] == bundle.id
    assert printed["split"] == "val"
    assert list(printed["per_class"]) == list(bundle.document.taxonomy.codes)
    assert {"sensitivity", "specificity", "precision", "support"} <= set(printed["per_class"]["mel"])
    assert {"name", "sensitivity", "specificity", "threshold", "sensitivity_ci"} <= set(printed["key_class"])


def test_reading_test_is_audited(run, bundle, filled_store):
    def reads():
        with filled_store.ledger.read() as tx:
            return tx.count(AuditEvent, where={"action": "test.read"})

    before = reads()
    printed = json.loads(run("evaluate", bundle.id, "--split", "test", "--json"))
    assert reads() == before + 1 == printed["split_reads"]


def test_tables_hold_no_verdicts(run, bundle):
    shown = run("evaluate", bundle.path, "--split", "gate")
    assert "balanced accuracy" in shown
    assert "gate was read" in shown
    for verdict in ("benign", "safe", "no cancer", "nan"):
        assert verdict not in shown.lower()


def test_any_labelled_folder_can_be_evaluated(run, bundle, images_folder):
    table = images_folder / "HAM10000_metadata.csv"
    printed = json.loads(run("evaluate", bundle.id, "--images", images_folder, "--labels", table, "--json"))
    frame = pd.read_csv(table)
    assert printed["images"] == len(frame)
    assert printed["lesions"] == frame["lesion_id"].nunique()
    assert printed["dataset_id"] is None
    assert {code: report["support"] for code, report in printed["per_class"].items()} == {
        code: int((frame["dx"] == code).sum()) for code in bundle.document.taxonomy.codes
    }


@pytest.fixture
def labelled(images_folder, tmp_path):
    """A folder of three images whose table a test may spoil: (folder, write_table)."""
    for path in sorted(images_folder.rglob("ISIC_*.jpg"))[:3]:
        shutil.copy(path, tmp_path)
    names = sorted(path.stem for path in tmp_path.glob("*.jpg"))

    def write(image_ids=names, dx=("mel", "nv", "bcc"), column="dx"):
        pd.DataFrame({"image_id": image_ids, column: dx}).to_csv(tmp_path / "t.csv", index=False)
        return ["--images", tmp_path, "--labels", tmp_path / "t.csv"]

    return names, tmp_path, write


def test_a_folder_without_lesions_and_with_its_own_columns(run, bundle, labelled):
    _, _, write = labelled
    printed = json.loads(run("evaluate", bundle.id, *write(column="truth"), "--columns", "dx=truth", "--json"))
    assert (printed["images"], printed["lesions"], printed["groups"]) == (3, 3, 3)


def test_rows_that_cannot_be_evaluated_are_refused_and_named(run, bundle, labelled):
    names, folder, write = labelled
    for table, message in (
        ({"dx": ("mel", "scc", "nv")}, f"1 of 3 .* {names[1]} has the class 'scc'"),
        ({"dx": ("mel", "", "nv")}, f"{names[1]} has no diagnosis"),
        ({"image_ids": [names[0], names[0], names[1]]}, f"{names[0]} is listed twice"),
        ({"image_ids": [*names[:2], "ISIC_9999999"]}, "no image named ISIC_9999999"),
        ({"column": "label"}, "no column 'dx'"),
    ):
        with pytest.raises(DataError, match=message):
            run("evaluate", bundle.id, *write(**table))
    with pytest.raises(DataError, match="no data folder"):
        run("evaluate", bundle.id, "--images", folder / "absent", "--labels", folder / "t.csv")


def test_a_truncated_image_is_named(run, bundle, labelled):
    names, folder, write = labelled
    path = folder / f"{names[2]}.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ImageError, match=f"{names[2]}.*damaged"):
        run("evaluate", bundle.id, *write())


def test_arguments_that_do_not_fit_are_refused(run, bundle, tmp_path, some_image):
    with pytest.raises(ConfigError, match="belong together"):
        run("evaluate", bundle.id, "--images", tmp_path)
    with pytest.raises(UnknownIdError, match="no model is called"):
        run("evaluate", "ffffffffff")
    with pytest.raises(UnknownIdError, match="no dataset version"):
        run("evaluate", bundle.id, "--data", "ffffffffff")
    with pytest.raises(ConfigError, match="must be one of gradcam"):
        run("explain", bundle.id, some_image, "--method", "tea_leaves", "--out", tmp_path / "o.png")
    with pytest.raises(DataError, match="cannot be read"):
        run("explain", bundle.id, tmp_path / "absent.jpg", "--out", tmp_path / "o.png")
    with pytest.raises(TaxonomyError, match="unknown class 'scc'"):
        run("explain", bundle.id, some_image, "--target", "scc", "--out", tmp_path / "o.png")
    with pytest.raises(ConfigError, match="cannot be written"):
        run("explain", bundle.id, some_image, "--out", tmp_path / "absent" / "o.png")


def test_a_bundle_of_another_decoder_is_refused_before_a_read_is_recorded(
    run, bundle, filled_store, make_bundle, some_image, tmp_path
):
    geometry = bundle.document.geometry.model_copy(update={"decode_version": 2})
    other = make_bundle(filled_store, "custom_cnn", side_px=32, geometry=geometry)
    sentence = "trained with images of decoder 2, and this release has decoder 1; train the model again"
    with filled_store.ledger.read() as tx:
        before = tx.count(AuditEvent)
    with pytest.raises(IntegrityError, match=sentence):
        run("explain", other.path, some_image, "--out", tmp_path / "o.png")
    with pytest.raises(IntegrityError, match=sentence):
        run("explain", other.path, some_image, "--method", "activations", "--out", tmp_path / "o.png")
    with pytest.raises(IntegrityError, match=sentence):
        run("evaluate", other.path, "--split", "test")
    with filled_store.ledger.read() as tx:
        assert tx.count(AuditEvent) == before


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        ("gradcam", [1, 1]),
        ("integrated_gradients", [32, 32]),
        ("gradient_shap", [32, 32]),
        ("occlusion", [32, 32]),
    ],
)
def test_explain_draws_an_overlay_and_prints_the_values(method, shape, run, bundle, some_image, tmp_path):
    out = tmp_path / "overlay.png"
    printed = json.loads(
        run("explain", bundle.id, some_image, "--method", method, "--target", "mel", "--out", out, "--json")
    )
    with Image.open(out) as drawn:
        assert drawn.size == (512, 512)
    assert (printed["method"], printed["target"], printed["shape"]) == (method, "mel", shape)
    assert np.shape(printed["values"]) == tuple(shape)
    assert printed["exact"] == (method == "gradcam")
    assert printed["layer"] == ("features.classifier" if method == "gradcam" else None)
    assert sum(printed["probabilities"].values()) == pytest.approx(1.0)


def test_a_report_with_everything_measured(run, make_bundle, filled_store, images_folder, tmp_path):
    table = images_folder / "HAM10000_metadata.csv"
    bundle = make_bundle(filled_store, "custom_cnn", side_px=64)
    few = pd.read_csv(table).groupby("dx").head(3)
    few.to_csv(tmp_path / "few.csv", index=False)
    masks = tmp_path / "masks"
    masks.mkdir()
    for name in few["image_id"][:4]:
        square = np.zeros((60, 80), dtype=np.uint8)
        square[20:40, 30:50] = 255
        Image.fromarray(square).save(masks / f"{name}_segmentation.png")
    printed = json.loads(
        run(
            "evaluate",
            bundle.path,
            "--images",
            images_folder,
            "--labels",
            tmp_path / "few.csv",
            "--masks",
            masks,
            "--robustness",
            "--explanations",
            "--report",
            tmp_path / "report",
            "--json",
        )
    )
    points = printed["robustness"]["attacks"]["pgd"]
    assert points[0]["epsilon"] == 0.0
    assert points[-1]["accuracy"] <= points[0]["accuracy"]
    assert printed["explanations"]["method"] == "gradcam"
    html = (tmp_path / "report" / "report.html").read_text()
    for heading in ("Can the heat maps be believed?", "What a hostile change", "Class by class"):
        assert heading in html
    assert json.loads((tmp_path / "report" / "metrics.json").read_text()) == printed


def test_images_are_embedded_only_in_reports_outside_the_home(run, bundle, filled_store):
    report = filled_store.home.bundles / bundle.id / "report"
    for where in ((), ("--report", report)):
        with pytest.raises(ConfigError, match="outside the home"):
            run("evaluate", bundle.path, "--embed-images", *where, "--json")
    assert not report.exists()


def test_a_prevalence_can_be_stated(run, make_bundle, filled_store):
    from records.bundles import Calibration

    codes = filled_store.taxonomy.codes
    calibrated = make_bundle(
        filled_store, "custom_cnn", seed=5, side_px=32, dataset_id=open_dataset(filled_store, None).id,
        calibration=Calibration(bias=[0.0] * 7, priors=dict.fromkeys(codes, 1 / 7)),
    )  # fmt: skip
    printed = json.loads(run("evaluate", calibrated.path, "--prevalence", "nv=0.94", "--json"))
    assert printed["prevalence"] == pytest.approx(dict.fromkeys(codes, 0.01) | {"nv": 0.94})
    with pytest.raises(ConfigError, match="not of the form nv="):
        run("evaluate", calibrated.path, "--prevalence", "nv")
    with pytest.raises(ConfigError, match="is no folder"):
        run("evaluate", calibrated.path, "--masks", "/absent")


def test_versus_and_activations(run, bundle, some_image, tmp_path):
    out = tmp_path / "o.png"
    printed = json.loads(
        run(
            "explain",
            bundle.id,
            some_image,
            "--method",
            "integrated_gradients",
            "--target",
            "mel",
            "--versus",
            "nv",
            "--out",
            out,
            "--json",
        )
    )
    assert printed["versus"] == "nv"
    assert printed["completeness_error"] <= 0.02 or printed["steps"] == 400
    printed = json.loads(
        run("explain", bundle.id, some_image, "--method", "activations", "--layer", "block3", "--out", out, "--json")
    )
    assert printed["layer"] == "block3"
    assert printed["shape"] == [8, 32, 32]
    with pytest.raises(ConfigError, match=r"no layer 'block99'; there are block1, block2"):
        run("explain", bundle.id, some_image, "--method", "activations", "--layer", "block99", "--out", out)
    with pytest.raises(ConfigError, match="--layer belongs to --method activations"):
        run("explain", bundle.id, some_image, "--layer", "block1", "--out", out)
    with pytest.raises(ConfigError, match="name another one"):
        run("explain", bundle.id, some_image, "--target", "mel", "--versus", "mel", "--out", out)


def test_explain_prints_a_summary(run, bundle, some_image, tmp_path):
    shown = run("explain", bundle.path, some_image, "--out", tmp_path / "o.png").replace("\n", "")
    assert "gradcam for" in shown
    assert "probability" in shown
