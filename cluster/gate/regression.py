"""The gate's check of the regression set: whatever a model once missed, a challenger has to classify or refer.

In: a store, triage's settings and a challenger. Out: a check, or none while there are no cases. The images are not
those of the gate split: a model may have been trained on them, so the check shows that a fault is gone, and no rate.
"""

from cluster.gate.report import Check
from cluster.incidents.cases import in_words, judge_all
from records.bundles import Bundle
from records.store import Store
from serving.settings import ServingSettings

NAME = "regression set"


def regression_checks(store: Store, settings: ServingSettings, challenger: Bundle, actor: str) -> list[Check]:
    """Check the challenger on every case of the ledger.

    Args:
        store: with the cases and their images.
        settings: rules of triage.
        challenger: the model.
        actor: for the audit of cases that are added now.
    Returns:
        One check; none without cases.
    """
    results = judge_all(store, settings, challenger, actor)
    if not results:
        return []
    missed = [one for one in results if not one.is_handled]
    handled = len(results) - len(missed)
    text = f"it classifies or refers all {len(results)} cases of the regression set"
    if missed:
        text = f"it misses {len(missed)} of {len(results)} cases of the regression set: {in_words(missed[0])}"
    return [
        Check(
            name=NAME,
            outcome="fail" if missed else "pass",
            text=text,
            estimate=handled / len(results),
            limit=1.0,
            lesions=len(results),
        )
    ]
