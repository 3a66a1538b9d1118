"""`Run`: the folder, seed, metrics, progress and checkpoints of one training.

    with Run("runs/first", engine=Local(), seed=1) as run:
        actor = run.role("actor", policy, optimiser=AdamW(3e-4))
        reference = actor.copy(frozen=True)
        for step in run.steps(100, what="round"):
            ...
            run.log(reward=score.mean())

The folder holds ``config.json`` (everything needed to run again), ``metrics.jsonl`` (one record a step,
nothing that depends on the clock), ``timings.jsonl`` (what does), ``samples/`` and ``checkpoints/``. A run
that is killed at any moment and resumed goes on as if nothing had happened: the same weights and the same
``metrics.jsonl``, bit for bit, on one CPU process.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import CheckpointError, NonFiniteError, UsageError, nearest
from guerdon.experience.datasets import Data, batch_count, batch_order
from guerdon.run import checkpoint
from guerdon.run.config import describe, holds_run, read_config, write_config
from guerdon.run.loggers import Logger, open_logger
from guerdon.run.metrics import METRICS_FILE, TIMINGS_FILE, Meter, Number, Value, critical
from guerdon.run.progress import Progress, open_progress
from guerdon.run.random_state import random_states, restore_random_states, seed_everything
from guerdon.run.storage import JsonLines, guard

Tracked = TypeVar("Tracked")
FAILED_BATCH = "failed_batch.safetensors"


class Interrupted(KeyboardInterrupt):
    """The user (SIGINT) or the system (SIGTERM) stopped the run; ``exit_status`` is 130 or 143."""

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_status = 128 + signum


_SHARE = 20  # checkpoints are at least this many times their own cost apart


class Run:
    """A training run in ``folder``; use it in a ``with`` statement.

    Args:
        folder: where everything is written; made if missing.
        engine: has ``role(name, model, optimiser, **settings)``, which makes a role, and ``describe()``.
        seed: seeds python, numpy, torch and `generator` when the run is entered. A resumed run keeps its own.
        config: what else is needed to run again; written to ``config.json``.
        checkpoint_every: seconds between checkpoints; each is written at the end of a step. Where writing
            takes long they are rarer, so that it costs at most a twentieth of the time.
        checkpoint_steps: if given, a checkpoint every so many steps instead.
        keep: how many checkpoints to keep.
        log: where metrics go besides the folder: ``tensorboard``, ``wandb``, ``trackio``.
        progress: show a progress bar (on a terminal) or a line now and then (elsewhere).
        headline: the metric that the progress shows.
        resume: continue the run in ``folder`` from its newest checkpoint.
        max_seconds: end a loop with the step in which the run has taken this long, interruptions not counted.
        until: end a loop with the step in which the headline metric reaches this.

    Raises:
        UsageError: ``folder`` already holds a run and ``resume`` is false, or an argument is out of range.
        CheckpointError: ``resume`` and ``folder`` holds no run.
        StorageError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        engine: Any,
        seed: int = 0,
        config: dict[str, Any] | None = None,
        checkpoint_every: float = 10.0,
        checkpoint_steps: int | None = None,
        keep: int = 3,
        log: Sequence[str] = (),
        progress: bool = True,
        headline: str = "reward",
        resume: bool = False,
        max_seconds: float | None = None,
        until: float | None = None,
    ) -> None:
        for name, value, least in (("keep", keep, 1), ("checkpoint_steps", checkpoint_steps, 1)):
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}, expected at least {least}")
        self.folder = Path(folder)
        self.engine = engine
        self.seed = seed
        self.config: dict[str, Any] = dict(config or {})
        self.state: dict[str, Any] = {}
        self.generator = torch.Generator()
        self._max_seconds, self._until = max_seconds, until
        self._given_config = config
        self._every, self._every_steps, self._keep = checkpoint_every, checkpoint_steps, keep
        self._log, self._show, self._headline, self._resume = tuple(log), progress, headline, resume
        self._check_folder()

        self._objects: dict[str, Any] = {}
        self._loggers: list[Logger] = []
        self._meter = Meter()
        self._bar: Progress | None = None
        self._stack: contextlib.ExitStack | None = None
        self._metrics: JsonLines
        self._timings: JsonLines
        self._position = _Position()
        self._saved: dict[str, Any] | None = (
            None  # a loaded checkpoint, until the loop it was made in is entered
        )
        self._open = False  # the body of a step is running
        self._busy = False  # inside a loop: a signal waits for the end of the step
        self._signal: int | None = None
        self._saved_step: int | None = None  # the newest checkpoint
        self._saved_at = 0.0
        self._save_cost = 0.0  # seconds that the last checkpoint took
        self._started = 0.0  # when the run would have started had it never been interrupted
        self._step_started = 0.0
        self._first_headline: Number | None = None

    # -- entering and leaving --------------------------------------------------------------------------------

    def __enter__(self) -> Run:
        if self._stack is not None:
            raise UsageError(f"the run {self.folder} is already entered")
        self._check_folder()
        with contextlib.ExitStack() as stack:
            with guard(self.folder):
                self.samples.mkdir(parents=True, exist_ok=True)
            stack.callback(_lock(self.folder))
            content = self._write_config()
            checkpoint.clean(self.folder)
            self._metrics = JsonLines(self.folder / METRICS_FILE)
            stack.callback(self._metrics.close)
            self._timings = JsonLines(self.folder / TIMINGS_FILE)
            stack.callback(self._timings.close)
            for name in self._log:
                logger = open_logger(name, self.folder, content, resume=self._resume)
                self._loggers.append(logger)
                stack.callback(logger.close)
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            stack.callback(self._close_bar)
            self.generator = seed_everything(self.seed)
            self._started = time.perf_counter()
            self._catch_signals(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._busy = self._stack, False
        assert stack is not None
        try:
            if error is None:
                self._finish_broken()
                self._write_last_words()
            elif isinstance(error, NonFiniteError):
                self._keep_failed_batch(error)
        finally:
            self._stack = None
            self._loggers = []
            stack.close()

    def _check_folder(self) -> None:
        if self._resume:
            read_config(self.folder)
        elif holds_run(self.folder):
            raise UsageError(
                f"{self.folder} already holds a run; continue it with `guerdon resume {self.folder}`, "
                "or give the new one another name with --name"
            )

    def _write_config(self) -> dict[str, Any]:
        """Write ``config.json``; a resumed run keeps its seed, and its config unless another was given."""
        if not self._resume:
            content = describe(self.config, self.seed, self.engine.describe())
            write_config(self.folder, content)
            return content
        content = read_config(self.folder)
        self.seed = content["seed"]
        if self._given_config is None:
            self.config = content["config"]
        elif self._given_config != content["config"]:
            content = {**content, "config": self._given_config}
            write_config(self.folder, content)
        return content

    def _finish_broken(self) -> None:
        """The end of a step, and of its loop, that was left by ``break``."""
        if self._open:
            self._position.finished = True
            self._end_step(self._finite(self._meter.take()), last=True)
            self._close_bar()

    def _write_last_words(self) -> None:
        """What was logged after the last loop (a final evaluation): one more record, which no checkpoint
        covers, so that a resume writes it again, or replaces it by further steps."""
        metrics = self._finite(self._meter.take())
        if metrics and (self._position.loop >= 0 or not self._resume):
            self._metrics.append({"step": self._position.step, **metrics})
            for logger in self._loggers:
                logger.write(self._position.step, metrics)

    def _keep_failed_batch(self, error: NonFiniteError) -> None:
        """Save the batch that the error carries and say where; the last good checkpoint stays as it is."""
        parts = [str(error).rstrip(".")]
        batch = getattr(error, "batch", None)
        if batch is not None:
            path = self.folder / FAILED_BATCH
            try:
                batch.save_file(path)
                parts.append(f"the batch is saved in {path}")
            except Exception as failure:  # the error that counts is the one being raised
                parts.append(f"the batch could not be saved ({failure})")
        if self._saved_step is not None:
            parts.append(f"the checkpoint of step {self._saved_step} is intact")
        error.args = ("; ".join(parts), *error.args[1:])

    # -- what is saved ---------------------------------------------------------------------------------------

    def role(self, name: str, model: Any, optimiser: Any = None, **settings: Any) -> Any:
        """A role made by the engine, saved in every checkpoint under ``name``.

        Raises:
            UsageError: the name is taken.
        """
        self._check_name(name)
        return self._register(name, self.engine.role(name, model, optimiser, **settings))

    def adopt(self, name: str, role: Tracked) -> Tracked:
        """Save an existing role (a target network made by ``copy()``, say) under ``name``; returns it.

        A frozen copy of the initial weights need not be adopted: on a resume it is made before the
        checkpoint is read, and so again from the initial weights.
        """
        return self.track(name, role)

    def track(self, name: str, obj: Tracked) -> Tracked:
        """Save anything with ``state_dict()`` and ``load_state_dict()`` under ``name``; returns it.

        Raises:
            UsageError: the name is taken, or the object lacks one of the two methods.
        """
        self._check_name(name)
        return self._register(name, obj)

    def _check_name(self, name: str) -> None:
        if name in self._objects:
            raise UsageError(f"the run already has something called '{name}'; choose another name")

    def _register(self, name: str, obj: Tracked) -> Tracked:
        for verb in ("state_dict", "load_state_dict"):
            if not callable(getattr(obj, verb, None)):
                raise UsageError(f"'{name}' cannot be saved: {type(obj).__name__} has no {verb}()")
        self._objects[name] = obj
        return obj

    # -- the loop --------------------------------------------------------------------------------------------

    def steps(self, total: int, what: str = "step") -> Iterator[int]:
        """Yield 0 to ``total - 1``, or the rest of them after a resume; call it once everything that is to be
        saved was registered.

        When the first number is asked for, the newest checkpoint is restored or, in a new run, one of step 0
        is written. At the end of each step its metrics are written, and a checkpoint when one is due; always
        after the last. A loop that is left by ``break`` counts as finished.

        A run may have several loops, one after the other (records count on). A loop that a resumed run had
        already finished yields nothing. What is computed between two loops is computed again, so random
        numbers drawn there should not outlive the next loop's beginning unless they are tracked.

        Raises:
            CheckpointError: what was registered does not fit the checkpoint.
            StorageError: the disk is full.
            NonFiniteError: a reward or a loss of this step is NaN or infinite.
            Interrupted: SIGINT or SIGTERM came during the step.
        """
        if self._stack is None:
            raise UsageError("steps() needs an entered run: with Run(...) as run: ...")
        self._finish_broken()
        first = self._begin_loop(total)
        if first >= total:
            return
        self._open_bar(total, what, first)
        if first and self._resume:
            self.note(f"continuing {self.folder} at {what} {first} of {total}")
        self._busy = True
        try:
            for step in range(first, total):
                self._stop_if_asked()
                self._open = True
                self._step_started = time.perf_counter()
                yield step
                metrics = self._finite(self._meter.take())
                enough = self._out_of_time() or self._reached(metrics)
                if enough:
                    self._position.finished = True
                self._end_step(metrics, last=enough or step + 1 == total)
                if enough:
                    break
        finally:
            self._busy = False
        self._close_bar()

    def batches(self, data: Data, size: int, epochs: int = 1, what: str = "update") -> Iterator[Any]:
        """`steps` over recorded ``data``: the minibatches of ``epochs`` passes, ``size`` rows each.

        Each pass has an order of its own that follows from the run's seed (rows of similar length together, see
        `guerdon.experience.datasets.batch_order`), so a resumed run goes on with the very next batch. Raises as
        `steps` does.
        """
        a_pass = batch_count(len(data), size)
        order: list[Any] = []
        known = -1
        for step in self.steps(a_pass * epochs, what):
            number, place = divmod(step, a_pass)
            if number != known:
                order, known = batch_order(len(data), size, self.seed, number, data.lengths), number
            yield data.take(order[place])

    def _out_of_time(self) -> bool:
        return self._max_seconds is not None and time.perf_counter() - self._started >= self._max_seconds

    def _reached(self, metrics: Mapping[str, Any]) -> bool:
        value = metrics.get(self._headline)
        return self._until is not None and isinstance(value, (int, float)) and value >= self._until

    def _begin_loop(self, total: int) -> int:
        """Restore or save what a loop starts from; the number of its first step."""
        if self._position.loop < 0 and self._resume:
            self._load_newest()
        loop = self._position.loop + 1
        saved = self._saved
        if saved is None:
            self._position = _Position(loop, 0, False, self._position.step)
            if loop == 0:
                self._metrics.rewind(0)
                self._timings.rewind(0)
                self._started = time.perf_counter()
                self._checkpoint()
            return 0
        position = _Position(**saved["position"])
        if position.loop > loop:  # this loop was finished long ago; give back what it made
            self._restore(saved, whole=False)
            self._position.loop = loop
            return total
        self._restore(saved, whole=True)
        self._position, self._saved = position, None
        if position.done:
            self._meter.clear()  # what was logged before the loop is in the record of its first step already
        return total if position.finished else position.done

    def _end_step(self, metrics: dict[str, Number | str | None], last: bool) -> None:
        self._open = False
        step = self._position.step
        self._position.step += 1
        self._position.done += 1
        self._metrics.append({"step": step, **metrics})
        now = time.perf_counter()
        self._timings.append(
            {
                "step": step,
                "seconds": round(now - self._started, 6),
                "step_seconds": round(now - self._step_started, 6),
                **_peak_memory(),
            }
        )
        for logger in self._loggers:
            logger.write(step, metrics)
        if self._first_headline is None:
            value = metrics.get(self._headline)
            self._first_headline = value if isinstance(value, (int, float)) else None
        if self._bar is not None:
            self._bar.advance(self._position.done, metrics)
        if self._every_steps is not None:
            due = self._position.step % self._every_steps == 0
        else:
            due = now - self._saved_at >= max(self._every, _SHARE * self._save_cost)
        if due or last or self._signal is not None:
            self._checkpoint()
        self._stop_if_asked()

    def _finite(self, metrics: dict[str, Number | str]) -> dict[str, Number | str | None]:
        """NaN and infinite metrics become None (JSON has neither), unless training cannot go on with them."""
        result: dict[str, Number | str | None] = {}
        for name, value in metrics.items():
            if isinstance(value, float) and not math.isfinite(value):
                if critical(name):
                    raise NonFiniteError(
                        f"{name} became {value} in step {self._position.step} of {self.folder}; "
                        "a smaller learning rate or gradient clipping may help"
                    )
                result[name] = None
            else:
                result[name] = value
        return result

    # -- metrics and pictures --------------------------------------------------------------------------------

    def log(self, **metrics: Value) -> None:
        """Record metrics of the current step: numbers, texts or 0-d tensors (fetched when the step ends).

        The same name logged again in the step is averaged (a text is replaced). A reward or a loss that is
        NaN or infinite at the end of the step stops the run; other such metrics are written as null.
        What is logged before a loop goes into the record of its first step, what is logged after the last
        loop into a record of its own.
        """
        self.step(metrics)

    def step(self, metrics: Mapping[str, Value]) -> None:
        """`log` with a dictionary, such as what ``Role.update`` returns."""
        add = self._meter.add
        for name, value in metrics.items():
            add(name, value)

    @property
    def samples(self) -> Path:
        """The folder for pictures, texts or videos made on the way."""
        return self.folder / "samples"

    def save_image(self, name: str, picture: Any) -> Path:
        """Write a picture to ``samples/NAME.png`` (and to the loggers).

        Args:
            name: without suffix; may contain ``/``.
            picture: a PIL image, or uint8 ``[H, W, 3]`` as an array or a tensor.
        """
        from PIL import Image

        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UsageError(f"the picture's name '{name}' leads out of {self.samples}")
        image: Image.Image
        if isinstance(picture, Image.Image):
            image = picture
        else:
            array = picture.detach().cpu().numpy() if isinstance(picture, Tensor) else np.asarray(picture)
            if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
                raise UsageError(
                    f"the picture '{name}' is {array.dtype} {list(array.shape)}, expected uint8 [H, W, 3]"
                )
            image = Image.fromarray(array)
        path = self.samples / f"{name}.png"
        temporary = path.with_name(f".tmp-{path.name}")
        with guard(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(temporary, format="png")
            os.replace(temporary, path)
        for logger in self._loggers:
            logger.image(self._position.step, name, np.asarray(image.convert("RGB")))
        return path

    def note(self, text: str) -> None:
        """Tell the user something (above the progress bar); silent without progress."""
        if self._bar is not None:
            self._bar.note(text)
        elif self._show:
            print(text, flush=True)

    def _open_bar(self, total: int, what: str, first: int) -> None:
        self._close_bar()
        if self._show:
            self._bar = open_progress(total, what, first, self._headline, self._first_headline)

    def _close_bar(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()

    # -- checkpoints -----------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        random = random_states(self.generator)
        began = time.perf_counter()
        self._metrics.sync()  # what the checkpoint covers must reach the disk before it
        checkpoint.save(
            self.folder,
            self._position.step,
            {
                "position": dict(vars(self._position)),
                "objects": {name: obj.state_dict() for name, obj in self._objects.items()},
                "state": self.state,
                "random": random,
                "metrics": {"size": self._metrics.size, "digest": self._metrics.digest},
                "seconds": time.perf_counter() - self._started,
                "headline": self._first_headline,
            },
            self._keep,
        )
        # saving must not be seen in the random numbers (runtime type checkers draw some, for one): when
        # checkpoints are made depends on the clock
        restore_random_states(random, self.generator)
        self._saved_step, self._saved_at = self._position.step, time.perf_counter()
        self._save_cost = self._saved_at - began

    def _load_newest(self) -> None:
        """Read the newest checkpoint and cut the records back to what it covers."""
        found = checkpoint.load_newest(self.folder)
        if found is None:
            if self._metrics.size:
                raise CheckpointError(
                    f"{self.folder} has records but no checkpoint; start a new run, with another --name"
                )
            return  # killed before the first checkpoint: nothing was trained yet
        step, saved = found
        if not self._metrics.rewind(step, **saved["metrics"]):
            self.note(
                f"{self.folder / METRICS_FILE} is not what the checkpoint of step {step} covers; "
                "the readable records before it are kept"
            )
        self._timings.rewind(step)
        self._started = time.perf_counter() - saved["seconds"]
        self._saved_step, self._saved_at = step, time.perf_counter()
        self._first_headline = saved["headline"]
        self._position.step = step
        self._saved = saved

    def _restore(self, saved: dict[str, Any], whole: bool) -> None:
        """Load a checkpoint into what is registered; ``whole``: it must fit exactly."""
        objects = saved["objects"]
        where = f"the checkpoint of step {self._saved_step} in {self.folder}"
        if whole:
            for name in objects.keys() - self._objects.keys():
                raise CheckpointError(
                    f"{where} holds '{name}', which this run does not have ({nearest(name, self._objects)}); "
                    "resume with the method and options it was started with"
                )
            for name in self._objects.keys() - objects.keys():
                raise CheckpointError(
                    f"{where} lacks '{name}' ({nearest(name, objects)}); "
                    "resume with the method and options it was started with"
                )
        for name, obj in self._objects.items():
            if name in objects:
                try:
                    obj.load_state_dict(objects[name])
                except (RuntimeError, KeyError, ValueError, TypeError) as error:
                    reason = " ".join(str(error).split())  # torch's messages have several lines
                    raise CheckpointError(f"{where} does not fit '{name}': {reason}") from error
        self.state.clear()
        self.state.update(saved["state"])
        restore_random_states(saved["random"], self.generator)

    # -- signals ---------------------------------------------------------------------------------------------

    def _catch_signals(self, stack: contextlib.ExitStack) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread only
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, self._on_signal)
            if before is not None:
                stack.callback(signal.signal, number, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._busy and self._signal is None:
            self._signal = number
            if self._show:  # not print(): the signal may have come in the middle of one
                with contextlib.suppress(OSError):
                    os.write(2, b"\nstopping after this step (once more to stop at once)\n")
            return
        self._signal = number
        if self._saved_step is None:
            raise Interrupted("stopped before the training began", number)
        raise Interrupted(
            f"stopped at once; `guerdon resume {self.folder}` continues after step {self._saved_step}", number
        )

    def _stop_if_asked(self) -> None:
        if self._signal is not None:
            raise Interrupted(
                f"stopped after step {self._position.step}; continue with `guerdon resume {self.folder}`",
                self._signal,
            )


class _Position:
    """Where a run stands: in which loop, how many of its steps are done, and how many steps in all."""

    def __init__(self, loop: int = -1, done: int = 0, finished: bool = False, step: int = 0) -> None:
        self.loop, self.done, self.finished, self.step = loop, done, finished, step


def _peak_memory() -> dict[str, int]:
    """Highest memory use of the process so far (and of the current GPU), in bytes."""
    result: dict[str, int] = {}
    try:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        result["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:  # Windows
        pass
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        result["peak_gpu_memory"] = torch.cuda.max_memory_allocated()
    return result


def _lock(folder: Path) -> Any:
    """Keep other processes from writing to the run; returns what lets go (the system does so on a kill)."""
    try:
        import fcntl
    except ImportError:  # Windows
        return lambda: None
    with guard(folder):
        file = open(folder / ".lock", "a+b")  # noqa: SIM115 (held until the run ends)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise UsageError(
            f"{folder} is being written by another process; wait for it, or stop it, before resuming"
        ) from error
    except OSError:  # a file system without locks
        pass
    return cast(Any, file.close)
