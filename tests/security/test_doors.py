"""Small ways in: formulas in tables, keys in logs, packages and images that somebody replaced."""

import csv
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from records.errors import ConfigError
from records.models import find_bundle
from records.store import Store
from serving.bulk import predict_folder
from serving.settings import ServingSettings

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("requirements.lock", ".ci/audit.lock", "labeling/label_studio_requirements.lock")


@pytest.mark.parametrize("name", ["=1+1.jpg", "@SUM(A1).jpg", "-2+3|cmd.jpg", "+1.jpg", "\t=1.jpg", "\uff1d1.jpg"])
def test_no_cell_of_a_table_is_a_formula(
    name: str, service_store: Store, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / name).write_bytes(make_image(0))
    (folder / "plain.jpg").write_bytes(make_image(1))
    out = tmp_path / "table.csv"
    predict_folder(find_bundle(service_store, "champion"), folder, out, ServingSettings())
    with out.open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert {f"'{name}", "plain.jpg"} <= set(cells)
    assert [cell for cell in cells if re.match(r"\s*[=+@\uff1d]|\s*-\D", cell)] == []


@pytest.mark.parametrize("shown", [["--json"], []])
def test_a_key_that_goes_to_a_file_is_in_no_output(shown: list[str], tmp_path: Path) -> None:
    arguments = ["keys", "create", "app", "--organisation", "north", *shown, "--key-file", str(tmp_path / "key")]
    environment: dict[str, Any] = {"RELOOK_HOME": str(tmp_path / "home")}
    done = CliRunner().invoke(app, arguments, env=environment)
    assert done.exit_code == 0, done.output
    token = (tmp_path / "key").read_text().strip()
    assert len(token) > 20
    assert token not in done.output
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    # A file that is there already is kept, and no key is made that nobody has.
    again = CliRunner().invoke(app, arguments, env=environment)
    assert isinstance(again.exception, ConfigError)
    assert (tmp_path / "key").read_text().strip() == token
    listed = CliRunner().invoke(app, ["keys", "list", "--json"], env=environment)
    assert listed.output.count('"name"') == 1


@pytest.mark.parametrize("name", LOCKS)
def test_every_pin_of_every_lock_has_hashes(name: str) -> None:
    pins = [
        line
        for line in (ROOT / name).read_text().replace(" \\\n", " ").splitlines()
        if line and not line.startswith("#")
    ]
    assert len(pins) > 30
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==\S+( +--hash=sha256:[0-9a-f]{64})+", pin)] == []


def test_every_image_of_others_is_named_by_digest() -> None:
    """Only our own image, and Ray's on a cluster that `ray up` starts, are named by their versions."""
    deploy = ROOT / "cluster" / "deploy"
    named = [
        line.split("#")[0].strip()
        for path in (*deploy.rglob("*.yaml"), *deploy.glob("Dockerfile"))
        for line in path.read_text().splitlines()
        if re.match(r"\s*(- )?(image: |FROM |ARG \w*IMAGE=)", line)
    ]
    ours = re.compile(r"image: (relook|\$\{RELOOK_IMAGE:-relook\})|FROM \$\{PYTHON_IMAGE\} AS \w+")
    others = [line for line in named if not ours.fullmatch(line)]
    assert len(others) >= 7
    assert [line for line in others if not re.search(r"@sha256:[0-9a-f]{64}$", line)] == []


def test_packages_come_from_one_index_and_are_compared_with_their_hashes() -> None:
    makefile, dockerfile = (ROOT / "Makefile").read_text(), (ROOT / "cluster/deploy/Dockerfile").read_text()
    installs = re.findall(r"^.*(?:install|PIP\)).* -r \S+", makefile + dockerfile, re.MULTILINE)
    assert len(installs) == 3
    assert [line for line in installs if "--require-hashes" not in line] == []
    assert re.findall("index[-_]url", makefile + dockerfile) == []
