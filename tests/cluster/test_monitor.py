"""Estimated quality: weights undo the audit sample's strata, and the interval is valid at any time."""

from collections.abc import Callable
from datetime import timedelta

import numpy as np
import pytest
import sqlalchemy as sa

from cluster import monitor
from cluster.cli import run
from cluster.monitor import _GRID, LEVEL, _log_wealth, share_of
from records.errors import ContractError
from records.ids import new_id, utc_now
from records.ledger.tables import TABLES
from records.store import Store
from records.types import (
    Confirmation,
    Decision,
    Image,
    Outcome,
    Prediction,
    ReasonCode,
    ReviewItem,
)

NOW = utc_now()


def test_hand_numbers() -> None:
    found = share_of([True, False], [1.0, 3.0], 4.0)
    assert found.estimate == 0.25
    assert found.interval[0] == 0.0
    assert share_of([], [], 1.0).interval == (0.0, 1.0)
    with pytest.raises(ContractError, match="a weight is 3"):
        share_of([True], [3.0], 2.0)


def test_the_interval_is_valid_at_all_times() -> None:
    """A share of 0.8 drawn in two strata: in at least 95 % of the runs it is excluded at no time."""
    truth = int(np.argmin(np.abs(_GRID - 0.8)))
    kept = 0
    for number in range(60):
        generator = np.random.default_rng(number)
        hard = generator.random(600) < 0.25
        right = generator.random(600) < np.where(hard, 0.2, 1.0)
        chance = np.where(hard, 0.5, 0.1)
        drawn = generator.random(600) < chance
        wealth = _log_wealth(right[drawn].astype(np.float64), (0.1 / chance)[drawn])
        kept += bool(wealth[:, truth].max() < np.log(1 / (1 - LEVEL)))
    assert kept / 60 >= 0.95


def test_more_images_make_it_narrower() -> None:
    few, many = share_of([True] * 20, [1.0] * 20, 1.0), share_of([True] * 300, [1.0] * 300, 1.0)
    assert few.interval[0] < many.interval[0]
    assert many.interval == (pytest.approx(0.98, abs=0.01), 1.0)


@pytest.fixture
def audited(store: Store) -> Callable[..., None]:
    """Add a prediction that was drawn for the audit, and its outcome."""

    def add(
        label: str, truth: str | None, *, chance: float = 0.1, reasons: tuple[ReasonCode, ...] = (), drawn: bool = True
    ) -> None:
        image_id = new_id() + new_id()
        all_reasons = [*reasons, *([ReasonCode.AUDIT_SAMPLE] if drawn else [])]
        prediction = Prediction(
            id=new_id(), request_id=new_id(), created_at=NOW + timedelta(seconds=1), caller="local", image_id=image_id,
            model_id="m" * 64, model_status="champion", engine="torch", precision="fp32", num_threads=1,
            settings_hash="", label=label, confidence=0.75,
            decision=Decision.REVIEW if all_reasons else Decision.ANSWERED, reasons=all_reasons, latency_ms=1,
        )  # fmt: skip
        with store.ledger.begin() as tx:
            tx.add(
                Image(
                    id=image_id,
                    uri="file:///none",
                    format="jpeg",
                    width_px=1,
                    height_px=1,
                    site="clinic a",
                    provenance="served",
                    created_at=NOW,
                ),
                prediction,
                ReviewItem(
                    id=new_id(),
                    created_at=NOW,
                    prediction_id=prediction.id,
                    image_id=image_id,
                    reasons=all_reasons or [ReasonCode.FLAGGED],
                    priority=1,
                    selection_probability=chance if drawn else None,
                ),
            )
            if truth is not None:
                tx.add(
                    Outcome(
                        id=new_id(),
                        created_at=NOW,
                        prediction_id=prediction.id,
                        image_id=image_id,
                        caller="local",
                        diagnosis=truth,
                        confirmation=Confirmation.HISTOPATHOLOGY,
                        observed_at=NOW,
                    )
                )

    return add


def test_only_the_audit_sample_counts_and_being_drawn_is_no_referral(
    store: Store, audited: Callable[..., None]
) -> None:
    assert monitor.monitor(store, 0.05) == []
    audited("nv", "mel")  # missed, at a chance of 0.1: stands for ten
    audited("nv", "mel", reasons=(ReasonCode.REFER,), chance=0.5)  # referred: stands for two
    audited("nv", "nv")
    audited("nv", "mel", drawn=False)  # flagged, not drawn
    audited("nv", None)  # no outcome yet
    whole, by_model, by_site = monitor.monitor(store, 0.05)
    assert [q.by for q in (whole, by_model, by_site)] == ["all", "model", "site"]
    assert whole.sensitivity.estimate == pytest.approx(2 / 12)
    assert whole.sensitivity.images == 2
    assert whole.specificity.estimate == 1.0
    assert whole.accuracy.estimate == pytest.approx(10 / 22)
    assert whole.confidence_gap == pytest.approx(0.75 - 10 / 22)
    assert by_site.name == "clinic a"


def test_the_figures_are_printed(
    store: Store, audited: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RELOOK_HOME", str(store.home.root))
    assert run(["monitor"]) == 0
    assert capsys.readouterr().out.startswith("no image of the audit sample is annotated yet")
    audited("nv", "nv")
    assert run(["monitor"]) == 0
    printed = capsys.readouterr().out
    assert "site clinic a" in printed
    assert "no data" in printed, "there is no melanoma, so no sensitivity"
    assert "1.000 (" in printed
    assert "-0.250" in printed, "75 % stated, all of them right"


def test_a_row_that_is_lost_does_not_end_the_monitoring_of_others(store: Store, audited: Callable[..., None]) -> None:
    audited("nv", "mel")
    audited("nv", "nv")
    with store.ledger.begin() as tx:
        first, second = tx.find(Image)
        tx.connection.execute(sa.delete(TABLES[Image]).where(TABLES[Image].c.id == first.id))
    assert monitor.monitor(store, 0.05)[0].accuracy.images == 1
    with store.ledger.begin() as tx:
        tx.connection.execute(sa.delete(TABLES[Image]).where(TABLES[Image].c.id == second.id))
    assert monitor.monitor(store, 0.05) == []
