import io
import json
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import typer
from click.testing import Result as CliResult
from pydantic import BaseModel
from rich.console import Console
from typer.testing import CliRunner

from bench.figures import figures_table
from records.command import (
    PRESET_NAMES,
    RAY_STARTER,
    Call,
    JsonCall,
    emit,
    group_verb,
    until_stopped,
    verb,
)
from records.errors import ContractError
from records.store import Store


class Result(BaseModel):
    """What a verb returns."""

    name: str
    value: float


def _call(loader: Any = None, sets: tuple[str, ...] = ()) -> Call:
    context: Any = SimpleNamespace(find_root=lambda: SimpleNamespace(obj=loader), meta={})
    return Call(context, False, Path("x.yaml"), "laptop", sets)


def _colours() -> list[str]:
    return ["red", "green", "blue"]


def _app(calls: list[tuple[Any, ...]]) -> typer.Typer:
    """Return an app whose verbs record their calls."""
    app = typer.Typer()

    @app.callback()
    def root(ctx: typer.Context) -> None:
        ctx.obj = lambda config, preset, sets: (config, preset, sets)
        ctx.meta[PRESET_NAMES] = lambda: ("laptop", "clinic")

    @verb(app, "paint")
    def paint(
        call: Call,
        what: Annotated[str, typer.Argument(metavar="WHAT")],
        colour: Annotated[str, typer.Option(help="One of {choices}.", autocompletion=_colours)] = "red",
    ) -> None:
        """Paint it."""
        calls.append((what, colour, call.as_json, call.settings))

    @verb(app, "show", preset="demo")
    def show(call: Call) -> None:
        """Show it."""
        calls.append(call.settings)

    @verb(app, "list")
    def list_all(call: JsonCall) -> None:
        """List all."""
        calls.append((call.as_json,))

    group = typer.Typer(invoke_without_command=True)
    app.add_typer(group, name="frames")

    @group_verb(group)
    def frames(call: Call) -> None:
        """List the frames."""
        calls.append(("frames", call.settings))

    @verb(group, "hang")
    def hang(call: Call) -> None:
        """Hang a frame."""
        calls.append(("hang", call.settings))

    return app


def _run(app: typer.Typer, *arguments: str) -> CliResult:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False, env={"COLUMNS": "200"})


def test_a_verb_is_called_with_its_own_options_and_the_common_ones() -> None:
    calls: list[tuple[Any, ...]] = []
    app = _app(calls)
    _run(app, "paint", "door", "--colour", "blue", "--preset", "laptop", "--set", "a.b=1", "--set", "c.d=2", "--json")
    _run(app, "paint", "door", "--config", "x.yaml")
    _run(app, "show")
    _run(app, "list", "--json")
    assert calls == [
        ("door", "blue", True, (None, "laptop", ("a.b=1", "c.d=2"))),
        ("door", "red", False, (Path("x.yaml"), None, ())),
        (None, "demo", ()),
        (True,),
    ]


def test_a_group_without_a_verb_is_a_verb_itself() -> None:
    calls: list[tuple[Any, ...]] = []
    app = _app(calls)
    _run(app, "frames", "--preset", "laptop")
    _run(app, "frames", "hang", "--preset", "clinic")
    assert calls == [("frames", (None, "laptop", ())), ("hang", (None, "clinic", ()))]


def test_help_names_every_option_and_lists_choices_and_presets() -> None:
    app = _app([])
    shown = " ".join(_run(app, "paint", "--help").stdout.split())
    for option in ("--colour", "--config", "--preset", "--set", "--json"):
        assert option in shown
    assert shown.index("--colour") < shown.index("--config") < shown.index("--preset") < shown.index("--json")
    assert "One of red, green or blue." in shown
    assert "Start from a preset: laptop or clinic." in shown
    assert "{choices}" not in shown
    assert "laptop or clinic" in _run(app, "frames", "--help").stdout
    alone = _run(app, "list", "--help").stdout
    assert "--json" in alone
    assert "--preset" not in alone


def test_a_verb_has_to_say_which_call_it_takes() -> None:
    with pytest.raises(ContractError, match=r"first parameter of the verb lost has to be a Call"):

        @verb(typer.Typer(), "lost")
        def lost(call: str) -> None:  # type: ignore[type-var]
            """Take no call."""


def test_settings_come_from_the_loader_of_the_root_command() -> None:
    call = _call(lambda config, preset, sets: (config, preset, sets), sets=("a.b=1",))
    assert call.settings == (Path("x.yaml"), "laptop", ("a.b=1",))
    assert call.compose(before=["a.b=0"], after=["c.d=2"]) == (Path("x.yaml"), "laptop", ("a.b=0", "a.b=1", "c.d=2"))
    with pytest.raises(ContractError, match="settings loader"):
        assert _call().settings


def test_settings_are_composed_once() -> None:
    loads: list[Any] = []
    call = _call(lambda *sources: loads.append(sources) or SimpleNamespace())
    assert call.settings is call.settings
    assert len(loads) == 1


def test_the_store_of_the_settings_is_opened(store: Store) -> None:
    call = _call(lambda *_: SimpleNamespace(records=store.settings))
    with call.store() as opened:
        assert opened.home.root == store.home.root


def test_ray_comes_from_the_root_command_too() -> None:
    call = _call(lambda *_: "settings")
    with pytest.raises(ContractError, match="starts Ray"):
        call.ray()
    call.context.meta[RAY_STARTER] = lambda settings: nullcontext(settings)
    with call.ray() as session:
        assert session == "settings"
    with call.ray("others") as session:
        assert session == "others"


def test_json_is_one_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    emit(True, {"ü": 1, "list": [1.5, None]}, "as text")
    emit(True, Result(name="x", value=0.5))
    first, second = capsys.readouterr().out.splitlines()
    assert json.loads(first) == {"ü": 1, "list": [1.5, None]}
    assert json.loads(second) == {"name": "x", "value": 0.5}


def test_json_holds_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        emit(True, {"x": float("nan")})
    assert capsys.readouterr().out == ""


def test_without_json_the_text_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    emit(False, {"x": 1}, "as text")
    emit(False, {"x": 1})
    assert capsys.readouterr().out == "as text\n"


def test_a_verb_that_waits_ends_normally_when_it_is_stopped_and_not_otherwise() -> None:
    for ending in (KeyboardInterrupt(), SystemExit(128 + signal.SIGTERM)):
        with until_stopped():
            raise ending
    with pytest.raises(SystemExit), until_stopped():
        raise SystemExit(1)


def test_figures_are_rows_and_what_was_not_measured_has_its_reason() -> None:
    figures = {"images_per_s": 12.34567, "runs": 3, "p99_s": None, "reasons": {"p99": "too few requests"}}
    console = Console(file=io.StringIO(), width=80)
    console.print(figures_table("bench", figures))
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines()]
    assert [row for row in cells if row] == [
        ["images per s", "12.346"], ["runs", "3"], ["p99 s", "too few requests"],
    ]  # fmt: skip
