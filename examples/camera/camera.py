"""A camera that reports what it does not know.

    python camera.py runs/NAME 0                          # the first camera
    python camera.py runs/NAME rtsp://door/stream         # a stream
    python camera.py runs/NAME recording.mp4 --keep DIR   # a file; unknown frames are kept for `ssod-edge review`

It needs an engine and OpenCV (extras `onnx` or `openvino`, and `video`), and no PyTorch. Verdicts are smoothed over a
second, and a line is printed where the answer changes. Put what your machine is to do into `act`.
"""

from __future__ import annotations

import argparse
import contextlib
import os

import ssod_edge
from ssod_edge.runtime.field.frames import FrameReader
from ssod_edge.runtime.field.stream import FrameVerdict, Smoother, predict_frames

#: Seconds over which verdicts are smoothed.
SMOOTH_S = 1.0


def act(seen: FrameVerdict, answer: str) -> None:
    """Called where the answer changes: `answer` is a class, or "unknown"."""
    print(f"{seen.time_s:8.2f} s  {answer}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", help="an export folder, or the run folder that holds it")
    parser.add_argument("source", help="the number of a camera, its device file, a stream's address, or a video file")
    parser.add_argument("--keep", metavar="DIR", help="keep frames that are unknown, whole pictures, 500 at most")
    given = parser.parse_args()
    is_camera = given.source.isdigit() or given.source.startswith("/dev/")
    place = {"camera": given.source} if is_camera else {"source": given.source}
    last = None
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(ssod_edge.open(given.export))
        if given.keep:
            stack.enter_context(ssod_edge.Collector(os.fspath(given.keep), model))
        frames = stack.enter_context(FrameReader(**place, say=print))
        for seen in predict_frames(model, frames, Smoother(SMOOTH_S)):
            verdict = seen.prediction
            answer = str(verdict.class_name) if verdict.known else "unknown"
            if answer != last:
                act(seen, answer)
                last = answer
    if frames.problem:
        raise SystemExit(frames.problem)


if __name__ == "__main__":
    main()
