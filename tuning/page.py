"""The report of a search as one page that needs no network: `report.html`, and `report.json` beside it."""

from pathlib import Path
from typing import Any

from records.errors import UnavailableError
from tuning.live import describe
from tuning.report import SearchReport

TEMPLATE = Path(__file__).with_name("page.html")
WIDTH, HEIGHT, LEFT, BOTTOM = 720, 260, 44, 28


def write_report(report: SearchReport, folder: Path) -> Path:
    """Write the page and the JSON of a report.

    Args:
        report: of the search.
        folder: of the run.
    Returns:
        The page.
    Raises:
        UnavailableError: the folder cannot be written.
    """
    page = folder / "report.html"
    try:
        page.write_text(render(report), encoding="utf-8")
        (folder / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UnavailableError(f"the report in {folder} cannot be written ({error.strerror})") from error
    return page


def render(report: SearchReport) -> str:
    """Return the page; everything that comes from settings or errors is escaped."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"points": _points, "score": _score, "described": describe, "span": _span}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, curves=_curves(report), bars=_bars(report), size=(WIDTH, HEIGHT))


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}"


def _span(row: Any, unit: str = "points") -> str:
    low, high = (row["low"], row["high"]) if isinstance(row, dict) else (row.low, row.high)
    if low is None or high is None:
        return "-"
    show = _points if unit == "points" else _score
    return f"{show(low)} to {show(high)}"


def _curves(report: SearchReport) -> dict[str, Any]:
    """Return the learning curves as SVG points, the winner marked, with ticks of both axes."""
    rows = [row for row in report.leaderboard if row["scores"]]
    if not rows:
        return {"lines": [], "x": [], "y": []}
    epochs = report.header.trial_epochs
    low: float = min(min(row["scores"]) for row in rows)
    high: float = max(max(row["scores"]) for row in rows)
    reach: float = max(high - low, 0.01)

    def x(epoch: float) -> float:
        return LEFT + (WIDTH - LEFT - 12) * (epoch - 1) / max(1, epochs - 1)

    def y(score: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 12) * (score - low) / reach

    lines = [
        {
            "points": " ".join(f"{x(e):.1f},{y(s):.1f}" for e, s in enumerate(row["scores"], start=1)),
            "end": (round(x(len(row["scores"])), 1), round(y(row["scores"][-1]), 1)),
            "state": row["state"],
            "best": report.best is not None and row["number"] == report.best["number"],
            "title": f"trial {row['number']}: {describe(row['overrides'])}",
        }
        for row in reversed(rows)
    ]
    ticks = [low + reach * part / 4 for part in range(5)]
    step = max(1, epochs // 10)
    return {
        "lines": lines,
        "x": [(round(x(epoch), 1), epoch) for epoch in range(1, epochs + 1, step)],
        "y": [(round(y(tick), 1), f"{tick:.2f}") for tick in ticks],
    }


def _bars(report: SearchReport) -> list[dict[str, Any]]:
    """Return one interval bar per effect that could be estimated, in percent of the widest."""
    shown = [row for row in report.effects.table if row.low is not None and row.high is not None]
    widest = max((max(abs(row.low or 0), abs(row.high or 0)) for row in shown), default=0.0) or 1.0
    return [
        {
            "row": row,
            "left": 50 + 50 * (row.low or 0) / widest,
            "width": 50 * ((row.high or 0) - (row.low or 0)) / widest,
            "at": 50 + 50 * (row.effect or 0) / widest,
        }
        if row.low is not None
        else {"row": row, "left": 0, "width": 0, "at": None}
        for row in report.effects.table
    ]
