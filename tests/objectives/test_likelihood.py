"""Weighted likelihood: what is which published method, by hand, in any split."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guerdon.batch import Trajectories, pad_steps
from guerdon.errors import ShapeError, UsageError
from guerdon.objectives.likelihood import WeightedLikelihood, clipped_ratio
from guerdon.objectives.policy_gradient import Reinforce
from guerdon.objectives.sides import with_reference
from guerdon.optim import Adam
from guerdon.policies.language import LanguagePolicy
from guerdon.policies.tabular import CategoricalTable
from guerdon.roles import Role, RoleSettings
from guerdon.tasks.tokens import tiny_llama, tokenizer

LENGTHS = [3, 1, 4, 0, 2]
A_LOL: dict[str, dict[str, Any]] = {
    "sequence": {"importance": "sequence"},
    "ref-free": {},
    "seq": {"importance": "token"},
    "KL": {"kl": 0.1},
}
OBJECTIVES = [
    WeightedLikelihood(),
    WeightedLikelihood("trajectory", by="advantage", positive=True),
    WeightedLikelihood("sum", by="reward", gold=0.1),
    *(WeightedLikelihood("sum", by="advantage", **options) for options in A_LOL.values()),
    WeightedLikelihood("constant", importance="token", clip=None),
]


class Table(nn.Module):
    """Log-probabilities themselves as parameters."""

    def __init__(self, log_prob: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(log_prob.clone())

    def log_prob(self, traj: Trajectories) -> Tensor:
        return torch.where(traj.mask, self.values, 0.0)


def drawn(batch: Any) -> tuple[Table, Trajectories]:
    traj = batch(LENGTHS, seed=1)
    policy = Table(
        traj.reference_log_prob + 0.8 * torch.randn(5, 4, generator=torch.Generator().manual_seed(5))
    )
    return policy, traj


def run(
    policy: Any, traj: Trajectories, *args: Any, **options: Any
) -> tuple[float, Tensor, dict[str, float]]:
    policy.zero_grad()
    loss, metrics = WeightedLikelihood(*args, **options)(policy, traj)
    (slope,) = torch.autograd.grad(loss, next(iter(policy.parameters())))
    assert all(v.ndim == 0 and not v.requires_grad for v in metrics.values())
    return loss.item(), slope, {name: float(v) for name, v in metrics.items()}


# --- which is what ----------------------------------------------------------------------------------------


def test_supervised_fine_tuning_is_the_mean_over_all_tokens_of_the_batch(batch: Any) -> None:
    policy, traj = drawn(batch)
    values = policy.values.detach()
    tokens = [float(values[i, t]) for i, n in enumerate(LENGTHS) for t in range(n)]
    loss, slope, metrics = run(policy, traj)
    assert loss == pytest.approx(-sum(tokens) / 10)
    assert metrics == pytest.approx({"loss": loss, "nll": loss})
    torch.testing.assert_close(slope, -traj.mask.float() / 10)


def test_it_is_the_cross_entropy_of_a_language_model_on_answer_tokens_only() -> None:
    policy = LanguagePolicy(tiny_llama(width=16, layers=1), tokenizer())
    prompts, answers = [[2, 3], [4]], [[5, 6, 0], [7, 0]]
    loss, _ = WeightedLikelihood()(policy, policy.collate(prompts, answers))
    ids = torch.tensor([[2, 3, 5, 6, 0], [4, 7, 0, 0, 0]])
    seen = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, 5, 6, 0], [-100, 7, 0, -100, -100]])
    expected = policy.model(input_ids=ids, attention_mask=seen, labels=labels).loss
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", A_LOL)
def test_advantage_leftover_forms_by_hand(name: str, batch: Any) -> None:
    policy, traj = drawn(batch)
    advantage = torch.tensor([0.7, 0.2, 1.5, 0.4, 0.9])
    traj.advantage = traj.per_step(advantage)
    loss, _, _ = run(policy, traj, "sum", by="advantage", clip=0.3, **A_LOL[name])
    values, base = policy.values.detach(), traj.reference_log_prob
    total = 0.0
    for i, n in enumerate(LENGTHS):
        ratios = [float(values[i, t] - base[i, t]) for t in range(n)]
        nll = [-float(values[i, t]) for t in range(n)]
        clamp = lambda x: min(max(x, 0.7), 1.3)
        rho = {
            "sequence": [clamp(math.exp(sum(ratios)))] * n,
            "seq": [clamp(math.exp(r)) for r in ratios],
        }.get(name, [1.0] * n)
        total += float(advantage[i]) * sum(r * x for r, x in zip(rho, nll, strict=True))
        total += 0.1 * sum(ratios) if name == "KL" else 0.0
    assert loss == pytest.approx(total / 4, rel=1e-5)  # the row without steps is no trajectory


def test_at_the_reference_all_advantage_leftover_forms_have_one_gradient(batch: Any) -> None:
    _, traj = drawn(batch)
    slopes = []
    for options in (A_LOL["sequence"], A_LOL["ref-free"], A_LOL["seq"]):
        policy = Table(traj.reference_log_prob)
        _, slope, metrics = run(policy, traj, "sum", by="advantage", **options)
        slopes.append(slope)
        assert metrics.get("rho", 1.0) == pytest.approx(1.0)
        assert metrics.get("clip_fraction", 0.0) == 0.0
    torch.testing.assert_close(slopes[1], slopes[0])
    torch.testing.assert_close(slopes[2], slopes[0])


def test_clip_is_a_clamp_that_keeps_a_gradient(batch: Any) -> None:
    """Not the minimum of two branches as in PPO: beyond the range the likelihood still moves, at 1 - clip or 1 + clip."""
    traj = batch([1, 1], seed=0, reference_log_prob=torch.tensor([[-1.0], [-4.0]]))
    traj.advantage = torch.ones(2, 1)
    policy = Table(torch.tensor([[-4.0], [-1.0]]))
    _, slope, metrics = run(policy, traj, "sum", by="advantage", importance="sequence")
    torch.testing.assert_close(slope, torch.tensor([[-0.1], [-1.9]]) / 2)
    assert metrics["rho"] == pytest.approx(1.0)
    assert metrics["clip_fraction"] == 1.0
    rho, raw = clipped_ratio(policy.values, traj.reference_log_prob, traj.mask, "token", None)
    torch.testing.assert_close(rho, torch.tensor([[-3.0], [3.0]]).exp())
    assert torch.equal(rho, raw)
    assert not rho.requires_grad


def test_ratios_of_long_answers_do_not_overflow(batch: Any) -> None:
    traj = batch([4, 4], seed=0)
    policy = Table(traj.reference_log_prob + torch.tensor([[60.0], [-60.0]]))
    _, slope, metrics = run(policy, traj, "sum", by="advantage", importance="sequence")
    assert bool(slope.isfinite().all())
    assert metrics["rho"] == pytest.approx(1.0)


def test_reward_weighted_cloning_and_gold_by_hand(batch: Any) -> None:
    policy, traj = drawn(batch)
    values, score = policy.values.detach(), traj.score()
    rows = [i for i, n in enumerate(LENGTHS) if n]
    nll = lambda i: [-float(values[i, t]) for t in range(LENGTHS[i])]
    loss, _, _ = run(policy, traj, "sum", by="reward")
    assert loss == pytest.approx(sum(float(score[i]) * sum(nll(i)) for i in rows) / 4, rel=1e-5)
    gold, slope, _ = run(policy, traj, "sum", by="reward", gold=0.2)
    expected = sum(float(score[i]) * sum(max(math.exp(-x), 0.2) * x for x in nll(i)) for i in rows) / 4
    assert gold == pytest.approx(expected, rel=1e-5)
    # the token weights are constants: no gradient flows through them
    weight = torch.where(traj.mask, values.exp().clamp(min=0.2) * score[:, None], 0.0)
    torch.testing.assert_close(slope, -weight / 4)


def test_reward_leftover_is_advantage_leftover_with_the_reward(batch: Any) -> None:
    policy, traj = drawn(batch)
    loss, slope, _ = run(policy, traj, "sum", by="reward", importance="sequence")
    traj.advantage = traj.per_step(traj.score())
    same, same_slope, _ = run(policy, traj, "sum", by="advantage", importance="sequence")
    assert loss == pytest.approx(same)
    torch.testing.assert_close(slope, same_slope)


def test_positive_drops_what_is_below_zero(batch: Any) -> None:
    policy, traj = drawn(batch)
    traj.advantage = traj.per_step(torch.tensor([0.5, -1.0, 2.0, 1.0, -0.1]))
    _, slope, _ = run(policy, traj, "sum", by="advantage", positive=True)
    assert slope.any(1).tolist() == [True, False, True, False, False]


def test_a_weighted_likelihood_has_the_gradient_of_reinforce(batch: Any) -> None:
    policy, traj = drawn(batch)
    for reduction in ("step", "sum", "trajectory", "constant"):
        _, slope, _ = run(policy, traj, reduction, by="advantage")
        loss, _ = Reinforce(reduction=reduction)(policy, traj)  # type: ignore[arg-type]
        torch.testing.assert_close(slope, torch.autograd.grad(loss, policy.values)[0])


# --- padding, splits, learning ----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_a_split_gives_the_gradient_of_the_whole(
    objective: Any, batch: Any, token_policy: Any, gradient: Any
) -> None:
    traj = batch(LENGTHS, seed=1)
    whole = gradient(objective, token_policy, traj)
    parts = gradient(objective, token_policy, traj, [traj[:2], traj[2:3], traj[3:]])
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)
    if objective.reduction != "constant":  # that one divides by the slots, real or not
        padded = gradient(objective, token_policy, pad_steps(traj, 7))
        torch.testing.assert_close(padded, whole, atol=1e-6, rtol=1e-4)
    assert pickle.loads(pickle.dumps(objective)) == objective


@pytest.mark.parametrize("kind", ["table", "language"])
def test_role_accumulates_to_the_same_update(kind: str) -> None:
    results = []
    for micro_batch in (None, 2):
        policy: Any
        if kind == "table":
            policy = CategoricalTable(["a", "b"], 3)
            traj = policy.sample(["a", "b", "a", "a", "b"], torch.arange(5))
        else:
            policy = LanguagePolicy(tiny_llama(width=16, layers=1), tokenizer())
            traj = policy.encode(["a", "b c", "d", "e f g", "h"], ["a a", "b", "c d e f", "", "g"])
        role = Role("actor", policy, RoleSettings(Adam(1e-2), micro_batch=micro_batch))
        traj = with_reference(traj, role.copy(frozen=True))
        traj.advantage = traj.per_step(torch.tensor([0.5, 1.0, 0.3, 2.0, 0.7]))
        objective = WeightedLikelihood("sum", by="advantage", importance="token", kl=0.1)
        first = role.update(traj, objective)
        for _ in range(10):
            last = role.update(traj, objective)
        assert float(last["nll"]) < float(first["nll"])
        results.append([p.detach().clone() for p in policy.parameters()])
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-3)


def test_cloning_a_table_reaches_the_frequencies_of_the_data() -> None:
    policy = CategoricalTable(["x"], 3)
    traj = policy.sample(["x"] * 40, torch.arange(40))
    counts = torch.bincount(traj.inputs["step", "action"][:, 0], minlength=3)
    role = Role("actor", policy, RoleSettings(Adam(0.1)))
    for _ in range(150):
        role.update(traj, WeightedLikelihood())
    torch.testing.assert_close(policy.logits.detach()[0].softmax(0), counts / 40, atol=1e-3, rtol=0)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": "mean"}, "reduction is 'mean'"),
        ({"by": "rewards"}, "did you mean 'reward'"),
        ({"importance": "trajectory"}, "importance is 'trajectory'"),
        ({"clip": 1.5}, "between 0 and 1"),
        ({"gold": -0.1}, "probability"),
    ],
)
def test_options_that_make_no_sense(unchecked: None, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        WeightedLikelihood(**options)


def test_missing_fields_are_named(batch: Any) -> None:
    policy, traj = drawn(batch)
    for options, field in (
        ({"by": "advantage"}, "advantage"),
        ({"by": "reward"}, "reward"),
        ({"kl": 0.1}, "reference_log_prob"),
        ({"importance": "token"}, "reference_log_prob"),
    ):
        bare = traj.with_(advantage=None, reward=None, reference_log_prob=None)
        with pytest.raises(ShapeError, match=field):
            WeightedLikelihood(**options)(policy, bare)  # type: ignore[arg-type]
