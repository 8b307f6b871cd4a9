"""The settings of the trainers room, composed of parts that are declared next to their registries.

A part is what one factory takes: `build_optimizer` takes `settings.optimizer`, `build_loss` takes `settings.loss`.
What is declared here belongs to the run as a whole. `workers` holds what only says where and how fast a model is
trained; every other field changes what the model becomes and is part of `recipe_hash`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from records.errors import ContractError
from records.ids import hash_of
from records.settings import RoomSettings, checked_by
from trainers.augmentation.registry import check_policy_name
from trainers.optimization.losses import LossSettings
from trainers.optimization.optimizers import OptimizerSettings
from trainers.optimization.samplers import SAMPLERS
from trainers.optimization.schedulers import SchedulerSettings
from trainers.optimization.strategies import WorkersSettings, strategy_of
from vision.calibration.decision import DecisionSettings
from vision.networks.registry import ModelSettings

__all__ = [
    "MACHINERY", "DecisionSettings", "LossSettings", "ModelSettings", "OptimizerSettings", "SchedulerSettings",
    "TrainersSettings", "WorkersSettings",
]  # fmt: skip

BestBy = Literal["balanced_accuracy", "macro_auc", "even_loss", "last"]

MACHINERY = frozenset({"workers"})
"""Fields that say where and how fast a model is made; the others decide what it becomes."""
NO_TRACE = frozenset({
    "checkpoint_every_steps", "contact_timeout_s", "feeders", "max_failures", "peers.addresses", "peers.announce",
    "peers.averaging_timeout_s", "peers.fewest", "peers.group", "peers.listen", "peers.matchmaking_s",
    "peers.patience_s", "prefetch_batches", "read_loss_every_steps",
})  # fmt: skip
"""Fields of `workers` that change no bit of a model, or name other sites; others, such as `threads`, change how it is
rounded."""
NO_RECIPE = MACHINERY | {"refit"}
"""Fields that are no part of one training's recipe: a refit is a second training, with a recipe of its own."""


class TrainersSettings(RoomSettings):
    """How a model is trained."""

    model: ModelSettings = Field(default=ModelSettings(), description="the network and the pixels it sees")
    optimizer: OptimizerSettings = Field(default=OptimizerSettings(), description="how gradients change the weights")
    scheduler: SchedulerSettings = Field(default=SchedulerSettings(), description="how the learning rate changes")
    loss: LossSettings = Field(default=LossSettings(), description="what is minimized")
    sampler: Annotated[str, checked_by(SAMPLERS.__getitem__)] = Field(
        default="square_root", description="how often each class is shown, see `relook catalog samplers`"
    )
    augmentation: Annotated[str, checked_by(check_policy_name)] = Field(
        default="dissertation",
        description="policy, see `relook catalog augmentations`, one line `ops:...`, or a YAML file",
    )
    max_train_images: int | None = Field(
        default=None,
        ge=1,
        description="train on at most so many images (whole groups, classes in proportion); default: all",
    )
    epochs: int = Field(default=12, ge=1, le=10_000, description="passes over the training images")
    batch_size: Literal["auto"] | Annotated[int, Field(ge=2, le=65_536)] = Field(
        default=64,
        description="images per optimizer step, over all workers together; auto is the largest power of two, 1024 at "
        "most, that fits into one GPU's memory, and 64 without a GPU",
    )
    stop_after_epoch: int | None = Field(
        default=None,
        ge=1,
        description="end after this epoch of the schedule, which is that of all epochs; default: all",
    )
    train_splits: Literal["train", "train_and_val"] = Field(
        default="train", description="splits to train on; a model that saw val is calibrated on calibration"
    )
    refit: bool = Field(
        default=False, description="when val has chosen the epoch, train anew on train and val for so many epochs"
    )
    best_epoch_by: BestBy = Field(
        default="balanced_accuracy",
        description="figure on val that chooses the epoch: balanced_accuracy, macro_auc (mean one-against-rest AUC), "
        "even_loss (cross-entropy at equal weights of the classes) or last (none does: the last epoch)",
    )
    early_stop_patience_epochs: int | None = Field(
        default=None, ge=1, description="stop after so many epochs without a better validation score; default: never"
    )
    decision: DecisionSettings = Field(default=DecisionSettings(), description="label and operating point of the model")
    context: bool = Field(
        default=False, description="use what the taxonomy names as context, such as age and sex, beside the image"
    )
    views: int = Field(
        default=1, ge=1, le=8, description="flips and turns of an image whose logits are averaged; each costs a pass"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="number format; auto is bf16 where it is native and faster, else fp32"
    )
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="of everything random in a run")
    workers: WorkersSettings = Field(default=WorkersSettings(), description="processes, devices, checkpoints, data")

    @model_validator(mode="after")
    def _batch_can_be_shared(self) -> Self:
        accumulate_steps = self.optimizer.accumulate_steps
        parts = self.workers.count * accumulate_steps
        if self.batch_size == "auto":
            if parts > 1:
                raise ValueError(
                    f"batch_size 'auto' is found for one worker that computes a batch at once, and there are {parts} "
                    "parts (workers.count times optimizer.accumulate_steps); take a number, as batch_size="
                    f"{32 * parts}"
                )
            return self
        how = f"{self.workers.count} workers" + (f" in {accumulate_steps} parts each" if accumulate_steps > 1 else "")
        if self.batch_size < 2 * parts:
            raise ValueError(
                f"batch_size {self.batch_size} is too small for {how}, because batch norm takes the mean over a part, "
                f"which has to have two images; take {2 * parts} or more"
            )
        # Elastic workers take shares of different sizes and weight them, so that every number of workers gives the
        # same gradient.
        if not strategy_of(self.workers).elastic and self.batch_size % parts:
            fitting = max(2, round(self.batch_size / parts)) * parts
            raise ValueError(f"batch_size {self.batch_size} cannot be shared evenly by {how}; take {fitting}")
        return self

    @model_validator(mode="after")
    def _peers_train_equally_long(self) -> Self:
        if self.refit and strategy_of(self.workers).peers:
            raise ValueError(
                "refit trains again for the epochs that val chose, and each peer's val may choose others; take "
                "refit=false with strategy hivemind"
            )
        return self

    @model_validator(mode="after")
    def _val_is_not_asked_about_itself(self) -> Self:
        if self.train_splits == "train":
            return self
        if self.refit:
            raise ValueError("refit trains on train first and then on both; leave train_splits at train")
        asks = self.best_epoch_by != "last" or self.early_stop_patience_epochs is not None
        if asks or self.scheduler.name == "plateau":
            raise ValueError(
                "train_splits is train_and_val, so no split is left to choose an epoch or a learning rate by; set "
                "best_epoch_by=last, no early stop and another schedule than plateau, or use refit=true"
            )
        return self

    @property
    def needs_ray(self) -> bool:
        """Whether training runs under Ray: on several workers, or with Ray Data to feed it."""
        return self.workers.count > 1 or self.workers.data_source == "stream"

    @property
    def images_per_step(self) -> int:
        """The batch size as a number; a run has replaced `auto` by what it found."""
        if self.batch_size == "auto":
            raise ContractError("trainers.batch_size is auto, which a run finds when it starts; set a number")
        return self.batch_size

    def recipe_hash(self) -> str:
        """Return the hash of the fields that decide what the model becomes, 64 hex characters."""
        return hash_of(self.model_dump(mode="json", exclude=set(NO_RECIPE)))

    def kept(self) -> dict[str, Any]:
        """Return what a bundle keeps, as JSON: all that can change a bit of the model, so that equal ones are one."""
        peers = {name.removeprefix("peers.") for name in NO_TRACE if name.startswith("peers.")}
        return self.model_dump(mode="json", exclude={"workers": {**dict.fromkeys(NO_TRACE, True), "peers": peers}})

    def flat(self) -> dict[str, Any]:
        """Return every value as JSON by its dotted name, such as `optimizer.momentum`."""
        return flat_values(self.model_dump(mode="json"))

    def with_values(self, values: Mapping[str, Any]) -> "TrainersSettings":
        """Return a copy with other values by dotted names; a ValidationError if a name or the whole is not valid."""
        changed = self.model_dump()
        for name, value in values.items():
            *parents, field = name.split(".")
            target = changed
            for parent in parents:
                if not isinstance(target.get(parent), dict):
                    target[parent] = {}  # an unknown part, which validation refuses by its name
                target = target[parent]
            target[field] = value
        return TrainersSettings.model_validate(changed)


def flat_values(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted names.

    >>> flat_values({"optimizer": {"name": "adam"}, "epochs": 3})
    {'optimizer.name': 'adam', 'epochs': 3}
    """
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": leaf for inner, leaf in flat_values(value).items()}
        else:
            flat[name] = value
    return flat
