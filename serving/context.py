"""The context of images as callers give it, and what it changed about a prediction, as the response says it."""

from collections.abc import Mapping, Sequence

from records.bundles import BundleDocument
from records.context import COLUMNS, Known
from records.errors import ConfigError
from serving.schemas import ContextEffect, ContextInfo
from vision.calibration.decision import labels_of
from vision.inference.output import BatchOutput


def effect_of(output: BatchOutput, row: int, document: BundleDocument) -> ContextEffect | None:
    """Say what the context of one image of a batch changed.

    Args:
        output: of the model.
        row: of the image.
        document: of the model's bundle.
    Returns:
        The effect; None if no column of the model's context was given, or the output is not finite.
    """
    if output.without_context is None or output.context is None or not output.finite[row]:
        return None
    use, without = output.context[row], output.without_context[row]
    if not use.used and not use.unknown:
        return None
    label = int(labels_of(without[None], document.operating.decision)[0])
    codes = document.taxonomy.codes
    return ContextEffect(
        used=list(use.used),
        unknown=list(use.unknown),
        label_without=codes[label],
        confidence_without=float(without[label]),
        probabilities_without=dict(zip(codes, without.tolist(), strict=True)),
    )


def known_given(context: Known | Sequence[Known] | None, images: int) -> list[Known]:
    """Return the context that a caller gave for some images.

    Args:
        context: one mapping for all, one per image, or None; columns are those of a request's context.
        images: their number.
    Returns:
        One mapping per image.
    Raises:
        ConfigError: there are not as many as images, or one names a column that does not exist.
    """
    each = [context or {}] * images if context is None or isinstance(context, Mapping) else list(context)
    if len(each) != images:
        raise ConfigError(f"context has {len(each)} entries for {images} images; give one for each, or one for all")
    for known in each:
        if not isinstance(known, Mapping):
            raise ConfigError(
                f"context holds {type(known).__name__}; give mappings, such as {{'age': 61, 'sex': 'male'}}"
            )
        unknown = sorted(set(known) - set(COLUMNS))
        if unknown:
            raise ConfigError(f"context names {unknown[0]!r}; the columns are {', '.join(COLUMNS)}")
    return each


def context_info(document: BundleDocument) -> list[ContextInfo]:
    """Return which columns of the context a model uses, with the values that it knows."""
    head = document.context
    return [
        ContextInfo(
            name=part.name,
            kind=part.kind,
            values=list(part.values),
            low=part.knots[0] if part.knots else None,
            high=part.knots[-1] if part.knots else None,
        )
        for part in (head.columns if head is not None and head.weight > 0 else [])
    ]
