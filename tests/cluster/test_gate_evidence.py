"""The gate's evidence: slices, simultaneous bounds, and its errors over many rounds."""

import numpy as np
import pytest

from cluster.gate import Contender, GateReport, Slice, Verdict, decide
from cluster.gate.checks import simultaneous_lower_bounds
from cluster.gate.report import report_page
from cluster.gate.run import slices_of
from cluster.settings import GateSettings
from records.ids import utc_now
from records.taxonomy import load_taxonomy
from records.types import Image
from trainers.evaluation.evaluate import SplitPredictions

TAXONOMY = load_taxonomy("ham10000")
MEL = TAXONOMY.index_of("mel")
NUM_CLASSES = len(TAXONOMY.codes)
SETTINGS = GateSettings(bootstrap_resamples=200, max_calibration_error=1.0)
LABELS = np.repeat(np.arange(NUM_CLASSES), 40)


def contender(hit: np.ndarray, name: str) -> Contender:
    """Make a model that is right exactly where `hit` is true; every image is a lesion of its own."""
    predicted = np.where(hit, LABELS, (LABELS + 1) % NUM_CLASSES)
    probabilities = np.full((len(LABELS), NUM_CLASSES), 0.1 / (NUM_CLASSES - 1))
    probabilities[np.arange(len(LABELS)), predicted] = 0.9
    # Equal predictions would fail the check that the models differ.
    probabilities[:, 0] += 1e-6 * (sum(name.encode()) % 97)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    ids = [f"image{i:04d}" for i in range(len(LABELS))]
    logits = np.log(probabilities).astype(np.float32)
    predictions = SplitPredictions(name, ids, ids, list(ids), LABELS, logits, probabilities)
    return Contender(name, predictions, key_threshold=0.3)


def compare(challenger: Contender, *rivals: tuple[str, Contender], slices: tuple[Slice, ...] = ()) -> GateReport:
    return decide(
        challenger,
        rivals,
        taxonomy=TAXONOMY,
        settings=SETTINGS,
        explanation_similarity=0.2,
        slices=slices,
        looks={"gate": 3, "test": 2},
    )


def draw(quality: float, generator: np.random.Generator) -> np.ndarray:
    hit = generator.random(len(LABELS)) < quality
    hit[LABELS == MEL] = generator.random(40) < 0.95
    return hit


def slice_of(name: str, first: int, last: int) -> Slice:
    """Return a slice that holds the melanoma lesions from `first` to `last` and nothing else of them."""
    members = np.zeros(len(LABELS), dtype=np.bool_)
    members[MEL * 40 + first : MEL * 40 + last] = True
    return Slice(name, members)


def test_a_model_that_is_worse_in_one_large_slice_is_refused() -> None:
    better = np.ones(len(LABELS), dtype=np.bool_)
    better[MEL * 40 : MEL * 40 + 4] = False
    weaker = np.ones(len(LABELS), dtype=np.bool_)
    weaker[::4] = False
    weaker[LABELS == MEL] = True
    weaker[MEL * 40 + 36 : MEL * 40 + 40] = False  # as many misses, in other lesions
    report = compare(
        contender(better, "new"),
        ("champion", contender(weaker, "old")),
        slices=(slice_of("site: a", 0, 30), slice_of("site: b", 30, 40)),
    )
    assert report.verdict is Verdict.REFUSE
    assert report.why.startswith("key-class sensitivity against champion in site: a is not good enough: -0.133")
    assert [(part.name, part.key_lesions, part.judged) for part in report.slices] == [
        ("site: a", 30, True),
        ("site: b", 10, False),
    ]
    assert not any("site: b" in check.name for check in report.checks)
    page = report_page(report, TAXONOMY)
    assert "must not serve" in page
    assert "too few for a figure" in page
    assert "the gate split was read 3 times" in page


def test_names_from_tables_are_escaped_on_the_page() -> None:
    part = slice_of("site: <script>", 0, 30)
    assert "<script>" not in report_page(compare(contender(LABELS >= 0, "new"), slices=(part,)), TAXONOMY)


def test_bounds_of_several_slices_hold_simultaneously() -> None:
    """Over many draws of the data the true differences are all above their bounds in about 95 %."""
    generator = np.random.default_rng(0)
    truth, lesions, held = np.array([0.0, -0.05, 0.1, 0.02]), 60, 0
    for _ in range(200):
        samples = generator.normal(truth, 0.4, size=(lesions, 4))
        counts = generator.multinomial(lesions, np.full(lesions, 1 / lesions), size=400)
        bounds = simultaneous_lower_bounds(samples.mean(axis=0), counts @ samples / lesions, 0.95)
        held += bool((bounds <= truth).all())
    assert 0.90 <= held / 200 <= 0.985


def test_a_difference_that_does_not_vary_is_its_own_bound() -> None:
    same = np.full((50, 1), 0.25)
    assert simultaneous_lower_bounds(np.array([0.25]), same, 0.95).tolist() == [0.25]


def test_equal_challengers_do_not_drift_the_champion_below_the_best_ever() -> None:
    """Ten rounds of equally good challengers, many times: a swap is rare and never costs more than the margin."""
    swaps, losses = [], []
    for run in range(6):
        generator = np.random.default_rng(run)
        champion = best = contender(draw(0.75, generator), "0")
        for number in range(1, 11):
            challenger = contender(draw(0.75, generator), str(number))
            rivals = [("champion", champion)] + ([("best ever", best)] if best is not champion else [])
            promoted = compare(challenger, *rivals).verdict is Verdict.PROMOTE
            swaps.append(promoted)
            if promoted:
                champion = challenger
                best = max(best, challenger, key=quality)
        losses.append(quality(best) - quality(champion))
    assert np.mean(swaps) <= 0.2
    assert max(losses) <= SETTINGS.margin


def quality(model: Contender) -> float:
    right = model.predictions.probabilities.argmax(axis=1) == LABELS
    return float(np.mean([right[c == LABELS].mean() for c in range(NUM_CLASSES)]))


def test_the_report_states_its_power() -> None:
    generator = np.random.default_rng(1)
    report = compare(contender(draw(0.8, generator), "1"), ("champion", contender(draw(0.7, generator), "0")))
    check = next(c for c in report.checks if c.name.startswith("balanced accuracy"))
    assert check.passes_from is not None
    assert 0 < check.passes_from < 0.2
    assert report.looks == {"gate": 3, "test": 2}


@pytest.mark.parametrize(
    ("age", "name"), [(0, "age: 0 to 39"), (40, "age: 40 to 59"), (60, "age: 60 and over"), (130, "age: 60 and over")]
)
def test_images_are_sliced_by_their_known_fields(age: float, name: str) -> None:
    def image(number: int, **known: object) -> Image:
        return Image.model_validate(
            {
                "id": f"{number:064x}",
                "uri": "file:///none",
                "format": "jpeg",
                "width_px": 1,
                "height_px": 1,
                "provenance": "generated",
                "created_at": utc_now(),
                **known,
            }
        )

    found = slices_of([image(1, age_years=age, sex="female"), image(2)])
    assert [(part.name, part.members.tolist()) for part in found] == [
        (name, [True, False]),
        ("sex: female", [True, False]),
    ]
