"""Training with peers: processes at several sites, each with images of its own, that average their weights.

Each peer runs the loop of one worker on its own images. So many times per epoch it waits for the others, the weights
of all are averaged (weighted by the images since the last time, McMahan et al. 2017), and each goes on from the
mean. Images, labels and validation stay at the site. Peers may have different numbers of images: a round of averaging
is a share of each peer's own epoch, so that all are in the same epoch.

A peer that joins waits for the end of the others' epoch and goes on from a checkpoint of one of them. A peer that dies
is waited for until its record expires. What cannot be averaged is said, and the peer goes on with its own weights.
"""

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from records.errors import IntegrityError, RefusedError, UnavailableError
from records.progress import say
from trainers.fitting.checkpoints import Checkpoint, Identity, further, load_checkpoint, rebased
from trainers.fitting.epoch_report import OnEpoch, OnStep
from trainers.fitting.job import Job
from trainers.fitting.loop import TrainedModel
from trainers.fitting.standings import Facts, Standing, difference, read_standings, same_images
from trainers.fitting.swarm import ALIVE_S, Swarm
from trainers.fitting.training_data import Rgb, TrainingData, identity_of
from trainers.fitting.workers import CHECKPOINT_FILE, SingleWorker
from trainers.optimization.freezing import freeze
from trainers.settings import NO_RECIPE, flat_values
from vision.networks import build_model

BEAT_S = 4.0
LOOK_S, MOST_LOOK_S = 0.2, 2.0
"""Between two looks at the others' records, first and at most."""
MOST_STATES = 8
"""Copies of the weights that a checkpoint may hold: current, best, average, optimizer, and room."""
SPARE_BYTES = 64 * 2**20
ADDRESS_FILE = "peer-address.txt"

logger = logging.getLogger(__name__)


def train_with_peers(
    job: Job, data: TrainingData, dataset_id: str, on_epoch: OnEpoch | None = None, on_step: OnStep | None = None
) -> TrainedModel:
    """Train on this site's images, in a process's main thread.

    Args:
        job: of this peer; its folder keeps the checkpoint that it hands over to peers that join.
        data: images of this peer.
        dataset_id: of its dataset version.
        on_epoch: as for `loop.train`.
        on_step: as for `loop.train`.
    Returns:
        The model, whose epoch this peer's own val images chose.
    Raises:
        UnavailableError: no peer is where the settings say.
        RefusedError: a peer trains something else, or on the same images, or has finished.
    """
    identity = identity_of(job.settings, data, job.taxonomy, job.policy, job.initial_weights)
    with PeerGroup(job, identity, data, dataset_id) as group:
        return replace(job.train(data, group, on_epoch, on_step), peers=group.facts())


class PeerGroup(SingleWorker):
    """A worker group of one, whose weights are averaged with those of peers; a context that ends its processes.

    Args:
        job: of this peer.
        identity: of its run.
        data: its images.
        dataset_id: its dataset version.
    """

    def __init__(self, job: Job, identity: Identity, data: TrainingData, dataset_id: str) -> None:
        super().__init__(job.run_dir, job.settings.workers.use_gpu)
        self._settings = job.settings.workers.peers
        self._contact_timeout_s = job.settings.workers.contact_timeout_s
        self._folder: Path = job.run_dir
        self._identity = identity
        self._num_train = len(data.train_index)
        facts = _facts(job, identity, dataset_id)
        self._lock = threading.Lock()
        self._standing = Standing(facts=facts)
        self._unreadable: set[str] = set()
        self._done, self._num_averaged, self._most_peers, self._received_epochs = 0.0, 0, 1, 0
        shapes = [torch.zeros(parameter.shape) for parameter in _trained(_network_of(job))]
        self._most_bytes = MOST_STATES * 4 * sum(shape.numel() for shape in shapes) + SPARE_BYTES
        prefix = f"{self._settings.group}-{facts.shared_hash()[:16]}"
        self._swarm = Swarm(self._settings, prefix, shapes, self._state)
        self._over = threading.Event()
        self._beat = threading.Thread(target=self._publish_periodically, name="peer record", daemon=True)

    def __enter__(self) -> Self:
        """Join the others, or start a group."""
        try:
            if self._settings.addresses:
                self._require_fitting_peers()
            self._publish()
            self._beat.start()
            self._tell_address()
        except BaseException:
            self._swarm.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others that this peer leaves, and end its processes; the second time, do nothing."""
        if self._over.is_set():
            return
        self._over.set()
        self._beat.join()
        self._publish(left=True)
        self._swarm.close()

    def load(self) -> Checkpoint | None:
        """Return the run's checkpoint, or one of a peer's that is further on."""
        own = found = super().load()
        if self._settings.addresses:
            found = further(own, self._checkpoint_of_a_peer())
        if found is not None and found is not own and found.finished:
            raise RefusedError(
                "the peers have finished this training; start from one of their models with --start-from, or choose "
                "another name with --set trainers.workers.peers.group=NAME"
            )
        done = 0 if found is None else found.epochs_done
        if found is not own:
            self._received_epochs = done
        self._done = float(done)
        self._publish(reached=done * self._settings.averages_per_epoch, kept_epochs=done)
        self._swarm.hand_over(done)
        return found

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint, and offer it to peers that join."""
        super().save(checkpoint)
        self._publish(kept_epochs=checkpoint.epochs_done)
        self._swarm.hand_over(checkpoint.epochs_done)

    def shared_pixels(self, mean: Rgb, std: Rgb) -> tuple[Rgb, Rgb]:
        """Return the first peer's mean and deviation: the same weights need inputs of the same scale."""
        pixels = None
        for waited in _looks():
            known = [other.pixels for other in self._others().values() if other.pixels is not None]
            pixels = known[0] if known and self._settings.addresses else None
            if pixels is not None or not self._settings.addresses:
                break
            if waited > self._contact_timeout_s:
                raise UnavailableError("all peers left before this one could join; start again without --peers")
        self._publish(pixels=pixels or (mean, std))
        self._wait_for_the_fewest()
        return pixels or (mean, std)

    def after_step(self, network: nn.Module, epoch: int, step: int, steps: int) -> None:
        """Average the weights if the step ends a share of the epoch."""
        due = averagings_by(epoch, step, steps, self._settings.averages_per_epoch)
        if self._standing.reached is None or due <= self._standing.reached:
            return
        self._publish(reached=due)
        position = epoch + step / steps
        images, self._done = (position - self._done) * self._num_train, position
        if self._wait_for(due):
            self._average(network, images, due)

    def facts(self) -> dict[str, int]:
        """Return what a bundle says of the peers.

        Returns:
            `averagings` that succeeded, `most_peers` that one was of, and `received_epochs`: first epochs whose
            reports and figures on val are another peer's, because this one joined after them.
        """
        return {
            "averagings": self._num_averaged, "most_peers": self._most_peers, "received_epochs": self._received_epochs,
        }  # fmt: skip

    def _average(self, network: nn.Module, images: float, due: int) -> None:
        parameters, began = _trained(network), time.monotonic()
        try:
            means, count = self._swarm.average([_fp32(parameter) for parameter in parameters], max(images, 1.0))
        except UnavailableError as error:
            logger.warning("averaging %d failed (%s); this peer goes on with its own weights", due, error)
            return
        if not all(bool(mean.isfinite().all()) for mean in means):
            logger.warning("averaging %d: a peer's weights are not finite; this peer goes on with its own", due)
            return
        with torch.no_grad():
            for parameter, mean in zip(parameters, means, strict=True):
                parameter.copy_(mean)
        self._num_averaged += 1
        self._most_peers = max(self._most_peers, count)
        logger.info("averaging %d: weights of %d peers in %.1f s", due, count, time.monotonic() - began)
        if due % self._settings.averages_per_epoch == 0:
            say(f"epoch {due // self._settings.averages_per_epoch} ends with the mean of {count} peers")

    def _wait_for(self, due: int) -> bool:
        """Wait until no peer of this epoch is behind; return whether one is at the same averaging."""
        times, told = self._settings.averages_per_epoch, False
        for waited in _looks():
            there = [other.reached for other in self._others().values() if other.reached is not None]
            if any(reached > due + times for reached in there):
                raise UnavailableError(
                    "the peers are more than an epoch ahead, since this process stood still or is slower; start it "
                    "again with --resume and --peers, and it goes on where they are"
                )
            # One that is further behind ends as above when it notices.
            behind = sum(due - times <= reached < due for reached in there)
            if not behind or waited >= self._settings.patience_s:
                break
            if not told and waited > ALIVE_S:
                logger.warning("waiting for %d slower peers before averaging %d", behind, due)
                told = True
        if behind:
            logger.warning(
                "%d peers were too slow for averaging %d; wait longer with trainers.workers.peers.patience_s",
                behind, due,
            )  # fmt: skip
        return due in there

    def _wait_for_the_fewest(self) -> None:
        told = 0
        for _ in _looks():
            there = 1 + sum(other.reached is not None for other in self._others().values())
            if there >= self._settings.fewest:
                return
            if there != told:
                say(f"{there} of {self._settings.fewest} peers are there (trainers.workers.peers.fewest)")
                told = there

    def _others(self) -> dict[str, Standing]:
        """Return the peers that train the same and have not left."""
        own = self._standing.facts
        return {peer: other for peer, other in self._all_others().items() if difference(own, other.facts) is None}

    def _all_others(self) -> dict[str, Standing]:
        found = read_standings(self._swarm.records(), self._unreadable)
        return {peer: other for peer, other in found.items() if not other.left}

    def _require_fitting_peers(self) -> None:
        """Wait for the first record of another peer, and refuse to train with one that trains something else."""
        own = self._standing.facts
        for waited in _looks():
            found = self._all_others()
            for peer, other in found.items():
                reason = difference(own, other.facts)
                if reason is not None:
                    raise RefusedError(f"peer {peer} {reason}; peers train the same, each on its own images")
            twins = [peer for peer, other in found.items() if same_images(own, other.facts)]
            # The record of a peer that was killed and started again outlives it.
            if found and not twins:
                return
            if twins and waited > ALIVE_S + BEAT_S:
                raise RefusedError(
                    f"peer {twins[0]} trains on the same images; give each peer its own, or a part of them with "
                    "--set trainers.workers.peers.part=1/2"
                )
            if not found and waited > self._contact_timeout_s:
                raise UnavailableError(
                    f"no peer of group '{self._settings.group}' was found within {self._contact_timeout_s:g} s "
                    "(trainers.workers.contact_timeout_s); see that one trains and that the clocks of both machines "
                    "agree"
                )

    def _checkpoint_of_a_peer(self) -> Checkpoint | None:
        """Wait for the end of the epoch that the others are in, and return a checkpoint of then; None at the start."""
        others, times = self._others(), self._settings.averages_per_epoch
        reached = max((other.reached or 0 for other in others.values()), default=0)
        wanted = -(-reached // times)
        if reached % times:
            say(f"joining {len(others)} peers when their epoch {wanted} ends")
        if not wanted:
            return None
        for _ in _looks():
            others = self._others()
            if not others:
                raise UnavailableError("all peers left before this one could join; start again without --peers")
            if any((other.kept_epochs or 0) >= wanted for other in others.values()):
                break
        for waited in _looks():
            found = self._download()
            if found is not None and found.epochs_done >= wanted:
                return found
            if waited > self._contact_timeout_s:
                raise UnavailableError(
                    "no peer handed over its checkpoint; at least one has to listen where others reach it "
                    "(trainers.workers.peers.listen)"
                )
        return None

    def _download(self) -> Checkpoint | None:
        content = self._swarm.download()
        if not content:
            return None
        if len(content) > self._most_bytes:
            raise IntegrityError(f"a peer's checkpoint has {len(content):,} bytes and this network's at most "
                                 f"{self._most_bytes:,}")  # fmt: skip
        path = self._folder / "received.pt"
        path.write_bytes(content)
        try:
            return rebased(load_checkpoint(path), self._identity)
        finally:
            path.unlink()

    def _state(self) -> bytes:
        path = self._folder / CHECKPOINT_FILE
        return path.read_bytes() if path.is_file() else b""

    def _publish(self, **changes: object) -> None:
        # Also by the thread of the record, so that no change is lost.
        with self._lock:
            self._standing = self._standing.model_copy(update=changes)
            self._swarm.publish(self._standing.model_dump_json())

    def _publish_periodically(self) -> None:
        while not self._over.wait(BEAT_S):
            self._publish()

    def _tell_address(self) -> None:
        addresses = self._swarm.addresses
        if addresses:
            (self._folder / ADDRESS_FILE).write_text("\n".join(addresses) + "\n")
            say(f"other peers join with --strategy hivemind --peers {addresses[0]}")


def _looks() -> Iterator[float]:
    """Yield the time since the start, seconds, at once and then after pauses that become longer; without end."""
    began, pause = time.monotonic(), LOOK_S
    while True:
        yield time.monotonic() - began
        time.sleep(pause)
        pause = min(1.3 * pause, MOST_LOOK_S)


def averagings_by(epoch: int, step: int, steps: int, times: int) -> int:
    """Count the averagings that are due after a step.

    Args:
        epoch: done before the one under way.
        step: of it, from 1 to `steps`.
        steps: of an epoch.
        times: averagings per epoch; with more than there are steps, each step has one, and numbers are left out.
    Returns:
        Those of all epochs so far; `times` more after each.
    """
    return epoch * times + step * times // steps


def _facts(job: Job, identity: Identity, dataset_id: str) -> Facts:
    peers = job.settings.workers.peers
    return Facts(
        relook=version("relook"),
        recipe=flat_values(job.settings.model_dump(mode="json", exclude=set(NO_RECIPE))),
        policy_hash=identity.policy_hash,
        taxonomy_hash=identity.taxonomy_hash,
        start_hash=identity.start_hash,
        teacher_id=identity.teacher_id,
        averages_per_epoch=peers.averages_per_epoch,
        dataset_id=dataset_id,
        part=peers.part,
    )


def _network_of(job: Job) -> nn.Module:
    chosen = job.settings.model
    with torch.random.fork_rng(devices=[]):
        network = build_model(chosen.name, len(job.taxonomy.codes), **chosen.options)
    freeze(network, job.settings.optimizer.trainable_blocks)
    return network


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _fp32(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to("cpu", torch.float32)
