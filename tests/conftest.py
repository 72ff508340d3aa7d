"""Fixtures that several test files use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ssod_edge.spec import Spec


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
