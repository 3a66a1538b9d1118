"""Episodes are counted as they should be, and films show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from PIL import Image

from guerdon.errors import ShapeError, UsageError
from guerdon.evaluation import control
from guerdon.evaluation.control import Episodes, Film, evaluate
from guerdon.experience.environments import Environments, make
from guerdon.policies.control import Categorical, Deterministic, Gaussian
from guerdon.policies.features import Entry, Features
from guerdon.policies.small import SmallController, SmallNetwork


class Corridor(gymnasium.Env):
    """Walk right to the end; each step pays its action, the length is drawn at reset. Reaching the end within six
    steps is a success."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012
    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, tells: str | None = "is_success", render_mode: str | None = None) -> None:
        self.tells, self.render_mode = tells, render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.length, self.steps = int(self.np_random.integers(2, 12)), 0
        return np.array([self.length, self.steps], np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.steps += 1
        over = self.steps == self.length
        info = {} if self.tells is None else {self.tells: over and self.length <= 6}
        return np.array([self.length, self.steps], np.float32), float(action[0]), over, False, info

    def render(self) -> np.ndarray:
        picture = np.full((100, 201, 3), 255, np.uint8)
        picture[:, : 10 * self.steps] = (200, 30, 30)
        return picture


def corridor(n: int, seed: int = 3, **options: Any) -> Environments:
    return make(Corridor, n, seed, **options)


def halves() -> Deterministic:
    """Always half of the range, 0.5."""
    policy = Deterministic(Features({"": Entry((2,))}, (4,)), [-1.0], [1.0], exploration=0.3)
    with torch.no_grad():
        policy.head.weight.zero_()
        policy.head.bias.fill_(np.arctanh(0.5))
    return policy


def lengths_by_hand(n: int, episodes: int, seed: int = 3) -> list[list[int]]:
    """Lengths of each environment's first episodes, from the environments alone."""
    environments = corridor(n, seed)
    environments.reset()
    found: list[list[int]] = [[] for _ in range(n)]
    began, t = [0] * n, 0
    while min(map(len, found)) < episodes:
        t += 1
        step = environments.step(np.zeros((n, 1)))
        for row in np.flatnonzero(step.terminated):
            found[row].append(t - began[row])
            began[row] = t
    return found


def test_each_environment_plays_its_share_however_short_its_episodes_are() -> None:
    played = evaluate(halves(), corridor(3), 8)
    by_hand = lengths_by_hand(3, 3)
    assert sorted(played.lengths) == sorted(by_hand[0][:3] + by_hand[1][:3] + by_hand[2][:2])
    assert played.returns == pytest.approx([0.5 * length for length in played.lengths])
    assert played.successes == [length <= 6 for length in played.lengths]
    assert 0 < sum(played.successes) < 8


@pytest.mark.parametrize(("tells", "known"), [("is_success", True), ("success", True), (None, False)])
def test_success_is_known_where_the_environment_tells(tells: str | None, known: bool) -> None:
    played = evaluate(halves(), corridor(2, tells=tells), 5)
    assert (played.successes is not None) == known
    assert ("success" in played.figures()) == known


def test_success_is_read_from_environments_that_are_stepped_together() -> None:
    class Together(Corridor):
        pass

    inner = gymnasium.vector.SyncVectorEnv(
        [Together] * 3, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP
    )

    class Vector(gymnasium.vector.VectorWrapper):
        """Tells as an environment does that computes all rows at once."""

        def step(self, actions: Any) -> Any:
            steps = [env.steps + 1 for env in self.env.envs]
            lengths = [env.length for env in self.env.envs]
            observation, reward, terminated, truncated, infos = self.env.step(actions)
            told = {"success": np.array([s == n <= 6 for s, n in zip(steps, lengths, strict=True)])}
            kept = {"final_obs": infos["final_obs"]} if "final_obs" in infos else {}
            return observation, reward, terminated, truncated, {**kept, **told}

    played = evaluate(halves(), Environments(Vector(inner), "together", 3, "array"), 6)
    assert played.successes == [length <= 6 for length in played.lengths]


def test_environments_may_be_used_again() -> None:
    environments = corridor(2)
    assert evaluate(halves(), environments, 2).successes is not None
    again = evaluate(halves(), environments, 6)
    assert again.successes == [length <= 6 for length in again.lengths]
    assert environments.finished() == []


def test_noise_follows_from_the_seed() -> None:
    def returns(seed: int, deterministic: bool = False) -> list[float]:
        return evaluate(halves(), corridor(2), 4, deterministic, seed).returns

    assert returns(0) == returns(0)
    assert returns(0) != returns(1)
    assert returns(0, deterministic=True) == returns(1, deterministic=True)


@pytest.mark.parametrize(
    "policy",
    [
        Categorical(Features({"": Entry((4,))}, (8,)), 2),
        SmallController(SmallNetwork((5,), 2, (8, 8)), "choice", timed=True),
    ],
)
@pytest.mark.parametrize("deterministic", [True, False])
def test_other_controllers_play_too(policy: Any, deterministic: bool) -> None:
    played = evaluate(policy, make("CartPole-v1", 2, 0), 3, deterministic)
    assert played.returns == played.lengths  # one point a step
    assert played.successes is None


def test_figures() -> None:
    played = Episodes([1.0, 3.0, 8.0], [10, 20, 60], [True, False, False])
    assert played.figures() == pytest.approx(
        {"return": 4.0, "std": np.std([1, 3, 8]), "min": 1.0, "max": 8.0, "length": 30.0, "success": 1 / 3}
    )


def test_refusals() -> None:
    with pytest.raises(UsageError, match="0 episodes were asked for; at least 1"):
        evaluate(halves(), corridor(1), 0)
    with pytest.raises(
        ShapeError, match=r"reads observations vector \[2\], but CartPole-v1 shows vector \[4\]"
    ):
        evaluate(halves(), make("CartPole-v1", 1, 0), 1)
    timed = SmallController(SmallNetwork((4,), 2, (8,)), "choice", timed=True)
    with pytest.raises(ShapeError, match=r"reads observations \[3\], but CartPole-v1 shows vector \[4\]"):
        evaluate(timed, make("CartPole-v1", 1, 0), 1)
    policy = Gaussian(Features({"": Entry((2,))}, ()), [-1.0] * 2, [1.0] * 2)
    with pytest.raises(ShapeError, match="takes actions of shape"):
        evaluate(policy, corridor(1), 1)


# --- films ------------------------------------------------------------------------------------------------


def test_a_gif_shows_the_counted_episodes_of_the_first_environment(tmp_path: Path) -> None:
    film = Film(tmp_path / "film.gif")
    played = evaluate(halves(), corridor(2, render_mode="rgb_array"), 4, film=film)
    film.save()
    steps = sum(lengths_by_hand(2, 2)[0][:2])  # of the first environment's two episodes
    assert sum(played.lengths) > steps
    assert film.frames == (steps + 1) // 2  # of 50 steps a second every other one is shown
    with Image.open(tmp_path / "film.gif") as picture:
        assert picture.size == (200, 100)
        # Pillow joins pictures that are equal; those of one episode are not
        shown, duration = 0, 0
        for index in range(picture.n_frames):
            picture.seek(index)
            duration += picture.info["duration"]
            red = np.asarray(picture.convert("RGB"))[50, :, 1] < 100
            shown = max(shown, int(red.sum()))
        assert duration == 40 * film.frames
    longest = max(lengths_by_hand(2, 2)[0][:2])
    assert 10 * (longest - 2) - 2 <= shown <= 10 * (longest - 1) + 2


def test_a_film_ends_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_FRAMES", 3)
    film = Film(tmp_path / "film.gif")
    evaluate(halves(), corridor(1, render_mode="rgb_array"), 5, film=film)
    assert film.frames == 3


def test_mp4(tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    film = Film(tmp_path / "film.mp4")
    evaluate(halves(), corridor(1, render_mode="rgb_array"), 3, film=film)
    film.save()
    frames, _ = ffmpeg.count_frames_and_secs(str(tmp_path / "film.mp4"))
    assert frames == film.frames == sum(lengths_by_hand(1, 3)[0][:3])


def test_classic_control_is_filmed_at_its_own_speed(tmp_path: Path) -> None:
    pytest.importorskip("pygame")
    environments = make("Pendulum-v1", 1, 0, max_episode_steps=8)
    film = Film(tmp_path / "film.gif")
    policy = Deterministic(Features({"": Entry((3,))}, (4,)), [-2.0], [2.0])
    evaluate(policy, environments, 1, film=film)
    film.save()
    with Image.open(tmp_path / "film.gif") as picture:
        assert picture.size == (320, 320)
        assert picture.info["duration"] == 70  # 30 a second, every other one, in hundredths


def test_films_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"a film is a .gif or an .mp4, not 'film.avi'"):
        Film("film.avi")
    with pytest.raises(UsageError, match="there is no folder no/such"):
        Film("no/such/film.gif")
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
        with pytest.raises(UsageError, match=r"pip install imageio-ffmpeg, or write a \.gif"):
            Film(tmp_path / "film.mp4")
    film = Film(tmp_path / "film.gif")
    with pytest.raises(UsageError, match="nothing was filmed"):
        film.save()
    monkeypatch.setattr(Corridor, "render", lambda self: None)
    with pytest.raises(UsageError, match="Corridor gives no picture"):
        evaluate(halves(), corridor(1), 1, film=film)

    def fails(self: Any) -> None:
        raise RuntimeError("no display")

    monkeypatch.setattr(Corridor, "render", fails)
    with pytest.raises(UsageError, match=r"cannot be drawn \(RuntimeError: no display\).*MUJOCO_GL=egl"):
        evaluate(halves(), corridor(1), 1, film=film)
    assert not list(tmp_path.iterdir())
