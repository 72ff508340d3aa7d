"""The kernel's CUDA code compiles, links and loads. That needs nvcc, and no GPU: nothing runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

pytest.importorskip("torch")
pytest.importorskip("cutlass_library", reason="CUTLASS's headers come with the extra 'dev'")
if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
    pytest.skip("there is no nvcc here", allow_module_level=True)


@pytest.mark.parametrize("archs", [["87"], pytest.param(["87", "90a"], marks=pytest.mark.slow)])
def test_orin_and_hopper_compile_without_a_warning_or_a_spill_and_the_library_loads(archs: list[str]) -> None:
    command = [sys.executable, "scripts/cuda.py", *archs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    rows = [line.split() for line in done.stdout.splitlines()]  # architecture, kernel, registers, "registers,", bytes
    kernels = [f"{name}<{t}>" for name in ("sample_portable", "sample_hopper") for t in ("Half", "BFloat16")]
    expected = {
        (arch, k) for arch in (f"sm_{arch}" for arch in archs) for k in (*kernels, "sample_portable<float>", "finish")
    }
    assert {(row[0], row[1]) for row in rows} == expected
    assert {row[4] for row in rows} == {"0"}
    assert all(int(row[2]) > 128 for row in rows if row[:2] == ["sm_90a", "sample_hopper<Half>"])  # not an empty body
    code = (
        "import torch; torch.ops.load_library('build/cuda/ssod_edge/_kernels.so'); "
        "print([torch._C._dispatch_has_kernel_for_dispatch_key('ssod_edge::sample', d) for d in ('CPU', 'CUDA')])"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.stdout == "[True, True]\n", shown.stderr


@pytest.mark.slow
def test_a_spill_fails_the_build(tmp_path: Path) -> None:
    files, folders = ("setup.py", "pyproject.toml", "README.md", "LICENSE"), ("ssod_edge", "kernels", "export", "bench")
    for name in (*files, *folders, "scripts"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "kernels" / "patch_sample.cu").write_text(
        "__global__ void __launch_bounds__(1024) spill(float* a) {\n  float v[200];\n#pragma unroll\n"
        "  for (int i = 0; i < 200; ++i) v[i] = a[i * 64 + threadIdx.x];\n"
        "  for (int j = 0; j < 64; ++j)\n#pragma unroll\n"
        "    for (int i = 0; i < 200; ++i) v[i] = v[i] * v[(i + 7) % 200] + a[j];\n#pragma unroll\n"
        "  for (int i = 0; i < 200; ++i) a[i * 64 + threadIdx.x] = v[i];\n}\n"
    )
    command = [sys.executable, "scripts/cuda.py", "87"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Registers are spilled" in done.stderr
