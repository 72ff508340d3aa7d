"""What `import ssod_edge` offers, and what it costs."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import ssod_edge
from ssod_edge import errors

NAMES = {"Collector", "Monitor", "Verdict", "__version__", "evaluate", "export", "open", "train"}
ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}


def test_a_star_import_gives_the_face_and_no_torch() -> None:
    code = "from ssod_edge import *\nimport sys\nprint('torch' in sys.modules, *sorted(set(dir()) - {'sys'}))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert shown[0] == "False" and {name for name in shown[1:] if name[:1] != "_"} == (NAMES | ERRORS) - {"__version__"}
    assert set(ssod_edge.__all__) == NAMES | ERRORS and len(ssod_edge.__all__) == len(NAMES | ERRORS)


def test_every_name_is_documented_and_is_what_it_says() -> None:
    from ssod_edge.runtime.field.monitor import Monitor
    from ssod_edge.runtime.predict import Verdict

    assert ssod_edge.Verdict is Verdict and ssod_edge.Monitor is Monitor
    assert ssod_edge.UsageError is errors.UsageError
    for name in set(ssod_edge.__all__) - {"__version__"}:
        assert getattr(ssod_edge, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'Prediction'"):
        ssod_edge.Prediction  # noqa: B018


def test_the_import_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import time; t = time.perf_counter(); import ssod_edge; print(1000 * (time.perf_counter() - t))"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(7)
    ]
    with capsys.disabled():
        print(f"\nimport ssod_edge: median {statistics.median(times):.1f} ms, min {min(times):.1f} ms")
    assert statistics.median(times) < 50


def test_a_model_is_trained_judged_exported_and_asked_from_python(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from pictures import write_folder

    data = write_folder(tmp_path / "photos", per_class=48)
    run = ssod_edge.train(
        str(data), "test_efficientnet", tmp_path / "runs", name="mine", size=32, epochs=1, batch_size=8, workers=0,
        val_fraction=0.2, calib_fraction=0.4, warmup_epochs=0.0, weights="none",
    )  # fmt: skip
    assert run == tmp_path / "runs" / "mine"
    report = ssod_edge.evaluate(run, ood_data={"other": str(data)}, bootstrap=0)
    assert 0 <= report["id_accuracy"] <= 1 and report["results"][0]["ood"] == "other"
    spec = ssod_edge.export(run, precisions=["fp32"], engines=["onnxruntime"], score="energy")
    assert [artifact.name for artifact in spec.artifacts] == ["onnx-fp32"]
    with ssod_edge.open(run) as model:
        verdict = model.predict(next(data.rglob("*.png")))
    assert isinstance(verdict, ssod_edge.Verdict) and verdict.class_name in spec.classes
    with pytest.raises(ssod_edge.UsageError, match="unknown"):
        ssod_edge.train(str(data), "test_efficientnet", tmp_path / "runs", epoch=3)
