"""The dissertation's rows: what they train, and how they stand beside what was published."""

import pytest

from cluster.presets import PRESETS
from tuning.experiments import EXPERIMENTS, compare, experiment_settings
from tuning.journal import open_journal
from tuning.report import render, report_on
from tuning.trials import TrialFigures
from vision.networks import MODELS

FIGURES = TrialFigures(
    epoch=3,
    groups=747,
    balanced_accuracy=0.5,
    balanced_accuracy_ci=(0.44, 0.56),
    accuracy=0.7,
    accuracy_ci=(0.66, 0.74),
    macro_f1=0.4,
    macro_f1_ci=(0.35, 0.45),
)


@pytest.fixture
def mini(make_header):
    """The header of a search over the rows of the small preset."""
    settings = PRESETS["dissertation_mini"]()
    base = settings.trainers.flat()
    return make_header(experiments="dissertation_mini", base=base, trials=settings.tuning.trials, trial_epochs=8)


@pytest.mark.parametrize(("name", "rows"), [("dissertation", 17), ("dissertation_mini", 14)])
def test_every_row_can_be_trained_and_is_another_one(name, rows):
    settings = PRESETS[name]()
    trained = experiment_settings(name, settings.trainers)

    assert len({row.recipe_hash() for row in trained}) == len(trained) == rows == settings.tuning.trials
    assert settings.trainers in trained, "the given settings are one of the rows"
    assert max(row.epochs for row in trained) == settings.tuning.trial_epochs


def test_what_the_dissertation_compares_is_there():
    tables = {}
    for row in EXPERIMENTS["dissertation"]:
        for table in row.tables:
            tables.setdefault(table, []).append(row.published)

    assert tables == {
        "networks": [0.723, 0.678, 0.739, 0.82, 0.889, 0.8321, 0.8742],
        "augmentation and training-set size": [0.723, 0.739, None, None, None, None],
        "optimizers": [0.82, 0.734, 0.76],
        "schedulers": [0.82, None],
        "networks of its literature table": [0.946, 0.963, 0.957],
    }
    base = PRESETS["dissertation"]().trainers
    assert {row.model.name for row in experiment_settings("dissertation", base)} == {
        "custom_cnn", "custom_cnn_base", "resnet18", "resnet34", "squeezenet", "densenet121", "inception_v3",
    }  # fmt: skip
    assert not MODELS["custom_cnn_base"].batch_norm


def test_a_trial_stands_beside_its_published_figure(mini, make_trial):
    rows = {row.name: row for row in EXPERIMENTS["dissertation_mini"]}
    adam = rows["ResNet-18, Adam"]
    found = compare(mini, [make_trial(6, [0.5], overrides=dict(adam.overrides), figures=FIGURES)])

    (row,) = [row for row in found.rows if row.trial is not None]
    assert (row.table, row.name, row.side_px, row.epochs, row.max_train_images) == (
        "optimizers", "ResNet-18, Adam", 16, 4, 1000,
    )  # fmt: skip
    assert (row.published, row.metric, row.difference) == (0.76, "accuracy", pytest.approx(-0.06))
    assert found.groups == 747
    assert all(other.accuracy is None and other.difference is None for other in found.rows if other is not row)


def test_a_search_of_other_things_is_compared_with_nothing(make_header):
    assert compare(make_header(), []) is None


def test_the_page_shows_the_rows_and_why_they_differ(mini, make_trial, tmp_path):
    overrides = dict(EXPERIMENTS["dissertation_mini"][1].overrides)
    with open_journal(tmp_path, mini) as journal:
        journal.write("ended", trial=make_trial(1, [0.5], overrides=overrides, figures=FIGURES).model_dump(mode="json"))
    page = render(report_on(tmp_path))

    assert "Beside the dissertation" in page
    assert "0.660 to 0.740" in page
    assert "187 test images of df" in page
