"""Two injected faults: a harmed challenger that the gate must refuse, and a copy of the model for a swap.

Both write a bundle and nothing else; the stage that asks for one registers or serves it.
"""

from records.bundles import Bundle, write_bundle
from records.store import Store
from records.taxonomy import Taxonomy


def harmed_copy(store: Store, bundle: Bundle) -> Bundle:
    """Return a copy of a model that gives one class a probability near zero; it is neither registered nor served."""
    code = harmed_class(store.taxonomy)
    # Only one class's bias changes, so the average over all classes hardly suffers: a gate that
    # compared averages would let this model pass.
    bias = list(bundle.document.calibration.bias)
    bias[store.taxonomy.index_of(code)] -= 6.0
    calibration = bundle.document.calibration.model_copy(update={"bias": bias})
    document = bundle.document.model_copy(
        update={"calibration": calibration, "parent_model_id": bundle.id, "metrics": {"fault": f"{code} suppressed"}}
    )
    return write_bundle(store, document, bundle.weights(), bundle.golden(), bundle.suitability())


def twin(store: Store, bundle: Bundle) -> Bundle:
    """Return a copy of a model under a new id; its predictions are the same, so a swap to it changes no response."""
    document = bundle.document.model_copy(
        update={"parent_model_id": bundle.id, "metrics": {**bundle.document.metrics, "fault": "copy for a swap"}}
    )
    return write_bundle(store, document, bundle.weights(), bundle.golden(), bundle.suitability())


def harm_in_words(taxonomy: Taxonomy) -> str:
    """Describe the harmed challenger."""
    return f"a copy of the model with p({harmed_class(taxonomy)}) pushed towards zero on purpose"


def harmed_class(taxonomy: Taxonomy) -> str:
    """Return the code of the class that the harmed challenger misses: the key class, else the costliest to miss."""
    if taxonomy.key_class is not None:
        return taxonomy.key_class.code
    return max(taxonomy.classes, key=lambda one: one.miss_cost).code
