"""The process that tries seeds: `python -m faults.worker PART FOLDER`, a seed a line in, an answer a line out."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import IO

import numpy as np

from faults.fault import Fault


def main() -> None:
    part, folder = sys.argv[1], Path(sys.argv[2])
    faulthandler.enable()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        attempts = importlib.import_module(f"faults.{part}").Attempts(folder)
    except Exception:
        _say(answers, fault=traceback.format_exc())
        return
    _say(answers, ready=True)
    for line in sys.stdin:
        try:
            _say(answers, end=attempts.attempt(np.random.default_rng(int(line))))
        except Fault as fault:
            _say(answers, fault=str(fault))
        except Exception:
            _say(answers, fault=traceback.format_exc())


def _say(answers: IO[str], **answer: str | bool) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
