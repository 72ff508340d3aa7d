"""The process that tries seeds: `python -m faults.worker FOLDER`, a part or a seed a line in, an answer a line out."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import IO, Any

import numpy as np

from faults.fault import Fault


def main() -> None:
    folder = Path(sys.argv[1])
    faulthandler.enable()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    attempts: Any = None
    for line in sys.stdin:
        try:
            if line.strip().isdigit():
                _say(answers, end=attempts.attempt(np.random.default_rng(int(line))))
            else:
                attempts = importlib.import_module(f"faults.{line.strip()}").Attempts(folder)
                _say(answers, end="ready")
        except Fault as fault:
            _say(answers, fault=str(fault))
        except Exception:
            _say(answers, fault=traceback.format_exc())


def _say(answers: IO[str], **answer: str) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
