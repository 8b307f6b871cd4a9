"""The arithmetic of the comparison of acquisition rules, by hand, and one course over made-up features."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench.label import acquisition_arms as arms
from bench.label import acquisition_curves as curves
from labeling.acquisition.registry import RULES, budgets_of
from records.errors import DataError


def made_up(path: Path) -> Path:
    """Write 600 lesions, every third with a second image; diagnoses are told apart by the features."""
    chance = np.random.default_rng(0)
    codes = np.array(["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"])
    of_lesion = np.arange(600) % 7
    lesion = np.concatenate([np.arange(600), np.arange(0, 600, 3)])
    labels = of_lesion[lesion]
    features = chance.normal(size=(len(lesion), 160)) + 3.0 * np.eye(7, 160)[labels]
    ids = [f"{number:04}" for number in range(len(lesion))]
    np.savez(path, ids=ids, lesions=[f"L{n:03}" for n in lesion], labels=codes[labels], features=features)
    return path


def test_labels_needed_lie_on_the_line_between_steps() -> None:
    curve = np.array([0.2, 0.4, 0.4, 0.5, 0.5, 0.6, 0.6, 0.6, 0.6])
    assert curves.labels_needed(curve, 0.1) == 100
    assert curves.labels_needed(curve, 0.3) == pytest.approx(125)
    assert curves.labels_needed(curve, 0.55) == pytest.approx(500)
    assert curves.labels_needed(curve, 0.7) is None


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    assert curves.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert curves.holm({"a": 0.01, "b": 0.04}, 10) == pytest.approx({"a": 0.1, "b": 0.36})


def test_the_error_is_that_of_overlapping_splits() -> None:
    values = np.array([1.0, 2.0, 3.0])  # variance 1; 1/3 + 1/4 = 7/12; t(0.975, 2) = 4.3027
    assert curves.half_width(values) == pytest.approx(4.302653 * np.sqrt(7 / 12), rel=1e-5)


def test_no_lesion_lies_on_both_splits(tmp_path: Path) -> None:
    path = made_up(tmp_path / "features.npz")
    splits = curves.split(str(path), 3)
    lesion_of = dict(zip(*(np.load(path)[name].tolist() for name in ("ids", "lesions")), strict=True))
    pool = [lesion_of[image] for image in splits.ids]
    held_out = 600 - len(pool)
    assert len(set(pool)) == len(pool)
    assert held_out == sum(round(0.2 * count) for count in np.bincount(np.arange(600) % 7))
    rows_in_pool = sum(lesion in set(pool) for lesion in lesion_of.values())
    assert len(splits.held_out) == len(lesion_of) - rows_in_pool


def test_every_rule_starts_from_the_same_images_and_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "STEPS", (100, 120, 140))
    splits = curves.split(str(made_up(tmp_path / "features.npz")), 0)
    learned = {rule: curves.learning_curve(rule, splits, 0) for rule in RULES}
    assert len({accuracies[0] for accuracies, _ in learned.values()}) == 1
    assert len({melanomas[0] for _, melanomas in learned.values()}) == 1
    assert learned["badge"] == curves.learning_curve("badge", splits, 0)
    # Here the cost rule cannot but see melanomas: they are told apart, and cost most.
    assert learned["expected_miss_cost"][1][-1] > learned["random"][1][-1]


def test_arms_of_protocol_2_start_alike_can_be_resumed_and_summarised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arms, "STEPS", (100, 120, 140))
    monkeypatch.setattr(arms, "COUNTED_UNTIL", (140,))
    path = str(made_up(tmp_path / "features.npz"))
    found = [arms.curve_of(path, name, 1000) for name in arms.ARMS]
    assert len(arms.TESTED) == 11
    plain = {tuple(one["counts"][0]) for one in found if one["seed"] == 1000 and "+" not in one["arm"]}
    assert len(plain) == 1
    for one in found:
        assert [sum(counts) for counts in one["counts"]] == [100, 120, 140]
        assert "+" not in one["arm"] or min(one["counts"][0]) >= arms.ATLAS_PER_CLASS
    # A second seed that learns more slowly, without the time to compute it.
    slower = [
        one | {"seed": 1001, "balanced_accuracy": [a - 0.01 * len(one["arm"]) for a in one["balanced_accuracy"]]}
        for one in found
    ]
    third = [one | {"seed": 1002} for one in found if one["arm"] != "badge"]
    figures = arms.summarise(slower + found + third)
    assert "badge" not in figures["arms"], "two seeds are too few for an interval"
    assert figures["arms"]["random"]["ratio"] == [1.0, 1.0, 1.0]
    low, high = figures["arms"]["mix"]["ratio"][1:]
    assert low <= figures["arms"]["mix"]["ratio"][0] <= high
    assert figures["arms"]["mix+atlas"]["holm_p"] is None

    # Curves that are in the folder are read and not computed: with all of them, no worker is asked.
    work = tmp_path / "work"
    work.mkdir()
    (work / "mix-1000.json").write_text(json.dumps(found[0]))
    assert arms.run(Path(path), work, ["mix"], [1000], 1) == [json.loads(json.dumps(found[0]))]
    with pytest.raises(DataError, match="other features"):
        arms.run(Path(__file__), work, ["mix"], [1000], 1)


def test_a_step_is_shared_without_a_rest() -> None:
    assert budgets_of(arms.MIX, 50) == {"random": 5, "rare_margin": 30, "expected_miss_cost": 15}
    assert budgets_of(arms.MIX, 7) == {"random": 0, "rare_margin": 5, "expected_miss_cost": 2}
