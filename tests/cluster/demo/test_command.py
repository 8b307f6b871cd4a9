"""What `relook demo` prints at its end, and how long it keeps the servers."""

import io
import os
import pty
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cluster.demo.state import DemoSummary, RoundSummary

# Ray Serve warns about its own definitions while it is imported.
pytestmark = pytest.mark.filterwarnings(
    r"ignore::DeprecationWarning:ray\..*", r"ignore::DeprecationWarning:pydantic\..*"
)


def show(finished: Any) -> None:
    from cluster.demo.command import _show

    _show(finished, as_json=False)


def running(**changes: Any) -> Any:
    """A finished demo; the servers are names only."""
    one = RoundSummary(
        model_id="a" * 64, dataset_id="d" * 64, labels_from_annotators=0, balanced_accuracy=0.5,
        balanced_accuracy_ci=[0.4, 0.6], promoted=True, status="champion", why="no comparison is worse",
    ).model_copy(update=changes)  # fmt: skip
    summary = DemoSummary(
        data={}, search={}, rounds=[one, one], served={"requests": 24, "failed": 0},
        label_studio={"tasks_pushed": 8, "annotations_pulled": 9, "lost": 0, "duplicated": 0},
        gate={"harmed_challenger_refused": True}, swap={"requests": 5, "failed": 0},
        trace={"prediction_id": "p1"}, seconds={"data": 2.0, "round_1": 60.0},
    )  # fmt: skip
    password = SimpleNamespace(get_secret_value=lambda: "the-password")
    server = SimpleNamespace(url="http://ls", username="admin@relook", password=password)
    return SimpleNamespace(summary=summary, service=SimpleNamespace(url="http://api"), label_studio=server)


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A terminal in the place of stdin; what is written to this end are the keys."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        yield ours
    os.close(ours)


def test_a_script_gets_the_summary_and_the_demo_ends(capsys: pytest.CaptureFixture[str]) -> None:
    show(running(key_class="mel", key_class_sensitivity=0.9, balanced_accuracy=None))
    captured = capsys.readouterr()
    for said in ("mel sensitivity", "0.900", "undefined", "24, 0 failed", "refused", "62 s", "trace p1",
                 "what to try next"):  # fmt: skip
        assert said in captured.out
    assert "the-password" not in captured.out + captured.err


def test_in_a_terminal_the_servers_run_until_q_is_pressed(
    keyboard: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("cluster.demo.command.stderr", Console(file=screen, force_terminal=True, width=120))
    over = threading.Event()

    def press() -> None:
        # Again and again: keys that were pressed before the terminal reads single ones are discarded.
        while not over.wait(0.02):
            os.write(keyboard, b"xq")

    presses = threading.Thread(target=press)
    presses.start()
    show(running())
    over.set()
    presses.join()
    printed = capsys.readouterr().out
    for said in ("still running", "http://api", "http://ls", "admin@relook"):
        assert said in printed
    assert "sensitivity" not in printed, "the taxonomy has no key class"
    assert "the-password" not in printed, "stdout may be a file"
    assert "password for admin@relook: the-password" in screen.getvalue()
    assert "press q to stop them" in screen.getvalue()
