"""An export that can be taught, made once."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from lesson import run, train_run

from ssod_edge.spec import load_spec, save_spec


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `train --tune head` on five classes."""
    return train_run(tmp_path_factory.mktemp("teach"))


@pytest.fixture(scope="session")
def exported(trained: Path) -> Path:
    """Its export, on both engines in both precisions. Nobody changes it."""
    done = run("export", trained, "--score", "gen+mahalanobispp+residual")
    assert done.exit_code == 0, done.output
    assert "features.npz: " in done.output
    return trained / "export"


@pytest.fixture(scope="session")
def light(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one artifact, which is quicker. Nobody changes it."""
    folder = tmp_path_factory.mktemp("light") / "export"
    shutil.copytree(exported, folder)
    spec = load_spec(folder)
    spec = replace(spec, artifacts=(spec.artifact("onnx-fp32"),))
    save_spec(spec, folder)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if str(path.relative_to(folder)) not in (*spec.files, "ssod.json"):
            path.unlink()
    return folder
