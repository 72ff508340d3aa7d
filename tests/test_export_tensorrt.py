"""Plans that TensorRT for RTX really builds, without a GPU; what a builder refuses; the cache; two exports at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from click.testing import CliRunner
from fake_gpu import FakeDriver, FakeTensorRT, install
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from small import SIZE, make_model, random_images

from ssod_edge.cli import main
from ssod_edge.errors import ArtifactError, EngineError, MissingExtraError, UsageError, VerificationError
from ssod_edge.export.command import engines_for, run_export
from ssod_edge.export.engines import make_artifact
from ssod_edge.export.external import external_files
from ssod_edge.export.fp16 import to_fp16
from ssod_edge.export.onnx import fused_graph, save_onnx
from ssod_edge.export.run import ExportOptions, export_source
from ssod_edge.export.source import from_run
from ssod_edge.export.tensorrt import PlanOptions, build_plan, parse_batch, save_plan
from ssod_edge.files import sha256_file
from ssod_edge.runtime import open_runner
from ssod_edge.runtime.trt import plan_key
from ssod_edge.spec import Spec, load_spec

needs_rtx = pytest.mark.skipif(
    not __import__("importlib").util.find_spec("tensorrt_rtx"), reason="needs tensorrt_rtx: the extra 'dev' brings it"
)
