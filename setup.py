"""The packages and the compiled kernel. Everything else is in pyproject.toml.

Two folders of the repository are subpackages: `export/` is `ssod_edge.export` and `bench/` is
`ssod_edge.bench`. Nothing but `ssod_edge` becomes a top-level name.

The kernel needs PyTorch where it is built, so it is left out of an isolated build. SSOD_EDGE_EXT chooses:
none   never import torch, build nothing (for a device)
auto   build what can be built here, else say why not (the default)
cpu    build it for the CPU, or fail
cuda   build it for the CPU and CUDA, or fail; SSOD_EDGE_CUDA_ARCHS names the architectures, such as "87 90a"
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from typing import Any

from setuptools import find_packages, setup

FOLDERS = {"ssod_edge.export": "export", "ssod_edge.bench": "bench"}

#: PyTorch's stable ABI of 2.10: what is built with any later release runs with 2.10 and all after it.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"

#: The architectures of a release: Ampere, Orin, Ada, Hopper, Blackwell.
RELEASE_ARCHS = "80 86 87 89 90a 100 120"


def kernel() -> dict[str, Any]:
    """setup()'s arguments for the compiled kernel, none of them where it is not built."""
    wanted = os.environ.get("SSOD_EDGE_EXT", "auto")
    if wanted not in ("none", "auto", "cpu", "cuda"):
        raise SystemExit(f"error: SSOD_EDGE_EXT must be none, auto, cpu or cuda, got '{wanted}'")
    if wanted == "none":
        return {}
    find_toolkit()
    reason = missing_for_cpu() or (missing_for_cuda() if wanted == "cuda" else "")
    if reason and wanted == "auto":
        print(f"note: the kernel is not built: {reason}", file=sys.stderr)
        return {}
    if reason:
        raise SystemExit(f"error: SSOD_EDGE_EXT={wanted}: {reason}")
    from torch.utils import cpp_extension

    cuda = wanted == "cuda" or (wanted == "auto" and has_gpu() and not missing_for_cuda())
    # As a system's, PyTorch's headers warn of nothing: those of 2.14 would, and a strict build must not fail for them.
    headers = [word for path in cpp_extension.include_paths("cpu") for word in ("-isystem", path)]
    flags = ["-std=c++20", "-O3", TORCH_TARGET, *headers]
    warnings = ["-Wall", "-Wextra"] if wanted == "auto" else ["-Wall", "-Wextra", "-Werror"]
    options: dict[str, Any] = {"cxx": [*flags, *warnings, "-fopenmp-simd"]}
    if cuda:
        options["nvcc"] = [*flags, "-DUSE_CUDA", *nvcc_flags(strict=wanted != "auto")]
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    extension = make(
        "ssod_edge._kernels",
        ["kernels/patch_sample.cpp", *(["kernels/patch_sample.cu"] if cuda else [])],
        py_limited_api=True,
        extra_link_args=["-s"],
        extra_compile_args=options,
        # A compiler of tomorrow may warn of something new: who asked for the kernel hears of it, the others go without.
        optional=wanted == "auto",
    )

    class Build(cpp_extension.BuildExtension):  # type: ignore[misc]
        def build_extensions(self) -> None:
            """patch_sample.cpp and patch_sample.cu would both become patch_sample.o."""
            shared = self.compiler.object_filenames

            def own(sources: list[str], *args: Any, **options: Any) -> list[str]:
                objects = shared(sources, *args, **options)
                return [o[:-2] + os.path.splitext(s)[1] + ".o" for s, o in zip(sources, objects, strict=True)]

            self.compiler.object_filenames = own
            super().build_extensions()

    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=False, no_python_abi_suffix=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def missing_for_cpu() -> str:
    """What the kernel cannot be built without; empty if it is all here."""
    try:
        import torch
    except ImportError:
        return "torch is not here; install it, then use pip's --no-build-isolation"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return f"it needs torch 2.10 or newer, this is {torch.__version__}"
    compiler = os.environ.get("CXX", "c++").split()[0]
    return "" if shutil.which(compiler) else f"the C++ compiler '{compiler}' is not here (on Debian: apt install g++)"


def find_toolkit() -> None:
    """Name the CUDA toolkit in CUDA_HOME. An nvcc on the PATH may be a launcher outside of it."""
    if "CUDA_HOME" not in os.environ and "CUDA_PATH" not in os.environ and shutil.which("nvcc"):
        done = subprocess.run(
            ["nvcc", "--dryrun", "-x", "cu", os.devnull], stderr=subprocess.PIPE, text=True, check=False
        )
        found = re.search(r"_HERE_=(.+)/bin$", done.stderr, re.MULTILINE)
        if found:
            os.environ["CUDA_HOME"] = found[1]


def missing_for_cuda() -> str:
    """What the CUDA code cannot be built without; empty if it is all here. A GPU is not needed."""
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or not os.path.exists(os.path.join(CUDA_HOME, "bin", "nvcc")):
        return f"there is no CUDA toolkit in {CUDA_HOME}; name its folder in CUDA_HOME"
    if not os.path.isdir(cutlass()):
        return "CUTLASS's headers are not here; pip install nvidia-cutlass, or name their folder in CUTLASS_INCLUDE"
    return ""


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def cutlass() -> str:
    """Folder of CUTLASS's headers; the wheel nvidia-cutlass has them."""
    found = importlib.util.find_spec("cutlass_library")
    inside = os.path.join(os.path.dirname(found.origin), "source", "include") if found and found.origin else ""
    return os.environ.get("CUTLASS_INCLUDE", inside)


def nvcc_flags(strict: bool) -> list[str]:
    """Architectures, CUTLASS, and the resource report; `strict` fails on a warning and on a register spill."""
    archs = os.environ.get("SSOD_EDGE_CUDA_ARCHS", "")
    if not archs and has_gpu():
        import torch

        major, minor = torch.cuda.get_device_capability()
        archs = f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (archs or RELEASE_ARCHS).split()]
    flags += ["-isystem", cutlass(), "--expt-relaxed-constexpr", "-Xptxas=-v,-warn-spills"]
    return [*flags, "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"] if strict else flags


packages = find_packages(include=["ssod_edge", "ssod_edge.*"])
for name, folder in FOLDERS.items():
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]

setup(packages=packages, package_dir=FOLDERS, **kernel())
