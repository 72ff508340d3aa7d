"""Compile and link the kernel's CUDA code, which needs nvcc and no GPU, and report what each kernel takes.

python scripts/cuda.py [ARCH ...]     such as 87 90a; without any, every architecture of a release

A warning or a register spill fails it. The library is left in build/cuda/ssod_edge/.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ssod_edge.bench.tools.gpu import resource_table, resources

ROOT = Path(__file__).resolve().parent.parent


def main(architectures: list[str]) -> int:
    environment = {**os.environ, "SSOD_EDGE_EXT": "cuda", "SSOD_EDGE_CUDA_ARCHS": " ".join(architectures)}
    build = [sys.executable, "setup.py", "build_ext", "--force", "-b", "build/cuda", "-t", "build/cuda/objects"]
    done = subprocess.run(
        build, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(resource_table(resources(done.stdout)))
    if done.returncode:
        print(done.stdout[-4000:], file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
