"""The compiled sampling kernel on a CUDA device: `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_inputs import DTYPES, ROWS, exact, features, mixed

from ssod_edge import ops
from ssod_edge.ops import patch_sample, ssod_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def compiled():
    assert ops.kernel_in_use("cuda") == "compiled", "build it with SSOD_EDGE_EXT=cuda"


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """Plain PyTorch is the oracle here: without TF32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row)))
def test_every_result_is_that_of_fp64(row):
    p, d, m, dtype, layout = row
    g = torch.Generator().manual_seed(0)
    kind = DTYPES[dtype]
    z, rows = features(p, d, kind, layout, g)
    weight, bias = (3 / d**0.5 * torch.randn(m, d, generator=g)).to(kind), torch.randn(m, generator=g)
    w_ood, b_ood = torch.randn(d, generator=g).to(kind), torch.tensor(0.5)
    target = torch.randint(-1, m, (z.shape[0],), generator=g)
    label_of = target.repeat_interleave(len(rows) // max(1, z.shape[0]))
    arguments = [t.cuda() for t in (z, weight, bias, w_ood, b_ood, target)]
    assert arguments[0].stride() == z.stride() or layout in ("slice", "map slice")
    confidence, label, s = (t.cpu() for t in ops.sample_patches(*arguments, 0.95, "auto"))
    expected = exact(rows.cuda(), *arguments[1:3], label_of.cuda()).cpu()
    tolerance = 2e-6 if dtype == "fp32" else 2e-4
    torch.testing.assert_close(confidence.double(), expected, rtol=0, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(s.double(), rows.double() @ w_ood.double() + 0.5, rtol=1e-5, atol=2e-4)
    near = 1e-6 if dtype == "fp32" else 1e-4
    clear = ((expected - 0.95).abs() > near) & ((expected - 0.05).abs() > near)
    wanted = torch.where(expected >= 0.95, 1, torch.where(expected < 0.05, 0, -1))
    assert torch.equal(label[clear].long(), wanted[clear])
    assert (label[label_of < 0] == -1).all()


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("m", [10, 1000])
def test_results_are_the_same_bit_for_bit(dtype, m):
    arguments = [t.cuda() for t in mixed(DTYPES[dtype], p=3000, m=m)]
    first = ops.sample_patches(*arguments, 0.95, "auto")
    for _ in range(5):
        again = ops.sample_patches(*arguments, 0.95, "auto")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("m", [10, 1000])
def test_a_cuda_graph_replays_it_on_new_features(dtype, m):
    z, *others = (t.cuda() for t in mixed(DTYPES[dtype], p=500, m=m))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.sample_patches(z, *others, 0.95, "auto")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.sample_patches(z, *others, 0.95, "auto")
    z.copy_(torch.randn_like(z))
    graph.replay()
    expected = ops.sample_patches(z, *others, 0.95, "auto")
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_it_runs_on_the_current_stream_without_waiting():
    arguments = [t.cuda() for t in mixed(torch.bfloat16, p=4096, m=1000)]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        ops.sample_patches(*arguments, 0.95, "auto")
        assert not stream.query(), "something waited for the device"
    torch.cuda.synchronize()


def test_targets_out_of_range_are_counted_and_never_read():
    z, weight, bias, w_ood, b_ood, target = (t.cuda() for t in mixed(torch.float32, p=20, m=10))
    target[3], target[4], target[5] = 10, 2**40, -7
    confidence, label = patch_sample(z, weight, bias, target)
    assert confidence[3:6].isnan().all() and (label[3:6] == -1).all() and not confidence[:3].isnan().any()
    assert int(ssod_loss(z, weight, bias, w_ood, b_ood, target)[1]["n_invalid"]) == 2


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("balance", ["lwb", "lw", "dr"])
def test_gradients_are_those_of_plain_pytorch(dtype, balance):
    z, weight, bias, w_ood, b_ood, target = (t.cuda() for t in mixed(DTYPES[dtype], p=96, m=50))
    weight, w_ood = weight.to(z.dtype), w_ood.to(z.dtype)
    z, target = z.view(6, 16, -1), target[:6]
    grads = {}
    for kernel in ("auto", "reference"):
        leaves = [tensor.clone().requires_grad_() for tensor in (z, w_ood, b_ood)]
        generator = torch.Generator("cuda").manual_seed(0)
        loss, _ = ssod_loss(leaves[0], weight, bias, *leaves[1:], target, 0.95, balance, None, generator, kernel)
        loss.backward()
        grads[kernel] = [leaf.grad for leaf in leaves]
    tolerance = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}[dtype]
    for ours, theirs in zip(grads["auto"], grads["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()) + 1e-12)


def test_autocast_samples_in_the_dtype_of_the_features():
    z, weight, bias, _, _, target = (t.cuda() for t in mixed(torch.bfloat16, p=300, m=50))
    with torch.autocast("cuda", torch.bfloat16):
        confidence, _ = patch_sample(z, weight, bias, target)
    expected = exact(z, weight.bfloat16(), bias, target)
    torch.testing.assert_close(confidence.double(), expected, rtol=0, atol=2e-4)


def test_a_compiled_graph_holds_it():
    z, weight, bias, w_ood, b_ood, target = (t.cuda() for t in mixed(torch.float32, p=64, d=32, m=7))

    def loss(z):
        return ssod_loss(z, weight, bias, w_ood, b_ood, target)[0]

    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(z), loss(z))


def test_it_is_an_operator_that_pytorch_accepts():
    z, weight, bias, w_ood, b_ood, target = (t.cuda() for t in mixed(torch.float32, p=12, d=8, m=5))
    arguments = (z.view(3, 4, 8).requires_grad_(), weight, bias, w_ood, b_ood, target[:3], 0.95, 0.05)
    torch.library.opcheck(torch.ops.ssod_edge.sample.default, arguments)


@pytest.mark.parametrize("large", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("m", [12, 300])
def test_logits_that_are_not_finite(m, large):
    z, weight, bias = torch.ones(3, 8, device="cuda"), torch.zeros(m, 8, device="cuda"), torch.zeros(m, device="cuda")
    weight[3, 1] = large
    target = torch.tensor([3, 0, m - 1], device="cuda")
    expected = F.linear(z, weight, bias).softmax(1).gather(1, target[:, None])[:, 0]
    confidence, label = patch_sample(z, weight, bias, target)
    torch.testing.assert_close(confidence, expected, equal_nan=True)
    assert (label[confidence.isnan()] == -1).all()
