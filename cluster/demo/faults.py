"""Two planted tests, each said to be one: a harmed challenger for the gate, and a swap under traffic."""

from records.bundles import Bundle, write_bundle
from records.errors import ContractError
from records.store import Store
from records.taxonomy import Taxonomy


def harmed_copy(store: Store, bundle: Bundle) -> Bundle:
    """Copy a model and harm the copy: the key class's calibrated probability is pushed towards zero.

    Its answers for all other classes stay as they are, so its average hardly suffers, and that is
    the point: a gate that looks at averages would let it pass.

    Args:
        store: where the copy is written; it is neither registered nor served.
        bundle: the model that is copied.
    Returns:
        The harmed bundle.
    Raises:
        ContractError: the taxonomy has no key class.
    """
    key = store.taxonomy.key_class
    if key is None:
        raise ContractError("a taxonomy without a key class has nothing to harm")
    bias = list(bundle.document.calibration.bias)
    bias[store.taxonomy.index_of(key.code)] -= 6.0
    calibration = bundle.document.calibration.model_copy(update={"bias": bias})
    document = bundle.document.model_copy(
        update={
            "calibration": calibration,
            "parent_model_id": bundle.id,
            "metrics": {"planted": f"{key.code} suppressed"},
        }
    )
    return write_bundle(store, document, bundle.weights(), bundle.golden(), bundle.suitability())


def twin(store: Store, bundle: Bundle) -> Bundle:
    """Copy a model under a new id: it answers exactly the same, so swapping to it harms nobody.

    Args:
        store: where the copy is written.
        bundle: the model that is copied.
    Returns:
        The copy.
    """
    document = bundle.document.model_copy(
        update={
            "parent_model_id": bundle.id,
            "metrics": {**bundle.document.metrics, "planted": "copy for a swap drill"},
        }
    )
    return write_bundle(store, document, bundle.weights(), bundle.golden(), bundle.suitability())


def harm_in_words(taxonomy: Taxonomy) -> str:
    """Say what the harmed challenger is."""
    key = taxonomy.key_class
    return f"a copy of the model whose p({key.code if key else '?'}) was pushed towards zero on purpose"
