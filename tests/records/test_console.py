"""What is printed can be copied: no path and no id is broken or cut off, in a file, a pipe or a narrow terminal."""

import io

import pytest
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table

from records import command, progress
from records.console import WholeConsole

PATH = "/data/clinic/" + "a-long-folder/" * 9 + "IMG_0001.[/a].:cat:.jpg"
ID = "0123456789abcdef" * 4
TEXT = "a sentence that says what is wrong and what is valid " * 3


def table(*, no_wrap: bool = False) -> Table:
    made = Table("id", "path", title="what was found")
    made.add_column("why", no_wrap=no_wrap)
    made.add_row(ID, PATH, TEXT.strip())
    return made


def printed(drawn: RenderableType, *, width: int | None) -> str:
    """Return what is printed in a terminal of a width, or where there is none."""
    file = io.StringIO()
    console = WholeConsole(file=file, force_terminal=width is not None, width=width or 80, color_system=None)
    console.print(drawn, highlight=False)
    return file.getvalue()


@pytest.mark.parametrize("width", [None, 20, 80, 400])
@pytest.mark.parametrize("drawn", [PATH, table(), Group(table(), PATH), Panel(PATH + "\n" + ID, expand=False)])
def test_no_word_is_broken(drawn: RenderableType, width: int | None) -> None:
    text = printed(drawn, width=width)
    assert PATH in text
    assert drawn is PATH or isinstance(drawn, Panel) or ID in text
    assert "…" not in text


def test_a_table_that_does_not_fit_wraps_its_texts_between_words() -> None:
    narrow, wide = printed(table(), width=120), printed(table(), width=None)
    assert len(narrow.splitlines()) > len(wide.splitlines()) == 6
    assert TEXT.strip() in wide
    assert TEXT.strip() not in narrow
    assert all(word in narrow for word in TEXT.split())
    assert TEXT.strip() in printed(table(no_wrap=True), width=40)


def test_without_a_terminal_columns_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in ("1", "80", "x", "100000"):
        monkeypatch.setenv("COLUMNS", columns)
        file = io.StringIO()
        WholeConsole(file=file).print(Group(TEXT, table()))
        assert file.getvalue().splitlines()[0] == TEXT
        assert PATH in file.getvalue()


def test_results_and_messages_are_printed_by_it() -> None:
    assert isinstance(command.stdout, WholeConsole)
    assert isinstance(progress.stderr, WholeConsole)
