"""Whole episodes of a controller: what it earns, and a film of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import SyncVectorEnv, VectorWrapper
from PIL import Image

from guerdon.errors import GuerdonError, ShapeError, UsageError
from guerdon.experience.environments import Environments
from guerdon.policies.control import Controller
from guerdon.policies.features import Features, describe
from guerdon.randomness import mix

_WIDTH = 320  # pixels of a film
_FRAMES = 1000  # of a film at most
_GIF_RATE = 25  # pictures a second: viewers slow down quicker ones


@dataclass(frozen=True)
class Episodes:
    """Whole episodes: undiscounted ``returns``, ``lengths`` in steps, and ``successes`` where the environment says so
    (None where it does not), each in the order in which the episodes ended."""

    returns: list[float]
    lengths: list[int]
    successes: list[bool] | None = None

    def figures(self) -> dict[str, float]:
        """Mean, standard deviation (of the episodes, not of the mean), least and greatest return; mean length; the
        share that succeeded, if known."""
        figures = {
            "return": float(np.mean(self.returns)),
            "std": float(np.std(self.returns)),
            "min": min(self.returns),
            "max": max(self.returns),
            "length": float(np.mean(self.lengths)),
        }
        if self.successes is not None:
            figures["success"] = float(np.mean(self.successes))
        return figures


@torch.no_grad()
def evaluate(
    policy: Controller,
    environments: Environments,
    episodes: int,
    deterministic: bool = True,
    seed: int = 0,
    film: Film | None = None,
) -> Episodes:
    """Act for ``episodes`` whole episodes, the first that each environment begins.

    Args:
        policy: acts by its mode, or with its noise if not ``deterministic``.
        environments: reset first. Episodes are shared out evenly among them, so that short ones do not count
            more often.
        seed: of the noise.
        film: shows the counted episodes of the first environment.

    Raises:
        UsageError: no episodes are asked for, or an environment that gives no picture is to be filmed.
        ShapeError: the controller reads other observations than these environments show.
    """
    if episodes < 1:
        raise UsageError(f"{episodes} episodes were asked for; at least 1 is needed")
    _check(policy, environments)
    act = policy.actor()
    kind, size = policy.noise
    random = np.random.Generator(np.random.PCG64(mix(seed, 0xE7A1)))
    n = environments.n
    quota = np.full(n, episodes // n)
    quota[: episodes % n] += 1
    returns: list[float] = []
    lengths: list[int] = []
    successes: list[bool | None] = []
    total, length = np.zeros(n), np.zeros(n, dtype=np.int64)
    succeeded = _successes(environments)
    observation = environments.reset()
    while quota.any():
        if film is not None and quota[0]:
            film.shoot(environments)
        noise = None
        if not deterministic:
            draws: dict[str, Any] = {
                "normal": random.standard_normal,
                "gumbel": lambda shape: random.gumbel(size=shape),
                "uniform": random.random,
            }
            noise = draws[kind]((n, size)).astype(np.float32)
        step = environments.step(act(observation, noise)["action"])
        if hasattr(act, "begin"):  # it remembers what it did before in each row
            act.begin(step.terminated | step.truncated)
        total += step.reward
        length += 1
        for row in np.flatnonzero(step.terminated | step.truncated):
            if quota[row]:
                returns.append(float(total[row]))
                lengths.append(int(length[row]))
                successes.append(succeeded(int(row)))
                quota[row] -= 1
            total[row], length[row] = 0.0, 0
        observation = step.observation
    environments.finished()
    known = [bool(success) for success in successes if success is not None]
    return Episodes(returns, lengths, known if len(known) == episodes else None)


def _check(policy: Controller, environments: Environments) -> None:
    shown = describe(environments.observation_space)
    if isinstance(policy.features, Features):
        read = policy.features.entries
        fits = read == shown
    else:  # a network of another make, on one array
        read = getattr(policy.features, "shape", ())
        read = (read[0] - 1,) if getattr(policy, "timed", False) else read
        fits = list(shown) == [""] and shown[""].shape == tuple(read)
    if not fits:
        raise ShapeError(
            f"the controller reads observations {_short(read)}, but {environments.id} shows {_short(shown)}; it acts "
            "only in environments like the one that it was trained in"
        )


def _short(entries: Any) -> str:
    if not isinstance(entries, dict):
        return str(list(entries))
    parts = [f"{name} {entry.kind} {list(entry.shape)}".replace("_", "-") for name, entry in entries.items()]
    return ", ".join(part.strip() for part in parts)


# --- success ----------------------------------------------------------------------------------------------


def _told(info: dict[str, Any]) -> Any:
    """What an info says of success, under either of the names in use."""
    return info.get("is_success", info.get("success"))


class _Row(gymnasium.Wrapper):
    """Remembers what one environment told of success; a reset does not make it forget."""

    told: Any = None

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        self.told = _told(result[4])
        return result


class _Rows(VectorWrapper):
    """The same for environments that are stepped together; ``told`` has one entry for each."""

    told: Any = None

    def step(self, actions: Any) -> Any:
        result = self.env.step(actions)
        self.told = _told(result[4])
        return result


def _successes(environments: Environments) -> Callable[[int], Any]:
    """A function that says whether the episode which just ended in a row was a success, by the info of its last
    step; None where it does not say. `Environments` passes no infos on, so they are read below it."""
    inside = environments.env
    if isinstance(inside, SyncVectorEnv):
        rows: list[Any] = list(inside.envs)
        for row in rows:
            if not isinstance(row.env, _Row):
                row.env = _Row(row.env)
        return lambda row: rows[row].env.told
    if not isinstance(inside, _Rows):
        environments.env = inside = _Rows(inside)
    return lambda row: None if inside.told is None else inside.told[row]


# --- films ------------------------------------------------------------------------------------------------


class Film:
    """Pictures of the first environment, one after the other, as a GIF or an MP4.

    It is 320 pixels wide and keeps at most 1,000 pictures; a GIF shows at most 25 a second, at the environment's speed.

    Args:
        path: ends in ``.gif``, or in ``.mp4`` where imageio-ffmpeg is installed.

    Attributes:
        frames: how many pictures were kept.

    Raises `UsageError` for any other ending, for a missing folder, and where imageio-ffmpeg is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.kind = self.path.suffix.lower()
        if self.kind not in (".gif", ".mp4"):
            raise UsageError(f"a film is a .gif or an .mp4, not '{path}'; give it such a name")
        if not self.path.parent.is_dir():
            raise UsageError(
                f"there is no folder {self.path.parent} to write '{self.path.name}' into; make it first"
            )
        if self.kind == ".mp4":
            try:
                import imageio_ffmpeg  # noqa: F401
            except ImportError as error:
                raise UsageError(
                    "an .mp4 needs imageio-ffmpeg: pip install imageio-ffmpeg, or write a .gif"
                ) from error
        self.frames = 0
        self._seen = 0
        self._every = 0
        self._rate = 0.0
        self._pictures: list[Any] = []  # of a GIF
        self._writer: Any = None  # of an MP4

    def shoot(self, environments: Environments) -> None:
        """Keep what the first environment shows now (or every second or third picture, for a GIF of a quick one).

        Raises `UsageError` where it shows nothing, or no off-screen OpenGL is at hand."""
        if not self._every:
            rate = _rate(environments)
            self._every = math.ceil(rate / _GIF_RATE) if self.kind == ".gif" else 1
            self._rate = rate / self._every
        self._seen += 1
        if (self._seen - 1) % self._every or self.frames == _FRAMES:
            return
        picture = Image.fromarray(_render(environments)).convert("RGB")
        width = min(_WIDTH, picture.width) // 2 * 2
        height = max(round(picture.height * width / picture.width) // 2, 1) * 2  # even, as video wants it
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        self.frames += 1
        if self.kind == ".gif":
            self._pictures.append(picture.quantize(128, dither=Image.Dither.NONE))
            return
        if self._writer is None:
            import imageio_ffmpeg

            self._writer = imageio_ffmpeg.write_frames(
                str(self.path), picture.size, fps=self._rate, macro_block_size=2
            )
            self._writer.send(None)
        self._writer.send(picture.tobytes())

    def save(self) -> None:
        """Finish the file. Raises `UsageError` when it cannot be written, or nothing was shot."""
        if not self.frames:
            raise UsageError(f"nothing was filmed for '{self.path}'; evaluate at least one episode")
        try:
            if self.kind == ".mp4":
                self._writer.close()
                return
            first, *others = self._pictures
            duration = 10 * max(round(100 / self._rate), 2)  # milliseconds; the format counts in hundredths
            first.save(self.path, save_all=True, append_images=others, duration=duration, loop=0)
        except OSError as error:
            raise UsageError(f"cannot write the film to '{self.path}': {error}") from error


def _render(environments: Environments) -> np.ndarray:
    with warnings.catch_warnings():  # OpenGL libraries warn before they fail; the error says it all
        warnings.simplefilter("ignore")
        try:
            return environments.render()
        except GuerdonError:
            raise
        except Exception as error:  # each library fails in a way of its own
            raise UsageError(
                f"{environments.id} cannot be drawn ({type(error).__name__}: {error}); where it draws by MuJoCo, set "
                "MUJOCO_GL=egl or MUJOCO_GL=osmesa before the program starts"
            ) from error


def _rate(environments: Environments) -> float:
    """Steps a second at which an environment wants to be shown; 30 where nothing says so."""
    rate = environments.env.metadata.get("render_fps")
    if rate is None and environments.id in gymnasium.registry:
        entry: Any = gymnasium.registry[environments.id].entry_point
        creator = load_env_creator(entry) if isinstance(entry, str) else entry
        rate = getattr(creator, "metadata", {}).get("render_fps")
    return float(rate or 30)
