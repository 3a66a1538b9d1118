"""TRPO: the natural step against closed forms, and what it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.compiled import FlatWeights
from guerdon.engine.local import LocalEngine
from guerdon.errors import NonFiniteError, UsageError
from guerdon.methods.online.trpo import TRPO
from guerdon.objectives.mirror_descent import MirrorDescent
from guerdon.policies.control import Gaussian
from guerdon.policies.features import Entry, Features
from guerdon.policies.tabular import CategoricalTable
from guerdon.run import Run
from guerdon.tasks.bandit import Bandit
from guerdon.tasks.base import Pieces
from guerdon.tasks.control import Control
from guerdon.trust_region import conjugate_gradient, natural_step

SURROGATE = MirrorDescent(kl=0.0, reverse=True)


def table(contexts: int = 2, actions: int = 3) -> tuple[CategoricalTable, Trajectories]:
    """A softmax policy and every action of every context, weighted by its probability."""
    torch.manual_seed(0)
    policy = CategoricalTable([str(i) for i in range(contexts)], actions)
    with torch.no_grad():
        policy.logits.copy_(torch.randn(contexts, actions))
        probabilities = policy.logits.softmax(-1)
    rows = contexts * actions
    context = torch.arange(contexts).repeat_interleave(actions)[:, None]
    action = torch.arange(actions).repeat(contexts)[:, None]
    traj = Trajectories(
        inputs=TensorDict(
            {"step": TensorDict({"context": context, "action": action}, batch_size=[rows, 1])},
            batch_size=[rows],
        ),
        log_prob=torch.zeros(rows, 1),
        mask=torch.ones(rows, 1, dtype=torch.bool),
        advantage=actions * probabilities.reshape(rows, 1) * torch.randn(rows, 1),
    )
    with torch.no_grad():
        traj.log_prob, traj.reference = policy.log_prob(traj), policy.distribution(traj)
    return policy, traj


def fisher(policy: CategoricalTable) -> Tensor:
    """The Fisher matrix of a softmax table whose contexts are equally likely."""
    p = policy.logits.detach().softmax(-1)
    return torch.block_diag(*[(row.diag() - torch.outer(row, row)) / len(p) for row in p])


# --- the parts --------------------------------------------------------------------------------------------


def test_conjugate_gradient_solves_a_positive_definite_system() -> None:
    torch.manual_seed(0)
    root = torch.randn(8, 8, dtype=torch.float64)
    matrix, vector = root @ root.T + torch.eye(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    exact = torch.linalg.solve(matrix, vector)
    products = []

    def product(v: Tensor) -> Tensor:
        products.append(v)
        return matrix @ v

    assert torch.allclose(conjugate_gradient(product, vector, 8, tolerance=1e-20), exact, atol=1e-8)
    assert len(products) == 8
    near = conjugate_gradient(product, vector, 3)
    assert float((matrix @ near - vector).norm()) < float(vector.norm())
    assert torch.equal(
        conjugate_gradient(product, torch.zeros(8, dtype=torch.float64)), torch.zeros(8, dtype=torch.float64)
    )


def test_the_full_step_is_the_natural_gradient_of_length_max_kl() -> None:
    policy, traj = table()
    start = policy.logits.detach().clone().flatten()
    loss, _ = SURROGATE(policy, traj)
    (slope,) = torch.autograd.grad(loss, policy.logits)
    damping, max_kl = 0.01, 1e-3
    matrix = fisher(policy) + damping * torch.eye(6)
    direction = torch.linalg.solve(matrix, -slope.flatten())
    expected = (2 * max_kl / (direction @ matrix @ direction)).sqrt() * direction
    figures = natural_step(
        FlatWeights(policy), traj, SURROGATE, max_kl=max_kl, damping=damping, iterations=20, backtracks=0
    )
    assert torch.allclose(policy.logits.detach().flatten() - start, expected, atol=1e-5)
    assert float(figures["kl"]) == pytest.approx(
        max_kl, rel=0.2
    )  # the quadratic model holds for a small step
    assert float(figures["improvement"]) == pytest.approx(float(-slope.flatten() @ expected), rel=0.1)


def test_the_line_search_keeps_the_divergence_and_improves_the_surrogate() -> None:
    policy, traj = table()
    traj.advantage = 20.0 * traj.advantage
    before = float(SURROGATE(policy, traj)[0].detach())
    figures = natural_step(
        FlatWeights(policy), traj, SURROGATE, max_kl=0.5, damping=1e-3, iterations=20, shrink=0.5
    )
    after, metrics = SURROGATE(policy, traj)
    assert float(metrics["kl"]) <= 0.5
    assert float(figures["kl"]) == pytest.approx(float(metrics["kl"]), rel=1e-4)
    assert float(figures["step_share"]) in [0.5**i for i in range(1, 10)]  # the full step went too far
    assert float(figures["improvement"]) == pytest.approx(before - float(after.detach()), rel=1e-4)
    assert float(figures["improvement"]) > 0
    longer, traj = table()
    traj.advantage = 20.0 * traj.advantage
    free = natural_step(
        FlatWeights(longer), traj, SURROGATE, max_kl=0.5, damping=1e-3, iterations=20, backtracks=0
    )
    assert float(free["kl"]) > 0.5  # without the search


class Misleading:
    """A loss that looks like one thing by its slope and grows along it."""

    def __call__(self, policy: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        x = policy.logits - policy.logits.detach()
        return x.sum() + 1e6 * (policy.logits - self.start).square().sum(), {}

    def divergence(self, policy: Any, batch: Any) -> Tensor:
        return (policy.logits - self.start).square().sum()


def test_where_no_length_helps_the_weights_stay() -> None:
    policy, traj = table()
    objective = Misleading()
    objective.start = policy.logits.detach().clone()  # type: ignore[attr-defined]
    figures = natural_step(FlatWeights(policy), traj, objective, backtracks=5)
    assert torch.equal(policy.logits.detach(), objective.start)  # type: ignore[attr-defined]
    assert float(figures["step_share"]) == 0.0
    policy, traj = table()
    start = policy.logits.detach().clone()
    traj.advantage = torch.zeros_like(traj.advantage)
    assert float(natural_step(FlatWeights(policy), traj, SURROGATE)["step_share"]) == 0.0
    assert torch.equal(policy.logits.detach(), start)


def test_a_gradient_that_is_not_finite_and_options_that_make_no_sense_are_refused() -> None:
    policy, traj = table()
    start = policy.logits.detach().clone()
    traj.log_prob = torch.full_like(traj.log_prob, -1e4)
    with pytest.raises(NonFiniteError, match="unchanged"):
        natural_step(FlatWeights(policy), traj, SURROGATE)
    assert torch.equal(policy.logits.detach(), start)
    for wrong in ({"max_kl": 0.0}, {"shrink": 1.0}, {"iterations": 0}, {"damping": -1.0}, {"backtracks": -1}):
        with pytest.raises(UsageError, match="natural_step"):
            natural_step(FlatWeights(policy), traj, SURROGATE, **wrong)


def test_a_gaussian_network_moves_within_the_trust_region_whatever_the_scale_of_the_advantages() -> None:
    moved = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(0)
        policy = Gaussian(
            Features({"": Entry((3,))}, (16, 16), "tanh"), [-1.0] * 2, [1.0] * 2, init="default"
        )
        observation = torch.randn(256, 1, 3)
        with torch.no_grad():
            action = policy.act(observation, torch.randn(256, 1, 2))["action"]
        step = TensorDict({"observation": observation, "action": action}, batch_size=[256, 1])
        traj = Trajectories(
            inputs=TensorDict({"step": step}, batch_size=[256]),
            log_prob=torch.zeros(256, 1),
            mask=torch.ones(256, 1, dtype=torch.bool),
            advantage=scale * (action[..., 0] - observation[..., 1]),
        )
        with torch.no_grad():
            traj.log_prob, traj.reference = policy.log_prob(traj), policy.distribution(traj)
        figures = natural_step(FlatWeights(policy), traj, SURROGATE, max_kl=0.01)
        assert 0.003 < float(figures["kl"]) <= 0.01
        moved.append(FlatWeights(policy).flat.clone())
    assert torch.allclose(moved[0], moved[1], atol=1e-4)


# --- the method -------------------------------------------------------------------------------------------


def learn(method: Any, task: Any, folder: Path) -> tuple[dict[str, float], dict[str, float], list[Any]]:
    """Figures before and after training, and the records of the run."""
    engine, settings = LocalEngine("cpu", threads=1), method.roles()
    torch.manual_seed(0)
    policy = task.policy(task.policy_kinds()[0])
    roles = {
        "actor": engine.role("actor", policy, settings=settings["actor"]),
        "critic": engine.role("critic", task.critic(policy), settings=settings["critic"]),
    }
    before = task.measure(roles["actor"], task.feedback()).figures
    records: list[Any] = []
    with Run(folder / "run", engine=engine, seed=0, progress=False, checkpoint_every=1e9) as run:
        log = run.log
        run.log = lambda **values: (records.append(values), log(**values))  # type: ignore[method-assign]
        for name, role in roles.items():
            run.adopt(name, role)
        method.train(run, experience=task.experience(0), feedback=task.feedback(), **roles)
    engine.close()
    return before, task.measure(roles["actor"], task.feedback()).figures, records


def test_a_bandit_is_solved(tmp_path: Path) -> None:
    method = TRPO(rounds=30, samples=256, max_kl=0.1, damping=1e-3, critic_lr=0.05)
    before, after, records = learn(method, Bandit(), tmp_path)
    assert before["expected"] == pytest.approx(Bandit.uniform, abs=1e-5)
    assert after["expected"] > Bandit.uniform + 0.9 * (Bandit.best - Bandit.uniform)
    assert all(float(r["kl"]) <= 0.1 for r in records)


def test_a_pole_is_balanced_longer(tmp_path: Path) -> None:
    method = TRPO(rounds=12, samples=1024, environments=8, max_kl=0.02, critic_lr=1e-3)
    task = Control(Pieces(env="CartPole-v1"), method)
    before, after, _ = learn(method, task, tmp_path)
    assert after["reward"] > 4 * before["reward"]
    assert after["reward"] > 80
