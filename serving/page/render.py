"""Jinja2 templates of the page.

In: a template's name and plain values, mostly bodies of the API. Out: HTML. One environment renders all templates with
autoescape, so a value is text unless the template marks it as HTML. Templates hold markup and fixed texts; sentences
with conditions and figures are made in Python.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """Return the HTML of `templates/{template}.html`."""
    return _ENVIRONMENT.get_template(f"{template}.html").render(values)


def problem_html(sentence: str, title: str = "Prediction failed") -> str:
    """Return an alert with the message of an error under a title that says what failed."""
    return render("problem", title=title, sentence=sentence)


def percent(probability: float) -> str:
    """Return a probability without decimals.

    >>> percent(0.004), percent(0.0), percent(0.426)
    ('< 1 %', '0 %', '43 %')
    """
    # Rounding would print 0 %, which reads as "impossible", for a class that the model did not exclude.
    return "< 1 %" if 0 < probability < 0.01 else f"{100 * probability:.0f} %"


def utc_minute(moment: datetime) -> str:
    """Return a moment as `2026-01-31 12:00 UTC`."""
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def interval(ends: Sequence[float]) -> str:
    """Return an interval of shares, such as `62 to 79 %`."""
    return f"{100 * ends[0]:.0f} to {100 * ends[1]:.0f} %"


def share(value: float | None, ends: Sequence[float] | None = None) -> str:
    """Return a share with one decimal, and its confidence interval where there is one."""
    if value is None:
        return "not available"
    return f"{100 * value:.1f} %" + (f" ({interval(ends)})" if ends else "")


def _sentence(text: str) -> str:
    # Messages of errors begin in lower case and end without a full stop.
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _environment() -> Environment:
    # StrictUndefined: a template that names a missing field fails in the tests instead of showing nothing.
    environment = Environment(
        loader=PackageLoader("serving.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "share": share,
        "interval": interval,
        "utc_minute": utc_minute,
        "sentence": _sentence,
        "short_id": lambda model_id: model_id[:12],
        "spaced": lambda name: name.replace("_", " "),
    }
    return environment


# Templates are compiled at first use and kept, so there is one environment per process.
_ENVIRONMENT = _environment()
