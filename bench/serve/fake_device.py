"""A predictor whose device is fake: a forward pass takes a known time and no core, so that the rest can be measured.

In: the latency of one batch. Out: a class for `build_application`. Loading, decoding, triage, ledger and HTTP are real;
of the network, the output for one image is computed once and returned for every image.
"""

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from records.settings import RecordsSettings
    from records.store import Store
    from records.types import ModelRecord
    from serving.deployments import PredictorReplica
    from serving.settings import ServingSettings


def fake_device(latency_s: float) -> "type[PredictorReplica]":
    """Return the class of a replica whose forward passes take `latency_s`."""
    # `sleeping` is also used where there is no Ray.
    from ray import cloudpickle

    from serving.deployments import PredictorReplica

    # The bench is not installed on the nodes, so its code travels with the class.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]

    class FakeDeviceReplica(PredictorReplica):
        """Runs a `Predictor` on a fake device."""

        def __init__(self, settings: "ServingSettings", records: "RecordsSettings") -> None:
            # Kept, since the block that it opens ends with the process.
            self._device = fake_models(latency_s)
            self._device.__enter__()
            super().__init__(settings, records)

    return FakeDeviceReplica


@contextlib.contextmanager
def fake_models(latency_s: float) -> "Iterator[None]":
    """Give models that are loaded for serving in this process, in this block, a fake device."""
    from serving import holder
    from serving.rollout import candidate

    load = holder.load_served

    def load_slow(store: "Store", named: "ModelRecord", settings: "ServingSettings") -> Any:
        served = load(store, named, settings)
        loaded: Any = served.loaded
        loaded.predict = sleeping(loaded.predict, latency_s)
        return served

    modules: list[Any] = [holder, candidate]
    for module in modules:
        module.load_served = load_slow
    try:
        yield
    finally:
        for module in modules:
            module.load_served = load


def sleeping(predict: Any, latency_s: float) -> Any:
    """Return a forward pass that sleeps, and gives for every image what `predict` gave for the first of its size."""
    outputs: dict[tuple[Any, ...], Any] = {}

    def slow(pixels: Any, *, gradcam: bool = False, **given: Any) -> Any:
        began_s = time.perf_counter()
        kind = (gradcam, *pixels.shape[1:])
        if kind not in outputs:
            outputs[kind] = predict(pixels, gradcam=gradcam, **given).take([0])
        found = outputs[kind].take([0] * len(pixels))
        time.sleep(max(0.0, latency_s - (time.perf_counter() - began_s)))
        return found

    return slow
