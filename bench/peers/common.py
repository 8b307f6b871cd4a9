"""What all peers share: the network that Relook wrote for them, and how an image becomes what it sees.

The network is the one that Relook serves, batch norm folded and channels last, so that what differs is the serving.
Nothing here needs Relook.
"""

import io
import os
from typing import Any

import numpy as np
import torch
from PIL import Image

MAX_BATCH = 16


class Network:
    """The network in the file that the environment variable RELOOK_PEER_MODEL names."""

    def __init__(self) -> None:
        found = torch.load(os.environ["RELOOK_PEER_MODEL"], weights_only=False)
        self.network, self.side_px, self.codes = found["network"], found["side_px"], found["codes"]
        mean, std = torch.tensor(found["mean"]).view(1, 3, 1, 1), torch.tensor(found["std"]).view(1, 3, 1, 1)
        self.scale, self.shift = 1.0 / (255.0 * std), mean / std
        self.bf16 = found["precision"] == "bf16"

    def decode(self, data: bytes) -> np.ndarray:
        """Return an image's centre square, uint8 [S, S, 3]."""
        return self.square(Image.open(io.BytesIO(data)))

    def square(self, image: Image.Image) -> np.ndarray:
        """Return the centre square, uint8 [S, S, 3]; a JPEG is reduced while it is decoded."""
        image.draft("RGB", (self.side_px, self.side_px))
        image = image.convert("RGB")
        shorter = min(image.size)
        left, top = (image.width - shorter) / 2, (image.height - shorter) / 2
        box = (left, top, left + shorter, top + shorter)
        return np.asarray(image.resize((self.side_px, self.side_px), Image.Resampling.BICUBIC, box=box))

    def inputs(self, pixels: list[np.ndarray]) -> torch.Tensor:
        """Return what the network sees, float32 [N, 3, S, S]."""
        planes = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
        return planes.mul_(self.scale).sub_(self.shift)

    def predict(self, pixels: list[np.ndarray]) -> list[dict[str, Any]]:
        """Return label and probabilities of each image."""
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            rows = self.network(self.inputs(pixels)).float().softmax(dim=1)
        return [
            {"label": self.codes[int(row.argmax())], "probabilities": dict(zip(self.codes, row.tolist(), strict=True))}
            for row in rows
        ]
