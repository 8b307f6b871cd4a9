"""`make soak`: all parts run whatever fails, and the summary says which held."""

import sys
from pathlib import Path

import pytest

from bench.drills import soak
from bench.drills.soak import Part


def test_a_part_that_fails_does_not_keep_the_others_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [Part("first", "this"), Part("absent", "no_such_module"), Part("last", "platform", variables={"A": "b"})]
    monkeypatch.setattr(soak, "parts", lambda *_, **__: parts)
    monkeypatch.setattr(sys, "argv", ["soak", "--logs", str(tmp_path / "logs")])
    assert soak.main() == 1
    rows = (tmp_path / "logs" / "summary.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| first", "held"], ["| absent", "FAILED, exit code 1"], ["| last", "held"],
    ]  # fmt: skip
    assert "Namespaces are one honking great idea" in rows[0]
    assert "No module named no_such_module" in rows[1]
    assert (tmp_path / "logs" / "last.log").read_text()
    assert "3 of 3: last" in capsys.readouterr().err

    monkeypatch.setattr(sys, "argv", ["soak", "--logs", str(tmp_path / "logs"), "first", "last"])
    assert soak.main() == 0
    monkeypatch.setattr(sys, "argv", ["soak", "lost"])
    with pytest.raises(SystemExit):
        soak.main()
    assert "no part is called lost; there are first, absent, last" in capsys.readouterr().err


def test_nodes_get_networks_of_their_own_where_that_is_possible() -> None:
    by_root = {part.name: part.arguments for part in soak.parts(10, 30, root=True)}
    by_others = {part.name: part.arguments for part in soak.parts(10, 30, root=False)}
    assert by_root.keys() == by_others.keys()
    assert "--namespaces" in by_root["three_nodes"]
    assert "--namespaces" not in by_others["three_nodes"]
    assert "--loopback" not in by_root["scaling"]
    assert "--loopback" in by_others["scaling"]
