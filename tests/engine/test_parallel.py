"""Two processes that learn together make the updates of one, whatever is learned and however its rows are shared out.

Each case is one function, run without a group here and with one in two processes that live as long as this file's tests.
"""

from __future__ import annotations

import copy
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from control_for_tests import acted, controller, features, transitions
from guerdon.batch import Preferences
from guerdon.critics.action import ActionCritic
from guerdon.critics.state import StateCritic
from guerdon.engine import parallel
from guerdon.errors import GuerdonError, NonFiniteError, UsageError
from guerdon.objectives.action_value import SoftBellman, SoftImprovement
from guerdon.objectives.policy_gradient import ClippedSurrogate
from guerdon.objectives.preference import PairwiseObjective
from guerdon.objectives.reward_difference import RewardDifference
from guerdon.objectives.sides import with_reference
from guerdon.objectives.value import ValueRegression
from guerdon.optim import SGD, Adam, AdamW
from guerdon.policies.language import LanguagePolicy
from guerdon.policies.lora import LoRA
from guerdon.randomness import row_seeds
from guerdon.roles import Role, RoleSettings, share
from guerdon.tasks.tokens import tiny_llama, tokenizer
from tiny import WORDS, MLPPolicy, episodes, image_policy

LENGTHS = [3, 1, 4, 2, 4, 3, 1]
WAIT = 60.0  # seconds that anything here may take


# --- two processes ----------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _serve(rank: int, port: int, pipe: Any, timeout: float) -> None:
    torch.set_num_threads(1)
    group = parallel.join("127.0.0.1", port, rank, 2, timeout=timeout)
    while (job := pipe.recv()) is not None:
        function, arguments, options = job
        try:
            answer: Any = function(group, *arguments, **options)
        except Exception as error:
            answer = error
        pipe.send(pickle.dumps(answer))
    parallel.leave()


class Two:
    """Two processes of one group, and what they answer."""

    def __init__(self, timeout: float = WAIT) -> None:
        context = torch.multiprocessing.get_context("forkserver")  # what takes seconds is imported once
        context.set_forkserver_preload(["guerdon.run", "guerdon.tasks.tokens", "peft", "transformers"])
        port, self.pipes, self.processes = free_port(), [], []
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, there, timeout), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def ask(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments, options))
        return [self.answer(rank) for rank in range(2)]

    def answer(self, rank: int) -> Any:
        assert self.pipes[rank].poll(WAIT), f"rank {rank} does not answer"
        return pickle.loads(self.pipes[rank].recv())

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    made = Two()
    yield made
    made.close()


def agree(
    two: Two, case: Callable[..., Any], *arguments: Any, tolerance: float = 1e-5, **options: Any
) -> Any:
    """What ``case`` finds alone, in this process, is what both workers find together."""
    alone = case(None, *arguments)
    for found in two.ask(case, *arguments, **options):
        if isinstance(found, Exception):
            raise found
        same(found, alone, tolerance)
    return alone


def same(found: Any, expected: Any, tolerance: float) -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            same(found[name], expected[name], tolerance)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other, tolerance)
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    else:
        assert found == expected


def part(batch: Any, group: Any, cut: int | None = None) -> Any:
    """This worker's rows: half of them, or those on its side of ``cut``."""
    if group is None:
        return batch
    rows = batch.batch_size[0]
    if cut is None:
        return batch[share(rows, group.rank, 2)]
    return batch[:cut] if group.rank == 0 else batch[cut:]


def weights(role: Role) -> list[Tensor]:
    """Through a state, which is whole however the role holds its weights."""
    state = role.state_dict()["weights"]
    return [value.detach().clone() for value in state.values() if isinstance(value, Tensor)]


def sums(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of an objective that counts trajectories, the figures that do too; its others are means over steps."""
    return {
        name: value for name, value in metrics.items() if name in ("loss", "grad_norm", "ratio_deviation_max")
    }


def together(group: Any, shard: bool) -> dict[str, Any]:
    return {} if group is None else {"group": group, "shard": shard}


# --- cases ------------------------------------------------------------------------------------------------


def sequences(
    group: Any, lengths: list[int], changes: dict[str, Any], cut: int | None = None, shard: bool = False
) -> Any:
    """Three updates of a small policy, from trajectories of unequal length."""
    changes = dict(changes)
    objective = ClippedSurrogate(0.1, entropy=0.01, reduction=changes.pop("reduction", "step"))
    role = Role("actor", MLPPolicy(), RoleSettings(AdamW(1e-2), **changes), **together(group, shard))
    figures = [role.update(part(episodes(lengths, seed=i), group, cut), objective) for i in range(3)]
    if objective.reduction != "step":
        figures = [sums(metrics) for metrics in figures]
    return figures, weights(role)


def llama(group: Any, shard: bool = False, **changes: Any) -> Role:
    words = LanguagePolicy(tiny_llama(width=16, layers=2), tokenizer(), max_new_tokens=5)
    # a large eps: where a gradient is nothing but rounding, Adam would make a step of it
    settings = RoleSettings(**({"optimiser": AdamW(1e-2, eps=1e-3)} | changes))
    return Role("actor", words, settings, **together(group, shard))


def answers(role: Role, rows: int, seed: int = 0) -> Any:
    prompts = ["abc", "d", "efgh", "ba", "c"]
    traj = role.sample([prompts[i // 2 % 5] for i in range(rows)], row_seeds(seed, 0, rows))
    generator = torch.Generator().manual_seed(seed)
    traj.advantage = traj.per_step(torch.randn(rows, generator=generator))
    return traj


def grpo(group: Any, changes: dict[str, Any], shard: bool = False) -> Any:
    """Sampling and learning in turns, as GRPO does: passes over answers in minibatches."""
    role = llama(group, shard, **changes)
    reference = role.copy(frozen=True)
    figures = []
    generator = torch.Generator().manual_seed(1)
    objective = ClippedSurrogate(0.2, reduction="trajectory", kl=0.1)
    for step in range(2):
        traj = answers(role, 7, step)
        traj.reference = reference.distribution(traj)
        figures.append(sums(role.fit(traj, objective, epochs=2, minibatch=3, generator=generator)))
    traj = answers(role, 7, 9)
    return figures, weights(role), role.log_prob(traj), reference.log_prob(traj), role.updates


def dpo(group: Any, cut: int | None = None, shard: bool = False) -> Any:
    role = llama(group, shard)
    texts = ["abc", "defa", "b", "gg", "hgfe", "a"]
    sides = [role.model.encode(["ab", "c", "dd", "e", "fg"], texts[i : i + 5]) for i in range(2)]
    pairs = Preferences(chosen=sides[0], rejected=sides[1])
    pairs = with_reference(pairs, role.copy(frozen=True))
    metrics = [role.update(part(pairs, group, cut), PairwiseObjective(beta=0.5)) for _ in range(3)]
    return metrics, weights(role)


def ppo(group: Any, shard: bool = False) -> Any:
    policy = controller("gaussian")
    actor = Role("actor", policy, RoleSettings(Adam(1e-2), 0.5), **together(group, shard))
    torch.manual_seed(0)
    critic = Role("critic", StateCritic(features()), RoleSettings(Adam(1e-2), None), **together(group, shard))
    rows = acted(controller("gaussian", seed=1), 3, 5).as_rows()
    passes = {"epochs": 2, "minibatch": 4}
    generator = torch.Generator().manual_seed(2)
    figures = actor.fit(rows, ClippedSurrogate(0.2, entropy=0.01), generator=generator, **passes)
    judged = critic.fit(rows, ValueRegression(), generator=generator, **passes)
    return figures, judged, weights(actor), weights(critic), critic.value(rows)


def sac(group: Any, rows: int, shard: bool = False) -> Any:
    torch.manual_seed(0)
    settings = RoleSettings(Adam(1e-2), max_grad_norm=None)
    critic = Role(
        "critic", ActionCritic(features(hidden=()), action=2, hidden=(8,)), settings, **together(group, shard)
    )
    actor = Role("actor", controller("squashed"), settings, **together(group, False))
    target = critic.copy(frozen=True)
    metrics = []
    for i in range(3):
        batch = part(transitions(rows, seed=i), group)
        metrics.append(critic.update(batch, SoftBellman(), target=target, actor=actor))
        metrics.append(actor.update(batch, SoftImprovement(), critic=critic))
        target.follow(critic, 0.1)
    return metrics, weights(critic), weights(actor), weights(target)


def rlcm(group: Any, changes: dict[str, Any], cut: int | None = None, shard: bool = False) -> Any:
    role = Role("actor", image_policy(), RoleSettings(SGD(0.1), **changes), **together(group, shard))
    traj = role.sample(WORDS[:5], row_seeds(0, 0, 5), steps=3)
    traj.advantage = traj.per_step(torch.linspace(-1, 1, 5))
    metrics = [role.update(part(traj, group, cut), ClippedSurrogate(0.2)) for _ in range(2)]
    return metrics, weights(role)


# --- the same update --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [None, 1, 6, 0, 7])
@pytest.mark.parametrize("reduction", ["step", "trajectory"])
def test_shares_of_any_size_make_the_update_of_the_whole(two: Two, cut: int | None, reduction: str) -> None:
    agree(two, sequences, LENGTHS, {"reduction": reduction}, cut)


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch": 2},
        {"micro_batch": 2, "micro_steps": 3},
        {"max_grad_norm": None},
        {"max_grad_norm": 0.01},
    ],
    ids=["micro_batch", "micro_steps", "unclipped", "clipped"],
)
@pytest.mark.parametrize("cut", [3, 7])
def test_each_worker_splits_its_own_share(two: Two, changes: dict[str, Any], cut: int) -> None:
    agree(two, sequences, LENGTHS, changes, cut)


def test_rows_of_padding_alone_count_nowhere(two: Two) -> None:
    agree(two, sequences, [3, 4, 0, 0, 0], {"reduction": "trajectory"}, 2)


def test_one_row_leaves_the_first_worker_none(two: Two) -> None:
    agree(two, sequences, [3], {})


def test_dpo(two: Two) -> None:
    agree(two, dpo)


@pytest.mark.parametrize("changes", [{}, {"lora": LoRA(2)}, {"micro_batch": 2}], ids=["all", "lora", "micro"])
def test_grpo_on_a_language_model(two: Two, changes: dict[str, Any]) -> None:
    agree(two, grpo, changes)


def test_bfloat16_differs_by_its_rounding_alone(two: Two) -> None:
    agree(two, rlcm, {"precision": "bfloat16"}, tolerance=2e-2)


def test_ppo_on_a_controller(two: Two) -> None:
    agree(two, ppo)


@pytest.mark.parametrize("rows", [16, 1])
def test_sac_reads_other_roles(two: Two, rows: int) -> None:
    agree(two, sac, rows)


def test_rlcm_on_an_image_generator(two: Two) -> None:
    agree(two, rlcm, {"lora": LoRA(2)})
    agree(two, rlcm, {"micro_batch": 2, "micro_steps": 1}, 1)


class Partly(nn.Module):
    """Two weights, of which a batch of positive numbers uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))

    def __call__(self, model: Any, batch: Any) -> Any:
        first = batch.observation[:, 0]
        loss = (model.used.sum() * first).mean()
        if bool((first < 0).all()):
            loss = loss + model.unused.square().sum()
        return loss, {"loss": loss.detach(), "first_max": first.max()}

    def weight(self, batch: Any) -> Tensor:
        return torch.tensor(float(batch.batch_size[0]))


def partly(group: Any, sign: float) -> Any:
    model = Partly()
    role = Role("actor", model, RoleSettings(AdamW(0.1, weight_decay=0.5)), **together(group, False))
    batch = transitions(4)
    first = batch.observation[:, 0].abs()
    batch.observation[:, 0] = torch.where(torch.arange(4) < 2, first, sign * first)
    return role.update(part(batch, group), Partly()), weights(role)


def test_a_weight_that_no_row_uses_stays_as_without_a_gradient(two: Two) -> None:
    alone = agree(two, partly, 1.0)
    assert torch.equal(alone[1][1], torch.ones(3))  # AdamW would have let it decay
    for found in two.ask(partly, -1.0):  # one worker's rows use it, the other's do not: missing is zero there
        assert not torch.equal(found[1][1], torch.ones(3))


# --- passes -----------------------------------------------------------------------------------------------


def ordered(group: Any) -> Any:
    role = Role("actor", MLPPolicy(), RoleSettings(Adam(1e-2)), **together(group, False))
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(7, generator=generator) for _ in range(2)]
    if group is None:  # drawn inside, by a generator
        generator.manual_seed(3)
        figures = role.fit(episodes(LENGTHS), ClippedSurrogate(), 2, 3, generator)
    else:
        figures = role.fit(episodes(LENGTHS), ClippedSurrogate(), 2, 3, orders=orders)
    return figures, weights(role)


def test_orders_drawn_elsewhere_are_those_of_a_generator(two: Two) -> None:
    agree(two, ordered)
    role = Role("actor", MLPPolicy(), RoleSettings(Adam(1e-2)))
    for wrong in ({"orders": [torch.arange(7)]}, {"orders": [], "generator": torch.Generator()}):
        with pytest.raises(UsageError, match="an order for each of its 2 passes"):
            role.fit(episodes(LENGTHS), ClippedSurrogate(), epochs=2, **wrong)


def compiled(group: Any) -> Any:
    role = Role("actor", MLPPolicy(), RoleSettings(Adam(1e-2), compile="update"), **together(group, False))
    return role.update(episodes(LENGTHS), ClippedSurrogate())


def test_a_compiled_update_takes_no_shares(two: Two) -> None:
    for found in two.ask(compiled):
        assert isinstance(found, UsageError)
        assert "give them to fit" in str(found)


# --- what fails, fails everywhere -------------------------------------------------------------------------


def poisoned(group: Any, where: int) -> Any:
    role = Role("actor", MLPPolicy(), RoleSettings(Adam(1e-2)), group=group)
    good = part(episodes(LENGTHS), group)
    role.update(good, ClippedSurrogate())
    before, moments = weights(role), copy.deepcopy(role.state_dict()["optimiser"])
    bad = good
    if group.rank == where:
        bad = good.with_(advantage=torch.full_like(good.advantage, float("nan")))
    with pytest.raises(NonFiniteError) as caught:
        role.update(bad, ClippedSurrogate())
    assert caught.value.batch is bad
    same(weights(role), before, 0.0)
    same(role.state_dict()["optimiser"], moments, 0.0)
    role.update(good, ClippedSurrogate())
    return str(caught.value), role.updates


@pytest.mark.parametrize("where", [0, 1])
def test_a_nan_of_one_worker_stops_all_and_changes_nothing(two: Two, where: int) -> None:
    first, second = two.ask(poisoned, where)
    assert first == second
    assert "not finite at update 1; the weights are unchanged" in first[0]
    assert first[1] == 2  # and they can go on


class Raises:
    """Fails at rows whose reward is above 100, or on the way back if ``late``."""

    def __init__(self, late: bool) -> None:
        self.late = late

    def __call__(self, model: Any, batch: Any) -> Any:
        loss = model.log_prob(batch).sum()
        if bool((batch.reward > 100).any()):
            if not self.late:
                raise ValueError("the rows are bad")
            loss.register_hook(self._fail)
        return loss, {"loss": loss.detach()}

    def _fail(self, gradient: Tensor) -> None:
        raise ValueError("the way back is bad")

    def weight(self, batch: Any) -> Tensor:
        return torch.tensor(float(batch.batch_size[0]))


def failing(group: Any, late: bool) -> Any:
    role = Role("actor", MLPPolicy(), RoleSettings(Adam(1e-2)), group=group)
    batch = part(episodes(LENGTHS), group)
    before, found = weights(role), []
    for reward in (batch.reward + 1000.0 * group.rank, batch.reward):
        try:
            role.update(batch.with_(reward=reward), Raises(late))
        except Exception as error:
            same(weights(role), before, 0.0)
            found.append(repr(error))
    return found, role.updates


@pytest.mark.parametrize("late", [False, True])
def test_an_error_of_one_worker_is_raised_by_all_and_they_can_go_on(two: Two, late: bool) -> None:
    (other, done), (own, _) = two.ask(failing, late)
    assert len(own) == len(other) == done == 1
    assert "ValueError" in own[0]
    assert "worker 1 could not make update 0 of 'actor'; its own message says why" in other[0]


def coupled(group: Any, told: bool, cut: int) -> Any:
    role = Role("actor", MLPPolicy(), RoleSettings(SGD(0.1)), group=group)
    batch = episodes([3, 1, 4, 2], group=torch.zeros(4, dtype=torch.int64))
    objective = RewardDifference()
    whole = objective.weight(batch) if told else None
    role.update(part(batch, group, cut), objective, whole=whole)
    return weights(role)


def test_rows_that_are_compared_cannot_be_shared_out(two: Two) -> None:
    for found in two.ask(coupled, True, 2):
        assert isinstance(found, UsageError)
        assert "cannot be split over workers, because RewardDifference compares its rows" in str(found)
    for found in two.ask(coupled, True, 4):  # nothing is compared across workers
        assert isinstance(found, list)


def strangers(group: Any) -> Any:
    role = Role("actor", MLPPolicy(seed=group.rank), RoleSettings(SGD(0.1)), group=group)
    role.update(part(episodes(LENGTHS), group), ClippedSurrogate())


def nothing(group: Any, padding: bool) -> Any:
    role = Role("actor", image_policy(), RoleSettings(SGD(0.1)), group=group)
    traj = role.sample(WORDS[:2], row_seeds(0, 0, 2), steps=1)
    traj.advantage = torch.zeros(2, 1)
    role.update(part(traj if padding else traj[:0], group), ClippedSurrogate())


def test_what_cannot_be_learned_from_is_refused_by_all(two: Two) -> None:
    for case, arguments, message in (
        (strangers, (), "the workers of 'actor' have different weights"),
        (nothing, (True,), "loss of 'actor' does not depend on its weights"),
        (nothing, (False,), "holds no row for 'actor' to learn from"),
    ):
        for found in two.ask(case, *arguments):
            assert isinstance(found, UsageError)
            assert message in str(found)


# --- checkpoints, moves -----------------------------------------------------------------------------------


def resumed(group: Any, path: str, save: bool, shard: bool = False) -> Any:
    """Two updates and a saved state; or that state, and a third update."""
    role = llama(group, shard)
    if save:
        for seed in range(2):
            role.update(part(fixed(seed), group), ClippedSurrogate())
        state = role.state_dict()
        if group is None or group.rank == 0:
            torch.save(state, path)
        return None
    role.load_state_dict(torch.load(path, weights_only=True))
    metrics = role.update(part(fixed(2), group), ClippedSurrogate())
    state = role.state_dict()["optimiser"]
    return metrics, weights(role), role.updates, [list(s.values()) for s in state["state"].values()]


def fixed(seed: int) -> Any:
    """Recorded answers, the same for every role."""
    policy = LanguagePolicy(tiny_llama(width=16, layers=1), tokenizer())
    traj = policy.encode(["ab", "c", "dd", "e", "fg"], ["abc", "d", "ef", "gha", "b"])
    generator = torch.Generator().manual_seed(seed)
    traj.log_prob = (-2.0 + 0.1 * torch.randn(traj.mask.shape, generator=generator)) * traj.mask
    traj.advantage = traj.per_step(torch.randn(5, generator=generator))
    return traj


@pytest.mark.parametrize("shard", [False, True], ids=["replicas", "shards"])
def test_a_checkpoint_does_not_know_how_many_wrote_it(two: Two, tmp_path: Path, shard: bool) -> None:
    for one, path in ((True, "alone"), (False, "together")):
        file = str(tmp_path / path)
        if one:
            resumed(None, file, True)
        else:
            two.ask(resumed, file, True, shard)
        agree(two, resumed, file, False, shard=shard)


def moved(group: Any, kind: Any, shard: bool = False) -> Any:
    """An update here, and a second one after the role has travelled as bytes."""
    role = Role("actor", MLPPolicy(), RoleSettings(AdamW(1e-2), compile=kind))
    role.update(episodes(LENGTHS), ClippedSurrogate())
    if group is not None:
        role = pickle.loads(pickle.dumps(role))
        role.join(group, "cpu", shard)
    metrics = role.fit(episodes(LENGTHS, seed=1), ClippedSurrogate())
    return metrics, weights(role), role.updates


@pytest.mark.parametrize("shard", [False, True], ids=["replicas", "shards"])
def test_a_role_travels_and_goes_on(two: Two, shard: bool) -> None:
    agree(two, moved, False, shard=shard)


# --- weights in parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora": LoRA(2)}, {"micro_batch": 2}, {"checkpoint_activations": True}, {"max_grad_norm": None}],
    ids=["all", "lora", "micro", "recompute", "unclipped"],
)
def test_shards_of_a_language_model_learn_and_answer_as_one(two: Two, changes: dict[str, Any]) -> None:
    agree(two, grpo, changes, shard=True)


@pytest.mark.parametrize("cut", [None, 0, 5])
def test_shards_take_any_share(two: Two, cut: int | None) -> None:
    agree(two, dpo, cut, shard=True)


def test_shards_of_other_models(two: Two) -> None:
    agree(two, sequences, LENGTHS, {"micro_batch": 2}, 1, shard=True)
    agree(two, rlcm, {"lora": LoRA(2)}, shard=True)
    agree(two, ppo, shard=True)
    agree(two, sac, 5, shard=True)  # the critic in parts, read by an actor that is not


def in_parts(group: Any) -> Any:
    role = llama(group, True)
    held = sum(p.to_local().numel() for p in role._parameters)
    wholes = sum(p.numel() for p in role.model.parameters())
    outside = all(p.isnan().all() for p in role.model.parameters())
    slow = role.copy(frozen=True)
    role.update(part(fixed(0), group), ClippedSurrogate())
    slow.follow(role, 0.5)
    trained = role.copy(frozen=False)
    trained.update(part(fixed(1), group), ClippedSurrogate())
    return held, wholes, outside, len(parallel.blocks(role.model.model)), weights(slow), weights(trained)


def test_a_worker_holds_its_part_alone(two: Two) -> None:
    plain = llama(None)
    slow = plain.copy(frozen=True)
    plain.update(fixed(0), ClippedSurrogate())
    slow.follow(plain, 0.5)
    trained = plain.copy(frozen=False)
    trained.update(fixed(1), ClippedSurrogate())
    total = sum(p.numel() for p in plain.model.parameters())
    held = 0
    for found in two.ask(in_parts):
        mine, wholes, outside, layers, *found_weights = found
        held += mine
        assert wholes == total
        assert outside
        assert layers == 2
        same(found_weights, [weights(slow), weights(trained)], 1e-5)
    assert held == total


def refused(group: Any, what: str) -> Any:
    if what == "scalar":
        Role("actor", Scalar(), RoleSettings(SGD(0.1)), group=group, shard=True)
    elif what == "compile":
        Role("actor", MLPPolicy(), RoleSettings(SGD(0.1), compile="update"), group=group, shard=True)
    elif what == "pickle":
        pickle.dumps(llama(group, True))
    else:
        Role("actor", controller("gaussian"), RoleSettings(SGD(0.1)), group=group, shard=True).acting()


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alone = nn.Parameter(torch.zeros(()))


def test_what_sharded_weights_cannot_do(two: Two) -> None:
    for what, message in (
        ("scalar", "the weight alone is a single number, which cannot be sharded"),
        ("compile", "sharded weights cannot be compiled"),
        ("pickle", "is sharded: no process has all of it to send"),
        ("acting", "cannot act with sharded weights"),
    ):
        for found in two.ask(refused, what):
            assert isinstance(found, UsageError)
            assert message in str(found)
    with pytest.raises(UsageError, match="there is none here"):
        Role("actor", MLPPolicy(), RoleSettings(SGD(0.1)), shard=True)


# --- the group itself -------------------------------------------------------------------------------------


def added(group: Any) -> Any:
    ones = [
        torch.full((3,), 1.0 + group.rank),
        torch.arange(6.0).reshape(2, 3).t(),  # not contiguous
        torch.tensor(group.rank + 1),
        torch.full((2, 2), 0.5, dtype=torch.bfloat16),
        torch.zeros(0),
    ]
    small, parallel.BUCKET = parallel.BUCKET, 16
    group.sum(ones)
    parallel.BUCKET = small
    tops = [torch.tensor([group.rank, -group.rank])]
    group.max(tops)
    group.barrier()
    told = group.broadcast({"rank": group.rank}, 1)
    again = parallel.join("127.0.0.1", 1, group.rank, 2)  # another role's worker in the same process
    return ones, tops, told, again.rank == group.rank


def test_sums_and_maxima_of_mixed_tensors(two: Two) -> None:
    for found in two.ask(added):
        ones, tops, told, same_group = found
        assert torch.equal(ones[0], torch.full((3,), 3.0))
        assert torch.equal(ones[1], 2 * torch.arange(6.0).reshape(2, 3).t())
        assert ones[2] == 3
        assert torch.equal(ones[3], torch.ones(2, 2, dtype=torch.bfloat16))
        assert torch.equal(tops[0], torch.tensor([1, 0]))
        assert told == {"rank": 1}
        assert same_group


def test_who_comes_alone_says_so_in_time() -> None:
    start = time.monotonic()
    with pytest.raises(parallel.GroupError, match="worker 0 of 2 did not meet the others"):
        parallel.join("127.0.0.1", free_port(), 0, 2, timeout=1.0)
    assert time.monotonic() - start < 20
    parallel.leave()


def waits(group: Any) -> Any:
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        Role("actor", MLPPolicy(), RoleSettings(SGD(0.1)), group=group).update(
            episodes([2]), ClippedSurrogate()
        )
    except GuerdonError as error:
        return str(error), time.monotonic() - start


def test_a_worker_that_dies_is_noticed_within_seconds() -> None:
    lonely = Two()
    try:
        for pipe in lonely.pipes:
            pipe.send((waits, (), {}))
        message, seconds = lonely.answer(0)
        assert "worker 0 of 2 lost another worker in a" in message
        assert seconds < 20
    finally:
        lonely.close()
