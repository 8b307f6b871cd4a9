"""Whose home a demo may take: nobody's, or its own; never one with real work in it."""

import shutil
from pathlib import Path

from cluster.demo.summary import Stages, summary_path, write_json
from cluster.settings import Settings
from records.command import stderr
from records.errors import RefusedError
from records.home import Home, open_home
from records.ids import utc_now
from records.store import open_store
from records.types import Image, ModelRecord

KEPT_FOLDERS = ("demo", "keys")


def take_home(settings: Settings, data: Path | None) -> None:
    """Take the home for this demo: go on with an unfinished one, move a finished one aside, refuse real work.

    Args:
        settings: with the home and the database.
        data: folder of the demo's images; None for generated ones.
    Raises:
        RefusedError: the home holds work that no demo made, or the database holds another demo.
    """
    home = open_home(settings.records.home)
    mark, stages = home.demo / "begun.json", Stages(home)
    source = str(data) if data else "generated"
    if not mark.exists() and _holds_work(settings):
        raise RefusedError(
            f"{home.root} holds work that is not a demo's; play it in a folder of its own: RELOOK_HOME=DIR relook demo"
        )
    if "data" in stages.results:
        if stages.results["data"]["source"] == source and not summary_path(home).exists():
            stderr.print("an unfinished demo of the same data goes on", highlight=False)
            return
        if settings.records.database:
            raise RefusedError("the database holds another demo; give this one its own (RELOOK_DATABASE)")
        stderr.print(f"the demo before this one was moved to {_set_aside(home)}", highlight=False)
    write_json(mark, {"source": source})


def _holds_work(settings: Settings) -> bool:
    store = open_store(settings.records)
    with store.ledger.read() as tx:
        found = tx.count(Image) + tx.count(ModelRecord)
    store.close()
    return found > 0


def _set_aside(home: Home) -> Path:
    """Move what a demo left, except the keys and earlier demos, into a folder of its own."""
    earlier = home.demo / "earlier" / f"{utc_now():%Y%m%dT%H%M%S}"
    earlier.mkdir(parents=True)
    left = [path for path in home.root.iterdir() if path.name not in KEPT_FOLDERS]
    left += [path for path in home.demo.iterdir() if path.name != "earlier"]
    for path in sorted(left):
        shutil.move(path, earlier / path.name)
    return earlier
