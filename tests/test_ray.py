"""Verdicts on a Ray cluster: those of one process, whatever is damaged and whoever dies."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from colour import write_colours

import ssod_edge
import ssod_edge.ray
from ssod_edge.errors import MissingExtraError, UsageError
from ssod_edge.optional import is_there
from ssod_edge.parquet_table import arrow_schema
from ssod_edge.ray import Verdicts, _listed, _one_a_node, predict
from ssod_edge.runtime.written import COLUMNS, column_types

pa = pytest.importorskip("pyarrow", reason="pyarrow comes with the extra `ray`")
needs_ray = pytest.mark.skipif(not is_there("ray"), reason="the extra `ray` is not installed")

ENGINE = "onnxruntime"
ACTORS, ROWS = 4, 3


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    """48 photos, of which one is cut short and one is not there."""
    folder = write_colours(tmp_path / "photos", 16)
    paths = sorted(str(path) for path in folder.rglob("*.png"))
    Path(paths[7]).write_bytes(Path(paths[7]).read_bytes()[:60])
    Path(paths[20]).unlink()
    return paths


def expected(export: Path, paths: list[str]) -> list[dict[str, Any]]:
    """What one process says; as many images run together as in a block."""
    with ssod_edge.open(export, ENGINE, threads=1) as model:
        return [verdict.to_dict() for verdict in model.predict_many(paths, ROWS)]


# One actor's work, without Ray


def test_a_table_of_paths_becomes_the_verdicts_of_predict(export: Path, photos: list[str]) -> None:
    table = pa.table({"path": photos, "label": range(len(photos))})
    verdicts = Verdicts(export, engine=ENGINE, threads=1)(table)
    assert verdicts.column_names == [*COLUMNS, "label"]
    assert verdicts.column("label").to_pylist() == list(range(len(photos)))
    with ssod_edge.open(export, ENGINE, threads=1) as model:
        assert verdicts.drop_columns("label").to_pylist() == [one.to_dict() for one in model.predict_many(photos)]
    errors = verdicts.column("error").to_pylist()
    assert [row for row, error in enumerate(errors) if error is not None] == [7, 20]


def test_bytes_are_judged_as_their_files_are(export: Path, photos: list[str]) -> None:
    del photos[20]
    actor, contents = Verdicts(export, engine=ENGINE, threads=1), [Path(path).read_bytes() for path in photos]
    by_path = actor(pa.table({"path": photos}))
    assert actor(pa.table({"path": photos, "bytes": contents})).equals(by_path)
    nameless = actor(pa.table({"bytes": contents}))
    assert set(nameless.column("image").to_pylist()) == {None}
    assert nameless.column("ood_score").equals(by_path.column("ood_score"))
    assert nameless.column("error").to_pylist()[7].startswith("image bytes: ")


def test_a_batch_that_cannot_be_read_has_the_same_types(export: Path, tmp_path: Path) -> None:
    actor = Verdicts(export, engine=ENGINE, threads=1)
    nothing = actor(pa.table({"path": pa.array([str(tmp_path / "no.png"), None], pa.string())}))
    assert nothing.schema == arrow_schema(column_types())
    assert nothing.column("class_index").to_pylist() == [None, None] and nothing.column("error").null_count == 0
    assert actor(pa.table({"bytes": pa.array([b"", None], pa.binary())})).column("error").null_count == 0
    assert dict(zip(nothing.column_names, map(str, nothing.schema.types), strict=True)) == {
        "image": "string", "class_index": "int64", "class_name": "string", "confidence": "double",
        "ood_score": "double", "threshold": "double", "known": "bool", "p_known": "double", "engine": "string",
        "precision": "string", "image_warning": "string", "error": "string",
    }  # fmt: skip


def test_no_secret_of_an_address_is_in_a_row(export: Path) -> None:
    rows = Verdicts(export, engine=ENGINE)(pa.table({"bytes": [b"?"], "path": ["s3://user:word@bucket/1.jpg?sign=2"]}))
    assert rows.column("image").to_pylist() == ["s3://bucket/1.jpg?..."] and "word" not in str(rows.to_pylist())


def test_a_table_without_images_is_wrong_usage(export: Path) -> None:
    with pytest.raises(UsageError, match="needs a column 'bytes' or 'path', got image, label"):
        Verdicts(export, engine=ENGINE)(pa.table({"image": ["1.png"], "label": [1]}))


# How the work is handed out


def test_an_actor_a_node_takes_all_of_its_cores_but_one() -> None:
    def node(cores: float | None, alive: bool = True) -> dict[str, Any]:
        return {"Alive": alive, "Resources": {"memory": 1.0} | ({} if cores is None else {"CPU": cores})}

    assert _one_a_node([node(8.0), node(16.0), node(4.0, alive=False), node(None)]) == (2, 7)
    assert _one_a_node([node(1.0)]) == (1, 1)
    with pytest.raises(UsageError, match="no node of the Ray cluster"):
        _one_a_node([node(0.0)])


def test_without_ray_the_message_names_the_extra(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ssod-edge\[ray\]'"):
        predict("photos", export)


@pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"batch_size": 0}])
def test_numbers_below_one_are_wrong_usage(wrong: dict[str, Any], export: Path) -> None:
    with pytest.raises(UsageError, match="must be at least 1"):
        predict("photos", export, **wrong)


@needs_ray
@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("{}/nothing*", "no image matches"),
        (["{}/1.png", "s3://bucket/photos"], "cannot be mixed"),
        ("{}/\udcff.png", "is no UTF-8"),
    ],
)
def test_images_that_cannot_be_listed_are_wrong_usage(images: Any, message: str, tmp_path: Path) -> None:
    names = [images] if isinstance(images, str) else images
    with pytest.raises(UsageError, match=message):
        _listed([name.format(tmp_path) for name in names], ROWS)


@needs_ray
def test_addresses_are_read_by_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cluster: of the file system file:// it was tried by hand."""
    asked: list[Any] = []
    monkeypatch.setattr("ray.data.read_binary_files", lambda paths, **options: asked.append((paths, options)))
    _listed("s3://bucket/photos", ROWS)
    [(paths, options)] = asked
    assert paths == ["s3://bucket/photos"] and options["include_paths"]
    assert {"jpg", "png"} <= set(options["file_extensions"])


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A local cluster of four cores, whether there are so many or not."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else one is written into the home folder
        ray.init(num_cpus=ACTORS, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
        yield ray
        ray.shutdown()


def mortal(folder: Path) -> type[Verdicts]:
    """Actors that leave their process ids in a folder; once all are at work, one of them is killed."""

    class Mortal(ssod_edge.ray.Verdicts):
        def __call__(self, batch: Any) -> Any:
            (folder / f"{os.getpid()}.pid").touch()
            until = time.monotonic() + 60
            while len(list(folder.glob("*.pid"))) < ACTORS and time.monotonic() < until:
                time.sleep(0.01)
            with suppress(FileExistsError):
                (folder / "killed").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    return Mortal


@needs_ray
def test_four_actors_of_which_one_is_killed_say_what_one_process_says(
    ray: Any, export: Path, photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssod_edge.ray, "Verdicts", mortal(tmp_path))
    rows = predict(photos, export, concurrency=ACTORS, batch_size=ROWS, engine=ENGINE).take_all()
    assert (tmp_path / "killed").exists() and len(list(tmp_path.glob("*.pid"))) > ACTORS
    assert sorted(rows, key=lambda row: row["image"]) == expected(export, photos)
    assert sum(row["error"] is not None for row in rows) == 2


@needs_ray
def test_a_local_cluster_is_one_node_and_ray_reports_nothing(ray: Any) -> None:
    assert _one_a_node(ray.nodes()) == (1, ACTORS - 1)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
