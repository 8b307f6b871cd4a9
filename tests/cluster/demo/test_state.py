"""Which homes a demo may use: an empty one or its own, never one with other work in it."""

from pathlib import Path

import pytest

from cluster.demo.state import Stages, prepare_home, summary_path
from cluster.settings import Settings
from records.errors import RefusedError
from records.home import open_home
from records.ids import utc_now
from records.settings import RecordsSettings
from records.store import open_store
from records.types import Image


def settings_of(home: Path) -> Settings:
    return Settings(records=RecordsSettings(home=home))


def store_an_image(settings: Settings) -> None:
    store = open_store(settings.records)
    image = Image(
        id="a" * 64, uri="x", format="jpeg", width_px=1, height_px=1, provenance="served", created_at=utc_now()
    )
    with store.ledger.begin() as tx:
        tx.add(image)
    store.close()


def test_a_home_with_real_work_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    store_an_image(settings)
    with pytest.raises(RefusedError, match="not a demo's"):
        prepare_home(settings, None)
    assert (tmp_path / "ledger.db").exists()


def test_a_demo_that_failed_before_its_first_stage_is_started_again_in_place(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    prepare_home(settings, Path("no/such/folder"))
    open_store(settings.records).close()
    prepare_home(settings, None)
    assert not (tmp_path / "demo" / "earlier").exists()


def test_an_unfinished_demo_of_the_same_data_is_resumed(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    prepare_home(settings, None)
    store_an_image(settings)
    Stages(open_home(tmp_path)).done("data", {"source": "generated"})
    prepare_home(settings, None)
    assert Stages(open_home(tmp_path)).results["data"]["source"] == "generated"


@pytest.mark.parametrize("finished", [True, False])
def test_a_finished_demo_or_one_of_other_data_is_moved_aside_whole(tmp_path: Path, finished: bool) -> None:
    settings = settings_of(tmp_path)
    prepare_home(settings, None)
    store_an_image(settings)
    home = open_home(tmp_path)
    Stages(home).done("data", {"source": "generated" if finished else "elsewhere"})
    if finished:
        summary_path(home).write_text("{}")
    prepare_home(settings, None)
    (earlier,) = (home.demo / "earlier").iterdir()
    assert (earlier / "ledger.db").exists()
    assert (earlier / "stages.json").exists()
    assert not (tmp_path / "ledger.db").exists()
    assert Stages(open_home(tmp_path)).results == {}
