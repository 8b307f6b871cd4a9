"""`relook drift`: the verb; see `cluster.drift`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cluster.verbs import app
from records.command import Call, until_stopped, verb
from records.progress import say

if TYPE_CHECKING:
    from cluster.drift import DriftReport

EVERY_S = 60.0


@verb(app, "drift")
def drift_command(
    call: Call,
    accept: Annotated[
        str | None, typer.Option("--accept", help="Source whose change is known and accepted: begin anew with it.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="File for a page that shows what changed, with images.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Check every minute, until Ctrl-C.")] = False,
) -> None:
    """Find sources whose images or scores have changed; the service then samples more of theirs for a check."""
    from cluster.drift import accept_drift, check_drift, drift_html
    from records.durable import write_file

    settings = call.settings.serving
    with call.store() as store:
        if accept is not None:
            accept_drift(store, accept, actor="relook drift")
            say(f"{accept} begins anew")
        with until_stopped():
            while True:
                found = check_drift(store, settings)
                if report is not None:
                    write_file(report, drift_html(store, found).encode())
                _tell(call, found)
                if not watch:
                    break
                time.sleep(EVERY_S)


def _tell(call: Call, found: "DriftReport") -> None:
    from serving.drift import STATISTICS

    table = Table("source", "images", "changed", "about", "median before", "since")
    for one in found.sources:
        alarm = one.alarm
        if alarm is None:
            table.add_row(one.source, str(one.images), "no", "", "", "")
            continue
        before, after = (f"{ends[1]:.3f}" if ends else "" for ends in (alarm.before, alarm.after))
        about = f"{alarm.began_about:%Y-%m-%d %H:%M}"
        table.add_row(one.source, str(one.images), STATISTICS[alarm.statistic], about, before, after)
    call.emit(found, table if found.sources else "the model that serves has predicted nothing yet")
