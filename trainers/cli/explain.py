"""The verb `relook explain`.

relook explain champion image.jpg --method integrated_gradients --versus nv --out why.png
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from records.command import Call, verb
from records.durable import write_file
from records.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from records.bundles import Bundle

app = typer.Typer()

ACTIVATIONS = "activations"


def _methods() -> list[str]:
    from vision.explanations.methods import METHODS

    return [*METHODS, ACTIVATIONS]


@verb(app, "explain")
def explain_command(
    call: Call,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Id prefix, bundle path, champion or candidate.")],
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="JPEG, PNG or WebP file.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    method: Annotated[str, typer.Option(help="Method: {choices}.", autocompletion=_methods)] = "gradcam",
    target: Annotated[str | None, typer.Option(help="Class to explain; default: the label.")] = None,
    versus: Annotated[str | None, typer.Option(help="Class to compare the target with.")] = None,
    layer: Annotated[str | None, typer.Option(help="Layer for activations; default: the last stage.")] = None,
) -> None:
    """Draw the heat map of a prediction over its image, or the activations of a layer."""
    from records.models import find_bundle

    if method not in _methods():
        raise ConfigError(f"--method is {method!r}; it must be one of {', '.join(_methods())}")
    if layer is not None and method != ACTIVATIONS:
        raise ConfigError(f"--layer belongs to --method {ACTIVATIONS}, not to {method}")
    with call.store() as store:
        bundle = find_bundle(store, model)
    if method == ACTIVATIONS:
        result, png = _activations(bundle, image, layer)
        human = f"{result['layer']}: {len(result['channels'])} of {result['shape'][0]} channels: {out}"
    else:
        result, png = _explained(bundle, image, method, target, versus)
        share = f"{result['probabilities'][result['target']]:.0%}"
        rather = f" rather than {versus}" if versus else ""
        facts = "" if result["steps"] is None else f"{result['steps']} steps"
        if result["completeness_error"] is not None:
            facts += f", adds up within {result['completeness_error']:.1%}"
        shape = tuple(result["shape"])
        human = f"{method} for {result['target']}{rather} (probability {share}), map {shape}: {out}"
        human += f" ({facts})" if facts else ""
    # An unwritable path is the user's mistake: exit 2 with a sentence instead of a traceback.
    try:
        write_file(out, png, sync=False)
    except UnavailableError as error:
        raise ConfigError(f"--out: {error}") from error
    call.emit({"model_id": bundle.id, "image": str(image), "method": method, **result, "out": str(out)}, human)


def _explained(
    bundle: "Bundle", image: Path, method: str, target: str | None, versus: str | None
) -> tuple[dict[str, Any], bytes]:
    """Return the values that describe a heat map, and its overlay as PNG."""
    from images.overlay import overlay_png
    from trainers.evaluation.folder import read_frame
    from vision.explanations import FILE_OVERLAY_SIDE_PX
    from vision.inference.attribution import explain
    from vision.inference.loaded import load_model

    # Gradients need fp32, and a single image is quick in it.
    loaded = load_model(bundle, precision="fp32")
    found = explain(loaded, read_frame(image, loaded.geometry.frame), method, target, versus)
    attribution = found.attribution
    result = {
        "exact": attribution.exact,
        "layer": attribution.layer,
        "steps": attribution.steps,
        "completeness_error": attribution.completeness_error,
        "target": found.target,
        "versus": versus,
        "probabilities": found.probabilities,
        "shape": list(attribution.values.shape),
        "values": attribution.values.tolist(),
    }
    return result, overlay_png(read_frame(image, loaded.geometry.frame.shown(FILE_OVERLAY_SIDE_PX)), attribution.values)


def _activations(bundle: "Bundle", image: Path, layer: str | None) -> tuple[dict[str, Any], bytes]:
    """Return the strongest channels of a layer, and their grid as PNG."""
    from trainers.evaluation.folder import read_frame
    from vision.explanations.activations import channel_grid_png, layer_output, strongest_channels
    from vision.inference.loaded import plain_network
    from vision.networks import MODELS
    from vision.preprocess import scale_pixels, to_tensor

    geometry = bundle.document.geometry
    pixels = read_frame(image, geometry.frame)[None]
    name = layer or MODELS[bundle.document.architecture.name].target_layer
    output = layer_output(plain_network(bundle), scale_pixels(to_tensor(pixels), geometry), name)[0]
    channels = strongest_channels(output)
    result = {
        "layer": name,
        "shape": list(output.shape),
        "channels": channels.tolist(),
        "mean_activation": output[channels].mean(axis=(1, 2)).tolist(),
    }
    return result, channel_grid_png(pixels[0], output, channels)
