"""Photos in, verdicts out: images are decoded on threads while the engine runs on the ones before them."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from ssod_edge.data.jpeg import tells_damage
from ssod_edge.data.pixels import ImageLike, Stored, read_pixels
from ssod_edge.detect.confidence import p_known, verdict_inputs
from ssod_edge.errors import ImageError, MissingExtraError, UsageError
from ssod_edge.machine import available_cores
from ssod_edge.runtime.runner import Array, Runner
from ssod_edge.sources import is_address, without_secrets

if TYPE_CHECKING:
    from ssod_edge.teach.record import TaughtExport

Pixels = npt.NDArray[np.uint8]
#: Why an image could not be read, and what is damaged in one that could.
Read: TypeAlias = tuple[str | None, str | None]

#: Images that are decoded ahead of the engine, for each decoding thread (and two batches at least).
AHEAD = 2

#: On a CPU a batch of 8 keeps two cores busier than single images do: 1.4 times the images a second with OpenVINO on
#: two cores (MobileNetV3-Large at 224 px); 16 gains nothing more.
BATCH = 8


@dataclass(frozen=True)
class Verdict:
    """The verdict on one image; the fields are the keys of a JSON line.

    Attributes:
        image: the path as it was given, or what kind of object it was.
        class_index, class_name, confidence: the likeliest class, and its softmax probability in [0, 1].
        ood_score: larger = more likely out of distribution.
        threshold: the artifact's; None for untrained weights.
        known: ood_score <= threshold; None without a threshold.
        p_known: the share of known images to expect whose score is as high or higher, in [0, 1]: a conformal p-value.
            At the threshold for 95% it is 0.05. None without a threshold, or with one of an early release.
        engine, precision: what really ran.
        image_warning: what is damaged in a picture that could be decoded nevertheless.
        error: why there is no verdict, and then all values above but `image` and `threshold` are None.
    """

    image: str
    class_index: int | None
    class_name: str | None
    confidence: float | None
    ood_score: float | None
    threshold: float | None
    known: bool | None
    p_known: float | None
    engine: str
    precision: str
    image_warning: str | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, in the order of the fields."""
        return asdict(self)


@dataclass(frozen=True)
class Seen:
    """What a verdict was given on, for those who watch.

    Attributes:
        source: the image as it was given; of a video its frame, uint8 [H, W, 3].
        verdict: by itself, not smoothed over time.
        pixels: uint8 [3, S, S], what the graph saw; other pixels lie there after the call.
        outputs: of the graph, without the batch axis.
        frame, time_s: of a video or stream: which frame, and when (`ssod_edge.runtime.field.frames.Frame`).
    """

    source: ImageLike
    verdict: Verdict
    pixels: Pixels
    outputs: dict[str, Any]
    frame: int | None = None
    time_s: float | None = None


class Predictor(AbstractContextManager["Predictor"]):
    """Verdicts of one open artifact. A context manager; threads may share it.

    Args:
        strict_images: a damaged picture counts as one that cannot be read.

    Attributes:
        runner: the `ssod_edge.runtime.Runner` it owns, and closes.
        watchers: each is called with every image that got a verdict, before the verdict is handed out.
    """

    def __init__(self, runner: Runner, strict_images: bool = False) -> None:
        self.runner = runner
        if strict_images and not tells_damage():
            raise MissingExtraError("strict_images needs the package simplejpeg: pip install simplejpeg")
        self._strict = strict_images
        self.watchers: list[Callable[[Seen], object]] = []
        self._settings = runner.spec.preprocess
        threshold = runner.artifact.threshold
        self.threshold = None if threshold is None else threshold.value
        self._table = verdict_inputs(threshold) if threshold is not None and threshold.id_quantiles else None

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the engine."""
        self.runner.__exit__(None, None, None)

    def teach(
        self,
        new: str | Mapping[str, Iterable[ImageLike]],
        images: Iterable[ImageLike] | None = None,
        out: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> TaughtExport:
        """Teach the export that this was opened from, as `ssod-edge teach`; what is open stays as it is::

            new = model.teach("mug", ["1.jpg", frame], out="taught")
            with ssod_edge.open(new) as taught: ...

        Args:
            new: a class, new or known; or several at once, class -> images.
            images: of that class: what `predict` takes, and folders.
            out: the new export folder. None teaches in place: what the folder holds now becomes the version before.
            options: `forget`, `max_drop`, `alike` of `ssod_edge.teach.teach.TeachOptions`, and `say`, which gets a line
                for each step.

        Returns:
            the new export: its `folder`, for which it stands as a path too, its `proof`, and what was `unreadable`.

        Raises:
            UsageError, MissingExtraError, ArtifactError, VerificationError, OutputError: see
                `ssod_edge.teach.teach.teach`.
        """
        from ssod_edge.teach.teach import teach_open

        return teach_open(self.runner.folder, new, images, out, **options)

    def predict(self, image: ImageLike) -> Verdict:
        """The verdict on one image.

        Args:
            image: a path, encoded bytes, a PIL image, or a uint8 array [H, W, 3] (RGB).

        Raises:
            ImageError: it cannot be read, or the model's output for it is not finite.
        """
        pixels = np.empty((1, 3, self._settings.input_size, self._settings.input_size), np.uint8)
        read = self._decode(image, pixels[0])
        outputs = self.runner.infer({"image": pixels}) if read[0] is None else {}
        verdict = self.verdicts([image], outputs, [read])[0]
        if verdict.error is not None:
            raise ImageError(verdict.error)
        self._tell([image], pixels, outputs, [verdict])
        return verdict

    def predict_many(
        self, images: Iterable[ImageLike], batch: int = BATCH, workers: int | None = None
    ) -> Iterator[Verdict]:
        """The verdicts on many images, in their order. One that cannot be read gives a verdict with `error` set.

        Decoding runs ahead on `workers` threads, by a fixed number of images, so memory does not grow with the
        number of images. Stopping early, or an interrupt, drops what has not begun.

        Args:
            images: any number of what `predict` takes; they are drawn as needed.
            batch: images per run of the engine; verdicts come this many at a time.
            workers: decoding threads; None takes one for each core, at most 8.

        Raises:
            UsageError: batch or workers below 1.
        """
        if batch < 1:
            raise UsageError(f"batch must be at least 1, got {batch}")
        workers = min(8, available_cores()) if workers is None else workers
        if workers < 1:
            raise UsageError(f"workers must be at least 1, got {workers}")
        return self._stream(iter(images), batch, workers)

    def _stream(self, images: Iterator[ImageLike], batch: int, workers: int) -> Iterator[Verdict]:
        size = self._settings.input_size
        ahead = max(2, math.ceil(AHEAD * workers / batch))
        free = deque(np.zeros((batch, 3, size, size), np.uint8) for _ in range(1 + ahead))
        begun: deque[tuple[list[ImageLike], Pixels, list[Future[Read]]]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

        def begin() -> None:
            while free and (sources := list(islice(images, batch))):
                pixels = free.popleft()
                futures = [pool.submit(self._decode, source, pixels[row]) for row, source in enumerate(sources)]
                begun.append((sources, pixels, futures))

        try:
            begin()
            while begun:
                sources, pixels, futures = begun.popleft()
                read = [future.result() for future in futures]
                # A row that has no image holds old pixels; of a batch without images there is nothing to run.
                readable = any(error is None for error, _ in read)
                outputs = self.runner.infer({"image": pixels[: len(sources)]}) if readable else {}
                verdicts = self.verdicts(sources, outputs, read)
                self._tell(sources, pixels, outputs, verdicts)
                free.append(pixels)
                begin()
                yield from verdicts
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _tell(
        self, sources: Sequence[ImageLike], pixels: Pixels, outputs: dict[str, Array], verdicts: Sequence[Verdict]
    ) -> None:
        """Let the watchers see a batch; images without a verdict are left out."""
        if self.watchers:
            for row, (source, verdict) in enumerate(zip(sources, verdicts, strict=True)):
                if verdict.error is None:
                    self.tell(Seen(source, verdict, pixels[row], {name: v[row] for name, v in outputs.items()}))

    def tell(self, seen: Seen) -> None:
        """Let the watchers see one image."""
        for watcher in self.watchers:
            watcher(seen)

    def _decode(self, source: ImageLike, out: Pixels) -> Read:
        """Fill one row of a batch."""
        damage: list[str] = []
        try:
            read_pixels(source, self._settings, out, damaged=damage.append)
        except ImageError as error:
            return str(error), None
        if damage and self._strict:
            return f"'{_name(source)}': {damage[0]}; copy or take it again", None
        return None, damage[0] if damage else None

    def verdicts(
        self, sources: Sequence[ImageLike], outputs: dict[str, Array], read: Sequence[Read] | None = None
    ) -> list[Verdict]:
        """The verdicts that a run of the engine comes to.

        Args:
            sources: the n images of the batch.
            outputs: what `Runner.infer` returned for them.
            read: for each image, why it could not be read (its outputs then mean nothing), and what is damaged in it.
        """
        read = [(None, None)] * len(sources) if read is None else read
        return [
            self._verdict(_name(source), {name: values[row] for name, values in outputs.items()}, *found)
            for row, (source, found) in enumerate(zip(sources, read, strict=True))
        ]

    def _verdict(self, name: str, output: dict[str, Any], error: str | None, warning: str | None) -> Verdict:
        runner = self.runner
        if error is None and not (np.isfinite(output["ood_score"]) and np.isfinite(output["probs"]).all()):
            error = f"'{name}': the model's output is not finite; verify the artifact, or use another precision"
        if error is not None:
            empty = (None, None, None, None)
            return Verdict(name, *empty, self.threshold, None, None, runner.engine, runner.precision, error=error)
        index, score = int(output["logits"].argmax()), float(output["ood_score"])
        p = None
        if self._table is not None:  # a stream's mean score, and graphs of earlier releases, come without a p-value
            p = output["p_known"] if "p_known" in output else p_known([score], self._table)[0]
        return Verdict(
            image=name,
            class_index=index,
            class_name=runner.spec.classes[index],
            confidence=float(output["probs"][index]),
            ood_score=score,
            threshold=self.threshold,
            known=None if self.threshold is None else bool(score <= self.threshold),
            p_known=p if p is None else round(float(p), 6),
            engine=runner.engine,
            precision=runner.precision,
            image_warning=warning,
        )


def _name(source: ImageLike) -> str:
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        return without_secrets(name) if is_address(name) else name
    if isinstance(source, Stored):
        return source.name
    if isinstance(source, Image.Image):
        return "PIL image"
    if isinstance(source, np.ndarray):
        return "array"
    return "bytes" if isinstance(source, (bytes, bytearray, memoryview)) else type(source).__name__
