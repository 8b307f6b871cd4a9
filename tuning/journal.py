"""The journal of a search: one JSON line per event, on disk before the event takes effect (a write-ahead log).

`journal.jsonl` in the run's folder is the only record of a search; resuming and the report both read it. It holds
every decision of the scheduler as (trial, epoch, rung, score, goes on) and every generation of a population, each in
one line. Proposals of the searcher are a function of the trials. So a resumed search replays decisions and proposals
instead of making them again. A last line that a crash cut off is dropped; any other damage raises. It holds no weights.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError

from records.durable import append, make_folders, open_log
from records.errors import ConfigError, IntegrityError, RefusedError, UnavailableError, UnknownIdError
from records.ids import canonical_json
from trainers.settings import TrainersSettings
from tuning.settings import TuningSettings
from tuning.trials import Decision, GenerationStep, SearchHeader, TrialResult, TrialState

FILE_NAME = "journal.jsonl"
# A search may be extended by trials and seeds; any other change makes it another search.
MAY_CHANGE = {"trials", "confirm_seeds"}
_SETTING_OF = {"base": "trainers"} | {name: f"tuning.{name}" for name in TuningSettings.model_fields}


@dataclass(frozen=True)
class Past:
    """What a journal says."""

    header: SearchHeader
    trials: list[TrialResult]
    decisions: list[Decision]
    generations: list[GenerationStep]
    tuning: dict[str, Any] = field(default_factory=dict)
    """TuningSettings by name; empty in a journal that an older Relook wrote"""


class Journal:
    """An open journal, made by `open_journal`; a context manager that closes the file."""

    def __init__(
        self,
        file: FileIO,
        path: Path,
        past: Sequence[TrialResult] = (),
        decisions: Sequence[Decision] = (),
        generations: Sequence[GenerationStep] = (),
    ) -> None:
        self._file, self._path = file, path
        self.past = {trial.number: trial for trial in past}
        self.decisions = list(decisions)
        self.generations = list(generations)

    @property
    def settled(self) -> dict[int, TrialResult]:
        """Trials of the earlier run that need not run again, by number."""
        return {number: trial for number, trial in self.past.items() if trial.settled}

    def write(self, kind: str, **fields: Any) -> None:
        """Append one line and wait until it is on disk; UnavailableError if the disk is full."""
        # Flushed per line: a decision whose line is lost in a power cut would be made again, perhaps differently.
        append(self._file, self._path, (canonical_json({"kind": kind, **fields}) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_journal(run_dir: Path, header: SearchHeader, tuning: Mapping[str, Any] | None = None) -> Journal:
    """Start the journal of a search, or go on with it; `tuning` is what it is started or goes on with, for a resume.

    Returns the open journal, with the trials that need not run again.
    Raises RefusedError: the folder holds the journal of another search (names the difference).
    Raises IntegrityError: the journal is damaged.
    Raises ConfigError: the folder cannot be written.
    """
    path = run_dir / FILE_NAME
    past: Past | None = None
    if path.is_file():
        # Also before appending, or the next line would be glued to the torn one.
        _drop_torn_line(path)
    if path.is_file() and path.stat().st_size:
        past = read_past(run_dir)
        _require_same_search(past.header, header, run_dir)
    try:
        make_folders(run_dir)
        file = open_log(path)
    except UnavailableError as error:
        raise ConfigError(f"the search's folder {run_dir} cannot be used: {error}") from error
    begins = {"header": header.model_dump(mode="json"), "tuning": dict(tuning or {})}
    if past is None:
        journal = Journal(file, path)
        journal.write("search", **begins)
        return journal
    journal = Journal(file, path, [_concluded(trial, past) for trial in past.trials], past.decisions, past.generations)
    journal.write("search", **begins)
    # The end of a trial that the kill came too early to write.
    for before in past.trials:
        now = journal.past[before.number]
        if now != before:
            journal.write("ended", trial=now.model_dump(mode="json"))
    return journal


def read_journal(run_dir: Path) -> tuple[SearchHeader, list[TrialResult]]:
    """Read what a search has recorded so far.

    Returns the latest header, and every trial that was started, in order of number. A trial that was started twice
    is given as it went the last time.
    Raises UnknownIdError: there is no journal in the folder.
    Raises IntegrityError: the journal is damaged (names the line).
    """
    past = read_past(run_dir)
    return past.header, past.trials


def read_past(run_dir: Path) -> Past:
    """Read what a search has recorded so far, decisions included.

    Returns header, trials, decisions and generations.
    Raises UnknownIdError: there is no journal in the folder.
    Raises IntegrityError: the journal is damaged (names the line).
    """
    path = run_dir / FILE_NAME
    if not path.is_file():
        raise UnknownIdError(f"{run_dir} holds no search; `relook tune` starts one")
    header: SearchHeader | None = None
    tuning: dict[str, Any] = {}
    trials: dict[int, TrialResult] = {}
    decisions: list[Decision] = []
    generations: list[GenerationStep] = []
    for number, line in _lines(path):
        try:
            entry = json.loads(line)
            if entry["kind"] == "search":
                header, tuning = SearchHeader.model_validate(entry["header"]), dict(entry.get("tuning", {}))
                continue
            if entry["kind"] == "generation":
                generations += [GenerationStep.model_validate(step) for step in entry["steps"]]
                trials |= {int(trial["number"]): TrialResult.model_validate(trial) for trial in entry["trials"]}
                continue
            trial = TrialResult.model_validate(entry["trial"])
            trials[trial.number] = trial
            if "decision" in entry:
                decisions.append(Decision.model_validate(entry["decision"]))
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise IntegrityError(f"line {number} of {path} is damaged; start the search in a new folder") from error
    if header is None:
        raise UnknownIdError(f"{run_dir} holds no search; `relook tune` starts one")
    return Past(header, [trials[number] for number in sorted(trials)], decisions, generations, tuning)


def _concluded(trial: TrialResult, past: Past) -> TrialResult:
    """End a trial whose last decision was written down and whose end was not: the kill came between the two."""
    if trial.state is not TrialState.RUNNING:
        return trial
    if trial.epochs >= past.header.trial_epochs:
        return trial.model_copy(update={"state": TrialState.FINISHED})
    last = [decision for decision in past.decisions if decision.number == trial.number]
    if last and not last[-1].goes_on:
        return trial.model_copy(update={"state": TrialState.STOPPED})
    return trial


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        # A line without its newline was being written when the process died; it has taken no effect yet.
        if line.endswith("\n"):
            yield number, line


def _drop_torn_line(path: Path) -> None:
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    # After a power cut a part of the last line may read as zeros, which JSON never contains.
    last = whole.rfind(b"\n", 0, -1) + 1
    if b"\0" in whole[last:]:
        whole = whole[:last]
    if len(whole) != len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))


def _require_same_search(before: SearchHeader, now: SearchHeader, run_dir: Path) -> None:
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    # A setting that the journal does not name came to Relook after the search began, which ran as its default says.
    defaults = TrainersSettings().flat()
    old["base"] = {name: value for name, value in defaults.items() if name in new["base"]} | old["base"]
    for name in old:
        if name not in MAY_CHANGE and old[name] != new[name]:
            changed = _first_difference(_SETTING_OF.get(name, name), old[name], new[name])
            raise RefusedError(
                f"the search in {run_dir} was made with another {changed}; leave it out to go on, or start a new search"
            )


def _first_difference(name: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return f"{name}.{key} ({old.get(key)!r}, now {new.get(key)!r})"
    return f"{name} ({old!r}, now {new!r})"
