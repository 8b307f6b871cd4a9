"""Experts read in Label Studio what their last annotations bought."""

import itertools
from collections.abc import Callable

from labeling.client import LabelStudioClient
from labeling.project import known_project
from labeling.push import push
from labeling.settings import LabelingSettings
from records.store import Store
from tests.serving.label_values import measured_labels, round_value


def test_the_instruction_says_what_the_last_annotations_bought(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, add_items: Callable[..., object]
) -> None:
    seeds = itertools.count()

    def pushed() -> str:
        add_items(1, first_seed=next(seeds))
        push(store, client, settings)
        found = client.request("GET", f"api/projects/{known_project(store, client)}", "read it")
        return str(found["expert_instruction"] or "")

    def measured(**changes: object) -> None:
        with store.ledger.begin() as tx:
            tx.add(measured_labels(last_round={**round_value(), **changes}))

    assert pushed() == "", "nothing was measured"
    with store.ledger.begin() as tx:
        tx.add(measured_labels(last_round=None))
    assert pushed() == "", "no label came from an annotator"
    measured()
    text = pushed()
    assert "The annotations of round 2 gave 41 images their first label and changed that of 3." in text
    assert "balanced accuracy is +0.031 (95 % interval +0.011 to +0.051)" in text
    assert "17 images of val are decided right only with them, 6 only without" in text

    ours = known_project(store, client)
    client.request("PATCH", f"api/projects/{ours}", "write", body={"expert_instruction": "Ask Ada when in doubt."})
    assert pushed() == "Ask Ada when in doubt.", "what somebody wrote stays until the next measurement"
    measured(number=3)
    assert "round 3" in pushed()

    client.request("DELETE", f"api/projects/{ours}", "delete it")
    assert "round 3" in pushed(), "a project that is made anew has it, too"
    assert known_project(store, client) != ours


def test_a_gain_that_could_not_be_measured_is_not_told(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, add_items: Callable[..., object]
) -> None:
    add_items(1)
    nothing = dict.fromkeys(("value", "low", "high"))
    with store.ledger.begin() as tx:
        tx.add(measured_labels(last_round={**round_value(), "gain": nothing}))
    push(store, client, settings)
    found = client.request("GET", f"api/projects/{known_project(store, client)}", "read it")
    assert not found["expert_instruction"]
