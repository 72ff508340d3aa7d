"""The SSOD sampling step and loss: the compiled kernel, and plain PyTorch as its oracle and fallback.

`_sample` below is the plain form; `kernels/` has the compiled one, the operator `ssod_edge::sample`, which never holds
the logits of all patches and classes. Both give (confidence, label, ID logit) of each patch.

Labels of a patch (the paper's Eq. 12): 1 = in-distribution (ID), 0 = background used as OOD, -1 = ignored.
"""

from __future__ import annotations

import functools
import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ssod_edge.config import BALANCES, KERNELS, check_gamma
from ssod_edge.errors import UsageError

ID, OOD, IGNORED = 1, 0, -1

#: What the compiled kernel takes; fp64 is for checking gradients, in plain PyTorch.
_COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernel_in_use(device: torch.device | str, kernel: str = "auto") -> str:
    """Which implementation `patch_sample` and `ssod_loss` run on this device.

    Args:
        device: of the patches.
        kernel: "auto" takes the compiled one where it was built, "reference" plain PyTorch.

    Returns:
        "compiled" or "reference".

    Raises:
        UsageError: an unknown kernel.
    """
    if kernel not in KERNELS:
        raise UsageError(f"kernel must be one of {', '.join(KERNELS)}, got '{kernel}'")
    return "compiled" if kernel == "auto" and _compiled(torch.device(device).type) else "reference"


def patch_sample(
    z: Tensor, weight: Tensor, bias: Tensor, target: Tensor, gamma: float = 0.95, kernel: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Confidence of the classifier on each patch's true class, and the label it gives the patch (Eq. 12).

    Args:
        z: patch features [P, D], floating point; or [N, ..., D], as a view of a feature map has them.
        weight: classifier weight [M, D].
        bias: classifier bias [M].
        target: true class of each patch, int64 [P]; of each image [N] where z has one; negative means ignored.
        gamma: confidence from which a patch is ID; below 1 - gamma it is OOD. 0.5 < gamma < 1.
        kernel: see `kernel_in_use`.

    Returns:
        confidence: softmax probability of the target class, fp32 [P] (fp64 for fp64 input), patches of one image
            adjacent; NaN where the logits are NaN or the target is negative.
        label: int8 [P] in {1, 0, -1}; NaN confidence gives -1.

    Raises:
        UsageError: a shape or dtype that does not fit, gamma out of range, an unknown kernel, or target >= M. On CUDA
            a target >= M gives NaN instead: to raise there would wait for the GPU.
    """
    with torch.no_grad():
        confidence, label, _ = sample_patches(z, weight, bias, None, None, target, gamma, kernel)
    return confidence, label


def ssod_loss(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    ood_weight: Tensor,
    ood_bias: Tensor,
    target: Tensor,
    gamma: float = 0.95,
    balance: str = "lwb",
    patches_per_image: int | None = None,
    generator: torch.Generator | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The OOD term of Eq. 14 over patches, balanced as in the paper's Table 5.

    Binary cross-entropy of the ID logit s = z @ ood_weight + ood_bias (Eq. 13 as one channel) against the
    labels of Eq. 12. The classifier labels and is not trained by this term: gradients reach z, ood_weight
    and ood_bias. If `torch.distributed` is initialised, the counts are summed over all processes and the
    result is scaled by the world size, so that averaged gradients are those of the global batch.

    Args:
        z, weight, bias, target, gamma, kernel: see `patch_sample`; in z the patches of one image are adjacent.
        ood_weight, ood_bias: the OOD row, [D] or [1, D], and [] or [1].
        balance: "lwb": half the mean over ID patches plus half the mean over OOD patches;
            "lw": mean over labelled patches, OOD ones weighted n_id / n_ood;
            "dr": as many ID as OOD patches, drawn at random in each image.
        patches_per_image: needed by "dr" where z is [P, D].
        generator: source of randomness for "dr".

    Returns:
        loss: scalar. An empty ID or OOD set contributes 0, with zero gradient.
        stats: detached scalars: sum_id, sum_ood, n_id, n_ood (used by the loss, this process),
            n_ignored, n_invalid (NaN confidence at a valid target, and on CUDA targets >= M).

    Raises:
        UsageError: as `patch_sample`; an unknown balance; "dr" without patches_per_image.
    """
    sampled = sample_patches(z, weight, bias, ood_weight, ood_bias, target, gamma, kernel)
    return ood_loss(
        sampled, target, balance, patches_per_image if z.dim() == 2 else math.prod(z.shape[1:-1]), generator
    )


Sampled = tuple[Tensor, Tensor, Tensor]


def sample_patches(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    ood_weight: Tensor | None,
    ood_bias: Tensor | None,
    target: Tensor,
    gamma: float,
    kernel: str = "auto",
) -> Sampled:
    """What every term over patches starts from: `patch_sample`, and each patch's ID logit (arguments as `ssod_loss`).

    Returns:
        confidence fp32 [P], label int8 [P], s fp32 [P]; s is differentiable, and empty without the OOD row.
    """
    _check_inputs(z, weight, bias, target, gamma)
    weight, bias = weight.detach(), bias.detach()
    if ood_weight is not None and ood_bias is not None:
        ood_weight, ood_bias = ood_weight.reshape(-1), ood_bias.reshape(())
    dtypes = {tensor.dtype for tensor in (z, weight, bias, ood_weight, ood_bias) if tensor is not None}
    if kernel_in_use(z.device, kernel) == "compiled" and dtypes <= set(_COMPILED_DTYPES):
        patches = z.unsqueeze(1) if z.dim() == 2 else z.flatten(1, -2)
        if z.is_cuda:  # its matrix unit multiplies one type; the CPU widens each by itself
            weight, bias = weight.to(z.dtype), bias.float()
            if ood_weight is not None and ood_bias is not None:
                ood_weight, ood_bias = ood_weight.to(z.dtype), ood_bias.float()
        return torch.ops.ssod_edge.sample(patches, weight, bias, ood_weight, ood_bias, target, gamma, 1.0 - gamma)
    target = target.repeat_interleave(math.prod(z.shape[1:-1]))
    z = z.reshape(-1, z.shape[-1])
    with torch.no_grad():
        confidence, label = _label_patches(_linear_fp32(z, weight, bias), target, gamma)
    if ood_weight is None or ood_bias is None:
        return confidence, label, confidence.new_empty(0)
    return confidence, label, _linear_fp32(z, ood_weight.unsqueeze(0), ood_bias.unsqueeze(0)).squeeze(1)


def ood_loss(
    sampled: Sampled,
    target: Tensor,
    balance: str = "lwb",
    patches_per_image: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ssod_loss` of patches that were sampled; arguments and results as there."""
    if balance not in BALANCES:
        raise UsageError(f"balance must be one of {', '.join(BALANCES)}, got '{balance}'")
    confidence, label, s = sampled
    valid = (target >= 0).repeat_interleave(len(confidence) // max(1, len(target)))
    n_invalid = (confidence.isnan() & valid).sum()
    if balance == "dr":
        if not patches_per_image or len(confidence) % patches_per_image:
            raise UsageError(
                f"balance 'dr' needs patches_per_image, a divisor of the {len(confidence)} patches; "
                f"got {patches_per_image}"
            )
        label = _resample(label, patches_per_image, generator)
    is_id, is_ood = label == ID, label == OOD
    # Masking s before softplus keeps a NaN in an ignored patch out of the gradient (0 * NaN is NaN).
    sum_id = torch.where(is_id, F.softplus(-torch.where(is_id, s, 0.0)), 0.0).sum()
    sum_ood = torch.where(is_ood, F.softplus(torch.where(is_ood, s, 0.0)), 0.0).sum()
    counts = torch.stack([is_id.sum(), is_ood.sum()])
    everywhere, processes = _all_counts(counts)
    n_id, n_ood = everywhere.to(sum_id.dtype).unbind()
    if balance == "lw":
        loss = (sum_id + sum_ood * n_id / n_ood.clamp(min=1)) / (n_id + n_ood).clamp(min=1)
    else:
        loss = 0.5 * (sum_id / n_id.clamp(min=1) + sum_ood / n_ood.clamp(min=1))
    stats = {"sum_id": sum_id.detach(), "sum_ood": sum_ood.detach(), **_counted(label, counts), "n_invalid": n_invalid}
    return processes * loss, stats


def background_norm(z: Tensor, label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean L2 norm of background features, whose decrease makes a network less sure of what it was not taught.

    After "Local Background Features Matter in Out-of-Distribution Detection" (arXiv 2510.12259), whose abstract leaves
    open what counts as background: here the OOD patches of Eq. 12. As in `ssod_loss` the mean is over the patches of
    all processes, and the classifier is not trained by it.

    Args:
        z: as `patch_sample`.
        label: that of its patches, int8 [P].

    Returns:
        loss: scalar; 0 with zero gradient where no patch is OOD.
        stats: detached n_id, n_ood, n_ignored.
    """
    is_ood = (label == OOD).view(-1, 1)
    # The mask comes before the norm: that of a zero vector, or of a NaN in an ignored patch, has no gradient.
    features = torch.where(is_ood, z.reshape(-1, z.shape[-1]).float(), 1.0)
    total = torch.where(is_ood.squeeze(1), torch.linalg.vector_norm(features, dim=1), 0.0).sum()
    counts = torch.stack([(label == ID).sum(), is_ood.sum()])
    everywhere, processes = _all_counts(counts)
    return processes * total / everywhere[1].clamp(min=1), _counted(label, counts)


def _counted(label: Tensor, counts: Tensor) -> dict[str, Tensor]:
    return {"n_id": counts[0], "n_ood": counts[1], "n_ignored": label.numel() - counts.sum()}


def _all_counts(counts: Tensor) -> tuple[Tensor, int]:
    """Counts of all processes, and how many these are."""
    if not (dist.is_available() and dist.is_initialized()):
        return counts, 1
    counts = counts.clone()
    dist.all_reduce(counts)
    return counts, dist.get_world_size()


@torch.compiler.assume_constant_result  # torch.compile would otherwise trace into the loading
def _compiled(device: str) -> bool:
    """Whether the compiled operator runs on this type of device; says why not, once."""
    if device not in _runs_on:
        reason = _load_library()
        key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
        if reason is None and not (key and torch._C._dispatch_has_kernel_for_dispatch_key("ssod_edge::sample", key)):
            reason = f"it was built without {device}"
        _runs_on[device] = reason is None
        if reason:
            warnings.warn(
                f"patches are sampled in plain PyTorch, because the compiled kernel cannot run on {device}: {reason}. "
                "docs/kernel.md says how to build it",
                stacklevel=4,
            )
    return _runs_on[device]


_runs_on: dict[str, bool] = {}


@functools.cache
def _load_library() -> str | None:
    """Register `ssod_edge::sample`; None if that worked, else why not."""
    library = next(iter(sorted(Path(__file__).parent.glob("_kernels*.so"))), None)
    if library is None:
        return "it was not built"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"'{library.name}' cannot be loaded ({error})"
    torch.library.register_fake("ssod_edge::sample", _sample_fake)
    torch.library.register_autograd("ssod_edge::sample", _sample_backward, setup_context=_sample_context)
    return None


def _sample_fake(z: Tensor, weight: Tensor, bias: Tensor, ood_weight: Tensor | None, *_: Any) -> Sampled:
    """Shapes and dtypes of the operator's results, for torch.compile."""
    patches = z.shape[0] * z.shape[1]
    confidence = z.new_empty(patches, dtype=torch.float32)
    label = z.new_empty(patches, dtype=torch.int8)
    return confidence, label, confidence.new_empty(0 if ood_weight is None else patches)


def _sample_context(ctx: Any, inputs: tuple[Any, ...], output: Sampled) -> None:
    ctx.save_for_backward(inputs[0], inputs[3])
    ctx.bias_dtype = None if inputs[4] is None else inputs[4].dtype


def _sample_backward(ctx: Any, _: Tensor, __: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of s = z @ ood_weight + ood_bias; confidence and label have none."""
    z, ood_weight = ctx.saved_tensors
    if ood_weight is None:
        return (None,) * 8
    grad = grad.view(z.shape[:2])
    dz = dw = db = None
    if ctx.needs_input_grad[0]:
        dz = torch.empty_like(z)
        torch.mul(grad.unsqueeze(2), ood_weight, out=dz)  # rounded to z's dtype on the way, written once
    if ctx.needs_input_grad[3]:
        dw = torch.einsum("nld,nl->d", z, grad.to(z.dtype)).to(ood_weight.dtype)
    if ctx.needs_input_grad[4]:
        db = grad.sum().to(ctx.bias_dtype)
    return dz, None, None, dw, db, None, None, None


def _linear_fp32(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Logits in fp32 whatever the storage dtype: 16-bit logits at |z| = 20 flip labels near gamma."""
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    with torch.autocast(device_type=z.device.type, enabled=False):
        return F.linear(z.to(dtype), weight.to(dtype), bias.to(dtype))


def _label_patches(logits: Tensor, target: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    valid = (target >= 0) & (target < logits.shape[1])
    index = target.clamp(0, logits.shape[1] - 1).unsqueeze(1)
    confidence = torch.where(valid, logits.softmax(dim=1).gather(1, index).squeeze(1), torch.nan)
    label = torch.full_like(target, IGNORED, dtype=torch.int8)
    # gamma and 1 - gamma are rounded once, from double, to the dtype they are compared in.
    upper, lower = confidence.new_tensor(gamma), confidence.new_tensor(1.0 - gamma)
    label[confidence >= upper] = ID
    label[confidence < lower] = OOD
    return confidence, label


def _resample(label: Tensor, patches_per_image: int, generator: torch.Generator | None) -> Tensor:
    """Keep, in each image, min(n_id, n_ood) patches of either kind, drawn at random; ignore the others."""
    grid = label.reshape(-1, patches_per_image)
    order = torch.rand(grid.shape, generator=generator, device=label.device)
    keep = torch.minimum((grid == ID).sum(1), (grid == OOD).sum(1)).unsqueeze(1)
    kept = torch.full_like(grid, IGNORED)
    for kind in (ID, OOD):
        mask = grid == kind
        rank = order.masked_fill(~mask, 2.0).argsort(dim=1).argsort(dim=1)
        kept[mask & (rank < keep)] = kind
    return kept.reshape(-1)


def _check_inputs(z: Tensor, weight: Tensor, bias: Tensor, target: Tensor, gamma: float) -> None:
    check_gamma(gamma)
    if z.dim() < 2 or not z.is_floating_point():
        raise UsageError(f"z must be a floating-point tensor [P, D] or [N, ..., D], got {z.dtype} {list(z.shape)}")
    if weight.dim() != 2 or weight.shape[1] != z.shape[-1] or weight.shape[0] < 1:
        raise UsageError(f"weight must be [M, {z.shape[-1]}] to fit z, got {list(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise UsageError(f"bias must be [{weight.shape[0]}] to fit weight, got {list(bias.shape)}")
    if target.dtype != torch.int64 or target.shape != z.shape[:1]:
        raise UsageError(f"target must be int64 [{z.shape[0]}], got {target.dtype} {list(target.shape)}")
    # On CUDA this check would synchronise, and in a compiled graph it would be a break; the kernel has its own.
    checked_here = target.device.type == "cpu" and not torch.compiler.is_compiling()
    if checked_here and target.numel() and int(target.max()) >= weight.shape[0]:
        raise UsageError(f"target must be below the {weight.shape[0]} classes, got {int(target.max())}")
