"""Checkpoints: whole or not at all, read without pickle, and never continued as another run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from records.errors import IntegrityError, RefusedError, UnavailableError
from trainers.fitting.checkpoints import (
    Checkpoint,
    Identity,
    Recipe,
    handed_on,
    load_checkpoint,
    require_same_run,
    save_checkpoint,
)

IDENTITY = Identity("recipe", "policy", "taxonomy", "data", "start")


def checkpoint() -> Checkpoint:
    return Checkpoint(
        identity=IDENTITY,
        reports=[],
        network={"weight": torch.arange(6.0).reshape(2, 3)},
        optimizer={"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        scheduler={"last_epoch": 3, "lr_lambdas": [None], "best": float("-inf")},
        best={"weight": torch.zeros(2, 3)},
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        finished=False,
        average={"weight": torch.full((2, 3), 0.5)},
        step=7,
        loss_sum=3.25,
    )


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(checkpoint(), path)
    loaded = load_checkpoint(path)
    assert loaded.identity == IDENTITY
    assert torch.equal(loaded.network["weight"], checkpoint().network["weight"])
    assert loaded.scheduler == checkpoint().scheduler
    assert (loaded.mean, loaded.std, loaded.finished) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), False)
    assert loaded.average is not None
    assert torch.equal(loaded.average["weight"], torch.full((2, 3), 0.5))
    assert (loaded.step, loaded.loss_sum, loaded.position) == (7, 3.25, "epoch 0 and 7 steps of the next")
    assert [entry.name for entry in path.parent.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("damage", ["truncate", "empty", "text"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(checkpoint(), path)
    data = path.read_bytes()
    path.write_bytes({"truncate": data[: len(data) // 2], "empty": b"", "text": b"not a checkpoint"}[damage])
    with pytest.raises(IntegrityError, match=r"checkpoint\.pt is damaged .*; delete it to start the run over"):
        load_checkpoint(path)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"identity": Path("/")}, path)
    with pytest.raises(IntegrityError, match="UnpicklingError"):
        load_checkpoint(path)


def test_a_folder_that_vanished_is_not_made_anew(tmp_path: Path) -> None:
    # That --resume goes on is said by the verbs, which know whether there is a checkpoint before this one.
    with pytest.raises(UnavailableError, match=r"after epoch 0 and 7 steps .*gone\).*its disk has space$"):
        save_checkpoint(checkpoint(), tmp_path / "gone" / "checkpoint.pt")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, file_size_limit: Callable[[int], None]) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(checkpoint(), path)
    before = path.read_bytes()
    file_size_limit(500)
    with pytest.raises(UnavailableError, match="cannot be written after"):
        save_checkpoint(checkpoint(), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("recipe_hash", "with other settings"),
        ("policy_hash", "with another augmentation policy"),
        ("taxonomy_hash", "with another taxonomy"),
        ("data_hash", "on other data"),
        ("start_hash", "from another model"),
    ],
)
def test_another_runs_checkpoint_is_refused(part: str, words: str) -> None:
    require_same_run(checkpoint(), IDENTITY)
    with pytest.raises(RefusedError, match=f"was made {words}; go on with the same ones, or train in a new folder"):
        require_same_run(checkpoint(), replace(IDENTITY, **{part: "other"}))


def test_a_checkpoint_is_handed_on_by_its_owner_and_where_it_is() -> None:
    between = replace(checkpoint(), step=0)
    giver, taker = Recipe("recipe", "policy"), Recipe("other recipe", "other policy")

    taken = handed_on(between, 0, giver, taker)

    assert taken.identity == Identity("other recipe", "other policy", "taxonomy", "data", "start")
    assert taken.network is between.network
    for wrong in ((between, 1, giver), (between, 0, taker), (checkpoint(), 0, giver)):
        with pytest.raises(RefusedError, match="cannot be handed on"):
            handed_on(*wrong, taker)
