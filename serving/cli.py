"""The verbs of serving: `serve`, `predict`, `keys`, `models`, `rollout` and `rollback`.

relook serve --port 8000
relook models compare champion candidate
relook rollout MODEL --percent 10
"""

import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from records.command import Call, group_verb, until_stopped, verb
from records.durable import write_file
from records.errors import ConfigError
from records.progress import progress, status, stderr
from records.types import Consent, Scope
from serving.hooks.cli import hooks_app

if TYPE_CHECKING:
    from records.bundles import BundleDocument
    from records.store import Store
    from records.types import ModelRecord
    from serving.settings import ServingSettings

app = typer.Typer()
keys_app = typer.Typer(help="API keys: who may use the service, and for what.", no_args_is_help=True)
models_app = typer.Typer(help="List, verify or compare the registered models.", invoke_without_command=True)
app.add_typer(keys_app, name="keys")
app.add_typer(models_app, name="models")
app.add_typer(hooks_app, name="hooks")


@verb(app, "serve")
def serve(
    call: Call,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on; default: serving.host.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="TCP port to listen on; default: serving.port.")] = None,
    config_out: Annotated[
        Path | None, typer.Option("--config-out", help="Write a file for `serve deploy` and KubeRay; start nothing.")
    ] = None,
) -> None:
    """Serve the champion with API and page until Ctrl-C."""
    from serving.preconditions import require_startable

    given = [f"serving.host={host}"] if host is not None else []
    given += [f"serving.port={port}"] if port is not None else []
    settings = call.compose(after=given)
    serving: ServingSettings = settings.serving
    if config_out is not None:
        from serving.serve_config import serve_config_text

        write_file(config_out, serve_config_text(serving))
        call.emit({"config": str(config_out)}, f"{config_out} is for `serve deploy`, or serveConfigV2 of a RayService")
        return
    require_startable(serving, settings.records)

    # Imported after the checks: Ray and torch take seconds to load, and a port in use should be reported at once.
    from serving.launch import run_service

    with (
        until_stopped(),
        status("starting the service") as spinner,
        call.ray(settings),
        run_service(serving, settings.records) as s,
    ):
        # The service runs inside of this block, but its display has to end before the address is printed.
        spinner.stop()
        call.emit({"url": s.url, "docs": f"{s.url}/docs"}, f"Relook serves at {s.url} (API: {s.url}/docs)")
        stderr.print("Ctrl-C stops it.")
        try:
            # For ever: the signal that ends the service raises.
            threading.Event().wait()
        finally:
            stderr.print("stopping")


@verb(app, "predict")
def predict(
    call: Call,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Id prefix (8 characters), bundle path, or champion.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images.", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option("--out", help="CSV file to write.")],
    explain: Annotated[str | None, typer.Option("--explain", help="gradcam: also write a heat map per image.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted run.")] = False,
    context: Annotated[
        Path | None, typer.Option("--context", help="Table of the images: image_id, and age, sex, localization, ..")
    ] = None,
) -> None:
    """Predict a folder of images and write a table, most urgent first; nothing is stored or reviewed."""
    from records.models import find_bundle
    from serving.bulk import predict_folder

    if explain not in (None, "gradcam"):
        raise ConfigError(f"--explain is {explain!r}; it must be gradcam")
    with call.store() as store, progress() as bar:
        bundle, task = find_bundle(store, model), bar.add_task("predict", total=None)
        result = predict_folder(
            bundle, folder, out, call.settings.serving, explain=explain is not None, resume=resume,
            context=context, on_done=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    counts = Counter(row["decision"] or "unreadable" for row in result.rows)
    if result.hidden:
        stderr.print(f"note: {result.hidden} system files, such as Thumbs.db, are not in the table")
    listed = ", ".join(f"{number} {decision}" for decision, number in counts.items())
    body = {
        "model_id": bundle.id, "images": len(result.rows), "decisions": dict(counts), "hidden": result.hidden,
        "out": str(out),
    }  # fmt: skip
    call.emit(body, f"{len(result.rows)} files ({listed}) in {out}, most urgent first")


@verb(keys_app, "create")
def create(
    call: Call,
    name: Annotated[str, typer.Argument(help="Name of the key's user.")],
    organisation: Annotated[str, typer.Option("--organisation", help="Whose predictions the key may read.")],
    scopes: Annotated[
        list[Scope] | None, typer.Option("--scope", help="Permission; may be repeated; default: predict, flag.")
    ] = None,
    sandbox: Annotated[bool, typer.Option("--sandbox", help="Neither store nor review its images.")] = False,
    consent: Annotated[Consent | None, typer.Option("--consent", help="Consent of requests without one.")] = None,
    days: Annotated[int | None, typer.Option("--days", min=1, help="Days until it expires; default: never.")] = None,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", help="New file for the key, which is then not printed.")
    ] = None,
) -> None:
    """Create a key and print it once; as soon as there is a key, the service requires one."""
    from serving.access.keys import create_key

    # Checked first: a key whose only copy could not be written would be lost.
    if key_file is not None and (key_file.exists() or not key_file.parent.is_dir()):
        raise ConfigError(f"--key-file {key_file} must be a new file in a folder that exists")
    with call.store() as store:
        key, token = create_key(
            store, name=name, organisation=organisation, scopes=scopes or [Scope.PREDICT, Scope.FLAG],
            actor="relook keys", sandbox=sandbox, default_consent=consent, days=days,
        )  # fmt: skip
    made = {"id": key.id, **key.model_dump(mode="json", include={"organisation", "scopes", "expires_at"})}
    if key_file is not None:
        # The output of a container ends in a log that more people read than may use the key.
        write_file(key_file, f"{token}\n", mode=0o600)
        call.emit(
            {**made, "key_file": str(key_file)}, f"the key is in {key_file}; move it to a secret store (id {key.id})"
        )
        return
    made = {"key": token, **made}
    call.emit(made, f"{token}\nkeep it now: only its hash is stored (id {key.id})")


@verb(keys_app, "list")
def list_keys(call: Call) -> None:
    """List the keys; their secrets are not stored and cannot be shown."""
    from records.ids import utc_now
    from records.types import ApiKey
    from serving.access.keys import is_valid

    with call.store() as store, store.ledger.read() as tx:
        found = tx.find(ApiKey, order_by=("created_at",))
    table = Table("id", "name", "organisation", "scopes", "expires", "state")
    for key in found:
        state = "valid" if is_valid(key, utc_now()) else "revoked" if key.revoked_at else "expired"
        expires = f"{key.expires_at:%Y-%m-%d}" if key.expires_at else "never"
        scopes = ", ".join(key.scopes) + (" (sandbox)" if key.sandbox else "")
        table.add_row(key.id, key.name, key.organisation, scopes, expires, state)
    listed = [key.model_dump(mode="json", exclude={"secret_hash"}) for key in found]
    call.emit({"keys": listed}, table if found else "there is no key yet; `relook keys create` creates one")


@verb(keys_app, "revoke")
def revoke(
    call: Call,
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Id from `relook keys list`.")],
) -> None:
    """Revoke a key; a running service refuses it within a second."""
    from serving.access.keys import revoke_key

    with call.store() as store:
        key = revoke_key(store, key_id, actor="relook keys")
    call.emit(key.model_dump(mode="json", exclude={"secret_hash"}), f"key {key.id} ({key.name}) is revoked")


@group_verb(models_app)
def list_models(call: Call) -> None:
    """List the registered models, newest first, with their status."""
    from serving.responses import model_body
    from serving.schemas import ModelList

    with call.store() as store:
        items = [model_body(record) for record in _registered(store)]
    table = Table("id", "status", "architecture", "dataset", "round", "made")
    for item in items:
        made = f"{item.created_at:%Y-%m-%d %H:%M}"
        number = "" if item.round is None else str(item.round)
        table.add_row(item.id[:12], item.status, item.architecture, item.dataset_id[:12], number, made)
    call.emit(ModelList(items=items), table if items else "no model is registered yet; `relook train` makes one")


@verb(models_app, "verify")
def verify_command(
    call: Call,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Id prefix, champion or candidate; default: all."),
    ] = None,
) -> None:
    """Predict the golden images of models again, as after an upgrade; exit 1 if a prediction changed."""
    from records.models import find_model
    from serving.holder import verify_models

    with call.store() as store, progress() as bar:
        records = [find_model(store, name) for name in models] if models else _registered(store)
        task = bar.add_task("verify models", total=len(records))
        found = verify_models(store, records, call.settings.serving.precision, lambda: bar.advance(task))
    table = Table("id", "status", "precision", "golden difference", "result")
    for one in found:
        difference = "" if one.golden_difference is None else f"{one.golden_difference:.2g}"
        table.add_row(one.id[:12], one.status, one.precision or "", difference, one.problem or "unchanged")
    # Printed before the exit code is raised, so that a script reads which model changed.
    body = {"models": [one.model_dump() for one in found], "whole": all(one.problem is None for one in found)}
    call.emit(body, table if found else "no model is registered yet; `relook train` makes one")
    if not body["whole"]:
        raise typer.Exit(1)


@verb(models_app, "compare")
def compare_command(
    call: Call,
    one: Annotated[
        str, typer.Argument(metavar="A", help="Id prefix (8 characters), bundle path, champion or candidate.")
    ],
    other: Annotated[str, typer.Argument(metavar="B", help="The same.")],
) -> None:
    """Compare two models: the metrics in their bundles, and the settings in which they differ.

    The metrics are of splits that fitting may read; the gate of a round decides which model is better.
    """
    from records.models import find_bundle

    with call.store() as store:
        pair = [find_bundle(store, name) for name in (one, other)]
    documents = pair[0].document, pair[1].document
    rows = {"figures": _figures_of_both(*documents), "settings": _settings_that_differ(*documents)}
    table = Table("", pair[0].id[:12], pair[1].id[:12])
    for part in rows.values():
        for name, values in part.items():
            table.add_row(name, *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
        table.add_section()
    call.emit({"models": [bundle.id for bundle in pair], **rows}, table)


@verb(models_app, "export")
def export_command(
    call: Call,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Id prefix (8 characters), bundle path, or champion.")],
    format: Annotated[str, typer.Option("--format", help="onnx or openvino.")] = "onnx",
    out: Annotated[Path | None, typer.Option("--out", help="New folder; default: MODEL-FORMAT, here.")] = None,
) -> None:
    """Write a model as one graph for other programs, with its golden outputs and an example that runs it."""
    from records.models import find_bundle
    from vision.export.folder import export_model

    with call.store() as store, status("exporting the model"):
        bundle = find_bundle(store, model)
        done = export_model(bundle, out or Path(f"{bundle.id[:12]}-{format}"), format)
    body = {
        "model_id": done.model_id, "format": done.format, "folder": str(done.folder), "outputs": list(done.outputs),
        "files": done.files, "differences": done.differences,
    }  # fmt: skip
    without = "" if "maps" in done.outputs else "; without maps, since this network's head has no closed form"
    worst = max(done.differences.values())
    call.emit(
        body,
        f"model {bundle.id[:12]} in {done.folder} ({', '.join(done.outputs)}), equal to torch to {worst:.1e}{without}; "
        f"`python {done.folder / 'example.py'}` runs it",
    )


@verb(app, "rollout")
def rollout(
    call: Call,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Candidate by its id; without it, show the current rollout.")
    ] = None,
    percent: Annotated[
        int, typer.Option("--percent", min=0, max=100, help="Traffic share by lesion; 0 is shadow, 100 promotes.")
    ] = 0,
    rollout_id: Annotated[
        str | None, typer.Option("--rollout", help="Id of the rollout to change or promote; default: start one.")
    ] = None,
    champion: Annotated[
        str | None, typer.Option("--champion", help="To start: refuse unless this model serves now.")
    ] = None,
    reason: Annotated[
        str | None, typer.Option("--reason", help="Reason; required for a model that has not passed the gate.")
    ] = None,
) -> None:
    """Roll out a candidate: in shadow, for a share of the traffic, then for all of it."""
    from records.models import current_rollout, named_model
    from serving.responses import rollout_body
    from serving.rollout.control import roll_out

    with call.store() as store:
        if model is None:
            with store.ledger.read() as tx:
                running = current_rollout(tx)
            if running is None:
                raise ConfigError("no rollout is in progress; `relook rollout MODEL` starts one")
        else:
            running = roll_out(
                store,
                named_model(store, model).id,
                percent,
                actor="relook rollout",
                rollout_id=rollout_id,
                champion_id=named_model(store, champion).id if champion else None,
                reason=reason,
            )
        body = rollout_body(running)
    seen = ", ".join(f"{g.name} {g.events} of {g.observations}" for g in body.guardrails)
    to_change = f"`relook rollout {body.candidate_id[:12]} --rollout {body.id} --percent N` changes it"
    call.emit(
        body,
        f"rollout {body.id}: model {body.candidate_id[:12]} is in {body.stage} ({body.percent} %), champion "
        f"{body.champion_id[:12]}; seen: {seen}" + (f"\n{to_change}" if body.ended_at is None else ""),
    )


@verb(app, "rollback")
def rollback(
    call: Call,
    rollout_id: Annotated[
        str | None, typer.Argument(metavar="ROLLOUT", help="Id of the rollout, as `relook rollout` shows it.")
    ] = None,
    reason: Annotated[str, typer.Option("--reason", help="Reason, for the audit log.")] = "taken back by hand",
) -> None:
    """Withdraw the candidate of a rollout; `relook models undo-promotion` takes a promoted model away."""
    from serving.responses import rollout_body
    from serving.rollout.control import roll_back, under_way_text

    with call.store() as store:
        if rollout_id is None:
            with store.ledger.read() as tx:
                raise ConfigError(f"name the rollout: `relook rollback ROLLOUT`; {under_way_text(tx)}")
        body = rollout_body(roll_back(store, rollout_id, actor="relook rollback", why=reason))
    call.emit(body, f"model {body.candidate_id[:12]} was rolled back: {body.why}")


def _registered(store: "Store") -> "list[ModelRecord]":
    from records.types import ModelRecord

    with store.ledger.read() as tx:
        return tx.find(ModelRecord, order_by=("-created_at",))


def _figures_of_both(one: "BundleDocument", other: "BundleDocument") -> dict[str, list[Any]]:
    # Only metrics that both have: models may be of different taxonomies or versions.
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
