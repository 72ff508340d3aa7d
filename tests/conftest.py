"""Fixtures that several test files use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ssod_edge.spec import Spec

if TYPE_CHECKING:
    import onnx

    from ssod_edge.training.model import SSODClassifier


@pytest.fixture(scope="session")
def export_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: `export` and `make_export` copy it."""
    # Here, so that tests of the base install collect without onnx and openvino.
    from colour import write_export

    folder = tmp_path_factory.mktemp("template")
    write_export(folder)
    return folder


@pytest.fixture
def make_export(export_template: Path) -> Callable[..., Path]:
    """make_export(folder, trained=True, verified=True): a copy of the colour classifier's export."""
    from colour import edit_spec

    def make(folder: Path, trained: bool = True, verified: bool = True) -> Path:
        shutil.copytree(export_template, folder, dirs_exist_ok=True)

        def edit(spec: Spec) -> Spec:
            artifacts = (
                replace(
                    a, threshold=a.threshold if trained else None, verification=a.verification if verified else None
                )
                for a in spec.artifacts
            )
            return replace(spec, trained=trained, artifacts=tuple(artifacts))

        edit_spec(folder, edit)
        return folder

    return make


@pytest.fixture
def export(make_export: Callable[..., Path], tmp_path: Path) -> Path:
    """An export folder of trained weights whose artifacts are verified."""
    return make_export(tmp_path / "export")


@pytest.fixture(scope="session")
def small_model() -> SSODClassifier:
    """A small EfficientNet of random weights for 64 px and 7 classes."""
    from small import make_model

    return make_model("test_efficientnet")


@pytest.fixture(scope="session")
def small_graph(small_model: SSODClassifier) -> onnx.ModelProto:
    """Its fused ONNX graph. Tracing it takes seconds; do not change it."""
    from ssod_edge.export.graph.onnx import fused_graph

    return fused_graph(small_model, "energy", trained=True)


@pytest.fixture(scope="session")
def small_run(small_model: SSODClassifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of it, with 84 images in class folders beside it. Nobody changes it."""
    from small import write_images, write_run

    root = tmp_path_factory.mktemp("runs")
    write_images(root / "data")
    write_run(root / "small", small_model, str(root / "data"))
    return root / "small"
