"""Several trained models as one bundle: an ensemble, calibrated as one model.

Weights are the members' own; what is fitted anew is all that follows the logits: calibration, weight of the context,
decision rule, thresholds, prediction sets and the checks of images. It reads the splits that a training reads, and the
same models, weights and data give the same bundle.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import nn

from images.cache import PixelCache
from records.bundles import Architecture, Bundle, Geometry, Member
from records.errors import ConfigError
from records.models import register
from records.types import Split
from trainers.fitting.context import fitted_context
from trainers.fitting.fit import FITTED_ON, Choices, Origin, require_splits, write_fitted
from trainers.fitting.loop import TrainedModel
from trainers.fitting.run import write_own_report
from trainers.fitting.suitability import sample_of_train
from trainers.fitting.teacher import require_unseen
from trainers.fitting.training_data import DataPlan, plan_data
from trainers.fitting.workers import threads_of
from vision.calibration.decision import decision_rule
from vision.explanations.closed_form import closed_form_of
from vision.inference.loaded import load_weights, plain_network
from vision.networks import build_model
from vision.networks.ensemble import finest_grid
from vision.networks.registry import ENSEMBLE

if TYPE_CHECKING:
    from rich.progress import Progress

    from records.datasets import DatasetVersion
    from records.store import Store
    from trainers.settings import TrainersSettings


def choices_of(bundle: Bundle) -> list[str]:
    """Return how a model is used, as texts that settings are composed of."""
    document = bundle.document
    decision = document.operating.decision
    texts = {"views": document.views, "context": str(document.context is not None).lower()}
    texts |= {"decision.rule": decision.rule, "decision.point": decision.point}
    sensitivity = document.config.get("decision", {}).get("target_sensitivity")
    texts |= {} if sensitivity is None else {"decision.target_sensitivity": sensitivity}
    return [f"trainers.{name}={value}" for name, value in texts.items()]


def shares_of(weights: str | Sequence[float] | None, count: int) -> list[float]:
    """Return weights, also of a text such as `1,0.5`, scaled so that they add up to 1; without weights they are equal.

    Raises ConfigError: they are not as many positive numbers as there are models.
    """
    if not count:
        raise ConfigError("name one model or more")
    weights = [1.0] * count if weights is None else weights
    try:
        given = [float(one) for one in (weights.split(",") if isinstance(weights, str) else weights)]
    except ValueError:
        given = []
    if len(given) != count or not all(0.0 < value < float("inf") for value in given):
        raise ConfigError(f"weights are {weights!r}; they must be {count} numbers above 0, one per model, as 1,0.5")
    return [value / sum(given) for value in given]


def combine_and_register(
    store: "Store",
    bundles: Sequence[Bundle],
    weights: Sequence[float],
    dataset: "DatasetVersion",
    settings: "TrainersSettings",
    progress: "Progress",
) -> Bundle:
    """Make several models one, register its bundle and write its report.

    Args:
        store: with the images; it gets the bundle.
        bundles: the members; one alone is calibrated anew, with other views, context or decision rule.
        weights: of the members' logits, adding up to 1.
        dataset: the version whose val and calibration splits fit what follows the logits.
        settings: views, context, decision and threads are read from it.
        progress: bars are added to it.
    Returns:
        The bundle, registered.
    Raises:
        ConfigError: the members do not fit together.
        TaxonomyError: a member has other classes.
        RefusedError: a member was trained on calibration, gate or test of the dataset, or nobody can tell.
        DataError: a split is empty, or an image cannot be read.
    """
    bundle = combine(store, bundles, weights, dataset, settings, progress)
    with store.ledger.begin() as tx:
        register(tx, bundle)
    write_own_report(store, settings, bundle, dataset, progress)
    return bundle


def combine(
    store: "Store",
    bundles: Sequence[Bundle],
    weights: Sequence[float],
    dataset: "DatasetVersion",
    settings: "TrainersSettings",
    progress: "Progress | None" = None,
) -> Bundle:
    """Write the bundle of an ensemble; see `combine_and_register`."""
    _require_fitting(bundles)
    # A member that was refitted has seen val: then calibration alone fits what follows the logits.
    fitting = (Split.TRAIN, Split.VAL)
    seen = [require_unseen(store, bundle, dataset, "member", may_see=fitting) for bundle in bundles]
    trained_on = tuple(split for split in fitting if split is Split.TRAIN or any(split in one for one in seen))
    require_splits(dataset)
    # Before the images are scored: a rule that the taxonomy has no costs for would be refused after it.
    decision_rule(settings.decision.rule, store.taxonomy, dict.fromkeys(store.taxonomy.codes, 1.0))
    plan = plan_data(dataset, store.taxonomy, trained_on)
    context = fitted_context(store, plan, settings.context)
    architecture, network = ensemble_of(bundles, weights)
    geometry = Geometry.model_validate(architecture.options["geometry"])
    held = [str(image_id) for split in FITTED_ON for image_id in dataset.split(split)["image_id"]]
    cache = PixelCache(store.home.cache, geometry.frame)
    cache.ensure(store, [*sample_of_train(store, dataset), *held], progress)
    trained = TrainedModel(network, geometry, [], 0, threads_of(settings.workers))
    members = tuple(
        Member(model_id=bundle.id, dataset_id=bundle.document.dataset_id, weight=weight)
        for bundle, weight in zip(bundles, weights, strict=True)
    )
    used = settings.model_dump(mode="json", include={"views", "context", "decision"})
    origin = Origin(
        architecture=architecture,
        config={**used, "members": {member.model_id: member.weight for member in members}},
        training=_facts(members, bundles, plan),
        trained_on=trained_on,
        members=members,
    )
    choices = Choices(views=settings.views, decision=settings.decision, context=context)
    return write_fitted(store, dataset, plan, trained, origin, choices, progress)


def _require_fitting(bundles: Sequence[Bundle]) -> None:
    """Refuse members whose networks cannot stand side by side, before anything is computed."""
    ids = [bundle.id for bundle in bundles]
    twice = next((one for one in ids if ids.count(one) > 1), None)
    if twice is not None:
        raise ConfigError(f"model {twice[:12]} is named twice; --weights says how much a model counts")
    frames = {bundle.id: bundle.document.geometry.frame for bundle in bundles}
    if len(set(frames.values())) > 1:
        listed = ", ".join(f"{model_id[:12]} {frame.side_px} {frame.crop}" for model_id, frame in frames.items())
        raise ConfigError(
            f"members of an ensemble see the same pixels, and these differ in side (px) or crop: {listed}; "
            "train one of them again with the other's trainers.model.side_px and trainers.model.crop"
        )


def ensemble_of(bundles: Sequence[Bundle], weights: Sequence[float]) -> tuple[Architecture, nn.Module]:
    networks = [plain_network(bundle) for bundle in bundles]
    geometries = [bundle.document.geometry for bundle in bundles]
    # A range cannot be undone, mean and deviation can: the first member with these says what the ensemble is given.
    geometry = next((one for one in geometries if one.scaling == "mean_std"), geometries[0])
    maps = [_map_of(network, geometry.side_px) for network in networks]
    _require_one_grid(bundles, networks, maps)
    members = [
        {
            "name": bundle.document.architecture.name,
            "options": bundle.document.architecture.options,
            "geometry": bundle.document.geometry.model_dump(mode="json"),
            "map": shape,
            "weight": weight,
        }
        for bundle, shape, weight in zip(bundles, maps, weights, strict=True)
    ]
    options = {"members": members, "geometry": geometry.model_dump(mode="json")}
    architecture = Architecture(name=ENSEMBLE, options=options)
    # Fresh weights are drawn and replaced at once; the caller's random numbers do not depend on it.
    with torch.random.fork_rng(devices=[]):
        network = build_model(ENSEMBLE, len(bundles[0].document.taxonomy.codes), **options)
    values: dict[str, NDArray[Any]] = {}
    for number, one in enumerate(networks):
        for name, value in one.state_dict().items():
            part, _, rest = name.partition(".")
            values[f"{part}.members.{number}.{rest}"] = value.numpy()
    load_weights(network, values, "of the members")
    return architecture, network.eval().requires_grad_(False)


def _map_of(network: nn.Module, side_px: int) -> list[int]:
    with torch.inference_mode():
        return list(network.get_submodule("features")(torch.zeros(1, 3, side_px, side_px)).shape[1:])


def _require_one_grid(bundles: Sequence[Bundle], networks: Sequence[nn.Module], maps: Sequence[Sequence[int]]) -> None:
    """Refuse a member whose map would have to be resampled and whose head reads more of it than a mean."""
    grid = finest_grid(maps)
    for bundle, network, (_, *own) in zip(bundles, networks, maps, strict=True):
        form = closed_form_of(network.get_submodule("head"))
        if tuple(own) != grid and (form is None or not form.pools_first):
            raise ConfigError(
                f"member {bundle.id[:12]} ({bundle.document.architecture.name}) has maps of {own[0]} x {own[1]} "
                f"positions beside {grid[0]} x {grid[1]} of another member, and its head reads more of a map than its "
                "mean, which resampling would change; combine it with models whose maps are not finer"
            )


def _facts(members: Sequence[Member], bundles: Sequence[Bundle], plan: DataPlan) -> dict[str, Any]:
    """Facts for the bundle, as a training has them; none depends on the clock."""
    listed = [
        {"model_id": one.model_id, "weight": one.weight, "model": bundle.document.architecture.name}
        for one, bundle in zip(members, bundles, strict=True)
    ]
    return {"members": listed, "train_images": plan.num_train, "val_images": len(plan.labels) - plan.num_train}
