"""What every room's command line shares: the common options, one JSON object out, progress on stderr.

The whole settings are composed by the cluster room, which no other room may import; its root
command puts a loader into the context, and `settings_of` calls it.
"""

import json
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from records.errors import ContractError

SettingsLoader = Callable[[Path | None, str | None, Sequence[str]], Any]
RayStarter = Callable[[Any], AbstractContextManager[Any]]
RAY_STARTER = "relook.ray_starter"
"""Key under which the root command leaves what starts Ray: settings -> context manager."""

ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML file with settings.", show_default=False)]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset", help="laptop, single_gpu, multi_gpu, clinical, ham10000_cpu, dissertation or dissertation_mini."
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="room.field=value; may be given more than once.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

stderr = Console(stderr=True)
stdout = Console()
_RESULTS: ContextVar[TextIO | None] = ContextVar("results", default=None)


def settings_of(ctx: typer.Context, config: Path | None, preset: str | None, sets: Sequence[str] | None) -> Any:
    """Return the composed settings of this call.

    Args:
        ctx: of the verb.
        config: YAML file, or None.
        preset: name, or None for the default one.
        sets: `room.field=value` texts.
    Returns:
        The Settings object of the cluster room; its attributes are the rooms' settings.
    Raises:
        ConfigError: a setting cannot work.
        ContractError: the root command put no loader into the context.
    """
    loader: SettingsLoader | None = ctx.find_root().obj
    if loader is None:
        raise ContractError("the root command has to put a settings loader into the context")
    return loader(config, preset, tuple(sets or ()))


def ray_of(ctx: typer.Context, settings: Any) -> AbstractContextManager[Any]:
    """Return the Ray session of this call, to be entered with `with`.

    Args:
        ctx: of the verb.
        settings: from `settings_of`.
    Returns:
        A context in which Ray runs; at its end nothing that it started is left.
    Raises:
        ContractError: the root command left nothing that starts Ray.
    """
    starter: RayStarter | None = ctx.meta.get(RAY_STARTER)
    if starter is None:
        raise ContractError("the root command has to leave what starts Ray in the context")
    return starter(settings)


@contextmanager
def results_alone() -> Generator[None]:
    """Keep stdout for results while the block runs: what engines print there goes to stderr instead."""
    results = sys.stdout
    token = _RESULTS.set(results)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _RESULTS.reset(token)


def emit_json(value: dict[str, Any]) -> None:
    """Print one JSON object on stdout; it must hold no NaN."""
    typer.echo(json.dumps(value, allow_nan=False), file=_RESULTS.get())


def emit(as_json: bool, value: dict[str, Any] | BaseModel, human: RenderableType | None = None) -> None:
    """Print the result of a verb: one JSON object, or its form for people.

    Args:
        as_json: what `--json` said.
        value: the machine-readable result; it must hold no NaN.
        human: what a person sees; nothing is printed for None.
    """
    if as_json:
        plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        emit_json(plain)
    elif human is not None:
        stdout.print(human)


def figures_table(title: str, figures: Mapping[str, Any]) -> Table:
    """Lay out what was measured, for people.

    Args:
        title: of the table.
        figures: by key; of one that is None, `reasons` may say why, by the key or a part of it.
    Returns:
        A row per figure.
    """
    table, reasons = Table("what", "figure", title=title), figures.get("reasons", {})
    for name, value in figures.items():
        if name != "reasons":
            why = next((reason for key, reason in reasons.items() if key in name), "")
            shown = round(value, 3) if isinstance(value, float) else value
            table.add_row(name.replace("_", " "), why if value is None else str(shown))
    return table


def progress() -> Progress:
    """Return a progress bar on stderr: what, bar, count, time left."""
    return Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
    )


def status(text: str) -> AbstractContextManager[Any]:
    """Return a spinner on stderr for work whose length is not known."""
    return stderr.status(text)
