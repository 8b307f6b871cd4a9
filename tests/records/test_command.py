import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from pydantic import BaseModel

from records.command import RAY_STARTER, emit, progress, ray_of, settings_of, status
from records.errors import ContractError


class Result(BaseModel):
    """What a verb returns."""

    name: str
    value: float


def _context(loader: Any = None) -> typer.Context:
    return typer.Context(click.Command("verb"), parent=typer.Context(click.Command("relook"), obj=loader))


def test_settings_come_from_the_loader_of_the_root_command() -> None:
    ctx = _context(lambda config, preset, sets: (config, preset, sets))
    assert settings_of(ctx, Path("x.yaml"), "laptop", ["a.b=1"]) == (Path("x.yaml"), "laptop", ("a.b=1",))
    assert settings_of(ctx, None, None, None) == (None, None, ())
    with pytest.raises(ContractError, match="settings loader"):
        settings_of(_context(), None, None, None)


def test_ray_comes_from_the_root_command_too() -> None:
    ctx = _context()
    with pytest.raises(ContractError, match="starts Ray"):
        ray_of(ctx, None)
    ctx.meta[RAY_STARTER] = lambda settings: nullcontext(settings)
    with ray_of(ctx, "settings") as session:
        assert session == "settings"


def test_json_is_one_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    emit(True, {"ü": 1, "list": [1.5, None]}, "for people")
    emit(True, Result(name="x", value=0.5))
    first, second = capsys.readouterr().out.splitlines()
    assert json.loads(first) == {"ü": 1, "list": [1.5, None]}
    assert json.loads(second) == {"name": "x", "value": 0.5}


def test_json_holds_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        emit(True, {"x": float("nan")})
    assert capsys.readouterr().out == ""


def test_people_get_their_own_form(capsys: pytest.CaptureFixture[str]) -> None:
    emit(False, {"x": 1}, "for people")
    emit(False, {"x": 1})
    assert capsys.readouterr().out == "for people\n"


def test_progress_never_reaches_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as bar:
        bar.advance(bar.add_task("counting", total=2))
    with status("waiting"):
        pass
    assert capsys.readouterr().out == ""
