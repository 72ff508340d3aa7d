"""What the model of `make demo` says to ten images of each set, evenly spread over it.

python scripts/demo_verdicts.py runs/demo docs/images/demo-verdicts.webp
"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

import ssod_edge
from ssod_edge.data.demo import CLASSES
from ssod_edge.data.sources import open_dataset

SETS = {
    "demo:test": "known:\ndigits 0 to 7",
    "demo:near": "unknown:\ndigits 8, 9",
    "demo:photos": "unknown:\nphotos",
    "demo:shapes": "unknown:\nshapes",
}
COLUMNS = 10
RIGHT, WRONG = "#1a7f37", "#cf222e"


def main(run: str, target: str) -> None:
    """Draw one row a set; a verdict is green where it is right."""
    figure, axes = plt.subplots(len(SETS), COLUMNS, figsize=(11, 5.4), layout="constrained")
    with ssod_edge.open(run) as model:
        for row, (data, title) in zip(axes, SETS.items(), strict=True):
            source = open_dataset(data, labelled=False)
            row[0].set_ylabel(title, fontsize=10)
            for index, axis in zip(np.linspace(0, len(source) - 1, COLUMNS).astype(int).tolist(), row, strict=True):
                image = np.asarray(source.image(index))
                verdict = model.predict(image)
                truth = CLASSES[source.labels[index]] if data == "demo:test" else None
                right = verdict.known == (truth is not None) and truth in (None, verdict.class_name)
                axis.imshow(image)
                axis.set_xticks([])
                axis.set_yticks([])
                axis.set_xlabel(
                    verdict.class_name if verdict.known else "unknown", color=RIGHT if right else WRONG, weight="bold"
                )
    figure.savefig(target, dpi=80)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
