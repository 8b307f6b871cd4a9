"""The state of a running search: every event is journalled, counted and passed to a listener.

In: events of trials (started, epoch, ended). Out: journal lines, SearchEvents, and at the end the TrialResults. It
makes no decision and imports no Ray.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from tuning.journal import Journal
from tuning.trials import (
    GOOD_STATES,
    Decision,
    EventKind,
    GenerationStep,
    SearchEvent,
    SearchHeader,
    TrialFigures,
    TrialPlan,
    TrialResult,
    TrialState,
)

Listener = Callable[[SearchEvent], None]

_END_EVENTS = {
    TrialState.FINISHED: EventKind.FINISHED,
    TrialState.STOPPED: EventKind.STOPPED,
    TrialState.FAILED: EventKind.FAILED,
    TrialState.LOST: EventKind.LOST,
}


def best_of(trials: Iterable[TrialResult], *, running_too: bool = False) -> TrialResult | None:
    """Return the winner: the highest score of a trial that did not fail; among equals the first.

    Returns the winner, or None if no trial was scored.
    """
    states = GOOD_STATES | {TrialState.RUNNING} if running_too else GOOD_STATES
    scored = [trial for trial in trials if trial.scores and trial.state in states and not trial.confirms]
    return min(scored, key=lambda trial: (-max(trial.scores), trial.number)) if scored else None


class SearchLog:
    """State and journal of a running search.

    Args:
        header: what the search is made of.
        journal: open; its settled trials count as done from the start, and what an unsettled one had
            reached is kept.
        on_event: called with every event, in order, in the thread that runs the search.
    """

    def __init__(self, header: SearchHeader, journal: Journal, on_event: Listener | None = None) -> None:
        self._header = header
        self._journal = journal
        self._on_event = on_event
        self._trials: dict[int, TrialResult] = {
            number: trial for number, trial in journal.settled.items() if number < header.trials or trial.confirms
        }
        self._reached: dict[int, TrialResult] = {
            number: trial for number, trial in journal.past.items() if not trial.settled
        }
        self._cut_off = {decision.number for decision in journal.decisions if not decision.goes_on}
        self._started_at = time.time()
        self._trial_started_at: dict[int, float] = {}
        self._due_at: dict[int, float] = {}
        self._slot_free_at: deque[float] = deque()
        self._processes: set[str] = set()

    @property
    def trials(self) -> list[TrialResult]:
        """All trials that were started, in order of number."""
        return [self._trials[number] for number in sorted(self._trials)]

    @property
    def seconds(self) -> float:
        """Time since the search started or went on."""
        return time.time() - self._started_at

    def kept(self) -> None:
        """Send an event for each trial that an earlier run settled."""
        for trial in self.trials:
            self._tell(EventKind.KEPT, trial)

    def started(self, plan: TrialPlan) -> None:
        """Record that a trial got its resources; one that was begun before keeps the epochs that were decided on."""
        trial = TrialResult(number=plan.number, origin=plan.origin, overrides=plan.overrides, state=TrialState.RUNNING)
        before = self._trials.get(plan.number) or self._reached.get(plan.number)
        if before is not None:
            names = ["scores", "epoch_seconds", "key_class_sensitivity", *(["seconds"] if plan.generation_step else [])]
            trial = trial.model_copy(update={name: getattr(before, name) for name in names})
        self._trials[plan.number] = trial
        self._trial_started_at[plan.number] = time.time()
        # A trial was due when the one before it on its slot ended; the first ones when the search began.
        self._due_at[plan.number] = self._slot_free_at.popleft() if self._slot_free_at else self._started_at
        self._journal.write("started", trial=trial.model_dump(mode="json"))
        self._tell(EventKind.STARTED, trial)

    def began(self, number: int, at: float, process: str) -> None:
        """Note when and where the first epoch of a trial began; only the first call for a trial counts."""
        if self._trials[number].start_seconds is None:
            start_seconds = max(0.0, at - self._due_at.get(number, self._started_at))
            self._change(number, start_seconds=start_seconds, cold_start=process not in self._processes)
            self._processes.add(process)

    def epoch(
        self,
        decision: Decision,
        *,
        seconds: float,
        key_class_sensitivity: float | None,
        figures: TrialFigures | None = None,
    ) -> None:
        """Record an epoch and what was decided after it, before the decision takes effect.

        Args:
            decision: about the epoch; nothing happens if the trial has that epoch already.
            seconds: that the epoch took.
            key_class_sensitivity: on validation, or None if it is undefined.
            figures: of the whole trial, after its last epoch.
        """
        number = decision.number
        before = self._trials[number]
        # A restarted trial repeats epochs whose checkpoint was kept and whose report was lost, or reported twice.
        if decision.epoch <= before.epochs:
            return
        better = before.score is None or decision.score > before.score
        trial = self._change(
            number,
            scores=(*before.scores, decision.score),
            epoch_seconds=(*before.epoch_seconds, seconds),
            key_class_sensitivity=key_class_sensitivity if better else before.key_class_sensitivity,
            figures=figures,
        )
        if not decision.goes_on:
            self._cut_off.add(number)
        self._journal.write("epoch", trial=trial.model_dump(mode="json"), decision=decision.model_dump(mode="json"))
        self._tell(EventKind.EPOCH, trial)

    def generation(self, steps: Sequence[GenerationStep]) -> None:
        """Record what the members of a population continue with, before they do.

        All steps of a generation are one line of the journal, so that a crash leaves all of them or none. A member
        that takes over another's weights takes over its scores, too: its settings trained from the start give them.
        """
        before = {**self._reached, **self._trials}
        for step in steps:
            parent = before[step.parent]
            taken = {"scores": parent.scores, "key_class_sensitivity": parent.key_class_sensitivity}
            trial = before[step.number].model_copy(update={**taken, "overrides": step.overrides})
            self._trials[step.number] = trial
        trials = [self._trials[step.number].model_dump(mode="json") for step in steps]
        self._journal.write("generation", steps=[step.model_dump(mode="json") for step in steps], trials=trials)
        for step in steps:
            if step.exploits:
                self._tell(EventKind.EXPLOITED, self._trials[step.number])

    def waits(self, number: int) -> None:
        """Record that a member of a population has made room until its next generation, or is over if there is none."""
        trial = self._trials[number]
        if trial.epochs >= self._header.trial_epochs:
            self.ended(number)
        elif trial.state is TrialState.RUNNING:
            now = time.time()
            self._change(number, seconds=trial.seconds + now - self._trial_started_at[number])
            self._slot_free_at.append(now)

    def failed(self, number: int, *, kind: str, message: str, lost: bool) -> None:
        """Record that a trial failed."""
        self._end(number, TrialState.LOST if lost else TrialState.FAILED, error=message, error_kind=kind)

    def ended(self, number: int) -> None:
        """Record that a trial is over; nothing happens if its failure is recorded already."""
        trial = self._trials[number]
        if trial.state is TrialState.RUNNING:
            complete = trial.epochs >= self._header.trial_epochs or number not in self._cut_off
            self._end(number, TrialState.FINISHED if complete else TrialState.STOPPED)

    def _end(self, number: int, state: TrialState, error: str | None = None, error_kind: str | None = None) -> None:
        now = time.time()
        seconds = self._trials[number].seconds + now - self._trial_started_at.get(number, now)
        trial = self._change(number, state=state, seconds=seconds, error=error, error_kind=error_kind)
        self._slot_free_at.append(now)
        self._journal.write("ended", trial=trial.model_dump(mode="json"))
        self._tell(_END_EVENTS[state], trial)

    def _change(self, number: int, **changes: object) -> TrialResult:
        trial = self._trials[number].model_copy(update=changes)
        self._trials[number] = trial
        return trial

    def _tell(self, kind: EventKind, trial: TrialResult) -> None:
        if self._on_event is None:
            return
        searched = [trial for trial in self._trials.values() if not trial.confirms]
        self._on_event(
            SearchEvent(
                kind=kind,
                trial=trial,
                best=best_of(self._trials.values(), running_too=True),
                trials_done=sum(trial.state is not TrialState.RUNNING for trial in searched),
                trials_total=self._header.trials,
                epochs_done=sum(trial.epochs for trial in searched),
                epochs_budget=self._header.trials * self._header.trial_epochs,
                seconds=self.seconds,
            )
        )
