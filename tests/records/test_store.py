import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from records.errors import ConfigError, TaxonomyError
from records.settings import RecordsSettings
from records.store import Store, open_store, remember_taxonomy
from records.types import Cursor

NewStore = Callable[..., AbstractContextManager[Store]]


def test_everything_lies_under_home(store: Store, tmp_path: Path) -> None:
    store.blobs.put(b"bytes")
    with store.ledger.begin() as tx:
        tx.add(Cursor(name="x", position={}))
    assert (tmp_path / "home" / "ledger.db").is_file()
    assert [p for p in store.home.blobs.rglob("*") if p.is_file()]


@pytest.mark.parametrize("name", ["with space", "per%20cent", "question?mark=1", "ümlaut#hash"])
def test_any_folder_name_will_do(new_store: NewStore, tmp_path: Path, name: str) -> None:
    with new_store(name) as store:
        blob = store.blobs.put(b"bytes")
        assert (tmp_path / name / "blobs" / blob[:2] / blob).read_bytes() == b"bytes"
        assert (tmp_path / name / "ledger.db").is_file()
    assert os.listdir(tmp_path) == [name]


def test_settings_of_an_open_store_open_the_same_one_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = open_store(RecordsSettings(home=Path("here")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    second = open_store(first.settings)
    assert second.home == first.home
    first.close()
    second.close()


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absolute file"):
        open_store(RecordsSettings(home=tmp_path, database="sqlite:///ledger.db"))
    with pytest.raises(ConfigError, match=r"records\.blobs"):
        open_store(RecordsSettings(home=tmp_path, blobs="blobs"))
    with pytest.raises(TaxonomyError, match="birds"):
        open_store(RecordsSettings(home=tmp_path, taxonomy="birds"))


def test_a_home_of_before_gets_the_context_of_the_built_in_taxonomy(store: Store) -> None:
    bare = store.taxonomy.model_copy(update={"context": ()})
    with store.ledger.begin() as tx:
        remember_taxonomy(tx, bare)
    again = open_store(store.settings)
    assert again.taxonomy.context == store.taxonomy.context
    assert again.taxonomy.context
    again.close()
