"""Verdicts on a Ray cluster: one open model a node, on images without number.

Ray Data hands out the images, starts an actor again that died, and repeats what it had in hand; none of that is ours::

    import ray
    import ssod_edge.ray

    ray.init("auto")
    verdicts = ssod_edge.ray.predict("/shared/photos", "/shared/runs/clothes")
    verdicts.write_parquet("/shared/verdicts")
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

from ssod_edge.config import IMAGE_SUFFIXES
from ssod_edge.data.inputs import list_images
from ssod_edge.data.pixels import ImageLike, Picture
from ssod_edge.errors import UsageError
from ssod_edge.optional import load
from ssod_edge.parquet_table import arrow_schema
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.predict import Predictor
from ssod_edge.runtime.written import COLUMNS, column_types
from ssod_edge.sources import is_address, without_secrets

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

PURPOSE = "a Ray cluster"
#: Ray reports its use to its maker unless this says 0. It is read where a cluster is started.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

#: Images that an actor gets at a time, and begins again with if it dies; the engine runs on a few of them at a time.
BATCH = 64
Path: TypeAlias = "str | os.PathLike[str]"


class Verdicts:
    """An open model that turns tables of images into tables of verdicts: a callable class for `Dataset.map_batches`.

    A table has a column `bytes`, images as they are encoded, or `path`, which the actor reads itself; beside `bytes` a
    `path` is their name. The table of verdicts has the columns of `predict --csv`, of the same types in every batch,
    and the other columns of the images. An image that cannot be read has its `error` there, and the others go on.

    Args:
        export: an export folder, or the run folder that holds it, as this node sees it.
        opening: options of `ssod_edge.runtime.open.open_runner`. As many threads as it gives the engine decode images.

    Raises:
        UsageError, ArtifactError, MissingExtraError, EngineError, VerificationError: see `open_runner`.
    """

    def __init__(self, export: Path, **opening: Any) -> None:
        self._model = Predictor(open_runner(export, **opening))
        self._threads: int | None = opening.get("threads")
        self._schema = arrow_schema(column_types())

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The verdicts on a batch, in its order.

        Raises:
            UsageError: there is neither a column `bytes` nor one `path`.
        """
        images = _images(batch)
        verdicts = self._model.predict_many((image for image, _ in images), workers=self._threads)
        rows = [{**verdict.to_dict(), "image": name} for verdict, (_, name) in zip(verdicts, images, strict=True)]
        table = _pyarrow().Table.from_pylist(rows, schema=self._schema)
        for name in batch.column_names:
            if name not in ("bytes", "path", *COLUMNS):
                table = table.append_column(name, batch.column(name))
        return table


def _images(batch: pa.Table) -> list[tuple[ImageLike, str | None]]:
    """Each image as `predict_many` takes it, and what its row calls it."""
    columns = set(batch.column_names)
    if not columns & {"bytes", "path"}:
        raise UsageError(
            f"a Dataset of images needs a column 'bytes' or 'path', got {', '.join(batch.column_names)}. "
            "Rename one with: dataset.rename_columns({'NAME': 'bytes'})"
        )
    paths = batch.column("path").to_pylist() if "path" in columns else [None] * len(batch)
    names = [without_secrets(path) if path is not None and is_address(path) else path for path in paths]
    if "bytes" not in columns:
        return list(zip(paths, names, strict=True))
    contents = batch.column("bytes").to_pylist()
    pictures = [
        Picture(content, "image bytes" if name is None else f"'{name}'")
        for content, name in zip(contents, names, strict=True)
    ]
    return list(zip(pictures, names, strict=True))


def predict(
    images: Dataset | Path | Iterable[Path],
    export: Path,
    concurrency: int | None = None,
    batch_size: int = BATCH,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    **opening: Any,
) -> Dataset:
    """The verdicts on many images as a Ray Dataset, which begins to work when it is read or written.

    Rows come in no order of their own; `image` says whose each is.

    Args:
        images: files, folders and patterns, which every node must see under the same path; addresses that Ray reads,
            such as s3://bucket/photos; or a Dataset with a column `bytes` or `path` (see `Verdicts`).
        export: see `Verdicts`. A relative path is one in the working directory of the job.
        concurrency: actors, each with its own open model. None is one a node, which takes all of its cores but one.
        batch_size: images that an actor has in hand, and that are done again if it dies.
        num_cpus: cores of an actor, and threads of its engine; beside `concurrency` 1, unless it has a GPU.
        num_gpus: GPUs of an actor.
        opening: see `Verdicts`.

    Raises:
        MissingExtraError: the extra `ray` is not installed.
        UsageError: no images, or an argument out of range.
    """
    if batch_size < 1 or (concurrency is not None and concurrency < 1):
        raise UsageError(f"concurrency and batch_size must be at least 1, got {concurrency} and {batch_size}")
    ray, data = load("ray", PURPOSE), load("ray.data", PURPOSE)
    dataset = images if isinstance(images, data.Dataset) else _listed(images, batch_size)
    if concurrency is None:
        if not ray.is_initialized():
            ray.init()
        concurrency, cores = _one_a_node(ray.nodes())
        num_cpus = cores if num_cpus is None else num_cpus
    elif num_cpus is None and num_gpus is None:
        num_cpus = 1
    if num_cpus is not None:
        opening.setdefault("threads", max(1, int(num_cpus)))
    return dataset.map_batches(
        Verdicts,
        fn_constructor_args=(os.fspath(export),),
        fn_constructor_kwargs=opening,
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=data.ActorPoolStrategy(size=concurrency),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        udf_modifying_row_count=False,
    )


def _one_a_node(nodes: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """How many nodes there are that compute, and the cores that an actor takes of each, so that no two fit on one.

    One core is left for what reads the images.
    """
    cores = [int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]
    cores = [count for count in cores if count > 0]
    if not cores:
        raise UsageError("no node of the Ray cluster has a CPU to offer")
    return len(cores), max(1, min(cores) - 1)


def _listed(images: Path | Iterable[Path], rows: int) -> Dataset:
    """A Dataset of paths, so many in a block, which the actors read themselves; of addresses one of what Ray reads."""
    pa, data = _pyarrow(), load("ray.data", PURPOSE)
    given = [os.fspath(name) for name in ([images] if isinstance(images, (str, os.PathLike)) else images)]
    addresses = [name for name in given if is_address(name)]
    if addresses and len(addresses) < len(given):
        raise UsageError("paths and addresses cannot be mixed: make one Dataset of each, and join them with union()")
    if addresses:
        suffixes = sorted(suffix.lstrip(".") for suffix in IMAGE_SUFFIXES)
        return data.read_binary_files(addresses, include_paths=True, file_extensions=suffixes)
    paths = [os.path.abspath(path) for path in list_images(given)]
    if (bad := next((path for path in paths if not _is_text(path)), None)) is not None:
        raise UsageError(f"the name of {bad!r} is no UTF-8, which the tables of Ray need: rename the file")
    return data.from_arrow([pa.table({"path": paths[start : start + rows]}) for start in range(0, len(paths), rows)])


def _pyarrow() -> Any:
    return load("pyarrow", PURPOSE, "ray")


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
