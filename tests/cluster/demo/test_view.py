"""What the demo shows: one screen in a terminal, lines elsewhere."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from cluster.demo.traffic import Tally
from cluster.demo.view import View


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Let the view believe that it is in a terminal; returns what it draws there."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, height=40, color_system=None)
    monkeypatch.setattr("cluster.demo.view.stderr", console)
    return screen


def last_screen(text: str) -> list[str]:
    return text[text.rindex("relook demo") :].splitlines()


def test_a_terminal_shows_the_stages_and_the_traffic(terminal: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally()
    view = View(tally)
    with view.shown():
        with view.stage("Images", "import them"):
            for number in range(8):
                view.say(f"line {number}")
        tally.requests, tally.flagged, tally.last = 12, 2, "ISIC_1: answered"
        tally.decisions.update(answered=9, review=3)
        with view.stage("Traffic", "send images"):
            view.now("sending")
    drawn = last_screen(terminal.getvalue())
    shown = "\n".join(drawn)
    for said in ("✓ Images", "line 7", "✓ Traffic", "send images", "12 requests", "0 failed", "2 flagged",
                 "answered 9  review 3", "ISIC_1: answered"):  # fmt: skip
        assert said in shown
    assert "line 1" not in shown, "the last six lines of a stage are kept"
    assert "import them" not in shown, "the reason of the newest stage only"
    assert capsys.readouterr().err == ""


def test_a_stage_that_runs_has_no_mark_of_its_end(terminal: io.StringIO) -> None:
    view = View(Tally())
    with view.shown(), view.stage("Images", "import them"):
        view.now("decoding")
        Console(file=terminal, width=100).print(view._render())
        drawn = "\n".join(last_screen(terminal.getvalue()))
    assert "▸ Images" in drawn
    assert "decoding" in drawn


def test_elsewhere_every_stage_and_result_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    view = View(Tally())
    with view.shown(), view.stage("Images", "import them"):
        view.say("24 images")
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["Images: import them ...", "  24 images", "Images: done in 0 s"]


def test_nothing_is_said_before_the_first_stage(tmp_path: Path) -> None:
    screen = io.StringIO()
    Console(file=screen, width=60).print(View(Tally())._render())
    assert "relook demo" in screen.getvalue()
