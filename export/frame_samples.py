"""Frames that graphs are checked with, in the order of colours that they take."""

from __future__ import annotations

from itertools import cycle

import numpy as np
from PIL import Image

from ssod_edge.config import Preprocess
from ssod_edge.export.frame_graph import Channels
from ssod_edge.runtime.runner import Array

#: Reference images that are checked with in every one of `SIZES`; all of them are in the first.
CHECKED = 4
#: Height and width of the frames, in those of the network's input; the first are the images as they are.
SIZES = ((1.0, 1.0), (2.3, 3.1), (1.7, 0.6), (0.7, 0.9))


def make_frames(images: Array, settings: Preprocess, channels: Channels) -> list[Array]:
    """All reference images, and `CHECKED` of them and noise in `SIZES`; with `roi`, around it.

    See `colours_of` for their shape.
    """
    size = settings.input_size
    noise = np.random.default_rng(0).integers(0, 256, (3, 2 * size, 3 * size), np.uint8)
    shown = {sides: [*images[: None if sides == SIZES[0] else CHECKED], noise] for sides in SIZES}  # each prepares once
    return [_frame(image, sides, settings, channels) for sides, some in shown.items() for image in some]


def golden_frames(images: Array, settings: Preprocess, channels: Channels) -> list[Array]:
    """Images in turn in one of `SIZES`; with `roi`, around it. See `colours_of` for their shape."""
    return [_frame(image, sides, settings, channels) for image, sides in zip(images, cycle(SIZES), strict=False)]


def _frame(image: Array, sides: tuple[float, float], settings: Preprocess, channels: Channels) -> Array:
    """A frame of one image [3, H, W] and its sides in those of the network's input."""
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    height, width = (round(side * settings.input_size) for side in sides)
    wanted = (width, height) if settings.roi is None else settings.roi[2:]
    scaled = picture if wanted == picture.size else picture.resize(wanted, Image.Resampling.BICUBIC)
    if settings.roi is not None:
        around = Image.new("RGB", (settings.roi[0] + wanted[0] + 7, settings.roi[1] + wanted[1] + 5))
        around.paste(scaled, settings.roi[:2])
        scaled = around
    frame: Array = np.asarray(scaled)
    return to_nv12(frame) if channels == "NV12" else frame[:, :, :: 1 if channels == "RGB" else -1].copy()


def colours_of(frame: Array, channels: Channels) -> Array:
    """uint8 [H, W, 3], red first, of a frame: of that shape, or NV12, [H * 3 / 2, W] with even H and W.

    NV12 has H rows of luma, then H / 2 rows in which chroma U and V of every 2 x 2 pixels stand in turn; BT.601,
    limited range, as `nv12_to_rgb` of OpenVINO reads it.
    """
    if channels != "NV12":
        return np.ascontiguousarray(frame[:, :, :: 1 if channels == "RGB" else -1])
    height = 2 * len(frame) // 3
    luma = 1.164 * (frame[:height].astype(np.float32) - 16)
    pairs = frame[height:].reshape(height // 2, -1, 2).astype(np.float32) - 128
    u, v = pairs.repeat(2, axis=0).repeat(2, axis=1).transpose(2, 0, 1)
    colours = np.stack([luma + 1.596 * v, luma - 0.813 * v - 0.391 * u, luma + 2.018 * u], axis=2)
    return np.clip(np.round(colours), 0, 255).astype(np.uint8)


def to_nv12(picture: Array) -> Array:
    """NV12 of uint8 [H, W, 3], red first; of an odd H or W the last row or column is left out."""
    height, width = (side - side % 2 for side in picture.shape[:2])
    red, green, blue = picture[:height, :width].astype(np.float32).transpose(2, 0, 1)
    luma = 16 + 0.257 * red + 0.504 * green + 0.098 * blue
    chroma = np.stack(
        [128 - 0.148 * red - 0.291 * green + 0.439 * blue, 128 + 0.439 * red - 0.368 * green - 0.071 * blue], axis=2
    )
    pairs = chroma.reshape(height // 2, 2, width // 2, 2, 2).mean(axis=(1, 3)).reshape(height // 2, width)
    return np.clip(np.round(np.concatenate([luma, pairs])), 0, 255).astype(np.uint8)
