"""Where settings come from: defaults < preset < YAML file < environment < `--set`.

In: a file, a preset's name, `room.field=value` texts (a part of a room is one name more, as in
`trainers.optimizer.momentum=0.9`) and an environment. Out: `Settings`, or a ConfigError of one sentence
that names the field, the value, its source and a valid value. No other file is read, and the process's own
environment only if it is passed in.
"""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from cluster.presets import PRESETS
from cluster.settings import Settings
from records.errors import ConfigError
from records.redaction import MASK, without_secrets

PREFIX = "RELOOK_"
SHORT_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "RELOOK_HOME": "records.home",
        "RELOOK_DATABASE": "records.database",
        "RELOOK_BLOBS": "records.blobs",
        "RELOOK_STORAGE": "cluster.storage",
        "RELOOK_RAY_ADDRESS": "cluster.ray_address",
    }
)


@dataclass(frozen=True)
class _Given:
    """One value that someone gave: for which field, and where."""

    path: tuple[str, ...]
    value: Any
    source: str

    @property
    def name(self) -> str:
        return ".".join(self.path)


def load_settings(
    config: Path | None = None,
    preset: str | None = None,
    sets: Sequence[str] = (),
    environ: Mapping[str, str] = MappingProxyType({}),
) -> Settings:
    """Compose the settings of one command.

    Args:
        config: YAML file of the form `room: {field: value}`, with an optional `preset: name`; None for no file.
        preset: name of a preset; None takes RELOOK_PRESET, then the file's, then laptop.
        sets: `room.field=value` texts; the last one of a field wins.
        environ: environment to read `RELOOK_ROOM__FIELD` and the short names from.
    Returns:
        The composed settings, with an absolute `records.home`.
    Raises:
        ConfigError: a source, a name or a value is wrong (names field, value, source and a valid one).
    """
    document = _read_yaml(config) if config else {}
    file_preset = document.pop("preset", None)
    base = _preset(preset or environ.get("RELOOK_PRESET") or file_preset or "laptop")
    given = [
        *_from_document(document, str(config)),
        *_from_environ(environ),
        *_from_sets(sets),
    ]
    # Plain nested values: the preset first, then each given field in order of strength, validated once at the end. So
    # fields that only fit together may come from different sources.
    values = base.model_dump()
    for item in given:
        # Names are checked before values, with our own sentence; pydantic would only say that extra inputs are not
        # permitted.
        _check(item)
        _place(values, item)
    values["records"]["home"] = Path(os.path.abspath(Path(values["records"]["home"]).expanduser()))
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_sentence(error, given, base)) from error


def _preset(name: object) -> Settings:
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the settings file {path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the settings file {path} is not YAML: {' '.join(str(error).split())}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(
            f"the settings file {path} must read `room: {{field: value}}`, for example trainers: {{epochs: 5}}"
        )
    return document


def _from_document(document: Mapping[str, Any], source: str) -> Iterator[_Given]:
    """Flatten nested mappings down to fields of models; a field whose value is a mapping stays one value."""

    def walk(prefix: tuple[str, ...], value: Any) -> Iterator[_Given]:
        is_model = not prefix or _model_in(_field(prefix)) is not None
        if is_model and isinstance(value, Mapping):
            for key, item in value.items():
                yield from walk((*prefix, str(key)), item)
        else:
            yield _Given(prefix, value, source)

    for item in walk((), document):
        _refuse_secret(item)
        yield item


def _from_environ(environ: Mapping[str, str]) -> Iterator[_Given]:
    for variable, text in sorted(environ.items()):
        if not variable.startswith(PREFIX):
            continue
        if variable in SHORT_NAMES:
            yield _Given(tuple(SHORT_NAMES[variable].split(".")), _plain(text), variable)
        elif "__" in variable:
            path = tuple(variable.removeprefix(PREFIX).lower().split("__"))
            yield _Given(path, _plain(text), variable)
        else:
            # Other RELOOK_ variables exist (RELOOK_TEST_DATA), so only a near miss of a short name is an error.
            slip = difflib.get_close_matches(variable, SHORT_NAMES, n=1, cutoff=0.85)
            if slip:
                raise ConfigError(f"the environment variable {variable} means nothing; did you mean {slip[0]}?")


def _from_sets(sets: Sequence[str]) -> Iterator[_Given]:
    for text in sets:
        name, equals, value = text.partition("=")
        if not equals or "." not in name:
            raise ConfigError(f"--set {text!r} must read room.field=value, for example --set trainers.epochs=5")
        item = _Given(tuple(part.strip() for part in name.split(".")), _plain(value.strip()), "--set")
        _refuse_secret(item)
        yield item


def _plain(text: str) -> Any:
    """Lists, mappings and null are read as YAML; all else stays text, which pydantic turns into the field's type."""
    # Not all text is read as YAML: `no` would become False, and 1e-3 a string.
    if text != "null" and not text.startswith(("[", "{")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _refuse_secret(item: _Given) -> None:
    has_password = isinstance(item.value, str) and without_secrets(item.value) != item.value
    if (_is_secret(_field(item.path)) and item.value is not None) or has_password:
        variable = next((short for short, name in SHORT_NAMES.items() if name == item.name), None)
        variable = variable or PREFIX + "__".join(item.path).upper()
        raise ConfigError(f"{item.name} is a secret, which may not come from {item.source}; set {variable} instead")


def _field(path: tuple[str, ...]) -> FieldInfo | None:
    """Return the declared field at `path`, None if there is none."""
    model: type[BaseModel] | None = Settings
    field: FieldInfo | None = None
    for part in path:
        if model is None or part not in model.model_fields:
            return None
        field = model.model_fields[part]
        model = _model_in(field)
    return field


def _is_secret(field: FieldInfo | None) -> bool:
    return field is not None and SecretStr in (field.annotation, *get_args(field.annotation))


def _model_in(field: FieldInfo | None) -> type[BaseModel] | None:
    """Return the model that a field holds, also if it is optional; a list of models is a value."""
    if field is None or get_origin(field.annotation) is tuple:
        return None
    for annotation in (field.annotation, *get_args(field.annotation)):
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
    return None


def _check(item: _Given) -> None:
    """Refuse a name that does not exist, and a value where a room is."""
    model: type[BaseModel] | None = Settings
    for depth, part in enumerate(item.path):
        known = model.model_fields if model is not None else {}
        if part not in known:
            parent = ".".join(item.path[:depth])
            close = _closest(part, model, last=depth == len(item.path) - 1)
            hint = f"did you mean {'.'.join((*item.path[:depth], close))}?" if close else _known(parent, known)
            raise ConfigError(f"no setting {item.name} (from {item.source}); {hint}")
        model = _model_in(known[part])
    if model is not None:
        example = next(iter(model.model_fields))
        raise ConfigError(
            f"{item.name} (from {item.source}) holds fields, not a value; give them by name, such as "
            f"{item.name}.{example}"
        )


def _closest(part: str, model: type[BaseModel] | None, *, last: bool) -> str | None:
    """Return the field that is spelled most like `part`; for the last name of a path also a field one level below."""
    fields = model.model_fields if model is not None else {}
    inner = {
        name: f"{field}.{name}"
        for field in fields
        for name in getattr(_model_in(fields[field]), "model_fields", {})
        if last
    }
    for known in ({field: field for field in fields}, inner):
        close = difflib.get_close_matches(part, known, n=1, cutoff=0.6)
        if close:
            return known[close[0]]
    return None


def _known(parent: str, known: Mapping[str, Any]) -> str:
    if not parent:
        return f"the rooms are {', '.join(name for name in known if name != 'preset')}"
    return f"{parent} has {', '.join(known)}" if known else f"{parent} is a value"


def _place(values: dict[str, Any], item: _Given) -> None:
    target = values
    for part in item.path[:-1]:
        if not isinstance(target.get(part), dict):
            target[part] = {}
        target = target[part]
    target[item.path[-1]] = item.value


def _sentence(error: ValidationError, given: Sequence[_Given], base: Settings) -> str:
    """Say in one sentence what is wrong with the first field that pydantic refused."""
    errors = error.errors(include_url=False)
    location = tuple(str(part) for part in errors[0]["loc"])
    # The last source that gave the field is the one that counts, so it is the one to name.
    item = next((g for g in reversed(given) if location[: len(g.path)] == g.path), None)
    if item is None:
        reason = _reason(errors[0]["msg"])
        return f"{'.'.join(location)}: {reason}" if location else reason
    # A field of several types gives one error for each of them, all at the same depth.
    siblings = [e for e in errors if e["loc"][: len(item.path)] == item.path and len(e["loc"]) == len(location)]
    reason = " or ".join(dict.fromkeys(_reason(e["msg"]) for e in siblings))
    field = _field(item.path)
    shown = MASK if _is_secret(field) else _shown(item.value)
    meaning = field.description if field is not None else None
    default = _at(base.model_dump(mode="json"), item.path)
    valid = f"a valid value is {_shown(default)}" if default is not None else "null means the default"
    return f"{item.name} = {shown} (from {item.source}) cannot be used: {reason}; {valid}" + (
        f" ({meaning})" if meaning else ""
    )


def _reason(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should", "it should")


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        values = values[part] if isinstance(values, dict) else None
    return values


def _shown(value: Any) -> str:
    text = repr(without_secrets(value)) if isinstance(value, str) else without_secrets(str(value))
    return text if len(text) <= 80 else text[:77] + "..."
