"""Many copies of one MuJoCo model, stepped together on a few threads.

Each copy keeps its own ``mjData``, so that all that one step hands to the next (the solver's warm start) and all that
a robot reads after it (contact forces, body positions of the last Runge-Kutta stage) is what MuJoCo itself leaves
there. ``mujoco.rollout`` has one ``mjData`` a thread, returns neither, and is no quicker: a call of ``mj_step``
costs about a microsecond in Python and 25 in MuJoCo, which runs it without Python's lock.
"""

from __future__ import annotations

import os
import queue
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import mujoco
import numpy as np

# the complete input of a step, warm start included; FULLPHYSICS lacks it
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION

# a thread woken for a single robot hardly earns what waking it costs
_ROWS_PER_THREAD = 2

Reader = Callable[[mujoco.MjData], Sequence[np.ndarray]]


def load(path: str) -> mujoco.MjModel:
    """The model in the XML file at ``path``, without MuJoCo's word about HalfCheetah's ``settotalmass``, which would
    come at every start, be written into the working directory too, and is not the user's to mend."""

    def pass_on(message: str) -> None:
        if "settotalmass" not in message:
            warnings.warn(message, stacklevel=2)

    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(pass_on)
    try:
        return mujoco.MjModel.from_xml_path(path)
    finally:
        mujoco.set_mju_user_warning(before)


class Physics:
    """``n`` copies of ``model``, of up to half a megabyte each.

    Args:
        model: shared by all copies.
        n: how many copies.
        substeps: MuJoCo's steps in one `step`.
        reader: the arrays of one copy's data that `read` returns, as views.
        contact_forces: whether ``cfrc_ext`` is among them: MuJoCo computes it only when asked.
        threads: as in `make_locomotion`.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        n: int,
        substeps: int,
        reader: Reader,
        contact_forces: bool,
        threads: int | None,
    ) -> None:
        self.model = model
        self.data = [mujoco.MjData(model) for _ in range(n)]
        self.threads = min(threads or min(os.cpu_count() or 1, max(1, n // _ROWS_PER_THREAD)), n)
        self._settings = (model, substeps, contact_forces)
        # taking an attribute of mjData makes a new array object every time, so the views are kept
        self._controls = [data.ctrl for data in self.data]
        self._views = [view.reshape(-1) for data in self.data for view in reader(data)]
        self._shape = (n, -1)
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(self.threads - 1):
            threading.Thread(target=_work, args=(self._inbox, self._outbox), daemon=True).start()
        self._finalizer = weakref.finalize(self, _stop, self._inbox, self.threads - 1)

    def step(self, controls: np.ndarray) -> None:
        """Hold ``controls [n, nu]`` for a step's time in all copies."""
        for row, control in enumerate(self._controls):
            control[:] = controls[row]
        job = (deque(self.data), *self._settings)
        for _ in range(self.threads - 1):
            self._inbox.put(job)
        error = None
        try:
            error = _advance(*job)
        finally:  # not even an interrupt leaves a thread at work
            for _ in range(self.threads - 1):
                error = self._outbox.get() or error
        if error is not None:
            raise error

    def close(self) -> None:
        """End the threads; the calling one can still step."""
        self._finalizer()
        self.threads = 1

    def read(self) -> np.ndarray:
        """The reader's arrays of every copy, flattened side by side: float64 ``[n, width]``, fresh."""
        return np.concatenate(self._views).reshape(self._shape)

    def place(self, row: int, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Put copy ``row`` at ``qpos``, ``qvel``, as if it had never moved."""
        data = self.data[row]
        mujoco.mj_resetData(self.model, data)
        data.qpos[:] = qpos
        data.qvel[:] = qvel
        mujoco.mj_forward(self.model, data)

    def state(self) -> np.ndarray:
        """float64 ``[n, size]``: all that the next steps depend on."""
        state = np.empty((len(self.data), mujoco.mj_stateSize(self.model, _STATE)))
        for data, row in zip(self.data, state, strict=True):
            mujoco.mj_getState(self.model, data, row, _STATE)
        return state

    def set_state(self, state: np.ndarray) -> None:
        """Go on from ``state``."""
        for data, row in zip(self.data, state, strict=True):
            mujoco.mj_resetData(self.model, data)
            mujoco.mj_setState(self.model, data, row, _STATE)
            mujoco.mj_forward(self.model, data)  # body positions, for pictures; it disturbs the warm start
            mujoco.mj_setState(self.model, data, row, _STATE)


def _advance(
    rows: deque[mujoco.MjData], model: mujoco.MjModel, substeps: int, contact_forces: bool
) -> Exception | None:
    """Step the copies that are left in ``rows``; what MuJoCo raised, if it did."""
    step, finish = mujoco.mj_step, mujoco.mj_rnePostConstraint
    try:
        while rows:
            data = rows.popleft()  # several threads take from one deque: whoever is free has the next
            step(model, data, substeps)
            if contact_forces:
                finish(model, data)
    except IndexError:  # another thread took the last one in between
        pass
    except Exception as error:
        return error
    return None


def _work(inbox: queue.SimpleQueue, outbox: queue.SimpleQueue) -> None:
    """A thread's life: step what comes in until None comes."""
    while (job := inbox.get()) is not None:
        outbox.put(_advance(*job))


def _stop(inbox: queue.SimpleQueue, workers: int) -> None:
    for _ in range(workers):
        inbox.put(None)
