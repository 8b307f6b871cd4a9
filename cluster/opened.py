"""A home that is open in this process: its settings, its store, and what was given for both.

The Python interface works on it, as a call of the command works on `records.command.Call`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cluster.settings import Settings
from cluster.sources import load_settings
from images.settings import limits_variable
from records.errors import ConfigError
from records.settings import environment
from records.store import open_store

if TYPE_CHECKING:
    from records.bundles import Bundle
    from serving.direct import Model
    from tuning.report import SearchReport


class Home:
    """An open home: the folder that holds everything, and its settings. Made by `open_home`; a context manager.

    Args:
        config: YAML file of settings, or None.
        preset: its name, or None for the default one.
        sets: `room.field=value` texts.
    """

    def __init__(self, config: Path | None, preset: str | None, sets: Sequence[str]) -> None:
        self._sources = (config, preset, tuple(sets))
        self.settings = load_settings(config, preset, sets, os.environ)
        self.store = open_store(self.settings.records)
        self._open = ExitStack()
        self._open.callback(self.store.close)
        self._open.enter_context(environment(limits_variable(self.settings.images)))

    @property
    def path(self) -> Path:
        """The folder."""
        return self.store.home.root

    def with_settings(self, set: Mapping[str, Any] | None, before: Sequence[str] = ()) -> Settings:
        """Return the settings of the home with others for one call, by dotted names; they overrule texts `before`."""
        if not set and not before:
            return self.settings
        if places := [name for name in set or {} if name.partition(".")[0] in ("records", "images")]:
            raise ConfigError(f"{places[0]} cannot change while the home is open; give it to open_home")
        config, preset, sets = self._sources
        return load_settings(config, preset, (*before, *sets, *setting_texts(set or {})), os.environ)

    def bundle(self, model: "str | os.PathLike[str] | Model") -> "Bundle":
        """Return the bundle of a model that is given as `relook.evaluate` takes it."""
        from records.models import find_bundle
        from serving.direct import Model

        return model.bundle if isinstance(model, Model) else find_bundle(self.store, os.fspath(model))

    @staticmethod
    def ray(settings: Settings, needed: bool = True) -> AbstractContextManager[Any]:
        """Return a block with a Ray session: the one of this process, else a new one; none if none is needed."""
        if not needed:
            return nullcontext()
        from cluster.session import ray_is_running, start_ray

        return nullcontext() if ray_is_running() else start_ray(settings)

    def close(self) -> None:
        """Close the database; a second call does nothing."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Home({str(self.path)!r})"


class Search:
    """What `tune` found.

    Args:
        folder: of the search; its name is what `run=` takes.
        report: trials, effects of each choice, failures and costs, best first.
        page: the report as one HTML page.
        model: the winner's, trained for all epochs; None with `fit=False`.
    """

    def __init__(self, folder: Path, report: "SearchReport", page: Path, model: "Model | None") -> None:
        self.folder, self.report, self.page, self.model = folder, report, page, model

    def __repr__(self) -> str:
        return f"Search({self.folder.name!r}, {len(self.report.leaderboard)} trials)"


def setting_texts(set: Mapping[str, Any]) -> list[str]:
    """Return settings as the texts that `--set` takes."""
    return [f"{name}={_text(value)}" for name, value in set.items()]


def _text(value: Any) -> str:
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    try:
        return json.dumps(list(value) if isinstance(value, tuple) else value)
    except TypeError:
        return str(value)
