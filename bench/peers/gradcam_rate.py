"""How many Grad-CAM maps a second pytorch-grad-cam makes, on the network that Relook serves.

RELOOK_PEER_MODEL=FILE PEER/bin/python bench/peers/gradcam_rate.py --batch 16 --seconds 5
"""

import argparse
import json
import time

import numpy as np
import torch
from common import Network
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget


def main() -> None:
    """Print the rate as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    network = Network()
    # It differentiates with respect to the last features, and frozen weights would leave nothing to differentiate.
    network.network.requires_grad_(True)
    side = network.side_px
    pixels = np.random.default_rng(0).integers(0, 256, (options.batch, side, side, 3), dtype=np.uint8)
    inputs = network.inputs(list(pixels))
    targets = [ClassifierOutputTarget(0)] * options.batch
    with GradCAM(model=network.network, target_layers=[network.network.features]) as cam:
        cam(input_tensor=inputs, targets=targets)
        began, maps = time.perf_counter(), 0
        while maps == 0 or time.perf_counter() - began < options.seconds:
            maps += len(cam(input_tensor=inputs, targets=targets))
        seconds = time.perf_counter() - began
    print(json.dumps({"maps_s": maps / seconds, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
