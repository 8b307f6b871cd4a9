"""Checkpoints: everything that a run needs to be resumed exactly, in one file.

A checkpoint is taken between two optimizer steps. It holds weights, their running mean, the states of optimizer
and schedule, and the position: epochs that are done and steps of the one under way. Order, augmentation and
dropout are functions of (seed, epoch, step), so the position is the state of all random generators, too. Tensors
are whole, whatever the strategy, so any number of workers can go on. What a run is made of is stored beside it:
it is never continued with other settings or other data. It is read with torch's restricted loader.
"""

import pickle
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from records.durable import replacing
from records.errors import IntegrityError, RefusedError, UnavailableError
from trainers.fitting.epoch_report import EpochReport

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Identity:
    """What a run is made of; a checkpoint with another identity is another run's."""

    recipe_hash: str
    policy_hash: str
    taxonomy_hash: str
    data_hash: str
    start_hash: str
    teacher_id: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A run between two steps.

    Args:
        identity: what the run is made of.
        reports: of the epochs that are done, as plain values.
        network: parameters and buffers.
        optimizer: its state.
        scheduler: its state.
        best: parameters and buffers after the best epoch so far, on the CPU.
        mean: of the training images, RGB in 0 to 1.
        std: of the training images, RGB in 0 to 1.
        finished: whether the run is over.
        average: running mean of the parameters, if the run keeps one.
        step: steps done of the epoch under way; 0 between two epochs.
        loss_sum: of those steps.
        batch_size: that the run found, if it was to find one.
    """

    identity: Identity
    reports: list[dict[str, Any]]
    network: Weights
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    best: Weights
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    finished: bool
    average: Weights | None = None
    step: int = 0
    loss_sum: float = 0.0
    batch_size: int | None = None

    @property
    def epochs_done(self) -> int:
        """Number of epochs that are done."""
        return len(self.reports)

    @property
    def position(self) -> str:
        """Where the run is, in words."""
        within = f" and {self.step} steps of the next" if self.step else ""
        return f"epoch {self.epochs_done}{within}"

    def epoch_reports(self) -> list[EpochReport]:
        """Return the reports of the epochs that are done."""
        return [EpochReport.model_validate(report) for report in self.reports]


_IDENTITY_WORDS = {
    "recipe_hash": "with other settings",
    "policy_hash": "with another augmentation policy",
    "taxonomy_hash": "with another taxonomy",
    "data_hash": "on other data",
    "start_hash": "from another model",
    "teacher_id": "with another teacher",
}


def require_same_run(checkpoint: Checkpoint, identity: Identity) -> None:
    """Refuse to go on with another run's checkpoint.

    Raises RefusedError: they differ; says in what.
    """
    for part in fields(Identity):
        if getattr(checkpoint.identity, part.name) != getattr(identity, part.name):
            raise RefusedError(
                f"the checkpoint in this run's folder was made {_IDENTITY_WORDS[part.name]}; "
                "go on with the same ones, or train in a new folder"
            )


@dataclass(frozen=True)
class Recipe:
    """The part of an identity that may change on the way: settings and augmentation policy."""

    recipe_hash: str
    policy_hash: str


def handed_on(checkpoint: Checkpoint, epochs: int, giver: Recipe, taker: Recipe) -> Checkpoint:
    """Return a checkpoint under the identity of a run with other settings or policy, which continues from it.

    The caller guarantees that both recipes are equal up to that epoch, so that the taker alone would have reached the
    same state.

    Args:
        checkpoint: of the giver.
        epochs: that it has to have done, no more and no less.
        giver: whose checkpoint it is.
        taker: whose it becomes; data, taxonomy and start stay what they were.
    Returns:
        The checkpoint with the taker's identity.
    Raises:
        RefusedError: it is not the giver's, or elsewhere than after these epochs.
    """
    found = Recipe(checkpoint.identity.recipe_hash, checkpoint.identity.policy_hash)
    # A checkpoint within an epoch is refused: the steps that are left would run with the taker's settings.
    if found != giver or checkpoint.epochs_done != epochs or checkpoint.step:
        raise RefusedError(
            f"a checkpoint after {checkpoint.position} cannot be handed on: it is not the giver's after epoch {epochs}"
        )
    return replace(checkpoint, identity=replace(checkpoint.identity, **asdict(taker)))


def rebased(checkpoint: Checkpoint, identity: Identity) -> Checkpoint:
    """Return another peer's checkpoint for a run on other images, at the start of the epoch that it is in.

    All but the data of both runs has to be the same, which `require_same_run` checks after it.
    """
    own = replace(checkpoint.identity, data_hash=identity.data_hash)
    return replace(checkpoint, identity=own, step=0, loss_sum=0.0)


def further(one: Checkpoint | None, other: Checkpoint | None) -> Checkpoint | None:
    """Return the checkpoint that is further on; the first of two at the same position."""
    if one is None or other is None:
        return one or other
    return max(one, other, key=lambda found: (found.epochs_done, found.step, found.finished))


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint so that a kill or a power cut leaves either the old one or the new one.

    Raises UnavailableError: the disk is full or the folder is gone; the checkpoint before is untouched.
    """
    try:
        if not path.parent.is_dir():
            raise UnavailableError(f"folder {path.parent} is gone")
        with replacing(path) as temporary:
            torch.save(_plain(checkpoint), temporary)
    # torch reports a full disk as a RuntimeError of its zip writer.
    except (UnavailableError, RuntimeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UnavailableError(
            f"checkpoint {path} cannot be written after {checkpoint.position} ({reason}); "
            "see that the folder is there and its disk has space"
        ) from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises IntegrityError: the file is damaged.
    """
    try:
        # weights_only: a checkpoint may come from shared storage, and unpickling arbitrary objects would execute
        # them.
        document = torch.load(path, map_location="cpu", weights_only=True)
        return Checkpoint(**{**document, "identity": Identity(**document["identity"])})
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, KeyError, pickle.UnpicklingError) as error:
        raise IntegrityError(
            f"checkpoint {path} is damaged ({type(error).__name__}); delete it to start the run over"
        ) from error


def _plain(checkpoint: Checkpoint) -> dict[str, Any]:
    document = {part.name: getattr(checkpoint, part.name) for part in fields(Checkpoint)}
    return {**document, "identity": asdict(checkpoint.identity)}
