"""How many trials run at a time and what each takes: arithmetic on what a Ray session offers.

In: settings, and the totals of a session. Out: numbers, or a refusal with the fix. It asks no Ray, so
every preset is tested without a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from records.errors import ConfigError
from tuning.settings import TuningSettings

DRIVER_CPUS = 0.01
"""What a trial that trains in a group takes for itself: it only passes messages on."""


@dataclass(frozen=True)
class TrialShape:
    """Resources of one trial: `own` of its process, `worker` of each worker of its group (empty without one)."""

    own: dict[str, float]
    worker: dict[str, float]
    workers: int

    @property
    def total(self) -> dict[str, float]:
        """Resources of a trial in all, without its message-passing share."""
        if self.workers == 1:
            return self.own
        return {name: amount * self.workers for name, amount in self.worker.items()}


def trial_shape(tuning: TuningSettings) -> TrialShape:
    """Return what one trial takes.

    Returns a fraction of a GPU, one GPU, or a group of workers with a message-passing process.
    """
    one = {"CPU": float(tuning.cpus_per_trial)} | ({"GPU": g} if (g := tuning.gpus_per_trial) else {})
    if tuning.workers_per_trial == 1:
        return TrialShape(one, {}, 1)
    return TrialShape({"CPU": DRIVER_CPUS}, one, tuning.workers_per_trial)


def trials_at_a_time(tuning: TuningSettings, offered: Mapping[str, float], cores: int | None) -> int:
    """Return how many trials fit at a time.

    Trials in groups have to be counted: their message-passing processes would start even where no
    group can, and wait for each other for good.

    Args:
        tuning: resources of a trial, and the largest number wanted.
        offered: CPUs and GPUs of the Ray session.
        cores: of the machine, if the session is this machine: it may hand out more CPUs than there are
            cores, for services that mostly wait, and trials never wait. None on a cluster.
    Returns:
        At least 1.
    Raises:
        ConfigError: not one trial fits (names the setting, what there is, and what would fit).
    """
    shape = trial_shape(tuning)
    for name, field in (("CPU", "cpus_per_trial"), ("GPU", "gpus_per_trial")):
        needed, there = shape.total.get(name, 0.0), offered.get(name, 0.0)
        if needed > there:
            of = f"{shape.workers} workers with {needed / shape.workers:g} each" if shape.workers > 1 else f"{needed:g}"
            raise ConfigError(
                f"tuning.{field} is {of} but this Ray session has {there:g} {name}s; "
                f"set it to at most {there / shape.workers:g}"
            )
    # A trial of half a GPU cannot take a quarter from each of two, so fractions are counted per GPU.
    fits = [_fitting(shape, name, offered.get(name, 0.0)) for name in shape.total if shape.total[name]]
    if cores is not None:
        fits.append(max(1, int(cores // shape.total["CPU"])))
    if tuning.max_concurrent is not None:
        fits.append(tuning.max_concurrent)
    return max(1, min(fits))


def _fitting(shape: TrialShape, name: str, there: float) -> int:
    needed = shape.total[name]
    if name == "GPU" and needed < 1:
        return int(there) * int(1.0 / needed + 1e-9)
    return int(there / needed + 1e-9)
