"""The paper's tables as commands: which images, where they are expected, what is trained, what the paper reports."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ssod_edge.config import NEED_OOD_ROW, PUBLISHED
from ssod_edge.data.image_lists import choose_seeded, find_listed, write_image_list
from ssod_edge.data.readers import ReaderImages
from ssod_edge.data.sources import IMAGE_LIST_SUFFIX, open_dataset
from ssod_edge.errors import UsageError
from ssod_edge.files import make_directory, write_atomic
from ssod_edge.studies.study import StudyOptions, check_evaluation, plan_study, read_study, run_study
from ssod_edge.terminal import image_bar, tell

#: (FPR at 95% ID TPR, AUROC), in percent.
Figures = tuple[float, float]


@dataclass(frozen=True)
class DataSet:
    """A data set, and where below ROOT it may lie.

    Attributes:
        name: in tables, and of its list.
        places: below ROOT, each a folder or, with .tar, an archive of one; upper and lower case do not matter.
        archives: how torchvision keeps it: files or folders below ROOT.
        torchvision: what `open_dataset` takes for those, with "{root}" for the folder that one lies in.
    """

    name: str
    places: tuple[str, ...]
    archives: tuple[str, ...] = ()
    torchvision: str = ""

    def find(self, root: Path) -> str | None:
        """What `open_dataset` takes, or None."""
        for path in self.archives:  # first: one may lie in the folder that is a place
            if found := _find(root, path):
                return self.torchvision.format(root=found.parent)
        places = (_find(root, f"{place}{end}") for place in self.places for end in ("", ".tar"))
        return next((str(found) for found in places if found), None)

    @property
    def expected(self) -> str:
        """Its places in words."""
        return " or ".join([f"{self.places[0]}/, {self.places[0]}.tar", *self.archives])


def _find(root: Path, path: str) -> Path | None:
    for part in path.split("/"):
        if not root.is_dir():
            return None
        match = sorted(entry for entry in root.iterdir() if entry.name.lower() == part.lower())
        if not match:
            return None
        root = match[0]
    return root


_CIFAR_FILES = ("cifar-10-batches-py",)
CIFAR10_TRAIN = DataSet("cifar10-train", ("cifar10/train", "cifar10-train"), _CIFAR_FILES, "torch/cifar10:{root}")
CIFAR10 = DataSet("cifar10", ("cifar10/test", "cifar10-test"), _CIFAR_FILES, "torch/cifar10:{root}:test")
IMAGENET_TRAIN = DataSet("imagenet-train", ("imagenet/train", "imagenet-train"))
IMAGENET = DataSet("imagenet", ("imagenet/val", "imagenet-val"))
SVHN = DataSet("svhn", ("svhn",), ("test_32x32.mat", "svhn/test_32x32.mat"), "torch/svhn:{root}:test")
LSUN = DataSet("lsun", ("lsun", "lsun_c"))
ISUN = DataSet("isun", ("isun",))
TEXTURES = DataSet("textures", ("textures", "texture", "dtd/images", "dtd"))
PLACES = DataSet("places", ("places", "places365"))
INATURALIST = DataSet("inaturalist", ("inaturalist",))
SUN = DataSet("sun", ("sun",))
IMAGENET_O = DataSet("imagenet-o", ("imagenet-o", "imagenet_o"))
OPENIMAGE_O = DataSet("openimage-o", ("openimage-o", "openimage_o"))


@dataclass(frozen=True)
class Table:
    """One table of the paper.

    Attributes:
        number: of the table.
        train, known, unknown: training data, ID test images, OOD sets.
        vary: the grid, as `ssod_edge.studies.study.parse_grid` takes it.
        options: of `train`, beside the recipe of Appendix A.4.
        published: settings of a cell -> OOD set -> what the paper reports for SSOD's score there.
        accuracy: settings of a cell -> ID accuracy in percent, where the paper has it.
    """

    number: int
    train: DataSet
    known: DataSet
    unknown: tuple[DataSet, ...]
    vary: tuple[str, ...]
    options: Mapping[str, Any]
    published: Mapping[str, Mapping[str, Figures]]
    accuracy: Mapping[str, float] = field(default_factory=dict)


_CIFAR: dict[str, Any] = {"backbone": "resnet18", "size": 224}
_IMAGENET: dict[str, Any] = {"size": 224, "weights": PUBLISHED}
_METHODS = "method=ce,ssod"


#: Name of the command's argument -> table. The figures are the paper's rows for SSOD.
TABLES: dict[str, Table] = {
    "imagenet": Table(
        1, IMAGENET_TRAIN, IMAGENET, (INATURALIST, SUN, PLACES, TEXTURES), (_METHODS,),
        {**_IMAGENET, "backbone": "resnet50"},
        {"method=ssod": {"inaturalist": (14.80, 96.91), "sun": (28.52, 94.33), "places": (38.92, 90.78),
                         "textures": (45.32, 87.02)}},
    ),
    "cifar10": Table(
        2, CIFAR10_TRAIN, CIFAR10, (SVHN, LSUN, ISUN, TEXTURES, PLACES), (_METHODS,), _CIFAR,
        {"method=ssod": {"svhn": (2.12, 99.44), "lsun": (4.42, 99.11), "isun": (10.06, 98.16),
                         "textures": (1.91, 99.59), "places": (7.44, 98.42)}},
        {"method=ssod": 94.17, "method=ce": 94.21},
    ),
    "hard": Table(
        3, IMAGENET_TRAIN, IMAGENET, (IMAGENET_O, OPENIMAGE_O), (_METHODS,), {**_IMAGENET, "backbone": "resnet50d"},
        {"method=ssod": {"imagenet-o": (79.80, 74.43), "openimage-o": (55.41, 89.73)}},
    ),
    "alpha": Table(
        4, CIFAR10_TRAIN, CIFAR10, (PLACES,), ("alpha=0.5,0.7,1.0,1.2,1.5",), _CIFAR,
        {"alpha=0.5": {"places": (11.64, 97.33)}, "alpha=0.7": {"places": (9.44, 97.74)},
         "alpha=1.0": {"places": (7.44, 98.42)}, "alpha=1.2": {"places": (8.56, 98.19)},
         "alpha=1.5": {"places": (10.80, 97.49)}},
        {"alpha=0.5": 94.25, "alpha=0.7": 94.17, "alpha=1.0": 94.17, "alpha=1.2": 92.53, "alpha=1.5": 91.36},
    ),
    "balance": Table(
        5, CIFAR10_TRAIN, CIFAR10, (PLACES,), ("patch_balance=lw,dr,lwb",), _CIFAR,
        {"patch_balance=lw": {"places": (10.72, 97.66)}, "patch_balance=dr": {"places": (8.48, 98.05)},
         "patch_balance=lwb": {"places": (7.44, 98.42)}},
        {"patch_balance=lw": 93.97, "patch_balance=dr": 94.11, "patch_balance=lwb": 94.17},
    ),
    "backbones": Table(
        6, IMAGENET_TRAIN, IMAGENET, (INATURALIST, PLACES),
        ("backbone=resnet18,resnet34,resnet50,resnet101,densenet121,regnet,mobilenetv3", _METHODS),
        _IMAGENET,
        {f"backbone={name} method=ssod": {"inaturalist": inaturalist, "places": places}
         for name, inaturalist, places in (
             ("resnet18", (19.96, 95.21), (46.48, 88.31)),
             ("resnet34", (15.88, 96.28), (43.44, 87.33)),
             ("resnet50", (14.80, 96.91), (38.92, 90.78)),
             ("resnet101", (18.78, 95.56), (42.72, 87.84)),
             ("densenet121", (21.64, 94.84), (44.88, 85.51)),
             ("regnet", (16.36, 96.05), (35.80, 89.79)),
             ("mobilenetv3", (24.76, 94.47), (42.52, 88.38)),
         )},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class ImageLists:
    """Where the lists of the ID and OOD images lie, None to make them in the study's folder; and images of each."""

    folder: str | None = None
    images: int = 10_000  # Appendix A.3: "randomly selected"; all of them where there are fewer


def run_reproduce(name: str, root: str, out: str, study: StudyOptions, lists: ImageLists, check: bool = False) -> bool:
    """The command `reproduce`: find the data, fix its images, train, evaluate, and print the table.

    Args:
        name: of `TABLES`.
        root: folder of the data sets.
        out: folder of the study.
        study: its grid, if there is one, and options of `train` win over the table's. The images are the table's.
        check: stop before training.

    Returns:
        whether every run has its figures.

    Raises:
        UsageError: data sets that are not there, all named; data or options that cannot be trained with, before any
            list is made; a list that does not fit.
        ImageError: an image cannot be read, or is not the one of its list.
    """
    table = TABLES[name]
    found = _find_all(table, Path(root))
    training, grid = found[table.train.name], study.vary or table.vary
    study = replace(study, vary=grid, training=_settings(table, grid, study.given))
    cells = plan_study(training, study)
    check_evaluation(training, replace(study.evaluation, id_data=found[table.known.name]))
    folder = make_directory(Path(out))
    judged = (table.known, *table.unknown)
    listed = {data.name: _fix_images(found[data.name], data.name, folder, lists) for data in judged}
    if check:
        tell(f"Table {table.number}: {len(cells)} runs: " + ", ".join(cell.name for cell in cells))
        return True
    evaluation = replace(study.evaluation, id_data=listed.pop(table.known.name), ood_data=listed)
    done = run_study(training, out, replace(study, evaluation=evaluation))
    text = markdown(table, read_study(folder)["runs"])
    file = folder / f"table{table.number}.md"
    write_atomic(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    tell(text)
    return done


def _settings(table: Table, grid: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Of all runs: the paper's, the table's, and over them those that are given."""
    varied = {item.partition("=")[0].strip().replace("-", "_") for item in grid}
    if "backbone" in given and "backbone" in varied:
        raise UsageError("this table varies the backbone; choose some of it with --vary backbone=NAME,...")
    own = {key: value for key, value in table.options.items() if key not in varied}
    return {"recipe": "paper", **own, **given}


def _find_all(table: Table, root: Path) -> dict[str, str]:
    """Name -> data of each of a table's data sets."""
    sets = (table.train, table.known, *table.unknown)
    found = {data.name: data.find(root) for data in sets}
    missing = [f"  {data.name}: {data.expected}" for data in sets if found[data.name] is None]
    if missing:
        raise UsageError(f"'{root}' lacks data sets of Table {table.number}. Expected below it:\n" + "\n".join(missing))
    return {name: data for name, data in found.items() if data is not None}


def _fix_images(data: str, name: str, out: Path, lists: ImageLists) -> str:
    """What `open_dataset` takes for exactly the images of a list, which is made if there is none."""
    folder = Path(lists.folder) if lists.folder else make_directory(out / "lists")
    file = folder / f"{name}{IMAGE_LIST_SUFFIX}"
    source = open_dataset(data, labelled=False)
    if not isinstance(source, ReaderImages):
        raise UsageError(f"'{data}' is no folder, archive or torchvision data set")
    if not file.exists():
        if lists.folder:
            raise UsageError(f"'{lists.folder}' has no list '{file.name}'. Leave --lists out to make one")
        chosen = choose_seeded(source, lists.images, seed=0)
        with image_bar(f"list of {name}", len(chosen)) as advance:
            write_image_list(source, chosen, file, advance)
        if len(chosen) < lists.images:
            tell(f"{name}: all {len(chosen)} images; {lists.images} were asked for", err=True)
    count = len(find_listed(source, str(file))[0])
    if not lists.folder and count != min(lists.images, len(source)):
        raise UsageError(
            f"'{file}' lists {count} images, not the {lists.images} of --images. Choose another folder with -o"
        )
    return f"{data}@{file}"


def markdown(table: Table, runs: Sequence[Mapping[str, Any]]) -> str:
    """The table in the paper's form: FPR at 95% ID TPR and AUROC, in percent, means over seeds.

    Args:
        runs: reports of `ssod_edge.evaluation.evaluate.evaluate`, with `settings` and `seed`.
    """
    sets = [data.name for data in table.unknown]
    head = ["settings", "seeds", "score", "ID accuracy", *(f"{name} F / A" for name in sets), "average F / A"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for label in dict.fromkeys(run["settings"] for run in runs):
        group = [run for run in runs if run["settings"] == label]
        accuracy = 100 * statistics.fmean(run["id_accuracy"] for run in group)
        unread = () if group[0]["ood_row_trained"] else NEED_OOD_ROW
        # One that failed in a seed is left out: its mean would be over other runs than the line says.
        for score in (score for score in group[0]["mean"] if score not in unread):
            if all(score in run["mean"] for run in group):
                figures = {name: _figures(group, name, score) for name in sets}
                lines.append(_line(label, str(len(group)), score, accuracy, figures))
        if label in table.published:
            lines.append(_line(label, "", "paper", table.accuracy.get(label), table.published[label]))
    kind = f"protocol {runs[0]['protocol']}, {runs[0]['input_size']} px; " if runs else ""
    return (
        f"Table {table.number} ({kind}F: share of OOD images accepted where 95% of the ID images are, "
        "A: AUROC; percent)\n\n" + "\n".join(lines) + "\n"
    )


def _figures(group: Sequence[Mapping[str, Any]], ood: str, score: str) -> Figures:
    rows = [row for run in group for row in run["results"] if row["ood"] == ood and row["score"] == score]
    fpr, auroc = (100 * statistics.fmean(row[key] for row in rows) for key in ("fpr_at_id_tpr95", "auroc"))
    return fpr, auroc


def _line(label: str, seeds: str, score: str, accuracy: float | None, figures: Mapping[str, Figures]) -> str:
    means = [statistics.fmean(column) for column in zip(*figures.values(), strict=True)]
    cells = [label, seeds, score, "" if accuracy is None else f"{accuracy:.2f}"]
    cells += [f"{fpr:.2f} / {auroc:.2f}" for fpr, auroc in (*figures.values(), tuple(means))]
    return "| " + " | ".join(cells) + " |"
