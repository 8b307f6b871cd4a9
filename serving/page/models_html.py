"""Models and the rollout as HTML.

In: bodies of the API. Out: HTML. Figures come with what they were measured on.
"""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from serving.schemas import ModelInfo, RolloutInfo
from serving.schemas_registry import ModelDetails

_STAGES = {
    "shadow": "It answers beside the model, and nobody gets its answers.",
    "canary": "It answers for a share of the lesions; of two answers the more cautious one is given.",
    "promoted": "It answers everything now.",
    "rolled_back": "It was taken back.",
}


def models_html(models: Sequence[ModelInfo]) -> str:
    """Show all models as a table.

    Args:
        models: newest first.
    Returns:
        HTML.
    """
    if not models:
        return "<div class='rl-card'><h2>No models yet</h2><p>A round or <code>relook train</code> makes one.</p></div>"
    rows = (
        (
            f"<code>{escape(model.id[:12])}</code>",
            escape(model.status),
            escape(model.architecture),
            "" if model.round is None else str(model.round),
            f"{model.created_at:%Y-%m-%d %H:%M}",
        )
        for model in models
    )
    table = table_html(("Model", "Status", "Network", "Round", "Made, UTC"), rows)
    return f"<div class='rl-card'><h3>All models, the newest first</h3>{table}</div>"


def details_html(details: ModelDetails, names: dict[str, str]) -> str:
    """Show what was measured of a model.

    Args:
        details: of the model.
        names: class code to name.
    Returns:
        HTML.
    """
    val = details.metrics.get("val", {})
    parts = [
        f"<div class='rl-card' id='rl-details'><h3>Model <code>{escape(details.id[:12])}</code></h3>",
        f"<p>{escape(details.status_text)}</p>",
    ]
    if val:
        parts.append(
            f"<h3>On {val.get('images')} validation images of {val.get('lesions')} lesions</h3>"
            "<p class='rl-small'>This split chose the epoch and the calibration, so its figures flatter a little; "
            "the report and the gate use others.</p>" + table_html(("Figure", "Value"), _figures(val, names))
        )
        parts.append(table_html(("Class", "Images", "Sensitivity", "Specificity"), _classes(val, names)))
    else:
        parts.append("<p class='rl-small'>No figures were kept with this model.</p>")
    if details.scores:
        bands = (
            (
                f"{100 * band.low:.0f} to {100 * band.high:.0f} %",
                str(band.lesions),
                f"{100 * band.right / band.lesions:.0f} % ({_range(band.right_ci)})",
            )
            for band in details.scores
        )
        parts.append("<h3>How often scores were right, on calibration data</h3>")
        parts.append(table_html(("Score of the answer", "Lesions", "Right (95 % interval)"), bands))
    named = names | {"malignant": "all malignant classes together"}
    refer = ", ".join(f"{escape(named.get(c, c))} from {100 * t:.1f} %" for c, t in details.refer.items())
    parts.append(f"<p>Goes to an annotator: {refer or 'no threshold is set'}. The sets of classes promise ")
    parts.append(f"{100 * details.promise:.0f} % per class.</p></div>")
    return "".join(parts)


def rollout_html(rollout: RolloutInfo | None) -> str:
    """Show the rollout that is under way, or ended a moment ago.

    Args:
        rollout: None if there is none.
    Returns:
        HTML.
    """
    if rollout is None:
        return (
            "<div class='rl-card' role='status'><h3>Rollout</h3><p>No candidate is on its way.</p><p class='rl-small'>"
            "Whoever signs in with a key of the scope admin moves candidates here.</p></div>"
        )
    harms = (
        (escape(harm.name.replace("_", " ")), str(harm.looked), str(harm.seen), f"{100 * harm.tolerated:.1f} %")
        for harm in rollout.harms
    )
    why = f"<p>Because: {escape(rollout.why)}.</p>" if rollout.why else ""
    return (
        f"<div class='rl-card' role='status'><h3>Rollout: {escape(rollout.stage.replace('_', ' '))}, "
        f"{rollout.percent} %</h3><p>Candidate <code>{escape(rollout.candidate_id[:12])}</code> beside "
        f"<code>{escape(rollout.champion_id[:12])}</code>. {_STAGES[rollout.stage]}</p>{why}"
        + table_html(("What would end it", "Looked", "Seen", "Tolerated"), harms)
        + "</div>"
    )


def table_html(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a table that scrolls sideways where it does not fit.

    Args:
        heads: of the columns.
        rows: of HTML.
    Returns:
        HTML.
    """
    head = "".join(f"<th scope='col'>{escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f"<div class='rl-scroll' tabindex='0'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _figures(val: dict[str, Any], names: dict[str, str]) -> Iterable[tuple[str, str]]:
    yield "Balanced accuracy", _share(val.get("balanced_accuracy"), val.get("balanced_accuracy_ci"))
    yield "Accuracy", _share(val.get("accuracy"), val.get("accuracy_ci"))
    yield "Area under the curve, mean of classes", _share(val.get("macro_auc"))
    yield "Calibration error", _share(val.get("ece"))
    key = val.get("key_class")
    if key:
        name = escape(names.get(key["name"], key["name"]))
        yield f"{name}: sensitivity where it is referred", _share(key.get("sensitivity"), key.get("sensitivity_ci"))
        yield f"{name}: specificity", _share(key.get("specificity"))
    yield "Left to the model alone", _share(val.get("answered_share"))


def _classes(val: dict[str, Any], names: dict[str, str]) -> Iterable[tuple[str, ...]]:
    for code, report in val.get("per_class", {}).items():
        yield (
            escape(names.get(code, code)),
            str(report.get("support")),
            _share(report.get("sensitivity"), report.get("sensitivity_ci")),
            _share(report.get("specificity")),
        )


def _share(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "not known"
    return f"{100 * value:.1f} %" + (f" ({_range(interval)})" if interval else "")


def _range(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:.0f} to {100 * interval[1]:.0f} %"
