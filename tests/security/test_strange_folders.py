"""Commands work in a folder that holds folders and files named like our packages and like Python's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, sys
from pathlib import Path
from cluster.session import start_ray
from cluster.sources import load_settings

home, folder = sys.argv[1:]
before = os.getcwd()
with start_ray(load_settings(sets=[f"records.home={home}"])):
    import ray

    @ray.remote(num_cpus=0)
    def imported():
        import json, random
        import cluster.settings, images.decode, labeling.settings, records.types, serving.settings
        import trainers.settings, tuning.settings, vision.preprocess
        modules = (records, images, vision, trainers, tuning, serving, labeling, cluster, json, random)
        return os.getcwd(), sys.path, [module.__file__ for module in modules]

    place, path, files = ray.get(imported.remote())
assert os.getcwd() == before == folder, os.getcwd()
assert folder not in (place, *path), path
assert not [file for file in files if file.startswith(folder)], files
"""


@pytest.mark.slow
def test_workers_import_ours_and_not_what_lies_in_the_working_folder(tmp_path: Path) -> None:
    strange = tmp_path / "strange"
    for name in ("records", "images", "vision", "trainers", "tuning", "serving", "labeling", "cluster"):
        (strange / name).mkdir(parents=True)
    for name in ("serving", "trainers", "images"):
        (strange / name / "__init__.py").write_text("raise ImportError('a file of the user')")
    for name in ("json.py", "random.py", "records.py"):
        (strange / name).write_text("raise ImportError('a file of the user')")
    environment = {**os.environ, "RELOOK_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, str(tmp_path / "home"), str(strange)],
        cwd=strange, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "name", ["records", "typer.py", *(pytest.param(name, marks=pytest.mark.soak) for name in ("serving.py", "cluster"))]
)
def test_the_command_starts_beside_a_package_or_module_of_that_name(name: str, tmp_path: Path) -> None:
    if name.endswith(".py"):
        (tmp_path / name).write_text("raise ImportError('a file of the user')")
    else:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('a file of the user')")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(Path(sys.executable).with_name("relook")), "status", "--json"],
        cwd=tmp_path, env={**environment, "RELOOK_HOME": str(tmp_path / "home")},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
