"""Measured figures as a table for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def figures_table(title: str, figures: Mapping[str, Any]) -> Table:
    """Lay out measured figures, one row each; `figures["reasons"]` explains by key, or part of it, what is None."""
    table, reasons = Table("what", "figure", title=title), figures.get("reasons", {})
    for name, value in figures.items():
        if name != "reasons":
            why = next((reason for key, reason in reasons.items() if key in name), "")
            shown = round(value, 3) if isinstance(value, float) else value
            table.add_row(name.replace("_", " "), why if value is None else str(shown))
    return table
