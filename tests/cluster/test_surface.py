"""No verb, option or API operation is lost: today's are those of `surface.json`, minus what it lists as gone.

A new verb, option or operation is added to that file; one that goes is added to its `gone` with the reason.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from cluster.cli import app
from cluster.settings import Settings
from records.store import Store
from serving.app import create_api
from serving.metrics import Metrics
from serving.routes.authenticator import Authenticator

SURFACE: dict[str, Any] = json.loads(Path(__file__).with_name("surface.json").read_text())
GONE = [entry["what"] for entry in SURFACE["gone"]]


def _options(command: Any, path: str) -> dict[str, set[str]]:
    """Return the options of every verb at or below a command, by the words that call it."""
    below = getattr(command, "commands", {})
    found = {}
    if not below or command.invoke_without_command:
        named = (param for param in command.params if param.param_type_name == "option")
        found[path] = {name for param in named for name in (*param.opts, *param.secondary_opts)}
    for name, child in below.items():
        found |= _options(child, f"{path} {name}")
    return found


def _expected_verbs() -> dict[str, set[str]]:
    verbs = {verb: set(options.split()) for verb, options in SURFACE["verbs"].items() if verb not in GONE}
    for entry in SURFACE["renamed"]:
        verb, old = entry["from"].rsplit(" ", 1)
        verbs[verb].remove(old)
        verbs[verb].add(entry["to"].rsplit(" ", 1)[1])
    return verbs


def test_every_verb_has_the_options_that_it_had() -> None:
    verbs = _options(typer.main.get_command(app), "relook")
    assert verbs == _expected_verbs()


def test_the_api_has_the_operations_that_it_had(store: Store) -> None:
    service: Any = SimpleNamespace(settings=Settings().serving, store=store)
    paths = create_api(service, Metrics(store), Authenticator(store, service.settings)).openapi()["paths"]
    operations = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert operations == {operation for operation in SURFACE["operations"] if operation not in GONE}


@pytest.mark.parametrize(
    "entry", [*SURFACE["gone"], *SURFACE["renamed"]], ids=lambda entry: entry.get("what") or entry["from"]
)
def test_what_is_gone_or_renamed_has_a_reason_and_was_there(entry: dict[str, str]) -> None:
    what = entry.get("what") or entry["from"].rsplit(" ", 1)[0]
    assert what in SURFACE["verbs"] or what in SURFACE["operations"]
    assert len(entry["why"]) > 10
