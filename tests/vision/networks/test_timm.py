"""Networks of timm: split in two, their closed forms against captum, published names, and what is refused."""

from pathlib import Path

import pytest
import torch
from captum.attr import LayerGradCam
from safetensors.torch import save_file
from torch import nn

from records.errors import ConfigError, UnavailableError
from trainers.fitting.starting import DINOV2_FILE, starting_weights
from trainers.settings import ModelSettings, TrainersSettings
from vision.explanations.closed_form import closed_form_of
from vision.explanations.gradients import head_gradcam
from vision.inference.fold import fold_batch_norm
from vision.networks import MODELS, build_model

timm = pytest.importorskip("timm")

TOLERANCE = 1e-5
"""Largest difference over the largest value of a map."""
IN_SUITE = ("test_resnet", "test_convnext", "test_vit", "test_vit_relpos", "mobilenetv3_small_050")
DIFFERENTIATED = "test_mambaout"
WITHOUT_CLOSED_FORM = {
    "ghostnet_100", "inception_next_atto", "hgnetv2_b0", "mambaout_femto", "repghostnet_050", "levit_128s",
    "repvit_m0_9", "swiftformer_xs",
}  # fmt: skip
"""Their heads have an activation or a norm of which no derivative is written down here."""
SIDES_PX = {"inception_v4": 160, "selecsls42": 128}
"""Of those whose pools leave too little of 64 px."""
FAMILIES = (
    "resnet18", "resnext50_32x4d", "seresnet50", "resnetv2_50", "ecaresnet26t", "res2net50_26w_4s", "resnest14d",
    "skresnet18", "regnetx_002", "regnety_002", "densenet121", "dla34", "dpn68", "ese_vovnet19b_dw", "cspresnet50",
    "efficientnet_b0", "tf_efficientnet_lite0", "efficientnetv2_rw_t", "mobilenetv2_100", "mobilenetv3_small_050",
    "mnasnet_small", "ghostnet_100", "fbnetc_100", "hardcorenas_a", "rexnet_100", "lcnet_050", "mixnet_s",
    "xception41", "inception_v4", "inception_next_atto", "convnext_atto", "convnextv2_atto", "eca_nfnet_l0",
    "repvgg_a0", "mobileone_s0", "hrnet_w18_small", "selecsls42", "pvt_v2_b0", "poolformerv2_s12", "mixer_s32_224",
    "resmlp_12_224", "vit_medium_patch16_gap_240", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
    "coatnet_nano_rw_224", "edgenext_xx_small", "mobilevit_xxs", "focalnet_tiny_srf", "davit_tiny", "hgnetv2_b0",
    "starnet_s1", "mambaout_femto", "repghostnet_050", "fastvit_t8", "levit_128s", "rdnet_tiny", "repvit_m0_9",
    "nextvit_small", "swiftformer_xs", "vit_small_patch14_reg4_dinov2", "deit_tiny_patch16_224",
    "beit_base_patch16_224", "eva02_tiny_patch14_224", "cait_xxs24_224",
)  # fmt: skip


def side_of(name: str) -> int:
    """The smallest side of which at least four positions are left."""
    recipe = MODELS[f"timm/{name}"]
    return recipe.input_side_px if timm.get_pretrained_cfg(name).fixed_input_size else SIDES_PX.get(name, 64)


def network_of(name: str, side_px: int, num_classes: int = 3) -> nn.Module:
    """A network in evaluation mode; a last layer that is published as zeros gets weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = build_model(f"timm/{name}", num_classes, side_px=side_px).eval()
        for parameter in network.head.parameters():
            nn.init.normal_(parameter, 0.1, 0.3)
    return network


def check_against_captum(name: str) -> bool:
    """Compare the maps of every class with captum's, in float64; return whether there is a closed form."""
    side_px = side_of(name)
    network = network_of(name, side_px)
    inputs = torch.randn(2, 3, side_px, side_px, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        features = network.features(inputs)
        folded = fold_batch_norm(network.features)(inputs)
    assert features.ndim == 4
    assert features[0, 0].numel() >= 4
    assert torch.allclose(folded, features, rtol=1e-3, atol=1e-4 * float(features.abs().max()))
    exact, inputs = network.double(), inputs.double()
    with torch.no_grad():
        features = exact.features(inputs)
    closed = closed_form_of(exact.head)
    layer = exact.get_submodule(MODELS[f"timm/{name}"].target_layer)
    shown = 0.0
    for target in range(3):
        theirs = LayerGradCam(exact, layer).attribute(inputs, target=target, relu_attributions=True)[:, 0].detach()
        ours = (
            head_gradcam(exact.head, features, torch.full((2,), target)) if closed is None
            else closed.maps(features)[:, target]
        )  # fmt: skip
        assert (ours - theirs).abs().max() <= TOLERANCE * theirs.max()
        shown = max(shown, float(theirs.max()))
    assert shown > 0
    return closed is not None


@pytest.mark.parametrize("name", IN_SUITE)
def test_its_maps_equal_captums(name: str) -> None:
    assert check_against_captum(name)


@pytest.mark.soak
@pytest.mark.parametrize("name", FAMILIES)
def test_the_maps_of_each_family_equal_captums(name: str) -> None:
    assert check_against_captum(name) == (name not in WITHOUT_CLOSED_FORM)


def test_the_families_are_forty_and_more() -> None:
    assert len(set(FAMILIES)) == len(FAMILIES) >= 40
    assert set(FAMILIES) >= WITHOUT_CLOSED_FORM


def test_a_head_with_another_activation_is_differentiated() -> None:
    assert not check_against_captum(DIFFERENTIATED)


def test_published_weights_of_any_tag_give_timms_own_logits(tmp_path: Path) -> None:
    for name in (*IN_SUITE, DIFFERENTIATED):
        sized = {"img_size": 64} if timm.get_pretrained_cfg(name).fixed_input_size else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            theirs = timm.create_model(name, num_classes=7, **sized).eval()
        if getattr(theirs, "global_pool", None) == "token":
            theirs.global_pool = "avg"
        save_file(theirs.state_dict(), tmp_path / "own.safetensors")
        settings = ModelSettings(name=f"timm/{name}", side_px=64, weights=str(tmp_path / "own.safetensors"))
        start = starting_weights(settings, 7, seed=0)
        assert start is not None
        assert start.drawn == start.unused == ()
        ours = build_model(settings.name, 7, **settings.options).eval()
        ours.load_state_dict({key: torch.from_numpy(value) for key, value in start.values.items()})
        inputs = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            assert torch.allclose(ours(inputs), theirs(inputs), rtol=1e-4, atol=1e-5)
        other = starting_weights(settings, 3, seed=0)
        assert other is not None
        assert {one.rpartition(".")[2] for one in other.drawn} == {"weight", "bias"}
        assert len(other.drawn) == 2


def test_every_layer_learns() -> None:
    for name in (*IN_SUITE, DIFFERENTIATED):
        network = build_model(f"timm/{name}", 3, side_px=64, head_dropout=0.4).train()
        assert {m.p for m in network.head.modules() if isinstance(m, nn.Dropout)} == {0.4}
        network(torch.randn(2, 3, 64, 64)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())


def test_side_and_scaling_are_its_own_unless_they_are_set() -> None:
    chosen = ModelSettings(name="timm/test_resnet.r160_in1k")
    published = timm.get_pretrained_cfg("test_resnet.r160_in1k")
    assert (chosen.side_px, chosen.scaling, chosen.pixel_scaling) == (published.input_size[-1], "own", "mean_std")
    assert chosen.own_pixels == (published.mean, published.std)
    assert chosen.options == {"head_dropout": 0.2, "side_px": published.input_size[-1]}
    other = TrainersSettings().with_values({"model": {"name": "timm/test_resnet", "side_px": 48, "scaling": "min_max"}})
    assert (other.model.side_px, other.model.own_pixels, other.model.pixel_scaling) == (48, None, "min_max")
    with pytest.raises(ValueError, match="scaling=own is for networks of timm, and custom_cnn"):
        ModelSettings(scaling="own")


def test_embedded_positions_of_another_side_are_interpolated(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        theirs = {side: timm.create_model("test_vit", num_classes=3, img_size=side) for side in (96, 64)}
    save_file(theirs[96].state_dict(), tmp_path / "large.safetensors")
    settings = ModelSettings(name="timm/test_vit", side_px=64, weights=str(tmp_path / "large.safetensors"))
    start = starting_weights(settings, 3, seed=0)
    assert start is not None
    assert start.drawn == start.unused == ()
    checked = timm.models.vision_transformer.checkpoint_filter_fn(theirs[96].state_dict(), theirs[64])
    assert torch.equal(torch.from_numpy(start.values["features.body.pos_embed"]), checked["pos_embed"])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("test_vit4", "does not pool the last feature map"),
        ("deit_tiny_distilled_patch16_224", "does not pool the last feature map"),
        ("crossvit_9_dagger_240", "are no map of positions"),
    ],
)
def test_a_head_that_pools_no_map_is_refused(name: str, why: str) -> None:
    side_px = timm.get_pretrained_cfg(name).input_size[-1]
    with pytest.raises(ConfigError, match=f"timm/{name} cannot be used: .*{why}.*choose a network"):
        build_model(f"timm/{name}", 3, side_px=side_px)


def test_names_that_timm_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"has no network 'resnet5O'; close to it are timm/resnet5"):
        MODELS["timm/resnet5O"]
    with pytest.raises(ConfigError, match=r"has no weights 'nobody' for test_resnet; it has test_resnet.r160_in1k"):
        MODELS["timm/test_resnet.nobody"]
    with pytest.raises(ConfigError, match=r"has no network 'hf-hub:timm/resnet18.a1_in1k'"):
        MODELS["timm/hf-hub:timm/resnet18.a1_in1k"]
    with pytest.raises(ConfigError, match=r"has no network '\.\./x'"):
        MODELS["timm/../x"]
    with pytest.raises(ConfigError, match="is an old name: timm calls it timm/"):
        MODELS["timm/tf_efficientnet_b0_ns"]
    with pytest.raises(ValueError, match="has no network ''"):
        TrainersSettings(model=ModelSettings(name="timm/"))
    with pytest.raises(ConfigError, match=r"unknown model 'resnet50'; there are .*, and timm/NAME"):
        MODELS["resnet50"]


def test_the_extra_is_named_where_timm_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from vision.networks import timm_nets

    timm_nets.recipe_of.cache_clear()
    monkeypatch.setattr(timm_nets, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'relook\[timm\]' brings it"):
        MODELS["timm/resnet18"]


def test_patches_that_overlap_see_sides_that_are_no_multiple_of_them() -> None:
    """pvt_v2 reads 7 px every 4 px, three of them beyond the rim: at 64 px it sees every pixel."""
    network = build_model("timm/pvt_v2_b0", 3, side_px=64).eval()
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (seen,) = torch.autograd.grad(network(image).square().sum(), image)
    assert bool((seen != 0).any(dim=1).all())


def test_a_side_that_does_not_fit_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"levit_128s cannot be used at 50 px .*was published for 224 px"):
        build_model("timm/levit_128s", 3, side_px=50)
    with pytest.raises(ConfigError, match=r"reads patches of 16 px, and .*side_px is 150; take .* such as 144 or 160"):
        build_model("timm/test_vit", 3, side_px=150)
    with pytest.raises(ValueError, match="side_px is 16, and timm/test_resnet needs at least"):
        ModelSettings(name="timm/test_resnet", side_px=16)


def test_weights_come_from_the_hubs_cache_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    settings = ModelSettings(name="timm/test_resnet.r160_in1k", side_px=64, weights="hub")
    with pytest.raises(UnavailableError, match=r"timm/test_resnet.r160_in1k cannot be fetched from the hub .* give a"):
        starting_weights(settings, 3, seed=0)
    kept = tmp_path / "models--timm--test_resnet.r160_in1k"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0" * 40)
    (kept / "snapshots" / ("0" * 40)).mkdir(parents=True)
    theirs = timm.create_model("test_resnet")
    save_file(theirs.state_dict(), kept / "snapshots" / ("0" * 40) / "model.safetensors")
    start = starting_weights(settings, 3, seed=0)
    assert start is not None
    assert (start.source, start.unused) == ("hub", ("head.linear.bias", "head.linear.weight"))
    with pytest.raises(ConfigError, match=r"set trainers\.model\.weights=hub"):
        starting_weights(ModelSettings(name="timm/test_resnet", weights="imagenet"), 3, seed=0)
    with pytest.raises(ConfigError, match="has weights of timm's networks, and custom_cnn is none"):
        starting_weights(ModelSettings(weights="hub"), 3, seed=0)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "other.safetensors")
    settings = ModelSettings(name="timm/test_resnet", weights=str(tmp_path / "other.safetensors"))
    with pytest.raises(ConfigError, match=r"of the .* tensors of timm/test_resnet: .*written for this network"):
        starting_weights(settings, 3, seed=0)


def test_weights_that_a_command_makes_are_named_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ModelSettings(name="timm/test_vit", weights=DINOV2_FILE)
    with pytest.raises(UnavailableError, match=r"cannot be read \(No such .*`python -m bench\.train\.dinov2_weights`"):
        starting_weights(settings, 3, seed=0)


def test_the_catalogue_says_how_timms_networks_are_named() -> None:
    (row,) = (row for row in MODELS.catalogue() if row["name"] == "timm/NAME")
    assert "timm/resnet50" in row["description"]
