"""Progress in a terminal and without one; without one, by a clock that the test moves."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from rich.console import Console

import records.progress
from records.progress import LineProgress, duration, progress, say, status


@dataclass
class Log:
    """A clock that a test moves, and the lines that were printed."""

    now_s: float = 100.0
    lines: list[str] = field(default_factory=list)

    def progress(self) -> LineProgress:
        """Return progress that prints here."""
        return LineProgress(self.lines.append, lambda: self.now_s)


@pytest.fixture
def log() -> Log:
    return Log()


def test_every_step_prints_what_it_told_and_the_time_left(log: Log) -> None:
    with log.progress() as bar:
        task = bar.add_task("train", total=3, step="epoch")
        for epoch in (1, 2, 3):
            log.now_s += 50
            bar.update(task, completed=epoch, detail=f"loss 0.{epoch}")
    assert log.lines == [
        "train: epoch 0/3",
        "train: epoch 1/3, loss 0.1, 1 min 40 s left",
        "train: epoch 2/3, loss 0.2, 50 s left",
        "train: epoch 3/3, loss 0.3, done in 2 min 30 s",
    ]


def test_a_caller_may_know_the_time_left_better(log: Log) -> None:
    with log.progress() as bar:
        task = bar.add_task("train", total=12, step="epoch")
        log.now_s += 50
        bar.update(task, completed=7, detail="loss 0.8", left_s=250.0)
    assert log.lines[1] == "train: epoch 7/12, loss 0.8, 4 min 10 s left"
    assert log.lines[2] == "train: epoch 7/12, loss 0.8, done in 50 s"


def test_steps_are_printed_once_per_second_at_most(log: Log) -> None:
    with log.progress() as bar:
        task = bar.add_task("train", total=1000, step="epoch")
        for epoch in range(1, 1001):
            log.now_s += 0.25
            bar.update(task, completed=epoch, detail=f"loss {epoch}")
    assert len(log.lines) == 252  # the first line, one per second of 250, the last line
    assert log.lines[-1] == "train: epoch 1000/1000, loss 1000, done in 4 min 10 s"


def test_counts_are_printed_once_per_minute(log: Log) -> None:
    with log.progress() as bar:
        task = bar.add_task("Reading images", total=600)
        for _ in range(600):
            log.now_s += 0.25
            bar.advance(task)
    assert log.lines == [
        "Reading images: 0/600",
        "Reading images: 240/600, 1 min 30 s left",
        "Reading images: 480/600, 30 s left",
        "Reading images: 600/600, done in 2 min 30 s",
    ]


def test_a_total_may_come_later_or_never(log: Log) -> None:
    with log.progress() as bar:
        images, maps = bar.add_task("images", total=None), bar.add_task("Measuring heat maps", total=None)
        log.now_s += 61
        bar.update(images, completed=30, total=90)
        bar.update(maps)
    assert log.lines == [
        "images ...",
        "Measuring heat maps ...",
        "images: 30/90, 2 min 2 s left",
        "Measuring heat maps",
        "images: 30/90, done in 1 min 1 s",
        "Measuring heat maps, done in 1 min 1 s",
    ]


def test_work_that_fails_did_not_finish(log: Log) -> None:
    def read_images() -> None:
        with log.progress() as bar:
            task = bar.add_task("images", total=10)
            log.now_s += 5
            bar.advance(task, 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_images()
    assert log.lines == ["images: 0/10", "images: 3/10, stopped after 5 s"]


def test_nothing_to_do_prints_nothing(log: Log) -> None:
    with log.progress() as bar:
        bar.update(bar.add_task("images", total=0), completed=0)
    assert log.lines == []


def test_a_removed_task_ends_without_a_line(log: Log) -> None:
    with log.progress() as bar:
        bar.remove_task(bar.add_task("round 1: fit", total=None))
    assert log.lines == ["round 1: fit ..."]


def test_a_message_that_only_counts_differently_is_a_count(log: Log) -> None:
    with log.progress() as bar:
        task = bar.add_task("Label Studio", total=None)
        for number in range(1, 100):
            log.now_s += 1
            bar.update(task, description=f"fetching package {number} of 99")
        bar.update(task, description="unpacking 99 packages")
    assert log.lines[:3] == ["Label Studio ...", "fetching package 1 of 99", "fetching package 61 of 99"]
    assert log.lines[3:] == ["unpacking 99 packages", "unpacking 99 packages, done in 1 min 39 s"]


def test_without_a_terminal_lines_with_the_time_of_day_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as bar:
        bar.advance(bar.add_task("counting", total=1))
    with status("waiting") as shown:
        shown.update("waiting longer")
        shown.stop()
        say("ready")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line.split(" ", 1) for line in captured.err.splitlines()]
    assert all(len(time.split(":")) == 3 for time, _ in lines)
    assert [text for _, text in lines] == [
        "counting: 0/1",
        "counting: 1/1, done in 0 s",
        "waiting ...",
        "waiting longer",
        "waiting longer, done in 0 s",
        "ready",
    ]


def _in_terminal(monkeypatch: pytest.MonkeyPatch, work: Callable[[], None]) -> str:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(records.progress, "stderr", terminal)
    work()
    shown = terminal.file
    assert isinstance(shown, io.StringIO)
    return shown.getvalue()


def test_a_terminal_shows_a_bar_with_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        with progress() as bar:
            task = bar.add_task("train", total=4, step="epoch")
            bar.update(task, completed=3, detail="loss 0.812")
            bar.refresh()

    shown = _in_terminal(monkeypatch, work)
    assert "train" in shown
    assert "━" in shown
    assert "3/4" in shown
    assert "loss 0.812" in shown


def test_a_terminal_shows_a_spinner(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        with status("starting the service") as shown:
            shown.update("still starting")
            shown.stop()
        say("ready")

    shown = _in_terminal(monkeypatch, work)
    assert "still starting" in shown
    assert shown.endswith("ready\n")


def test_durations_have_two_units() -> None:
    assert [duration(s) for s in (0.2, 59.6, 61, 3599.7, 7260)] == [
        "0 s",
        "1 min 0 s",
        "1 min 1 s",
        "1 h 0 min",
        "2 h 1 min",
    ]
