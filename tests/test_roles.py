"""Roles: one optimiser step however it is split, copies, followers, files; and the local engine."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from guerdon.batch import Trajectories
from guerdon.engine.local import LocalEngine
from guerdon.errors import NonFiniteError, UsageError
from guerdon.objectives.policy_gradient import ClippedSurrogate, Reinforce
from guerdon.objectives.reward_difference import RewardDifference, pairs
from guerdon.objectives.value import ValueRegression
from guerdon.optim import SGD, Adam, AdamW
from guerdon.policies import lora
from guerdon.policies.lora import LoRA
from guerdon.policies.tabular import CategoricalTable
from guerdon.randomness import row_seeds
from guerdon.roles import Role, RoleSettings
from guerdon.tasks.tokens import tiny_llama, tokenizer
from tiny import WORDS, MLPPolicy, episodes, image_policy

LENGTHS = [3, 1, 4, 2, 4, 3, 1]


def role(optimiser: Any = None, seed: int = 0, **changes: Any) -> Role:
    return Role("actor", MLPPolicy(seed), RoleSettings(optimiser or SGD(1.0), **changes))


def weights(model: Any) -> list[Tensor]:
    model = model.model if isinstance(model, Role) else model
    return [p.detach().clone() for p in model.parameters()]


def close(a: list[Tensor], b: list[Tensor], tolerance: float) -> None:
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


# --- an update is a torch step ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("described", "bare"),
    [
        (Adam(1e-2, eps=1e-5), lambda p: torch.optim.Adam(p, 1e-2, eps=1e-5)),
        (AdamW(1e-2, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1)),
        (SGD(0.3, momentum=0.9), lambda p: torch.optim.SGD(p, 0.3, momentum=0.9)),
    ],
    ids=["adam", "adamw", "sgd"],
)
@pytest.mark.parametrize("norm", [0.05, 100.0, None])
def test_update_equals_a_bare_torch_step(described: Any, bare: Any, norm: float | None) -> None:
    actor, policy = role(described, max_grad_norm=norm), MLPPolicy()
    optimiser = bare(policy.parameters())
    for i in range(4):
        batch = episodes(LENGTHS, seed=i)
        metrics = actor.update(batch, ClippedSurrogate(0.2))
        ratio = (policy.log_prob(batch) - batch.log_prob).exp()
        losses = torch.maximum(-batch.advantage * ratio, -batch.advantage * ratio.clamp(0.8, 1.2))
        loss = losses[batch.mask].mean()
        optimiser.zero_grad()
        loss.backward()
        if norm is not None:
            torch.testing.assert_close(
                metrics["grad_norm"], nn.utils.clip_grad_norm_(policy.parameters(), norm)
            )
        optimiser.step()
        torch.testing.assert_close(metrics["loss"], loss.detach())
    close(weights(actor), weights(policy), 1e-6)
    assert not equal(weights(actor), weights(MLPPolicy()))


def test_gradients_are_cut_to_the_norm_and_no_further() -> None:
    batch = episodes(LENGTHS)
    before = weights(MLPPolicy())

    def step(norm: float | None) -> tuple[float, Any]:
        actor = role(SGD(1.0), max_grad_norm=norm)
        metrics = actor.update(batch, Reinforce())
        return math.sqrt(
            sum(((a - b) ** 2).sum() for a, b in zip(weights(actor), before, strict=True))
        ), metrics

    free, metrics = step(None)
    assert "grad_norm" not in metrics
    cut, metrics = step(free / 3)
    assert cut == pytest.approx(free / 3, rel=1e-4)
    assert float(metrics["grad_norm"]) == pytest.approx(free, rel=1e-4)
    assert step(free * 3)[0] == pytest.approx(free, rel=1e-4)


@pytest.mark.parametrize("reduction", ["step", "trajectory", "sum", "constant"])
@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_micro_batches_give_the_same_update(reduction: Any, rows: int) -> None:
    batch, objective = episodes(LENGTHS), ClippedSurrogate(0.1, reduction=reduction, entropy=0.01)
    whole, split = role(), role(micro_batch=rows)
    expected, metrics = whole.update(batch, objective), split.update(batch, objective)
    close(weights(whole), weights(split), 1e-5)
    assert metrics.keys() == expected.keys()
    exact = ("loss", "grad_norm", "ratio_deviation_max") if reduction != "step" else expected
    for key in exact:
        torch.testing.assert_close(metrics[key], expected[key], atol=1e-5, rtol=1e-5)


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=6), data=st.data())
def test_any_split_gives_the_same_update(lengths: list[int], data: st.DataObject) -> None:
    lengths = [*lengths, 2]
    reduction = data.draw(st.sampled_from(["step", "constant"]))
    rows = data.draw(st.integers(1, len(lengths) + 1))
    steps = data.draw(st.integers(1, max(lengths) + 1))
    batch, objective = episodes(lengths), ClippedSurrogate(0.1, reduction=reduction)
    whole, split = role(), role(micro_batch=rows, micro_steps=steps)
    whole.update(batch, objective)
    split.update(batch, objective)
    close(weights(whole), weights(split), 1e-5)


def test_parts_of_padding_alone_do_not_matter() -> None:
    """A denoiser's distribution has no graph where every step is masked."""
    policy = image_policy()
    actor = Role("actor", policy, RoleSettings(SGD(0.1), micro_steps=1))
    traj = actor.sample(WORDS[:2], row_seeds(0, 0, 2), steps=4)
    traj.mask[:, 2:] = False
    traj.log_prob[:, 2:] = 0.0
    traj.advantage = traj.per_step(torch.tensor([1.0, -1.0]))
    bare = Role("actor", image_policy(), RoleSettings(SGD(0.1)))
    actor.update(traj, ClippedSurrogate())
    bare.update(traj, ClippedSurrogate())
    close(weights(actor.model.core), weights(bare.model.core), 1e-5)


def test_a_batch_without_a_step_is_refused_in_a_sentence() -> None:
    actor = Role("actor", image_policy(), RoleSettings(SGD(0.1)))
    traj = actor.sample(WORDS[:2], row_seeds(0, 0, 2), steps=1)
    traj.advantage = torch.zeros(2, 1)
    with pytest.raises(UsageError, match="loss of 'actor' does not depend on its weights"):
        actor.update(traj, ClippedSurrogate())


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_pairs_may_be_split(rows: int) -> None:
    batch = pairs(episodes([3, 1, 4, 2, 4, 3, 1, 2]))
    whole, split = role(), role(micro_batch=rows)
    whole.update(batch, RewardDifference())
    split.update(batch, RewardDifference())
    close(weights(whole), weights(split), 1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_splitting_an_objective_that_couples_rows_is_refused(rows: int) -> None:
    batch = episodes([3, 1, 4, 2], group=torch.zeros(4, dtype=torch.int64))
    split = role(micro_batch=rows)
    before = weights(split)
    with pytest.raises(UsageError, match="RewardDifference compares its rows with one another"):
        split.update(batch, RewardDifference())
    assert equal(weights(split), before)
    role(micro_batch=4).update(batch, RewardDifference())  # one part: nothing is lost


def test_micro_steps_need_independent_steps_and_a_mean_over_steps() -> None:
    batch = episodes(LENGTHS)
    for reduction in ("trajectory", "sum"):
        with pytest.raises(UsageError, match="treats steps apart"):
            role(micro_steps=2).update(batch, ClippedSurrogate(reduction=reduction))
    from guerdon.policies.language import LanguagePolicy

    words = LanguagePolicy(tiny_llama(width=16, layers=1), tokenizer(), max_new_tokens=3)
    actor = Role("actor", words, RoleSettings(SGD(0.1), micro_steps=1))
    traj = actor.sample(["a", "b"], row_seeds(0, 0, 2))
    traj.advantage = torch.ones_like(traj.log_prob) * traj.mask
    with pytest.raises(UsageError, match="steps of LanguagePolicy cannot be split"):
        actor.update(traj, ClippedSurrogate())


def test_value_regression_through_a_role() -> None:
    batch = episodes(LENGTHS)
    critic = role(Adam(3e-2))
    losses = [float(critic.update(batch, ValueRegression())["loss"]) for _ in range(200)]
    assert losses[-1] < 0.2 * losses[0]
    assert critic.value(batch).shape == batch.mask.shape
    assert not critic.value(batch).requires_grad


# --- what is refused --------------------------------------------------------------------------------------


def test_a_role_without_an_optimiser_answers_but_does_not_learn() -> None:
    judge = Role("judge", MLPPolicy())
    batch = episodes(LENGTHS)
    assert judge.log_prob(batch).shape == batch.mask.shape
    assert not any(p.requires_grad for p in judge.model.parameters())
    with pytest.raises(UsageError, match="role 'judge' has no optimiser"):
        judge.update(batch, ClippedSurrogate())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "bfloat"}, "unknown precision 'bfloat'; did you mean 'bfloat16'?"),
        ({"micro_batch": 0}, "micro_batch is 0; it must be at least 1"),
        ({"micro_steps": -1}, "micro_steps is -1"),
        ({"sample_batch": 0}, "sample_batch is 0"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        RoleSettings(**changes)


def test_models_that_cannot_do_what_is_asked() -> None:
    with pytest.raises(UsageError, match="cannot checkpoint activations"):
        role(checkpoint_activations=True)
    with pytest.raises(UsageError, match="nothing to adapt"):
        role(lora=LoRA(2))
    with pytest.raises(UsageError, match="no weights to train"):
        Role("actor", nn.Identity(), RoleSettings(SGD(0.1)))
    with pytest.raises(UsageError, match="nothing for 'actor' to answer"):
        Role("actor", CategoricalTable("ab", 2)).sample([], row_seeds(0, 0, 0))


@pytest.mark.parametrize("norm", [1.0, None])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_update_leaves_the_weights(norm: float | None, what: str) -> None:
    actor = role(Adam(1e-2), max_grad_norm=norm)
    good = episodes(LENGTHS)
    actor.update(good, ClippedSurrogate())
    before, moments = weights(actor), copy.deepcopy(actor.state_dict()["optimiser"])
    if what == "loss":
        bad: Any = episodes(LENGTHS, advantage=torch.full((7, 4), float("nan")))
        objective: Any = ClippedSurrogate()
    else:
        bad, objective = good, InfiniteSlope()
    with pytest.raises(NonFiniteError, match=f"the {what} of 'actor' is not finite at update 1") as caught:
        actor.update(bad, objective)
    assert caught.value.batch is bad
    assert equal(weights(actor), before)
    assert actor.updates == 1
    for one, other in zip(
        moments["state"].values(), actor.state_dict()["optimiser"]["state"].values(), strict=True
    ):
        assert all(torch.equal(one[key], other[key]) for key in one)
    actor.update(good, ClippedSurrogate())  # it can go on
    assert all(w.isfinite().all() for w in weights(actor))


class InfiniteSlope:
    """A loss of zero whose gradient is infinite."""

    def __call__(self, policy: Any, batch: Trajectories) -> tuple[Tensor, dict[str, Tensor]]:
        value = (policy.log_prob(batch) * 0.0).sum()
        return value.clamp(min=0.0).sqrt(), {}

    def weight(self, batch: Trajectories) -> Tensor:
        return torch.ones(())


def test_dropout_is_on_in_updates_only_where_asked_for() -> None:
    batch = episodes(LENGTHS)

    def deviation(dropout: bool) -> float:
        actor = Role("actor", MLPPolicy(dropout=0.5), RoleSettings(SGD(0.1), dropout=dropout))
        batch.log_prob = actor.log_prob(batch)
        metrics = actor.update(batch, ClippedSurrogate())
        assert not actor.model.training
        return float(metrics["ratio_deviation_max"])

    assert deviation(False) < 1e-6
    assert deviation(True) > 1e-3
    actor = Role("actor", MLPPolicy(dropout=0.5), RoleSettings(SGD(0.1), dropout=True))
    with pytest.raises(NonFiniteError):
        actor.update(batch.with_(advantage=torch.full((7, 4), float("nan"))), ClippedSurrogate())
    assert not actor.model.training


# --- precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapt", [None, LoRA(2)], ids=["all weights", "lora"])
def test_bfloat16_samples_and_learns(adapt: LoRA | None) -> None:
    policy = image_policy()
    actor = Role("actor", policy, RoleSettings(Adam(1e-2), lora=adapt, precision="bfloat16"))
    exact = Role("exact", image_policy())
    traj = actor.sample(WORDS, row_seeds(0, 0, 6), steps=3)
    assert traj.log_prob.dtype == torch.float32
    difference = (traj.log_prob - exact.log_prob(traj)).abs().max()
    assert 0 < difference < 0.05  # it is another precision, and not far off
    torch.testing.assert_close(
        actor.log_prob(traj), traj.log_prob, atol=1e-5, rtol=0
    )  # the same one when learning
    traj.advantage = traj.per_step(torch.linspace(-1, 1, 6))
    before = weights(policy.core)
    metrics = actor.update(traj, ClippedSurrogate())
    assert metrics["loss"].isfinite()
    assert float(metrics["ratio_deviation_max"]) < 1e-4
    assert not equal(weights(policy.core), before)
    assert all(p.dtype == torch.float32 for p in policy.core.parameters())


# --- copies -----------------------------------------------------------------------------------------------


def test_a_frozen_copy_does_not_move_with_the_actor() -> None:
    actor, batch = role(Adam(1e-2)), episodes(LENGTHS)
    actor.update(batch, ClippedSurrogate())
    now = weights(actor)
    reference = actor.copy(frozen=True)
    expected = reference.log_prob(batch)
    for _ in range(3):
        actor.update(batch, ClippedSurrogate())
    assert equal(weights(reference), now)
    assert not equal(weights(actor), now)
    assert torch.equal(reference.log_prob(batch), expected)
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert all(p.requires_grad for p in actor.model.parameters())
    assert reference.name == "actor_reference"
    with pytest.raises(UsageError, match="'actor_reference' has no optimiser"):
        reference.update(batch, ClippedSurrogate())


def test_a_copy_that_is_not_frozen_learns_on_its_own() -> None:
    actor, batch = role(Adam(1e-2)), episodes(LENGTHS)
    actor.update(batch, ClippedSurrogate())
    twin = actor.copy(frozen=False, name="twin")
    now = weights(actor)
    twin.update(batch, ClippedSurrogate())
    assert equal(weights(actor), now)
    assert not equal(weights(twin), now)
    fresh = Role("fresh", copy.deepcopy(actor.model), RoleSettings(Adam(1e-2)))
    fresh.update(batch, ClippedSurrogate())
    assert equal(weights(twin), weights(fresh))  # its optimiser has no past


def test_copies_share_what_does_not_learn() -> None:
    actor = Role("actor", image_policy(), RoleSettings(SGD(0.1)))
    twin = actor.copy(frozen=True)
    ours, theirs = dict(actor.model.named_parameters()), dict(twin.model.named_parameters())
    for name, parameter in ours.items():
        assert (parameter is theirs[name]) == name.startswith("text_encoder"), name
        assert parameter.requires_grad == name.startswith("denoiser"), name


def adapted(seed: int = 0) -> tuple[Role, Trajectories]:
    actor = Role("actor", image_policy(), RoleSettings(SGD(0.5), max_grad_norm=None, lora=LoRA(4)))
    traj = actor.sample(WORDS, row_seeds(seed, 0, 6), steps=3)
    traj.advantage = traj.per_step(torch.linspace(-2, 2, 6))
    return actor, traj


def test_the_reference_of_a_lora_actor_is_its_base_model_exactly() -> None:
    base = Role("base", image_policy())
    actor, traj = adapted()
    reference = actor.copy(frozen=True)
    assert reference.model is actor.model  # no second set of weights
    for _ in range(4):
        actor.update(traj, ClippedSurrogate())
    torch.testing.assert_close(reference.log_prob(traj), base.log_prob(traj), atol=0, rtol=0)
    assert torch.equal(reference.distribution(traj)["mean"], base.distribution(traj)["mean"])
    seeds = row_seeds(9, 0, 6)
    theirs, ours = base.sample(WORDS, seeds, steps=3), reference.sample(WORDS, seeds, steps=3)
    assert torch.equal(ours.images, theirs.images)
    assert torch.equal(ours.log_prob, theirs.log_prob)
    assert (actor.log_prob(traj) - base.log_prob(traj)).abs().max() > 1e-4  # while the actor has moved
    with pytest.raises(UsageError, match="cannot follow"):
        reference.follow(actor, 0.5)


def test_the_reference_of_the_shipped_model_is_the_shipped_model() -> None:
    from guerdon.tasks.shapes.task import Shapes

    task = Shapes()
    base = Role("base", task.policy("consistency"))
    actor = Role("actor", task.policy("consistency"), RoleSettings(SGD(1.0), lora=LoRA(8)))
    reference = actor.copy(frozen=True)
    prompts = task.training_prompts()[:4]
    traj = actor.sample(prompts, row_seeds(0, 0, 4), steps=3)
    traj.advantage = traj.per_step(torch.tensor([1.0, -1.0, 2.0, -2.0]))
    for _ in range(2):
        actor.update(traj, Reinforce())
    assert torch.equal(reference.log_prob(traj), base.log_prob(traj))
    assert not torch.equal(actor.log_prob(traj), base.log_prob(traj))


@pytest.mark.parametrize("frozen", [True, False])
def test_the_copy_of_a_moved_lora_is_a_true_copy(frozen: bool) -> None:
    actor, traj = adapted()
    for _ in range(3):
        actor.update(traj, ClippedSurrogate())
    expected = actor.log_prob(traj)
    twin = actor.copy(frozen=frozen)
    again = twin.copy(frozen=True)  # and its copies are copies of it, not of the base model
    for _ in range(3):
        actor.update(traj, ClippedSurrogate())
    assert torch.equal(twin.log_prob(traj), expected)
    assert torch.equal(again.log_prob(traj), expected)
    assert not torch.equal(actor.log_prob(traj), expected)
    base = Role("base", image_policy())
    assert not torch.equal(twin.log_prob(traj), base.log_prob(traj))


def test_the_frozen_copy_of_a_moved_actor_goes_into_a_checkpoint() -> None:
    """A frozen copy of initial weights is made again by the method; one of later weights cannot be."""
    actor, batch = role(Adam(1e-2)), episodes(LENGTHS)
    assert actor.copy(frozen=True).state_dict()["weights"] is None
    actor.update(batch, ClippedSurrogate())
    state = copy.deepcopy(actor.copy(frozen=True).state_dict())
    again = role(Adam(1e-2), seed=5).copy(frozen=True)
    again.load_state_dict(state)
    assert equal(weights(again), weights(actor))


# --- followers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.0, 0.005, 0.3, 0.5, 0.9, 1.0])
def test_follow_moves_by_tau(tau: float) -> None:
    target, leader = role(seed=1).copy(frozen=True), role(seed=2)
    start, goal = weights(target), weights(leader)
    target.follow(leader, tau)
    close(weights(target), [a + tau * (b - a) for a, b in zip(start, goal, strict=True)], 1e-6)
    if tau == 1.0:
        assert equal(weights(target), goal)
    assert equal(weights(leader), goal)


def test_followers_copy_buffers_and_are_saved() -> None:
    def net(scale: float) -> nn.Module:
        module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        nn.init.constant_(module[0].weight, scale)
        nn.init.constant_(module[1].running_mean, scale)
        return module

    leader, target = Role("leader", net(1.0), RoleSettings(SGD(0.1))), Role("target", net(0.0))
    assert target.state_dict()["weights"] is None
    target.follow(leader, 0.25)
    assert torch.equal(target.model[0].weight, torch.full((2, 2), 0.25))
    assert torch.equal(target.model[1].running_mean, torch.ones(2))
    fresh = Role("target", net(5.0))
    fresh.load_state_dict(copy.deepcopy(target.state_dict()))
    assert torch.equal(fresh.model[0].weight, target.model[0].weight)


# --- checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimiser", [Adam(1e-2, schedule="cosine", warmup=3, total=12), SGD(0.1, momentum=0.9)]
)
def test_a_restored_role_goes_on_bit_for_bit(optimiser: Any) -> None:
    actor = role(optimiser)
    for i in range(5):
        actor.update(episodes(LENGTHS, seed=i), ClippedSurrogate())
    state = copy.deepcopy(actor.state_dict())
    restored = role(optimiser, seed=9)
    restored.load_state_dict(state)
    assert restored.updates == 5
    for i in range(5, 9):
        one, other = (r.update(episodes(LENGTHS, seed=i), ClippedSurrogate()) for r in (actor, restored))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert equal(weights(actor), weights(restored))


def test_a_restored_lora_goes_on_bit_for_bit() -> None:
    actor, traj = adapted()
    for _ in range(3):
        actor.update(traj, ClippedSurrogate())
    state = copy.deepcopy(actor.state_dict())
    assert all("lora_" in key for key in state["weights"])  # the base stays where it is
    restored, _ = adapted()
    reference = restored.copy(frozen=True)  # made before the checkpoint is read, as a method does
    restored.load_state_dict(state)
    assert torch.equal(restored.log_prob(traj), actor.log_prob(traj))
    assert torch.equal(reference.log_prob(traj), Role("base", image_policy()).log_prob(traj))
    for one in (actor, restored):
        one.update(traj, ClippedSurrogate())
    assert equal(weights(actor.model), weights(restored.model))
    with pytest.raises(UsageError, match="do not fit"):
        Role("other", image_policy(), RoleSettings(SGD(0.1), lora=LoRA(2))).load_state_dict(state)


# --- answers ----------------------------------------------------------------------------------------------


def samplers() -> dict[str, tuple[Any, list[str], dict[str, Any]]]:
    from guerdon.policies.language import LanguagePolicy

    words = LanguagePolicy(tiny_llama(width=16, layers=1), tokenizer(), max_new_tokens=5)
    letters = ["a b c", "b", "c d", "e", "f g h a", "b b"]
    return {
        "table": (CategoricalTable(["n", "s"], 4), ["n", "s"] * 3, {}),
        "language": (words, letters, {}),
        "consistency": (image_policy(), WORDS, {"steps": 3}),
        "diffusion": (image_policy("diffusion"), WORDS, {"steps": 3, "initial_seeds": row_seeds(4, 0, 6)}),
    }


@pytest.mark.parametrize("kind", ["table", "language", "consistency", "diffusion"])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_sampling_in_parts_makes_the_same_rows(kind: str, size: int) -> None:
    policy, prompts, options = samplers()[kind]
    seeds, group = row_seeds(1, 0, 6), torch.arange(6) // 2
    whole = Role("actor", policy).sample(prompts, seeds, group, **options)
    actor = Role("actor", policy, RoleSettings(sample_batch=size))
    parts = actor.sample(prompts, seeds, group, **options)
    assert torch.equal(parts.mask, whole.mask)
    assert parts.prompts == whole.prompts == prompts
    assert torch.equal(parts.group, group)
    torch.testing.assert_close(parts.log_prob, whole.log_prob, atol=1e-4, rtol=1e-4)
    if kind == "language":
        assert parts.texts == whole.texts
    elif kind == "table":
        assert torch.equal(parts.outputs["action"], whole.outputs["action"])
    else:
        assert (parts.images.int() - whole.images.int()).abs().max() <= 1
    again = actor.log_prob(parts)  # answers in parts, too
    torch.testing.assert_close(again, whole.log_prob, atol=1e-4, rtol=1e-4)
    assert actor.distribution(parts).batch_size == parts.mask.shape
    assert not again.requires_grad


def test_samples_carry_the_version_that_acted() -> None:
    actor = Role("actor", CategoricalTable(["n", "s"], 4), RoleSettings(SGD(0.1), sample_batch=3))
    for updates in range(3):
        traj = actor.sample(["n", "s", "n", "s"], row_seeds(updates, 0, 4))
        assert traj.version.tolist() == [updates] * 4
        assert traj.version.dtype == torch.int64
        traj.advantage = torch.ones(4, 1)
        actor.update(traj, Reinforce())


# --- learning rates ---------------------------------------------------------------------------------------


def test_schedules() -> None:
    flat, line = SGD(1.0), SGD(1.0, schedule="linear", total=4)
    wave, warm = SGD(1.0, schedule="cosine", total=4), SGD(1.0, warmup=4)
    assert [flat.factor(i) for i in range(3)] == [1, 1, 1]
    assert [line.factor(i) for i in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert [wave.factor(i) for i in (0, 2, 4, 9)] == pytest.approx([1, 0.5, 0, 0], abs=1e-12)
    assert [warm.factor(i) for i in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    both = SGD(1.0, schedule="linear", warmup=2, total=4)
    assert [both.factor(i) for i in range(4)] == [0.5, 0.75, 0.5, 0.25]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"schedule": "linear"}, "'linear' schedule needs total > 0"),
        ({"schedule": "cosin", "total": 3}, "unknown schedule 'cosin'; did you mean 'cosine'"),
        ({"lr": float("nan")}, "the learning rate is nan"),
        ({"lr": -1.0}, "the learning rate is -1.0"),
    ]
    for options, message in wrong:
        with pytest.raises(UsageError, match=message):
            SGD(**options)


def test_an_update_takes_the_rate_of_its_number() -> None:
    actor = role(SGD(0.1, schedule="linear", warmup=2, total=5), max_grad_norm=None)
    policy = MLPPolicy()
    batch = episodes(LENGTHS)
    for i in range(7):
        before = weights(actor)
        close(before, weights(policy), 1e-6)
        loss, _ = Reinforce()(policy, batch)
        slopes = torch.autograd.grad(loss, list(policy.parameters()))
        rate = 0.1 * min(1, (i + 1) / 2) * max(0, 1 - i / 5)
        with torch.no_grad():
            for parameter, slope in zip(policy.parameters(), slopes, strict=True):
                parameter -= rate * slope
        actor.update(batch, Reinforce())
        assert equal(weights(actor), before) == (i >= 5)


def test_a_schedule_may_be_left_open_until_the_data_are_known() -> None:
    open_end, known = SGD(0.1, "linear", 2, total=None), SGD(0.1, "linear", 2, total=5)
    batch, told, given = episodes(LENGTHS), role(open_end), role(known)
    with pytest.raises(UsageError, match="does not know how many updates"):
        told.update(batch, Reinforce())
    assert equal(weights(told), weights(given))
    told.expect(5)
    given.expect(99)  # what was given stands
    told_late = role(open_end)
    for i in range(6):
        for actor in (told, given):
            actor.update(batch, Reinforce())
        if i == 2:
            told_late.load_state_dict(told.state_dict())
            told_late.expect(5)  # a resumed run says it again
        if i > 2:
            told_late.update(batch, Reinforce())
    assert equal(weights(told), weights(given))
    assert equal(weights(told), weights(told_late))
    flat = role(SGD(0.1, total=None))  # a constant rate needs no number
    flat.update(batch, Reinforce())
    with pytest.raises(UsageError, match="needs total > 0"):
        role(open_end).expect(0)
    role().expect(3)  # a role that does not learn has nothing to expect


# --- the local engine -------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Any:
    found = torch.get_num_threads()
    yield found
    torch.set_num_threads(found)


def test_the_engine_gives_the_threads_back(threads: int) -> None:
    torch.set_num_threads(3)
    engine = LocalEngine("cpu", threads=2)
    assert torch.get_num_threads() == 2
    engine.close()
    assert torch.get_num_threads() == 3


def test_the_engine_chooses_threads_by_the_first_model_that_trains(threads: int) -> None:
    torch.set_num_threads(3)
    engine = LocalEngine("cpu")
    engine.role("reward", nn.Linear(4, 4))
    assert torch.get_num_threads() == 3  # nothing trains yet
    engine.role("actor", nn.Linear(4, 4), SGD(0.1))
    assert torch.get_num_threads() == 1
    engine.role("critic", nn.Linear(1000, 1000), SGD(0.1))
    assert torch.get_num_threads() == 1
    assert engine.describe() == {"engine": "local", "device": "cpu", "threads": 1}
    engine.close()
    assert torch.get_num_threads() == 3
    engine = LocalEngine("cpu")
    engine.role("actor", nn.Linear(1000, 1000), SGD(0.1))
    assert torch.get_num_threads() == 3
    engine.close()


def test_overrides_win_over_what_a_method_asks_for(threads: int) -> None:
    engine = LocalEngine("cpu", threads=1, precision="bfloat16", micro_batch=None)
    asked = RoleSettings(SGD(0.1), micro_batch=4)
    assert engine.role("a", nn.Linear(2, 2), settings=asked).settings.precision == "bfloat16"
    role = engine.role(
        "b", nn.Linear(2, 2), SGD(0.2), settings=asked, precision="float32", max_grad_norm=None
    )
    assert role.settings == RoleSettings(SGD(0.2), None, micro_batch=4, precision="bfloat16")
    engine.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "device 'nonsense' is not available here"),
        (("cpu", 0), "threads is 0; it must be at least 1"),
    ],
)
def test_the_engine_refuses(arguments: Any, message: str, threads: int) -> None:
    with pytest.raises(UsageError, match=message):
        LocalEngine(*arguments)
    assert torch.get_num_threads() == threads


def test_a_role_says_what_it_is() -> None:
    actor, _ = adapted()
    total = sum(p.numel() for p in actor.model.parameters())
    trained = sum(p.numel() for p in lora.parameters(actor.model.core))
    assert repr(actor) == f"Role(actor: ConsistencyPolicy, {trained:,} of {total:,} weights train, cpu)"
