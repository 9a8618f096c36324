"""examples/features/backbones.py: networks of timm and their weights, stages and strides."""

from __future__ import annotations

import extract_features
import feature_packages  # noqa: F401
import pytest
import torch
from features import backbones, extraction
from features import geometry as geometries


def test_list_of_stages_has_their_geometry(timm, capsys):
    assert extract_features.main(["--backbone", "timm/test_efficientnet", "--list-stages"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["stage", "number", "features", "stride", "receptive", "field", "in", "pixels"]
    network = timm.create_model("test_efficientnet")
    blocks = [f"blocks.{k}" for k in range(len(network.blocks))]
    assert [line.split()[0] for line in lines] == blocks
    listed = backbones.stage_names(network)
    x = torch.rand(1, 3, 64, 64)
    for line in lines:
        stage = line.split()[0]
        backbone = backbones.load_backbone("test_efficientnet", weights="none", cut=stage)
        geometry = backbone.geometry
        field = "the whole image" if geometry.field is None else str(geometry.field)
        number = [str(listed.index(stage))] if stage in listed else []
        features = str(backbone(x).shape[1])
        assert line.split() == [stage, *number, features, str(geometry.stride), *field.split()]
        for given in number:  # a number and its name are the same stage
            assert backbones.load_backbone("test_efficientnet", weights="none", cut=given).stages == (stage,)
    with pytest.raises(SystemExit):
        extract_features.main(["--backbone", "resnet18"])
    assert "--images and --out are needed, or --list-stages" in capsys.readouterr().err


def test_nothing_after_the_cut_is_computed(timm):
    backbone = backbones.load_backbone("timm/resnet18", weights="none", cut="layer1")
    calls = []
    backbone.network.layer2.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found = backbone(torch.rand(1, 3, 64, 96))
    assert found.shape == (1, 64, 16, 24) and not calls
    assert backbone.geometry == geometries.Geometry(4, 0.5, 43)  # 7x7 and pooling: 11; four 3x3 at stride 4: 32 more


def test_the_output_stride_is_halved_by_dilation(timm):
    network = backbones.load_backbone("resnet18", weights="none", output_stride=16)
    with torch.no_grad():
        assert network(torch.rand(1, 3, 64, 64)).shape == (1, 512, 4, 4)


def test_half_precision_weights_are_loaded_exactly(timm, tmp_path):
    from safetensors.torch import save_file

    network = timm.create_model("resnet18")
    state = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    del state["fc.weight"], state["fc.bias"]
    save_file(state, tmp_path / "w.safetensors")
    loaded = backbones.load_backbone("resnet18", weights=tmp_path / "w.safetensors", cut="0").network
    assert torch.equal(loaded.layer4[1].conv2.weight, network.layer4[1].conv2.weight.half().float())
    state["layer9.weight"] = torch.ones(1)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"does not fit.*1 unexpected \['layer9\.weight'\]"):
        backbones.load_backbone("resnet18", weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet18x"}, "timm has no model 'resnet18x'; similar names: "),
        (
            {"cut": "layer9"},
            r"expected one of act1, layer1, .*, or 0 to 4 \(act1, layer1, .*\), or the name of another submodule, got "
            r"'layer9'; extract_features.py --list-stages",
        ),
        ({"weights": "missing.pt"}, "expected 'pretrained', 'none' or a file, got 'missing.pt'"),
        ({"cut": "1", "stages": ["2"]}, "expected cut or stages, got both"),
    ],
)
def test_errors_of_backbones(timm, options, message):
    with pytest.raises(ValueError, match=message):
        backbones.load_backbone(**{"name": "resnet18", "weights": "none"} | options)


def test_error_without_a_network_connection_names_the_option_for_a_file(timm, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"could not be loaded \(no network\); pass a file: --weights FILE"):
        backbones.load_backbone("resnet18")


def test_tokens_of_a_vision_transformer_become_a_map(timm):
    backbone = backbones.load_backbone("vit_tiny_patch16_224", weights="none", cut="blocks.0")
    with torch.no_grad():
        assert backbone(torch.rand(1, 3, 64, 96)).shape == (1, 192, 4, 6)
    assert backbone.geometry == geometries.Geometry(16, 8.0, None)


def test_tokens_before_those_of_the_patches_are_left_out(timm):
    """A distilled DeiT has two of them."""
    backbone = backbones.load_backbone("deit_tiny_distilled_patch16_224", weights="none", cut="blocks.0")
    with torch.no_grad():
        assert backbone(torch.rand(1, 3, 64, 96)).shape == (1, 192, 4, 6)


def test_convolutional_networks_with_vit_in_their_name_have_maps(timm):
    backbone = backbones.load_backbone("repvit_m0_9", weights="none", cut="0")
    assert backbone.tokens is None
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 64, 96))
    assert maps.shape[2:] == (64 // backbone.geometry.stride, 96 // backbone.geometry.stride)


@pytest.mark.parametrize(
    ("name", "stage", "shape"),
    [("vit_small_patch16_dinov3", "blocks.0", (384, 4, 6)), ("resnet50_clip", "stages.0", (256, 16, 24))],
)
def test_stages_of_networks_for_one_size_take_images_of_any_size(timm, name, stage, shape):
    """The last layers of these networks need images of one size, and are not computed."""
    backbone = backbones.load_backbone(name, weights="none", cut=stage)
    with torch.no_grad():
        assert backbone(torch.rand(1, 3, 64, 96)).shape == (1, *shape)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "swin_tiny_patch4_window7_224",
            "swin_tiny_patch4_window7_224 is not supported: its maps have the features in",
        ),
        ("mixer_s32_224", "does not take images of .* pixels"),
    ],
)
def test_networks_that_cannot_give_maps_are_refused(timm, name, message):
    with pytest.raises(ValueError, match=message):
        backbones.load_backbone(name, weights="none")(torch.rand(1, 3, 64, 96))


def test_vision_transformers_with_any_patch_take_images_of_any_size(timm):
    backbone = backbones.load_backbone("timm/vit_small_patch14_dinov2", weights="none", cut="blocks.0")
    assert backbone.geometry == geometries.Geometry(14, 7.0, None)
    image = torch.rand(1, 3, 100, 150)
    for symmetric in (False, True):
        bag = extraction.map_bag(backbone, backbone.geometry, image, (1.0,), symmetric)
        assert bag.grid == extraction.grid_of(backbone, (100, 150), 1.0) == (8, 11)
        assert bag.coords[[0, -1]].tolist() == [[7, 7], [10 * 14 + 7, 7 * 14 + 7]]
    assert extraction.map_of(backbone, image, (1.0, 0.5), False).shape == (2 * 384, 8, 11)


def test_networks_of_torchvision(timm, tmp_path):
    """SqueezeNet has no padding in its first layers: fewer cells than strides, and an exact stride all the same."""
    from torchvision.models import squeezenet1_0

    network = squeezenet1_0(weights=None).eval()
    torch.save({k: v for k, v in network.state_dict().items() if "classifier" not in k}, tmp_path / "trunk.pt")
    backbone = backbones.load_backbone("torchvision/squeezenet1_0", weights=tmp_path / "trunk.pt", cut="features.6")
    assert backbone.geometry.stride == 8 and backbone.geometry.field == 43
    image = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        wanted = network.features[:7]((image - backbone.mean) / backbone.std)
    torch.testing.assert_close(backbone(image), wanted)
    geometry = geometries.geometry_of(network, "features.12", 224)
    assert (geometry.stride, geometry.field) == (16, 155)
    assert backbones.stages_in(network) == [f"features.{k}" for k in range(13)]
    with pytest.raises(ValueError, match="similar names: squeezenet1_0, squeezenet1_1"):
        backbones.load_backbone("torchvision/squeezenet", weights="none")
    with pytest.raises(ValueError, match="expected a network of timm"):
        backbones.load_backbone("torchvision/squeezenet1_0", weights="none", output_stride=8)
