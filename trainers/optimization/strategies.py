"""How several processes share a training: a registry of frozen records, and the settings that choose one.

Whatever the strategy, the same global batch gives the same model up to rounding, for networks without batch
norm and dropout; a checkpoint of one strategy is continued by any other. Records import torch inside their
functions, so looking something up is cheap.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from records.errors import ConfigError
from records.registry import Registered, Registry
from records.settings import RoomSettings, checked_by
from trainers.optimization.peers import PeersSettings

if TYPE_CHECKING:
    import torch
    from torch import nn

SMALLEST_UNIT = 100_000
"""Parameters from which a block is its own FSDP unit; smaller blocks are gathered with the root, in one message."""


@dataclass(frozen=True, kw_only=True)
class StrategyRecipe(Registered):
    """A way to share the work.

    Args:
        wrap: (network on its device, device) -> the network that averages gradients over the default process
            group; not called for a group of one.
        processes: how many it runs on.
        shards: what each process holds only a part of.
        elastic: whether the number of processes may change while it runs.
        peers: whether processes of other sites take part, each with images of its own.
    """

    wrap: "Callable[[nn.Module, torch.device], nn.Module]" = field(repr=False)
    processes: str
    shards: tuple[str, ...] = ()
    elastic: bool = False
    peers: bool = False

    def facts(self) -> dict[str, Any]:
        """Return processes, what is sharded, whether it is elastic, and whether other sites take part."""
        return {
            "processes": self.processes, "shards": list(self.shards), "elastic": self.elastic, "peers": self.peers,
        }  # fmt: skip


def _alone(network: "nn.Module", device: "torch.device") -> "nn.Module":
    return network


def _ddp(network: "nn.Module", device: "torch.device") -> "nn.Module":
    from torch.nn.parallel import DistributedDataParallel

    # Running statistics are averaged once per epoch, before validation, instead of sent with every step.
    if device.type == "cuda":
        shared = _share_norms(network, device)
        return DistributedDataParallel(shared, device_ids=[device], forward_sync_buffers=False)
    return DistributedDataParallel(network, forward_sync_buffers=False)


def _fsdp(network: "nn.Module", device: "torch.device") -> "nn.Module":
    import torch
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The loop never writes into logits in place; without this every process warns once that it must not.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Only contiguous parameters can be sharded; activations stay in channels-last memory.
    network = _share_norms(network, device).to(memory_format=torch.contiguous_format)
    blocks = [block for part in network.children() for block in part.children()]
    for block in blocks:
        if sum(parameter.numel() for parameter in block.parameters()) >= SMALLEST_UNIT:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # The root last: it takes the parameters that no block has claimed.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    return network


def _share_norms(network: "nn.Module", device: "torch.device") -> "nn.Module":
    from torch import nn

    if device.type != "cuda":  # SyncBatchNorm refuses tensors on a CPU
        return network
    shared: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    return shared


STRATEGIES: Registry[StrategyRecipe] = Registry(
    "strategy",
    (
        StrategyRecipe(name="single", description="one process computes whole batches", wrap=_alone, processes="1"),
        StrategyRecipe(
            name="ddp",
            description="every process holds the whole model and computes its share of every batch "
            "(DistributedDataParallel)",
            wrap=_ddp,
            processes="count",
        ),
        StrategyRecipe(
            name="fsdp",
            description="parameters, gradients and optimizer state are split over the processes (FSDP2), for models "
            "that do not fit beside their optimizer",
            wrap=_fsdp,
            processes="count",
            shards=("parameters", "gradients", "optimizer state"),
        ),
        StrategyRecipe(
            name="elastic",
            description="ddp on as many processes as the cluster can give, minimum to count, changing while it runs",
            wrap=_ddp,
            processes="minimum to count",
            elastic=True,
        ),
        StrategyRecipe(
            name="hivemind",
            description="one process at each of several sites, over the internet: each trains on its own images, and "
            "their weights are averaged several times per epoch",
            wrap=_alone,
            processes="1",
            peers=True,
        ),
    ),
)

AUTO = "auto"


def _check_strategy(name: str) -> None:
    if name != AUTO:
        STRATEGIES[name]


class WorkersSettings(RoomSettings):
    """Where and how fast a model is trained: no part of the recipe, though some fields change how weights are rounded.

    With batch norm, whose mean is over a worker's share or a part, `count` and `parallel_parts` change more than that.
    """

    count: int = Field(
        default=1, ge=1, le=4096, description="processes that share every batch; with strategy elastic, the most"
    )
    minimum: int = Field(default=1, ge=1, le=4096, description="fewest processes, with strategy elastic")
    strategy: Annotated[str, checked_by(_check_strategy)] = Field(
        default=AUTO,
        description="how they share it, see `relook catalog strategies`; auto is single with one worker, else ddp",
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads of a worker; default: this machine's cores over count"
    )
    parallel_parts: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = Field(
        default="auto",
        description="parts of a batch that one worker on a CPU computes side by side, sharing its threads, 1 to 256; "
        "batch norm takes its mean over a part; auto is one per thread, of 32 images or more",
    )
    use_gpu: Literal["auto"] | bool = Field(default="auto", description="train on GPUs; auto if the machine has one")
    max_failures: int = Field(default=2, ge=0, le=1000, description="lost workers that a distributed run survives")
    checkpoint_every_steps: int | None = Field(
        default=None,
        ge=1,
        le=10**9,
        description="optimizer steps between two checkpoints within an epoch; default: after every epoch only",
    )
    data_source: Literal["cache", "stream"] = Field(
        default="cache",
        description="training images: decoded once and kept on disk, or streamed by Ray Data and never kept decoded",
    )
    feeders: Literal["auto"] | Annotated[int, Field(ge=0, le=256)] = Field(
        default="auto",
        description="processes per worker that prepare batches, 0 to 256; 0 leaves it to a thread; auto is a process "
        "per 8 threads, and with a GPU all threads but one, 16 at most",
    )
    read_loss_every_steps: int = Field(
        default=10,
        ge=1,
        le=10_000,
        description="steps whose losses are read together, since reading one waits for the GPU; one that is not finite "
        "is found within so many steps",
    )
    compile: bool = Field(
        default=False, description="compile the network with torch.compile, which takes minutes and a C++ compiler"
    )
    contact_timeout_s: float = Field(
        default=60.0, gt=0, le=86_400, description="limit for the first message between workers, seconds"
    )
    peers: PeersSettings = Field(default=PeersSettings(), description="other sites, with strategy hivemind")
    prefetch_batches: int = Field(default=4, ge=1, le=64, description="batches prepared ahead of the network")

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        strategy = strategy_of(self)
        if strategy.processes == "1" and self.count > 1:
            raise ValueError(
                f"strategy '{strategy.name}' is one process and count is {self.count}; take ddp, or count=1"
            )
        if strategy.peers and self.data_source == "stream":
            raise ValueError(
                f"strategy '{strategy.name}' knows no data_source 'stream', which needs Ray; take data_source=cache"
            )
        if strategy.elastic and self.minimum > self.count:
            raise ValueError(
                f"minimum {self.minimum} is more than count {self.count}; take minimum={self.count} or fewer"
            )
        if self.parallel_parts not in ("auto", 1) and (strategy.processes != "1" or self.compile):
            other = "compile is true" if self.compile else f"the strategy is '{strategy.name}'"
            raise ValueError(
                f"parallel_parts is {self.parallel_parts} and {other}; parts are computed side by side by a single "
                "worker whose network is not compiled; take parallel_parts=auto"
            )
        if self.data_source == "stream" and self.feeders not in ("auto", 0):
            raise ValueError(
                f"feeders is {self.feeders} and data_source 'stream', whose images Ray Data prepares; take feeders=0"
            )
        return self


def strategy_of(settings: WorkersSettings) -> StrategyRecipe:
    """Return the strategy of a run: the settings', or for `auto` single with one worker and ddp with more."""
    if settings.strategy != AUTO:
        return STRATEGIES[settings.strategy]
    return STRATEGIES["single" if settings.count == 1 else "ddp"]


def require_peers_known(settings: WorkersSettings) -> None:
    """Raise ConfigError if peers are set and the strategy knows none."""
    # Not a validator: the command's option --strategy comes after the settings.
    strategy = strategy_of(settings)
    if settings.peers != PeersSettings() and not strategy.peers:
        raise ConfigError(
            f"trainers.workers.peers is set, and strategy '{strategy.name}' knows no peers; take --strategy hivemind"
        )


@contextmanager
def no_sync(network: "nn.Module", enabled: bool) -> Iterator[None]:
    """Accumulate gradients inside the block without averaging them, as `DistributedDataParallel.no_sync` does."""
    ddp_no_sync = getattr(network, "no_sync", None)
    # FSDP2 has a switch on the module, DDP a context manager, and a network that is not wrapped has neither.
    set_sync = getattr(network, "set_requires_gradient_sync", None)
    if set_sync is not None:
        set_sync(not enabled)
    with ddp_no_sync() if enabled and ddp_no_sync is not None else nullcontext():
        yield
