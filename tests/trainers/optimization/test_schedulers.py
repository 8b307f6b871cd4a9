"""Every registered schedule passes the same suite, and the two of the dissertation follow hand-made numbers."""

import io

import pytest
import torch
from torch import nn

from trainers.optimization.optimizers import build_optimizer
from trainers.optimization.schedulers import SCHEDULERS, build_scheduler
from trainers.settings import OptimizerSettings, SchedulerSettings, TrainersSettings

STEPS = 5


def run(settings: TrainersSettings, scores: list[float], *, resume_after: int | None = None) -> list[float]:
    """The learning rate during each epoch's last step."""
    optimizer, scheduler = _build(settings)
    rates = []
    for epoch, score in enumerate(scores):
        if epoch == resume_after:
            saved = io.BytesIO()
            torch.save([optimizer.state_dict(), scheduler.state_dict()], saved)
            saved.seek(0)
            states = torch.load(saved, weights_only=True)
            optimizer, scheduler = _build(settings)
            optimizer.load_state_dict(states[0])
            scheduler.load_state_dict(states[1])
        moves = SCHEDULERS[settings.scheduler.name].moves
        for _ in range(STEPS):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if moves == "step":
                scheduler.step()
        if moves == "epoch":
            scheduler.step()
        elif moves == "score":
            scheduler.step(score)
    return rates


def _build(settings: TrainersSettings) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    network = nn.Linear(2, 2)
    network(torch.ones(1, 2)).sum().backward()
    optimizer = build_optimizer(network, settings.optimizer)
    return optimizer, build_scheduler(optimizer, settings.scheduler, epochs=settings.epochs, steps_per_epoch=STEPS)


def test_the_suite_runs_all_schedules() -> None:
    assert SCHEDULERS.names == ("step", "plateau", "cosine", "onecycle")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_stay_positive_and_end_lower(name: str, optimizer: str) -> None:
    settings = TrainersSettings(
        scheduler=SchedulerSettings(name=name), optimizer=OptimizerSettings(name=optimizer, learning_rate=0.1), epochs=8
    )
    rates = run(settings, [0.5] * 8)
    assert all(0 < rate <= 0.1 + 1e-9 for rate in rates)
    assert rates[-1] < 0.05


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_restored_schedule_goes_on_as_if_nothing_had_happened(name: str) -> None:
    settings = TrainersSettings(
        scheduler=SchedulerSettings(name=name, plateau_patience_epochs=1),
        optimizer=OptimizerSettings(learning_rate=0.1),
        epochs=6,
    )
    scores = [0.5, 0.5, 0.5, 0.6, 0.6, 0.6]
    assert run(settings, scores, resume_after=3) == run(settings, scores)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_one_epoch_is_enough(name: str) -> None:
    assert len(run(TrainersSettings(scheduler=SchedulerSettings(name=name), epochs=1), [0.5])) == STEPS


def test_step_cuts_every_few_epochs() -> None:
    settings = TrainersSettings(
        scheduler=SchedulerSettings(name="step", step_size_epochs=2, gamma=0.1),
        optimizer=OptimizerSettings(learning_rate=1.0),
        epochs=5,
    )
    assert run(settings, [0.0] * 5)[::STEPS] == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])


def test_plateau_cuts_when_the_score_stops_rising() -> None:
    settings = TrainersSettings(
        scheduler=SchedulerSettings(name="plateau", plateau_patience_epochs=1, gamma=0.5),
        optimizer=OptimizerSettings(learning_rate=1.0),
        epochs=6,
    )
    assert run(settings, [0.1, 0.2, 0.2, 0.2, 0.3, 0.4])[::STEPS] == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.5, 0.5])


def test_cosine_warms_up_and_falls_to_zero() -> None:
    settings = TrainersSettings(
        scheduler=SchedulerSettings(name="cosine", warmup_epochs=1),
        optimizer=OptimizerSettings(learning_rate=1.0),
        epochs=5,
    )
    rates = run(settings, [0.0] * 5)
    assert rates[:STEPS] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert rates[STEPS] == 1.0
    assert rates[STEPS + 10] == pytest.approx(0.5)
    assert rates == sorted(rates[:STEPS]) + sorted(rates[STEPS:], reverse=True)
