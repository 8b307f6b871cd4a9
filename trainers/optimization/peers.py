"""The settings of strategy `hivemind`: how a training finds its peers, and how often they average their weights.

A peer is one process at one site, with images of its own. See `trainers.fitting.peers`.
"""

import re
from typing import Annotated

from pydantic import Field

from records.errors import ConfigError
from records.settings import RoomSettings, checked_by

PEER_ID = "/p2p/"
PART = re.compile(r"([1-9]\d{0,3})/([1-9]\d{0,3})")


def _check_address(text: str) -> None:
    if not text.startswith("/") or PEER_ID not in text:
        raise ConfigError(
            f"{text!r} is no address of a peer; one is printed when a peer starts, such as "
            "/ip4/192.0.2.7/tcp/4001/p2p/QmHash"
        )


def _check_listen(text: str) -> None:
    if text and (not text.startswith("/") or PEER_ID in text):
        raise ConfigError(f"{text!r} is no address to listen on; take one such as /ip4/0.0.0.0/tcp/4001, or none")


def _check_part(text: str) -> None:
    found = PART.fullmatch(text)
    if found is None or int(found[1]) > int(found[2]):
        raise ConfigError(f"{text!r} is no part; the second of three is 2/3, and all images are 1/1")


class PeersSettings(RoomSettings):
    """Strategy hivemind alone: processes at several sites that average their weights over the internet."""

    addresses: tuple[Annotated[str, checked_by(_check_address)], ...] = Field(
        default=(), max_length=100, description="peers to join, as each prints its own; empty starts a new group"
    )
    group: str = Field(
        default="relook", pattern=r"^[a-z0-9-]{1,64}$", description="name of the training that the peers share"
    )
    listen: Annotated[str, checked_by(_check_listen)] = Field(
        default="/ip4/127.0.0.1/tcp/0",
        description="address that other peers reach, as a multiaddress; 0 takes a free port; empty only calls others",
    )
    announce: tuple[Annotated[str, checked_by(_check_listen)], ...] = Field(
        default=(), max_length=100, description="addresses to tell others, where a router forwards a port to `listen`"
    )
    part: Annotated[str, checked_by(_check_part)] = Field(
        default="1/1",
        description="part of the training images, by group, that this peer trains on: 2/3 is the second of three parts "
        "of a dataset version that all peers hold; 1/1 all of the peer's own images",
    )
    fewest: int = Field(default=1, ge=1, le=100, description="peers that have to be there before training starts")
    averages_per_epoch: int = Field(default=4, ge=1, le=1000, description="how often per epoch weights are averaged")
    matchmaking_s: float = Field(default=3.0, ge=0.5, le=60, description="time in which peers find each other, seconds")
    averaging_timeout_s: float = Field(default=300.0, ge=5, le=86_400, description="limit for an averaging, seconds")
    patience_s: float = Field(
        default=600.0, ge=0, le=86_400, description="how long a slower peer is waited for before an averaging, seconds"
    )

    @property
    def share(self) -> tuple[int, int]:
        """Which part of how many, 1-based."""
        number, count = self.part.split("/")
        return int(number), int(count)
