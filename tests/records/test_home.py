import stat
from pathlib import Path

import pytest

from records.errors import ConfigError
from records.home import FOLDERS, open_home


def test_places_exist_and_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home = open_home(Path("relative"))
    assert home.root == tmp_path / "relative"
    places = [home.blobs, home.datasets, home.bundles, home.runs, home.cache, home.keys, home.label_studio]
    assert {p.name for p in (*places, home.logs, home.demo)} == set(FOLDERS)
    assert all(p.is_dir() for p in places)
    assert stat.S_IMODE(home.keys.stat().st_mode) == 0o700


def test_opening_again_changes_nothing(tmp_path: Path) -> None:
    (open_home(tmp_path).blobs / "x").write_text("kept")
    assert (open_home(tmp_path).blobs / "x").read_text() == "kept"


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"records\.home .*file.* cannot be used .*RELOOK_HOME"):
        open_home(tmp_path / "file")


def test_a_folder_that_cannot_be_made_is_named() -> None:
    with pytest.raises(ConfigError, match="'/proc/relook' cannot be used"):
        open_home(Path("/proc/relook"))
