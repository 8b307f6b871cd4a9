"""What a search records and returns: plans, results, events; and the budget of a trial.

A `TrialPlan` is a configuration to try, a `TrialResult` what came of it, a `SearchEvent` what a live display gets, and
a `SearchResult` what the search returns. Scores are validation balanced accuracies in [0, 1], larger is better.

Every trial trains for the same number of epochs, and every duration of its learning-rate schedule is shortened by the
same factor: a schedule that cuts the rate at half time does so in the trial as well, so trials that meet at a rung are
at the same point of their schedules. The winner is trained with its own, unshortened durations.
"""

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from trainers.augmentation.policy import scaled_start
from trainers.settings import TrainersSettings


class Origin(StrEnum):
    """Where a configuration came from."""

    DEFAULTS = "defaults"
    ENQUEUED = "enqueued"
    SAMPLED = "sampled"
    SUGGESTED = "suggested"
    CONFIRMATION = "confirmation"


class TrialState(StrEnum):
    """How a trial stands.

    FINISHED: all its epochs. STOPPED: cut off, others were better at the same rung. FAILED: its own
    code raised. LOST: its process or node died; it runs again when the search goes on.
    """

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    LOST = "lost"


GOOD_STATES = frozenset({TrialState.FINISHED, TrialState.STOPPED})
"""States in which a trial can be the winner."""


class _Shape(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GenerationStep(_Shape):
    """What a member of a population continues with after a generation; decided once, journalled before it is used."""

    number: int = Field(ge=0, description="of the trial, a member of the population")
    epoch: int = Field(ge=1, description="epochs that every member has done")
    score: float = Field(description="of that epoch, by which members are compared")
    parent: int = Field(ge=0, description="the trial whose weights it continues with; most continue with their own")
    parent_overrides: dict[str, Any] = Field(description="that these weights were trained with")
    overrides: dict[str, Any] = Field(description="that it continues with; the same as the parent's up to this epoch")

    @property
    def exploits(self) -> bool:
        """Whether it takes over another trial's weights."""
        return self.parent != self.number


class TrialPlan(_Shape):
    """A configuration that shall be tried."""

    number: int = Field(ge=0, description="0 is always the given settings themselves")
    origin: Origin
    overrides: dict[str, Any] = Field(
        description="dotted names of fields of TrainersSettings, to values that differ from the given ones"
    )
    until_epoch: int | None = Field(default=None, description="in a population: where it waits for its next generation")
    generation_step: GenerationStep | None = Field(default=None, description="in a population: its last generation")


class Decision(_Shape):
    """What was decided after an epoch of a trial; kept before it takes effect, and made once."""

    number: int = Field(ge=0, description="of the trial")
    epoch: int = Field(ge=1)
    score: float
    rung: int | None = Field(description="epochs of the rung; empty between rungs")
    cutoff: float | None = Field(description="the score to reach there; empty if every score would have done")
    goes_on: bool = Field(description="false if the trial is cut off here")


class TrialFigures(_Shape):
    """Validation figures at the best epoch of a trial that had its whole budget; intervals resample groups, 95 %."""

    epoch: int = Field(ge=1, description="the best one, chosen on the same images")
    groups: int = Field(ge=1, description="lesions or patients that the intervals rest on")
    balanced_accuracy: float
    balanced_accuracy_ci: tuple[float, float]
    accuracy: float
    accuracy_ci: tuple[float, float]
    macro_f1: float
    macro_f1_ci: tuple[float, float]


class TrialResult(_Shape):
    """A configuration and what came of it."""

    number: int = Field(ge=0)
    origin: Origin
    overrides: dict[str, Any]
    state: TrialState
    scores: tuple[float, ...] = Field(default=(), description="validation balanced accuracy after each epoch")
    epoch_seconds: tuple[float, ...] = Field(default=(), description="training and validation of each epoch")
    key_class_sensitivity: float | None = Field(default=None, description="at the best epoch, argmax, on validation")
    figures: TrialFigures | None = Field(default=None, description="empty if the trial ended before its last epoch")
    seconds: float = Field(default=0.0, ge=0, description="from the start of the trial to its end")
    start_seconds: float | None = Field(
        default=None, ge=0, description="from the moment the trial was due to the start of its first epoch"
    )
    cold_start: bool | None = Field(default=None, description="whether a process had to be started for it")
    error: str | None = Field(default=None, description="why it failed, one sentence")
    error_kind: str | None = Field(default=None, description="class name of the error")

    @property
    def settled(self) -> bool:
        """Whether it need not run again."""
        return self.state not in (TrialState.RUNNING, TrialState.LOST)

    @property
    def epochs(self) -> int:
        """Epochs that were trained and scored."""
        return len(self.scores)

    @property
    def score(self) -> float | None:
        """The best epoch's score; None if there is none."""
        return max(self.scores, default=None)

    @property
    def confirms(self) -> bool:
        """Whether it only repeats a configuration with another seed."""
        return self.origin is Origin.CONFIRMATION


class SearchHeader(_Shape):
    """What a search is made of; a search goes on only if all but the number of trials is the same."""

    dataset_id: str
    base: dict[str, Any] = Field(description="the given TrainersSettings, by dotted names of fields")
    enqueued: tuple[dict[str, Any], ...] = Field(default=(), description="overrides to try right after the given ones")
    experiments: str = Field(default="none", description="rows of a dissertation that were tried first")
    leak: str = Field(default="none", description="the mistake that was made on purpose, see trainers.fitting.pretend")
    seed: int = Field(ge=0)
    search: tuple[str, ...]
    space_hash: str = Field(description="of the registries' names and ranges that configurations are drawn from")
    searcher: str = Field(default="random", description="who proposed what to try")
    scheduler: str = Field(default="asha", description="who ended trials early")
    startup_trials: int = Field(default=0, ge=0, description="balanced trials before the searcher proposed any")
    block_trials: int = Field(default=0, ge=0, description="balanced trials that were never cut off")
    generation_epochs: int = Field(default=0, ge=0, description="epochs of a generation of a population; 0 without one")
    confirm_seeds: int = Field(default=0, ge=0, description="fresh seeds that confirm the winner")
    axes: dict[str, tuple[str, ...]] = Field(default_factory=dict, description="axis to what it may be")
    trials: int = Field(ge=1)
    trial_epochs: int = Field(ge=1, description="the budget of one trial; never more than the full training has")
    grace_epochs: int = Field(ge=1)
    reduction_factor: int = Field(ge=2)
    train_images: int = Field(ge=1, description="images that each trial trains on")
    train_images_available: int = Field(ge=1, description="images on the train split")
    val_images: int = Field(ge=1)


class EventKind(StrEnum):
    """What happened to a trial."""

    KEPT = "kept"
    STARTED = "started"
    EPOCH = "epoch"
    EXPLOITED = "exploited"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    LOST = "lost"


class SearchEvent(_Shape):
    """One thing that happened, with how the whole search stands after it."""

    kind: EventKind
    trial: TrialResult
    best: TrialResult | None = Field(description="best so far among the trials that did not fail")
    trials_done: int = Field(ge=0)
    trials_total: int = Field(ge=1)
    epochs_done: int = Field(ge=0, description="in all trials so far")
    epochs_budget: int = Field(ge=1, description="if no trial were cut off")
    seconds: float = Field(ge=0, description="since the search started or went on")


class Confirmation(_Shape):
    """Scores of one configuration with fresh seeds, which had no part in choosing it."""

    number: int = Field(ge=0, description="of the trial whose configuration it is")
    scores: tuple[float, ...]
    mean: float
    low: float | None = Field(description="of the 95 % t-interval of the mean; empty with one seed")
    high: float | None


class Verdict(_Shape):
    """What the fresh seeds say."""

    winner: int = Field(ge=0, description="the trial that is called the winner")
    winner_confirmed: Confirmation
    given_confirmed: Confirmation
    difference: float = Field(description="of the leader to the given settings, mean over the same seeds")
    difference_low: float | None = Field(description="of its 95 % t-interval, paired by seed")
    difference_high: float | None
    words: str


class SearchResult(_Shape):
    """How a search ended."""

    header: SearchHeader
    trials: tuple[TrialResult, ...] = Field(description="in order of their number")
    best: TrialResult
    verdict: Verdict | None = Field(default=None, description="empty if nothing was confirmed")
    settings: TrainersSettings = Field(description="the given settings with the winner's overrides")
    seconds: float = Field(ge=0)


UNIT_SUFFIX = "_epochs"


def trial_budget(settings: TrainersSettings, trial_epochs: int) -> int:
    """Return the epochs of a trial: `trial_epochs`, but never more than the whole training has."""
    return min(trial_epochs, settings.epochs)


def shortened(settings: TrainersSettings, trial_epochs: int) -> TrainersSettings:
    """Shorten a training to the budget of a trial.

    Returns the same settings with `epochs` set to the budget and every other duration in epochs shortened by the
    same factor (whole ones to at least 1, zero stays zero). Early stopping is switched off: in a search only
    successive halving ends a trial.
    """
    epochs = trial_budget(settings, trial_epochs)
    factor = epochs / settings.epochs
    changes: dict[str, object] = {"epochs": epochs, "early_stop_patience_epochs": None}
    for name, value in settings.flat().items():
        if name == "scheduler.learning_rate_factors":
            changes[name] = tuple({scaled_start(start, factor): rate for start, rate in value}.items())
        # Durations are recognized by their unit: a new setting in epochs is shortened without being listed here.
        if not name.endswith(UNIT_SUFFIX) or name in changes or not value:
            continue
        # At least one epoch: rounding may make two schedules equal in a short trial, but must not switch one off.
        changes[name] = max(1, round(value * factor)) if isinstance(value, int) else value * factor
    return settings.with_values(changes)
