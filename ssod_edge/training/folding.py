"""A network that does not learn, with its batch norms folded into the convolutions before them: faster on a CPU."""

from __future__ import annotations

import copy

import torch
from torch import nn
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
    found = found.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        same = torch.allclose(found.features(x), before, rtol=1e-3, atol=1e-4)
    return found if same else model
