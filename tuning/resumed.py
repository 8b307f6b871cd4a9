"""The settings with which a search goes on: those that it was started with, as its journal says.

`relook tune --resume` and `relook.tune(resume=True)` need no setting again. One that is given again has to be the same,
unless it only says how far the search goes and on what it runs.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from pydantic import ValidationError

from records.errors import ConfigError, RefusedError
from records.settings import first_problem
from trainers.settings import TrainersSettings
from tuning.journal import MAY_CHANGE, read_past
from tuning.settings import TuningSettings

_FREE = MAY_CHANGE | {
    "cpus_per_trial", "gpus_per_trial", "workers_per_trial", "max_concurrent", "max_failures", "niceness"
}  # fmt: skip


def resumed_settings(
    run_dir: Path, tuning: TuningSettings, trainers: TrainersSettings, given: Collection[str]
) -> tuple[TuningSettings, TrainersSettings]:
    """Return the settings with which a search goes on.

    Args:
        run_dir: its folder.
        tuning: settings of today.
        trainers: settings of today, which decide where the journal says nothing: on what machinery it trains.
        given: dotted names of settings that were given for this call, such as `tuning.trials`; they are kept.
    Returns:
        The settings that the journal names, in place of those of today.
    Raises:
        UnknownIdError: the folder holds no search.
        IntegrityError: the journal is damaged.
        RefusedError: a setting of the search is not valid any more, or not together with a given one.
    """
    past = read_past(run_dir)
    of_trainers = {name: value for name, value in past.header.base.items() if f"trainers.{name}" not in given}
    of_tuning = {name: value for name, value in past.tuning.items() if f"tuning.{name}" not in given}
    try:
        changed = TuningSettings.model_validate(tuning.model_dump(mode="json") | of_tuning)
        return changed, trainers.with_values(of_trainers)
    except ValidationError as error:
        field, reason = first_problem(error)
        raise RefusedError(f"the search in {run_dir} cannot go on: {field} of its settings: {reason}") from error


def require_unchanged(run_dir: Path, tuning: TuningSettings, trainers: TrainersSettings) -> None:
    """Refuse settings that would make another search, before data are opened and Ray starts.

    RefusedError names the first one that differs, and what it was.
    """
    past = read_past(run_dir)
    before = {f"trainers.{name}": value for name, value in past.header.base.items()}
    before |= {f"tuning.{name}": value for name, value in past.tuning.items() if name not in _FREE}
    now = {f"trainers.{name}": value for name, value in trainers.flat().items()}
    now |= {f"tuning.{name}": value for name, value in tuning.model_dump(mode="json").items()}
    for name, value in before.items():
        if name in now and now[name] != value:
            raise RefusedError(
                f"{name} {now[name]!r} contradicts the search in {run_dir}, which was started with {value!r}; leave it "
                "out to go on, or start a new search"
            )


def with_options(tuning: TuningSettings, changes: Mapping[str, object], space: Iterable[str]) -> TuningSettings:
    """Return settings with the options of a command line; those that are None change nothing.

    ConfigError is raised for a value that cannot be used.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    # What a search goes on with has the axes that it was started with, and they may be given again.
    added = tuple(axis for axis in space if axis not in tuning.space)
    try:
        return TuningSettings.model_validate(tuning.model_dump() | given | {"space": (*tuning.space, *added)})
    except ValidationError as error:
        field, reason = first_problem(error)
        value = error.errors(include_url=False)[0]["input"]
        raise ConfigError(f"tuning.{field.partition('.')[0] or 'tuning'} cannot be {value!r}: {reason}") from error
