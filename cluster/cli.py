"""The `relook` command: joins the rooms' verbs and turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted. An expected error is one sentence on stderr (with `--json`
also an object on stdout) and never a traceback. Verbs import their rooms' modules inside their functions, so that
`relook --help` stays fast.

    relook --help
"""

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

import cluster.drift_verbs
import cluster.incidents.verbs
import cluster.label_projects
import cluster.label_verbs
import cluster.verbs
import labeling.cli
import records.cli
import serving.cli
import trainers.cli
import tuning.cli
from cluster.daemons import end_process
from records.command import PRESET_NAMES, RAY_STARTER, Call, emit_json, results_alone, verb
from records.errors import RelookError, UserError
from trainers.cli import CATALOGUES
from trainers.cli.data import FROM_PROJECT

app = typer.Typer(
    name="relook",
    help="Train an image classifier, serve it with an explanation of every prediction, learn from annotations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
report_app = typer.Typer(help="Print documents about a model, filled from what is stored.", no_args_is_help=True)
app.add_typer(report_app, name="report")
app.add_typer(cluster.incidents.verbs.incident_app, name="incident")
app.add_typer(cluster.label_verbs.labels_app, name="labels")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"relook {version('relook')}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Leave in the context what only this room can do: compose settings, start Ray, list presets and rules."""
    ctx.obj = _load
    ctx.meta[RAY_STARTER] = _start_ray
    ctx.meta[labeling.cli.CASES] = _task_cases
    ctx.meta[PRESET_NAMES] = _preset_names
    ctx.meta.setdefault(CATALOGUES, []).append(_acquisition_rules)


FROM_PROJECT.append(cluster.label_projects.import_from_project)


def _task_cases(store: Any, settings: Any) -> Any:
    from cluster.task_cases import TaskCases

    return TaskCases(store, settings.serving, settings.labeling.cases_shown)


def _acquisition_rules() -> dict[str, list[dict[str, Any]]]:
    from labeling.acquisition.registry import acquisition_catalogue

    return {"acquisition_rules": acquisition_catalogue()}


def _preset_names() -> Sequence[str]:
    from cluster.presets import PRESETS

    return list(PRESETS)


def _load(config: Path | None, preset: str | None, sets: Sequence[str]) -> Any:
    from cluster.sources import load_settings
    from images.settings import limits_variable

    settings = load_settings(config, preset, sets, os.environ)
    os.environ.update(limits_variable(settings.images))
    return settings


def _start_ray(settings: Any) -> AbstractContextManager[Any]:
    from cluster.session import start_ray

    return start_ray(settings)


@verb(app, "doctor")
def doctor(
    call: Call,
    cluster: Annotated[bool, typer.Option("--cluster", help="Also look at every node of the Ray cluster.")] = False,
) -> None:
    """Check this machine, or every node of a cluster, and print a fix for each problem."""
    from cluster.doctor import examine, report

    checks = examine(call.settings)
    if cluster:
        from cluster.doctor_nodes import examine_cluster

        checks += examine_cluster(call.settings)
    failed = any(check.state == "fail" for check in checks)
    # Printed before the exit code is raised, so that a script gets the checks of a machine that fails them.
    call.emit({"ok": not failed, "checks": [check.model_dump() for check in checks]}, report(checks))
    if failed:
        raise typer.Exit(1)


@verb(app, "status")
def status(call: Call) -> None:
    """Show images, labels, models, open review items and the last round."""
    from cluster.status import report, survey

    found = survey(call.settings.records)
    call.emit(found, report(found))


@verb(report_app, "model-card")
def model_card_command(
    call: Call,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Id prefix, bundle path, champion or candidate.")],
) -> None:
    """Print model card and data sheet of a model as Markdown; what is not stored is listed as missing."""
    from cluster.model_card import card_page, model_card
    from records.models import find_bundle

    with call.store() as store:
        card = model_card(store, find_bundle(store, model))
    call.emit(card, card_page(card))


# `relook --help` lists them in this order.
for _verbs in (cluster.verbs, trainers.cli, tuning.cli, serving.cli, labeling.cli, records.cli):
    app.add_typer(_verbs.app)


def run(arguments: Sequence[str], command: typer.Typer = app, name: str = "relook") -> int:
    """Run one command line.

    Args:
        arguments: without the program's name.
        command: the app whose verbs are called.
        name: the program's name in help and error messages.
    Returns:
        The exit code.
    """
    # Searched in the text, because a call that cannot be parsed must also end with one JSON object.
    if "--json" not in arguments:
        return _run(arguments, command, name, as_json=False)
    with results_alone():
        return _run(arguments, command, name, as_json=True)


def _run(arguments: Sequence[str], command: typer.Typer, name: str, *, as_json: bool) -> int:
    try:
        code = typer.main.get_command(command).main(args=list(arguments), prog_name=name, standalone_mode=False)
    except TyperException as error:
        return _complain(_usage(error), type(error).__name__, 2, as_json)
    except RelookError as error:
        return _complain(str(error), type(error).__name__, 2 if isinstance(error, UserError) else 1, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted; what was done so far is kept", "Interrupted", 130, as_json)
    except Exception as error:  # noqa: BLE001 - nothing above this function could report it
        kept = _keep_traceback()
        message = f"unexpected {type(error).__name__}: {error}; this is a bug, the traceback is in {kept}"
        return _complain(message, type(error).__name__, 1, as_json)
    # Typer turns Ctrl-C inside a verb into this code without raising.
    if code == 130:
        return _complain("interrupted; what was done so far is kept", "Interrupted", 130, as_json)
    return code if isinstance(code, int) else 0


def main() -> None:
    """Run the command line of this process and exit with its code."""
    # By default SIGTERM ends the process at once; as an exception it runs the `finally` blocks that stop Ray.
    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    try:
        code = run(sys.argv[1:])
    except SystemExit as stopped:  # by SIGTERM
        code = stopped.code if isinstance(stopped.code, int) else 1
    end_process(code)


def _exit_on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _usage(error: TyperException) -> str:
    # Typer leaves pydantic's prefix in messages about lists of choices.
    message, context = error.format_message().replace("Value error, ", ""), getattr(error, "ctx", None)
    # Without any argument Typer has printed the help already and raises an error with an empty message.
    return f"{message.rstrip('.')}; see `{context.command_path} --help`" if message and context else message


def _complain(message: str, kind: str, code: int, as_json: bool) -> int:
    if message:
        typer.echo(f"relook: {message}", err=True)
    if as_json:
        emit_json({"error": {"type": kind, "message": message, "exit_code": code}})
    return code


def _keep_traceback() -> Path:
    # Settings may be what failed, so the folder comes from the environment alone.
    logs = Path(os.environ.get("RELOOK_HOME", ".relook")) / "logs"
    folder = logs if logs.is_dir() else Path(tempfile.gettempdir())
    path = folder / f"relook-error-{datetime.now():%Y%m%dT%H%M%S}-{os.getpid()}.txt"
    path.write_text(traceback.format_exc())
    return path


if __name__ == "__main__":
    main()
