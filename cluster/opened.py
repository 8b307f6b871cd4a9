"""A home that is open in this process: its settings, its store, and what was given for both.

The Python interface works on it, as a call of the command works on `records.command.Call`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from cluster.settings import Settings
from cluster.sources import load_settings
from images.settings import limits_variable
from records.errors import ConfigError
from records.settings import environment
from records.store import open_store


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

    def with_settings(self, set: Mapping[str, Any] | None) -> Settings:
        """Return the settings of the home with others for one call, by dotted names."""
        if not set:
            return self.settings
        if places := [name for name in set if name.partition(".")[0] in ("records", "images")]:
            raise ConfigError(f"{places[0]} cannot change while the home is open; give it to open_home")
        config, preset, sets = self._sources
        return load_settings(config, preset, (*sets, *setting_texts(set)), os.environ)

    def close(self) -> None:
        """Close the database; a second call does nothing."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Home({str(self.path)!r})"


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
