"""How many replicas each part of the service has, how large they are, and what they need together.

Ray Serve's own autoscaler changes the number between `min` and `max`; with both equal it is fixed. A replica of the
predictor or explainer counts calls of the ingress, each of which carries up to `max_batch_size` images.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from records.errors import ConfigError
from records.settings import RoomSettings


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the service, as Ray Serve runs it."""

    name: str
    min_replicas: int
    max_replicas: int
    target_ongoing: float
    cpus: float
    gpus: float = 0.0
    threads: int | None = None
    """that compute; default: the CPUs, rounded up"""

    def text(self, amount: float) -> str:
        """Return its term of a sum, such as `predictor 4 x 1`."""
        times = f"{self.max_replicas} x " if self.max_replicas > 1 else ""
        return f"{self.name} {times}{amount:g}"


class ReplicaSettings(RoomSettings):
    """Settings of replicas: number, load, CPUs and GPUs of each part, and who listens for HTTP."""

    http: Literal["own", "serve"] = Field(
        default="own",
        description="who listens for HTTP: own is the ingress itself, on the node of the command; serve is Ray Serve's "
        "proxy on every node",
    )
    ingress_min_replicas: int = Field(default=1, ge=1, le=1000, description="HTTP replicas, at least")
    ingress_max_replicas: int = Field(
        default=1, ge=1, le=1000, description="HTTP replicas, at most; with http=own as many as at least"
    )
    ingress_target_ongoing: float = Field(
        default=32.0, gt=0, le=100_000, description="requests under way per HTTP replica that the autoscaler aims at"
    )
    ingress_cpus: float = Field(default=0.5, ge=0, le=64, description="CPUs Ray reserves for one HTTP replica")
    predictor_min_replicas: int = Field(default=1, ge=1, le=1000, description="replicas of the predictor, at least")
    predictor_max_replicas: int = Field(default=1, ge=1, le=1000, description="replicas of the predictor, at most")
    predictor_target_ongoing: float = Field(
        default=2.0, gt=0, le=1000, description="calls under way per predictor that the autoscaler aims at"
    )
    predictor_cpus: float = Field(
        default=1.0, gt=0, le=256, description="CPUs of one predictor, and its compute threads, rounded up"
    )
    predictor_gpus: float = Field(
        default=0.0, ge=0, le=1, description="GPU Ray reserves for one predictor; a fraction shares it with others"
    )
    explainer_min_replicas: int = Field(default=1, ge=1, le=1000, description="replicas of the explainer, at least")
    explainer_max_replicas: int = Field(default=1, ge=1, le=1000, description="replicas of the explainer, at most")
    explainer_target_ongoing: float = Field(
        default=1.0, gt=0, le=1000, description="heat maps under way per explainer that the autoscaler aims at"
    )
    explainer_cpus: float = Field(
        default=0.5, gt=0, le=256, description="CPUs of one explainer, and its compute threads, rounded up"
    )
    explainer_gpus: float = Field(
        default=0.0, ge=0, le=1, description="GPU Ray reserves for one explainer; a fraction shares it with others"
    )
    one_process: bool = Field(
        default=True,
        description="predict in the process that listens for HTTP, where one machine without GPUs serves with one of "
        "each; false gives the predictor a process of its own, which costs 4 ms of CPU time per prediction",
    )
    scale_up_delay_s: float = Field(
        default=10.0, ge=0, le=3600, description="how long load is too high before a replica is added, seconds"
    )
    scale_down_delay_s: float = Field(
        default=300.0, ge=0, le=86_400, description="how long load is low before a replica is removed, seconds"
    )

    @model_validator(mode="after")
    def _numbers_of_replicas_fit(self) -> Self:
        for part in self.parts():
            if part.min_replicas > part.max_replicas:
                raise ValueError(
                    f"{part.name}_min_replicas {part.min_replicas} is more than {part.name}_max_replicas "
                    f"{part.max_replicas}"
                )
        # The kernel resets what waits in the queue of a listener that leaves a shared port.
        if self.http == "own" and self.ingress_min_replicas != self.ingress_max_replicas:
            raise ValueError(
                "ingress_min_replicas and ingress_max_replicas must be equal with http=own, whose replicas share one "
                "port; with http=serve Ray Serve changes their number"
            )
        return self

    def parts(self) -> Iterator[Part]:
        """Yield the parts in the order in which a request passes them."""
        yield Part(
            "ingress", self.ingress_min_replicas, self.ingress_max_replicas, self.ingress_target_ongoing,
            self.ingress_cpus,
        )  # fmt: skip
        yield Part(
            "predictor", self.predictor_min_replicas, self.predictor_max_replicas, self.predictor_target_ongoing,
            self.predictor_cpus, self.predictor_gpus,
        )  # fmt: skip
        yield Part(
            "explainer", self.explainer_min_replicas, self.explainer_max_replicas, self.explainer_target_ongoing,
            self.explainer_cpus, self.explainer_gpus,
        )  # fmt: skip

    def part(self, name: str) -> Part:
        """Return a part by its name."""
        return next(part for part in self.parts() if part.name == name)

    @property
    def fits_one_process(self) -> bool:
        """Whether ingress and predictor may share a process, if one machine serves."""
        is_single = self.ingress_max_replicas == self.predictor_max_replicas == 1
        return self.one_process and is_single and self.http == "own" and not self.predictor_gpus

    @property
    def needed_cpus(self) -> float:
        """CPUs of all replicas, at most."""
        return sum(part.max_replicas * part.cpus for part in self.parts())

    @property
    def needed_gpus(self) -> float:
        """GPUs of all replicas, at most."""
        return sum(part.max_replicas * part.gpus for part in self.parts())

    @property
    def cpu_sum(self) -> str:
        """What they need as a sum, such as `ingress 0.5 + predictor 4 x 1 + explainer 0.5`."""
        return " + ".join(part.text(part.cpus) for part in self.parts())

    @property
    def gpu_sum(self) -> str:
        """The same for GPUs; without the parts that take none."""
        return " + ".join(part.text(part.gpus) for part in self.parts() if part.gpus)


def require_room(settings: ReplicaSettings, resources: Mapping[str, float]) -> None:
    """Raise ConfigError if a cluster cannot hold every replica that there may be.

    Args:
        settings: numbers and sizes of replicas.
        resources: `CPU` and `GPU` of the whole cluster, as Ray states them.
    """
    fix = "lower serving.*_max_replicas or what one replica takes, or add nodes first"
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    if settings.needed_cpus > cpus:
        raise ConfigError(
            f"the service may need {settings.cpu_sum} = {settings.needed_cpus:g} CPUs, and the cluster has {cpus:g}; "
            f"{fix}"
        )
    if settings.needed_gpus > gpus:
        raise ConfigError(
            f"the service may need {settings.gpu_sum} = {settings.needed_gpus:g} GPUs, and the cluster has {gpus:g}; "
            f"{fix}"
        )
