"""A search with the dissertation's mistake in it: what leaks, what stays honest, and what the report says."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cluster.presets import PRESETS
from trainers.fitting.pretend import PretendedSplit, PretendReport, Scores, leaky_plan
from trainers.fitting.training_data import DataPlan
from trainers.settings import MACHINERY, flat_values
from tuning.experiments import compare
from tuning.journal import open_journal
from tuning.report import LEAK_FILE, render, report_on
from tuning.trials import SearchHeader, TrialResult


@pytest.fixture
def plan() -> DataPlan:
    """300 training images of 100 lesions in three unequal classes, and 30 of val."""
    labels = np.concatenate([np.repeat([0, 1, 2], [210, 60, 30]), np.arange(30) % 3])
    ids = [f"image {row:03}" for row in range(330)]
    return DataPlan(image_ids=ids, labels=labels, num_train=300, group_ids=[f"g{row // 3}" for row in range(330)])


@pytest.mark.parametrize("leak", ["random_images", "oversampled_first"])
def test_the_judged_images_show_trained_lesions_and_the_honest_ones_are_in_neither_part(
    plan: DataPlan, leak: str
) -> None:
    leaky = leaky_plan(plan, leak, seed=0)
    train, judged = leaky.group_ids[: leaky.num_train], leaky.group_ids[leaky.num_train :]
    assert len(judged) == 60
    assert np.isin(judged, train).mean() > 0.8
    assert not set(leaky.image_ids) & set(plan.image_ids[300:])
    label_of = dict(zip(plan.image_ids, plan.labels, strict=True))
    assert [label_of[image_id] for image_id in leaky.image_ids] == leaky.labels.tolist()
    # Rows of the experiments train on fewer images; images that come twice must not move into the judged part.
    fewer = leaky.limited(50)
    assert fewer.image_ids[fewer.num_train :] == leaky.image_ids[leaky.num_train :]
    assert len(set(fewer.image_ids[: fewer.num_train])) <= 50
    if leak == "oversampled_first":
        assert np.bincount(leaky.labels).tolist() == [100, 100, 100]


def test_the_preset_is_the_mini_one_with_the_mistake() -> None:
    leaky, mini = PRESETS["dissertation_leaky"](), PRESETS["dissertation_mini"]()
    assert leaky.tuning.leak == "oversampled_first"
    assert leaky.trainers.sampler == "natural"
    assert leaky.tuning.model_copy(update={"leak": "none"}) == mini.tuning
    assert all(PRESETS[name]().tuning.leak == "none" for name in PRESETS if name != "dissertation_leaky")


def test_the_report_sets_what_the_network_is_worth_beside_what_was_pretended(
    tmp_path: Path, make_header: Callable[..., SearchHeader], make_trial: Callable[..., TrialResult]
) -> None:
    base = flat_values(PRESETS["dissertation_leaky"]().trainers.model_dump(mode="json", exclude=set(MACHINERY)))
    header = make_header(leak="oversampled_first", experiments="dissertation_mini", base=base, trials=1)
    with open_journal(tmp_path, header) as journal:
        journal.write("ended", trial=make_trial(0, [0.9]).model_dump(mode="json"))
    assert "Every score on this page is pretended" in render(report_on(tmp_path))
    scores = [Scores(accuracy=value, balanced_accuracy=value) for value in (0.93, 0.61)]
    split = PretendedSplit(
        name="oversampled_first", train_images=8, test_images=2, leaked_test_share=0.95, pretended=scores[0],
        honest=scores[1], gap=0.32,
    )  # fmt: skip
    found = PretendReport(
        model="custom_cnn", side_px=56, epochs=8, augmentation="none", seed=0, honest_images=77, splits=[split]
    )
    (tmp_path / LEAK_FILE).write_text(found.model_dump_json())
    page = render(report_on(tmp_path))
    for text in ("77 images of lesions that it never saw", "95.0 %", "0.930", "0.610", "+32.0"):
        assert text in page, text
    compared = compare(header, [])
    assert compared is not None
    assert "on purpose" in compared.why_different[0]
