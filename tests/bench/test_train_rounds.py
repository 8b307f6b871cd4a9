"""What is measured in rounds becomes means of the rounds' ratios; a peer that could not run makes no figure."""

import pytest

from bench.train.training import Round, _mean, _of_rounds


def round_of(raw: float, pipeline: float, *, plain: float | None = 10.0, lightning: float | None = 40.0) -> Round:
    plans = {"1 worker of 2 threads": pipeline, "2 workers of 1 threads": 99.0}
    return Round(raw, raw / 2, plain, lightning, plans, {name: rate / 4 for name, rate in plans.items()})


def test_a_ratio_is_the_mean_of_the_rounds_ratios() -> None:
    figures = _of_rounds([round_of(100.0, 50.0), round_of(20.0, 30.0)])
    assert figures["pipeline_over_raw_by_round"] == [0.5, 1.5]
    assert figures["pipeline_over_raw"] == 1.0  # and not 80 / 120, in which the faster round counts more
    assert figures["pipeline_over_raw_with_augmentation"] == 2.0
    assert figures["pipeline_over_plain_fp32"] == 4.0
    assert figures["pipeline_over_lightning"] == 1.0
    assert figures["raw_images_s"] == 60.0


def test_a_peer_that_did_not_run_in_every_round_has_no_figure() -> None:
    figures = _of_rounds([round_of(100.0, 50.0, lightning=None), round_of(20.0, 30.0)])
    assert figures["pipeline_over_lightning"] is None
    assert figures["lightning_images_s"] is None
    assert figures["pipeline_over_plain_fp32"] == pytest.approx(4.0)
    assert _mean([1.0, 2.0], 3) == 1.5
