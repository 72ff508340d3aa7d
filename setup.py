"""The packages and the compiled kernel. Everything else is in pyproject.toml.

Two folders of the repository are subpackages: `export/` is `ssod_edge.export` and `bench/` is
`ssod_edge.bench`. Nothing but `ssod_edge` becomes a top-level name.

The kernel needs PyTorch where it is built, so it is left out of an isolated build. SSOD_EDGE_EXT chooses:
none   never import torch, build nothing (for a device)
auto   build what can be built here, else say why not (the default)
cpu    build it for the CPU, or fail
cuda   build it for the CPU and CUDA, or fail; SSOD_EDGE_CUDA_ARCHS names the architectures, such as "87 90a"
"""

import os
import shutil
import sys
from typing import Any

from setuptools import find_packages, setup

FOLDERS = {"ssod_edge.export": "export", "ssod_edge.bench": "bench"}

#: PyTorch's stable ABI of 2.10: what is built with any later release runs with 2.10 and all after it.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def kernel() -> dict[str, Any]:
    """setup()'s arguments for the compiled kernel, none of them where it is not built."""
    wanted = os.environ.get("SSOD_EDGE_EXT", "auto")
    if wanted not in ("none", "auto", "cpu", "cuda"):
        raise SystemExit(f"error: SSOD_EDGE_EXT must be none, auto, cpu or cuda, got '{wanted}'")
    if wanted == "none":
        return {}
    reason = missing()
    if reason and wanted == "auto":
        print(f"note: the kernel is not built: {reason}", file=sys.stderr)
        return {}
    if reason:
        raise SystemExit(f"error: SSOD_EDGE_EXT={wanted}: {reason}")
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    flags = ["-std=c++20", "-O3", "-fopenmp-simd", "-Wall", "-Wextra", TORCH_TARGET]
    extension = CppExtension(
        "ssod_edge._kernels",
        ["kernels/patch_sample.cpp"],
        py_limited_api=True,
        # A compiler of tomorrow may warn of something new: who asked for the kernel hears of it, the others go without.
        extra_link_args=["-s"],
        extra_compile_args=flags if wanted == "auto" else [*flags, "-Werror"],
        optional=wanted == "auto",
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False, no_python_abi_suffix=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def missing() -> str:
    """What the CPU's kernel cannot be built without; empty if it is all here."""
    try:
        import torch
    except ImportError:
        return "torch is not here; install it, then use pip's --no-build-isolation"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return f"it needs torch 2.10 or newer, this is {torch.__version__}"
    compiler = os.environ.get("CXX", "c++").split()[0]
    return "" if shutil.which(compiler) else f"the C++ compiler '{compiler}' is not here (on Debian: apt install g++)"


packages = find_packages(include=["ssod_edge", "ssod_edge.*"])
for name, folder in FOLDERS.items():
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]

setup(packages=packages, package_dir=FOLDERS, **kernel())
