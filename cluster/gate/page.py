"""The gate's report as a page for the person who is responsible for patients: words first, figures behind them."""

from importlib.resources import files

from jinja2 import Environment

from cluster.gate.report import GateReport, Verdict
from records.taxonomy import Taxonomy

HEADLINES = {
    Verdict.PROMOTE: "The new model may answer",
    Verdict.REFUSE: "The new model must not answer",
    Verdict.UNDECIDED: "There are too few lesions to decide; the model before goes on answering",
}


def report_page(report: GateReport, taxonomy: Taxonomy) -> str:
    """Render the report.

    Args:
        report: of the gate.
        taxonomy: with the display name of the key class.
    Returns:
        One HTML page that needs nothing else.
    """
    key = taxonomy.key_class.code if taxonomy.key_class else None
    name = next((c.name for c in taxonomy.classes if c.code == key), None)
    # Names of sites and devices come from imported tables: everything is escaped.
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("cluster.gate") / "page.html").read_text(encoding="utf-8"))
    return template.render(report=report, headline=HEADLINES[report.verdict], key_name=name)
