"""A network that does not learn, made faster on a CPU: norms are folded into convolutions, and nothing is padded."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ssod_edge.training.model import SSODClassifier
from ssod_edge.training.stages import recorded


def folded(model: SSODClassifier) -> SSODClassifier:
    """A copy in evaluation mode whose features are the model's but for rounding; the model where they would not be.

    Which convolution is before a norm is seen from the tensors that go from one to the other.
    """
    found = copy.deepcopy(model).eval()
    size, device = model.preprocess.input_size, next(model.parameters()).device
    x = torch.linspace(-1, 1, 3 * size * size, device=device).view(1, 3, size, size)
    with torch.no_grad(), recorded(found.backbone) as calls:
        before = found.features(x)
    convolutions = {id(out): module for module, (_, out) in calls.items() if isinstance(module, nn.Conv2d)}
    names = {module: name for name, module in found.backbone.named_modules()}
    for norm, (given, _) in calls.items():
        convolution = convolutions.get(id(given))
        if convolution is None or not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
            continue
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        parent, _, name = names[norm].rpartition(".")
        # timm's norms have the activation within.
        setattr(found.backbone.get_submodule(parent), name, getattr(norm, "act", nn.Identity()))
    for module, (given, _) in calls.items():
        if isinstance(module, Conv2dSame) and (even := _even_border(module, given)) is not None:
            parent, _, name = names[module].rpartition(".")
            setattr(found.backbone.get_submodule(parent), name, even)
    found = found.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        same = torch.allclose(found.features(x), before, rtol=1e-3, atol=1e-4)
    return found if same else model


def _even_border(module: Conv2dSame, x: Tensor) -> nn.Conv2d | None:
    """The same on inputs of this size without a copy of them that is padded; None where it cannot be.

    TensorFlow's border is one pixel wider at the right and below. A kernel that has zeros at the left and above takes
    it as wide on both sides.
    """
    kernel, stride = module.kernel_size[0], module.stride[0]
    square = module.kernel_size == (kernel, kernel) and module.stride == (stride, stride)
    border = kernel - stride
    if not square or module.dilation != (1, 1) or border < 1 or border % 2 == 0 or any(n % stride for n in x.shape[2:]):
        return None
    even = nn.Conv2d(
        module.in_channels, module.out_channels, kernel + 1, stride, border // 2 + 1, groups=module.groups,
        bias=module.bias is not None, device=x.device,
    )  # fmt: skip
    even.weight, even.bias = nn.Parameter(F.pad(module.weight, (1, 0, 1, 0))), module.bias
    return even
