"""The verbs `relook serve` and `relook models`.

relook serve --port 8000
relook models --json
"""

import signal
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from records.command import (
    ConfigOption,
    JsonOption,
    PresetOption,
    SetOption,
    emit,
    ray_of,
    settings_of,
    status,
    stderr,
)

if TYPE_CHECKING:
    from types import FrameType

    from serving.settings import ServingSettings

app = typer.Typer()


@app.command()
def serve(
    ctx: typer.Context,
    host: Annotated[str | None, typer.Option("--host", help="Address; default: serving.host.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="TCP port; default: serving.port.")] = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve the model that the ledger names, with API and page, until Ctrl-C."""
    from serving.preconditions import require_startable

    given = [f"serving.host={host}"] if host is not None else []
    given += [f"serving.port={port}"] if port is not None else []
    settings = settings_of(ctx, config, preset, [*(sets or ()), *given])
    serving: ServingSettings = settings.serving
    require_startable(serving, settings.records)

    from serving.launch import run_service

    with status("starting the service") as spinner, ray_of(ctx, settings), run_service(serving, settings.records) as s:
        spinner.stop()
        emit(as_json, {"url": s.url, "docs": f"{s.url}/docs"}, f"Relook answers at {s.url} (API: {s.url}/docs)")
        stderr.print("Ctrl-C stops it.")
        _wait_for_stop()
        stderr.print("stopping")


@app.command()
def models(
    ctx: typer.Context,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the registered models, newest first, and say which one answers."""
    from records.store import open_store
    from records.types import ModelRecord
    from serving.answers import model_body
    from serving.schemas import ModelList

    with closing(open_store(settings_of(ctx, config, preset, sets).records)) as store, store.ledger.read() as tx:
        items = [model_body(record) for record in tx.find(ModelRecord, order_by=("-created_at",))]
    table = Table("id", "status", "architecture", "dataset", "round", "made")
    for item in items:
        made = f"{item.created_at:%Y-%m-%d %H:%M}"
        number = "" if item.round is None else str(item.round)
        table.add_row(item.id[:12], item.status, item.architecture, item.dataset_id[:12], number, made)
    emit(as_json, ModelList(items=items), table if items else "no model is registered yet; `relook train` makes one")


def _wait_for_stop() -> None:
    """Wait for Ctrl-C or a request to end; both stop the service the same way."""
    stopped = threading.Event()

    def stop(_number: int, _frame: "FrameType | None") -> None:
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stopped.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
