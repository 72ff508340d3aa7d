"""The paper's tables on small stand-ins for their data sets, and the lists that fix their images."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torchvision
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from scipy.io import savemat
from small import write_images

from ssod_edge.cli import main
from ssod_edge.cli.train import reproduce
from ssod_edge.data.image_lists import choose_seeded, find_listed, write_image_list
from ssod_edge.data.readers import ReaderImages
from ssod_edge.data.sources import ListedImages, open_dataset
from ssod_edge.errors import ImageError, UsageError
from ssod_edge.studies.protocols import SVHN, TABLES, markdown
from ssod_edge.studies.study import parse_grid

TINY = ["--backbone", "test_efficientnet", "--size", "40", "--epochs", "1", "--batch-size", "8", "--workers", "0"]
SETS = ("cifar10/train", "cifar10/test", "imagenet/train", "imagenet/val", "SVHN", "lsun", "isun", "dtd/images")
FLAT = ("Places/images", "iNaturalist", "sun", "imagenet-o", "openimage_o")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("protocols")
    for name in SETS:
        write_images(folder / name)
    rng = np.random.default_rng(0)
    for name in FLAT:
        (folder / name).mkdir(parents=True)
        for index in range(30):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / name / f"{index}.png")
    return folder


def run(table, root, out, *more, tiny=TINY):
    return CliRunner().invoke(main, ["reproduce", table, "--root", str(root), "-o", str(out), *tiny, *more])


def test_table_2_from_nothing_and_again(root, tmp_path):
    out = tmp_path / "out"
    result = run("cifar10", root, out, "--images", "25", "--gamma", "0.8")
    assert result.exit_code == 0, result.output
    text = (out / "table2.md").read_text()
    assert text in result.stdout and "protocol native, 40 px;" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| method")]
    scores = {(row[0], row[2]) for row in rows}
    assert ("method=ssod", "ssod") in scores and ("method=ce", "energy") in scores
    assert ("method=ce", "ssod") not in scores, "an OOD row that was not trained says nothing"
    assert "| method=ssod |  | paper | 94.17 | 2.12 / 99.44 |" in text and "| 5.19 / 98.94 |" in text
    runs = json.loads((out / "study.json").read_text())["runs"]
    figure = next(row for row in runs[1]["results"] if (row["ood"], row["score"]) == ("svhn", "energy"))
    shown = next(row for row in rows if row[:3] == ["method=ssod", "1", "energy"])
    assert shown[4] == f"{100 * figure['fpr_at_id_tpr95']:.2f} / {100 * figure['auroc']:.2f}"
    assert (figure["n_ood"], runs[0]["n_id"]) == (25, 25)
    config = json.loads((out / "method=ssod-seed=0" / "config.json").read_text())
    assert (config["recipe"], config["lr"], config["epochs"]) == ("paper", 1e-4, 1)
    other = run("cifar10", root, out, "--images", "24", "--check")
    assert other.exit_code == 2 and "lists 25 images, not the 24 of --images" in other.stderr
    # The lists go elsewhere, and give the same images there.
    again = run("cifar10", root, tmp_path / "again", "--lists", str(out / "lists"), "--check")
    assert again.exit_code == 0 and "Table 2: 2 runs: method=ce-seed=0, method=ssod-seed=0" in again.stdout
    assert not (tmp_path / "again" / "lists").exists()


@pytest.mark.parametrize(("table", "vary"), [("imagenet", "method=ssod"), ("hard", "method=ssod")])
def test_tables_of_imagenet_start_from_weights(table, vary, root, tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_efficientnet", num_classes=7).state_dict(), str(weights))
    result = run(table, root, tmp_path / "out", "--vary", vary, "--weights", str(weights))
    assert result.exit_code == 0, result.output
    assert f"Table {TABLES[table].number} (" in result.stdout and "| method=ssod |  | paper |" in result.stdout
    config = json.loads((tmp_path / "out" / "method=ssod-seed=0" / "config.json").read_text())
    assert config["weights"] == str(weights)


@pytest.mark.parametrize(
    ("table", "vary", "paper"), [("alpha", "alpha=1.2", "92.53"), ("balance", "patch_balance=dr", "94.11")]
)
def test_tables_of_the_ablations(table, vary, paper, root, tmp_path):
    result = run(table, root, tmp_path / "out", "--vary", vary)
    assert result.exit_code == 0, result.output
    assert f"| {vary} |  | paper | {paper} |" in result.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gamma", "0.3"], "gamma must satisfy"),
        (["--method", "both"], "method cannot be given both"),
        (["--seed", "1"], "a study takes --seeds, not --seed"),
        (["--weights", "/nonexistent.pth"], "'/nonexistent.pth' does not exist"),
        (["--baselines", "Nobody"], "there is no baseline 'nobody'"),
        (["--root", "EMPTY"], "holds no images"),
        (["--root", "OTHER"], "is none of the model's"),
    ],
)
def test_a_check_finds_what_training_would_refuse_before_a_list_is_made(root, tmp_path, more, message):
    for name in ("SVHN", "lsun", "isun", "dtd", "Places", "cifar10/test"):
        for other in ("EMPTY", "OTHER"):
            (tmp_path / other / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / other / name).symlink_to(root / name)
    (tmp_path / "EMPTY" / "cifar10" / "train").mkdir()
    for name in "xy":
        (tmp_path / "OTHER" / "cifar10" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "OTHER" / "cifar10" / "train" / name / "0.png")
    more = [str(tmp_path / part) if part in ("EMPTY", "OTHER") else part for part in more]
    result = run("cifar10", root, tmp_path / "out", *more, "--check")
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "out").exists()


def test_help_shows_what_a_grid_takes():
    pages = {name: CliRunner().invoke(main, [name, "--help-all"]).output for name in ("train", "study", "reproduce")}
    assert ["--seed " in page for page in pages.values()] == [True, False, False]
    recipes = [re.search(r"--recipe \[.*?default: (\w+)", page, re.DOTALL)[1] for page in pages.values()]
    assert recipes == ["short", "short", "paper"]


def test_table_6_varies_the_backbone(root, tmp_path):
    small = [*TINY[2:], "--vary", "backbone=test_efficientnet,test_vit"]
    result = run("backbones", root, tmp_path / "out", "--check", tiny=small)
    assert result.exit_code == 0 and "2 runs: backbone=test_efficientnet-seed=0" in result.stdout
    result = run("backbones", root, tmp_path / "out", "--check")
    assert result.exit_code == 2 and "choose some of it with --vary backbone=NAME" in result.stderr


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_a_grid_and_the_paper_figures_belong_to_it(name):
    table = TABLES[name]
    labels = {cell.label for cell in parse_grid(table.vary, "0")}
    assert set(table.published) | set(table.accuracy) <= labels
    assert all(set(row) == {data.name for data in table.unknown} for row in table.published.values())
    assert set(reproduce.params[0].type.choices) == set(TABLES)


def test_every_missing_data_set_is_named_at_once(tmp_path):
    write_images(tmp_path / "svhn")
    result = run("cifar10", tmp_path, tmp_path / "out")
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert "cifar10-train: cifar10/train/, cifar10/train.tar or cifar-10-batches-py" in result.stderr
    assert "lsun: lsun/, lsun.tar" in result.stderr and "svhn:" not in result.stderr


@pytest.mark.parametrize("place", ["", "SVHN"])
def test_svhn_is_found_as_torchvision_keeps_it(tmp_path, place):
    assert TABLES["cifar10"].unknown[0].find(tmp_path) is None
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    (folder / "test_32x32.mat").touch()
    assert TABLES["cifar10"].unknown[0].find(tmp_path) == f"torch/svhn:{folder}:test"


def test_a_list_is_what_sha256sum_reads(root, tmp_path):
    source = open_dataset(str(root / "SVHN"))
    file = write_image_list(source, choose_seeded(source, 20, 0), tmp_path / "svhn.sha256")
    assert len(file.read_text().splitlines()) == 20
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", str(file)], cwd=root / "SVHN", check=True)
    listed = open_dataset(f"{root / 'SVHN'}@{file}")
    names = [line[66:] for line in file.read_text().splitlines()]
    assert [listed.source(index) for index in range(20)] == names
    first = int(np.flatnonzero([source.source(i) == names[0] for i in range(len(source))])[0])
    assert listed.labels[0] == source.labels[first] and listed.classes == source.classes
    assert listed.image(0).tobytes() == source.image(first).tobytes()


def test_the_choice_does_not_depend_on_other_images(tmp_path):
    for index in range(40):
        path = tmp_path / "data" / "x" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, 0, 0)).save(path)

    def chosen(seed=0):
        source = open_dataset(str(tmp_path / "data"), labelled=False)
        return {source.source(index) for index in choose_seeded(source, 10, seed)}

    before = chosen()
    assert len(before) == 10 and chosen(seed=1) != before
    unused = next(path for path in (tmp_path / "data" / "x").iterdir() if f"x/{path.name}" not in before)
    unused.unlink()
    assert chosen() == before
    everything = choose_seeded(open_dataset(str(tmp_path / "data")), 100, 0)
    assert everything.tolist() == list(range(39))


def test_an_image_that_changed_is_found(root, tmp_path):
    write_images(tmp_path / "svhn")
    source = open_dataset(str(tmp_path / "svhn"))
    file = write_image_list(source, np.arange(5), tmp_path / "svhn.sha256")
    path = tmp_path / "svhn" / source.source(2)
    Image.new("RGB", (40, 40)).save(path)
    listed = open_dataset(f"{tmp_path / 'svhn'}@{file}")
    listed.image(1)
    with pytest.raises(ImageError, match="not the image that the list was made with"):
        listed.image(2)
    path.unlink()
    with pytest.raises(UsageError, match="has no image"):
        open_dataset(f"{tmp_path / 'svhn'}@{file}")


def tar_as(path: Path, folder: Path, inside: str) -> str:
    with tarfile.open(path, "w") as tar:
        tar.add(folder, inside)
    return str(path)


@pytest.mark.parametrize("below", [("a", "b"), ("images",), ("",)])
def test_a_folder_and_its_archives_have_the_same_lists(tmp_path, below):
    folder = tmp_path / "DIR"
    for name in below:
        for index in range(12):
            path = folder / name / f"{name}{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (20 * index, 9 * len(name) + ord(name[0]) if name else 0, 0)).save(path)
    places = [str(folder), tar_as(tmp_path / "x.tar", folder, "."), tar_as(tmp_path / "y.tar", folder, "DIR")]
    chosen = []
    for number, place in enumerate(places):
        source = open_dataset(place, labelled=False)
        file = write_image_list(source, choose_seeded(source, 5, 0), tmp_path / f"{number}.sha256")
        for other in places:
            listed = open_dataset(f"{other}@{file}", labelled=False)
            assert len({listed.image(index).getpixel((0, 0)) for index in range(5)}) == 5
        chosen.append([line[:64] for line in file.read_text().splitlines()])
    assert chosen[0] == chosen[1] == chosen[2]
    # A list of one folder alone finds its images too.
    source = open_dataset(places[2], labelled=False)
    part = write_image_list(source, np.arange(5), tmp_path / "part.sha256")
    assert len(open_dataset(f"{folder}@{part}", labelled=False)) == 5


def test_a_path_may_have_an_at_of_its_own(root, tmp_path, monkeypatch):
    write_images(tmp_path / "me@home" / "data")
    data = tmp_path / "me@home" / "data"
    source = open_dataset(str(data))
    file = write_image_list(source, np.arange(5), tmp_path / "out@host.sha256")
    assert len(open_dataset(f"{data}@{file}")) == 5 and len(open_dataset(str(data))) == len(source)
    monkeypatch.chdir(tmp_path)
    Path("host.sha256").write_text("not a list")
    assert len(open_dataset(f"{data}@out@host.sha256")) == 5
    with pytest.raises(UsageError, match="'.*me@home/none' does not exist"):
        open_dataset(str(tmp_path / "me@home" / "none"))
    result = run("alpha", root, tmp_path / "out@host", "--check")
    assert result.exit_code == 0, result.output
    (lists,) = (tmp_path / "out@host").iterdir()
    assert len(open_dataset(f"{root / 'Places'}@{lists / 'places.sha256'}", labelled=False)) == 30


def test_svhn_as_torchvision_keeps_it(root, tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
    file = tmp_path / "test_32x32.mat"
    savemat(file, {"X": images, "y": np.arange(20)[:, None] % 10 + 1})
    data = replace(SVHN, places=("svhn",)).find(tmp_path)
    with pytest.raises(UsageError, match="cannot be opened: Dataset not found or corrupted"):
        open_dataset(data)  # torchvision compares the file's MD5
    digest = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setitem(torchvision.datasets.SVHN.split_list, "test", ["", file.name, digest])
    source = open_dataset(data)
    assert source.labels.tolist() == [*range(1, 10), 0] * 2 and source.classes == tuple("0123456789")
    assert np.array_equal(np.asarray(source.image(3)), images[..., 3])
    listed = write_image_list(source, choose_seeded(source, 5, 0), tmp_path / "svhn.sha256")
    assert len(open_dataset(f"{data}@{listed}")) == 5 and listed.read_text().splitlines()[0][66:].isdecimal()


class Pixels(ReaderImages):
    """What torchvision's archives look like: decoded images without file names."""

    def __init__(self, images):
        self.name, self._reader, self._pid = "torch/x", [(Image.fromarray(image), 0) for image in images], -1
        self.labels, self.classes, self.fingerprint = np.zeros(len(images), dtype=np.int64), ("x",), ""


def test_an_archive_of_pixels_is_listed_by_index(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    source = Pixels(images)
    file = write_image_list(source, np.array([1, 3]), tmp_path / "x.sha256")
    assert file.read_text().splitlines()[1] == f"{hashlib.sha256(images[3].tobytes()).hexdigest()}  3"
    listed = ListedImages(source, *find_listed(source, str(file)), "x")
    assert np.array_equal(np.asarray(listed.image(1)), images[3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("abc  c0/0.png\n", "line 1 .* is not 'SHA256  NAME'"),
        (f"{'0' * 64}  ../secret.png\n", "has no image"),
        (f"{'0' * 64}  NAME\n{'0' * 64}  NAME\n", "twice"),
    ],
)
def test_a_bad_list_is_named(root, tmp_path, text, message):
    source = open_dataset(str(root / "SVHN"))
    (tmp_path / "bad.sha256").write_text(text.replace("NAME", source.source(0)))
    with pytest.raises(UsageError, match=message):
        open_dataset(f"{root / 'SVHN'}@{tmp_path / 'bad.sha256'}")
    with pytest.raises(UsageError, match="cannot be read"):
        open_dataset(f"{root / 'SVHN'}@{tmp_path / 'none.sha256'}")


def test_lists_that_lack_a_set_are_refused(root, tmp_path):
    result = run("alpha", root, tmp_path / "out", "--lists", str(tmp_path), "--check")
    assert result.exit_code == 2 and "has no list 'cifar10.sha256'" in result.stderr


def test_means_over_seeds():
    table = TABLES["balance"]
    runs = [
        {"settings": "patch_balance=dr", "seed": seed, "id_accuracy": accuracy, "protocol": "native", "input_size": 224,
         "ood_row_trained": True, "mean": {"ssod": {}},
         "results": [{"ood": "places", "score": "ssod", "fpr_at_id_tpr95": fpr, "auroc": 1 - fpr}]}
        for seed, accuracy, fpr in ((0, 0.9, 0.1), (1, 0.8, 0.2))
    ]  # fmt: skip
    assert "| patch_balance=dr | 2 | ssod | 85.00 | 15.00 / 85.00 | 15.00 / 85.00 |" in markdown(table, runs)
    for part in (0, 1):  # a detector that failed in the other seed
        runs[part]["mean"]["KNN"] = {}
        runs[part]["results"].append({"ood": "places", "score": "KNN", "fpr_at_id_tpr95": 0.3, "auroc": 0.7})
        assert ("KNN" in markdown(table, runs)) == bool(part)


@pytest.mark.parametrize(("table", "vary"), [("cifar10", "size=40,48"), ("imagenet", "weights={0},{1}")])
def test_what_the_grid_varies_is_not_also_the_tables(table, vary, root, tmp_path):
    files = [tmp_path / "a.pth", tmp_path / "b.pth"]
    for file in files:
        file.touch()
    tiny = [part for part in TINY if table != "cifar10" or part not in ("--size", "40")]
    result = run(table, root, tmp_path / "out", "--vary", vary.format(*files), "--check", tiny=tiny)
    assert result.exit_code == 0 and "2 runs" in result.stdout, result.output
