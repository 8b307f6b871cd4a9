"""What a peer tells the others about itself, and whether two of them may average their weights.

A standing arrives from another machine, so it is read with a schema and a limit of size, and what does not fit is
left out.
"""

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from records.ids import hash_of

MOST_CHARACTERS = 65_536
NAMED_FIELDS = 3

logger = logging.getLogger(__name__)


class Facts(BaseModel):
    """What has to be equal among peers, and the data, which may not be.

    Args:
        relook: version of the code.
        recipe: settings that decide what the model becomes, by dotted name.
        policy_hash: of the augmentation policy.
        taxonomy_hash: of the labels.
        start_hash: of the weights to start from.
        teacher_id: that the training is distilled from.
        averages_per_epoch: how often weights are averaged.
        dataset_id: of the peer's dataset version.
        part: which part of it the peer trains on, as 1/2.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    relook: str = Field(max_length=64)
    recipe: dict[str, Any]
    policy_hash: str = Field(max_length=64)
    taxonomy_hash: str = Field(max_length=64)
    start_hash: str = Field(max_length=64)
    teacher_id: str | None = Field(max_length=64)
    averages_per_epoch: int
    dataset_id: str = Field(max_length=64)
    part: str = Field(max_length=16)

    def shared_hash(self) -> str:
        """Return the hash of what is equal among peers."""
        return hash_of(self.model_dump(mode="json", exclude={"dataset_id", "part"}))


class Standing(BaseModel):
    """Where a peer is.

    Args:
        facts: of its training.
        reached: averagings that it has come to, met or missed; None while it joins.
        kept_epochs: epochs of the checkpoint that it can hand over; None without one.
        pixels: mean and deviation of the images, RGB in 0 to 1, once the peer knows them.
        left: whether its training is over.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    facts: Facts
    reached: int | None = Field(default=None, ge=0)
    kept_epochs: int | None = Field(default=None, ge=0)
    pixels: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None
    left: bool = False


def read_standings(records: Mapping[str, str], unreadable: set[str]) -> dict[str, Standing]:
    """Read what other peers published.

    Args:
        records: texts by peer.
        unreadable: peers whose text was no standing; each is logged once and left out.
    Returns:
        Standings by peer.
    """
    found = {}
    for peer, text in records.items():
        try:
            if len(text) > MOST_CHARACTERS:
                raise ValueError(f"{len(text)} characters")
            found[peer] = Standing.model_validate_json(text)
        except (ValidationError, ValueError) as error:
            if peer not in unreadable:
                logger.warning("peer %s published what is no standing (%s)", peer[-8:], type(error).__name__)
            unreadable.add(peer)
    return found


def difference(own: Facts, other: Facts) -> str | None:
    """Return why two peers cannot train together, as what the other one does; None if they can."""
    if other.relook != own.relook:
        return f"runs Relook {other.relook}, and this one {own.relook}"
    if other.taxonomy_hash != own.taxonomy_hash:
        return "has another taxonomy"
    differing = sorted(name for name in own.recipe.keys() | other.recipe.keys()
                       if own.recipe.get(name) != other.recipe.get(name))  # fmt: skip
    if differing:
        named = [f"trainers.{name} {other.recipe.get(name)!r} (here {own.recipe.get(name)!r})" for name in differing]
        more = f" and {len(named) - NAMED_FIELDS} more" if len(named) > NAMED_FIELDS else ""
        return f"has {', '.join(named[:NAMED_FIELDS])}{more}"
    for name, words in (
        ("policy_hash", "another augmentation policy"), ("start_hash", "other weights to start from"),
        ("teacher_id", "another teacher"),
    ):  # fmt: skip
        if getattr(other, name) != getattr(own, name):
            return f"has {words}"
    if other.averages_per_epoch != own.averages_per_epoch:
        return (
            f"averages {other.averages_per_epoch} times per epoch, and this one {own.averages_per_epoch} "
            "(trainers.workers.peers.averages_per_epoch)"
        )
    return _difference_of_data(own, other)


def _difference_of_data(own: Facts, other: Facts) -> str | None:
    parts = own.part.partition("/")[2], other.part.partition("/")[2]
    if parts[0] != parts[1]:
        return f"trains on part {other.part}, and this one on part {own.part}; both have to count the same parts"
    if parts[0] != "1" and own.dataset_id != other.dataset_id:
        return (
            f"trains on a part of dataset {other.dataset_id[:12]}, and this one of {own.dataset_id[:12]}; parts are "
            "of one version that all peers hold"
        )
    return None


def same_images(own: Facts, other: Facts) -> bool:
    """Return whether two peers train on the same images."""
    return (own.dataset_id, own.part) == (other.dataset_id, other.part)
