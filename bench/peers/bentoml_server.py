"""BentoML with adaptive batching on the endpoint itself, so that there is no hop between two of its services.

RELOOK_PEER_MODEL=FILE PEER/bin/bentoml serve bench/peers/bentoml_server.py:Classifier --port PORT
"""

from typing import Any

import bentoml
from common import MAX_BATCH, Network
from PIL.Image import Image


@bentoml.service(resources={"cpu": "2"}, workers=1, traffic={"timeout": 60})
class Classifier:
    """Predicts lists of images; BentoML joins the lists of several requests."""

    def __init__(self) -> None:
        self.network = Network()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=10_000)
    def predict(self, images: list[Image]) -> list[dict[str, Any]]:
        """Predict a batch."""
        return self.network.predict([self.network.square(image) for image in images])
