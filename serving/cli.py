"""The verbs `relook serve`, `predict` and `keys`; those of models and rollouts join them.

relook serve --port 8000
"""

import signal
import threading
from collections import Counter
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.table import Table

import serving.models_cli
import serving.rollout.cli
from records.command import (
    ConfigOption,
    JsonOption,
    PresetOption,
    SetOption,
    emit,
    progress,
    ray_of,
    settings_of,
    status,
    stderr,
)
from records.errors import ConfigError

if TYPE_CHECKING:
    from types import FrameType

    from serving.settings import ServingSettings

E = TypeVar("E", bound=StrEnum)

app = typer.Typer()
keys_app = typer.Typer(help="API keys: who may use the service, and for what.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
app.add_typer(serving.models_cli.app, name="models")
app.add_typer(serving.rollout.cli.app)


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
def predict(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Id prefix of 8 or more, bundle path, or champion.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images.", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option("--out", help="The table, CSV.")],
    explain: Annotated[str | None, typer.Option("--explain", help="gradcam: a heat map per image.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer for a folder of images and write a table, most worrying first; nothing is stored or asked about."""
    from records.models import find_bundle
    from records.store import open_store
    from serving.bulk import predict_folder

    if explain not in (None, "gradcam"):
        raise ConfigError(f"--explain is {explain!r}; it must be gradcam")
    settings = settings_of(ctx, config, preset, sets)
    with closing(open_store(settings.records)) as store, progress() as bar:
        bundle, task = find_bundle(store, model), bar.add_task("images", total=None)
        result = predict_folder(
            bundle, folder, out, settings.serving, explain=explain is not None, resume=resume,
            on_done=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    counts = Counter(row["decision"] or "unreadable" for row in result.rows)
    told = ", ".join(f"{number} {decision}" for decision, number in counts.items())
    body = {"model_id": bundle.id, "images": len(result.rows), "decisions": dict(counts), "out": str(out)}
    emit(as_json, body, f"{len(result.rows)} images ({told}) in {out}, most worrying first")


@keys_app.command("create")
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="Who uses it.")],
    organisation: Annotated[str, typer.Option("--organisation", help="Whose answers its bearer sees.")],
    scopes: Annotated[
        list[str] | None, typer.Option("--scope", help="predict, flag, review, audit or admin; repeat for more.")
    ] = None,
    sandbox: Annotated[bool, typer.Option("--sandbox", help="Nothing it sends is stored or asked about.")] = False,
    consent: Annotated[
        str | None, typer.Option("--consent", help="Of requests that name none: none, review or training.")
    ] = None,
    days: Annotated[int | None, typer.Option("--days", min=1, help="Until it expires; default: never.")] = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and show it, once; from the first key on nobody gets in without one."""
    from records.store import open_store
    from records.types import Consent, Scope
    from serving.access.keys import create_key

    wanted = [choice_of(Scope, scope, "--scope") for scope in scopes or ["predict", "flag"]]
    default_consent = choice_of(Consent, consent, "--consent") if consent is not None else None
    with closing(open_store(settings_of(ctx, config, preset, sets).records)) as store:
        key, token = create_key(
            store, name=name, organisation=organisation, scopes=wanted, actor="relook keys", sandbox=sandbox,
            default_consent=default_consent, days=days,
        )  # fmt: skip
    made = {"id": key.id, "key": token, **key.model_dump(mode="json", include={"organisation", "scopes", "expires_at"})}
    emit(as_json, made, f"{token}\nkeep it now: only its hash is stored (id {key.id})")


@keys_app.command("list")
def list_keys(
    ctx: typer.Context,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the keys; what they are made of cannot be shown any more."""
    from records.ids import utc_now
    from records.store import open_store
    from records.types import ApiKey
    from serving.access.keys import is_valid

    with closing(open_store(settings_of(ctx, config, preset, sets).records)) as store, store.ledger.read() as tx:
        found = tx.find(ApiKey, order_by=("created_at",))
    table = Table("id", "name", "organisation", "scopes", "expires", "state")
    for key in found:
        state = "valid" if is_valid(key, utc_now()) else "revoked" if key.revoked_at else "expired"
        expires = f"{key.expires_at:%Y-%m-%d}" if key.expires_at else "never"
        scopes = ", ".join(key.scopes) + (" (sandbox)" if key.sandbox else "")
        table.add_row(key.id, key.name, key.organisation, scopes, expires, state)
    listed = [key.model_dump(mode="json", exclude={"secret_hash"}) for key in found]
    emit(as_json, {"keys": listed}, table if found else "no key was made yet; `relook keys create` makes one")


@keys_app.command("revoke")
def revoke(
    ctx: typer.Context,
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `relook keys list` shows it.")],
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a key; a running service refuses it within a second."""
    from records.store import open_store
    from serving.access.keys import revoke_key

    with closing(open_store(settings_of(ctx, config, preset, sets).records)) as store:
        key = revoke_key(store, key_id, actor="relook keys")
    emit(as_json, key.model_dump(mode="json", exclude={"secret_hash"}), f"key {key.id} ({key.name}) is revoked")


def choice_of(kind: type[E], value: str, option: str) -> E:
    """Return a member of an enumeration by its value; ConfigError naming the option and all values if none has it."""
    try:
        return kind(value)
    except ValueError as error:
        raise ConfigError(f"{option} is {value!r}; it must be one of {', '.join(m.value for m in kind)}") from error


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
