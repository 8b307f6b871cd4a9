"""Kill searches at random moments and compare their decisions with those of a search that is not killed.

    .venv/bin/python -m bench.drills.chaos_tune --rounds 3 --kills 3
    .venv/bin/python -m bench.drills.chaos_tune --rounds 3 --kills 3 --searcher pbt

Runs real Ray Tune in a process of its own, with a trial function whose scores come from a table. The driver, Ray's
head (GCS or raylet) or the trial processes are killed (SIGKILL); then the search resumes from its journal. With one
trial at a time, decisions and winner must equal those of the undisturbed search; with two, every journalled decision
must remain. The generations of a population must be equal in either case. Prints one JSON line per round with the
kills that took effect; a round with fewer kills than requested has failed.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

TRIALS, EPOCHS = {"tpe": 9, "pbt": 6}, 4
VICTIMS = ("driver", "head", "trials")


def search(folder: Path, searcher: str, seed: int, at_a_time: int, epoch_s: float) -> None:
    """Run or resume a search; this process is killed."""
    from cluster.session import start_ray
    from cluster.settings import Settings
    from trainers.settings import MACHINERY, TrainersSettings, flat_values
    from tuning.journal import open_journal
    from tuning.judge import Judge, rule_of
    from tuning.log import SearchLog
    from tuning.planner import Planner
    from tuning.population import Population
    from tuning.ray_search import run_trials
    from tuning.ray_search.run import Report
    from tuning.settings import Scheduler, Searcher, TuningSettings
    from tuning.space import derive_space
    from tuning.trials import SearchHeader, TrialPlan

    def train(plan: TrialPlan, data: Any, report: Report) -> None:
        # Imported here: Ray pickles this function by value and runs it in a process of its own.
        import random as chance
        import time as clock

        done = plan.generation_step.epoch if plan.generation_step else 0
        for epoch in range(done + 1, (plan.until_epoch or data["epochs"]) + 1):
            clock.sleep(data["epoch_s"])
            # A function of seed, trial and epoch: whoever runs it again, after whichever kill, scores the same.
            value = round(chance.Random(f"{data['seed']}:{plan.number}:{epoch}").uniform(0.2, 0.5) + 0.05 * epoch, 6)
            figures = {"epoch": epoch, "val_balanced_accuracy": value, "seconds": data["epoch_s"]}
            report({**figures, "key_class_sensitivity": None})

    base, population = TrainersSettings(), searcher == Searcher.PBT
    tuning = TuningSettings(
        trials=TRIALS[searcher], trial_epochs=EPOCHS, generation_epochs=1, reduction_factor=2,
        max_concurrent=at_a_time, searcher=Searcher(searcher),
    )  # fmt: skip
    header = SearchHeader(
        dataset_id="c" * 64, base=flat_values(base.model_dump(mode="json", exclude=set(MACHINERY))), seed=seed,
        search=("optimizer",), space_hash="0" * 64,
        trials=TRIALS[searcher], trial_epochs=EPOCHS, grace_epochs=1, reduction_factor=2, train_images=1,
        train_images_available=1, val_images=1, searcher=searcher,
        scheduler=Scheduler.NONE if population else Scheduler.ASHA, generation_epochs=1 if population else 0,
    )  # fmt: skip
    with open_journal(folder, header) as journal, start_ray(Settings()):
        log = SearchLog(header, journal)
        space = derive_space(tuning.search, base)
        planner = Planner(
            space, base, trials=header.trials, seed=seed, searcher=tuning.searcher, startup_trials=4,
            done=list(journal.past.values()),
        )  # fmt: skip
        judge = Judge(rule_of(header), EPOCHS, lambda number: number == 0, journal.decisions)
        plans: Iterable[TrialPlan | None]
        plans = (planner.plan(number, log.trials) for number in range(header.trials) if number not in journal.settled)
        if population:
            past = journal.generations
            plans = Population(header, planner, judge=judge, log=log, past=past, run_dir=folder).plans()
        data = {"seed": seed, "epochs": EPOCHS, "epoch_s": epoch_s}
        run_trials(plans, train, data, judge=judge, tuning=tuning, log=log, folder=folder)
    (folder / "done").touch()


def start(folder: Path, searcher: str, seed: int, at_a_time: int, epoch_s: float) -> subprocess.Popen[bytes]:
    """Start a search as the leader of a new process session."""
    command = [sys.executable, "-m", "bench.drills.chaos_tune", "--search", str(folder), "--seed", str(seed)]
    command += ["--searcher", searcher, "--at-a-time", str(at_a_time), "--epoch-s", str(epoch_s)]
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def kill(process: subprocess.Popen[bytes], victim: str) -> None:
    """Kill a part of a running search with -9; end what the death of driver or head left running, too."""
    # Listed before the kill: afterwards the children belong to init and are not found any more.
    family = psutil.Process(process.pid).children(recursive=True)
    if victim == "driver":
        os.kill(process.pid, signal.SIGKILL)
    for child in family:
        with contextlib.suppress(psutil.Error):
            line = " ".join(child.cmdline())
            is_head = "gcs_server" in line or "raylet/raylet" in line
            is_trial = line.startswith("ray::ImplicitFunc")  # Ray's own agents are named ray::, too
            if (victim == "head" and is_head) or (victim == "trials" and is_trial):
                child.kill()
    if victim == "trials":
        return  # the driver lives and starts them again
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in family:
        with contextlib.suppress(psutil.Error):
            child.kill()
    psutil.wait_procs(family, timeout=10)


def took_effect(process: subprocess.Popen[bytes], folder: Path, victim: str, starts: int) -> bool:
    """Return whether a kill ended the driver before its search was over, or made a trial start again."""
    if victim != "trials":
        return process.poll() is not None and not (folder / "done").exists()
    until(process, lambda: starts_again(folder) > starts)
    return starts_again(folder) > starts


def until(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> bool:
    """Wait for a condition while the search runs; return whether it came."""
    deadline = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def starts_again(folder: Path) -> int:
    """Return how many times the journal starts a trial that was started before."""
    text = (folder / "journal.jsonl").read_text(encoding="utf-8")
    # A kill may have cut off the last line, which then does not count.
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    started = [line["trial"]["number"] for line in lines if line["kind"] == "started"]
    return len(started) - len(set(started))


def decisions(folder: Path) -> list[tuple[int, int, float, int | None, bool]]:
    """Return (trial, epoch, score, rung, goes on) in the order in which they were journalled."""
    from tuning.journal import read_past

    if not (folder / "journal.jsonl").exists():
        return []
    return [(d.number, d.epoch, d.score, d.rung, d.goes_on) for d in read_past(folder).decisions]


def has_decided(folder: Path, count: int) -> bool:
    """Return whether so many decisions are in the journal."""
    return len(decisions(folder)) >= count


def generations(folder: Path) -> list[tuple[int, int, float, int, str]]:
    """Return (trial, epoch, score, parent, settings) of a population in the order in which they were journalled."""
    from tuning.journal import read_past

    steps = read_past(folder).generations
    return [(step.number, step.epoch, step.score, step.parent, json.dumps(step.overrides)) for step in steps]


def winner(folder: Path) -> tuple[int, float | None, dict[str, Any]] | None:
    """Return number, score and settings of the winner; None if no trial was scored."""
    from tuning.journal import read_past
    from tuning.log import best_of

    best = best_of(read_past(folder).trials)
    return (best.number, best.score, best.overrides) if best else None


def run_search(
    folder: Path, searcher: str, seed: int, at_a_time: int, victims: list[str], epoch_s: float
) -> tuple[int, list[str]]:
    """Run a search to its end, killing each victim a while after the next decisions.

    Returns how many kills took effect, and what went wrong.
    """
    folder.mkdir(parents=True)
    chance, took = random.Random(seed), 0
    wrong: list[str] = []
    process = start(folder, searcher, seed, at_a_time, epoch_s)
    for victim in victims:
        if not until(process, partial(has_decided, folder, len(decisions(folder)) + chance.randint(1, 4))):
            break
        time.sleep(chance.uniform(0, epoch_s))
        # Read before the kill: what the journal holds now may not change, whatever the kill cuts off.
        before, starts = decisions(folder), starts_again(folder)
        kill(process, victim)
        took += took_effect(process, folder, victim, starts)
        if process.poll() is not None and not (folder / "done").exists():
            process = start(folder, searcher, seed, at_a_time, epoch_s)
        if decisions(folder)[: len(before)] != before:
            wrong.append(f"decisions changed after the kill of {victim}")
    before = decisions(folder)
    process.wait(240)
    if decisions(folder)[: len(before)] != before:
        wrong.append("decisions changed after the last kill")
    keys = [(number, epoch) for number, epoch, *_ in decisions(folder)]
    if len(keys) != len(set(keys)):
        wrong.append("a decision was made twice")
    if took < len(victims):
        wrong.append(f"{took} of {len(victims)} kills took effect")
    if not (folder / "done").exists():
        wrong.append("the search did not come to its end; see log.txt")
    return took, wrong


def one_round(
    folder: Path, searcher: str, seed: int, at_a_time: int, victims: list[str], epoch_s: float
) -> dict[str, Any]:
    """Compare a search that is killed with one that is not."""
    took, wrong = run_search(folder / "killed", searcher, seed, at_a_time, victims, epoch_s)
    if at_a_time == 1 or searcher == "pbt":
        wrong += run_search(folder / "whole", searcher, seed, at_a_time, [], epoch_s)[1]
        # Sorted: with two trials of a population at a time, which of them reports first depends on the machine.
        if sorted(decisions(folder / "killed")) != sorted(decisions(folder / "whole")):
            wrong.append("other decisions than the search that nobody killed")
        if generations(folder / "killed") != generations(folder / "whole"):
            wrong.append("other generations than the search that nobody killed")
        if winner(folder / "killed") != winner(folder / "whole"):
            wrong.append("another winner than the search that nobody killed")
    best = winner(folder / "killed")
    return {"searcher": searcher, "seed": seed, "at_a_time": at_a_time, "victims": victims, "kills_asked": len(victims),
            "kills_took_effect": took, "winner": best and best[:2],
            "decisions": len(decisions(folder / "killed")), "generation_steps": len(generations(folder / "killed")),
            "wrong": wrong}  # fmt: skip


def main() -> int:
    """Run the rounds; exit with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--searcher", choices=tuple(TRIALS), default="tpe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-a-time", type=int, default=0, help="1 or 2; 0 runs both alternately")
    parser.add_argument("--epoch-s", type=float, default=0.3)
    parser.add_argument("--search", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.search:
        search(arguments.search, arguments.searcher, arguments.seed, arguments.at_a_time, arguments.epoch_s)
        return 0
    failed = False
    for number in range(arguments.rounds):
        seed = arguments.seed + number
        victims = [VICTIMS[(seed + kill) % 3] for kill in range(arguments.kills)]
        with tempfile.TemporaryDirectory(prefix="relook-chaos-") as folder:
            at_a_time = arguments.at_a_time or 1 + number % 2
            found = one_round(Path(folder), arguments.searcher, seed, at_a_time, victims, arguments.epoch_s)
        print(json.dumps(found), flush=True)
        failed = failed or bool(found["wrong"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
