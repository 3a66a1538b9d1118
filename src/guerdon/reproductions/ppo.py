"""The control baselines at the level of the best known implementations: PPO, A2C, DQN, SAC and TD3 at equal steps.

Each arm trains with the task's recipe and measures the policy's mode over fixed episodes. Arms that start with "sb3"
train Stable-Baselines3 with the same settings for the same number of steps, where it is installed.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guerdon import launch
from guerdon.reproductions.runner import Check, Results

TITLE = "Control baselines (PPO, A2C, DQN, SAC, TD3)"
CLAIM = (
    "PPO and DQN solve CartPole-v1, PPO, SAC and TD3 reach -200 on Pendulum-v1, and on HalfCheetah-v5 and Hopper-v5 PPO "
    "and SAC reach at equal steps what Stable-Baselines3 reaches with the same settings."
)
SEEDS = 3
# Fixed before the seeds that count were run.
THRESHOLDS = {
    "CartPole-v1, greedy return": 475.0,
    "Pendulum-v1, return": -200.0,
    "A2C on CartPole-v1, mean of the last 100 episodes": 150.0,
}
NOTES = (
    "Settings are those of RL Baselines3 Zoo where it has tuned ones, else the published defaults. MuJoCo arms are "
    "short (PPO 100,000 steps, SAC 10,000): they compare learning curves, not final scores."
)


def _train(seed: int, folder: Path, method: str, env: str, **options: Any) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    result = launch.train(
        method,
        env=env,
        name=folder.name,
        runs=folder.parent,
        seed=seed,
        progress=False,
        checkpoint_every=1e9,
        **options,
    )
    records = [r for r in launch.read_records(folder) if "reward" in r and "steps" in r]
    return {
        "return": result.after["reward"],
        "before": result.before["reward"],
        "recent": records[-1]["reward"],
        "steps": records[-1]["steps"],
        "seconds": result.seconds,
        "course": [[r["steps"], round(r["reward"], 2)] for r in records[:: max(1, len(records) // 60)]],
    }


def _arm(method: str, env: str, **options: Any) -> Callable[[int, Path], dict[str, Any]]:
    return lambda seed, folder: _train(seed, folder, method, env, **options)


_PPO_STEPS, _SAC_STEPS = 98_304, 10_000


def _sb3(algorithm: str, env: str, environments: int, steps: int) -> Callable[[int, Path], dict[str, Any]]:
    def arm(seed: int, folder: Path) -> dict[str, Any]:
        if importlib.util.find_spec("stable_baselines3") is None:
            return {"missing": "stable-baselines3 is not installed"}
        import stable_baselines3
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.evaluation import evaluate_policy

        found = torch.get_num_threads()
        torch.set_num_threads(1)
        venv = make_vec_env(env, environments, seed=seed)
        model = getattr(stable_baselines3, algorithm)("MlpPolicy", venv, seed=seed, device="cpu")
        model.learn(steps)
        returns, _ = evaluate_policy(model, make_vec_env(env, 1, seed=7_777), 10, return_episode_rewards=True)
        venv.close()
        torch.set_num_threads(found)
        recent = [e["r"] for e in model.ep_info_buffer]
        return {
            "return": float(np.mean(returns)),
            "recent": float(np.mean(recent)),
            "steps": model.num_timesteps,
        }

    return arm


_DEFAULT_PPO = {"rounds": 6}
_DEFAULT_SAC = {"steps": _SAC_STEPS, "start": 100}

ARMS: Mapping[str, Callable[[int, Path], dict[str, Any]]] = {
    "PPO CartPole-v1": _arm("ppo", "CartPole-v1"),
    "DQN CartPole-v1": _arm("dqn", "CartPole-v1"),
    "A2C CartPole-v1": _arm("a2c", "CartPole-v1", rounds=2500),
    "PPO Pendulum-v1": _arm("ppo", "Pendulum-v1", rounds=40),
    "SAC Pendulum-v1": _arm("sac", "Pendulum-v1", steps=10_000),
    "TD3 Pendulum-v1": _arm("td3", "Pendulum-v1", steps=10_000),
    "PPO HalfCheetah-v5": _arm("ppo", "HalfCheetah-v5", **_DEFAULT_PPO),
    "sb3 PPO HalfCheetah-v5": _sb3("PPO", "HalfCheetah-v5", 8, _PPO_STEPS),
    "PPO Hopper-v5": _arm("ppo", "Hopper-v5", **_DEFAULT_PPO),
    "sb3 PPO Hopper-v5": _sb3("PPO", "Hopper-v5", 8, _PPO_STEPS),
    "SAC HalfCheetah-v5": _arm("sac", "HalfCheetah-v5", **_DEFAULT_SAC),
    "sb3 SAC HalfCheetah-v5": _sb3("SAC", "HalfCheetah-v5", 1, _SAC_STEPS),
}


def judge(results: Results) -> list[Check]:
    """Solved tasks on each seed; beside the peer, the means over seeds."""
    checks: list[Check] = []
    for arm, name, key in (
        ("PPO CartPole-v1", "CartPole-v1, greedy return", "return"),
        ("DQN CartPole-v1", "CartPole-v1, greedy return", "return"),
        ("A2C CartPole-v1", "A2C on CartPole-v1, mean of the last 100 episodes", "recent"),
        ("PPO Pendulum-v1", "Pendulum-v1, return", "return"),
        ("SAC Pendulum-v1", "Pendulum-v1, return", "return"),
        ("TD3 Pendulum-v1", "Pendulum-v1, return", "return"),
    ):
        for seed, figures in results.get(arm, {}).items():
            label = name if arm.split()[0] in name else f"{arm.split()[0]}, {name}"
            checks.append(Check(label, figures[key], ">=", THRESHOLDS[name], seed))
    for arm in results:
        peer = results.get(f"sb3 {arm}", {})
        theirs = [f["recent"] for f in peer.values() if "recent" in f]
        if theirs:
            low = min(theirs) - 0.5 * (max(theirs) - min(theirs))
            ours = float(np.mean([f["recent"] for f in results[arm].values()]))
            checks.append(
                Check(
                    f"{arm}: mean return against the low end of Stable-Baselines3's",
                    ours,
                    ">=",
                    round(low, 1),
                )
            )
    return checks


def table(results: Results) -> list[list[str]]:
    """One row an arm: figures by seed."""
    rows = [["arm", "steps", "return of the mode", "last 100 episodes", "seconds"]]
    for arm, by_seed in results.items():
        figures = [f for f in by_seed.values() if "missing" not in f]
        if not figures:
            continue
        rows.append(
            [
                arm,
                f"{figures[0]['steps']:,.0f}",
                " / ".join(f"{f['return']:.0f}" for f in figures),
                " / ".join(f"{f['recent']:.0f}" for f in figures),
                " / ".join(f"{f.get('seconds', f['wall_seconds']):.0f}" for f in figures),
            ]
        )
    return rows


def draw(results: Results, path: Path) -> None:
    """Learning curves, a panel an environment."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from guerdon.run.plots import PALETTE, save

    environments = list(dict.fromkeys(arm.split()[-1] for arm in results))
    figure, axes = plt.subplots(
        1, len(environments), figsize=(3.6 * len(environments), 3.3), layout="constrained", squeeze=False
    )
    for panel, env in zip(axes[0], environments, strict=True):
        arms = [arm for arm in results if arm.split()[-1] == env]
        for colour, arm in zip(PALETTE, arms, strict=False):
            for i, f in enumerate(results[arm].values()):
                if "course" in f:
                    steps, reward = zip(*f["course"], strict=True)
                    panel.plot(
                        steps, reward, color=colour, linewidth=1.3, label=arm.split()[0] if i == 0 else None
                    )
                elif "recent" in f:
                    panel.plot(f["steps"], f["recent"], "x", color=colour, label="SB3" if i == 0 else None)
        panel.set(title=env, xlabel="environment steps")
    axes[0][0].set(ylabel="return, mean of 100 episodes")
    save(figure, path)
