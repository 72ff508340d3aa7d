"""Everything a GPU is needed for, in one command and under nine minutes.

python -m ssod_edge.bench.tools.gpu --out DIR

Builds the kernel, runs the GPU tests, the compute sanitizer on ragged small shapes, the kernel benchmark, and the
training comparison. Writes DIR/gpu.json and prints a table. What fails is recorded, and the others go on.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

from ssod_edge.bench.environment import describe_environment
from ssod_edge.files import write_json

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

#: P, D, M of the sanitizer's shapes: no multiple of a tile, and each path of the kernel.
RAGGED = ((1, 1, 1), (7, 3, 2), (49, 64, 10), (150, 136, 259), (130, 784, 300))


#: A kernel's name and the type of its features, in the compiler's spelling.
KERNEL = re.compile(r"\d(sample_portable|sample_hopper|finish)(?:I(f|N3c104HalfE|N3c108BFloat16E)E)?")
ELEMENTS = {"f": "float", "N3c104HalfE": "Half", "N3c108BFloat16E": "BFloat16"}


def run(command: list[str], seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """One step as a child process: its exit code (124: out of time), how long it took and the end of its output."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, timeout=max(1.0, seconds),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, output = 124, error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
    except OSError as error:
        code, output = 127, str(error)
    return {"exit_code": code, "seconds": round(time.monotonic() - started, 1), "output": output[-6000:]}


def resources(output: str) -> list[dict[str, Any]]:
    """What ptxas reports of each kernel: registers and spilled bytes. Shared memory is asked for at the launch."""
    rows: list[dict[str, Any]] = []
    name, arch, spills = None, "", 0
    for line in output.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            name, arch = KERNEL.search(found[1]), found[2]
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(found[1]) + int(found[2])
        elif found := re.search(r"Used (\d+) registers", line):
            kernel = f"{name[1]}<{ELEMENTS.get(name[2], '')}>".replace("<>", "") if name else "?"
            row = {"kernel": kernel, "arch": arch, "registers": int(found[1]), "spilled_bytes": spills}
            if row not in rows:
                rows.append(row)
    return rows


def resource_table(rows: list[dict[str, Any]]) -> str:
    """A line for each kernel and architecture."""
    return "\n".join(
        f"{row['arch']:8} {row['kernel']:26} {row['registers']:4} registers, {row['spilled_bytes']} bytes spilled"
        for row in rows
    )


def ragged() -> None:
    """What the sanitizer watches: forward and backward on the shapes of RAGGED, in every dtype, on rows and on maps."""
    from ssod_edge.ops import kernel_in_use, ssod_loss

    assert kernel_in_use("cuda") == "compiled"
    for p, d, m in RAGGED:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for z in (torch.randn(p, d), torch.randn(p, d, 1, 3).permute(0, 2, 3, 1)):
                z = z.to("cuda", dtype).requires_grad_()
                row = torch.randn(d, device="cuda", requires_grad=True)
                weight, bias = torch.randn(m, d, device="cuda"), torch.randn(m, device="cuda")
                target = torch.arange(p, device="cuda") % (m + 2) - 1  # from -1 to m: one below, one above
                ssod_loss(z, weight, bias, row, torch.zeros((), device="cuda"), target)[0].backward()
    torch.cuda.synchronize()


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Where gpu.json and the logs go.")
@click.option("--minutes", default=8.5, show_default=True, help="What is not begun by then is left out.")
@click.option("--skip-build", is_flag=True, help="Take the kernel that is built.")
@click.option("--ragged", "only_ragged", is_flag=True, hidden=True)
def main(out: Path | None, minutes: float, skip_build: bool, only_ragged: bool) -> None:
    """Build, test, sanitize and time the kernel on this machine's GPU."""
    if only_ragged:
        return ragged()
    if out is None:
        raise click.UsageError("--out DIR says where the record goes")
    if not torch.cuda.is_available():
        raise click.UsageError("there is no CUDA device here; ssod-edge doctor says what PyTorch sees")
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + minutes * 60
    record: dict[str, Any] = {"environment": describe_environment(None), "steps": {}}

    def step(name: str, command: list[str], **environment: str) -> dict[str, Any]:
        left = deadline - time.monotonic()
        click.echo(f"{name}: {' '.join(command)[:100]}", err=True)
        done = run(command, left, environment) if left > 5 else {"exit_code": None, "output": "out of time"}
        record["steps"][name] = done
        (out / f"{name}.log").write_text(str(done["output"]), encoding="utf-8")
        write_json(out / "gpu.json", record)  # what a cut-off run still leaves
        return done

    python = sys.executable
    if not skip_build:
        built = step("build", [python, "setup.py", "build_ext", "--inplace", "--force"], SSOD_EDGE_EXT="cuda")
        record["resources"] = resources(str(built["output"]))
    step("tests", [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"])
    training = ["--size", "224", "--batch", "128", "--classes", "1000", "--precision", "bf16"]
    for name, arguments in (("kernel", ["--dtype", "bf16"]), ("training", training)):
        json_file = str(out.resolve() / f"{name}.json")
        step(name, [python, "-m", f"ssod_edge.bench.tools.{name}", *arguments, "--json", json_file])
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    for tool in TOOLS:
        watched = [python, "-m", "ssod_edge.bench.tools.gpu", "--ragged"]
        # Without PyTorch's cache every tensor is an allocation of its own, whose bounds the tool knows.
        step(tool, [sanitizer, "--tool", tool, "--error-exitcode", "9", *watched], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    click.echo(table(record))
    if any(done["exit_code"] != 0 for done in record["steps"].values()):
        sys.exit(1)


def table(record: dict[str, Any]) -> str:
    """A line for each step, and what each kernel takes."""
    lines = [f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}"]
    for name, done in record["steps"].items():
        last = str(done["output"]).strip().splitlines()[-1:] or [""]
        lines.append(f"{name:10} exit {done['exit_code']!s:4} {done.get('seconds', 0):6} s  {last[0][:90]}")
    lines.append(resource_table(record.get("resources", [])))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
