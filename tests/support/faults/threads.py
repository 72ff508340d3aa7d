"""Many threads on one model, also while it is closed or its export is swapped; two processes on one folder."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from faults import templates
from faults.children import done, import_all, is_short, start
from faults.damage import Rng, any_of, link_tree
from faults.fault import Fault, about
from faults.images import alike
from faults.operations import Collect, make_templates, weights
from ssod_edge import open as open_model
from ssod_edge.errors import UsageError
from ssod_edge.export.versions import kept_versions, name_of, roll_back
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.field.monitor import read_monitor
from ssod_edge.runtime.predict import Predictor

ENGINES = ("onnxruntime", "openvino")
THREADS = 6


class Attempts:
    """One race."""

    def __init__(self, folder: Path):
        import_all(folder)
        make_templates(folder)
        self._folder, self._work = folder, folder / "work"
        self._photos = sorted(templates.colour_photos(folder).rglob("*.png"))
        self._races: tuple[Callable[[Rng], str], ...] = (
            self._shared, self._closed, self._closed, self._swapped, self._calibrated, self._rolled_back,
            self._collected, self._monitored, *(() if is_short(folder) else (self._trained,)),
        )  # fmt: skip

    def attempt(self, rng: Rng) -> str:
        """In a process of its own: an engine that was opened here could not be used after a fork."""
        race = any_of(rng, self._races)
        shutil.rmtree(self._work, ignore_errors=True)
        with about(race.__name__):
            return f"{race.__name__.lstrip('_')} {race(rng)}"

    def _shared(self, rng: Rng) -> str:
        """Each thread gets the verdicts of its own images."""
        engine = any_of(rng, ENGINES)
        done(lambda: self._all_agree(engine, None))
        return engine

    def _closed(self, rng: Rng) -> str:
        """A verdict is the right one or an error, whenever the model is closed."""
        engine, after = any_of(rng, ENGINES), float(rng.uniform(0, 0.03))
        with about(f"{engine}, closed after {after:.4f} s"):
            done(lambda: self._all_agree(engine, after))
        return engine

    def _all_agree(self, engine: str, closed_after: float | None) -> None:
        """Threads judge images, one at a time or many, until they are through or the model is closed."""
        place = templates.colours(self._folder)
        with open_model(place, engine=engine, threads=1) as model:
            expected = dict(zip(self._photos, model.predict_many(self._photos), strict=True))
        model = open_model(place, engine=engine, threads=1)
        wrong: list[str] = []

        def judge(first: int) -> None:
            photos = [*self._photos[first:], *self._photos[:first]] * 2
            try:
                found = model.predict_many(photos, workers=1) if first % 2 else map(model.predict, photos)
                for photo, verdict in zip(photos, found, strict=True):
                    if not alike(verdict, expected[photo]):
                        wrong.append(f"{verdict} instead of {expected[photo]}")
            except UsageError as error:
                if closed_after is None or "closed" not in str(error):
                    wrong.append(repr(error))
            except BaseException as error:
                wrong.append(repr(error))

        _together([lambda first=first: judge(first) for first in range(THREADS)], lambda: _close(model, closed_after))
        if wrong:
            raise Fault("; ".join(wrong)[:2000])

    def _swapped(self, rng: Rng) -> str:
        """Whoever opens an export while versions are swapped gets one of them, whole."""
        link_tree(templates.versions(self._folder), self._work)
        door, swaps = self._work / "door", int(rng.integers(3, 9))
        names = sorted(name_of(export.spec) for export in kept_versions(door))
        engine = any_of(rng, ENGINES)

        def swap() -> None:
            for _ in range(swaps):
                roll_back(door, next(n for n in names if n != name_of(Export.at(door).spec)))

        def use() -> None:
            while True:
                with open_model(door, engine=engine, threads=1) as model:
                    verdict = model.predict(self._photos[0])
                    if verdict.class_name is None:
                        raise Fault(str(verdict))

        with start(use) as reader:
            done(swap)
            reader.kill()
            ended = reader.ended()
        if ended.err:
            raise Fault(ended.err[-2000:])
        Export.at(door).check_all()
        return engine

    def _calibrated(self, rng: Rng) -> str:
        door = link_tree(templates.colours(self._folder), self._work / "door")
        photos = templates.colour_photos(self._folder)
        codes = self._both(
            [("calibrate", door, "--id", photos, "--artifact", name) for name in ("onnx-fp32", "onnx-fp16")]
        )
        spec = Export.at(door).spec
        changed = [name for name in ("onnx-fp32", "onnx-fp16") if spec.artifact(name).threshold.n == 24]
        if codes == [0, 0] and len(changed) != 2:
            raise Fault(f"only {changed} is calibrated")
        Export.at(door).check_all()
        return str(codes)

    def _rolled_back(self, rng: Rng) -> str:
        link_tree(templates.versions(self._folder), self._work)
        door = self._work / "door"
        names = sorted(name_of(export.spec) for export in kept_versions(door))
        other = next(name for name in names if name != name_of(Export.at(door).spec))
        codes = self._both([("rollback", door, "--to", other)] * 2)
        if name_of(Export.at(door).spec) != other:
            raise Fault(f"both ended with {codes}, and {other} is not in use")
        Export.at(door).check_all()
        if sorted(name_of(export.spec) for export in kept_versions(door)) != names:
            raise Fault("a version is gone")
        return str(codes)

    def _collected(self, rng: Rng) -> str:
        collect = Collect(self._folder)
        collect.prepare()
        codes = self._both([collect.command()] * 2)
        collect.check()
        collect.check_nothing_left()
        return str(codes)

    def _monitored(self, rng: Rng) -> str:
        self._work.mkdir()
        file = self._work / "monitor.json"
        command = ("predict", templates.colours(self._folder), templates.colour_photos(self._folder), "--monitor", file)
        codes = self._both([command] * 2)
        images = read_monitor(str(file)).images
        if images < len(self._photos):
            raise Fault(f"{images} images are counted, {codes}")
        return f"{codes}, {images} images"

    def _trained(self, rng: Rng) -> str:
        """Two runs that keep their features in one place."""
        self._work.mkdir()
        train = templates.train_head(self._folder, self._work / "runs")
        codes = self._both([(*train[:-1], name) for name in ("one", "other")])
        whole = weights(templates.run(self._folder) / "runs" / "run" / "best.safetensors")
        for name in ("one", "other"):
            if weights(self._work / "runs" / name / "best.safetensors") != whole:
                raise Fault(f"the weights of '{name}' are others")
        return str(codes)

    def _both(self, commands: list[tuple[object, ...]]) -> list[int]:
        """Exit codes of two commands at once; each ends well or in the project's words."""
        with start(commands[0]) as one, start(commands[1]) as other:
            ends = one.ended(), other.ended()
        for ended in ends:
            ended.end()
        codes = sorted(ended.code for ended in ends)
        if codes[0] != 0:
            raise Fault(f"neither did it: {ends}")
        return codes


def _close(model: Predictor, after: float | None) -> None:
    if after is not None:
        time.sleep(after)
        model.close()


def _together(calls: list[Callable[[], object]], meanwhile: Callable[[], object]) -> None:
    """Run calls in threads of their own, and another one here."""
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    meanwhile()
    for thread in threads:
        thread.join(60)
        if thread.is_alive():
            raise Fault("a thread waits for ever")
