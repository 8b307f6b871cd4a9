"""The settings of the trainers room: what is trained, how, and on which machinery.

`run_fields` splits them: what changes the model, and what only says where and how fast it is made.
"""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from records.errors import ConfigError
from records.ids import hash_of
from records.registry import Registry
from records.settings import RoomSettings
from trainers.augmentation.registry import check_policy_name
from trainers.optimization.losses import LOSSES
from trainers.optimization.optimizers import OPTIMIZERS
from trainers.optimization.samplers import SAMPLERS
from trainers.optimization.schedulers import SCHEDULERS
from trainers.optimization.strategies import AUTO, STRATEGIES, strategy_of
from vision.networks.registry import MODELS, check_side

MACHINERY = frozenset(
    {
        "num_workers", "threads_per_worker", "use_gpu", "max_failures", "prefetch_batches", "strategy", "min_workers",
        "checkpoint_every_steps", "download_url", "data_source",
    }
)  # fmt: skip
"""Fields that say where and how fast a model is made; the others decide what it becomes."""


class TrainersSettings(RoomSettings):
    """How a model is trained."""

    model: str = Field(default="custom_cnn", description="network, see `relook catalog models`")
    side_px: int = Field(default=64, ge=8, le=1024, description="the network sees side_px x side_px pixels")
    weights: str = Field(
        default="none",
        min_length=1,
        description="what the network starts from: none, imagenet, or the path of a .safetensors or .pt file",
    )
    scaling: Literal["mean_std", "min_max"] = Field(
        default="mean_std",
        description="of pixel values: by the training images' mean and deviation, or by each image's range",
    )
    dropout: float = Field(default=0.01, ge=0, lt=1, description="rate after every block, in networks that have it")
    head_dropout: float = Field(
        default=0.2, ge=0, lt=1, description="rate before the linear layer, in networks that have one"
    )

    max_train_images: int | None = Field(
        default=None,
        ge=1,
        description="train on at most so many images (whole groups, classes in proportion); default: all",
    )
    epochs: int = Field(default=12, ge=1, le=10_000, description="passes over the training images")
    batch_size: int = Field(
        default=64, ge=2, le=65_536, description="images per optimizer step, over all workers together"
    )
    optimizer: str = Field(default="sgd", description="see `relook catalog optimizers`")
    learning_rate: float | None = Field(
        default=None, gt=0, le=10, allow_inf_nan=False, description="step size; default: the optimizer's own"
    )
    learning_rate_factors: tuple[tuple[int, float], ...] = Field(
        default=(),
        description="pairs of epoch and factor: what the scheduled rate is multiplied by from that epoch on; "
        "default: never",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of sgd")
    nesterov: bool = Field(default=True, description="Nesterov's momentum, in sgd")
    weight_decay: float = Field(
        default=5e-4, ge=0, le=1, allow_inf_nan=False, description="pull of weights to zero (L2), per step"
    )
    l1: float = Field(
        default=0.0,
        ge=0,
        le=0.1,
        allow_inf_nan=False,
        description="weight of the absolute weights beside the loss (L1), for weights of two or more dimensions",
    )
    clip_norm: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="longest gradient over all parameters (L2 norm); longer ones are shortened to it; default: any",
    )
    accumulate_steps: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="parts that a worker computes its share of a batch in, one after the other, to need less memory",
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        allow_inf_nan=False,
        description="share that a running mean of the weights keeps per step; the mean is validated and served; "
        "default: no mean",
    )
    scheduler: str = Field(default="cosine", description="of the learning rate, see `relook catalog schedulers`")
    step_size_epochs: int = Field(default=4, ge=1, le=10_000, description="epochs between two cuts, in step")
    gamma: float = Field(default=0.3, gt=0, lt=1, description="factor of a cut, in step and plateau")
    plateau_patience_epochs: int = Field(
        default=2, ge=0, le=10_000, description="epochs without gain before a cut, in plateau"
    )
    warmup_epochs: float = Field(default=1.0, ge=0, le=1000, description="epochs of rising learning rate, in cosine")
    loss: str = Field(default="cross_entropy", description="see `relook catalog losses`")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of the label spread over all classes")
    focal_gamma: float = Field(
        default=2.0, ge=0, le=10, allow_inf_nan=False, description="how fast the focal loss fades; 0 is cross-entropy"
    )
    sampler: str = Field(
        default="square_root", description="how often each class is shown, see `relook catalog samplers`"
    )
    augmentation: str = Field(
        default="dissertation",
        description="policy, see `relook catalog augmentations`, one line `ops:...`, or a YAML file",
    )
    early_stop_patience_epochs: int | None = Field(
        default=None, ge=1, description="stop after so many epochs without a better validation score; default: never"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="number format; auto is bf16 where the hardware has it, else fp32"
    )
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="of everything random in a run")

    num_workers: int = Field(
        default=1, ge=1, le=4096, description="processes that share every batch; with strategy elastic, the most"
    )
    strategy: str = Field(
        default=AUTO,
        description="how they share it, see `relook catalog strategies`; auto is single with one worker, else ddp",
    )
    min_workers: int = Field(default=1, ge=1, le=4096, description="fewest processes, with strategy elastic")
    checkpoint_every_steps: int | None = Field(
        default=None,
        ge=1,
        le=10**9,
        description="optimizer steps between two checkpoints within an epoch; default: after every epoch only",
    )
    threads_per_worker: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads of a worker; default: this machine's cores over num_workers",
    )
    use_gpu: Literal["auto"] | bool = Field(default="auto", description="train on GPUs; auto if the machine has one")
    max_failures: int = Field(default=2, ge=0, le=1000, description="lost workers that a distributed run survives")
    data_source: Literal["cache", "stream"] = Field(
        default="cache",
        description="training images: decoded once and kept on disk, or streamed by Ray Data and never kept decoded",
    )
    prefetch_batches: int = Field(default=4, ge=1, le=64, description="batches prepared ahead of the network")
    download_url: str = Field(
        default="https://dataverse.harvard.edu/api/access/datafile",
        description="where `relook data download` finds files by their Dataverse number; a mirror has the same layout",
    )

    @field_validator("model", "optimizer", "scheduler", "loss", "sampler")
    @classmethod
    def _is_registered(cls, value: str, info: Any) -> str:
        _as_value_error(_REGISTRIES[info.field_name].__getitem__, value)
        return value

    @field_validator("strategy")
    @classmethod
    def _is_strategy(cls, value: str) -> str:
        if value != AUTO:
            _as_value_error(STRATEGIES.__getitem__, value)
        return value

    @field_validator("augmentation")
    @classmethod
    def _is_policy(cls, value: str) -> str:
        _as_value_error(check_policy_name, value)
        return value

    @field_validator("learning_rate_factors")
    @classmethod
    def _ascend(cls, value: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        epochs = [epoch for epoch, _ in value]
        if epochs != sorted(set(epochs)) or (epochs and epochs[0] < 2):
            raise ValueError(f"the epochs {epochs} should ascend from 2 or later, as [[3, 0.8], [5, 1.2]]")
        if not all(0 < factor <= 1000 for _, factor in value):
            raise ValueError("factors should be above 0 and at most 1000, as [[3, 0.8], [5, 1.2]]")
        return value

    @field_validator("weights")
    @classmethod
    def _is_source(cls, value: str) -> str:
        if value not in {"none", "imagenet"} and not value.endswith((".safetensors", ".pt", ".pth")):
            raise ValueError(f"{value!r} is neither none, nor imagenet, nor the path of a .safetensors or .pt file")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> "TrainersSettings":
        _as_value_error(check_side, self.model, self.side_px)
        if self.strategy == "single" and self.num_workers > 1:
            raise ValueError(
                f"strategy 'single' is one process and num_workers is {self.num_workers}; take ddp, or num_workers=1"
            )
        self._check_shares()
        return self

    def _check_shares(self) -> None:
        parts = self.num_workers * self.accumulate_steps
        how = f"{self.num_workers} workers" + (
            f" in {self.accumulate_steps} parts each" if self.accumulate_steps > 1 else ""
        )
        if strategy_of(self).elastic:
            # Shares of different sizes are weighted, so that every number of workers gives the same gradient.
            if self.min_workers > self.num_workers:
                raise ValueError(
                    f"min_workers {self.min_workers} is more than num_workers {self.num_workers}; "
                    f"take min_workers={self.num_workers} or fewer"
                )
            if self.batch_size < 2 * parts:
                raise ValueError(f"batch_size {self.batch_size} is too small for {how}; take {2 * parts} or more")
        elif self.batch_size % parts:
            fitting = max(2, round(self.batch_size / parts)) * parts
            raise ValueError(f"batch_size {self.batch_size} cannot be shared evenly by {how}; take {fitting}")

    @property
    def needs_ray(self) -> bool:
        """Whether training runs under Ray: on several workers, or with Ray Data to feed it."""
        return self.num_workers > 1 or self.data_source == "stream"

    def recipe_hash(self) -> str:
        """Return the hash of the fields that decide what the model becomes, 64 hex characters."""
        return hash_of(self.model_dump(mode="json", exclude=set(MACHINERY)))


_REGISTRIES: dict[str, Registry[Any]] = {
    "model": MODELS,
    "optimizer": OPTIMIZERS,
    "scheduler": SCHEDULERS,
    "loss": LOSSES,
    "sampler": SAMPLERS,
}


def _as_value_error(check: Any, *args: Any) -> None:
    """Run a check; pydantic gathers ValueErrors with the field they belong to."""
    try:
        check(*args)
    except ConfigError as error:
        raise ValueError(str(error)) from error
