"""Which images a bench runs on: those that were named, else the run's own validation split, else the reference."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from ssod_edge.bench.accuracy import ImageSet
from ssod_edge.data.named import NamedData, Via
from ssod_edge.data.pixels import equalise, load_image
from ssod_edge.data.sources import model_labels, open_dataset, open_training_data
from ssod_edge.data.splits import read_splits
from ssod_edge.errors import ArtifactError, ImageError, SsodEdgeError, UsageError
from ssod_edge.files import real_path
from ssod_edge.runtime.export import Export
from ssod_edge.spec import Spec

#: Images of each set that a quick bench takes, evenly spread.
QUICK_IMAGES = 512


@dataclass(frozen=True)
class BenchImages:
    """Attributes: `known` (None without data), `unknown`, and `note`: why something is left out."""

    known: ImageSet | None
    unknown: tuple[ImageSet, ...] = ()
    note: str | None = None

    @property
    def sets(self) -> tuple[ImageSet, ...]:
        return self.unknown if self.known is None else (self.known, *self.unknown)


def choose_images(export: Export, options: NamedData, quick: bool = False) -> BenchImages:
    """The image sets of a bench.

    Args:
        export: what is measured.
        options: ID data (None takes the run's recorded validation split), OOD data, and what they go through.
        quick: at most QUICK_IMAGES of each set.

    Raises:
        UsageError: data that were named cannot be opened or share no class with the model; OOD data without ID data.
        MissingExtraError: data were named and the packages that read them are not installed.
    """
    note = None
    if options.id_data is not None:
        known: ImageSet | None = named_set(options.id_data, export.spec)
    else:
        known, note = recorded_split(export)
    if known is None and options.ood_data:
        raise UsageError(f"--ood needs in-distribution images too: {note} Name them with --id DATA.")
    unknown = []
    for name, data in (options.ood_data or {}).items():
        source = open_dataset(data, labelled=False)
        unknown.append(_limit(ImageSet(name, data, source, np.arange(len(source))), options.via, quick))
    return BenchImages(known and _limit(known, options.via, quick), tuple(unknown), note)


def named_set(data: str, spec: Spec) -> ImageSet:
    """The ID images of a data set: those of classes that the model knows, whatever their order."""
    source = open_dataset(data)
    labels = model_labels(source.labels, source.classes, spec.classes)
    indices = np.flatnonzero(labels >= 0)
    if len(indices) == 0:
        raise UsageError(
            f"--id '{data}' shares no class with the model: it has {', '.join(source.classes[:5])}; "
            f"the model has {', '.join(spec.classes[:5])}"
        )
    return ImageSet("id", data, source, indices, labels[indices])


def recorded_split(export: Export) -> tuple[ImageSet | None, str | None]:
    """The validation split that the run recorded, or None and the reason."""
    if not export.spec.trained:
        return None, "The weights are untrained."
    facts = export.spec.source
    if not facts.get("splits_hash"):
        return None, "The weights were not trained here, so that there is no recorded validation split."
    try:
        source = open_training_data(str(facts["data"]), facts.get("val_data"), facts.get("val_fingerprint"))
        if source.fingerprint != facts["data_fingerprint"]:
            return None, f"The data '{facts['data']}' changed since the run."
        indices = read_splits(real_path(export.folder).parent, source, str(facts["splits_hash"])).val
    except (OSError, ValueError, KeyError, SsodEdgeError, ImportError) as error:
        return None, f"The run's validation images cannot be opened ({error})."
    labels = model_labels(source.labels[indices], source.classes, export.spec.classes)
    kept = labels >= 0  # a class may have been forgotten since (`ssod-edge teach --forget`)
    return ImageSet("id", f"{facts['data']} (val split)", source, indices[kept], labels[kept]), None


def query_images(images: BenchImages, export: Export, count: int) -> tuple[list[Image.Image], str]:
    """At most `count` images to time queries with, evenly spread over the ID images, and what they are.

    Raises:
        ArtifactError: there are neither data nor a reference, or none of the images can be read.
    """
    if images.known is None:
        pixels, origin = export.reference()["image"][:count], "reference.npz"
        found = [Image.fromarray(image.transpose(1, 2, 0)) for image in pixels]
    else:
        known, found, origin = images.known, [], images.known.data
        for index in _spread(known.indices, count):
            picture, settings = known.source.picture(int(index)), replace(export.spec.preprocess, version=1)
            with suppress(ImageError):
                image = load_image(picture) if known.via is None else equalise(load_image(picture, settings), known.via)
                found.append(image)
    if images.known is None or images.known.via is not None:  # these show the region and nothing around it
        found = [_in_place(image, export.spec.preprocess.roi) for image in found]
    if not found:
        raise ArtifactError(f"none of {count} images of '{origin}' can be read")
    sizes = {"{}x{}".format(*image.size) for image in found}
    sizes_text = sizes.pop() if len(sizes) == 1 else f"{len(sizes)} sizes"
    return found, f"{len(found)} images of {origin}, {sizes_text}, as JPEG in memory"


def _in_place(image: Image.Image, roi: tuple[int, int, int, int] | None) -> Image.Image:
    """What shows a region alone, as part of the picture that the region is cut from."""
    if roi is None:
        return image
    left, top, width, height = roi
    whole = Image.new("RGB", (left + width, top + height))
    whole.paste(image.resize((width, height)), (left, top))
    return whole


def _limit(images: ImageSet, via: Via | None, quick: bool) -> ImageSet:
    rows = np.arange(len(images.indices))
    rows = _spread(rows, QUICK_IMAGES) if quick else rows
    labels = None if images.labels is None else images.labels[rows]
    return replace(images, via=via, indices=images.indices[rows], labels=labels)


def _spread(values: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """At most `count` of the values, at equal distances."""
    if len(values) <= count:
        return values
    return values[np.linspace(0, len(values) - 1, count).round().astype(np.int64)]
