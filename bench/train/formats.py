"""Images per second of a training step and of a forward pass in bf16 and in fp32, by network, on this processor.

The two formats take turns, so that what else the machine does meets both alike; the fastest of the turns counts.

    .venv/bin/python -m bench.train.formats --side 128                       # the catalogue
    .venv/bin/python -m bench.train.formats --networks timm/ghostnet_100
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import nn

from records.progress import progress
from vision.networks import MODELS, build_model
from vision.precision import Precision, autocast, training_precision

BATCH = 16
SECONDS = 4.0
FEWEST, MOST = 3, 12
Figures = dict[Precision, float]


def step_rates(network: nn.Module, side_px: int) -> Figures:
    """Return the images per second of a step of gradient descent, by format."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9)
    inputs, labels, loss_of = _inputs(side_px), torch.randint(0, 7, (BATCH,)), nn.CrossEntropyLoss()

    def step(precision: Precision) -> None:
        with autocast(precision):
            logits = network(inputs)
        loss = loss_of(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    network.train()
    return _rates(step)


def forward_rates(network: nn.Module, side_px: int) -> Figures:
    """Return the images per second of a forward pass, by format."""
    inputs = _inputs(side_px)

    def forward(precision: Precision) -> None:
        with torch.inference_mode(), autocast(precision):
            network(inputs)

    network.eval()
    return _rates(forward)


def _inputs(side_px: int) -> torch.Tensor:
    return torch.rand(BATCH, 3, side_px, side_px).to(memory_format=torch.channels_last)


def _rates(work: Callable[[Precision], None]) -> Figures:
    shortest: dict[Precision, float] = {"bf16": float("inf"), "fp32": float("inf")}
    began_s, turns = time.perf_counter(), 0
    while turns <= FEWEST or (turns <= MOST and time.perf_counter() - began_s < SECONDS):
        for precision in shortest:
            turn_s = time.perf_counter()
            work(precision)
            if turns:  # the first turn warms up
                shortest[precision] = min(shortest[precision], time.perf_counter() - turn_s)
        turns += 1
    return {precision: round(BATCH / seconds, 1) for precision, seconds in shortest.items()}


def main() -> None:
    """Print one JSON object per network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--networks", nargs="+", default=list(MODELS))
    options = parser.parse_args()
    with progress() as bar:
        for name in bar.track(options.networks, description="networks"):
            network = build_model(name, 7, **({"side_px": options.side} if name.startswith("timm/") else {}))
            network = network.to(memory_format=torch.channels_last)
            chosen = training_precision("auto", network)
            step, forward = step_rates(network, options.side), forward_rates(network, options.side)
            print(json.dumps({"network": name, "chosen": chosen, "step": step, "forward": forward}), flush=True)


if __name__ == "__main__":
    main()
