"""Post-market figures as one report: live sensitivity by model, institution and device, incidents, time to close.

In: the ledger. Out: an `IncidentReport`, which the service shows as a page. Sensitivity is estimated from the random
audit sample alone (`cluster.monitor`); incidents are no sample, so no rate is computed from them.
"""

from collections import Counter
from collections.abc import Sequence
from statistics import median

from rich.table import Table

from cluster.monitor import LiveQuality, monitor
from records.durable import make_folders, write_file
from records.incidents import regression_cases
from records.ledger import Transaction
from records.store import Store
from records.types import Incident, IncidentPrediction, IncidentState, Prediction
from serving.incidents.report import IncidentCounts, IncidentReport, LiveFigure, report_file

_EVERY = ("all", "all")


def incident_report(store: Store, audit_share: float) -> IncidentReport:
    """Compute the report and keep it where the service shows it from.

    Args:
        store: with incidents, predictions and the audit sample.
        audit_share: setting `serving.audit_share`.
    Returns:
        The report.
    """
    quality = monitor(store, audit_share)
    with store.ledger.read() as tx:
        now = tx.now()
        incidents = tx.find(Incident, order_by=("id",))
        parts = _parts(tx, incidents)
        cases = len(regression_cases(tx))
        affected = sum(bool(row.criteria) for row in tx.find(IncidentPrediction))
    names = sorted(parts, key=lambda part: (("all", "model", "site", "device").index(part[0]), part[1]))
    report = IncidentReport(
        created_at=now,
        key_class=store.taxonomy.key_class.code if store.taxonomy.key_class else None,
        figures=[_live(one) for one in quality],
        incidents=[_counts(*name, parts[name]) for name in names],
        regression_cases=cases,
        affected=affected,
    )
    make_folders(report_file(store).parent)
    write_file(report_file(store), report.model_dump_json(indent=2) + "\n")
    return report


def table_of(report: IncidentReport) -> Table:
    """Return the report as a table for people."""
    live = {(one.by, one.name): one for one in report.figures}
    counts = {(one.by, one.name): one for one in report.incidents}
    table = Table("", "sensitivity", "specificity", "images", "incidents", "open", "days to close")
    for by, name in dict.fromkeys([*live, *counts]):
        figure, count = live.get((by, name)), counts.get((by, name))
        table.add_row(
            by if by == "all" else f"{by} {name[:12]}",
            "no data" if figure is None else figure.sensitivity_text,
            "no data" if figure is None else figure.specificity_text,
            "0" if figure is None else str(figure.images),
            "0" if count is None else str(count.opened),
            "0" if count is None else str(count.still_open),
            "" if count is None or count.median_days is None else f"{count.median_days:.1f}",
        )
    return table


def _live(one: LiveQuality) -> LiveFigure:
    return LiveFigure(
        by=one.by,
        name=one.name,
        sensitivity=one.sensitivity.estimate,
        sensitivity_interval=one.sensitivity.interval,
        cases=one.sensitivity.images,
        specificity=one.specificity.estimate,
        specificity_interval=one.specificity.interval,
        images=one.accuracy.images,
    )


def _parts(tx: Transaction, incidents: Sequence[Incident]) -> dict[tuple[str, str], list[Incident]]:
    """Return the incidents of all, of each model, and of the institutions and devices that predictions name."""
    context = {one.id: one.context for one in tx.find(Prediction, {"id": [one.prediction_id for one in incidents]})}
    parts: dict[tuple[str, str], list[Incident]] = {_EVERY: list(incidents)}
    for incident in incidents:
        said = context.get(incident.prediction_id, {})
        named = {"model": incident.model_id, "site": said.get("site"), "device": said.get("device")}
        for by, name in named.items():
            if name:
                parts.setdefault((by, str(name)), []).append(incident)
    return parts


def _counts(by: str, name: str, incidents: Sequence[Incident]) -> IncidentCounts:
    states = Counter(one.state for one in incidents)
    days = [
        (one.closed_at - one.created_at).total_seconds() / 86_400
        for one in incidents
        if one.state is IncidentState.CLOSED and one.closed_at is not None
    ]
    return IncidentCounts(
        by=by,
        name=name,
        opened=len(incidents),
        still_open=states[IncidentState.OPEN],
        withdrawn=states[IncidentState.WITHDRAWN],
        median_days=median(days) if days else None,
        longest_days=max(days, default=None),
    )
