"""The project itself: what is declared is used and pinned, the layout holds, nothing ties it to one machine."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark.expression import Expression
from packaging.requirements import Requirement
from packaging.version import Version

from bench.drills.soak import parts

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("records", "images", "vision", "trainers", "tuning", "serving", "labeling", "cluster")
ENTRIES = (*ROOMS, "relook.py", "tests", "bench", "docs", "ray_cluster.yaml")
FILES = (
    "pyproject.toml",
    "requirements.lock",
    "Makefile",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    ".ci/run",
)
EIGHT = {"torch", "torchvision", "ray", "albumentations", "captum", "label-studio-sdk", "pandas", "pyarrow"}
MODULES = {
    "crowd-kit": "crowdkit",
    "scikit-learn": "sklearn",
    "imagehash": "imagehash",
    "label-studio-sdk": "label_studio_sdk",
    "mlflow-skinny": "mlflow",
    "opencv-python-headless": "cv2",
    "opentelemetry-sdk": "opentelemetry",
    "pillow": "PIL",
    "pyyaml": "yaml",
}
# Declared, and used without an import of ours.
UNSEEN = {"python-multipart": "starlette reads forms through it"}
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def _project() -> dict[str, Any]:
    document: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return document


def _declared() -> dict[str, Requirement]:
    found = [Requirement(text) for text in _project()["project"]["dependencies"]]
    return {_canonical(requirement.name): requirement for requirement in found}


@cache
def _locked() -> dict[str, Version]:
    lines = (ROOT / "requirements.lock").read_text().replace(" \\\n", " ").splitlines()
    pairs = [line.split()[0].split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "every line of the lock is name==version"
    return {_canonical(name): Version(version) for name, version in pairs}


@cache
def _tracked() -> list[Path]:
    """Files of the project: what git tracks, and what it would track."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@cache
def _modules_imported() -> set[str]:
    found: set[str] = set()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module.partition(".")[0])
    return found


def _closure(requirements: list[Requirement]) -> set[str]:
    """Return the names of everything that requirements bring along on this machine."""
    todo, seen = list(requirements), set()
    while todo:
        requirement = todo.pop()
        key = (_canonical(requirement.name), tuple(sorted(requirement.extras)))
        if key in seen:
            continue
        seen.add(key)
        extras = ("", *requirement.extras)
        for text in metadata.requires(requirement.name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    return {name for name, _ in seen}


def test_the_layout_is_the_one_that_the_readme_shows() -> None:
    assert not [name for name in ENTRIES if not (ROOT / name).exists()]
    assert not [name for name in FILES if not (ROOT / name).is_file()]
    assert not [name for name in ("bench", "docs", "tests") if not any((ROOT / name).rglob("*.*"))]
    tree = (ROOT / "README.md").read_text()
    assert not [name for name in ENTRIES if name not in tree]


def test_the_eight_packages_are_declared_and_used() -> None:
    assert EIGHT - set(_declared()) == set()
    assert {MODULES.get(name, name.replace("-", "_")) for name in EIGHT} - _modules_imported() == set()
    assert _declared()["ray"].extras == {"train", "tune", "serve"}
    assert str(_declared()["albumentations"].specifier) == "==2.0.8"


def test_what_is_declared_is_imported_and_what_is_imported_is_declared() -> None:
    modules = {MODULES.get(name, name.replace("-", "_")) for name in _declared() if name not in UNSEEN}
    imported = {name for name in _modules_imported() if name not in sys.stdlib_module_names and name not in ROOMS}
    assert modules - imported == set()
    groups = _project()["project"]["optional-dependencies"]
    extras = [Requirement(text).name for name, group in groups.items() if name != "dev" for text in group]
    optional = {MODULES.get(name, name.replace("-", "_")) for name in extras}
    assert imported - modules - optional - {"pydantic_core"} == set()


def test_the_lock_pins_exactly_what_is_needed() -> None:
    extras = [Requirement(t) for group in _project()["project"]["optional-dependencies"].values() for t in group]
    needed = _closure([*_declared().values(), *extras]) | {"setuptools"}
    assert needed - set(_locked()) == set()
    assert set(_locked()) - needed == set()
    for name, requirement in _declared().items():
        assert requirement.specifier.contains(_locked()[name]), (
            f"{name} {_locked()[name]} is not {requirement.specifier}"
        )


def test_this_environment_is_the_locked_one() -> None:
    differing = {n: metadata.version(n) for n, v in _locked().items() if Version(metadata.version(n)) != v}
    assert differing == {}


def test_the_changelog_knows_the_version() -> None:
    version = _project()["project"]["version"]
    assert version == metadata.version("relook")
    assert re.search(rf"^## \[{re.escape(version)}\] - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_nothing_ties_the_project_to_one_machine() -> None:
    # Written in pieces, so that this file does not find itself.
    tied = re.compile(
        "|".join(["/wo" + "rk/", "/ro" + "ot/", "[^-]index" + "-url", "trusted" + "-host", r"git\+ht" + "tps"])
    )
    found: list[str] = []
    for path in _tracked():
        if path.suffix in {".png", ".jpg", ".ico", ".npz", ".gz"}:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if tied.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_no_image_of_a_patient_and_no_secret_is_tracked() -> None:
    names = [path.relative_to(ROOT).as_posix() for path in _tracked()]
    assert not [name for name in names if "ISIC_" in name or name.endswith((".db", ".safetensors", "auth_token"))]
    assert not [name for name in names if name.startswith((".relook/", ".venv/"))]


def test_functions_fit_a_screen_and_files_hold_one_idea() -> None:
    long: list[str] = []
    inside = (path for folder in (*ROOMS, "bench", "tests") for path in (ROOT / folder).rglob("*.py"))
    for path in (ROOT / "relook.py", *inside):
        if path.parent.name == "versions":
            continue  # a migration spells out a whole schema and is never edited again
        text = path.read_text()
        if (lines := text.count("\n")) > MAX_FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines")
    assert long == []


def test_every_module_says_what_it_holds() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if "versions" not in path.parts and ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert silent == []


@pytest.mark.parametrize("name", ["ray.train", "ray.tune", "ray.serve", "fastapi", "label_studio_sdk"])
@pytest.mark.parametrize("place", ["cluster/round.py", "trainers/fitting/loop.py", "records/types/base.py"])
def test_an_engine_is_refused_outside_its_files(name: str, place: str) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", place, "-"]
    found = subprocess.run(command, input=f"import {name}\n", capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.returncode == 1
    assert "TID251" in found.stdout


def test_the_api_and_the_page_load_no_network() -> None:
    """Each would hold 300 MB more, and start seconds later, for nothing it does."""
    script = "import sys, serving.deployments, serving.app, serving.routes.page; print('torch' in sys.modules)"
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.split() == ["False"]


def test_the_make_verbs_exist_and_ci_runs_them() -> None:
    text = (ROOT / "Makefile").read_text()
    verbs = set(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE))
    assert {"setup", "demo", "check", "test", "test-long", "test-fast", "bench", "soak", "audit", "clean"} <= verbs
    ci = ROOT / ".ci" / "run"
    assert ci.stat().st_mode & 0o111
    assert [line for line in ci.read_text().splitlines() if "make " in line or line.startswith(".ci/")] == [
        "make setup",
        "make check",
        ".ci/strange",
        "make test",
        "make test-long",
    ]
    assert "\nexport RELOOK_REQUIRE_BROWSER=1 RELOOK_REQUIRE_NGINX=1\nmake test\n" in ci.read_text()


def test_every_test_runs_in_exactly_one_tier() -> None:
    recipes = dict(re.findall(r"^([a-z][a-z-]*):.*\n((?:\t.*\n)*)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    tiers = {verb: re.findall(r'pytest .*-m "?([a-z ]+)', recipes[verb]) for verb in ("test", "test-long")}
    assert "-m bench.drills.soak " in recipes["soak"]
    drilled = [part.arguments for part in parts(10, 30, root=True) if part.module == "pytest"]
    tiers["soak"] = [words.removeprefix("-m ") for words in drilled]
    assert {verb: len(found) for verb, found in tiers.items()} == dict.fromkeys(tiers, 1)
    options = _project()["tool"]["pytest"]["ini_options"]["addopts"]
    without_words, coverage = options[options.index("-m") + 1], recipes["coverage"]
    assert " -m pytest $(IN_PROCESSES)\n" in coverage, "measures what pytest without words runs"
    for marks in ({"long"}, {"soak"}, {"long", "soak"}, set()):
        runs = {verb: Expression.compile(found).evaluate(marks.__contains__) for verb, (found,) in tiers.items()}
        assert sum(runs.values()) == 1, (marks, runs)
        in_both = Expression.compile(without_words).evaluate(marks.__contains__)
        assert in_both == (runs["test"] or runs["test-long"])


def test_setup_refuses_an_old_python_with_one_sentence(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    # An interpreter that answers as an old one would, because none is on this machine.
    pretend = 'import sys; sys.version_info = (3, 9); sys.version = "3.9.1 x"'
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{pretend}\n'\"$2\"\n")
    old.chmod(0o755)
    command = ["make", "-C", str(ROOT), "setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "Relook needs Python 3.11 or newer" in found.stderr
    assert not (tmp_path / "venv").exists()
