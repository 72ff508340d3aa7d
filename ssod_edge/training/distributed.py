"""The processes of one training run: started by torchrun, or just this one."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from ssod_edge.errors import UsageError


def start_processes() -> torch.device:
    """Join the process group when started by torchrun; the device of this process."""
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    if not cuda:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def from_main(value: float) -> float:
    """A figure as process 0 has it: the others' may differ in the last digits, or by their norms' running means."""
    if not dist.is_initialized():
        return value
    shared: list[float] = [value]
    dist.broadcast_object_list(shared)
    return shared[0]


def may_start_again() -> bool:
    """Whether torchrun was told to start the processes again where one of them dies (--max-restarts)."""
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def check_same_images(fingerprint: str) -> None:
    """Compare what every process is about to train on.

    Raises:
        UsageError: one sees other images, or labels them otherwise; each would teach its own classes.
    """
    _compare(fingerprint, "images or labels", "Give all of them the same data")


def check_same_start(fingerprint: str) -> None:
    """Compare the checkpoint that every process goes on from, "" for none.

    Raises:
        UsageError: one has another checkpoint, or none: the run folder is not shared.
    """
    _compare(fingerprint, "checkpoints of the run", "All of them need its folder, on one file system")


def _compare(fingerprint: str, what: str, fix: str) -> None:
    if not dist.is_initialized():
        return
    found: list[str] = [""] * world_size()
    dist.all_gather_object(found, fingerprint)
    others = [process for process, other in enumerate(found) if other != found[0]]
    if others:
        theirs, ours = (found[process][:12] or "none" for process in (others[0], 0))
        raise UsageError(
            f"process {others[0]} of {len(found)} sees other {what} than process 0 (fingerprints {theirs} and "
            f"{ours}). {fix}"
        )
