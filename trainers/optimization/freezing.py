"""Training the last blocks of a network only.

A block is a child of `features` that has weights of two or more dimensions; sequences are opened. Frozen parameters
get no gradient, so that nothing before the first trained block is differentiated, and their modules stay in
evaluation mode.
"""

from collections.abc import Iterator

from torch import nn

from records.errors import ConfigError


def blocks_of(features: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network's features, in order."""
    blocks = list(_blocks(features))
    # A wrapper around the whole is none.
    while len(blocks) == 1 and (inner := list(_blocks(blocks[0]))):
        blocks = inner
    return blocks


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child) in (nn.Sequential, nn.ModuleList):
            yield from _blocks(child)
        elif any(parameter.ndim >= 2 for parameter in child.parameters()):
            yield child


def freeze(network: nn.Module, trainable_blocks: int | None) -> None:
    """Take the gradient from all parameters before the last blocks.

    Args:
        network: with `features` and `head`.
        trainable_blocks: how many blocks are trained, and what comes after the first of them, with the head; 0 trains
            the head alone, None everything.
    Raises:
        ConfigError: the network has fewer blocks, or nothing would be trained.
    """
    if trainable_blocks is None:
        return
    features = network.get_submodule("features")
    blocks = blocks_of(features)
    if trainable_blocks > len(blocks):
        raise ConfigError(
            f"trainers.optimizer.trainable_blocks is {trainable_blocks}, and the network has {len(blocks)} blocks; "
            f"take at most {len(blocks)}, or leave it unset to train everything"
        )
    parameters = list(features.parameters())
    position = {id(parameter): number for number, parameter in enumerate(parameters)}
    trained = [position[id(one)] for block in blocks[len(blocks) - trainable_blocks :] for one in block.parameters()]
    for parameter in parameters[: min(trained, default=len(parameters))]:
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ConfigError(
            "trainers.optimizer.trainable_blocks is 0, and the head of the network has no weights; take 1 or more"
        )


def frozen_modules(network: nn.Module) -> list[nn.Module]:
    """Return the modules of which no parameter is trained, and all that is in them."""
    found: dict[int, nn.Module] = {}
    for module in network.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            found |= {id(one): one for one in module.modules()}
    return list(found.values())
