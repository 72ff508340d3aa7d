"""The command line: options, and one call into the module that does the work.

Every import of a module that does work sits inside its command, so that `--help` is quick and `predict` never loads
torch. A command returns its exit code, or raises (`ssod_edge.cli.group`).
"""

from __future__ import annotations

from ssod_edge.cli import device, evaluate, export, serve, train
from ssod_edge.cli.group import main

__all__ = ["main"]

for command in (  # in the order of work, which is that of `--help`
    train.train, train.study, train.reproduce, evaluate.eval, evaluate.report, evaluate.explain, export.export,
    device.bench, export.package, device.predict, serve.serve, device.monitor, device.review, device.teach,
    device.history, device.rollback, device.calibrate, device.doctor,
):  # fmt: skip
    main.add_command(command)
