"""The group of one, threads and devices."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from records.errors import ConfigError
from trainers.fitting.checkpoints import Checkpoint, Identity, save_checkpoint
from trainers.fitting.workers import (
    CHECKPOINT_FILE,
    GROUP_FOLDER,
    SingleWorker,
    any_of,
    choose_device,
    compute_threads,
    furthest_in,
    mean_over,
    threads_of,
)
from trainers.settings import WorkersSettings


def test_a_group_of_one() -> None:
    group = SingleWorker(use_gpu=False)
    network = nn.Linear(2, 2)
    assert (group.rank, group.world_size) == (0, 1)
    assert group.wrap(network) is network
    assert group.gather(np.arange(3))[0].tolist() == [0, 1, 2]
    assert mean_over(group, 2.5) == 2.5
    assert any_of(group, True)
    assert not any_of(group, False)


def test_without_a_folder_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert SingleWorker(use_gpu=False).load() is None
    assert SingleWorker(tmp_path, use_gpu=False).load() is None


def test_the_checkpoint_that_is_furthest_on_counts_whoever_left_it(tmp_path: Path) -> None:
    def left(epochs: int, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        reports = [{"epoch": number} for number in range(1, epochs + 1)]
        identity, mean = Identity(*"abcde"), (0.5, 0.5, 0.5)
        save_checkpoint(Checkpoint(identity, reports, {}, {}, {}, {}, mean, mean, finished=False), path)

    def furthest() -> int | None:
        found = furthest_in(tmp_path)
        return found.epochs_done if found else None

    assert furthest() is None
    left(2, tmp_path / GROUP_FOLDER / "checkpoint_2" / CHECKPOINT_FILE)
    assert furthest() == 2, "a group's, where one worker left none"
    left(1, tmp_path / CHECKPOINT_FILE)
    assert furthest() == 2, "one worker began, and a group went on"
    left(3, tmp_path / CHECKPOINT_FILE)
    assert furthest() == 3, "one worker went on after a group"
    (tmp_path / GROUP_FOLDER / "checkpoint_2" / CHECKPOINT_FILE).write_bytes(b"cut off")
    assert furthest() == 3


def test_threads_are_set_inside_and_restored_after() -> None:
    before = torch.get_num_threads()
    with compute_threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before


def test_how_many_threads_a_worker_gets() -> None:
    assert threads_of(WorkersSettings(threads=3)) == 3
    one, many = (
        threads_of(WorkersSettings()),
        threads_of(WorkersSettings(count=4096)),
    )
    assert one >= 1
    assert many == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there() -> None:
    assert choose_device("auto") == choose_device(False) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"trainers.workers.use_gpu is true, but torch sees no GPU here"):
        choose_device(True)
