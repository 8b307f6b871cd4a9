"""Population-based training: generations by hand, a search under Ray, its schedule trained again without one."""

import json
import shlex
from itertools import pairwise

import pytest
from pydantic import ValidationError

from cluster.sources import load_settings
from records.errors import ConfigError
from records.registry import Range
from trainers.augmentation import load_policy
from trainers.augmentation.registry import parse_phases
from trainers.fitting.loop import train
from trainers.fitting.training_data import plan_data
from tuning.journal import FILE_NAME, read_past
from tuning.population import changed, make_generation
from tuning.report import _command, report_on
from tuning.search import search, searched_part
from tuning.settings import Searcher, TuningSettings
from tuning.space import with_overrides

LINE = "ops:d4@1+rotate@0.4*0.5+cutout@0.3*0.9"


def grow(overrides, epoch, random):
    """Stand in for the change of settings: note when it was made."""
    return {**overrides, "changed_at": epoch}


def test_the_worst_quarter_goes_on_as_the_best_quarter():
    scores = {0: 0.30, 1: 0.80, 2: 0.50, 3: 0.20, 4: 0.70, 5: 0.60, 6: 0.40, 7: 0.10}
    overrides = {number: {"mark": number} for number in scores}

    generations = make_generation(2, scores, overrides, grow, seed=0)

    assert [(step.number, step.score) for step in generations] == sorted(scores.items())
    parents = {step.number: step.parent for step in generations if step.exploits}
    assert sorted(parents) == [3, 7]
    assert set(parents.values()) <= {1, 4}
    for step in generations:
        assert step.parent_overrides == {"mark": step.parent}
        assert step.overrides == {"mark": step.parent} | ({"changed_at": 2} if step.exploits else {})
    assert generations == make_generation(2, scores, overrides, grow, seed=0)


@pytest.mark.parametrize(
    ("scores", "parents"),
    [
        ({0: 0.1, 1: 0.2}, {0: 0, 1: 1}),  # the given settings stay as they are
        ({0: 0.2, 1: 0.1}, {0: 0, 1: 0}),
        ({1: 0.5, 2: 0.5, 3: 0.5}, {1: 1, 2: 2, 3: 1}),  # among equals the first is the better one
        ({3: 0.5}, {3: 3}),
        ({}, {}),
    ],
)
def test_small_populations(scores, parents):
    generations = make_generation(1, scores, {number: {} for number in scores}, grow, seed=0)

    assert {step.number: step.parent for step in generations} == parents


def test_a_change_holds_from_its_epoch_and_stays_within_the_ranges(trainers, numpy_random):
    settings = trainers.with_values({"augmentation": LINE, "optimizer.learning_rate": 0.05})

    found = with_overrides(settings, changed(settings, 3, Range(1e-3, 0.06, log=True), numpy_random))

    assert found.optimizer.learning_rate == 0.05
    [(start, factor)] = found.scheduler.learning_rate_factors
    assert (start, factor) in {(3, 0.8), (3, 1.2)}  # 0.0625 would be too much
    (_, first), (start, later) = parse_phases(found.augmentation)
    assert [str(step) for step in first] == LINE.removeprefix("ops:").split("+")
    assert start == 3
    assert str(later[0]) == "d4@1"
    assert later[1].strength in (0.4, 0.62)
    assert later[2].strength in (0.72, 1.0)


def test_a_change_takes_the_place_of_what_was_planned_for_later(trainers, numpy_random):
    line = "ops:rotate@0.4*0.5/2:rotate@0.4*0.2/3:rotate@0.4*1/7:rotate@0.4*0.1"
    planned = {
        "augmentation": line,
        "optimizer.learning_rate": 0.05,
        "scheduler.learning_rate_factors": ((2, 0.5), (3, 1.0), (7, 0.1)),
    }

    found = changed(trainers.with_values(planned), 3, Range(1e-3, 0.3, log=True), numpy_random)

    assert found["augmentation"] in {f"ops:rotate@0.4*0.5/2:rotate@0.4*0.2/3:rotate@0.4*{x}" for x in ("0.8", "1")}
    assert found["scheduler.learning_rate_factors"] in [[[2, 0.5], [3, factor]] for factor in (0.8, 1.25)]


def test_a_policy_without_strengths_is_kept(trainers, numpy_random):
    assert list(changed(trainers, 3, Range(1e-3, 0.3, log=True), numpy_random)) == ["scheduler.learning_rate_factors"]


@pytest.fixture
def numpy_random():
    import numpy as np

    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 1}, "needs a population"),
        ({"generation_epochs": 4}, "leaves no generation within trial_epochs 4"),
        ({"workers_per_trial": 2}, "set workers_per_trial to 1"),
    ],
)
def test_what_is_no_population_is_refused(changes, message):
    values = {"searcher": "pbt", "trials": 4, "trial_epochs": 4, "generation_epochs": 1}
    with pytest.raises(ValidationError, match=message):
        TuningSettings.model_validate(values | changes)


@pytest.fixture(scope="module")
def population(tuning):
    """Four members of four epochs, which generation after epochs 1, 2 and 3."""
    changes = {
        "searcher": "pbt",
        "generation_epochs": 1,
        "trial_epochs": 4,
        "search": ("augmentation",),
        "scheduler": "asha",
    }
    return TuningSettings.model_validate(tuning.model_dump() | changes)


@pytest.fixture(scope="module")
def evolved(ray_session, labelled, trainers, population, tmp_path_factory):
    """One search by a population: (run folder, result, events)."""
    store, dataset = labelled
    run_dir, events = tmp_path_factory.mktemp("population"), []
    result = search(store, population, trainers, dataset, run_dir=run_dir, on_event=events.append)
    return run_dir, result, events


@pytest.mark.slow
@pytest.mark.long
def test_strengths_and_learning_rate_change_while_members_train(evolved):
    run_dir, result, _ = evolved
    generations = read_past(run_dir).generations

    assert [(step.epoch, step.number) for step in generations] == [(e, n) for e in (1, 2, 3) for n in range(4)]
    assert [trial.state for trial in result.trials] == ["finished"] * 4
    assert result.trials[0].overrides == {}
    taken = [step for step in generations if step.exploits]
    assert taken
    assert all(step.overrides["scheduler.learning_rate_factors"][-1][0] == step.epoch + 1 for step in taken)
    phases = [parse_phases(step.overrides["augmentation"]) for step in taken if step.parent]
    assert phases
    assert all(steps[-1] != steps[0] for steps in phases)
    assert not (run_dir / "population").exists()
    assert result.header.scheduler == "none"
    assert report_on(run_dir).exploits == tuple(taken)


@pytest.mark.slow
@pytest.mark.long
def test_what_a_population_found_can_be_trained_again_without_it(evolved, labelled, trainers, population):
    """The command of a member that went on with other members' weights trains to its very scores at one go."""
    (run_dir, result, _), (store, dataset) = evolved, labelled
    number = next(step.number for step in reversed(read_past(run_dir).generations) if step.exploits)
    member = result.trials[number]
    images = plan_data(searched_part(dataset, None, population.seed), store.taxonomy)
    words = shlex.split(_command(result.header, member))
    sets = [text for option, text in pairwise(words) if option == "--set"]
    settings = load_settings(sets=[*sets, f"trainers.workers.threads={population.cpus_per_trial}"]).trainers
    assert settings.recipe_hash() == with_overrides(trainers, member.overrides).recipe_hash()
    scores = []

    train(
        settings,
        images.open(store, settings.model.frame),
        store.taxonomy,
        on_epoch=lambda report: scores.append(report.val_balanced_accuracy),
    )

    assert tuple(scores) == member.scores


@pytest.mark.soak
def test_a_population_that_was_killed_goes_on_with_its_generations(evolved, labelled, trainers, population, tmp_path):
    """Killed as the second generation began, without its checkpoints: the same generations and scores as before."""
    (run_dir, result, _), (store, dataset) = evolved, labelled
    lines = (run_dir / FILE_NAME).read_text().splitlines(keepends=True)
    written = [at for at, line in enumerate(lines) if json.loads(line)["kind"] == "generation"]
    (tmp_path / FILE_NAME).write_text("".join(lines[: written[1] + 2]))

    again = search(store, population, trainers, dataset, run_dir=tmp_path)

    assert read_past(tmp_path).generations == read_past(run_dir).generations
    assert [(t.overrides, t.scores) for t in again.trials] == [(t.overrides, t.scores) for t in result.trials]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    assert kinds.count("generation") == 3


def test_generations_that_never_end_are_refused(labelled, trainers, population, tmp_path):
    store, dataset = labelled
    short = trainers.model_copy(update={"epochs": 2})
    rare = population.model_copy(update={"generation_epochs": 2})

    with pytest.raises(ConfigError, match=r"tuning\.generation_epochs is 2, but a trial has 2 epochs"):
        search(store, rare, short, dataset, run_dir=tmp_path)


@pytest.mark.slow
@pytest.mark.long
def test_members_begin_with_policies_that_have_strengths(evolved):
    _, result, _ = evolved
    first = [event.trial for event in evolved[2] if event.kind == "started"][:4]

    assert [trial.overrides.get("augmentation", "").startswith("ops:") for trial in first] == [False, True, True, True]
    assert Searcher(result.header.searcher) is Searcher.PBT
    assert load_policy(result.trials[3].overrides["augmentation"]).content_hash()
