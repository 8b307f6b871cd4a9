"""The settings of the tuning room: what is searched, with which budget, on which resources."""

from enum import StrEnum
from typing import Literal

from pydantic import Field, model_validator

from records.settings import RoomSettings


class Axis(StrEnum):
    """A choice of the trainers that a search can vary, together with what that choice makes tunable."""

    OPTIMIZER = "optimizer"
    SCHEDULER = "scheduler"
    AUGMENTATION = "augmentation"
    MODEL = "model"
    LOSS = "loss"
    SAMPLER = "sampler"

    @property
    def setting(self) -> str:
        """The field of TrainersSettings that names the choice, dotted: `optimizer.name`, but plain `sampler`."""
        return self.value if self in (Axis.AUGMENTATION, Axis.SAMPLER) else f"{self.value}.name"


class Searcher(StrEnum):
    """Who proposes what to try next."""

    RANDOM = "random"
    TPE = "tpe"
    PBT = "pbt"


class Scheduler(StrEnum):
    """Who ends trials early."""

    ASHA = "asha"
    MEDIAN = "median"
    NONE = "none"


class TuningSettings(RoomSettings):
    """How a search is done."""

    trials: int = Field(
        default=12, ge=1, le=10_000, description="configurations tried, the defaults and earlier winners included"
    )
    trial_epochs: int = Field(
        default=6,
        ge=1,
        le=1000,
        description="epochs of a trial that is not cut off; a longer training is shortened to them, schedule included",
    )
    searcher: Searcher = Field(
        default=Searcher.RANDOM,
        description="who proposes: random (balanced over the choices), tpe (Optuna, learns from the trials before), "
        "or pbt (a population that trains side by side: the worst go on with the weights of the best, and with "
        "their learning rate and strengths of augmentation, changed a little; none is ended early)",
    )
    scheduler: Scheduler = Field(
        default=Scheduler.ASHA, description="who ends trials early: asha (successive halving), median, none"
    )
    space: tuple[str, ...] = Field(
        default=(),
        description="narrows or widens the space: `name=a,b`, `name=low..high`, `record.name=...`, or YAML files",
    )
    startup_trials: int = Field(
        default=10, ge=0, le=10_000, description="for tpe: balanced random trials before it proposes any"
    )
    generation_epochs: int = Field(
        default=2, ge=1, le=1000, description="for pbt: epochs that every trial trains in one generation"
    )
    block_trials: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="so many balanced trials are never cut off, to measure effects at the whole budget",
    )
    confirm_seeds: int = Field(
        default=3,
        ge=0,
        le=100,
        description="fresh seeds that winner and given settings are trained with before one is called the winner",
    )
    max_failures: int = Field(
        default=2, ge=0, le=1000, description="deaths of its process or node that a trial survives within one search"
    )
    grace_epochs: int = Field(default=1, ge=1, le=1000, description="epochs before a trial may be cut off")
    reduction_factor: int = Field(
        default=3, ge=2, le=16, description="at each rung the best 1/factor go on; rungs are grace_epochs * factor^k"
    )
    cpus_per_trial: int = Field(
        default=1, ge=1, le=1024, description="CPUs of a trial; it computes with as many threads"
    )
    gpus_per_trial: float = Field(
        default=0.0,
        ge=0,
        le=64,
        allow_inf_nan=False,
        description="GPUs of a trial (of each of its workers); 0.25 lets four share one",
    )
    workers_per_trial: int = Field(
        default=1, ge=1, le=1024, description="workers of a trial; more than one train together under Ray Train"
    )
    max_concurrent: int | None = Field(
        default=None, ge=1, le=10_000, description="trials at a time at most; default: as many as the resources allow"
    )
    niceness: int = Field(
        default=0, ge=0, le=19, description="priority that trials give up, so that a service on the machine stays quick"
    )
    seed: int = Field(default=0, ge=0, description="of the sampled configurations and of the training subset")
    search: tuple[Axis, ...] = Field(
        default=(Axis.OPTIMIZER, Axis.SCHEDULER, Axis.AUGMENTATION),
        min_length=1,
        description="what is varied: optimizer, scheduler, augmentation, model, loss, sampler",
    )
    experiments: Literal["none", "dissertation", "dissertation_mini"] = Field(
        default="none",
        description="rows to try right after the given settings; the presets of these names set what they need",
    )
    leak: Literal["none", "random_images", "oversampled_first"] = Field(
        default="none",
        description="a mistake made on purpose, to show what it pretends: trials are judged on images that were cut "
        "off at random, or after oversampling, so that their lesions are trained on; none for every real search",
    )
    max_train_images: int | None = Field(
        default=None,
        ge=1,
        description="train trials on at most this many images (whole groups, classes in proportion); default: all",
    )

    @model_validator(mode="after")
    def _fit_together(self) -> "TuningSettings":
        if self.grace_epochs > self.trial_epochs:
            raise ValueError(
                f"grace_epochs {self.grace_epochs} is more than trial_epochs {self.trial_epochs}; "
                "a trial would never reach its first rung"
            )
        if self.workers_per_trial > 1 and self.gpus_per_trial not in (0, 1):
            raise ValueError(
                f"gpus_per_trial {self.gpus_per_trial:g} cannot be given to each of {self.workers_per_trial} workers; "
                "set it to 0 or 1"
            )
        if self.searcher is Searcher.PBT:
            self._require_population()
        if len(set(self.search)) != len(self.search):
            raise ValueError("search names something twice")
        return self

    def _require_population(self) -> None:
        if self.trials < 2:
            raise ValueError("searcher pbt needs a population; set trials to 2 or more")
        if self.generation_epochs >= self.trial_epochs:
            raise ValueError(
                f"generation_epochs {self.generation_epochs} leaves no generation within trial_epochs "
                f"{self.trial_epochs}; lower it"
            )
        if self.workers_per_trial > 1:
            raise ValueError("searcher pbt trains each trial in one process; set workers_per_trial to 1")
