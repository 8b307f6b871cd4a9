"""Several networks as one: their feature maps side by side, and the weighted mean of their logits.

Every network here is `features` and `head`, and so is an ensemble. `features` scales the pixels to what each member was
trained on and stacks the members' feature maps as channels, on the finest of their grids; `head` takes the channels
apart again and weighs the members' logits. So whatever works on a network works on an ensemble: calibration, views,
distances from the training images, heat maps, export and engines.

In: records of members, as a bundle's architecture holds them. Out: the network. `trainers.fitting.combine` makes such
records.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from records.bundles import Geometry
from vision.networks.registry import build_model


class Ensemble(nn.Module):
    """The network: [N, 3, S, S] -> logits [N, C].

    Args:
        features: [N, 3, S, S] -> the members' feature maps as channels.
        head: these -> logits.
    """

    def __init__(self, features: "EnsembleFeatures", head: "EnsembleHead") -> None:
        super().__init__()
        self.features = features
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits [N, C] for [N, 3, S, S]."""
        logits: Tensor = self.head(self.features(inputs))
        return logits


class EnsembleFeatures(nn.Module):
    """The members' features, each behind its own scaling of pixels and before one grid.

    Args:
        members: [N, 3, S, S] -> [N, K, h, w].
        scalings: from the ensemble's scaling of pixels to each member's.
        resamplings: from each member's grid to the ensemble's.
    """

    def __init__(
        self, members: Sequence[nn.Module], scalings: Sequence[nn.Module], resamplings: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.scalings = nn.ModuleList(scalings)
        self.resamplings = nn.ModuleList(resamplings)
        self.maps = nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the maps of all members, [N, sum of K, H, W]."""
        steps = zip(self.scalings, self.members, self.resamplings, strict=True)
        maps: Tensor = self.maps(torch.cat([resample(member(scale(inputs))) for scale, member, resample in steps], 1))
        return maps


class EnsembleHead(nn.Module):
    """The weighted mean of the members' logits.

    Args:
        members: heads, [N, K, H, W] -> logits [N, C].
        channels: K of each member.
        weights: of each member's logits, adding up to 1.
    """

    def __init__(self, members: Sequence[nn.Module], channels: Sequence[int], weights: Sequence[float]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.channels = list(channels)
        self.weights = tuple(weights)

    def forward(self, maps: Tensor) -> Tensor:
        """Return logits [N, C]."""
        parts = zip(self.weights, self.members, torch.split(maps, self.channels, dim=1), strict=True)
        logits = [weight * head(part) for weight, head, part in parts]
        return torch.stack(logits).sum(dim=0)


class AffineScaling(nn.Module):
    """Pixels of one scaling as those of another: both take a mean away and divide by a deviation."""

    factor: Tensor
    shift: Tensor

    def __init__(self, given: Geometry, wanted: Geometry) -> None:
        super().__init__()
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float64)[:, None, None]
            for values in (given.mean, given.std, wanted.mean, wanted.std)
        )
        # Not part of the weights: the architecture says which scalings they are.
        self.register_buffer("factor", (std / own_std).float(), persistent=False)
        self.register_buffer("shift", ((mean - own_mean) / own_std).float(), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Scale [N, 3, S, S]."""
        return inputs * self.factor + self.shift


class RangeScaling(AffineScaling):
    """Pixels of mean and deviation as those of each image's own range, see `vision.preprocess.scale_pixels`."""

    def __init__(self, given: Geometry) -> None:
        super().__init__(given, Geometry(side_px=given.side_px, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Scale [N, 3, S, S]."""
        values = super().forward(inputs)
        low, high = values.amin(dim=(1, 2, 3), keepdim=True), values.amax(dim=(1, 2, 3), keepdim=True)
        return (values - low) / (high - low).clamp(min=1.0 / 255.0)


class Resampling(nn.Module):
    """Maps on a finer grid: each position gets the mean of the map over its area.

    So the mean over all positions stays what it was, and with it the logits of heads that pool first.

    Args:
        given: height and width of the maps.
        wanted: of the finer grid.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, given: tuple[int, int], wanted: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("rows", _areas(given[0], wanted[0]), persistent=False)
        self.register_buffer("columns", _areas(given[1], wanted[1]).t().contiguous(), persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Resample [N, K, h, w] to [N, K, H, W]."""
        return self.rows @ maps @ self.columns


def ensemble(num_classes: int, *, members: Sequence[Mapping[str, Any]], geometry: Mapping[str, Any]) -> Ensemble:
    """Build an ensemble with fresh weights.

    Args:
        num_classes: C.
        members: of each its architecture (`name`, `options`), `geometry`, the shape of its feature `map` as [K, h, w],
            and the `weight` of its logits.
        geometry: of the ensemble; its side is that of all members.
    Returns:
        The network.
    """
    given = Geometry.model_validate(geometry)
    networks = [build_model(str(one["name"]), num_classes, **one["options"]) for one in members]
    grid = finest_grid([one["map"] for one in members])
    features = EnsembleFeatures(
        [network.get_submodule("features") for network in networks],
        [scaling_between(given, Geometry.model_validate(one["geometry"])) for one in members],
        [_resampling((one["map"][1], one["map"][2]), grid) for one in members],
    )
    head = EnsembleHead(
        [network.get_submodule("head") for network in networks],
        [int(one["map"][0]) for one in members],
        [float(one["weight"]) for one in members],
    )
    return Ensemble(features, head)


def finest_grid(maps: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return height and width of the largest of the maps [K, h, w]."""
    return max(one[1] for one in maps), max(one[2] for one in maps)


def scaling_between(given: Geometry, wanted: Geometry) -> nn.Module:
    """Return what makes pixels of one scaling those of another; a range cannot be undone, so it is only for itself."""
    if (given.scaling, given.mean, given.std) == (wanted.scaling, wanted.mean, wanted.std):
        return nn.Identity()
    if wanted.scaling == "min_max":
        return nn.Identity() if given.scaling == "min_max" else RangeScaling(given)
    return AffineScaling(given, wanted)


def _resampling(given: tuple[int, int], wanted: tuple[int, int]) -> nn.Module:
    return nn.Identity() if given == wanted else Resampling(given, wanted)


def _areas(given: int, wanted: int) -> Tensor:
    """Return how much of each new position lies in each old one, [wanted, given]; rows add up to 1."""
    new, old = (
        torch.arange(wanted + 1, dtype=torch.float64) / wanted,
        torch.arange(given + 1, dtype=torch.float64) / given,
    )
    low = torch.maximum(new[:-1, None], old[None, :-1])
    high = torch.minimum(new[1:, None], old[None, 1:])
    return ((high - low).clamp(min=0.0) * wanted).float()
