"""The training loss: its terms, what each of them teaches, and that two processes compute what one does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from ssod_edge.config import LossConfig, Preprocess
from ssod_edge.errors import UsageError
from ssod_edge.ops import background_norm, patch_sample
from ssod_edge.training import objective
from ssod_edge.training.model import build_model, normalise
from ssod_edge.training.objective import NORM_WEIGHT, TrainStep, class_weights, outlier_loss


@pytest.mark.slow
def test_torch_compile_takes_the_step():
    model = build_model("test_efficientnet", ("a", "b"), Preprocess(32))
    step = TrainStep(model, LossConfig())
    image, target = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    compiled = torch.compile(step, backend="aot_eager")
    for warm in (False, True):
        torch.testing.assert_close(compiled(image, target, warm)[0], step(image, target, warm)[0], rtol=1e-3, atol=1e-4)


def seeded_step():
    """A model without batch norm, labels that give ID, OOD and ignored patches, and a global batch."""
    torch.manual_seed(3)
    model = build_model("test_convnext", ("a", "b", "c"), Preprocess(input_size=64))
    torch.nn.init.normal_(model.ood.weight)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    image = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    return TrainStep(model, LossConfig(method="both", gamma=0.7)), image, torch.randint(0, 3, (8,))


def two_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    step, image, target = seeded_step()
    parallel = torch.nn.parallel.DistributedDataParallel(step, find_unused_parameters=True)
    # Uneven counts of ID and OOD patches on the two sides: a mean of means would be wrong.
    loss, stats = parallel(image[rank::2], target[rank::2], True)
    loss.backward()
    grads = {name: p.grad for name, p in step.named_parameters()}
    torch.save({"loss": loss.detach(), "grads": grads, "n_id": stats["n_id"]}, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_give_the_gradients_of_one(tmp_path):
    step, image, target = seeded_step()
    loss, stats = step(image, target, True)
    loss.backward()
    assert int(stats["n_id"]) > 0 and int(stats["n_ood"]) > 0
    mp.spawn(two_processes, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert int(parts[0]["n_id"]) != int(parts[1]["n_id"]), "counts are even by accident; choose another seed"
    torch.testing.assert_close((parts[0]["loss"] + parts[1]["loss"]) / 2, loss.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in step.named_parameters():
        torch.testing.assert_close(parts[0]["grads"][name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
        assert torch.equal(parts[0]["grads"][name], parts[1]["grads"][name])


def grads(step, image, target, warm=True):
    """Loss, log, and the names of the parameters that get a gradient."""
    step.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    loss, log = step(image, target, warm)
    loss.backward()
    return loss.detach(), log, {n: p.grad.clone() for n, p in step.model.named_parameters() if p.grad is not None}


def made_step(**loss):
    step, image, target = seeded_step()
    step.config = LossConfig(gamma=0.7, **loss)
    return step, image, target


def test_before_it_is_warm_and_by_method_ce_the_loss_is_cross_entropy():
    step, image, target = made_step(method="both", outliers=("zoom",))
    cold = grads(step, image, target, warm=False)
    plain = made_step(method="ce")[0]
    found = grads(plain, image, target)
    logits, _ = plain.model(normalise(image, plain.model.preprocess))
    torch.testing.assert_close(found[0], F.cross_entropy(logits, target).detach(), rtol=1e-4, atol=1e-5)
    assert cold[0] == found[0] and "ood.weight" not in found[2] and set(found[1]) == {"ce", "correct"}


def test_each_method_adds_its_own_term():
    losses = {m: grads(*made_step(method=m)) for m in ("ce", "ssod", "lbf", "both")}
    ce = losses["ce"][0]
    assert losses["ssod"][0] > ce and losses["lbf"][0] > ce
    torch.testing.assert_close(losses["both"][0] - ce, losses["ssod"][0] + losses["lbf"][0] - 2 * ce)
    assert [("ood.weight" in losses[m][2]) for m in losses] == [False, True, False, True]
    assert losses["lbf"][1]["norm"] > 0 and "ood" not in losses["lbf"][1] and losses["lbf"][1]["n_ood"] > 0


def test_outliers_teach_the_row_on_pooled_features():
    step, image, target = made_step(method="ce", outliers=("shuffle",), outlier_share=0.5)
    loss, log, gradients = grads(step, image, target)
    assert gradients["ood.weight"].any() and log["outlier"] > 0
    torch.testing.assert_close(loss, log["ce"] + log["outlier"])
    s = torch.tensor([2.0, -1.0, 3.0])
    expected = 0.5 * ((F.softplus(-s[0]) + F.softplus(-s[1])) / 2 + F.softplus(s[2]))
    torch.testing.assert_close(outlier_loss(s, 2), expected)


@pytest.mark.parametrize(("method", "row"), [("ssod", True), ("lbf", False), ("both", True)])
def test_patches_are_sampled_once_whatever_reads_them(method, row, monkeypatch):
    step, image, target = made_step(method=method)
    sample, calls = objective.sample_patches, []
    monkeypatch.setattr(
        objective, "sample_patches", lambda *given: (calls.append(given[3] is not None), sample(*given))[1]
    )
    step(image, target, True)
    assert calls == [row]


def test_both_is_the_sum_of_its_terms():
    logs = {}
    for method in ("ssod", "lbf", "both"):
        step, image, target = made_step(method=method, alpha=0.7)
        torch.manual_seed(5)
        logs[method] = step(image, target, True)
    (loss, log), ssod, lbf = logs["both"], logs["ssod"][1], logs["lbf"][1]
    assert torch.equal(log["ood"], ssod["ood"]) and torch.equal(log["norm"], lbf["norm"])
    assert all(torch.equal(log[name], ssod[name]) for name in ("n_id", "n_ood", "n_ignored", "n_invalid"))
    torch.testing.assert_close(loss, log["ce"] + 0.7 * log["ood"] + NORM_WEIGHT * log["norm"])


def test_background_norm_is_the_mean_over_ood_patches_alone():
    torch.manual_seed(1)
    z = torch.randn(40, 6, requires_grad=True)
    weight, bias, target = torch.randn(3, 6), torch.zeros(3), torch.randint(0, 3, (40,))
    label = patch_sample(z.detach(), weight, bias, target, 0.8)[1]
    ood, (loss, stats) = label == 0, background_norm(z, label)
    assert 0 < ood.sum() < 40 and stats["n_ood"] == ood.sum()
    torch.testing.assert_close(loss, z[ood].norm(dim=1).mean())
    loss.backward()
    assert z.grad[ood].abs().sum(1).min() > 0 and not z.grad[~ood].any()


def test_background_norm_of_nothing_and_of_a_nan_that_is_ignored():
    z = torch.zeros(4, 2, requires_grad=True)
    label = patch_sample(z.detach(), torch.zeros(2, 2), torch.zeros(2), torch.zeros(4, dtype=torch.int64))[1]
    assert (label == -1).all()
    loss, _ = background_norm(z, label)
    loss.backward()
    assert loss == 0 and not z.grad.any()
    z = torch.tensor([[0.0, 3.0], [torch.nan, 1.0]], requires_grad=True)
    label = patch_sample(z.detach(), 5 * torch.eye(2), torch.zeros(2), torch.zeros(2, dtype=torch.int64))[1]
    loss, stats = background_norm(z, label)
    loss.backward()
    assert loss == 3 and stats["n_ood"] == 1 and z.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "oe"}, "method must be one of ssod, lbf, both, ce"),
        ({"outliers": ("rotate", "cutmix")}, "outliers must be different ones of rotate, shuffle, zoom, blend"),
        ({"outliers": ("zoom", "zoom")}, "outliers must be different ones"),
        ({"outlier_share": 0.0}, "outlier_share must be in"),
        ({"alpha": -1.0}, "alpha must be 0 or more"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(UsageError, match=message):
        LossConfig(**settings)


def test_balanced_class_weights_let_every_class_count_alike():
    labels = np.repeat([0, 1, 2], [6, 3, 1])
    weights = class_weights(labels, "balanced")
    assert weights is not None and torch.allclose(weights * torch.tensor([6.0, 3, 1]), torch.full((3,), 10 / 3))
    assert class_weights(labels, "none") is None
    assert class_weights(np.repeat([0, 1], 4), "balanced") is None, "nothing to change"


def test_class_weights_are_those_of_the_cross_entropy():
    torch.manual_seed(0)
    model = build_model("test_efficientnet", ("a", "b"), Preprocess(32)).eval()
    image, target = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 0, 0, 1])
    plain, weights = LossConfig(method="ce"), torch.tensor([0.5, 2.0])
    step = TrainStep(model, plain, class_weights=weights)
    loss, _ = step(image, target, True)
    logits = model(normalise(image, model.preprocess))[0]
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, weights))
    assert not any("class_weights" in name for name in step.state_dict())
    assert not torch.isclose(loss, TrainStep(model, plain)(image, target, True)[0])
