"""The verbs of `python -m bench`."""

import typer

from bench.__main__ import app


def test_every_kind_of_measurement_is_a_verb() -> None:
    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert verbs == {"train", "gpu", "tune", "serve", "explain", "abuse", "label", "scale"}
