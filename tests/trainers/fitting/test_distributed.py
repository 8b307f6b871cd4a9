"""The loop under a real Ray Train: two workers do what one does, a killed worker changes nothing, a folder goes on."""

import asyncio
import os
import random
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest

from bench.processes import processes_with
from records.datasets import build_version
from records.errors import ConfigError, DataError, DivergedError, RefusedError, RelookError, UnavailableError
from records.frames import Frame
from records.store import Store
from trainers.augmentation import load_policy
from trainers.fitting.distributed import warns_of_scarcity
from trainers.fitting.epoch_report import EpochReport
from trainers.fitting.job import job_of
from trainers.fitting.loop import TrainedModel, train
from trainers.fitting.training_data import DataPlan, plan_data
from trainers.optimization.distillation import Lesson
from trainers.settings import ModelSettings, OptimizerSettings, TrainersSettings, WorkersSettings

if TYPE_CHECKING:
    from cluster.session import RaySession


# Ray warns about its own defaults while it imports itself.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")

# No batch norm and no dropout: with them, two workers differ from one by what each sees of a batch.
SETTINGS = TrainersSettings(
    model=ModelSettings(name="custom_cnn_base", side_px=32, dropout=0.0),
    epochs=3,
    batch_size=16,
    precision="fp32",
    workers=WorkersSettings(threads=1, use_gpu=False, count=2, max_failures=2),
    augmentation="flips",
    optimizer=OptimizerSettings(learning_rate=0.01),
)
POLICY = load_policy("flips")


@pytest.fixture(scope="module")
def plan(filled_store: Store) -> DataPlan:
    """Train and val, and what a teacher says about train: a worker without it would end with other weights."""
    made = plan_data(build_version(filled_store).version, filled_store.taxonomy)
    logits = np.random.default_rng(0).normal(0, 3, (made.num_train, len(filled_store.taxonomy.codes)))
    return replace(made, lesson=Lesson("a" * 64, logits.astype(np.float32)))


@pytest.fixture(scope="module")
def alone(filled_store: Store, plan: DataPlan) -> TrainedModel:
    single = SETTINGS.with_values({"workers.count": 1})
    return train(single, plan.open(filled_store, Frame(32)), filled_store.taxonomy)


def largest_difference(a: TrainedModel, b: TrainedModel) -> float:
    left, right = a.weights(), b.weights()
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


def train_workers() -> list[psutil.Process]:
    return processes_with("RayTrainWorker")


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_are_one(
    ray_session: "RaySession", filled_store: Store, plan: DataPlan, alone: TrainedModel, tmp_path: Path
) -> None:
    from trainers.fitting.distributed import fit_distributed

    told: list[int] = []
    killed: list[int] = []

    def kill_one() -> None:
        workers = train_workers()
        assert len(workers) == 2
        os.kill(workers[1].pid, signal.SIGKILL)
        killed.append(workers[1].pid)

    def kill_one_in_the_second_epoch(report: EpochReport) -> bool:
        told.append(report.epoch)
        if report.epoch == 1:
            threading.Timer(random.uniform(0.0, 0.1), kill_one).start()
        return False

    stepwise = SETTINGS.with_values({"workers.checkpoint_every_steps": 1})
    together = fit_distributed(
        job_of(filled_store, stepwise, plan, tmp_path, POLICY), on_epoch=kill_one_in_the_second_epoch
    )
    assert len(killed) == 1
    assert sorted(set(told)) == [1, 2, 3]  # an epoch whose worker died before its checkpoint is told again
    assert largest_difference(together, alone) < 1e-4
    for ours, theirs in zip(together.reports, alone.reports, strict=True):
        assert ours.val_loss == pytest.approx(theirs.val_loss, abs=1e-3)
        assert ours.train_loss == pytest.approx(theirs.train_loss, abs=1e-3)


@pytest.mark.soak
def test_one_worker_is_a_task_that_goes_on_when_its_process_dies(
    ray_session: "RaySession", filled_store: Store, plan: DataPlan, alone: TrainedModel, tmp_path: Path
) -> None:
    from trainers.fitting.distributed import fit_distributed

    told: list[int] = []
    killed: list[int] = []

    def kill_it_once(report: EpochReport) -> bool:
        told.append(report.epoch)
        assert train_workers() == []
        if not killed:
            (process,) = processes_with("relook_fit")
            killed.append(process.pid)
            process.kill()
        return False

    single = SETTINGS.with_values({"workers.count": 1, "workers.checkpoint_every_steps": 1})
    model = fit_distributed(job_of(filled_store, single, plan, tmp_path, POLICY), on_epoch=kill_it_once)
    assert largest_difference(model, alone) == 0.0
    assert told == [1, 2, 3]
    assert len(killed) == 1
    with pytest.raises(RefusedError, match="was made with other settings"):
        fit_distributed(job_of(filled_store, single.with_values({"seed": 1}), plan, tmp_path, POLICY))
    # In the process of the one that failed, or in another: nothing of a fit is left to the next.
    again = fit_distributed(job_of(filled_store, single, plan, tmp_path / "next", POLICY))
    assert largest_difference(again, alone) == 0.0


@pytest.mark.soak
def test_a_worker_lost_for_good_leaves_a_checkpoint_that_another_strategy_finishes(
    ray_session: "RaySession", filled_store: Store, plan: DataPlan, alone: TrainedModel, tmp_path: Path
) -> None:
    from trainers.fitting.distributed import fit_distributed

    seen: list[int] = []

    def kill_one_after_the_second_epoch(report: EpochReport) -> bool:
        workers = train_workers()
        seen.append(len(workers))
        if report.epoch == 2:
            os.kill(workers[-1].pid, signal.SIGKILL)
        return False

    # Ray has CPUs for two of the eight; ddp would be refused.
    elastic = SETTINGS.with_values(
        {"workers.strategy": "elastic", "workers.count": 8, "workers.threads": 2, "workers.max_failures": 0}
    )
    with pytest.raises(UnavailableError, match=rf"training was lost .*; the last checkpoint is in {tmp_path}, run"):
        fit_distributed(job_of(filled_store, elastic, plan, tmp_path, POLICY), on_epoch=kill_one_after_the_second_epoch)
    assert seen == [2, 2]
    told: list[int] = []
    sharded = SETTINGS.with_values({"workers.strategy": "fsdp"})
    finished = fit_distributed(
        job_of(filled_store, sharded, plan, tmp_path, POLICY), on_epoch=lambda report: told.append(report.epoch)
    )
    assert told in ([2, 3], [3])  # the checkpoint after the second epoch was on its way when the worker died
    assert largest_difference(finished, alone) < 1e-4

    # The folder holds that run now: another one finds its checkpoint there and is refused, by one worker too.
    other = SETTINGS.with_values({"workers.count": 1, "seed": 1, "workers.max_failures": 0})
    with pytest.raises(RefusedError, match="was made with other settings"):
        fit_distributed(job_of(filled_store, other, plan, tmp_path, POLICY))


@pytest.mark.soak
def test_a_streamed_run_is_the_cached_run(
    ray_session: "RaySession", filled_store: Store, plan: DataPlan, alone: TrainedModel, tmp_path: Path
) -> None:
    from trainers.fitting.distributed import fit_distributed

    streamed = SETTINGS.with_values({"workers.count": 1, "workers.data_source": "stream"})
    model = fit_distributed(job_of(filled_store, streamed, plan, tmp_path, POLICY))
    assert [report.train_loss for report in model.reports] == [report.train_loss for report in alone.reports]
    assert largest_difference(model, alone) == 0.0


def test_more_workers_than_ray_has_cpus(
    ray_session: "RaySession", filled_store: Store, plan: DataPlan, tmp_path: Path
) -> None:
    from trainers.fitting.distributed import fit_distributed

    greedy = SETTINGS.with_values({"workers.count": 8, "workers.threads": 4})
    with pytest.raises(ConfigError, match=r"8 workers with 4 threads each need 32 CPUs and Ray has 4; lower"):
        fit_distributed(job_of(filled_store, greedy, plan, tmp_path, POLICY))
    demanding = SETTINGS.with_values({"workers.use_gpu": True})
    with pytest.raises(ConfigError, match=r"need as many GPUs and Ray has 0; .* trainers.workers.use_gpu=false"):
        fit_distributed(job_of(filled_store, demanding, plan, tmp_path, POLICY))


def test_waiting_is_told_once_and_so_is_going_on(caplog: pytest.LogCaptureFixture) -> None:
    answers = iter([{"CPU": 4.0}, {"CPU": 2.0}, {"CPU": 2.0}, {"CPU": 3.0, "GPU": 1.0}])
    asked = threading.Event()

    def available() -> dict[str, float]:
        found = next(answers, None)
        if found is None:
            asked.set()
            return {"CPU": 3.0}
        return found

    with warns_of_scarcity({"CPU": 3}, available, every_s=0.01):
        assert asked.wait(600)
    waits, goes_on = (record.getMessage() for record in caplog.records)
    assert "needs 3 CPUs and Ray has 2" in waits
    assert "--resume" in waits
    assert "goes on" in goes_on


def test_a_missing_gpu_is_named(caplog: pytest.LogCaptureFixture) -> None:
    asked = threading.Event()

    def available() -> dict[str, float]:
        if len(caplog.records) > 0:
            asked.set()
        return {"CPU": 8.0}

    with warns_of_scarcity({"CPU": 2, "GPU": 2}, available, every_s=0.01):
        assert asked.wait(600)
    (waits,) = (record.getMessage() for record in caplog.records)
    assert "needs 2 GPUs and Ray has 0" in waits


def test_fewer_workers_than_asked_for_may_train_where_they_are_elastic() -> None:
    from trainers.fitting.distributed import _fewest_workers
    from trainers.fitting.ray_group import _num_workers

    assert (_num_workers(SETTINGS), _fewest_workers(SETTINGS)) == (2, (2, "workers.count"))
    elastic = SETTINGS.with_values({"workers.strategy": "elastic", "workers.minimum": 1, "workers.count": 3})
    assert (_num_workers(elastic), _fewest_workers(elastic)) == ((1, 3), (1, "workers.minimum"))


def test_why_a_group_was_lost_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainers.fitting import ray_group

    monkeypatch.setattr(ray_group.ray, "get", lambda value: value)

    def reason(fatal: tuple[str, str] | None, text: str) -> RelookError:
        channel = SimpleNamespace(fatal=SimpleNamespace(remote=lambda: fatal))
        return ray_group._reason(channel, RuntimeError(text), tmp_path)

    known = reason(("DivergedError", "the loss is not finite"), "workers failed")
    assert (type(known), str(known)) == (DivergedError, "the loss is not finite")
    quoted = reason(None, "Traceback ...\nrecords.errors.DataError: train is empty\n")
    assert (type(quoted), str(quoted)) == (DataError, "train is empty")
    lost = reason(None, "workers failed\n\n  the node was lost  \n")
    assert str(lost) == "training was lost (the node was lost) before its first checkpoint"
    (tmp_path / ray_group.GROUP_FOLDER / "checkpoint_1").mkdir(parents=True)
    assert str(reason(None, "")) == (
        f"training was lost (RuntimeError); the last checkpoint is in {tmp_path}, run it again with --resume"
    )


def test_why_a_task_was_lost_is_said_in_one_sentence(tmp_path: Path) -> None:
    from trainers.fitting.one_worker import _lost
    from trainers.fitting.workers import CHECKPOINT_FILE

    lost = str(_lost(tmp_path, MemoryError("no  room\n left")))
    assert lost == "training was lost (MemoryError: no room left) before its first checkpoint"
    (tmp_path / CHECKPOINT_FILE).write_bytes(b"")
    assert str(_lost(tmp_path, MemoryError())).endswith(
        f"(MemoryError: MemoryError); the last checkpoint is in {tmp_path}, run it again with --resume"
    )


def test_a_node_that_decoded_nothing_opens_the_store_and_the_next_fit_does_not(
    filled_store: Store, plan: DataPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainers.fitting import one_worker

    job = job_of(filled_store, SETTINGS.with_values({"model.side_px": 33}), plan, tmp_path, POLICY)
    opened: list[int] = []
    whole = one_worker.open_store
    monkeypatch.setattr(one_worker, "open_store", lambda settings: opened.append(1) or whole(settings))
    first, second = one_worker._opened(job), one_worker._opened(job)
    assert len(opened) == 1
    assert np.array_equal(first.pixels.take(np.arange(3)), second.pixels.take(np.arange(3)))


def test_what_the_caller_raises_stops_the_run_and_is_raised_again() -> None:
    from trainers.fitting.channel import Channel, ReportThread

    def refuse(report: EpochReport) -> bool:
        raise ValueError(report.epoch)

    epoch = EpochReport(
        epoch=1, train_loss=0.8, val_loss=0.9, val_balanced_accuracy=0.5, val_accuracy=0.6, key_class_sensitivity=None,
        learning_rate=0.01, images_per_s=812.0, seconds=3.0,
    ).model_dump()  # fmt: skip
    silent = ReportThread(None, None)
    assert silent._ask(epoch) is False
    silent.raise_if_failed()
    failing = ReportThread(None, refuse)
    assert [failing._ask(epoch), failing._ask(epoch)] == [True, True], "asked once"
    with pytest.raises(ValueError, match="1"):
        failing.raise_if_failed()

    async def twice() -> list[bool]:
        channel = Channel()
        asked = [asyncio.create_task(channel.report(epoch)) for _ in range(2)]
        assert await channel.next_report() == epoch
        await channel.reply(1, True)
        found = [await one for one in asked]
        await channel.close()
        assert await channel.next_report() is None, "a repeated epoch is told once"
        return found

    assert asyncio.run(twice()) == [True, True]
