"""`examples/notebook`, executed on the embedded data set, with a network that takes a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from places import ROOT

NOTEBOOK = ROOT / "examples" / "notebook" / "unknown.ipynb"
#: What the test puts in place of words of the notebook.
SMALL = {'"backbone": "efficientnet_lite0"': '"backbone": "test_efficientnet", "weights": "small.safetensors"'}


def test_it_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="install the extra 'dev'")
    pytest.importorskip("ipykernel", reason="install the extra 'dev'")
    pytest.importorskip("torch", reason="the notebook trains")
    import nbformat
    from manual_place import write_weights

    write_weights(tmp_path)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        for words, small in SMALL.items():
            cell.source = cell.source.replace(words, small)
    assert "test_efficientnet" in "".join(cell.source for cell in notebook.cells)
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ()))
    # A network that nobody trained says what it likes.
    assert "p_known above 0.05:" in printed and "of 20 are known as noise" in printed
