"""Scores weighed without any unknown photo: by classes that are left out in turn, and by disturbed known photos.

    python scripts/score_trial.py RUN --scores NAME,NAME,... --json FILE

RUN was trained with --tune head, and its data is where it was. These are the two figures of `eval --leave-out`, of
several scores at once.
"""

from __future__ import annotations

import argparse

import numpy as np

from ssod_edge.config import score_parts
from ssod_edge.detect.folds import out_of_fold_parts
from ssod_edge.errors import UsageError
from ssod_edge.evaluation.expect import TaughtImages
from ssod_edge.evaluation.left_out import judge, leave_out
from ssod_edge.files import write_json
from ssod_edge.training.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--scores", required=True)
    parser.add_argument("--json", required=True)
    given = parser.parse_args()
    taught = TaughtImages.of(Run.at(given.run))
    if taught.stand_in:
        raise UsageError(f"'{given.run}' tuned its features: they know the classes that would be left out")
    data, folds = taught.fitted_on()
    names = given.scores.split(",")
    parts = sorted({part for name in names for part in score_parts(name)})
    out_of_fold = out_of_fold_parts(parts, data, folds)
    left = list(leave_out(parts, data, folds))
    rows = {}
    for name in names:
        found = judge(name, left, out_of_fold, taught.run.model.classes)
        auroc = float(np.mean([row["auroc"] for row in found["new_class"].values()]))
        rows[name] = {"left_out": auroc, **found}
        print(f"{name}: left out {100 * auroc:.1f}, disturbed {100 * found['disturbed']:.1f}", flush=True)
    write_json(given.json, {"images": len(taught.images), "classes": taught.run.model.classes, "scores": rows})


if __name__ == "__main__":
    main()
