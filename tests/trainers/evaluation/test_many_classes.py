"""Many classes, two, one: what a report and the screen show can be read, and says what it leaves out."""

import base64
import json
import re
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import yaml

from records.arrays import IntArray
from records.bundles import Bundle, Calibration, OperatingPoints, ReferPoint
from records.console import WholeConsole
from records.errors import DataError
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.taxonomy import DiagnosisClass, KeyClass, Taxonomy
from tests.models import write_random_bundle
from trainers.cli.evaluate import _evaluation_tables
from trainers.evaluation.evaluate import SplitPredictions, evaluate
from trainers.evaluation.figures import Evaluation, drawn_classes
from trainers.evaluation.report import plots
from trainers.evaluation.report.words import warnings_of
from trainers.evaluation.report.write import render_report
from trainers.fitting.training_data import TrainingData
from vision.inference.loaded import load_model

POINT = ReferPoint(
    threshold=0.2, sensitivity_floor=0.9, sensitivity=1.0, sensitivity_lower_bound=0.3, specificity=0.9, lesions=3,
    proven=False,
)  # fmt: skip


def taxonomy_of(count: int, *, key: str | None = None) -> Taxonomy:
    """Classes with codes and names as long as a taxonomy takes them."""
    made = [
        DiagnosisClass(code=f"class_with_a_very_long_code_{at:04d}", name=f"Class number {at} " * 6, malignant=False)
        for at in range(count)
    ]
    return Taxonomy(name="many", version=1, classes=tuple(made), key_classes=(KeyClass(code=key),) if key else ())


def predictions_of(labels: IntArray, num_classes: int, *, confused: int = 0) -> SplitPredictions:
    """Predict most images well, and the last `confused` classes as the one before them."""
    logits = np.random.default_rng(0).normal(size=(len(labels), num_classes))
    shown = np.where(labels >= num_classes - confused, labels - 1, labels)
    logits[np.arange(len(labels)), shown] += 9.0
    likely = np.exp(logits)
    ids = [f"{number:064x}" for number in range(len(labels))]
    return SplitPredictions(
        model_id="a" * 64, image_ids=ids, group_ids=ids, lesion_ids=[None] * len(ids), labels=labels,
        logits=logits.astype(np.float32), probabilities=likely / likely.sum(axis=1, keepdims=True), dataset_id="d" * 64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def many() -> tuple[Taxonomy, OperatingPoints, SplitPredictions, Evaluation]:
    taxonomy = taxonomy_of(300, key="class_with_a_very_long_code_0000")
    thresholds = {code: 0.9 if at else 0.0 for at, code in enumerate(taxonomy.codes)}
    operating = OperatingPoints(
        refer={taxonomy.codes[0]: POINT}, conformal_thresholds=thresholds,
        pooled_classes=list(taxonomy.codes[1:]),
    )  # fmt: skip
    found = predictions_of(np.arange(900) % 290, 300, confused=15)
    return taxonomy, operating, found, evaluate(found, taxonomy, operating)


@pytest.fixture(scope="module")
def store_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Taxonomy], Store]]:
    opened: list[Store] = []

    def make(taxonomy: Taxonomy) -> Store:
        home = tmp_path_factory.mktemp("many")
        (home / "mine.yaml").write_text(yaml.safe_dump(taxonomy.model_dump(mode="json")))
        opened.append(open_store(RecordsSettings(home=home / "home", taxonomy=str(home / "mine.yaml"))))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


def bundle_of(store: Store, operating: OperatingPoints) -> Bundle:
    codes = store.taxonomy.codes
    calibration = Calibration(temperature=1.0, bias=[0.0] * len(codes))
    return write_random_bundle(
        store, "custom_cnn", side_px=32, class_priors=dict.fromkeys(codes, 1 / len(codes)), calibration=calibration,
        operating=operating,
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(many: tuple[Taxonomy, OperatingPoints, SplitPredictions, Evaluation], store_of: Callable) -> str:
    taxonomy, operating, found, evaluation = many
    bundle = bundle_of(store_of(taxonomy), operating)
    return render_report(bundle, load_model(bundle, precision="fp32"), found, evaluation)


def drawing(uri: str) -> str:
    return base64.b64decode(uri.partition(",")[2]).decode()


def test_a_matrix_of_300_classes_draws_those_with_the_most_mistakes(many) -> None:
    _, _, _, evaluation = many
    drawn = drawn_classes(evaluation)
    assert len(drawn) == 20
    assert drawn[0] == 0  # the key class, without a mistake
    assert set(range(284, 290)) <= set(drawn)
    svg = drawing(plots.confusion_plot(evaluation))
    assert svg.count("<!-- class_wit…") == 2 * 20
    assert svg.count("<!-- others") == 2
    assert len(svg) < 1_000_000
    codes = list(evaluation.per_class)
    summed = plots._summed(np.array(evaluation.confusion_matrix, dtype=float), drawn)
    assert summed.sum() == evaluation.images
    assert summed[:-1].sum() == sum(evaluation.per_class[codes[at]].support for at in drawn)


def test_curves_of_300_classes_are_those_of_ten(many) -> None:
    _, _, found, evaluation = many
    for plot in (plots.roc_plot, plots.precision_recall_plot):
        svg = drawing(plot(found.labels, found.probabilities, evaluation))
        assert 0 < len(re.findall(r"<!-- class_wit…", svg)) <= plots.MAX_CURVES


def test_the_report_of_300_classes_says_what_it_leaves_out(report: str, many) -> None:
    *_, evaluation = many
    text = re.sub(r"data:[^\"]+", "", report)
    assert "Of 300 classes, the confusion matrix draws 20 and the curves 10: the key class and those" in text
    assert "sum up the other 280" in text
    assert text.count("<tr") == 1 + 300 + 1 + len(evaluation.points)  # heads, classes, operating points
    assert "and 287 more" in text  # of the classes with a threshold in common
    assert "Seldom recognised" in text
    assert max(len(line) for line in re.sub(r"<[^>]+>", "", text).splitlines()) < 3000
    assert len(report) < 3_000_000


@pytest.mark.browser
def test_the_report_of_300_classes_fits_a_screen(report: str, browser, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(report)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(600_000)
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert page.evaluate("document.documentElement.scrollHeight") < 9000
    tables, width = page.locator(".tall").first.bounding_box(), page.locator("img[alt='Confusion matrix']")
    assert tables is not None
    assert tables["height"] <= 640
    assert width.bounding_box()["width"] > 900
    page.screenshot(path=tmp_path / "report.png", full_page=True)
    page.close()


def test_the_screen_shows_pairs_instead_of_300_columns(many) -> None:
    evaluation = many[3]
    file = StringIO()
    WholeConsole(file=file).print(_evaluation_tables(evaluation))
    shown = file.getvalue()
    assert "20 of 300 classes: those that the most mistakes are about" in shown
    assert "most frequent confusions" in shown
    assert max(map(len, shown.splitlines())) < 400
    assert len(shown.splitlines()) < 110


@pytest.mark.parametrize("count", [2, 7, 9, 10, 20, 21])
def test_fewer_classes_are_all_drawn_and_more_are_summed_up(count: int) -> None:
    taxonomy = taxonomy_of(count)
    found = predictions_of(np.arange(6 * count) % count, count, confused=1)
    evaluation = evaluate(found, taxonomy, None)
    svg = drawing(plots.confusion_plot(evaluation))
    assert svg.count("<!-- class_wit…") == 2 * min(count, 20)
    assert ("<!-- others" in svg) == (count > 20)
    assert svg.count("<!-- class_wit…") >= 4
    curves = drawing(plots.roc_plot(found.labels, found.probabilities, evaluation))
    assert curves.count("<!-- class_wit…") == (count if count <= 20 else 10)


def test_one_image_per_class_and_one_class_alone_are_commented() -> None:
    taxonomy = taxonomy_of(5)
    each = evaluate(predictions_of(np.arange(5), 5), taxonomy, None)
    assert (each.images, each.accuracy) == (5, 1.0)
    assert each.accuracy_ci[0] < 0.6  # five images prove little
    alone = evaluate(predictions_of(np.zeros(30, dtype=np.int64), 5), taxonomy, None)
    assert alone.accuracy == 1.0
    assert "to name it is always right" in alone.undefined["accuracy"]
    assert alone.undefined["balanced_accuracy"] == alone.undefined["accuracy"]
    assert alone.macro_auc is None
    assert "All images are of one class" in " ".join(warnings_of(alone, taxonomy))
    assert json.loads(alone.model_dump_json())["per_class"][taxonomy.codes[0]]["specificity"] is None


@pytest.mark.parametrize("train", [[0, 0, 0], [2], [1, 1]])
def test_nothing_is_trained_on_one_class(train: list[int]) -> None:
    labels = np.array([*train, 0, 1])
    rows = np.arange(len(labels))
    data = TrainingData(rows, [f"{row}" for row in rows], labels, rows[: len(train)], rows[len(train) :])
    with pytest.raises(DataError, match="one class, which leaves nothing to tell apart; import or label images"):
        data.require_usable(3)
