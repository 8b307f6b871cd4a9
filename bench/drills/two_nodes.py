"""Kill a node of a two-node Ray cluster in the middle of a search and measure the cost.

    .venv/bin/python -m bench.drills.two_nodes

A head without CPUs and two raylets with one CPU each, on loopback, share the trials of a real search on generated
images. After some epochs of both trials, one raylet is killed with all its processes (kill -9). The same search runs
again without a kill. Scores and winner must be equal, only the dead node's trial may start twice, and its checkpoint
may never go back. Prints one JSON line; the exit code is 1 if something is wrong.
"""

import argparse
import json
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil

from bench.drills.nodes import prepare_ray

NODE_CPUS = 1
KILL_AFTER_EPOCHS = 2
TRIAL_FOLDER = re.compile(r"trial-(\d{4})-")


def trials_of(raylet: int) -> dict[int, int]:
    """Return the trials that run beneath a raylet, to their processes: Tune gives each trial a folder to work in."""
    found = {}
    for process in psutil.Process(raylet).children(recursive=True):
        with suppress(psutil.Error):
            if trial := TRIAL_FOLDER.search(process.cwd()):
                found[int(trial[1])] = process.pid
    return found


class Killer(threading.Thread):
    """Kills a node once every node has a trial that is far enough; watches the checkpoints before and after."""

    def __init__(self, run_dir: Path, raylets: dict[str, int]) -> None:
        super().__init__(daemon=True)
        self._run_dir, self._raylets = run_dir, raylets
        self._over = threading.Event()
        self.seen: dict[int, list[int]] = {}
        self.before: dict[str, dict[int, int]] = {}
        self.victim: str | None = None
        self.killed_at = 0.0
        self.reached: dict[int, int] = {}

    def run(self) -> None:
        """Poll until the search is over."""
        while not self._over.wait(0.05):
            for folder in (self._run_dir / "trials").glob("*"):
                self._look_at(folder)
            if self.victim is None:
                self._kill_if_ready()

    def stop(self) -> None:
        """End the watch."""
        self._over.set()
        self.join()

    def _look_at(self, folder: Path) -> None:
        from records.errors import IntegrityError
        from trainers.fitting.checkpoints import load_checkpoint

        try:
            done = load_checkpoint(folder / "checkpoint.pt").epochs_done
        except IntegrityError:
            return  # not there yet, or removed because the trial is over
        seen = self.seen.setdefault(int(folder.name), [])
        if not seen or seen[-1] != done:
            seen.append(done)

    def _kill_if_ready(self) -> None:
        placed = {name: trials_of(pid) for name, pid in self._raylets.items()}
        far = all(
            trials and all(max(self.seen.get(t, [0])) >= KILL_AFTER_EPOCHS for t in trials)
            for trials in placed.values()
        )
        if not far:
            return
        # Any node will do; the same one in every run keeps runs comparable.
        self.before, self.victim = placed, max(placed)
        raylet = psutil.Process(self._raylets[self.victim])
        # Workers first: those of a raylet that is gone end by themselves, which a power cut does not wait for.
        dying = [*raylet.children(recursive=True), raylet]
        for process in dying:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.killed_at = time.monotonic()
        for number in placed[self.victim]:
            self._look_at(self._run_dir / "trials" / f"{number:04d}")
            self.reached[number] = self.seen[number][-1]


def run_search(
    store: Any, dataset: Any, run_dir: Path, epochs: int, trials: int, raylets: dict[str, int]
) -> dict[str, Any]:
    """Search on the cluster; with raylets, one of them is killed on the way."""
    from trainers.settings import ModelSettings, TrainersSettings
    from tuning.search import search
    from tuning.settings import Axis, Scheduler, TuningSettings

    trainers = TrainersSettings(model=ModelSettings(side_px=64), epochs=epochs, augmentation="light", precision="fp32")
    tuning = TuningSettings(
        trials=trials, trial_epochs=epochs, scheduler=Scheduler.NONE, cpus_per_trial=NODE_CPUS, confirm_seeds=0,
        search=(Axis.OPTIMIZER, Axis.SCHEDULER), max_failures=2,
    )  # fmt: skip
    killer = Killer(run_dir, raylets)
    events: list[tuple[float, str, int]] = []
    if raylets:
        killer.start()
    started = time.monotonic()
    try:
        result = search(
            store, tuning, trainers, dataset, run_dir=run_dir,
            on_event=lambda event: events.append((time.monotonic(), event.kind.value, event.trial.number)),
        )  # fmt: skip
    finally:
        if raylets:
            killer.stop()
    return {"result": result, "events": events, "killer": killer, "seconds": time.monotonic() - started}


def compare(killed: dict[str, Any], whole: dict[str, Any], epochs: int) -> dict[str, Any]:
    """Report the cost of the kill and the failed conditions."""
    killer, wrong = killed["killer"], []
    if killer.victim is None:
        return {
            "wrong": ["no node was killed: the search was over before both nodes were far enough; give more --epochs"]
        }
    dead = killer.before[killer.victim]
    starts = Counter(number for _, kind, number in killed["events"] if kind == "started")
    if twice := sorted(number for number, times in starts.items() if times > 1 and number not in dead):
        wrong.append(f"trials of the node that lives were started again: {twice}")
    for number in dead:
        if starts[number] != 2:
            wrong.append(f"trial {number} of the dead node was started {starts[number]} times, not twice")
        if killer.seen[number] != sorted(killer.seen[number]):
            wrong.append(f"the checkpoint of trial {number} went back: {killer.seen[number]}")
    scores = [[(t.number, t.scores) for t in found["result"].trials] for found in (killed, whole)]
    if scores[0] != scores[1]:
        wrong.append(f"other scores than the search that nobody killed: {scores}")
    if killed["result"].best.number != whole["result"].best.number:
        wrong.append("another winner")
    again = [
        at for at, kind, number in killed["events"] if kind == "started" and number in dead and at > killer.killed_at
    ]
    return {
        "trials_by_node_at_the_kill": {name: sorted(trials) for name, trials in killer.before.items()},
        "killed_node": killer.victim,
        "epochs_in_the_checkpoint_at_the_kill": killer.reached,
        "started_again_after_s": [round(at - killer.killed_at, 1) for at in again],
        "trials": len(killed["result"].trials), "epochs_each": epochs,
        "winner": killed["result"].best.number, "score": killed["result"].best.score,
        "seconds_with_kill": round(killed["seconds"], 1), "seconds_without": round(whole["seconds"], 1),
        "wrong": wrong,
    }  # fmt: skip


def both_searches(folder: Path, ray_folder: Path, lesions: int, epochs: int, trials: int) -> list[dict[str, Any]]:
    """Run the search that loses a node, then the one that does not, on what is left of the cluster."""
    import ray
    from ray.cluster_utils import Cluster

    from images.importer import open_dataset
    from images.synth import synthesize
    from records.settings import RecordsSettings
    from records.store import open_store

    synthesize(folder / "images", lesions=lesions, seed=1)
    with closing(open_store(RecordsSettings(home=folder / "home"))) as store:
        dataset = open_dataset(store, str(folder / "images"))
        common: dict[str, Any] = {"node_ip_address": "127.0.0.1", "temp_dir": str(ray_folder)}
        # Any: half of the methods of Ray's test cluster have no annotations.
        cluster: Any = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False} | common
        )
        try:
            nodes = {name: cluster.add_node(num_cpus=NODE_CPUS, **common) for name in ("a", "b")}
            raylets = {name: node.all_processes["raylet"][0].process.pid for name, node in nodes.items()}
            ray.init(address=cluster.address, log_to_driver=False)
            cluster.wait_for_nodes()
            runs = store.home.runs
            return [
                run_search(store, dataset, runs / "tune-killed", epochs, trials, raylets),
                run_search(store, dataset, runs / "tune-whole", epochs, trials, {}),
            ]
        finally:
            ray.shutdown()
            cluster.shutdown()


def main() -> int:
    """Run both searches; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lesions", type=int, default=350, help="generated lesions")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="relook-nodes-") as folder,
        tempfile.TemporaryDirectory(prefix="rn", ignore_cleanup_errors=True) as ray_folder,
    ):
        prepare_ray(Path(ray_folder))
        size = (arguments.lesions, arguments.epochs, arguments.trials)
        killed, whole = both_searches(Path(folder), Path(ray_folder), *size)
    found = compare(killed, whole, arguments.epochs)
    print(json.dumps(found), flush=True)
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
