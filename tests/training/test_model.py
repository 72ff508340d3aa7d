"""The model: most of timm, one more row, patches through its own head."""

from __future__ import annotations

import re

import pytest
import timm
import torch

from ssod_edge.config import ALIASES, LossConfig, Preprocess, resolve_backbone
from ssod_edge.errors import ArtifactError, UsageError
from ssod_edge.training.model import backbone_preprocess, build_model, normalise
from ssod_edge.training.objective import TrainStep

CLASSES = ("cat", "dog", "horse")


def small_model(name="test_efficientnet", size=64):
    torch.manual_seed(0)
    return build_model(name, CLASSES, Preprocess(input_size=size))


@pytest.mark.parametrize("alias", ALIASES)
def test_patches_through_the_unpooled_head_are_the_head_on_each_patch(alias):
    model = small_model(alias, 96).eval()
    with torch.no_grad():
        feature_map = model.backbone.forward_features(torch.randn(2, 3, 96, 96))
        patches = model.patch_features(feature_map)
        n, h, w, d = patches.shape
        assert (n, h, w) == (2, *feature_map.shape[2:]) and d == model.classifier.in_features
        for i in range(h):
            alone = model.backbone.forward_head(feature_map[:, :, i : i + 1, :1], pre_logits=True)
            torch.testing.assert_close(patches[:, i, 0], alone, rtol=1e-4, atol=1e-5)


def test_the_papers_regnet_has_its_width():
    assert small_model("regnet").classifier.in_features == 784
    assert resolve_backbone("mobilenetv3") == "mobilenetv3_large_100"


def test_mobilenets_head_does_not_commute_with_pooling():
    model = small_model("mobilenetv3_small_050").eval()
    with torch.no_grad():
        feature_map = 3 * torch.randn(2, model.backbone.conv_head.in_channels, 2, 2)
        patches = model.patch_features(feature_map)
        pooled = model.backbone.forward_head(feature_map, pre_logits=True)
    assert (patches.mean((1, 2)) - pooled).abs().max() > 0.1 * pooled.abs().max()


@pytest.mark.parametrize("name", ["test_efficientnet", "test_byobnet"])
def test_patches_train_every_weight_and_leave_batch_statistics_alone(name):
    model = small_model(name).train()
    x = torch.randn(4, 3, 64, 64)
    counts = {n: int(b) for n, b in model.named_buffers() if n.endswith("num_batches_tracked")}
    pooled, z = model.forward_train(x)
    assert (
        pooled.shape == (4, model.classifier.in_features)
        and z.dim() == 4
        and z.shape[::3] == (4, model.classifier.in_features)
    )
    after = {n: int(b) for n, b in model.named_buffers() if n.endswith("num_batches_tracked")}
    assert counts and all(after[n] == counts[n] + 1 for n in counts)
    (z**2).mean().backward()
    trunk = [n for n, p in model.named_parameters() if p.grad is None]
    assert set(trunk) == {"backbone.classifier.weight", "backbone.classifier.bias", "ood.weight", "ood.bias"} or all(
        n.startswith(("backbone.head.fc", "ood")) for n in trunk
    )


def test_batch_norm_in_the_head_is_not_updated_by_patches():
    model = small_model("mobilenetv4_conv_small").train()
    norms = [n for n, _ in model.backbone.named_modules() if n.startswith("norm_head")]
    assert norms, "this backbone no longer has batch norm in its head; choose another for this test"
    before = model.backbone.norm_head.running_mean.clone()
    feature_map = torch.randn(2, model.backbone.conv_head.in_channels, 2, 2)
    model.patch_features(feature_map)
    assert torch.equal(before, model.backbone.norm_head.running_mean)
    model.backbone.forward_head(feature_map)
    assert not torch.equal(before, model.backbone.norm_head.running_mean)


def test_patches_of_one_image_are_adjacent():
    model = small_model().eval()
    with torch.no_grad():
        x = torch.randn(3, 3, 64, 64)
        _, z = model.forward_train(x)
        _, alone = model.forward_train(x[1:2])
    torch.testing.assert_close(z[1:2], alone, rtol=1e-4, atol=1e-5)


def test_the_fused_row_gives_what_the_two_heads_give():
    model = small_model().eval()
    torch.nn.init.normal_(model.ood.weight)
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64)
        logits, s = model(x)
        torch.testing.assert_close(logits, model.backbone(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(s, model.ood(model.features(x)).squeeze(1), rtol=1e-4, atol=1e-5)
        weight, bias = model.head_weight()
    assert weight.shape == (4, model.classifier.in_features) and bias.shape == (4,)
    assert logits.dtype == s.dtype == torch.float32


def test_plain_cross_entropy_computes_no_patches():
    model = small_model()
    pooled, z = model.forward_train(torch.randn(2, 3, 64, 64), patches=0)
    assert z is None and pooled.shape == (2, model.classifier.in_features)


def test_the_first_images_alone_give_patches():
    model = small_model().eval()
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        pooled, z = model.forward_train(x, patches=2)
        assert len(pooled) == 3 and len(z) == 2
        torch.testing.assert_close(pooled, model.features(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(z, model.forward_train(x)[1][:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("efficientvit_m0", "its head is more than one linear layer on its features \\[1, 192\\]"),  # a norm
        ("dla46x_c", "ends in Conv2d, not in one nn.Linear. Choose another"),
        ("levit_128s", "ends in tuple, not in one nn.Linear"),  # two classifiers
        ("adv_inception_v3", "unknown backbone 'adv_inception_v3'. Similar: inception_v3"),  # a name of timm's past
        ("mobilenetv33", "unknown backbone 'mobilenetv33'. Similar: mobilenetv3, mobilenet"),
        ("resnet", "unknown backbone 'resnet'. Similar: resnet\\d+, resnet\\d+, resnet\\d+"),
        ("resnet18.bogus", "timm has no weights 'resnet18.bogus'; of this model it has: resnet18\\.a1_in1k, "),
        ("zzz", "unknown backbone 'zzz'. Give one of mobilenetv3, regnet"),
    ],
)
def test_backbones_that_do_not_fit_are_refused_with_the_reason(name, reason):
    with pytest.raises(UsageError, match=reason):
        build_model(name, CLASSES, Preprocess())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("test_vit", r"shape \[1, 17, 64\], not \[N, C, H, W\]"),
        ("vgg11", "mixes neighbouring patches"),
        ("test_mambaout", "on a map that is not pooled"),
        ("swin_tiny_patch4_window7_224", "at one patch for a classifier of 768"),
    ],
)
def test_a_backbone_without_patches_has_all_but_them(name, reason):
    model = build_model(name, CLASSES, Preprocess(64)).eval()
    assert re.search(reason, model.no_patches) and not small_model().no_patches
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits, s = model(x)
        torch.testing.assert_close(logits, model.backbone(x), rtol=1e-4, atol=1e-5)
    assert s.shape == (2,)
    with pytest.raises(UsageError, match="--method ssod labels the patches of a feature map, and"):
        TrainStep(model, LossConfig())


def test_a_size_that_a_backbone_cannot_have_is_named():
    with pytest.raises(
        UsageError, match=r"'test_vit' does not run at 40 px \(.*divisible by patch size.*another --size"
    ):
        build_model("test_vit", CLASSES, Preprocess(40))
    with pytest.raises(
        UsageError, match="'halonet_h1' does not run at 128 px \\(AssertionError\\). Choose another --size"
    ):
        build_model("halonet_h1", CLASSES, Preprocess(128))
    for pretrained in (False, True):
        with pytest.raises(UsageError, match=r"'nest_tiny' does not run at 40 px \(.*\). Choose another --size"):
            build_model("nest_tiny", CLASSES, Preprocess(40), pretrained=pretrained)


@pytest.mark.parametrize("backbone", ["mobilenetv3", "test_efficientnet", "test_resnet"])
def test_a_new_classifier_begins_without_an_opinion(backbone):
    model = build_model(backbone, CLASSES, Preprocess(64)).eval()
    with torch.no_grad():
        logits, _ = model(torch.randn(4, 3, 64, 64))
    assert 0 < logits.abs().max() < 1
    assert torch.softmax(logits, 1).max() < 0.5


def test_local_weights_of_the_same_width_keep_their_classifier(tmp_path):
    donor = timm.create_model("test_efficientnet", num_classes=3)
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    model = build_model("test_efficientnet", CLASSES, Preprocess(64), weights=tmp_path / "weights.pth")
    assert torch.equal(model.classifier.weight, donor.get_classifier().weight)


def test_one_class_is_refused():
    with pytest.raises(UsageError, match="at least 2 classes"):
        build_model("test_efficientnet", ("cat",), Preprocess())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_local_weights_of_another_width_keep_the_new_classifier(tmp_path, suffix):
    from safetensors.torch import save_file

    donor = timm.create_model("test_efficientnet", num_classes=7)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(donor.state_dict(), path)
    else:
        save_file(donor.state_dict(), path)
    model = build_model("test_efficientnet", CLASSES, Preprocess(64), weights=path)
    assert torch.equal(model.backbone.conv_stem.weight, donor.conv_stem.weight)
    assert model.classifier.out_features == 3


def test_weights_of_another_model_or_no_weights_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    with pytest.raises(ArtifactError, match="weights of another model"):
        build_model("test_efficientnet", CLASSES, Preprocess(64), weights=path)
    path.write_bytes(b"not weights")
    with pytest.raises(ArtifactError, match="cannot be read as weights") as caught:
        build_model("test_efficientnet", CLASSES, Preprocess(64), weights=path)
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)
    for other in ([torch.zeros(1)], torch.zeros(1), {"epoch": 3}):
        torch.save(other, path)
        with pytest.raises(ArtifactError, match="cannot be read as weights"):
            build_model("test_efficientnet", CLASSES, Preprocess(64), weights=path)
    with pytest.raises(UsageError, match="does not exist"):
        build_model("test_efficientnet", CLASSES, Preprocess(64), weights=tmp_path / "none.pth")
    with pytest.raises(UsageError, match=r"are a folder. Give a file, of a run its best.safetensors"):
        build_model("test_efficientnet", CLASSES, Preprocess(64), weights=tmp_path)


def test_weights_of_a_transformer_are_those_of_its_size(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(small_model("test_vit").backbone.state_dict(), path)
    assert build_model("test_vit", CLASSES, Preprocess(64), weights=path)
    with pytest.raises(ArtifactError, match=r"\(pos_embed\).*, or of this one at another --size"):
        build_model("test_vit", CLASSES, Preprocess(96), weights=path)


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ArtifactError, match="cannot be read as weights"):
        build_model("test_efficientnet", CLASSES, Preprocess(64), weights=tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


def test_normalise_is_scale_minus_mean_over_std():
    settings = Preprocess(input_size=2, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    image = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 2, 2) * 20
    mean, std = torch.tensor(settings.mean)[:, None, None], torch.tensor(settings.std)[:, None, None]
    torch.testing.assert_close(normalise(image, settings), (image.float() / 255 - mean) / std)


def test_preprocessing_is_the_backbones_own():
    settings = backbone_preprocess("tf_efficientnet_lite0", pretrained=True)
    assert (settings.input_size, settings.crop_pct, settings.interpolation) == (224, 0.875, "bicubic")
    assert backbone_preprocess("tf_efficientnet_lite0", 96).crop_pct == 1.0
    assert backbone_preprocess("tf_efficientnet_lite0", 96).input_size == 96
    with pytest.raises(UsageError, match="input_size must be at least 1 pixel, got 0"):
        backbone_preprocess("tf_efficientnet_lite0", 0)


def failing(error, always=False):
    """`timm.create_model` where published weights, or all models, fail."""
    create = timm.create_model

    def fail(*given, pretrained=False, **named):
        if pretrained or always:
            raise error
        return create(*given, **named)

    return fail


@pytest.mark.parametrize(
    ("error", "always", "message"),
    [
        (
            OSError("no route to host\nmore"),
            False,
            r"cannot be had \(no route to host\)\. Give .* --weights FILE, .*--weights none",
        ),
        (
            RuntimeError("Error(s) in loading state_dict for ResNet:\nx"),
            False,
            r"do not fit it \(Error.*--weights FILE",
        ),
        (RuntimeError("no such layer"), True, r"'test_efficientnet' cannot be built: no such layer$"),
    ],
)
def test_weights_that_cannot_be_had_are_told_from_a_backbone_that_fails(monkeypatch, error, always, message):
    monkeypatch.setattr(timm, "create_model", failing(error, always))
    with pytest.raises(UsageError, match=message):
        build_model("test_efficientnet", CLASSES, Preprocess(64), pretrained=True)


def test_a_lack_of_memory_is_not_a_lack_of_weights(monkeypatch):
    monkeypatch.setattr(timm, "create_model", failing(MemoryError()))
    with pytest.raises(MemoryError):
        build_model("test_efficientnet", CLASSES, Preprocess(64), pretrained=True)
