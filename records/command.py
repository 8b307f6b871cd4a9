"""What every room's verbs share: `--config`, `--preset`, `--set` and `--json`, and how a result is printed.

`verb` adds a function to an app with these options and hands it a `Call`: its settings, its store, Ray, and where the
result goes. A function that takes a `JsonCall` gets `--json` only. The cluster room composes the whole settings, and no
other room may import it, so its root command leaves a loader in the context. Progress is in `records.progress`.
"""

import inspect
import json
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, wraps
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec, TextIO, TypeVar

import typer
from pydantic import BaseModel
from rich.console import RenderableType
from typer.core import TyperCommand, TyperGroup

from records.console import WholeConsole
from records.errors import ContractError, DataError, UnavailableError

if TYPE_CHECKING:
    from records.store import Store

SettingsLoader = Callable[[Path | None, str | None, Sequence[str]], Any]
RayStarter = Callable[[Any], AbstractContextManager[Any]]
RAY_STARTER = "relook.ray_starter"
"""Key in the context's `meta` under which the root command leaves what starts Ray: settings -> context manager."""
PRESET_NAMES = "relook.preset_names"
"""Key in the context's `meta` under which the root command leaves what lists the presets."""
CHOICES = "{choices}"
"""In the help of an option with `autocompletion`: replaced by the names it completes, when help is shown."""

stdout = WholeConsole()
_RESULTS: ContextVar[TextIO | None] = ContextVar("results", default=None)


@dataclass(frozen=True)
class JsonCall:
    """One call of a verb that needs no settings.

    Args:
        context: Typer's.
        as_json: whether `--json` was given.
    """

    context: typer.Context
    as_json: bool

    def emit(self, value: dict[str, Any] | BaseModel, human: RenderableType | None = None) -> None:
        """Print the verb's result; see `emit`."""
        emit(self.as_json, value, human)


@dataclass(frozen=True)
class Call(JsonCall):
    """One call of a verb: its settings and where its result goes.

    Args:
        config: YAML file, or None.
        preset: its name, or None for the default one.
        sets: `room.field=value` texts.
    """

    config: Path | None
    preset: str | None
    sets: tuple[str, ...]

    @cached_property
    def settings(self) -> Any:
        """The composed Settings of the cluster room; its attributes are the rooms' settings."""
        return self.compose()

    def compose(self, *, before: Sequence[str] = (), after: Sequence[str] = ()) -> Any:
        """Compose the settings with further `room.field=value` texts.

        Args:
            before: texts that `--set` may overrule.
            after: texts that overrule `--set`.
        Returns:
            The Settings object of the cluster room.
        Raises:
            ConfigError: a setting cannot work.
            ContractError: the root command left no loader in the context.
        """
        loader: SettingsLoader | None = self.context.find_root().obj
        if loader is None:
            raise ContractError("the root command has to put a settings loader into the context")
        return loader(self.config, self.preset, (*before, *self.sets, *after))

    @contextmanager
    def store(self) -> "Generator[Store]":
        """Open the store of the settings while the block runs."""
        # Imported here: the store brings the database driver, and `relook --help` needs none.
        from records.store import open_store

        with closing(open_store(self.settings.records)) as store:
            yield store

    def ray(self, settings: Any = None) -> AbstractContextManager[Any]:
        """Start Ray for a block.

        Args:
            settings: composed settings; None takes those of the call.
        Returns:
            A context in which Ray runs; at its end nothing that it started is left.
        Raises:
            ContractError: the root command left nothing that starts Ray.
        """
        starter: RayStarter | None = self.context.meta.get(RAY_STARTER)
        if starter is None:
            raise ContractError("the root command has to put a function that starts Ray into the context")
        return starter(self.settings if settings is None else settings)


P = ParamSpec("P")
C = TypeVar("C", bound=JsonCall)


def verb(
    app: typer.Typer, name: str, *, preset: str | None = None
) -> Callable[[Callable[Concatenate[C, P], None]], Callable[Concatenate[C, P], None]]:
    """Add a function to an app as a verb with the common options.

    Args:
        app: the verb's group.
        name: the verb's name.
        preset: name of the preset without `--preset`; None leaves it to the environment.
    Returns:
        A decorator. The function's first parameter is a `Call` (four options) or a `JsonCall` (`--json` alone), the
        others are declared as for Typer. The function itself is not changed.
    """

    def add(function: Callable[Concatenate[C, P], None]) -> Callable[Concatenate[C, P], None]:
        app.command(name, cls=_Verb)(_with_common_options(function, preset))
        return function

    return add


def group_verb(
    app: typer.Typer,
) -> Callable[[Callable[Concatenate[Call, P], None]], Callable[Concatenate[Call, P], None]]:
    """Call a function when a group is called without a verb; the group gets the common options.

    Args:
        app: a group with `invoke_without_command`.
    Returns:
        A decorator, as of `verb`.
    """

    def add(function: Callable[Concatenate[Call, P], None]) -> Callable[Concatenate[Call, P], None]:
        def alone(call: Call, *args: P.args, **kwargs: P.kwargs) -> None:
            # Typer calls a group's function before every verb of the group, too.
            if call.context.invoked_subcommand is None:
                function(call, *args, **kwargs)

        app.callback(cls=_VerbGroup)(_with_common_options(wraps(function)(alone), None))
        return function

    return add


def preset_names(ctx: typer.Context) -> list[str]:
    """Return the names of the presets; none if no root command left them in the context."""
    return list(ctx.meta.get(PRESET_NAMES, list)())


_PANEL = "Common options"
_JSON = Parameter(
    "as_json",
    Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel=_PANEL)],
)


def _settings_options(preset: str | None) -> list[Parameter]:
    config = typer.Option("--config", help="Read settings from a YAML file.", rich_help_panel=_PANEL)
    preset_option = typer.Option(
        "--preset", help=f"Start from a preset: {CHOICES}.", autocompletion=preset_names, rich_help_panel=_PANEL
    )
    sets = typer.Option("--set", help="Set room.field=value; may be repeated.", rich_help_panel=_PANEL)
    kind = Parameter.KEYWORD_ONLY
    return [
        Parameter("config", kind, default=None, annotation=Annotated[Path | None, config]),
        Parameter("preset", kind, default=preset, annotation=Annotated[str | None, preset_option]),
        Parameter("sets", kind, default=None, annotation=Annotated[list[str] | None, sets]),
    ]


def _with_common_options(function: Callable[..., None], preset: str | None) -> Callable[..., None]:
    """Return a function with the signature that Typer reads: context, the verb's own parameters, common options."""
    # Evaluated here, because Typer takes `__signature__` as it is and would see annotations that are texts.
    first, *own = inspect.signature(function, eval_str=True).parameters.values()
    if first.annotation not in (Call, JsonCall):
        raise ContractError(f"the first parameter of the verb {function.__name__} has to be a Call or a JsonCall")
    # The annotation decides, as everywhere in Typer; so a verb cannot use settings whose options it does not have.
    takes_settings = first.annotation is Call

    @wraps(function)
    def called(ctx: typer.Context, *, as_json: bool, **options: Any) -> None:
        _require_plain(options)
        if not takes_settings:
            function(JsonCall(ctx, as_json), **options)
            return
        config, preset, sets = (options.pop(name) for name in ("config", "preset", "sets"))
        function(Call(ctx, as_json, config, preset, tuple(sets or ())), **options)

    # All keyword-only: Typer passes by name, and a required option may then follow one with a default.
    ctx = Parameter("ctx", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    common = [*(_settings_options(preset) if takes_settings else ()), _JSON]
    own = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own]
    called.__signature__ = inspect.Signature([ctx, *own, *common])  # type: ignore[attr-defined]
    return called


def _require_plain(options: Mapping[str, Any]) -> None:
    """Raise DataError for a text that no database can hold, or that a terminal would obey; paths may be anything."""
    # Imported here: the record types are built when they are imported, and `relook --help` needs none.
    from records.types.base import Plain

    rule = Plain(10_000, lines=True)
    for name, value in options.items():
        for text in value if isinstance(value, (list, tuple)) else [value]:
            try:
                rule.check(text if isinstance(text, str) else "")
            except ValueError as error:
                raise DataError(f"{name.replace('_', '-')}: {error}") from error


def _list_choices(params: Iterable[Any], ctx: Any) -> None:
    """Put the names that an option completes into its help."""
    for param in params:
        if CHOICES in (param.help or ""):
            names = [item.value for item in param.shell_complete(ctx, "")]
            listed = " or ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)
            # Typer builds its commands anew for every run, so nobody else sees the changed text.
            param.help = param.help.replace(CHOICES, listed)


class _Verb(TyperCommand):
    # Only when help is shown: the registries behind the names cost imports that no other call should pay.
    def format_help(self, ctx: Any, formatter: Any) -> None:
        _list_choices(self.params, ctx)
        super().format_help(ctx, formatter)


class _VerbGroup(TyperGroup):
    def format_help(self, ctx: Any, formatter: Any) -> None:
        _list_choices(self.params, ctx)
        super().format_help(ctx, formatter)


@contextmanager
def until_stopped() -> Generator[None]:
    """End normally on Ctrl-C and SIGTERM; for verbs that run until somebody stops them, such as a supervisor."""
    try:
        yield
    except KeyboardInterrupt:
        pass
    except SystemExit as ending:
        if ending.code != 128 + signal.SIGTERM:
            raise


@contextmanager
def advises_resume(begun: Callable[[], bool]) -> Generator[None]:
    """Add to an UnavailableError that `--resume` goes on, if `begun` says that there is something to go on with."""
    try:
        yield
    except UnavailableError as error:
        if "--resume" in str(error) or not begun():
            raise
        raise type(error)(f"{error}; run it again with --resume") from error


@contextmanager
def results_alone() -> Generator[None]:
    """Keep stdout for results while the block runs: what engines print there goes to stderr instead."""
    # A context variable and not the object that `sys.stdout` is now: tests and rich replace `sys.stdout` themselves.
    results = sys.stdout
    token = _RESULTS.set(results)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _RESULTS.reset(token)


def emit_json(value: dict[str, Any]) -> None:
    """Print one JSON object on stdout; it must hold no NaN."""
    # NaN is not JSON: most parsers outside of Python would refuse the whole document.
    typer.echo(json.dumps(value, allow_nan=False), file=_RESULTS.get())


def emit(as_json: bool, value: dict[str, Any] | BaseModel, human: RenderableType | None = None) -> None:
    """Print the result of a verb: one JSON object, or text and tables.

    Args:
        as_json: whether `--json` was given.
        value: printed with `--json`; it must hold no NaN.
        human: printed otherwise; None prints nothing.
    """
    if as_json:
        plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        emit_json(plain)
    elif human is not None:
        stdout.print(human)
