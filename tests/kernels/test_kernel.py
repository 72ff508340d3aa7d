"""The compiled sampling kernel against fp64, over shapes, dtypes and layouts; and as an operator of PyTorch."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import DTYPES, ROWS, exact, features, mixed

from ssod_edge import ops
from ssod_edge.ops import patch_sample, ssod_loss

pytestmark = pytest.mark.skipif(not ops._compiled("cpu"), reason="the kernel was not built")

excluded = {"patches": 0, "compared": 0}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row)))
def test_every_result_is_that_of_fp64(row, capsys):
    p, d, m, dtype, layout = row
    g = torch.Generator().manual_seed(0)
    z, rows = features(p, d, DTYPES[dtype], layout, g)
    p = len(rows)
    weight, bias = (3 / d**0.5 * torch.randn(m, d, generator=g)).to(DTYPES[dtype]), torch.randn(m, generator=g)
    w_ood, b_ood = torch.randn(d, generator=g), torch.tensor(0.5)
    per_image = p // max(1, z.shape[0])
    target = torch.randint(-1, m, (z.shape[0],), generator=g)
    label_of = target.repeat_interleave(per_image) if p else target
    confidence, label, s = ops.sample_patches(z, weight, bias, w_ood, b_ood, target, 0.95, "auto")
    expected = exact(rows, weight, bias, label_of)
    tolerance = 2e-6 if dtype == "fp32" else 2e-4
    torch.testing.assert_close(confidence.double(), expected, rtol=0, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(s.double(), rows.double() @ w_ood.double() + 0.5, rtol=1e-5, atol=1e-4)
    near = 1e-6 if dtype == "fp32" else 1e-4
    clear = ((expected - 0.95).abs() > near) & ((expected - 0.05).abs() > near)
    wanted = torch.where(expected >= 0.95, 1, torch.where(expected < 0.05, 0, -1))
    assert torch.equal(label[clear].long(), wanted[clear])
    assert (label[label_of < 0] == -1).all()
    excluded["patches"] += int((~clear & (label_of >= 0)).sum())
    excluded["compared"] += p
    if row == ROWS[-1]:
        with capsys.disabled():
            print(f"\nlabels not compared, too near a threshold: {excluded['patches']} of {excluded['compared']}")


def test_weights_keep_their_precision_beside_half_precision_patches():
    z, weight, bias, _, _, target = mixed(torch.bfloat16)
    confidence = patch_sample(z, weight, bias, target)[0]
    torch.testing.assert_close(confidence.double(), exact(z, weight, bias, target), rtol=0, atol=4e-6)


@pytest.mark.parametrize("m", [10, 1000])
def test_results_are_the_same_bit_for_bit_whatever_the_threads(m):
    z, weight, bias, w_ood, b_ood, target = mixed(torch.float32, p=1500, m=m)
    first = ops.sample_patches(z, weight, bias, w_ood, b_ood, target, 0.95, "auto")
    again = ops.sample_patches(z, weight, bias, w_ood, b_ood, target, 0.95, "auto")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ops.sample_patches(z, weight, bias, w_ood, b_ood, target, 0.95, "auto")
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(first[0], alone[0], rtol=0, atol=2e-6)
    assert torch.equal(first[1], alone[1])


@pytest.mark.parametrize("m", [12, 100])
@pytest.mark.parametrize("large", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_logits_that_are_not_finite(m, large):
    z, weight, bias = torch.eye(4), torch.zeros(m, 4), torch.zeros(m)
    weight[3, 1] = large  # the logit of class 3 at patch 1
    target = torch.tensor([0, 3, 3, 0])
    z = torch.cat([z, z[1:2]])
    target = torch.cat([target, torch.tensor([0])])
    z[0], z[2], z[3] = 0, 0, 0  # 0 * inf would be NaN
    weight[:, 0] = 0
    with torch.no_grad():
        got = patch_sample(z[[1, 4]], weight, bias, target[[1, 4]])[0]
    expected = F.linear(z[[1, 4]], weight, bias).softmax(1).gather(1, target[[1, 4], None])[:, 0]
    torch.testing.assert_close(got, expected, equal_nan=True)
    label = patch_sample(z[[1, 4]], weight, bias, target[[1, 4]])[1]
    assert (label[got.isnan()] == -1).all()


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("layout", ["rows", "map"])
@pytest.mark.parametrize("m", [10, 50])
def test_gradients_are_those_of_plain_pytorch(dtype, layout, m):
    z, weight, bias, w_ood, b_ood, target = mixed(DTYPES[dtype], p=96, m=m)
    if layout == "map":
        z = z.view(6, 4, 4, -1).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        target = target[:6]
    grads = {}
    for kernel in ("auto", "reference"):
        leaves = [tensor.clone().requires_grad_() for tensor in (z, w_ood, b_ood)]
        loss, stats = ssod_loss(leaves[0], weight, bias, *leaves[1:], target, kernel=kernel)
        loss.backward()
        grads[kernel] = [leaf.grad for leaf in leaves]
        assert int(stats["n_id"]) and int(stats["n_ood"])
    tolerance = {"fp32": 1e-6, "bf16": 4e-3, "fp16": 5e-4}[dtype]
    for ours, theirs in zip(grads["auto"], grads["reference"], strict=True):
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


def test_it_is_an_operator_that_pytorch_accepts():
    z, weight, bias, w_ood, b_ood, target = mixed(torch.float32, p=12, d=8, m=5)
    z = z.view(3, 4, 8).requires_grad_()
    arguments = (z, weight, bias, w_ood.requires_grad_(), b_ood.requires_grad_(), target[:3], 0.95, 0.05)
    torch.library.opcheck(torch.ops.ssod_edge.sample.default, arguments)
    torch.library.opcheck(
        torch.ops.ssod_edge.sample.default, (z.detach(), weight, bias, None, None, target[:3], 0.9, 0.1)
    )


def test_a_compiled_graph_holds_it_for_any_number_of_patches():
    def loss(z, w_ood, weight, bias, b_ood, target):
        return ssod_loss(z, weight, bias, w_ood, b_ood, target)[0]

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for p in (64, 96, 33):
        z, weight, bias, w_ood, b_ood, target = mixed(torch.float32, p=p, d=32, m=7)
        leaves = [[t.clone().requires_grad_() for t in (z, w_ood)] for _ in range(2)]
        values = [f(*pair, weight, bias, b_ood, target) for f, pair in zip((compiled, loss), leaves, strict=True)]
        torch.testing.assert_close(*values)
        for value in values:
            value.backward()
        for ours, theirs in zip(*leaves, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_autocast_leaves_it_in_the_precision_it_is_given():
    z, weight, bias, w_ood, b_ood, target = mixed(torch.float32)
    outside = ssod_loss(z, weight, bias, w_ood, b_ood, target)[0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = ssod_loss(z, weight, bias, w_ood, b_ood, target)[0]
    assert torch.equal(outside, inside)


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["portable", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same(instructions, tmp_path):
    """One that this processor lacks falls back to the portable code."""
    code = """
import sys, torch
from ssod_edge import ops
torch.manual_seed(0)
results = []
for m in (10, 31, 70):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        z, weight = torch.randn(100, 77).to(dtype), torch.randn(m, 77) / 3
        weight[0, 0] = float("nan") if m == 31 else 0
        target = torch.randint(-1, m, (100,))
        results += ops.sample_patches(z, weight, torch.randn(m), torch.randn(77), torch.zeros(()), target, 0.95, "auto")
assert ops.kernel_in_use("cpu") == "compiled"
torch.save(results, sys.argv[1])
"""
    results = []
    for name in ("", instructions):
        out = tmp_path / f"results-{name}.pt"
        environment = {**os.environ, "SSOD_EDGE_CPU": name} if name else dict(os.environ)
        subprocess.run([sys.executable, "-c", code, str(out)], env=environment, check=True)
        results.append(torch.load(out))
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=3e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(2, 3)}, r"z must be \[images, patches, D\], got \[2, 3\]"),
        ({"z": torch.zeros(2, 3, 8).double()}, "z must be float32"),
        ({"weight": torch.zeros(4, 9)}, r"weight must be \[M, 8\] to fit z, got \[4, 9\]"),
        ({"weight": torch.zeros(0, 8)}, r"weight must be"),
        ({"weight": torch.zeros(4, 8).long()}, "weights and biases must be float32"),
        ({"bias": torch.zeros(5)}, r"bias must be \[4\]"),
        ({"ood_weight": torch.zeros(1, 8)}, r"ood_weight must be \[8\]"),
        ({"ood_weight": None}, "ood_weight and ood_bias come together"),
        ({"ood_bias": torch.zeros(2)}, "ood_bias must have one element"),
        ({"target": torch.zeros(3).long()}, r"target must be int64 \[2\]"),
        ({"target": torch.zeros(2).int()}, r"target must be int64"),
        ({"target": torch.tensor([0, 4])}, "target must be below the 4 classes, got 4"),
    ],
)
def test_the_operator_checks_its_arguments_itself(change, message):
    arguments = {
        "z": torch.zeros(2, 3, 8), "weight": torch.zeros(4, 8), "bias": torch.zeros(4), "ood_weight": torch.zeros(8),
        "ood_bias": torch.zeros(()), "target": torch.zeros(2, dtype=torch.int64), "upper": 0.95, "lower": 0.05,
    }  # fmt: skip
    torch.ops.ssod_edge.sample(**arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ssod_edge.sample(**{**arguments, **change})


@st.composite
def tensors(draw, shape, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    """A tensor, most often of this shape and one of these dtypes, in any of the layouts that views make."""
    wrong = draw(st.integers(0, 11))
    if wrong == 0:
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = torch.float64 if wrong == 1 else torch.int32 if wrong == 2 else draw(st.sampled_from(dtypes))
    layout = draw(st.sampled_from(["plain", "transposed", "slice", "expanded", "offset"]))
    if layout == "transposed":
        return torch.ones(shape[::-1]).to(dtype).permute(tuple(range(len(shape)))[::-1])
    if layout == "slice":
        return torch.ones([2 * n for n in shape]).to(dtype)[tuple(slice(None, None, 2) for _ in shape)]
    if layout == "expanded":
        return torch.ones([1] * len(shape)).to(dtype).expand(shape)
    if layout == "offset":
        return torch.ones(math.prod(shape) + 1).to(dtype)[1:].view(shape)
    return torch.ones(shape).to(dtype)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(0, 5), st.integers(0, 5), st.integers(0, 20), st.integers(0, 40))
def test_whatever_the_arguments_it_answers_or_explains(data, n, patches, d, m):
    """A fuzz run of the checks: with the sanitizers (scripts/sanitize.sh), nothing is read or written out of bounds."""
    z, weight, bias = data.draw(tensors([n, patches, d])), data.draw(tensors([m, d])), data.draw(tensors([m]))
    row = data.draw(st.booleans())
    w_ood, b_ood = (data.draw(tensors([d])), data.draw(tensors([]))) if row else (None, None)
    target = data.draw(tensors([n], (torch.int64,))) * data.draw(st.integers(-2, 3))
    try:
        confidence, label, s = torch.ops.ssod_edge.sample(z, weight, bias, w_ood, b_ood, target, 0.95, 0.05)
    except (RuntimeError, NotImplementedError) as error:
        assert any(word in str(error) for word in ("must be", "must have", "come together", "Expected")), error
    else:
        assert confidence.shape == label.shape == (z.shape[0] * z.shape[1],) and len(s) == (len(label) if row else 0)


def test_a_kernel_that_is_not_there_is_said_once(monkeypatch, recwarn):
    monkeypatch.setattr(ops, "_runs_on", {})
    assert ops.kernel_in_use("meta") == ops.kernel_in_use("meta") == "reference"
    monkeypatch.setattr(ops, "_load_library", lambda: "it was not built")
    assert ops.kernel_in_use("cpu") == ops.kernel_in_use("cpu") == "reference"
    messages = [str(warning.message) for warning in recwarn]
    assert ["it was built without meta" in m for m in messages] == [True, False]
    assert "it was not built" in messages[1]


@pytest.mark.slow
def test_many_classes_take_little_memory():
    """At 21,841 classes plain PyTorch holds the logits of all patches; the kernel one tile of a chunk."""
    code = """
import re, sys, torch
from ssod_edge import ops
def peak():  # getrusage's would begin at the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.set_num_threads(1)
# Ones, not zeros: untouched zero pages would become resident inside the measured call on some kernels.
z, weight, bias = torch.ones(1024, 64), torch.ones(21841, 64), torch.ones(21841)
target = torch.ones(1024, dtype=torch.int64)
ops.patch_sample(z[:8], weight[:50], bias[:50], target[:8], kernel=sys.argv[1])
open("/proc/self/clear_refs", "w").write("5")
before = peak()
ops.patch_sample(z, weight, bias, target, kernel=sys.argv[1])
print(peak() - before)
"""
    grown = {
        kernel: int(subprocess.run([sys.executable, "-c", code, kernel], capture_output=True, check=True).stdout)
        for kernel in ("auto", "reference")
    }
    assert grown["reference"] > 1024 * 21841 * 4 / 1024  # KiB
    assert grown["auto"] < 0.05 * grown["reference"]


def test_the_library_links_nothing_of_one_torch_release():
    library = next(Path(ops.__file__).parent.glob("_kernels*.so"))
    needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    assert "libtorch_python" not in needed and "libpython" not in needed
