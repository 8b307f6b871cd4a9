"""Two injected faults: a harmed challenger that the gate must refuse, and a copy of the model for a swap.

Both write a bundle and nothing else; the stage that asks for one registers or serves it.
"""

from records.bundles import Bundle, write_bundle
from records.errors import ContractError
from records.store import Store
from records.taxonomy import Taxonomy


def harmed_copy(store: Store, bundle: Bundle) -> Bundle:
    """Return a copy of a model that gives the key class a probability near zero.

    It is neither registered nor served. ContractError if the taxonomy has no key class.
    """
    key = store.taxonomy.key_class
    if key is None:
        raise ContractError("the gate fault needs a taxonomy with a key class")
    # Only the key class's bias changes, so the average over all classes hardly suffers: a gate that
    # compared averages would let this model pass.
    bias = list(bundle.document.calibration.bias)
    bias[store.taxonomy.index_of(key.code)] -= 6.0
    calibration = bundle.document.calibration.model_copy(update={"bias": bias})
    document = bundle.document.model_copy(
        update={
            "calibration": calibration,
            "parent_model_id": bundle.id,
            "metrics": {"fault": f"{key.code} suppressed"},
        }
    )
    return write_bundle(store, document, bundle.weights(), bundle.golden(), bundle.suitability())


def twin(store: Store, bundle: Bundle) -> Bundle:
    """Return a copy of a model under a new id; its predictions are the same, so a swap to it changes no response."""
    document = bundle.document.model_copy(
        update={
            "parent_model_id": bundle.id,
            "metrics": {**bundle.document.metrics, "fault": "copy for a swap"},
        }
    )
    return write_bundle(store, document, bundle.weights(), bundle.golden(), bundle.suitability())


def harm_in_words(taxonomy: Taxonomy) -> str:
    """Describe the harmed challenger."""
    key = taxonomy.key_class
    return f"a copy of the model with p({key.code if key else '?'}) pushed towards zero on purpose"
