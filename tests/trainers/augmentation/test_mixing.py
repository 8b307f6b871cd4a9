"""Mixing: shares follow what is seen, partners are of the batch, and nothing depends on who computes."""

import numpy as np
import pytest

from trainers.augmentation.mixing import Mix, Mixing, draw_mix


def draws(kind: str, count: int = 400, **changes: float) -> list[Mix | None]:
    mixing = Mixing(kind=kind, **changes)  # type: ignore[arg-type]
    return [draw_mix(mixing, 6, 32, seed=1, epoch=0, step=step) for step in range(count)]


def test_mixup_by_hand() -> None:
    black, white = np.zeros((2, 4, 4, 3), dtype=np.uint8), np.full((2, 4, 4, 3), 255, dtype=np.uint8)
    assert (Mix(np.array([1, 0]), 0.75).apply(black, white) == 64).all()
    assert (Mix(np.array([1, 0]), 1.0).apply(black, white) == 0).all()


def test_cutmix_by_hand() -> None:
    black, white = np.zeros((1, 4, 4, 3), dtype=np.uint8), np.full((1, 4, 4, 3), 255, dtype=np.uint8)
    mixed = Mix(np.array([0]), 0.75, (0, 2, 1, 3)).apply(black, white)
    assert mixed[0, :, :, 0].tolist() == [[0, 255, 255, 0], [0, 255, 255, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert not black.any()


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_share_of_the_label_is_the_share_of_the_image(kind: str) -> None:
    black, white = np.zeros((1, 32, 32, 3), dtype=np.uint8), np.full((1, 32, 32, 3), 255, dtype=np.uint8)
    for mix in draws(kind, 100, probability=1.0, alpha=1.0):
        assert mix is not None
        assert 1 - mix.apply(black, white).mean() / 255 == pytest.approx(mix.share, abs=0.003)
        assert sorted(mix.partner.tolist()) == list(range(6))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_probability_and_seed(kind: str) -> None:
    first, again = draws(kind, probability=0.3), draws(kind, probability=0.3)
    assert np.mean([mix is not None for mix in first]) == pytest.approx(0.3, abs=0.07)
    assert [m and (m.share, m.box, m.partner.tolist()) for m in first] == [
        m and (m.share, m.box, m.partner.tolist()) for m in again
    ]
    other = draw_mix(Mixing(kind="mixup", probability=1.0), 6, 32, seed=2, epoch=0, step=0)
    mine = draw_mix(Mixing(kind="mixup", probability=1.0), 6, 32, seed=1, epoch=0, step=0)
    assert other is not None
    assert mine is not None
    assert other.share != mine.share
