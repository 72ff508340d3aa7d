"""The sampling step and the loss against their definitions, and the pitfalls of the method."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssod_edge import ops
from ssod_edge.config import BALANCES
from ssod_edge.errors import UsageError
from ssod_edge.ops import kernel_in_use, patch_sample, ssod_loss


@pytest.fixture(autouse=True, params=["compiled", "reference"])
def kernel(request, monkeypatch):
    """Every test of this file runs on the compiled kernel and on plain PyTorch."""
    if request.param == "reference":
        monkeypatch.setattr(ops, "_compiled", lambda device: False)
    elif not ops._compiled("cpu"):
        pytest.skip("the kernel was not built")
    return request.param


def head(p=48, d=16, m=10, scale=6.0, dtype=torch.float32, seed=0):
    """z, weight, bias, target with confidences all over (0, 1)."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(p, d, generator=g)
    weight, bias = scale / d**0.5 * torch.randn(m, d, generator=g), torch.randn(m, generator=g)
    target = torch.randint(0, m, (p,), generator=g)
    target[::2] = (z @ weight.T + bias).argmax(1)[::2]
    return z.to(dtype), weight.to(dtype), bias.to(dtype), target


def loss_args(**kwargs):
    z, weight, bias, target = head(**kwargs)
    g = torch.Generator().manual_seed(1)
    return z, weight, bias, torch.randn(z.shape[1], generator=g).to(z.dtype), torch.zeros((), dtype=z.dtype), target


@pytest.mark.parametrize("p", [0, 1, 7, 49])
@pytest.mark.parametrize(("d", "m"), [(1, 1), (3, 2), (64, 10), (784, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_confidence_is_the_softmax_of_the_target_class_in_double(p, d, m, dtype):
    # fp32 rounds logits of this size to about 1e-6; larger ones would need a wider tolerance.
    z, weight, bias, target = head(p, d, m, scale=3.0, dtype=dtype)
    confidence, label = patch_sample(z, weight, bias, target)
    logits = F.linear(z.double(), weight.double(), bias.double())
    expected = logits.softmax(1).gather(1, target[:, None]).squeeze(1)
    assert confidence.dtype == torch.float32 and label.dtype == torch.int8
    assert confidence.shape == label.shape == (p,)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-4
    torch.testing.assert_close(confidence.double(), expected, rtol=0, atol=tolerance)
    clear = ((expected - 0.95).abs() > 1e-4) & ((expected - 0.05).abs() > 1e-4)
    wanted = torch.where(expected >= 0.95, 1, torch.where(expected < 0.05, 0, -1))
    assert torch.equal(label[clear].long(), wanted[clear])


def test_thresholds_are_closed_above_and_open_below():
    z, weight, bias, target = head(p=200)
    confidence, _ = patch_sample(z, weight, bias, target)
    c = next(float(v) for v in confidence if 0.6 < v < 0.9)
    index = int((confidence == c).nonzero()[0])
    up = float(np.nextafter(np.float32(c), np.float32(1)))
    assert patch_sample(z, weight, bias, target, gamma=c)[1][index] == 1  # conf >= gamma
    assert patch_sample(z, weight, bias, target, gamma=up)[1][index] == -1
    low = next(float(v) for v in confidence if 0.1 < v < 0.4)
    index = int((confidence == low).nonzero()[0])
    at = 1.0 - low  # 1 - gamma == low in double
    assert patch_sample(z, weight, bias, target, gamma=at)[1][index] == -1  # conf < 1 - gamma fails at equality
    below = 1.0 - float(np.nextafter(np.float32(low), np.float32(1)))
    assert patch_sample(z, weight, bias, target, gamma=below)[1][index] == 0


def test_at_initialisation_every_patch_of_1000_classes_is_background_and_none_of_10():
    z = torch.randn(98, 32)
    target = torch.zeros(98, dtype=torch.int64)
    for m, label in ((1000, 0), (10, -1)):
        labels = patch_sample(z, torch.zeros(m, 32), torch.zeros(m), target)[1]
        assert (labels == label).all()


def test_large_bf16_logits_are_added_up_in_fp32():
    z, weight, bias, target = head(p=400, d=256, scale=20.0, dtype=torch.bfloat16)
    confidence = patch_sample(z, weight, bias, target)[0]
    exact = F.linear(z.double(), weight.double(), bias.double()).softmax(1).gather(1, target[:, None]).squeeze(1)
    rounded = F.linear(z, weight, bias).float().softmax(1).gather(1, target[:, None]).squeeze(1)
    assert (confidence - exact).abs().max() < 2e-5 < 1e-2 < (rounded - exact).abs().max()


def test_nan_logits_and_negative_targets_are_ignored_and_counted():
    z, weight, bias, w_ood, b_ood, target = loss_args(p=12)
    z[3, 0] = torch.nan
    target[5:8] = -1
    confidence, label = patch_sample(z, weight, bias, target)
    assert confidence[3].isnan() and label[3] == -1
    assert confidence[5:8].isnan().all() and (label[5:8] == -1).all()
    z.requires_grad_()
    loss, stats = ssod_loss(z, weight, bias, w_ood, b_ood, target)
    loss.backward()
    assert loss.isfinite() and int(stats["n_invalid"]) == 1
    assert z.grad.isfinite().all() and (z.grad[3] == 0).all() and (z.grad[5:8] == 0).all()


def test_equal_huge_and_infinite_logits():
    target = torch.zeros(1, dtype=torch.int64)
    one = torch.ones(1, 1)
    assert patch_sample(one, torch.zeros(4, 1), torch.zeros(4), target)[0].item() == 0.25
    bias = torch.tensor([1e30, 0.0, 0.0, 0.0])
    assert patch_sample(one, torch.zeros(4, 1), bias, target)[0].item() == 1.0
    bias = torch.tensor([torch.inf, 0.0, 0.0, 0.0])
    confidence, label = patch_sample(one, torch.zeros(4, 1), bias, target)
    assert confidence.isnan().all() and (label == -1).all()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 0.0, -1.0, 2.0, math.nan])
def test_gamma_outside_its_range_is_refused(gamma):
    with pytest.raises(UsageError, match=r"0\.5 < gamma < 1"):
        patch_sample(*head(), gamma=gamma)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, w, b, t: (z[0], w, b, t), "z must be"),
        (lambda z, w, b, t: (z.long(), w, b, t), "z must be"),
        (lambda z, w, b, t: (z, w[:, 1:], b, t), "weight must be"),
        (lambda z, w, b, t: (z, w, b[1:], t), "bias must be"),
        (lambda z, w, b, t: (z, w, b, t[1:]), "target must be int64"),
        (lambda z, w, b, t: (z, w, b, t.int()), "target must be int64"),
        (lambda z, w, b, t: (z, w, b, t + 10), "below the 10 classes"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    with pytest.raises(UsageError, match=message):
        patch_sample(*change(*head()))


def naive_terms(z, weight, bias, w_ood, b_ood, target, gamma=0.95):
    """Losses of the ID patches and of the OOD patches, one patch at a time."""
    confidence = F.linear(z, weight, bias).softmax(1).gather(1, target[:, None]).squeeze(1)
    s = z @ w_ood + b_ood
    id_terms = [math.log1p(math.exp(-float(v))) for v, c in zip(s, confidence, strict=True) if c >= gamma]
    ood_terms = [math.log1p(math.exp(float(v))) for v, c in zip(s, confidence, strict=True) if c < 1 - gamma]
    return id_terms, ood_terms


def test_balances_follow_table_5():
    args = loss_args(p=64, dtype=torch.float64)
    id_terms, ood_terms = naive_terms(*args)
    n_id, n_ood = len(id_terms), len(ood_terms)
    assert n_id != n_ood and min(n_id, n_ood) > 3
    lwb, stats = ssod_loss(*args, balance="lwb")
    assert float(lwb) == pytest.approx(0.5 * (np.mean(id_terms) + np.mean(ood_terms)))
    lw, _ = ssod_loss(*args, balance="lw")
    assert float(lw) == pytest.approx((sum(id_terms) + n_id / n_ood * sum(ood_terms)) / (n_id + n_ood))
    assert (int(stats["n_id"]), int(stats["n_ood"])) == (n_id, n_ood)
    assert int(stats["n_ignored"]) == 64 - n_id - n_ood
    assert float(stats["sum_id"]) == pytest.approx(sum(id_terms))
    assert float(stats["sum_ood"]) == pytest.approx(sum(ood_terms))


def test_resampling_takes_as_many_id_as_ood_patches_of_each_image():
    args = loss_args(p=160)
    _, labels = patch_sample(*args[:3], args[5])
    expected = sum(min(int((image == 1).sum()), int((image == 0).sum())) for image in labels.reshape(-1, 16))
    losses = set()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        loss, stats = ssod_loss(*args, balance="dr", patches_per_image=16, generator=generator)
        assert int(stats["n_id"]) == int(stats["n_ood"]) == expected > 0
        losses.add(float(loss))
    assert len(losses) > 1, "the draw does not depend on the generator"
    again = ssod_loss(*args, balance="dr", patches_per_image=16, generator=torch.Generator().manual_seed(3))[0]
    assert float(again) == float(loss)


@pytest.mark.parametrize("patches_per_image", [None, 0, 7])
def test_resampling_needs_the_patches_of_an_image(patches_per_image):
    with pytest.raises(UsageError, match="patches_per_image"):
        ssod_loss(*loss_args(p=48), balance="dr", patches_per_image=patches_per_image)


def test_an_unknown_balance_is_refused():
    with pytest.raises(UsageError, match="balance must be one of"):
        ssod_loss(*loss_args(), balance="mean")


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("kind", ["no ID", "no OOD", "neither", "no patches"])
def test_an_empty_set_adds_zero_with_zero_gradient(balance, kind):
    z, weight, bias, w_ood, b_ood, target = loss_args(p=32)
    label = patch_sample(z, weight, bias, target)[1]
    keep = {"no ID": label == 0, "no OOD": label == 1, "neither": label == -1, "no patches": label > 1}[kind]
    z, target = z[keep].requires_grad_(), target[keep]
    w_ood.requires_grad_()
    loss, _ = ssod_loss(z, weight, bias, w_ood, b_ood, target, balance=balance, patches_per_image=max(len(target), 1))
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all() and w_ood.grad.isfinite().all()
    if kind in ("neither", "no patches") or balance == "dr" or (balance == "lw" and kind == "no ID"):
        assert float(loss.detach()) == 0 and (w_ood.grad == 0).all()
    if balance == "lwb" and kind == "no OOD":
        # The weight of the term that is there stays one half.
        assert float(loss.detach()) == pytest.approx(
            0.5 * float(F.softplus(-(z @ w_ood + b_ood)).mean().detach()), rel=1e-5
        )


@pytest.mark.parametrize("balance", ["lwb", "lw"])
def test_gradients_reach_z_and_the_ood_row_only(balance):
    z, weight, bias, w_ood, b_ood, target = loss_args(p=10, d=5, m=4, dtype=torch.float64)
    for tensor in (z, weight, bias, w_ood, b_ood):
        tensor.requires_grad_()
    ssod_loss(z, weight, bias, w_ood, b_ood, target, balance=balance)[0].backward()
    assert weight.grad is None and bias.grad is None

    def loss(z, w_ood, b_ood):
        return ssod_loss(z, weight, bias, w_ood, b_ood, target, balance=balance)[0]

    assert torch.autograd.gradcheck(loss, (z, w_ood, b_ood))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 30), st.integers(1, 9), st.integers(1, 12), st.floats(-50, 50), st.integers(0, 1000))
def test_shifting_all_logits_changes_nothing(p, d, m, shift, seed):
    z, weight, bias, target = head(p, d, m, dtype=torch.float64, seed=seed)
    confidence, _ = patch_sample(z, weight, bias, target)
    shifted, _ = patch_sample(z, weight, bias + shift, target)
    torch.testing.assert_close(confidence, shifted, rtol=1e-9, atol=1e-12)
    assert ((confidence >= 0) & (confidence <= 1 + 1e-12)).all()


def test_non_contiguous_patches_and_a_column_of_ood_weight():
    z, weight, bias, w_ood, b_ood, target = loss_args(p=32)
    plain = ssod_loss(z, weight, bias, w_ood, b_ood, target)[0]
    strided = z.T.contiguous().T
    assert not strided.is_contiguous()
    other = ssod_loss(strided, weight, bias, w_ood[None], b_ood.reshape(1), target)[0]
    torch.testing.assert_close(plain, other)


def test_the_kernel_in_use_is_named(kernel):
    assert kernel_in_use("cpu") == kernel
    assert kernel_in_use("cpu", "reference") == "reference"
    with pytest.raises(UsageError, match="kernel must be one of auto, reference, got 'cuda'"):
        kernel_in_use("cpu", "cuda")


def test_a_map_with_one_target_an_image_gives_what_its_patches_give():
    z, weight, bias, w_ood, b_ood, _ = loss_args(p=24)
    target = torch.tensor([0, 3, -1, 2])
    confidence, label = patch_sample(z.view(4, 3, 2, 16), weight, bias, target)
    expected = patch_sample(z, weight, bias, target.repeat_interleave(6))
    assert confidence.shape == (24,) and torch.equal(label, expected[1])
    torch.testing.assert_close(confidence, expected[0], equal_nan=True)
    for balance in BALANCES:
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        loss, stats = ssod_loss(
            z.view(4, 6, 16), weight, bias, w_ood, b_ood, target, balance=balance, generator=generators[0]
        )
        flat, flat_stats = ssod_loss(
            z, weight, bias, w_ood, b_ood, target.repeat_interleave(6), balance=balance, patches_per_image=6,
            generator=generators[1],
        )  # fmt: skip
        torch.testing.assert_close(loss, flat)
        assert int(stats["n_id"]) == int(flat_stats["n_id"]) and int(stats["n_invalid"]) == 0
