"""Training: classes and OOD row together (the paper's Eq. 14), in one loop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ssod_edge.config import AUTO_EPOCHS, TrainConfig
from ssod_edge.data.negatives import WithNegatives
from ssod_edge.errors import ArtifactError, TrainingError, UsageError
from ssod_edge.files import claim, real_path, sha256_file
from ssod_edge.json_reader import from_json
from ssod_edge.ops import kernel_in_use
from ssod_edge.training.batches import TrainImages, load_batches
from ssod_edge.training.checkpoint import (
    AVERAGE,
    BEST,
    LAST,
    load_checkpoint,
    load_optimizer,
    load_state,
    model_tensors,
    optimizer_tensors,
)
from ssod_edge.training.distributed import (
    check_same_start,
    from_main,
    is_main,
    may_start_again,
    rank,
    start_processes,
    world_size,
)
from ssod_edge.training.disturbed import judge_disturbed, some
from ssod_edge.training.features import compute_features
from ssod_edge.training.meters import Meters, epoch_figures
from ssod_edge.training.model import SSODClassifier
from ssod_edge.training.negatives import draw_negatives
from ssod_edge.training.objective import TrainStep, class_weights
from ssod_edge.training.outputs import collect
from ssod_edge.training.run import load_config
from ssod_edge.training.schedule import auto_epochs, learning_rate, make_optimizer
from ssod_edge.training.session import Session, append_metrics, say
from ssod_edge.training.settings import default_name, run_config
from ssod_edge.training.transfer import tune
from ssod_edge.training.validated import read_logits, write_validation

#: Validation images that are shown disturbed when training has ended.
DISTURBED_IMAGES = 100


@dataclass
class _Progress:
    """Where training stands; saved with every checkpoint."""

    epoch: int = 0
    step: int = 0  # finished batches of this epoch
    best_accuracy: float = -1.0
    least_loss: float | None = None  # on the validation images
    without_gain: int = 0  # epochs since either of the two was better than before
    seconds: float = 0.0  # spent on this epoch
    meters: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def complete(values: dict[str, Any]) -> dict[str, Any]:
        """Where a run of an earlier release stood, which ended at a number of epochs alone."""
        return {"least_loss": None, "without_gain": 0, **values}

    def next_epoch(self, accuracy: float, loss: float, warming: bool) -> _Progress:
        """After an epoch; a model from before the OOD loss is kept only until there is a later one."""
        if warming:
            return _Progress(self.epoch + 1)
        gained = accuracy > self.best_accuracy or self.least_loss is None or loss < self.least_loss
        least = loss if self.least_loss is None else min(loss, self.least_loss)
        without_gain = 0 if gained else self.without_gain + 1
        return _Progress(self.epoch + 1, 0, max(accuracy, self.best_accuracy), least, without_gain)


def train(config: TrainConfig, out: str | Path = "runs", resume: bool = False, save_minutes: float = 5.0) -> Path:
    """Train a classifier with its OOD row; returns the run folder.

    Under `torchrun` the same loop runs in every process (`config.batch_size` images each); process 0 writes. Where it
    may start the processes again (--max-restarts), they go on with a run of that name and these settings.

    Args:
        config: the settings; `config.name` names the run folder, by default "<backbone>-<data>".
        out: folder of runs.
        resume: go on from `last.safetensors` with the settings stored in `config.json`.
        save_minutes: time between checkpoints inside an epoch; one is written after every epoch anyway.

    Raises:
        UsageError: data or settings that cannot be trained on; a run of that name exists already.
        BusyError: another process is training the run.
        TrainingError: the loss is not finite; the last good checkpoint is kept.
        OutputError: the run folder cannot be written.
    """
    name = config.name or default_name(config)
    if name in (".", "..") or "/" in name or "\0" in name:
        raise UsageError(f"name must be the name of one folder, got '{name}'; its place is chosen with -o/--out")
    run = Path(out) / name
    if resume:
        config = load_config(run)
    device = start_processes()
    try:
        with _claimed(run):
            resume = resume or (may_start_again() and (run / LAST).exists() and load_config(run) == config)
            if not resume and any((run / kept).exists() for kept in (BEST, LAST)):
                raise UsageError(f"the run '{run}' exists already. Go on with --resume, or choose another --name")
            if config.tune != "all":
                if (run / BEST).exists():
                    say(f"the run '{run}' is finished already")
                else:
                    tune(Session(config, run, device, resume=resume))
                return run
            loop = _Loop(config, run, resume, device, save_minutes)
            if loop.finished:
                say(f"the run '{run}' is finished already ({loop.progress.epoch} epochs)")
            else:
                loop.run_epochs()
                loop.say_validation()
            _warn_of_untrained_row(loop.config, loop.model)
    except KeyboardInterrupt:
        kept = f"'{run / LAST}' holds the run so far. Go on with: ssod-edge train --resume {shlex.quote(str(run))}"
        say(kept if (run / LAST).exists() else "the run has no model yet. The same command begins it again")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return run


@contextlib.contextmanager
def _claimed(run: Path) -> Iterator[None]:
    """Be the one process, with those of its `torchrun`, that trains a run; a start that failed leaves no folder."""
    if not is_main():
        yield
        return
    is_new, out_is_new = not run.exists(), not run.parent.exists()
    with claim(run / ".lock", f"the run '{run}' is being trained"):
        try:
            yield
        finally:
            if is_new and not any((run / kept).exists() for kept in (BEST, LAST)):
                shutil.rmtree(run, ignore_errors=True)  # there is nothing to evaluate or resume
                with contextlib.suppress(OSError):
                    if out_is_new:
                        run.parent.rmdir()


def _kernel_in_use(device: torch.device, kernel: str) -> str:
    """`ops.kernel_in_use`, its warning as one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        in_use = kernel_in_use(device, kernel)
    for warning in caught:
        say(f"note: {warning.message}")
    return in_use


def _warn_of_untrained_row(config: TrainConfig, model: SSODClassifier) -> None:
    """Say so where the OOD loss was wanted and never moved the OOD row from zero."""
    taught = config.loss.trains_row or config.negatives is not None
    if not taught or model.ood.weight.any():
        return
    if config.epochs <= config.loss.warmup_epochs:
        reason = f"all {config.epochs} epochs were its warm-up. Use more --epochs or fewer --warmup-epochs"
    else:
        reason = "no patch was labelled ID or OOD. Use more --epochs, or a --gamma nearer to 0.5"
    say(f"warning: the OOD row was not trained, and the score `ssod` is constant: {reason}")


def start_run(data: str, out: str | Path, options: dict[str, Any]) -> Path:
    """Begin a run from command-line options: those of `run_config`; returns the run folder."""
    return train(run_config(data, options, out), out)


def resume_run(run: str | Path) -> Path:
    """Go on with a run folder, with the settings stored in it.

    Raises:
        UsageError: it is no run folder.
    """
    run = Path(run)
    if run.is_file():
        raise UsageError(f"--resume takes the folder of a run, got the file '{run}'. Give '{run.parent}'")
    if run.name in ("", ".."):
        run = real_path(run)
    return train(replace(load_config(run), name=run.name), run.parent, resume=True)


class _Loop(Session):
    """The state one training run carries from batch to batch: as new, or as the last checkpoint has it."""

    def __init__(self, config: TrainConfig, run: Path, resume: bool, device: torch.device, save_minutes: float):
        restored = resume and (run / LAST).exists()
        super().__init__(config, run, device, restored, resume)
        check_same_start(sha256_file(run / LAST) if restored else "")
        self.save_minutes, self.interrupted = save_minutes, False
        self.optimizer = make_optimizer(self.model, config)
        # Of weights and norms, over the longer a time the more steps there were: no setting of its own.
        self.average = ModelEmaV3(self.model, use_warmup=True) if config.epochs == AUTO_EPOCHS else None
        if self.batch_size < 2:  # batch norm needs two images
            raise UsageError(
                f"'{config.data}' leaves {len(self.splits.train)} training images for {world_size()} process(es), and "
                "each needs at least 2. Add images, or use fewer processes"
            )
        if self.batch_size < config.batch_size:
            say(f"note: a batch is {self.batch_size} images, all that there are (--batch-size {config.batch_size})")
        self.progress = self._restore() if restored else _Progress()
        if not restored and is_main():
            self.begin_folder()
        self.meters = Meters(device, self.progress.meters)
        taught = self.source if self.negatives is None else WithNegatives(self.source, self.negatives)
        self.images = TrainImages(taught, config.preprocess, config.seed, config.crop_scale_min, config.hflip)
        self.kernel = _kernel_in_use(device, config.kernel)
        weights = class_weights(self.source.labels[self.splits.train], config.class_weights)
        step: nn.Module = TrainStep(self.model, config.loss, config.precision, config.kernel, weights).to(device)
        if dist.is_initialized():
            # The OOD row takes no part while the OOD loss warms up.
            step = nn.parallel.DistributedDataParallel(step, find_unused_parameters=True)
        self.train_step = cast(nn.Module, torch.compile(step)) if config.compile else step
        self.steps_per_epoch = len(self._batches(0))
        self.patience = 0  # epochs without a gain that end training; 0: it goes on to the last one
        if config.epochs == AUTO_EPOCHS:
            epochs, self.patience = auto_epochs(self.steps_per_epoch)
            self.config = replace(config, epochs=epochs)
            say(f"at most {epochs} epochs; {self.patience} without a gain on the validation images end them before")

    @property
    def batch_size(self) -> int:
        """Images in a step of each process: never more than its share of all."""
        return min(self.config.batch_size, len(self.splits.train) // world_size())

    @property
    def finished(self) -> bool:
        """Whether there is no further epoch."""
        progress = self.progress
        return progress.epoch >= self.config.epochs or 0 < self.patience <= progress.without_gain

    def _restore(self) -> _Progress:
        """Put back what the last checkpoint holds."""
        path = self.run / LAST
        tensors, meta = load_checkpoint(path)
        if any(meta[key] != value for key, value in self.data_record.items()):
            raise UsageError(
                f"the data set '{self.source.name}' changed since the run '{self.run}' began; start a new run"
            )
        self.started_from = meta.get("started_from")
        processes = meta.get("processes")  # not recorded by earlier releases
        if processes not in (None, world_size()):
            if meta["progress"]["step"]:
                raise UsageError(
                    f"the run '{self.run}' was stopped in the middle of an epoch that {processes} process(es) shared, "
                    f"and there are {world_size()} now: the images that are left are not the same. Resume it with as "
                    f"many: on one machine --nproc-per-node {processes}"
                )
            trained = len(self.splits.train)
            before, now = (count * min(self.config.batch_size, trained // count) for count in (processes, world_size()))
            say(f"note: a step was {before} images with {processes} process(es), and is {now} images now")
        load_state(self.model, tensors, path)
        if self.average is not None:
            load_state(self.average.module, tensors, path, AVERAGE)
        try:
            load_optimizer(self.optimizer, tensors)
            return cast(_Progress, from_json(_Progress, meta["progress"], "progress"))
        except (UsageError, ValueError, KeyError) as error:
            raise ArtifactError(f"checkpoint '{path}' does not hold a run to go on with ({error})") from error

    def run_epochs(self) -> None:
        from ssod_edge.terminal import TrainingBar

        bar = TrainingBar(self.config, self.steps_per_epoch, enabled=is_main(), done=self.progress.epoch)
        with bar, self._finish_batch_on_ctrl_c():
            while not self.finished:
                self._train_epoch(bar)
                self._finish_epoch(bar)

    @contextlib.contextmanager
    def _finish_batch_on_ctrl_c(self) -> Iterator[None]:
        """The first Ctrl-C ends training after the running batch, with a checkpoint; the second ends it at once."""

        def interrupt(*_: object) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        if threading.current_thread() is not threading.main_thread():
            yield  # handlers belong to the main thread
            return
        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _train_epoch(self, bar: Any) -> None:
        progress, config = self.progress, self.config
        self.model.train()
        full = config.preprocess.input_size
        self.images.start_epoch(progress.epoch, full // 2 if progress.epoch < config.half_size_epochs else full)
        batches = self._batches(progress.epoch)[progress.step :]
        loader = load_batches(self.images, config.workers, batch_sampler=batches, pin_memory=self.device.type == "cuda")
        started = saved = time.monotonic()
        before = progress.seconds
        for image, target, index in loader:
            global_step = progress.epoch * self.steps_per_epoch + progress.step
            loss, log = self._train_batch(image, target, index, global_step)
            progress.step += 1
            progress.seconds = before + time.monotonic() - started
            self.meters.add({**log, "loss": loss}, self.batch_size)
            bar.update(progress.epoch, progress.step, lambda: epoch_figures(self.meters.read()))
            if (self.interrupted or time.monotonic() - saved > self.save_minutes * 60) and is_main():
                self._save(LAST)
                saved = time.monotonic()
            if self.interrupted:
                raise KeyboardInterrupt

    def _train_batch(
        self, image: Tensor, target: Tensor, index: Tensor, global_step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One optimizer step. Its randomness depends on (seed, step, process) alone, so resuming repeats it."""
        config = self.config
        torch.manual_seed((config.seed * 1_000_003 + global_step) * world_size() + rank())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, global_step, self.steps_per_epoch)
        warm = global_step >= config.loss.warmup_epochs * self.steps_per_epoch
        target = target[: self.batch_size].to(self.device, non_blocking=True)
        loss, log = self.train_step(image.to(self.device, non_blocking=True), target, warm)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self._check_finite(loss.detach(), norm, index)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, step=global_step)
        return loss.detach(), log

    def _batches(self, epoch: int) -> list[list[int]]:
        """This process's batches of an epoch: a seeded permutation, the incomplete last global batch dropped.

        Each ends in negatives, where they are shown and the warm-up does not last for all of the epoch.
        """
        order = np.random.default_rng((self.config.seed, epoch)).permutation(self.splits.train)
        world, size = world_size(), self.batch_size * world_size()
        batches = [order[i : i + size][rank() :: world] for i in range(0, len(order) - size + 1, size)]
        if (negatives := self.negatives) is not None and epoch + 1 > self.config.loss.warmup_epochs:
            share = self.config.loss.outlier_share / (2 if self.config.loss.outliers else 1)
            count, seed = max(1, round(share * self.batch_size)), (self.config.seed, epoch)
            drawn = draw_negatives(negatives, len(self.source), len(batches), count * world, seed)
            batches = [np.append(batch, more[rank() :: world]) for batch, more in zip(batches, drawn, strict=True)]
        return [batch.tolist() for batch in batches]

    def _check_finite(self, loss: Tensor, norm: Tensor, index: Tensor) -> None:
        """Before the step that would spoil the weights. Both in one tensor: each read waits for the GPU."""
        values = torch.stack([loss.float(), norm.float()]).tolist()
        for what, value in zip(("loss", "gradient's norm"), values, strict=True):
            if not math.isfinite(value):
                where = f"The last good checkpoint is '{self.run / LAST}'." if (self.run / LAST).exists() else ""
                raise TrainingError(
                    f"the {what} is {value} at epoch {self.progress.epoch + 1}, step {self.progress.step + 1}, "
                    f"on the images {index.tolist()}. Lower --lr, or look at these images. {where}"
                )

    def _finish_epoch(self, bar: Any) -> None:
        progress, meters, config = self.progress, self.meters.read(), self.config
        model, accuracy, val_loss = self._validate()
        row = {
            "epoch": progress.epoch + 1,
            **epoch_figures(meters),
            "val_accuracy": accuracy,
            "val_loss": val_loss,
            "averaged": model is not self.model,
            "seconds": round(progress.seconds, 3),
            "images_per_second": round(meters["images"] * world_size() / max(progress.seconds, 1e-9), 2),
            "kernel": self.kernel,
            "started_from": self.started_from,
        }
        best = accuracy >= progress.best_accuracy  # of equals the later: its OOD row saw more
        plain = config.loss.is_plain and self.negatives is None
        warming = not plain and progress.epoch < config.loss.warmup_epochs
        self.progress = progress.next_epoch(accuracy, val_loss, warming)
        self.meters = Meters(self.device, {})
        if is_main():
            if best:
                self._save(BEST, accuracy, model)
            # Before `last`: a kill in between repeats the epoch and its line, and loses neither.
            append_metrics(self.run / "metrics.jsonl", row)
            self._save(LAST, accuracy)
        bar.epoch_done(row)

    def say_validation(self) -> None:
        """Tell what becomes of validation images, by the weights that are the run's: class by class, and disturbed."""
        if not is_main():
            return
        model, source, config, splits = self.model, self.source, self.config, self.splits
        load_state(model, load_checkpoint(self.run / BEST)[0], self.run / BEST)
        val, calib = (read_logits(model, source, part, config.workers) for part in (splits.val, splits.calib))
        drawn = some(splits.val, DISTURBED_IMAGES)
        known = compute_features(model, source, drawn, config.workers)
        say(str(judge_disturbed(model, known, source.labels[drawn])))
        for line in write_validation(self.run, source, splits.val, val, (calib, source.labels[splits.calib])):
            say(line)

    def _validate(self) -> tuple[SSODClassifier, float, float]:
        """(model, accuracy, loss) on the validation images: of the model, or of the average where it is as accurate."""
        config, models = self.config, [self.model] if self.average is None else [self.average.module, self.model]
        read = partial(collect, batch_size=config.batch_size, workers=config.workers)
        outputs = [read(model, self.source, self.splits.val) for model in models]
        # As process 0 has them, so that all processes end at the same epoch.
        figures = [(from_main(found.accuracy), from_main(found.loss)) for found in outputs]
        chosen = max(range(len(models)), key=lambda number: figures[number][0])  # the first of equals
        return models[chosen], *figures[chosen]

    def _save(self, name: str, accuracy: float | None = None, model: SSODClassifier | None = None) -> None:
        tensors: dict[str, Tensor] = {}
        meta: dict[str, Any] = {"kernel": self.kernel}
        if name == LAST:
            self.progress.meters = self.meters.read() if self.progress.step else {}
            tensors = optimizer_tensors(self.optimizer)
            if self.average is not None:
                tensors |= model_tensors(self.average.module, AVERAGE)
            meta |= {
                "progress": dataclasses.asdict(self.progress),
                "processes": world_size(),
                "finished": self.finished,
            }
        self.save(name, self.progress.epoch, accuracy, tensors, meta, model)
