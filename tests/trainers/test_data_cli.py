"""The verbs of `relook data`: one JSON object on stdout, the rest on stderr."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from click.testing import Result
from PIL import Image as PillowImage
from typer.testing import CliRunner

from images.synth import synthesize
from records.errors import ConfigError, DataError
from records.settings import RecordsSettings
from trainers.cli.data import app
from trainers.settings import TrainersSettings

Run = Callable[..., Result]


@dataclass(frozen=True)
class RoomsSettings:
    """The two rooms that these verbs read."""

    records: RecordsSettings
    trainers: TrainersSettings


@pytest.fixture
def run(records_settings: RecordsSettings) -> Run:
    """Call a verb; an error is raised as it reaches the root command."""
    root = typer.Typer()

    @root.callback()
    def load(ctx: typer.Context) -> None:
        ctx.obj = lambda config, preset, sets: RoomsSettings(records_settings, TrainersSettings())

    root.add_typer(app, name="data")

    def call(*words: object) -> Result:
        return CliRunner().invoke(root, ["data", *map(str, words)], catch_exceptions=False)

    return call


def test_generate_import_audit_list(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    made = json.loads(run("synth", folder, "--lesions", 12, "--seed", 1, "--width", 80, "--json").stdout)
    assert made["lesions"] == 12
    imported = json.loads(run("import", folder, "--json").stdout)
    assert imported["images"] == imported["decoded"] == made["images"]
    audited = json.loads(run("audit", "--json").stdout)
    assert (audited["images"], audited["leaked_lesions"]) == (made["images"], 0)
    assert audited["random_split"]["test_images"] > 0
    assert json.loads(run("audit", "--data", folder, "--json").stdout) == audited
    assert json.loads(run("audit", "--data", imported["dataset_id"][:8], "--json").stdout) == audited
    versions = json.loads(run("versions", "--json").stdout)["versions"]
    assert [v["id"] for v in versions] == [imported["dataset_id"]]


def test_without_json_tables_are_printed(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    assert "8 lesions" in run("synth", folder, "--lesions", 8, "--width", 80).stdout
    (folder / "HAM10000_images_part_1" / "ISIC_9000001.jpg").unlink()
    result = run("import", folder)
    assert "missing): there is no image named ISIC_9000001" in " ".join(result.stderr.split())
    assert "images" in result.stdout
    assert "random split" in run("audit").stdout
    assert "groups" in run("versions").stdout


def test_many_rows_that_cannot_be_used_are_cut_short(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    synthesize(folder, lesions=20, seed=1, width_px=80)
    for path in sorted(folder.rglob("*.jpg"))[:30]:
        path.unlink()
    said = run("import", folder).stderr
    refused = said.count("not used (missing)")
    assert refused < 30
    assert f"... and {30 - refused} more; --json lists them all" in said


def test_an_export_says_what_it_holds_and_an_audit_is_written_as_a_page(run: Run, tmp_path: Path) -> None:
    folder, page = tmp_path / "data", tmp_path / "audit.html"
    synthesize(folder, lesions=12, seed=1, width_px=80)
    version = json.loads(run("import", folder, "--json").stdout)["dataset_id"]
    exported = run("export", version[:8], "--format", "imagefolder", "--out", tmp_path / "out")
    assert exported.exit_code == 0
    assert f"as dataset {version[:12]}; licences: " in " ".join(exported.stdout.split())
    run("audit", "--out", page)
    assert "<html" in page.read_text()


def test_audit_imports_a_new_folder_first(run: Run, tmp_path: Path) -> None:
    synthesize(tmp_path / "data", lesions=8, seed=1, width_px=80)
    assert json.loads(run("audit", "--data", tmp_path / "data", "--json").stdout)["lesions"] == 8


def test_columns_are_mapped(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    synthesize(folder, lesions=8, seed=1, width_px=80)
    table = folder / "HAM10000_metadata.csv"
    (folder / "mine.csv").write_text(table.read_text().replace("lesion_id,image_id,dx,", "mole,pic,diagnosis,"))
    table.unlink()
    with pytest.raises(DataError, match="no column 'image_id'"):
        run("import", folder)
    columns = "image=pic,dx=diagnosis,lesion=mole"
    result = json.loads(
        run("import", folder, "--columns", columns, "--table", "mine.csv", "--in-place", "--json").stdout
    )
    assert result["lesions"] == 8


def test_errors_reach_the_root_command(run: Run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data folder"):
        run("import", tmp_path / "nowhere")
    with pytest.raises(DataError, match="there is no data yet"):
        run("audit")


def test_preview_draws_generated_images_and_those_of_a_dataset(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "light.png"
    first = json.loads(run("preview", "light", "--out", out, "--images", 3, "--draws", 2, "--json").stdout)
    assert (first["images"], first["source"]) == (3, "generated images")
    with PillowImage.open(out) as sheet:
        assert sheet.format == "PNG"
    synthesize(tmp_path / "data", lesions=12, seed=1, width_px=80)
    result = run("preview", "light", "--out", out, "--images", 3, "--draws", 2, "--data", tmp_path / "data")
    assert "train images of dataset" in " ".join(result.stdout.split())
    with pytest.raises(ConfigError, match=r"--out .*light\.jpg is not a PNG"):
        run("preview", "light", "--out", tmp_path / "light.jpg")
    with pytest.raises(ConfigError, match="unknown augmentation policy 'strong'"):
        run("preview", "strong", "--out", out)


def test_a_download_that_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no dataset 'isic' to download"):
        run("download", "isic", "--out", tmp_path)
