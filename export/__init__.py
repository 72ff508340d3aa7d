"""From a trained run to what a device opens. The package is also the function: `ssod_edge.export(run)`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Export(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """`ssod_edge.export.graph.build.export_run`, with its arguments; needs the extras `train` and `onnx`."""
        from ssod_edge.export.graph.build import export_run

        return export_run(*arguments, **options)


sys.modules[__name__].__class__ = _Export
