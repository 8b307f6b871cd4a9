import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from records.home import open_home
from records.keys import patient_hash


def test_a_patient_has_one_hash_per_home_and_another_in_each_home(tmp_path: Path) -> None:
    here, there = open_home(tmp_path / "a"), open_home(tmp_path / "b")
    assert patient_hash(here, "P-17") == patient_hash(open_home(tmp_path / "a"), "P-17")
    assert patient_hash(here, "P-17") != patient_hash(here, "P-18")
    assert patient_hash(here, "P-17") != patient_hash(there, "P-17")
    assert "P-17" not in patient_hash(here, "P-17")


def test_the_key_is_private_and_made_once_however_many_ask_first(tmp_path: Path) -> None:
    home = open_home(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        hashes = set(pool.map(lambda _: patient_hash(home, "P-17"), range(32)))
    assert len(hashes) == 1
    assert [path.name for path in home.keys.glob("patient_salt*")] == ["patient_salt"]
    assert stat.S_IMODE((home.keys / "patient_salt").stat().st_mode) == 0o600
