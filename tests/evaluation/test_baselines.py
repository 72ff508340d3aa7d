"""pytorch-ood's detectors beside the built-in scores: formulas, signs, what they are fitted on, cost and failures."""

from __future__ import annotations

import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from ssod_edge.cli import main
from ssod_edge.config import SCORES
from ssod_edge.data.sources import open_dataset
from ssod_edge.data.splits import read_splits
from ssod_edge.detect.metrics import conformal_threshold, detection_metrics
from ssod_edge.errors import MissingExtraError, UsageError
from ssod_edge.evaluation import baselines as module
from ssod_edge.evaluation import report as evaluation_report
from ssod_edge.evaluation.baseline_recipes import BASELINES, FEATURES, IMAGES, LOGITS, MAPS, UNSUITED, parse_names
from ssod_edge.evaluation.baselines import COST_KEYS, Baselines, state_bytes
from ssod_edge.evaluation.evaluate import EvalOptions, collect, evaluate
from ssod_edge.evaluation.images import choose_images
from ssod_edge.terminal import Screen
from ssod_edge.training.checkpoint import load_checkpoint
from ssod_edge.training.run import Run

pytest.importorskip("pytorch_ood", reason="needs pytorch-ood (extra baselines)")

CLASSES, WIDTH = 10, 40  # as many as DICE's tenth of the weights needs
PER_CLASS = WIDTH // CLASSES


class Grid(nn.Module):
    """A timm-like network without weights: its map is the image in 4 x 4 cells, its features their means."""

    def forward_features(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 4)

    def forward_head(self, maps, pre_logits=True):
        return maps.mean(dim=(2, 3))


class Tiny(nn.Module):
    """The parts of an SSODClassifier that detectors see; each class has `PER_CLASS` features of its own."""

    def __init__(self, bias=True):
        super().__init__()
        self.backbone = Grid()
        self.classifier = nn.Linear(WIDTH, CLASSES, bias=bias)
        self.preprocess = SimpleNamespace(std=(0.2,) * WIDTH)
        self.stages = ()
        with torch.no_grad():
            self.classifier.weight.copy_(torch.eye(CLASSES).repeat_interleave(PER_CLASS, dim=1))
            self.classifier.weight.add_(torch.linspace(-0.1, 0.1, WIDTH * CLASSES).view(CLASSES, WIDTH))
            if bias:
                self.classifier.bias.copy_(torch.linspace(-0.3, 0.2, CLASSES))

    def features(self, x):
        return self.backbone.forward_head(self.backbone.forward_features(x))

    def head(self, z):
        return self.classifier(z), z[:, 0]

    def forward(self, x):
        return self.head(self.features(x))


def draw(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of ID images, [n, WIDTH] and not negative, and their labels: those of the own class are large."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    means = np.eye(CLASSES).repeat(PER_CLASS, axis=1)[labels]
    return np.maximum(2 * means + 0.15 * rng.normal(size=(n, WIDTH)), 0).astype(np.float32), labels


def draw_ood(n: int, seed: int, scale: float = 0.1) -> np.ndarray:
    """Features that are small everywhere and agree with no class."""
    return np.abs(scale * np.random.default_rng(seed).normal(size=(n, WIDTH))).astype(np.float32)


def logits_of(model: Tiny, z: np.ndarray) -> np.ndarray:
    return model.classifier(torch.from_numpy(z)).detach().numpy()


def run(name: str, z: np.ndarray, fit: tuple[np.ndarray, np.ndarray], batch_size: int = 7) -> np.ndarray:
    model = Tiny().eval()
    peers = Baselines([name], model, batch_size)
    peers.fit(fit[0], logits_of(model, fit[0]), fit[1])
    found = peers.scores(z, logits_of(model, z))
    assert peers.all[0].error is None, peers.all[0].error
    return found[name]


def logsumexp(x: np.ndarray) -> np.ndarray:
    return np.log(np.exp(x - x.max(1, keepdims=True)).sum(1)) + x.max(1)


def knn(z, fit, labels, weight, bias):
    unit, bank = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (z, fit))
    return np.sort(np.linalg.norm(unit[:, None] - bank[None], axis=2), axis=1)[:, 49]


def vim(z, fit, labels, weight, bias):
    origin = -np.linalg.pinv(weight) @ bias
    _, _, directions = np.linalg.svd(fit - origin, full_matrices=False)
    rest = directions[WIDTH // 2 :]  # beyond the principal subspace

    def residual(x):
        return np.linalg.norm((x - origin) @ rest.T, axis=1)

    alpha = (fit @ weight.T + bias).max(1).mean() / residual(fit).mean()
    return alpha * residual(z) - logsumexp(z @ weight.T + bias)


def mahalanobis(z, fit, labels, weight, bias):
    means = np.stack([fit[labels == c].mean(0) for c in range(CLASSES)])
    covariance = (fit - means[labels]).T @ (fit - means[labels]) / len(fit)
    gap = z[:, None] - means[None]
    squared = np.einsum("ncd,de,nce->nc", gap, np.linalg.inv(covariance), gap)
    return squared.min(1) / (2 * len(fit))  # the library sums the scatter and halves the square


def rmd(z, fit, labels, weight, bias):
    gap = fit - fit.mean(0)
    background = np.einsum("nd,de,ne->n", z - fit.mean(0), np.linalg.inv(gap.T @ gap), z - fit.mean(0))
    return 2 * mahalanobis(z, fit, labels, weight, bias) - background


def msp(z, fit, labels, weight, bias):
    logits = z @ weight.T + bias
    return -np.exp(logits.max(1) - logsumexp(logits))


def energy(z, fit, labels, weight, bias):
    return -logsumexp(z @ weight.T + bias)


def react(z, fit, labels, weight, bias):
    return energy(np.minimum(z, np.quantile(fit, 0.9)), fit, labels, weight, bias)


def grad_norm(z, fit, labels, weight, bias):
    """||dL/dW||_1 of the outer product of (softmax - uniform) and z."""
    logits = z @ weight.T + bias
    probabilities = np.exp(logits - logsumexp(logits)[:, None])
    return -np.abs(probabilities - 1 / CLASSES).sum(1) * np.abs(z).sum(1)


FORMULAS = {
    "KNN": knn,
    "ViM": vim,
    "Mahalanobis": mahalanobis,
    "RMD": rmd,
    "MaxSoftmax": msp,
    "EnergyBased": energy,
    "ReAct": react,
    "GradNorm": grad_norm,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_detector_is_its_formula_fitted_on_the_images_it_was_given(name):
    fit, labels = draw(160, seed=1)
    z = np.concatenate([draw(20, seed=2)[0], draw_ood(9, seed=3)])
    model = Tiny()
    weight, bias = (p.detach().numpy().astype(np.float64) for p in (model.classifier.weight, model.classifier.bias))
    expected = FORMULAS[name](z.astype(np.float64), fit.astype(np.float64), labels, weight, bias)
    np.testing.assert_allclose(run(name, z, (fit, labels)), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, recipe in BASELINES.items() if recipe.reads != IMAGES])
def test_larger_is_more_out_of_distribution_for_every_detector(name):
    # LTS multiplies what is spread out, and to NACUE no activation at all is nothing new: each has its blind spot
    scale = {"LTS": 0.02, "NACUE": 0.5}.get(name, 0.1)
    z = np.concatenate([draw(80, seed=5)[0], draw_ood(80, seed=6, scale=scale)])
    found = run(name, z, draw(800, seed=4), batch_size=64)
    assert found.shape == (160,) and found.dtype == np.float64
    assert detection_metrics(found[:80], found[80:], bootstrap=0)["auroc"] > 0.8


def images_of(z: np.ndarray) -> torch.Tensor:
    """[N, WIDTH, 8, 8]: images whose features are z, a quarter of them brighter so that their maps have rank 2."""
    images = torch.from_numpy(z)[:, :, None, None].repeat(1, 1, 8, 8)
    change = torch.linspace(-1, 1, WIDTH)[None, :, None, None] * images.mean()
    images[:, :, :4] += change
    images[:, :, 4:] -= change
    return images


@pytest.mark.parametrize("name", ["ODIN", "MahalanobisODIN"])
def test_detectors_that_need_gradients_see_the_images_once_and_have_the_right_sign(name):
    model = Tiny().eval()
    peers = Baselines([name], model, 64)
    fit, labels = draw(400, seed=4)
    peers.fit(fit, logits_of(model, fit), labels)
    z = np.concatenate([draw(40, seed=5)[0], draw_ood(40, seed=6)])
    with torch.no_grad():  # as `collect` calls it
        for batch in images_of(z).split(32):
            peers.watch(batch)
    found = peers.scores(z, logits_of(model, z))[name]
    assert detection_metrics(found[:40], found[40:], bootstrap=0)["auroc"] > 0.9
    assert all(parameter.grad is None for parameter in model.parameters())
    plain = {"ODIN": "MaxSoftmax", "MahalanobisODIN": "Mahalanobis"}[name]
    temperature = 1000 if name == "ODIN" else 1
    if name == "ODIN":
        expected = -torch.from_numpy(logits_of(model, z) / temperature).softmax(1).max(1).values.numpy()
    else:
        expected = run(plain, z, (fit, labels))
    assert np.corrcoef(found, expected)[0, 1] > 0.99
    assert not np.array_equal(found, expected), "the step in the input has moved nothing"


def test_rank_feat_takes_the_first_singular_vector_out_of_the_map():
    model = Tiny().eval()
    peers = Baselines(["RankFeat"], model, 8)
    z = draw(12, seed=1)[0]
    images = images_of(z).contiguous(memory_format=torch.channels_last)
    for batch in images.split(5):
        peers.watch(batch)
    found = peers.scores(z, logits_of(model, z))["RankFeat"]
    maps = model.backbone.forward_features(images).numpy().reshape(12, WIDTH, 16)
    u, s, v = np.linalg.svd(maps, full_matrices=False)
    rest = (maps - s[:, :1, None] * u[:, :, :1] @ v[:, :1]).mean(2)
    np.testing.assert_allclose(found, -logsumexp(logits_of(model, rest.astype(np.float32))), rtol=1e-3, atol=1e-3)


def test_rank_feat_needs_a_map(monkeypatch):
    model = Tiny().eval()
    monkeypatch.setattr(model.backbone, "forward_features", lambda x: x.flatten(2).mT)
    peers = Baselines(["RankFeat"], model, 8)
    peers.watch(torch.rand(2, WIDTH, 4, 4))
    assert peers.all[0].error == "it needs a feature map [N, C, H, W], and this backbone has none"


def test_a_detector_that_cannot_work_says_why_and_leaves_the_others_alone():
    model = Tiny().eval()
    peers = Baselines(["MaxLogit", "KNN", "SHE", "MCM"], model, 8)
    fit, labels = draw(20, seed=1)
    peers.fit(fit, logits_of(model, fit), (labels + 1) % CLASSES)  # no class is ever right
    found = peers.scores(fit, logits_of(model, fit))
    assert list(found) == ["MaxLogit"] and peers.failed == {"KNN", "SHE", "MCM"}
    costs = peers.describe()
    assert "k=50" in costs["KNN"]["error"] and "No correct predictions" in costs["SHE"]["error"]
    assert costs["MCM"] == dict.fromkeys(COST_KEYS) | {"error": UNSUITED["MCM"]}
    assert costs["MaxLogit"]["error"] is None and tuple(costs["MaxLogit"]) == COST_KEYS
    json.dumps(costs, allow_nan=False)


def test_scores_that_are_not_finite_or_not_one_an_image_are_a_failure():
    model = Tiny().eval()
    peers = Baselines(["MaxLogit", "LTS", "Entropy"], model, 8)
    z = draw(20, seed=1)[0]
    z[3] = 0  # no activation: LTS divides by their sum
    peers.all[2].detector = SimpleNamespace(predict_logits=lambda x: x.new_zeros(3))
    assert list(peers.scores(z, logits_of(model, z))) == ["MaxLogit"]
    assert [b.error for b in peers.all] == [
        None, "1 of 20 scores are NaN or infinite", "it gave scores of shape [9] for 20 images"
    ]  # fmt: skip


def test_a_detector_whose_working_memory_would_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(module, "_LARGEST_BYTES", 1000.0)
    assert Baselines(["GMM", "KNN"], Tiny().eval()).all[0].error.startswith("it would need 0 GB for 10 classes")


def test_the_cost_of_a_detector():
    model = Tiny().eval()
    peers = Baselines(["EnergyBased", "KNN", "ViM", "DICE", "ODIN"], model, 8)
    fit, labels = draw(200, seed=1)
    peers.fit(fit, logits_of(model, fit), labels)
    peers.watch(images_of(fit))
    peers.scores(fit, logits_of(model, fit))
    costs = peers.describe()
    assert costs["EnergyBased"]["state_mb"] == costs["ODIN"]["state_mb"] == 0
    assert costs["KNN"]["state_mb"] * 1e6 == 200 * WIDTH * 4
    assert costs["ViM"]["state_mb"] * 1e6 == 4 * (WIDTH * WIDTH // 2 + WIDTH), "subspace and origin, not the classifier"
    assert costs["DICE"]["state_mb"] * 1e6 == 4 * (WIDTH * CLASSES + WIDTH), "the masked weights and the mean"
    assert [costs[name]["stored_images"] for name in costs] == [0, 200, 0, 0, 0]
    assert [costs[name]["fit_images"] for name in costs] == [0, 200, 200, 200, 0]
    assert [(c["forward_passes"], c["backward_passes"]) for c in costs.values()] == [(0, 0)] * 4 + [(2, 1)]
    assert all(0 < cost["ms_per_image"] < 1000 for cost in costs.values())
    assert costs["KNN"]["settings"] == {"k": 50} and costs["KNN"]["reads"] == FEATURES


def test_arrays_are_counted_once_wherever_they_lie():
    array, tensor = np.zeros(100), torch.zeros(50)
    holder = SimpleNamespace(
        a=array, b=[array[:5], {"x": tensor}], c=nn.Linear(3, 1), d=(tensor.view(5, 10),), e="text"
    )
    holder.loop = holder
    assert state_bytes(holder, set()) == 800 + 200 + 16
    assert state_bytes(holder, {tensor.untyped_storage().data_ptr()}) == 800 + 16


def test_a_classifier_without_a_bias_is_run_too():
    model = Tiny(bias=False).eval()
    peers = Baselines(["ViM", "fDBD"], model, 8)
    fit, labels = draw(100, seed=1)
    peers.fit(fit, logits_of(model, fit), labels)
    assert set(peers.scores(fit, logits_of(model, fit))) == {"ViM", "fDBD"}


def test_every_detector_of_the_library_is_run_or_refused_with_a_reason():
    from pytorch_ood import detector

    classes = {name for name in detector.__all__ if isinstance(getattr(detector, name), type)}
    assert set(BASELINES) | set(UNSUITED) == classes
    assert not set(BASELINES) & set(UNSUITED) and not set(BASELINES) & set(SCORES)
    assert {recipe.reads for recipe in BASELINES.values()} == {LOGITS, FEATURES, MAPS, IMAGES}


def test_names_of_baselines():
    assert parse_names(" ALL") == (*BASELINES, *UNSUITED)
    assert parse_names("vim, knn,KNN") == ("KNN", "ViM")
    for wrong in ("", "knn,", "msp"):
        with pytest.raises(UsageError, match=r"there is no baseline '(msp)?'. Give all, or some of: MaxSoftmax, "):
            parse_names(wrong)


def test_fit_images_are_spread_over_the_classes_and_come_from_the_split_alone():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 4)
    split = np.arange(0, 84, 2)
    chosen = choose_images(labels, split, 20)
    assert set(chosen) <= set(split) and len(set(chosen)) == 20 and (np.diff(chosen) > 0).all()
    assert np.bincount(labels[chosen]).tolist() == [9, 9, 2]
    assert chosen.tolist() == choose_images(labels, split, 20).tolist() != choose_images(labels, split, 20, 1).tolist()
    assert choose_images(labels, split, None) is choose_images(labels, split, 42) is split
    with pytest.raises(UsageError, match="--fit-images 2 is fewer than one image for each of the 3 classes"):
        choose_images(labels, split, 2)


@pytest.fixture(scope="module")
def report_of(small_run):
    """An evaluation of the small run with detectors of every kind, what they were fitted on, and the raw scores."""
    seen: dict[str, np.ndarray] = {}
    before = Baselines.fit

    def fit(self, features, logits, labels):
        seen.update(features=features, labels=labels)
        before(self, features, logits, labels)

    passes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Baselines, "fit", fit)
        from ssod_edge.training.model import SSODClassifier

        features = SSODClassifier.features
        patch.setattr(SSODClassifier, "features", lambda self, x: passes.append(len(x)) or features(self, x))
        report, read = evaluate(
            small_run,
            EvalOptions(
                str(small_run.parent / "data"),
                {"one": str(small_run.parent / "data" / "a"), "two": str(small_run.parent / "data" / "b")},
                bootstrap=5,
                baselines="Mahalanobis,ViM,EnergyBased,ReAct,KNN,GradNorm",
                fit_images=28,
                shift_images=0,
            ),
            workers=0,
        )
    return report, read.scores, seen, passes


def test_baselines_are_fitted_on_the_training_split_alone(report_of, small_run):
    _, _, seen, _ = report_of
    model, meta = (opened := Run.at(small_run)).model, opened.meta
    source = open_dataset(str(small_run.parent / "data"))
    train = read_splits(small_run, source, meta["splits_hash"]).train
    chosen = choose_images(source.labels, train, 28)
    assert set(chosen) <= set(range(1, 84, 2)), "the odd ones are the training split of this run"
    expected = collect(model, source, chosen, workers=0)
    np.testing.assert_array_equal(seen["labels"], source.labels[chosen])
    np.testing.assert_allclose(seen["features"], expected.features, rtol=1e-4, atol=1e-4)


def test_the_report_has_rows_and_costs_for_baselines(report_of):
    report, raw, _, passes = report_of
    names = ["EnergyBased", "ViM", "Mahalanobis", "GradNorm", "ReAct"]
    assert [row["score"] for row in report["results"]] == [*SCORES, *names] * 2
    assert list(report["mean"]) == [*SCORES, *names]
    for key in ("auroc", "fpr_at_id_tpr95", "fpr_at_ood_tpr95"):
        rows = [row[key] for row in report["results"] if row["score"] == "ViM"]
        assert report["mean"]["ViM"][key] == pytest.approx(np.mean(rows))
    assert report["baselines"]["KNN"]["error"] == "k=50 exceeds the number of ID samples (28)"
    assert all("KNN" not in scores for scores in raw.values())
    energies = {row["score"]: row["auroc"] for row in report["results"] if row["ood"] == "one"}
    assert energies["EnergyBased"] == pytest.approx(energies["energy"], abs=1e-3)
    assert report["baselines"]["ViM"]["fit_images"] == 28 and report["baselines_setup"]["network_ms_per_image"] > 0
    # 28 to fit on, 42 to calibrate with, 84 known ones and twice 12 unknown: each went through the network once
    assert sum(passes) == 28 + 42 + 84 + 24
    json.dumps(report, allow_nan=False)


def test_deployment_figures_stand_at_the_calibration_splits_threshold(report_of, small_run):
    report, raw, _, _ = report_of
    model, meta = (opened := Run.at(small_run)).model, opened.meta
    source = open_dataset(str(small_run.parent / "data"))
    calib = collect(model, source, read_splits(small_run, source, meta["splits_hash"]).calib, workers=0)
    known = collect(model, source, workers=0)
    energy = -logsumexp(calib.logits)
    threshold = conformal_threshold(energy).value
    found = report["deployment"]["energy"]
    assert found["threshold"]["value"] == pytest.approx(threshold, abs=1e-4) and found["threshold"]["n"] == 42
    accepted, mistaken = (raw[name]["energy"] <= found["threshold"]["value"] for name in ("id", "one"))
    assert found["id_tpr"] == accepted.mean() and found["false_reject"] == 1 - accepted.mean()
    assert found["selective_accuracy"] == known.correct[accepted].mean()
    assert found["ood"]["one"]["false_accept"] == mistaken.mean()
    assert set(found["rejected_by_class"]) == set(model.classes)
    assert set(report["deployment"]) == set(report["mean"])


def test_the_tables_fit_on_a_terminal_and_name_what_failed(report_of, capsys, monkeypatch):
    report = report_of[0]
    monkeypatch.setattr(evaluation_report, "Screen", lambda **settings: Screen(width=80, **settings))
    evaluation_report.print_details(report)
    shown = capsys.readouterr().out
    rows = [re.split(r"  +", line.strip()) for line in shown.splitlines() if re.search(r"\)\s*$", line)]
    rows = [row for row in rows if len(row) == 4][-len(report["mean"]) :]
    assert {"energy *", "ViM +", "msp"} <= {row[0] for row in rows}
    means = [float(row[-1].split()[0]) for row in rows]
    assert means == sorted(means, reverse=True), "the best score comes first"
    assert "KNN failed: k=50 exceeds" in shown and "rejects most of the classes " in shown and "…" not in shown


def eval_arguments(run, *more):
    data = run.parent / "data"
    return ["eval", str(run), "--id", str(data), "--ood", f"one={data / 'a'}", "--bootstrap", "0", *more]


def test_the_command_without_pytorch_ood_names_the_extra(small_run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pytorch_ood", None)
    monkeypatch.setattr("ssod_edge.evaluation.evaluate.collect", lambda *_, **__: pytest.fail("an image was read"))
    result = CliRunner().invoke(main, eval_arguments(small_run, "--baselines", "all", "--json", str(tmp_path / "x")))
    assert result.exit_code == MissingExtraError.exit_code == 3
    assert "pip install 'ssod-edge[baselines]'" in result.stderr and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--baselines", "knn,nonsense"], "there is no baseline 'nonsense'"),
        (["--fit-images", "20"], "name them with --baselines"),
        (["--baselines", "vim", "--fit-images", "3"], "fewer than one image for each of the 7 classes"),
    ],
)
def test_wrong_options_are_found_before_an_image_is_read(small_run, monkeypatch, more, reason):
    monkeypatch.setattr("ssod_edge.evaluation.evaluate.collect", lambda *_, **__: pytest.fail("an image was read"))
    result = CliRunner().invoke(main, eval_arguments(small_run, *more))
    assert result.exit_code == 2 and reason in result.stderr


def test_without_the_training_data_only_what_is_not_fitted_runs(small_run, tmp_path, capsys):
    shutil.copytree(small_run, tmp_path / "run")
    (tmp_path / "run" / "splits.json").unlink()
    data = str(small_run.parent / "data")
    with pytest.raises(UsageError, match=r"no readable splits\.json.*leave out the baselines.* it: KNN, ViM$"):
        evaluate(tmp_path / "run", EvalOptions(data, {}, baselines="KNN,ViM,ASH"))
    report, _ = evaluate(
        tmp_path / "run", EvalOptions(data, {"one": data + "/a"}, bootstrap=0, baselines="ASH"), workers=0
    )
    assert report["deployment"] is None and "ASH" in report["mean"]
    assert "no figures at a threshold: " in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run" / "best.safetensors")[1]["epoch"] == 3
