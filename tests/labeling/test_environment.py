"""Label Studio's own environment: the lock file, the marker, and interrupted installs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from labeling.environment import (
    Environment,
    _Builder,
    environment_of,
    exclusive,
    install,
    is_ready,
    lock_text,
    server_variables,
)
from labeling.local_server import ServerInfo
from labeling.settings import LabelingSettings
from records.errors import ConfigError, LabelStudioError


def test_every_version_is_pinned_and_nothing_else_is_in_the_lock() -> None:
    lines = [line for line in lock_text().replace(" \\\n", "").splitlines() if not line.startswith("#")]
    assert len(lines) > 100
    pin = re.compile(r"([A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!+]*)( +--hash=sha256:[0-9a-f]{64})+")
    assert all(pin.fullmatch(line) for line in lines), "no hosts, no paths, a hash for each"
    lines = [line.split()[0] for line in lines]
    assert "label-studio==1.23.2" in lines
    assert len({line.split("==")[0].lower().replace("_", "-") for line in lines}) == len(lines)


def test_the_environment_is_beside_this_programs_own_unless_a_setting_says_otherwise(tmp_path: Path) -> None:
    assert environment_of(LabelingSettings()).folder == Path(sys.prefix) / "label-studio"
    assert environment_of(LabelingSettings(environment=tmp_path / "x")).folder == tmp_path / "x"


def test_an_installed_environment_is_left_alone(server: ServerInfo, settings: LabelingSettings) -> None:
    environment = environment_of(settings)
    assert is_ready(environment)
    before = environment.template.stat().st_mtime_ns
    said: list[str] = []
    assert install(environment, said.append) is False
    assert said == []
    assert environment.template.stat().st_mtime_ns == before


def test_without_its_marker_or_with_another_lock_it_is_not_ready(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "label-studio")
    assert not is_ready(environment)
    environment.template.parent.mkdir(parents=True)
    environment.template.touch()
    environment.program.parent.mkdir()
    environment.program.touch()
    assert not is_ready(environment)
    (environment.folder / "relook-ready.json").write_text('{"lock": "of another release"}')
    assert not is_ready(environment)


def test_a_folder_of_somebody_else_is_refused_and_kept(tmp_path: Path) -> None:
    theirs = tmp_path / "precious.txt"
    theirs.write_text("mine")
    with pytest.raises(ConfigError, match=r"labeling\.environment .* holds files that Relook did not make"):
        install(Environment(tmp_path), lambda text: None)
    assert theirs.read_text() == "mine"


@pytest.mark.parametrize(("script", "sentence"), [("print('no room'); exit(3)", "no room"), ("exit(3)", "exit code 3")])
def test_an_install_that_fails_says_its_last_line_and_where_all_of_them_are(
    tmp_path: Path, script: str, sentence: str
) -> None:
    environment = Environment(tmp_path / "label-studio")
    environment.install_log.parent.mkdir(parents=True, exist_ok=True)
    with (tmp_path / "lock").open("w") as lock:
        builder = _Builder(environment, lambda text: None, lock.fileno())
        lines: list[str] = []
        builder._run([sys.executable, "-c", "print(' Collecting a'); print()"], lines.append)
        assert lines == ["Collecting a", ""]
        with pytest.raises(LabelStudioError, match=f"could not be installed: {sentence}; see .*then run `relook label"):
            builder._run([sys.executable, "-c", script])
    assert "Collecting a" in environment.install_log.read_text()


def test_the_packages_are_counted_while_they_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    lines = ["Collecting a", "Processing ./b", "Using cached c", "Installing collected packages: a, b"]
    monkeypatch.setattr(_Builder, "_run", lambda self, command, on_line: [on_line(line) for line in lines])
    environment = Environment(tmp_path / "label-studio")
    environment.folder.mkdir()
    _Builder(environment, said.append, 0).install_packages()
    total = said[0].rpartition(" ")[2]
    assert said == [
        f"fetching Label Studio, package 1 of {total}",
        f"fetching Label Studio, package 2 of {total}",
        f"unpacking {total} packages of Label Studio (about half a minute)",
    ]


def test_an_install_that_another_process_has_just_ended_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [False, True]
    monkeypatch.setattr("labeling.environment.is_ready", lambda environment: answers.pop(0))
    assert install(Environment(tmp_path / "label-studio"), lambda text: None) is False
    assert answers == []


@pytest.mark.long
def test_an_interrupted_install_is_started_over(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "label-studio")
    script = (
        "import sys; from pathlib import Path; from labeling.environment import Environment, install\n"
        "install(Environment(Path(sys.argv[1])), lambda text: print(text, flush=True))"
    )
    leftovers = []
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(environment.folder)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "making a virtual environment for Label Studio\n"
            process.kill()
        assert not is_ready(environment)
        leftovers.append((environment.folder / "left-behind").exists())
        with exclusive(tmp_path / ".label-studio.lock", lambda: None):  # held until the killed one's child is done
            (environment.folder / "left-behind").touch()
    assert leftovers == [False, False]


def test_a_lock_is_free_again_when_its_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    script = f"""
import time
from pathlib import Path
from labeling.environment import exclusive
with exclusive(Path({str(path)!r}), lambda: None):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.kill()
    waited: list[bool] = []
    with exclusive(path, lambda: waited.append(True)):
        assert waited == []


def test_a_server_sees_nothing_of_the_callers_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PORT", "HOST", "DEBUG", "SECRET_KEY", "USERNAME", "LABEL_STUDIO_PORT", "DJANGO_DB"):
        monkeypatch.setenv(name, "trap")
    variables = server_variables(tmp_path, {"LABEL_STUDIO_USER_TOKEN": "t"})
    assert "trap" not in variables.values()
    assert variables["PATH"] == os.environ["PATH"]
    assert variables["LABEL_STUDIO_COLLECT_ANALYTICS"] == "false"
    assert variables["LABEL_STUDIO_SENTRY_DSN"] == ""
