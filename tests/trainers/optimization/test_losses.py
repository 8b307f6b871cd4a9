"""Losses against numbers computed by hand, and each over two halves of a batch as over the whole."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from records.errors import ConfigError
from records.taxonomy import DiagnosisClass, Taxonomy
from trainers.optimization.losses import LOSSES, LossContext, build_loss, class_weights, cost_weights
from trainers.settings import LossSettings


def taxonomy(*costs: float) -> Taxonomy:
    return Taxonomy(
        name="letters",
        version=1,
        classes=tuple(
            DiagnosisClass(code="abc"[i], name="abc"[i], malignant=i == 2, miss_cost=cost)
            for i, cost in enumerate(costs)
        ),
    )


LABELS = np.array([0] * 6 + [1] * 3 + [2] * 1)
LOGITS = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, -1.0], [0.0, 1.0, 3.0], [1.0, 1.0, 0.0]])
TRUE = torch.tensor([0, 0, 2, 1])


def test_there_are_five() -> None:
    assert LOSSES.names == ("cross_entropy", "class_weighted", "focal", "cost_sensitive", "logit_adjusted")


def test_weights_by_hand() -> None:
    context = LossContext(shown=np.array([6.0, 3.0, 1.0]), miss_costs=np.array([1.0, 1.0, 11.0]))
    assert class_weights(context) == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert cost_weights(context) == pytest.approx([0.5, 0.5, 5.5])
    assert class_weights(LossContext(np.array([4.0, 0.0]), np.ones(2))) == pytest.approx([1.0, 0.0])


def test_a_balanced_sampler_leaves_nothing_to_weigh() -> None:
    balanced = build_loss(LossSettings(name="class_weighted"), LABELS, taxonomy(1, 1, 1), sampler="balanced")
    assert balanced(LOGITS, TRUE).item() == pytest.approx(cross_entropy(LOGITS, TRUE).item())


def test_natural_and_square_root_samplers_by_hand() -> None:
    each = cross_entropy(LOGITS, TRUE, reduction="none")
    for sampler, shown in (("natural", [6, 3, 1]), ("square_root", [6**0.5, 3**0.5, 1])):
        weights = class_weights(LossContext(np.array(shown, dtype=float), np.ones(3)))
        loss = build_loss(LossSettings(name="class_weighted"), LABELS, taxonomy(1, 1, 1), sampler=sampler)
        expected = (each * torch.tensor(weights[TRUE.numpy()])).mean()
        assert loss(LOGITS, TRUE).item() == pytest.approx(expected.item(), rel=1e-5)


def test_focal_by_hand_and_without_focus_the_plain_one() -> None:
    p = LOGITS.softmax(1)[torch.arange(4), TRUE]
    loss = build_loss(LossSettings(name="focal", focal_gamma=2.0), LABELS, taxonomy(1, 1, 1), sampler="square_root")
    assert loss(LOGITS, TRUE).item() == pytest.approx(((1 - p) ** 2 * -p.log()).mean().item(), rel=1e-5)
    plain = build_loss(LossSettings(name="focal", focal_gamma=0.0), LABELS, taxonomy(1, 1, 1), sampler="square_root")
    assert plain(LOGITS, TRUE).item() == pytest.approx(cross_entropy(LOGITS, TRUE).item(), rel=1e-5)


def test_focal_stays_finite_where_the_answer_is_certain() -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    loss = build_loss(LossSettings(name="focal", focal_gamma=0.5), LABELS, taxonomy(1, 1, 1), sampler="square_root")
    loss(logits, torch.tensor([0])).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_a_costly_class_pulls_harder() -> None:
    settings = LossSettings(name="cost_sensitive")
    cheap, dear = (build_loss(settings, LABELS, taxonomy(1, 1, cost), sampler="natural") for cost in (1, 11))
    missed = torch.tensor([[3.0, 0.0, 0.0]])
    assert dear(missed, torch.tensor([2])).item() == pytest.approx(5.5 * cheap(missed, torch.tensor([2])).item())


@pytest.mark.parametrize(("sampler", "shown"), [("natural", [6.0, 3.0, 1.0]), ("balanced", [1.0, 1.0, 1.0])])
def test_the_logit_adjusted_loss_is_the_formula(sampler: str, shown: list[float]) -> None:
    # Menon et al. 2021, equation 10: log(1 + sum over the others of (share / own share)^strength e^(f - own f)).
    settings = LossSettings(name="logit_adjusted", adjust_strength=1.5)
    shares, f = np.array(shown) / sum(shown), LOGITS.numpy().astype(np.float64)
    expected = [
        np.log1p(sum((shares[c] / shares[y]) ** 1.5 * np.exp(f[row, c] - f[row, y]) for c in range(3) if c != y))
        for row, y in enumerate(TRUE.tolist())
    ]
    loss = build_loss(settings, LABELS, taxonomy(1, 1, 1), sampler=sampler)
    assert loss(LOGITS, TRUE).item() == pytest.approx(np.mean(expected), rel=1e-5)
    # A class without training images is pushed down, and the loss stays finite.
    logits = torch.zeros(1, 3, requires_grad=True)
    build_loss(settings, LABELS[:9], taxonomy(1, 1, 1), sampler=sampler)(logits, torch.tensor([0])).backward()
    assert logits.grad is not None
    assert 0 < logits.grad[0, 2] < 1


def test_without_the_class_shares_the_rare_class_is_found_by_the_logarithm_of_its_rarity() -> None:
    counts, random = np.array([400, 80, 16]), np.random.default_rng(0)
    labels = np.repeat(np.arange(3), counts)
    inputs = torch.tensor(random.normal(size=(len(labels), 2)) + np.array([[0, 0], [1, 0], [0, 1]])[labels])

    def fitted(name: str) -> np.ndarray:
        layer = torch.nn.Linear(2, 3, dtype=torch.float64)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.LBFGS(
            layer.parameters(), max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
        )
        loss = build_loss(LossSettings(name=name), labels, taxonomy(1, 1, 1), sampler="natural")

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            value = loss(layer(inputs), torch.from_numpy(labels))
            value.backward()
            return value

        optimizer.step(step)
        logits: np.ndarray = layer(inputs).detach().numpy()
        return logits - logits.mean(axis=1, keepdims=True)

    plain, adjusted = fitted("cross_entropy"), fitted("logit_adjusted")
    # The best logits of a convex problem: the plain ones, less the logarithm of each class's share.
    rarity = -np.log(counts / counts.sum())
    assert adjusted - plain == pytest.approx(np.tile(rarity - rarity.mean(), (len(labels), 1)), abs=1e-3)
    rare = labels == 2
    assert (adjusted[rare].argmax(axis=1) == 2).mean() > (plain[rare].argmax(axis=1) == 2).mean()


def test_costs_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="every miss_cost of the taxonomy is 0"):
        build_loss(LossSettings(name="cost_sensitive"), LABELS, taxonomy(0, 0, 0), sampler="square_root")


@pytest.mark.parametrize("name", LOSSES)
def test_two_halves_are_the_whole(name: str) -> None:
    settings = LossSettings(name=name, label_smoothing=0.1)
    loss = build_loss(settings, LABELS, taxonomy(1, 2, 10), sampler="natural")
    halves = (loss(LOGITS[:2], TRUE[:2]) + loss(LOGITS[2:], TRUE[2:])) / 2
    assert halves.item() == pytest.approx(loss(LOGITS, TRUE).item(), rel=1e-6)
