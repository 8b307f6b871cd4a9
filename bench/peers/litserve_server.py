"""LitServe with dynamic batching, one worker with all cores: what its guides advise for one network on a CPU.

RELOOK_PEER_MODEL=FILE PEER/bin/python bench/peers/litserve_server.py PORT
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import litserve
import numpy as np
from common import MAX_BATCH, Network


class Classifier(litserve.LitAPI):
    """Images come as forms; a batch is decoded by two threads."""

    def setup(self, device: str) -> None:
        """Load the network."""
        self.network, self.threads = Network(), ThreadPoolExecutor(2)

    def decode_request(self, request) -> bytes:  # an annotation would become part of its API
        """Return the image's bytes."""
        data: bytes = request["image"].file.read()
        return data

    def batch(self, inputs: list[bytes]) -> list[np.ndarray]:
        """Decode a batch."""
        return list(self.threads.map(self.network.decode, inputs))

    def predict(self, inputs: list[np.ndarray]) -> list[dict[str, Any]]:
        """Predict a batch."""
        return self.network.predict(inputs)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the predictions one by one."""
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Return the body."""
        return output


if __name__ == "__main__":
    api = Classifier(max_batch_size=MAX_BATCH, batch_timeout=0.005)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
