"""The quality file points to tests that exist, and a model card says what is stored and what is missing."""

import ast
import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.cli import run
from cluster.model_card import INTENDED_USE, _limits, card_page, model_card
from images.importer import open_dataset
from records.bundles import Bundle, OperatingPoints, ReferPoint
from records.ids import new_id, utc_now
from records.models import register
from records.store import Store
from records.types import AuditEvent, RoundStep
from trainers.evaluation.evaluate import SplitPredictions, evaluate
from trainers.evaluation.figures import Evaluation

ROOT = Path(__file__).resolve().parent.parent
QUALITY = ROOT / "docs" / "quality"
POINTER = re.compile(r"`(tests/[^`]*?\.py)::([^`]+)`")
TABLES = ("risks.md", "life-cycle.md")

# ---------------------------------------------------------------- pointers to tests


def _is_skipped(node: ast.AST) -> bool:
    marks = [ast.unparse(one) for one in getattr(node, "decorator_list", [])]
    return any(mark.partition("(")[0] == "pytest.mark.skip" for mark in marks)


@cache
def names_in(path: Path) -> frozenset[str]:
    """Names of the tests of a file, those of classes as `Class::test`; without those that are always skipped."""
    found = set()
    for node in ast.parse(path.read_text()).body if path.is_file() else []:
        inside = node.body if isinstance(node, ast.ClassDef) and not _is_skipped(node) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        for one in inside:
            if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) and one.name.startswith("test_"):
                found |= set() if _is_skipped(one) else {prefix + one.name}
    return frozenset(found)


def faults_of(text: str, root: Path) -> list[str]:
    """What is wrong with the rows of a page: tests that are not there, and rows that name none and do not say so."""
    found = []
    column: int | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("|"):
            column = None
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if column is None:
            column = cells.index("shown by") if "shown by" in cells else -1
            continue
        if column < 0 or set(line) <= set("|- "):
            continue
        if len(cells) <= column or not (POINTER.search(cells[column]) or "not proven" in cells[column]):
            found.append(f"line {number}: names no test and does not say `not proven`")
    for number, line in enumerate(text.splitlines(), 1):
        for file, name in POINTER.findall(line):
            # A pointer may name one case of a parametrised test.
            if name.partition("[")[0] not in names_in(root / file):
                found.append(f"line {number}: {file}::{name} is not there")
        for loose in re.findall(r"`(test_\w+)`", line):
            found.append(f"line {number}: {loose} names no file")
    return found


@pytest.mark.parametrize("page", sorted(QUALITY.glob("*.md")), ids=lambda page: page.name)
def test_every_row_points_to_tests_that_exist(page: Path) -> None:
    assert faults_of(page.read_text(), ROOT) == []


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_have_rows_that_are_read(name: str) -> None:
    text = (QUALITY / name).read_text()
    assert len(POINTER.findall(text)) > 10
    assert "| shown by |" in text
    ids = re.findall(r"^\| (R\d+) \|", text, re.MULTILINE)
    assert len(ids) == len(set(ids))


def test_a_wrong_row_is_found(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(
        "import pytest\ndef test_there(): ...\n"
        "@pytest.mark.parametrize('n', [1])\nasync def test_cases(n): ...\n"
        "class TestGroup:\n    def test_in_it(self): ...\n"
        "@pytest.mark.skip(reason='later')\ndef test_skipped(): ...\n"
        "def helper():\n    def test_inner(): ...\n"
    )
    good = ("test_there", "test_cases", "test_cases[1]", "TestGroup::test_in_it")
    bad = ("test_gone", "test_in_it", "test_skipped", "test_inner", "helper", "test_there_too[1]")
    head = "| id | shown by | open |\n|---|---|---|\n"
    for name in good:
        assert faults_of(f"{head}| R1 | `tests/test_it.py::{name}` | |\n", tmp_path) == []
    for name in bad:
        assert faults_of(f"{head}| R1 | `tests/test_it.py::{name}` | |\n", tmp_path) == [
            f"line 3: tests/test_it.py::{name} is not there"
        ]
    assert faults_of(f"{head}| R1 | `tests/test_no.py::test_there` | |\n", tmp_path) == [
        "line 3: tests/test_no.py::test_there is not there"
    ]
    assert faults_of(f"{head}| R1 | | not proven |\n", tmp_path) == [
        "line 3: names no test and does not say `not proven`"
    ]
    assert faults_of(f"{head}| R1 | not proven: no study | |\n", tmp_path) == []
    assert faults_of(f"{head}| R1 | `test_there` | |\n", tmp_path)[-1] == "line 3: test_there names no file"


def test_the_page_of_the_intended_use_says_what_every_card_says() -> None:
    text = " ".join((QUALITY / "intended-use.md").read_text().replace("\n> ", " ").split())
    assert [sentence for sentence in INTENDED_USE if sentence not in text] == []


# ---------------------------------------------------------------- model card


def _evaluation(bundle: Bundle, split: str, **changes: Any) -> Evaluation:
    """An evaluation as fitting makes it, of predictions that are right in two of three."""
    import numpy as np

    taxonomy = bundle.document.taxonomy
    labels = np.arange(42) % 7
    probabilities = np.full((42, 7), 0.05)
    probabilities[np.arange(42), np.where(np.arange(42) % 3 == 0, (labels + 1) % 7, labels)] = 0.7
    names = [f"{number:064d}" for number in range(42)]
    found = evaluate(
        SplitPredictions(bundle.id, names, names, list(names), labels, np.log(probabilities).astype(np.float32),
                         probabilities),
        taxonomy, bundle.document.operating,
    )  # fmt: skip
    return found.model_copy(update={"split": split, "dataset_id": bundle.document.dataset_id, **changes})


@pytest.fixture(scope="module")
def bundle(filled_store: Store, make_bundle: Any) -> Bundle:
    """A registered bundle of the store's dataset, with figures on val and a floor that was not proven."""
    dataset = open_dataset(filled_store, None).id
    point = ReferPoint(threshold=0.125, sensitivity_floor=0.9, proven=False, sensitivity=1.0,
                       sensitivity_lower_bound=0.61, specificity=0.5, lesions=6)  # fmt: skip
    operating = OperatingPoints(refer={"mel": point})
    plain = make_bundle(filled_store, "custom_cnn", side_px=32, dataset_id=dataset, operating=operating)
    val = _evaluation(plain, "val").model_dump(mode="json", exclude={"model_id", "dataset_id", "split_reads"})
    made = make_bundle(
        filled_store, "custom_cnn", side_px=32, dataset_id=dataset, operating=operating, metrics={"val": val}
    )
    with filled_store.ledger.begin() as tx:
        register(tx, made)
    return made


def test_the_card_has_the_stored_figures_with_their_intervals(filled_store: Store, bundle: Bundle) -> None:
    card = model_card(filled_store, bundle)
    stored = bundle.document.metrics["val"]
    assert [one.source for one in card.figures] == ["bundle.json, part of the model's id"]
    assert card.figures[0].evaluation.balanced_accuracy == stored["balanced_accuracy"]
    page = card_page(card)
    low, high = stored["balanced_accuracy_ci"]
    assert f"| balanced accuracy | {stored['balanced_accuracy']:.3f} ({low:.3f} to {high:.3f}) |" in page
    key = stored["key_class"]
    low, high = key["sensitivity_ci"]
    assert f"| mel lesions referred, of 6 | {key['sensitivity']:.3f} ({low:.3f} to {high:.3f}) |" in page
    for code, report in stored["per_class"].items():
        low, high = report["sensitivity_ci"]
        assert f"| {code} | {report['support']} | {report['lesions']} | {report['sensitivity']:.3f} ({low:.3f}" in page
    assert all(sentence in page for sentence in INTENDED_USE)
    assert "mel: its floor of 0.9 is not proven on the calibration split (6 lesions, lower bound 0.610)." in card.limits
    assert any("chose the epoch" in sentence for sentence in card.limits)
    assert card.status == "registered"
    assert not re.search(r"\b(nan|inf|None|null)\b", page)


def test_what_limits_a_model_is_said_of_what_is_stored(filled_store: Store, bundle: Bundle) -> None:
    card = model_card(filled_store, bundle)
    assert card.data is not None
    operating = bundle.document.operating
    target = operating.model_copy(update={"decision": operating.decision.model_copy(update={"point": "target"})})
    other: Any = SimpleNamespace(document=bundle.document.model_copy(update={"operating": target}))
    fewer = card.data.model_copy(update={"images_when_made": card.data.images + 3})
    elsewhere = card.figures[0].model_copy(
        update={"evaluation": card.figures[0].evaluation.model_copy(update={"dataset_id": None})}
    )
    said = _limits(other, [elsewhere], fewer)
    assert "mel: it is referred at the point `target`, an estimate of a sensitivity of 0.9" in said[0]
    assert "3 images it was made with were erased or withdrawn since; it keeps what it learned of them." in said
    assert any(one.startswith("On a folder of labelled images: ") for one in said)
    proven = operating.model_copy(update={"refer": {"mel": operating.refer["mel"].model_copy(update={"proven": True})}})
    other.document = bundle.document.model_copy(update={"operating": proven})
    assert not any(one.startswith("mel: ") for one in _limits(other, [], None))


def test_the_data_sheet_counts_what_the_dataset_holds(filled_store: Store, bundle: Bundle) -> None:
    dataset = open_dataset(filled_store, None)
    data = model_card(filled_store, bundle).data
    assert data is not None
    assert (data.images, data.images_when_made, data.groups) == (dataset.num_images,) * 2 + (dataset.num_groups,)
    for split, counts in data.splits.items():
        rows = dataset.rows[dataset.rows["split"] == split]
        assert counts == {str(code): int(n) for code, n in rows["label"].value_counts().items()}
    assert sum(data.confirmations.values()) == sum(data.consent.values()) == data.images
    assert sum(source.images for source in data.sources) == data.images


def test_what_is_not_stored_is_named_and_not_made_up(filled_store: Store, bundle: Bundle, make_bundle: Any) -> None:
    known = "\n".join(model_card(filled_store, bundle).missing)
    assert "figures on the test split: none is stored; `relook evaluate" in known
    assert "skin tone" in known
    assert "licence of the weights" in known
    assert "what training started from: the bundle does not say" in known
    assert "| trained from | not stored |" in card_page(model_card(filled_store, bundle))
    empty = make_bundle(filled_store, "custom_cnn", seed=4, side_px=32)
    card = model_card(filled_store, empty)
    assert card.figures == []
    assert card.data is None
    assert card.status is None
    assert any("dataset version 000000000000 is not in this home" in text for text in card.missing)
    assert "mel: the model has no threshold for it, so its floor of 0.9 is open." in card.limits
    assert "It does not check whether an image is unlike its training images or of poor quality." in card.limits
    page = card_page(card)
    assert "No figure is stored." in page
    assert "not registered in this home" in page


def test_the_figures_of_the_round_that_made_the_model_come_first(filled_store: Store, make_bundle: Any) -> None:
    made = make_bundle(filled_store, "custom_cnn", seed=5, side_px=32)
    test = _evaluation(made, "test").model_dump(mode="json")
    with filled_store.ledger.begin() as tx:
        for step, result in (("fit", {"model_id": made.id}), ("evaluate", {"test": test})):
            now = utc_now()
            tx.add(RoundStep(id=new_id(), round_id="r", step=step, started_at=now, finished_at=now, result=result))
    card = model_card(filled_store, made)
    assert [(one.source, one.evaluation.split) for one in card.figures] == [("the round that made the model", "test")]
    assert not any("test split" in text for text in card.missing)
    assert "undefined: the model has no operating point for the key class" in card_page(card)


@pytest.mark.parametrize("number", ["NaN", "Infinity", '"0.9"', "null"])
def test_a_report_that_is_damaged_or_of_another_model_gives_no_figure(
    filled_store: Store, bundle: Bundle, number: str
) -> None:
    path = bundle.path / "report" / "metrics.json"
    path.parent.mkdir(exist_ok=True)
    try:
        good = _evaluation(bundle, "test", split_reads=2)
        path.write_text(good.model_dump_json())
        card = model_card(filled_store, bundle)
        assert [one.evaluation.split for one in card.figures] == ["val", "test"]
        assert any("The test split was read 2 times" in sentence for sentence in card.limits)
        assert not any("test split" in text for text in card.missing)
        path.write_text(re.sub(r'"macro_f1":[^,]+', f'"macro_f1":{number}', good.model_dump_json()))
        if number != '"0.9"':  # a number as text is read as what it says
            damaged = model_card(filled_store, bundle)
            assert any("cannot be read (macro_f1" in text for text in damaged.missing)
            assert any("test split" in text for text in damaged.missing)
        path.write_text(good.model_copy(update={"model_id": "f" * 64}).model_dump_json())
        assert any("of model ffffffffffff, and not of this one" in t for t in model_card(filled_store, bundle).missing)
        path.write_bytes(b"\xff{")
        assert any("cannot be read" in text for text in model_card(filled_store, bundle).missing)
    finally:
        path.unlink()


def test_texts_from_outside_are_no_structure_of_the_page(filled_store: Store, bundle: Bundle) -> None:
    card = model_card(filled_store, bundle)
    odd = "a | b\n# <script> [x](http://y)"
    page = card_page(card.model_copy(update={"classes": {"mel": odd}, "limits": [odd]}))
    assert "<script>" not in page
    assert "\n# " not in page
    assert "a \\| b" in page
    assert "](" not in page.replace("\\[x](http", "")


def test_the_verb_prints_markdown_or_one_object_and_reads_no_split(
    filled_store: Store, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    def reads() -> int:
        with filled_store.ledger.read() as tx:
            return sum(event.action.endswith(".read") for event in tx.find(AuditEvent))

    home, before = ["--set", f"records.home={filled_store.home.root}"], reads()
    assert run(["report", "model-card", bundle.id[:12], *home]) == 0
    assert capsys.readouterr().out.strip() == card_page(model_card(filled_store, bundle)).strip()
    assert run(["report", "model-card", str(bundle.path), "--json", *home]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["model_id"] == bundle.id
    assert printed["missing"]
    assert run(["report", "model-card", "0123456789ab", *home]) == 2
    assert "no model is called '0123456789ab'" in capsys.readouterr().err
    assert reads() == before
