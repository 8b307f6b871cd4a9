"""A predictor whose device is fake: a forward pass takes a known time and no core, so that replicas can be measured.

In: the latency of one batch. Out: a class for `build_application`. Loading, decoding, triage, ledger and HTTP are real;
of the network, the output for the first image of each batch size is computed once and returned for every image.
"""

import sys
import time
from typing import Any

from ray import cloudpickle

from records.settings import RecordsSettings
from records.store import Store
from records.types import ModelRecord
from serving.deployments import PredictorReplica
from serving.settings import ServingSettings


def fake_device(latency_s: float) -> type[PredictorReplica]:
    """Return the class of a replica whose forward passes take `latency_s`."""
    # The bench is not installed on the nodes, so its code travels with the class.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]

    class FakeDeviceReplica(PredictorReplica):
        """Runs a `Predictor` on a fake device."""

        def __init__(self, settings: ServingSettings, records: RecordsSettings) -> None:
            from serving import holder
            from serving.rollout import candidate

            load = holder.load_served

            def load_slow(store: Store, named: ModelRecord, settings: ServingSettings) -> Any:
                served = load(store, named, settings)
                loaded: Any = served.loaded
                loaded.predict = sleeping(loaded.predict, latency_s)
                return served

            for module in (holder, candidate):
                module.load_served = load_slow  # type: ignore[attr-defined]
            super().__init__(settings, records)

    return FakeDeviceReplica


def sleeping(predict: Any, latency_s: float) -> Any:
    """Return a forward pass that sleeps and then gives the output that `predict` gave for the first such batch."""
    outputs: dict[tuple[int, ...], Any] = {}

    def slow(pixels: Any, **given: Any) -> Any:
        began_s = time.perf_counter()
        if pixels.shape not in outputs:
            outputs[pixels.shape] = predict(pixels, **given)
        time.sleep(max(0.0, latency_s - (time.perf_counter() - began_s)))
        return outputs[pixels.shape]

    return slow
