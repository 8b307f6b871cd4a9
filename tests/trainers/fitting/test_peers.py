"""Peers on loopback, with hivemind's own processes: joining, averaging, refusals, and what a peer leaves behind.

Two peers in one process share nothing but the network; each has a folder of its own. Trainings by commands, one of
which joins late and one of which is killed, are `test_commands_that_are_peers`.
"""

import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from bench.drills import peers as drill
from records.datasets import DatasetVersion, build_version
from records.errors import ConfigError, RefusedError, UnavailableError
from records.frames import Frame
from records.store import Store
from trainers.augmentation import load_policy
from trainers.fitting.checkpoints import Checkpoint
from trainers.fitting.fit import fit
from trainers.fitting.job import Job, job_of
from trainers.fitting.loop import train
from trainers.fitting.standings import Facts, Standing, difference, read_standings, same_images
from trainers.fitting.training_data import TrainingData, identity_of, plan_data
from trainers.fitting.workers import SingleWorker
from trainers.settings import TrainersSettings

pytest.importorskip("hivemind")
from trainers.fitting.peers import PeerGroup, averagings_by

# hivemind's processes look up their daemon in a way that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")

SETTINGS = TrainersSettings().with_values(
    {
        "model.name": "custom_cnn_base", "model.side_px": 32, "model.dropout": 0.0, "batch_size": 8, "epochs": 2,
        "precision": "fp32", "augmentation": "none", "workers.strategy": "hivemind", "workers.use_gpu": False,
        "workers.threads": 1, "workers.contact_timeout_s": 60.0, "workers.peers.matchmaking_s": 0.5,
        "workers.peers.averages_per_epoch": 2,
    }
)  # fmt: skip
FACTS = Facts(
    relook="1.0", recipe={"epochs": 3, "batch_size": 8}, policy_hash="p", taxonomy_hash="t", start_hash="s",
    teacher_id=None, averages_per_epoch=4, dataset_id="d" * 64, part="1/1",
)  # fmt: skip
Made = Callable[..., PeerGroup]


@pytest.fixture(scope="module")
def dataset(filled_store: Store) -> DatasetVersion:
    return build_version(filled_store).version


@pytest.fixture
def made(filled_store: Store, dataset: DatasetVersion, tmp_path: Path) -> Iterator[Made]:
    """A function that starts a peer in a folder of its own, with other settings of `workers.peers` and others."""
    with ExitStack() as stack:

        def start(name: str, peers: dict[str, Any], **others: Any) -> PeerGroup:
            values = {f"workers.peers.{field}": value for field, value in peers.items()}
            job, data = prepared(filled_store, dataset, SETTINGS.with_values(values | others), tmp_path / name)
            identity = identity_of(job.settings, data, job.taxonomy, job.policy, job.initial_weights)
            return stack.enter_context(PeerGroup(job, identity, data, dataset.id))

        yield start


def prepared(
    store: Store, dataset: DatasetVersion, settings: TrainersSettings, folder: Path
) -> tuple[Job, TrainingData]:
    plan = plan_data(dataset, store.taxonomy).part(*settings.workers.peers.share)
    job = job_of(store, settings, plan, folder, load_policy(settings.augmentation))
    return job, plan.open(store, Frame(32))


def address_of(group: PeerGroup) -> str:
    assert group.kept_in is not None
    return (group.kept_in / "peer-address.txt").read_text().split()[0]


def filled_with(value: float) -> nn.Module:
    from vision.networks import build_model

    network = build_model("custom_cnn_base", 7, dropout=0.0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(value)
    return network


def step_together(networks: dict[PeerGroup, nn.Module]) -> None:
    """Let all peers come to the middle of the first epoch, each in a thread."""
    pairs = networks.items()
    threads = [threading.Thread(target=group.after_step, args=(network, 0, 2, 4)) for group, network in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)


def values_of(network: nn.Module) -> set[float]:
    return {round(float(value), 6) for parameter in network.parameters() for value in parameter.detach().unique()}


def test_the_weights_of_two_peers_are_averaged_by_their_images(made: Made, dataset: DatasetVersion) -> None:
    first = made("first", {"part": "1/2"})
    assert first.load() is None
    assert first.shared_pixels((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)) == ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    second = made("second", {"part": "2/2", "addresses": [address_of(first)]})
    assert second.load() is None
    # The first peer's scaling of pixels, whatever this one's images are like.
    assert second.shared_pixels((0.9, 0.9, 0.9), (0.1, 0.1, 0.1)) == ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    networks = {first: filled_with(0.0), second: filled_with(1.0)}
    for group, network in networks.items():
        group.after_step(network, 0, 1, 4)  # nothing is due after a quarter of an epoch
    assert [values_of(network) for network in networks.values()] == [{0.0}, {1.0}]
    threads = [
        threading.Thread(target=group.after_step, args=(network, 0, 2, 4)) for group, network in networks.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    images = [group._num_train for group in networks]
    expected = {round(images[1] / sum(images), 6)}
    assert [values_of(network) for network in networks.values()] == [expected, expected]
    assert [group.facts() for group in networks] == [{"averagings": 1, "most_peers": 2, "received_epochs": 0}] * 2


def test_a_peer_alone_goes_on_at_once(made: Made) -> None:
    first = made("first", {})
    first.load()
    first.shared_pixels((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    network = filled_with(2.0)
    first.after_step(network, 0, 2, 4)
    assert values_of(network) == {2.0}
    assert first.facts() == {"averagings": 0, "most_peers": 1, "received_epochs": 0}


def test_a_peer_that_waits_in_vain_says_so_and_goes_on(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    first = made("first", {"part": "1/2", "patience_s": 0.3})
    first.load()
    first.shared_pixels((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    second = made("second", {"part": "2/2", "addresses": [address_of(first)]})
    second.load()  # and takes no step
    network = filled_with(2.0)
    with caplog.at_level(logging.WARNING):
        first.after_step(network, 0, 2, 4)
    assert "1 peers were too slow for averaging 1; wait longer with trainers.workers.peers.patience_s" in caplog.text
    assert values_of(network) == {2.0}
    assert first.facts() == {"averagings": 0, "most_peers": 1, "received_epochs": 0}


def test_a_peer_that_stood_still_is_not_waited_for_and_ends(made: Made) -> None:
    first = made("first", {"part": "1/2"})
    first.load()
    first.shared_pixels((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    second = made("second", {"part": "2/2", "addresses": [address_of(first)]})
    second.load()
    first._publish(reached=5)  # as after two epochs and a half without the second one
    first.after_step(filled_with(1.0), 2, 4, 4)
    assert first.facts()["averagings"] == 0
    with pytest.raises(UnavailableError, match=r"more than an epoch ahead.* start it again with --resume and --peers"):
        second.after_step(filled_with(2.0), 0, 2, 4)


def test_weights_that_are_not_finite_are_not_taken(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    first = made("first", {"part": "1/2"})
    first.load()
    first.shared_pixels((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    second = made("second", {"part": "2/2", "addresses": [address_of(first)]})
    second.load()
    networks = {first: filled_with(3.0), second: filled_with(float("nan"))}
    with caplog.at_level(logging.WARNING):
        step_together(networks)
    assert values_of(networks[first]) == {3.0}
    assert "averaging 1: a peer's weights are not finite; this peer goes on with its own" in caplog.text


def test_a_peer_that_joins_later_gets_the_others_checkpoint(
    made: Made, filled_store: Store, dataset: DatasetVersion, tmp_path: Path
) -> None:
    settings = SETTINGS.with_values({"workers.peers.part": "1/2"})
    job, data = prepared(filled_store, dataset, settings, tmp_path / "first")
    group = SingleWorker(job.run_dir, use_gpu=False)
    train(job.settings, data, job.taxonomy, workers=group, policy=job.policy, pause_after=1)
    kept = group.load()
    assert kept is not None
    first = made("first", {"part": "1/2"})
    found = first.load()
    assert found is not None
    assert found.epochs_done == 1
    first.shared_pixels(found.mean, found.std)
    second = made("second", {"part": "2/2", "addresses": [address_of(first)]})
    received = second.load()
    assert isinstance(received, Checkpoint)
    assert received.reports == kept.reports
    assert all(torch.equal(received.network[name], kept.network[name]) for name in kept.network)
    assert (received.mean, received.std) == (kept.mean, kept.std)
    assert received.identity.data_hash != kept.identity.data_hash
    assert not (tmp_path / "second" / "received.pt").exists()
    assert (first.facts()["received_epochs"], second.facts()["received_epochs"]) == (0, 1)
    # Its own folder can go on from there, and so does its own training.
    own = SETTINGS.with_values({"workers.peers.part": "2/2"})
    job, data = prepared(filled_store, dataset, own, tmp_path / "second")
    SingleWorker(job.run_dir, use_gpu=False).save(received)
    model = train(job.settings, data, job.taxonomy, workers=SingleWorker(job.run_dir, False), policy=job.policy)
    assert [report.epoch for report in model.reports] == [1, 2]


def test_a_training_that_the_peers_have_finished_is_not_joined(
    made: Made, filled_store: Store, dataset: DatasetVersion, tmp_path: Path
) -> None:
    settings = SETTINGS.with_values({"workers.peers.part": "1/2"})
    job, data = prepared(filled_store, dataset, settings, tmp_path / "first")
    train(job.settings, data, job.taxonomy, workers=SingleWorker(job.run_dir, False), policy=job.policy)
    first = made("first", {"part": "1/2"})
    first.load()
    second = made("second", {"part": "2/2", "addresses": [address_of(first)]})
    with pytest.raises(RefusedError, match="have finished this training; start from one of their models"):
        second.load()


def test_peers_that_train_something_else_are_refused(made: Made) -> None:
    first = made("first", {"part": "1/2"})
    address = address_of(first)
    for other, name, reason in (
        ({"part": "2/2"}, "settings", r"trainers\.batch_size 8 \(here 16\); peers train the same"),
        ({"part": "2/3"}, "parts", "trains on part 1/2, and this one on part 2/3; both have to count the same parts"),
        ({"part": "2/2", "averages_per_epoch": 3}, "times", "averages 2 times per epoch, and this one 3"),
    ):
        changed = {"batch_size": 16} if name == "settings" else {}
        with pytest.raises(RefusedError, match=reason):
            made(name, {**other, "addresses": [address]}, **changed)
    assert len(first._others()) == 0


def test_no_peer_at_an_address_is_one_sentence(made: Made) -> None:
    first = made("first", {"group": "skin"})
    address = address_of(first)
    with pytest.raises(UnavailableError, match="no peer of group 'relook' was found within 2 s"):
        made("second", {"addresses": [address]}, **{"workers.contact_timeout_s": 2.0})
    first.__exit__(None, None, None)
    with pytest.raises(UnavailableError, match=r"cannot be used .*; see that the other peer runs, that its port is"):
        made("third", {"addresses": [address]})


def test_a_peer_keeps_the_handling_of_ctrl_c_and_leaves_no_process(made: Made) -> None:
    before, children = signal.getsignal(signal.SIGINT), set(psutil.Process().children(recursive=True))
    group = made("first", {})
    assert signal.getsignal(signal.SIGINT) is before
    own = set(psutil.Process().children(recursive=True)) - children
    assert {"p2pd"} < {process.name() for process in own}
    group.__exit__(None, None, None)
    _, alive = psutil.wait_procs(own, timeout=20)
    assert [process.name() for process in alive if process.is_running() and process.status() != "zombie"] == []


def test_only_the_main_thread_can_be_a_peer(made: Made) -> None:
    raised: list[Exception] = []

    def start() -> None:
        try:
            made("first", {})
        except ConfigError as error:
            raised.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join(60)
    assert "in a process's main thread only" in str(raised[0])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hivemind", None)
    monkeypatch.delitem(sys.modules, "trainers.fitting.swarm")
    with pytest.raises(ConfigError, match=r"hivemind.*pip install 'relook\[hivemind\]' brings it"):
        import trainers.fitting.swarm  # noqa: F401


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dataset_id": "e" * 64}, None),
        ({"relook": "1.1"}, "runs Relook 1.1, and this one 1.0"),
        ({"taxonomy_hash": "u"}, "has another taxonomy"),
        ({"recipe": {"epochs": 4, "batch_size": 8}}, "has trainers.epochs 4 (here 3)"),
        ({"recipe": {"epochs": 3}}, "has trainers.batch_size None (here 8)"),
        ({"policy_hash": "q"}, "has another augmentation policy"),
        ({"start_hash": "r"}, "has other weights to start from"),
        ({"teacher_id": "v"}, "has another teacher"),
        ({"averages_per_epoch": 5}, "averages 5 times per epoch, and this one 4 (trainers.workers.peers."),
        ({"part": "1/2"}, "trains on part 1/2, and this one on part 1/1"),
    ],
)
def test_what_differs_between_peers_is_named(change: dict[str, Any], reason: str | None) -> None:
    found = difference(FACTS, FACTS.model_copy(update=change))
    assert found == reason or (reason is not None and found is not None and found.startswith(reason))


def test_parts_are_of_one_version_and_no_two_peers_have_the_same() -> None:
    parts = [FACTS.model_copy(update={"part": part}) for part in ("1/2", "2/2")]
    assert difference(*parts) is None
    assert not same_images(*parts)
    assert same_images(parts[0], parts[0])
    other = parts[1].model_copy(update={"dataset_id": "e" * 64})
    assert difference(parts[0], other) == (
        "trains on a part of dataset eeeeeeeeeeee, and this one of dddddddddddd; parts are of one version that all "
        "peers hold"
    )


def test_what_is_no_standing_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    good = Standing(facts=FACTS, reached=3).model_dump_json()
    document = json.loads(good)
    bad = {
        "text": "hello",
        "long": json.dumps({**document, "facts": {**document["facts"], "recipe": {"a": "b" * 70_000}}}),
        "negative": json.dumps({**document, "reached": -1}),
        "more": json.dumps({**document, "run": "this"}),
        "nan": json.dumps({**document, "pixels": [[float("nan")] * 3, [1.0] * 3]}),
    }
    unreadable: set[str] = set()
    for _ in range(2):  # said once
        assert set(read_standings({"good": good, **bad}, unreadable)) == {"good"}
    assert unreadable == set(bad)
    assert caplog.text.count("published what is no standing") == len(bad)


@pytest.mark.parametrize("steps", [1, 3, 7, 64])
@pytest.mark.parametrize("times", [1, 2, 4, 100])
def test_an_epoch_has_so_many_averagings_and_ends_with_one(steps: int, times: int) -> None:
    due = [averagings_by(epoch, step, steps, times) for epoch in (0, 1) for step in range(1, steps + 1)]
    assert due == sorted(due)
    assert len(np.unique([number for number in due if number])) == 2 * min(steps, times)
    assert due[steps - 1] == times
    assert due[-1] == 2 * times


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"workers.peers.addresses": ["10.0.0.7:4001"]}, "is no address of a peer; one is printed when a peer starts"),
        ({"workers.peers.addresses": ["/ip4/10.0.0.7/tcp/4001"]}, "is no address of a peer"),
        ({"workers.peers.listen": "0.0.0.0"}, "is no address to listen on"),
        ({"workers.peers.part": "3/2"}, "is no part; the second of three is 2/3"),
        ({"workers.peers.part": "0/2"}, "is no part"),
        ({"workers.peers.group": "a.b"}, "should match pattern"),
        ({"workers.count": 2}, "strategy 'hivemind' is one process and count is 2"),
        ({"workers.data_source": "stream"}, "strategy 'hivemind' knows no data_source 'stream'"),
        ({"refit": True}, "each peer's val may choose others"),
    ],
)
def test_settings_that_no_peer_can_have(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SETTINGS.with_values(values)


def test_peers_without_the_strategy_are_refused(filled_store: Store, dataset: DatasetVersion, tmp_path: Path) -> None:
    settings = SETTINGS.with_values({"workers.strategy": "single", "workers.peers.part": "1/2"})
    with pytest.raises(ConfigError, match="strategy 'single' knows no peers; take --strategy hivemind"):
        fit(filled_store, settings, dataset, run_dir=tmp_path, use_ray=False)


@pytest.mark.long
def test_commands_that_are_peers(tmp_path: Path) -> None:
    """One joins late and one is killed: those that finish have the same weights, and none leaves a process."""
    images = drill.generated(tmp_path / "images", lesions=120)
    homes = [drill.prepared(tmp_path / f"home{number}", images) for number in range(3)]
    result = drill.three_peers(homes, drill.Plan(9, peers=["matchmaking_s=1"]), alone=[2.0] * 9)
    assert result["joined_after_epochs"] >= 1
    assert result["killed_after_epochs"] >= 2
    losses = [peer["val_loss"] for peer in result["peers"]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    bundles = [next(home.glob("bundles/*/weights.safetensors")) for home in (homes[0], homes[2])]
    from safetensors.numpy import load_file

    one, other = (load_file(path) for path in bundles)
    assert one.keys() == other.keys()
    assert max(float(np.abs(one[name] - other[name]).max()) for name in one) < 1e-4
    assert result["left_running"] == []
