"""The verbs `relook models`, `relook models verify` and `relook models compare`.

relook models --json
relook models verify
relook models compare champion candidate
"""

from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from records.command import ConfigOption, JsonOption, PresetOption, SetOption, emit, progress, settings_of

if TYPE_CHECKING:
    from records.bundles import BundleDocument
    from records.store import Store
    from records.types import ModelRecord

app = typer.Typer(help="List the registered models, newest first; verify or compare them.", invoke_without_command=True)


@app.callback()
def list_models(
    ctx: typer.Context,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the registered models, newest first, and say which one answers."""
    if ctx.invoked_subcommand is not None:
        return
    from records.store import open_store
    from serving.answers import model_body
    from serving.schemas import ModelList

    with closing(open_store(settings_of(ctx, config, preset, sets).records)) as store:
        items = [model_body(record) for record in _registered(store)]
    table = Table("id", "status", "architecture", "dataset", "round", "made")
    for item in items:
        made = f"{item.created_at:%Y-%m-%d %H:%M}"
        number = "" if item.round is None else str(item.round)
        table.add_row(item.id[:12], item.status, item.architecture, item.dataset_id[:12], number, made)
    emit(as_json, ModelList(items=items), table if items else "no model is registered yet; `relook train` makes one")


@app.command("verify")
def verify_command(
    ctx: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Id prefix, champion or candidate; default: all."),
    ] = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let models answer their golden images again, as after an upgrade; exit 1 if one does not answer as it did."""
    from records.models import find_model
    from records.store import open_store
    from serving.verification import verify_models

    settings = settings_of(ctx, config, preset, sets)
    with closing(open_store(settings.records)) as store, progress() as bar:
        records = [find_model(store, name) for name in models] if models else _registered(store)
        task = bar.add_task("models", total=len(records))
        found = verify_models(store, records, settings.serving.precision, lambda: bar.advance(task))
    table = Table("id", "status", "precision", "golden difference", "result")
    for one in found:
        difference = "" if one.golden_difference is None else f"{one.golden_difference:.2g}"
        table.add_row(one.id[:12], one.status, one.precision or "", difference, one.problem or "unchanged")
    body = {"models": [one.model_dump() for one in found], "whole": all(one.problem is None for one in found)}
    emit(as_json, body, table if found else "no model is registered yet; `relook train` makes one")
    if not body["whole"]:
        raise typer.Exit(1)


@app.command("compare")
def compare_command(
    ctx: typer.Context,
    one: Annotated[str, typer.Argument(metavar="A", help="Id prefix of 8 or more, bundle path, champion, candidate.")],
    other: Annotated[str, typer.Argument(metavar="B", help="The same.")],
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show two models side by side: figures that their making wrote down, and the settings in which they differ.

    The figures are those of splits that fitting may read; whether one is better is what the gate of a round decides.
    """
    from records.models import find_bundle
    from records.store import open_store

    with closing(open_store(settings_of(ctx, config, preset, sets).records)) as store:
        pair = [find_bundle(store, name) for name in (one, other)]
    documents = pair[0].document, pair[1].document
    rows = {"figures": _figures_of_both(*documents), "settings": _settings_that_differ(*documents)}
    table = Table("", pair[0].id[:12], pair[1].id[:12])
    for part in rows.values():
        for name, values in part.items():
            table.add_row(name, *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
        table.add_section()
    emit(as_json, {"models": [bundle.id for bundle in pair], **rows}, table)


def _registered(store: "Store") -> "list[ModelRecord]":
    from records.types import ModelRecord

    with store.ledger.read() as tx:
        return tx.find(ModelRecord, order_by=("-created_at",))


def _figures_of_both(one: "BundleDocument", other: "BundleDocument") -> dict[str, list[Any]]:
    left, right = _flat(one.metrics), _flat(other.metrics)
    return {name: [value, right[name]] for name, value in left.items() if name in right}


def _settings_that_differ(one: "BundleDocument", other: "BundleDocument") -> dict[str, list[Any]]:
    left, right = (_flat({"dataset": document.dataset_id[:12], **document.config}) for document in (one, other))
    pairs = {name: [left.get(name), right.get(name)] for name in sorted(left.keys() | right.keys())}
    return {name: values for name, values in pairs.items() if values[0] != values[1]}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested numbers and words by dotted names; lists are left out of tables."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            found[prefix + name] = value
    return found
