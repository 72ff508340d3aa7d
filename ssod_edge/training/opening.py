"""What a run says before it begins: the classes, where the weights come from, and for about how long it will train."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from ssod_edge.config import AUTO_EPOCHS, NO_WEIGHTS, PUBLISHED
from ssod_edge.errors import ImageError
from ssod_edge.terminal import about
from ssod_edge.training.batches import EvalImages, load_batches
from ssod_edge.training.distributed import world_size
from ssod_edge.training.model import normalise
from ssod_edge.training.schedule import auto_epochs

if TYPE_CHECKING:
    from ssod_edge.training.session import Session

#: Images that are read, and shown to the network, to tell how long all will take.
TRIED = 16
#: A step of training takes so many times as long as reading out the same images: forwards, backwards twice as long, and
#: the optimizer, without the folded norms.
STEP = 4.0
#: Training with `--tune` takes so many times as long as is estimated for the features of all images and their copies:
#: with a branch 149 s beside 60, with the upper blocks 139 s beside 39 (bench/results/clothing-branch-time.json,
#: clothing-auto-time.json).
TIMES = {"head": 1.0, "branch": 2.5, "auto": 2.5, "upper": 3.5}


def opening_line(session: Session) -> str:
    """One line: classes, images of each, starting weights, device and threads, and the estimated time."""
    classes, labels = session.source.classes, session.source.labels
    counts = np.bincount(labels, minlength=len(classes))
    least, most = int(counts.argmin()), int(counts.argmax())
    of_each = f"{counts[least]} images of each"
    if counts[least] != counts[most]:
        of_each = f"{counts[least]} images of '{classes[least]}' to {counts[most]} of '{classes[most]}'"
    try:
        time_needed = f"; {about(estimate(session))}, by its first images"
    except ImageError:  # training names all that cannot be read
        time_needed = ""
    return (
        f"{len(classes)} classes, {of_each}; {session.model.backbone_name} at "
        f"{session.config.preprocess.input_size} px {_weights(session)}, on {_device(session.device)}{time_needed}"
    )


def estimate(session: Session) -> float:
    """Seconds that training will take, by how long a few images take to read and to go through the network."""
    config, model, tried = session.config, session.model, session.splits.train[:TRIED]
    images = EvalImages(session.source, np.sort(tried), config.preprocess)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        started = time.monotonic()
        batch, *_ = next(iter(load_batches(images, 0, batch_size=TRIED)))
        reading = (time.monotonic() - started) / len(batch) / max(1, config.workers)
        x = normalise(batch.to(session.device), config.preprocess).contiguous(memory_format=torch.channels_last)
        for _ in range(2):  # the first one makes kernels and memory ready
            started = time.monotonic()
            model.features(x).sum().item()
        forward = (time.monotonic() - started) / len(batch)
    model.train(was_training)
    if config.tune == "all":
        epochs = config.epochs
        if epochs == AUTO_EPOCHS:
            epochs, _ = auto_epochs(max(1, len(session.splits.train) // config.batch_size))
        return epochs * len(session.splits.train) * (reading + STEP * forward) / world_size()
    features = len(session.source) * (reading + 2 * forward)  # of each image and a disturbed copy
    return TIMES[config.tune] * features


def _weights(session: Session) -> str:
    config = session.config
    if config.begun_from is not None:
        return f"from '{config.begun_from}'"
    return {NO_WEIGHTS: "from random weights", PUBLISHED: "from published weights"}.get(
        config.weights, f"from '{config.weights}'"
    )


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} with {threads} thread{'s' if threads > 1 else ''}"
