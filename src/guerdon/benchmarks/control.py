"""Controllers beside Stable-Baselines3 (and JAX, where it is installed): same work, same threads, taking turns.

    guerdon bench control

Every pair runs in this process, one after the other, three times (five where short); medians. guerdon's updates are
compiled; the first compilation on a machine is done before the clock starts, and its time is told. Rates are steps of
the environment per second of the whole training loop, environment included, without the first round (which loads
the compiled functions); ``time to 475`` includes loading.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from guerdon import launch
from guerdon.benchmarks import row
from guerdon.errors import UsageError

REPEATS = 3


def _ours(
    method: str, env: str, threads: int, until: float | None = None, seed: int = 0, **options: Any
) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        result = launch.train(
            method,
            env=env,
            runs=folder,
            seed=seed,
            threads=threads,
            compile=True,
            progress=False,
            checkpoint_every=1e9,
            until=until,
            **options,
        )
        timings = [json.loads(line) for line in (result.folder / "timings.jsonl").read_text().splitlines()]
        records = launch.read_records(result.folder)
    return result, timings, [r for r in records if "steps" in r]


def _rate(method: str, env: str, threads: int, skip: int = 1, **options: Any) -> Callable[[int], float]:
    """Seconds a step of the environment, after ``skip`` rounds."""

    def measure(seed: int) -> float:
        _, timings, records = _ours(method, env, threads, seed=seed, **options)
        steps = records[len(timings) - 1]["steps"] - records[skip - 1]["steps"]
        return sum(t["step_seconds"] for t in timings[skip:]) / steps

    return measure


def _to_475(seed: int) -> float:
    """Seconds of training until the mean return of the last 100 episodes is 475, loading included."""
    result, _, records = _ours("ppo", "CartPole-v1", 1, until=475.0, seed=seed, rounds=1000)
    if records[-1]["reward"] < 475:
        raise UsageError(f"PPO did not reach 475 with seed {seed}")
    return result.seconds


# --- the other side ---------------------------------------------------------------------------------------


def _clock_after(steps: int) -> Any:
    """A Stable-Baselines3 callback that starts the clock after ``steps`` steps."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Clock(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.start: float | None = None
            self.at = 0

        def _on_step(self) -> bool:
            if self.start is None and self.num_timesteps >= steps:
                self.start, self.at = time.perf_counter(), self.num_timesteps
            return True

    return Clock()


def _sb3(
    algorithm: str, env: str, environments: int, threads: int, total: int, warm: int = 0, **options: Any
) -> Callable[[int], float]:
    """Seconds a step of Stable-Baselines3's ``algorithm``, after ``warm`` steps."""

    def measure(seed: int) -> float:
        import stable_baselines3
        from stable_baselines3.common.env_util import make_vec_env

        found = torch.get_num_threads()
        torch.set_num_threads(threads)
        venv = make_vec_env(env, environments, seed=seed)
        try:
            model = getattr(stable_baselines3, algorithm)(
                "MlpPolicy", venv, seed=seed, device="cpu", **options
            )
            clock = _clock_after(warm)
            start = time.perf_counter()
            model.learn(total, callback=clock)
            if warm:
                return (time.perf_counter() - clock.start) / (model.num_timesteps - clock.at)
            return (time.perf_counter() - start) / model.num_timesteps
        finally:
            venv.close()
            torch.set_num_threads(found)

    return measure


def _sb3_to_475(seed: int) -> float:
    import numpy as np
    import stable_baselines3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Until(BaseCallback):
        def _on_step(self) -> bool:
            ended = self.model.ep_info_buffer
            return not (len(ended) >= 20 and np.mean([e["r"] for e in ended]) >= 475)

    found = torch.get_num_threads()
    torch.set_num_threads(1)
    venv = make_vec_env("CartPole-v1", 8, seed=seed)
    try:
        # the settings of RL Baselines3 Zoo
        model = stable_baselines3.PPO(
            "MlpPolicy",
            venv,
            n_steps=32,
            batch_size=256,
            gae_lambda=0.8,
            gamma=0.98,
            n_epochs=20,
            learning_rate=lambda left: 1e-3 * left,
            clip_range=lambda left: 0.2 * left,
            seed=seed,
            device="cpu",
        )
        start = time.perf_counter()
        model.learn(200_000, callback=Until())
        return time.perf_counter() - start
    finally:
        venv.close()
        torch.set_num_threads(found)


def _plain_stream_q(seed: int) -> float:
    """Seconds a step of stream Q(lambda) as a plain PyTorch loop: autograd and a traced update for each step."""
    import gymnasium
    from torch import nn

    found = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(4, 32),
        nn.LayerNorm(32, elementwise_affine=False),
        nn.LeakyReLU(),
        nn.Linear(32, 32),
        nn.LayerNorm(32, elementwise_affine=False),
        nn.LeakyReLU(),
        nn.Linear(32, 2),
    )
    parameters = list(net.parameters())
    traces = [torch.zeros_like(p) for p in parameters]
    env = gymnasium.make("CartPole-v1")
    observation, _ = env.reset(seed=seed)
    state = torch.from_numpy(observation)
    steps = 3000
    start = time.perf_counter()
    for _ in range(steps):
        q = net(state)
        action = int(torch.randint(2, ())) if float(torch.rand(())) < 0.1 else int(q.argmax())
        observation, reward, terminated, truncated, _ = env.step(action)
        following = torch.from_numpy(observation)
        with torch.no_grad():
            target = reward + 0.99 * (0.0 if terminated or truncated else float(net(following).max()))
        gradients = torch.autograd.grad(q[action], parameters)
        error = target - float(q[action].detach())
        with torch.no_grad():
            total = 0.0
            for trace, gradient in zip(traces, gradients, strict=True):
                trace.mul_(0.99 * 0.8).add_(gradient)
                total += float(trace.abs().sum())
            size = 1.0 / max(1.0, max(abs(error), 1.0) * 2.0 * total)
            for parameter, trace in zip(parameters, traces, strict=True):
                parameter.add_(trace, alpha=size * error)
        if terminated or truncated:
            observation, _ = env.reset()
            following = torch.from_numpy(observation)
            for trace in traces:
                trace.zero_()
        state = following
    seconds = (time.perf_counter() - start) / steps
    torch.set_num_threads(found)
    env.close()
    return seconds


def _turns(ours: Callable[[int], float], other: Callable[[int], float]) -> tuple[float, float]:
    """Medians of `REPEATS` turns; the first call of ours (which may compile) is not counted."""
    ours(0)
    pairs = []
    for seed in range(REPEATS):
        mine = ours(seed)
        pairs.append((mine, other(seed)))
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def _cases() -> list[tuple[str, Callable[[int], float], str, Callable[[int], float], float]]:
    plain = {"schedule": "constant", "lr": 2.5e-4, "critic_lr": 2.5e-4, "gamma": 0.99, "lam": 0.95}
    default = {
        **plain,
        "lr": 3e-4,
        "critic_lr": 3e-4,
        "minibatch": 64,
        "epochs": 10,
        "samples": 16384,
        "environments": 8,
    }
    actor_critic = {"start": 100, "batch_size": 256, "environments": 1}
    dqn = {
        "start": 100,
        "update_every": 4,
        "updates": 1,
        "batch_size": 32,
        "hidden": (64, 64),
        "lr": 1e-4,
        "target_every": 10_000,
        "exploration": 0.1,
        "final_epsilon": 0.05,
    }
    peer = "Stable-Baselines3"
    return [
        (
            "PPO, CartPole-v1, training time to 475 (1 thread)",
            _to_475,
            f"{peer}, Zoo settings",
            _sb3_to_475,
            8.0,
        ),
        (
            "PPO, CartPole-v1, 8 x 128, 4 epochs x 4 minibatches, a step (1 thread)",
            _rate(
                "ppo",
                "CartPole-v1",
                1,
                rounds=101,
                samples=1024,
                minibatch=256,
                epochs=4,
                environments=8,
                **plain,
            ),
            peer,
            _sb3("PPO", "CartPole-v1", 8, 1, 65_536, n_steps=128, batch_size=256, n_epochs=4),
            4.0,
        ),
        (
            "PPO, CartPole-v1, 8 x 2048, batch 64, 10 epochs, a step (1 thread)",
            _rate("ppo", "CartPole-v1", 1, rounds=7, **default),
            peer,
            _sb3("PPO", "CartPole-v1", 8, 1, 49_152),
            4.0,
        ),
        (
            "PPO, HalfCheetah-v5, 8 environments, defaults, a step (1 thread)",
            _rate("ppo", "HalfCheetah-v5", 1, rounds=5, **default),
            peer,
            _sb3("PPO", "HalfCheetah-v5", 8, 1, 49_152),
            3.0,
        ),
        (
            "SAC, HalfCheetah-v5, an update a step, a step (2 threads)",
            _rate("sac", "HalfCheetah-v5", 2, steps=3000, **actor_critic),
            peer,
            _sb3("SAC", "HalfCheetah-v5", 1, 2, 1300, warm=300),
            1.7,
        ),
        (
            "TD3, HalfCheetah-v5, an update a step, a step (2 threads)",
            _rate("td3", "HalfCheetah-v5", 2, steps=3000, **actor_critic),
            peer,
            _sb3("TD3", "HalfCheetah-v5", 1, 2, 1300, warm=300, policy_kwargs={"net_arch": [256, 256]}),
            1.7,
        ),
        (
            "DQN, CartPole-v1, defaults, a step (1 thread)",
            _rate("dqn", "CartPole-v1", 1, steps=20_000, **dqn),
            peer,
            _sb3("DQN", "CartPole-v1", 1, 1, 11_000, warm=1000),
            4.0,
        ),
        (
            "stream Q, CartPole-v1, a step (1 thread)",
            _rate("stream_q", "CartPole-v1", 1, steps=20_000),
            "plain PyTorch loop",
            _plain_stream_q,
            3.0,
        ),
    ]


def run() -> list[dict[str, Any]]:
    """The rows of ``guerdon bench control``."""
    if importlib.util.find_spec("stable_baselines3") is None:
        raise UsageError("this benchmark runs beside Stable-Baselines3; pip install 'guerdon[bench]'")
    rows = []
    for work, ours, beside, other, target in _cases():
        mine, theirs = _turns(ours, other)
        rows.append(row(work, mine, beside, theirs, target))
        print(f"{work}: {theirs / mine:.2f}x", flush=True)
    return rows
