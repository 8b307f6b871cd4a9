"""The house rules that a reader notices: import directions, the glossary's words, sizes, comments, line widths."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("records", "images", "vision", "trainers", "tuning", "serving", "labeling", "cluster")
# 283 modules and 43,681 lines at first; safe exposure added 27 and 6,750; layouts, export and the Python interface 17
# and 3,500; replicas, open inference, hooks, export, DICOM, Label Studio projects and tracking 50 and 8,000; incidents,
# context, views, networks of timm, drift, gold tasks, outlines, value of labels and Slurm 60 and 11,500; ensembles,
# distillation, versions from changes and exports of Label Studio 7 and 1,200; value of labels in API and page 3 and
# 200; refits and what a model has seen 3 and 330; marks of changed tasks and kept consensus 3 and 200; a quicker import
# of Gradio 1 and 40; processes that fits share 3 and 40; models that see the whole image 2 and 200;
# features that are computed once, and killed daemons that are waited for, 1 and 150;
# the number format of training, and what labels bought in Label Studio, 0 and 50;
# memory that a process keeps, columns that no index is chosen for, an index of due dates, 1 and 70;
# parts of a batch that are computed side by side, 1 and 210; peers at other sites 4 and 955.
MAX_MODULES = 468
MAX_LINES = 76_240
MIN_COMMENT_SHARE = 0.02
MAX_MARKDOWN_COLUMNS = 120

GLOSSARY = ROOT / "docs" / "glossary.md"
PROSE_SUFFIXES = {".md", ".html", ".js", ".css", ".yaml", ".json", ".sh", ".svg"}


class Banned(NamedTuple):
    """A word that the glossary replaces."""

    word: str
    room: str | None
    names_only: bool


@cache
def banned_words() -> tuple[Banned, ...]:
    """Read the last column of the glossary's tables."""
    found = []
    for line in GLOSSARY.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 3:
            continue
        for word, room in re.findall(r"`([^`]+)`(?: \((\w+)\))?", cells[2]):
            found.append(Banned(word.removesuffix("()"), room or None, word.endswith("()")))
    return tuple(dict.fromkeys(found))


def sources(*folders: str) -> Iterator[Path]:
    """Yield the Python files below folders of the project."""
    for folder in folders:
        yield from sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


@cache
def parts_of(name: str) -> frozenset[str]:
    """Split an identifier into lower-case words; `TrafficShare` and `traffic_share` give the same."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return frozenset(part.lower() for part in spaced.split("_") if part)


def names_and_texts(path: Path) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Return (line, identifier) and (line, text) of a file; texts are strings and comments."""
    names, texts = [], []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.NAME:
            names.append((token.start[0], token.string))
        elif token.type in (tokenize.STRING, tokenize.COMMENT):
            texts.append((token.start[0], token.string))
    return names, texts


def complaints(path: Path, banned: tuple[Banned, ...]) -> list[str]:
    """Name the places of a file that use a word which the glossary replaces."""
    where = path.relative_to(ROOT).as_posix()
    rules = [rule for rule in banned if rule.room is None or where.startswith(f"{rule.room}/")]
    exact = {rule.word for rule in rules if rule.names_only}
    words = {rule.word for rule in rules if not rule.names_only}
    # One pattern for all words: a pattern for each would read every text dozens of times.
    pattern = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, sorted(words)))})(?![\w-])", re.IGNORECASE)
    if path.suffix == ".py":
        names, texts = names_and_texts(path)
    else:
        names, texts = [], list(enumerate(path.read_text().splitlines(), 1))
    found = []
    for line, name in names:
        hits = (words & parts_of(name)) | (exact & {name})
        found += [f"{where}:{line} {name}: {word}" for word in sorted(hits)]
    for line, text in texts:
        found += [f"{where}:{line}: {word.lower()}" for word in dict.fromkeys(pattern.findall(text))]
    return found


def documents() -> list[Path]:
    """Return what people read: documentation, templates, dashboards and deploy files."""
    found = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    for folder in ("docs", "bench", *ROOMS):
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in PROSE_SUFFIXES and path.is_file()]
    return [path for path in found if path != GLOSSARY]


def test_the_glossary_names_words_to_avoid() -> None:
    words = {rule.word for rule in banned_words()}
    assert {"picture", "answer", "expert", "question", "objection", "mailbox"} <= words
    assert Banned("trial", "serving", names_only=False) in banned_words()
    assert Banned("GivenAnswer", None, names_only=True) in banned_words()


def test_a_forbidden_word_is_found_in_names_and_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_house.ROOT" if __name__ == "tests.test_house" else f"{__name__}.ROOT", tmp_path)
    (tmp_path / "serving").mkdir()
    path = tmp_path / "serving" / "made_up.py"
    path.write_text('class TrialRun:\n    """Ask an expert."""\n\n    num_pictures = 1\n')
    rules = (Banned("trial", "serving", False), Banned("expert", None, False), Banned("pictures", None, False))
    assert complaints(path, rules) == [
        "serving/made_up.py:1 TrialRun: trial",
        "serving/made_up.py:4 num_pictures: pictures",
        "serving/made_up.py:2: expert",
    ]


def test_code_and_documents_use_the_words_of_the_glossary() -> None:
    banned = banned_words()
    found = [line for path in (*sources(*ROOMS, "bench"), *documents()) for line in complaints(path, banned)]
    assert found == []


def test_no_import_runs_in_a_circle() -> None:
    """`TYPE_CHECKING` blocks and imports inside functions count, too."""
    modules = {}
    for path in sources(*ROOMS, "bench"):
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        modules[name.removesuffix(".__init__")] = path
    graph = nx.DiGraph()
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            targets: list[str] = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [full if full in modules else node.module for full in whole]
            graph.add_edges_from((name, target) for target in targets if target in modules and target != name)
    assert len(graph) > 200
    assert [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1] == []


def test_the_product_stays_within_its_size() -> None:
    files = list(sources(*ROOMS))
    lines = sum(path.read_text().count("\n") for path in files)
    assert len(files) <= MAX_MODULES
    assert lines <= MAX_LINES


def test_comments_explain_the_hard_parts() -> None:
    lines = comments = 0
    for path in sources(*ROOMS):
        text = path.read_text()
        lines += text.count("\n")
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments += len({token.start[0] for token in tokens if token.type == tokenize.COMMENT})
    assert comments / lines >= MIN_COMMENT_SHARE


def test_markdown_can_be_compared_line_by_line() -> None:
    """Tables, links that fill a line and code blocks cannot be wrapped; everything else ends at 120 columns."""
    found = []
    for path in documents():
        if path.suffix != ".md":
            continue
        in_code = False
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.lstrip().startswith("```"):
                in_code = not in_code
            elif not in_code and not line.startswith(("|", "![")) and len(line) > MAX_MARKDOWN_COLUMNS:
                found.append(f"{path.relative_to(ROOT)}:{number}: {len(line)} columns")
    assert found == []
