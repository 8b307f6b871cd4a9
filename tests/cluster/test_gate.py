"""The gate: floors, paired comparisons, and the verdict when the data cannot decide."""

import numpy as np
import pytest

from cluster.gate import Contender, GateReport, Verdict, decide
from cluster.settings import GateSettings
from records.errors import ContractError
from records.taxonomy import load_taxonomy
from trainers.evaluation.evaluate import SplitPredictions

TAXONOMY = load_taxonomy("ham10000")
MEL = TAXONOMY.index_of("mel")
SETTINGS = GateSettings(bootstrap_resamples=400, max_calibration_error=1.0)


def predictions_of(labels: np.ndarray, hit: np.ndarray, confidence: float, model_id: str) -> SplitPredictions:
    """Make predictions that are right exactly where `hit` is true, with the given confidence."""
    num_images, num_classes = len(labels), len(TAXONOMY.codes)
    predicted = np.where(hit, labels, (labels + 1) % num_classes)
    probabilities = np.full((num_images, num_classes), (1 - confidence) / (num_classes - 1))
    probabilities[np.arange(num_images), predicted] = confidence
    names = [f"image{i:05d}" for i in range(num_images)]
    return SplitPredictions(
        model_id=model_id,
        image_ids=names,
        group_ids=[f"group{i // 2:05d}" for i in range(num_images)],
        lesion_ids=[f"lesion{i // 2:05d}" for i in range(num_images)],
        labels=labels,
        logits=np.log(probabilities).astype(np.float32),
        probabilities=probabilities / probabilities.sum(axis=1, keepdims=True),
    )


def labels_of(lesions_per_class: int) -> np.ndarray:
    return np.repeat(np.arange(len(TAXONOMY.codes)), 2 * lesions_per_class)


def contender(
    labels: np.ndarray, *, share_right: float, seed: int, misses_mel: bool = False, name: str = ""
) -> Contender:
    generator = np.random.default_rng(seed)
    hit = generator.random(len(labels)) < share_right
    hit[labels == MEL] = not misses_mel
    model_id = name or f"{seed:064d}"
    return Contender(model_id, predictions_of(labels, hit, 0.9, model_id), key_threshold=0.3)


def compare(challenger: Contender, *rivals: tuple[str, Contender], similarity: float | None = 0.2) -> GateReport:
    return decide(challenger, rivals, taxonomy=TAXONOMY, settings=SETTINGS, explanation_similarity=similarity)


def outcome_of(report: GateReport, name: str) -> str:
    return next(check.outcome for check in report.checks if check.name.startswith(name))


def test_without_a_champion_the_floors_alone_decide() -> None:
    labels = labels_of(40)
    assert compare(contender(labels, share_right=0.8, seed=1)).verdict is Verdict.PROMOTE
    report = compare(contender(labels, share_right=0.8, seed=1, misses_mel=True))
    assert report.verdict is Verdict.REFUSE
    assert outcome_of(report, "mel sensitivity floor") == "fail"
    assert "floor" in report.why


def test_a_clearly_better_challenger_is_promoted() -> None:
    labels = labels_of(60)
    report = compare(
        contender(labels, share_right=0.9, seed=1), ("champion", contender(labels, share_right=0.6, seed=2))
    )
    assert report.verdict is Verdict.PROMOTE, report.why
    gain = next(c for c in report.checks if c.name.startswith("balanced accuracy"))
    assert gain.lower_bound is not None
    assert gain.lower_bound > 0


def test_a_better_average_that_misses_melanomas_is_refused() -> None:
    labels = labels_of(60)
    challenger = contender(labels, share_right=0.95, seed=1, misses_mel=True)
    report = compare(challenger, ("champion", contender(labels, share_right=0.6, seed=2)))
    assert report.verdict is Verdict.REFUSE
    assert outcome_of(report, "balanced accuracy against champion") == "pass"
    assert outcome_of(report, "key-class sensitivity against champion") == "fail"


def test_an_identical_model_is_never_promoted() -> None:
    labels = labels_of(40)
    champion = contender(labels, share_right=0.8, seed=1, name="a" * 64)
    copy = Contender("b" * 64, champion.predictions, champion.key_threshold)
    assert compare(copy, ("champion", champion)).verdict is Verdict.REFUSE
    assert compare(champion, ("champion", champion)).why == "its predictions equal those of the champion"


def test_a_small_gain_on_few_lesions_is_undecided_and_says_how_many_more_are_needed() -> None:
    labels = labels_of(12)
    hit = np.random.default_rng(3).random(len(labels)) < 0.6
    hit[labels == MEL] = True
    better = hit.copy()
    others = np.flatnonzero(labels != MEL)
    wrong, right = others[~hit[others]], others[hit[others]]
    better[wrong[:8]] = True
    better[right[:6]] = False
    report = compare(
        Contender("a" * 64, predictions_of(labels, better, 0.9, "a" * 64), 0.3),
        ("champion", Contender("b" * 64, predictions_of(labels, hit, 0.9, "b" * 64), 0.3)),
    )
    assert report.verdict is Verdict.UNDECIDED, report.why
    undecided = next(c for c in report.checks if c.outcome == "undecided")
    assert undecided.more_lesions is not None
    assert undecided.more_lesions > 0
    assert str(undecided.more_lesions) in report.why


def test_no_key_lesions_leave_the_floor_undecided() -> None:
    labels = labels_of(20)
    labels = labels[labels != MEL]
    assert compare(contender(labels, share_right=0.9, seed=1)).verdict is Verdict.UNDECIDED


@pytest.mark.parametrize(
    ("similarity", "verdict"), [(0.95, Verdict.REFUSE), (None, Verdict.REFUSE), (0.1, Verdict.PROMOTE)]
)
def test_heat_maps_that_ignore_the_weights_are_refused(similarity: float | None, verdict: Verdict) -> None:
    assert compare(contender(labels_of(40), share_right=0.8, seed=1), similarity=similarity).verdict is verdict


def test_predictions_that_are_not_finite_are_refused() -> None:
    challenger = contender(labels_of(20), share_right=0.9, seed=1)
    challenger.predictions.probabilities[3] = np.nan
    report = compare(challenger)
    assert report.verdict is Verdict.REFUSE
    assert report.why == "1 of its 280 predictions are not finite numbers"


def test_contenders_must_have_predicted_the_same_images() -> None:
    few, many = contender(labels_of(10), share_right=0.9, seed=1), contender(labels_of(12), share_right=0.9, seed=2)
    with pytest.raises(ContractError, match="other images"):
        compare(few, ("champion", many))


def test_equally_good_challengers_are_rarely_promoted() -> None:
    labels = labels_of(30)
    promoted = sum(
        compare(
            contender(labels, share_right=0.7, seed=2 * i),
            ("champion", contender(labels, share_right=0.7, seed=2 * i + 1)),
        ).verdict
        is Verdict.PROMOTE
        for i in range(50)
    )
    assert promoted <= 10


def test_the_bound_agrees_with_a_brute_force_bootstrap() -> None:
    """Resample lesions within class by hand and compare the one-sided 95 % bound of the difference."""
    labels = labels_of(15)
    ours, theirs = contender(labels, share_right=0.8, seed=5), contender(labels, share_right=0.7, seed=6)
    report = compare(ours, ("champion", theirs))
    check = next(c for c in report.checks if c.name.startswith("balanced accuracy"))
    correct = [c.predictions.probabilities.argmax(axis=1) == labels for c in (ours, theirs)]
    generator = np.random.default_rng(0)
    differences = []
    for _ in range(2000):
        per_class = []
        for index in range(len(TAXONOMY.codes)):
            lesions = np.flatnonzero(labels == index).reshape(-1, 2)
            drawn = lesions[generator.integers(0, len(lesions), len(lesions))].ravel()
            per_class.append(correct[0][drawn].mean() - correct[1][drawn].mean())
        differences.append(np.mean(per_class))
    assert check.lower_bound == pytest.approx(np.quantile(differences, 0.05), abs=0.01)
