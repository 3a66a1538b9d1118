"""Whole updates as one function: the same numbers as step by step, nothing baked in that moves, files.

Compiling takes some ten seconds, so what concerns the function itself is tested on its traced graph (`traced`), and the
binary in two cases that have everything in them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from control_for_tests import acted, controller, features, transitions
from guerdon import compiled
from guerdon.critics.action import ActionCritic
from guerdon.critics.greedy import Greedy
from guerdon.critics.state import StateCritic
from guerdon.errors import NonFiniteError, UsageError
from guerdon.objectives.action_value import (
    DeterministicImprovement,
    QLearning,
    SoftBellman,
    SoftImprovement,
    TwinBellman,
)
from guerdon.objectives.policy_gradient import ClippedSurrogate, Reinforce
from guerdon.objectives.value import ValueRegression
from guerdon.optim import SGD, Adam, AdamW, Optimiser, RMSprop
from guerdon.policies.control import Categorical
from guerdon.policies.features import Entry, Features
from guerdon.roles import Role, RoleSettings

CATEGORICAL = {"low": -4.0, "high": 4.0, "bins": 9}
needs_compiler = pytest.mark.skipif(compiled.available() is not None, reason=str(compiled.available()))


def _trace(function: Callable[..., Any], examples: Any) -> Callable[[list[Tensor]], list[Tensor]]:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
    return lambda inputs: list(graph(*inputs))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Traced graphs run as they are, uncompiled; the list grows with each trace."""
    made: list[int] = []

    def trace(function: Callable[..., Any], examples: Any) -> Any:
        made.append(len(examples))
        return _trace(function, examples)

    monkeypatch.setattr(compiled, "compile_function", trace)
    return made


def both(model: nn.Module, optimiser: Optimiser | None = None, norm: float | None = 0.5) -> tuple[Role, Role]:
    """The same role, updated step by step and whole."""
    optimiser = optimiser or Adam(1e-2, eps=1e-5)
    plain = Role("actor", copy.deepcopy(model), RoleSettings(optimiser, norm))
    return plain, Role("actor", copy.deepcopy(model), RoleSettings(optimiser, norm, compile="update"))


def close(a: Role, b: Role, atol: float = 1e-6) -> None:
    for (name, one), (_, other) in zip(a.model.named_parameters(), b.model.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        torch.testing.assert_close(
            a[name].float(), b[name], atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- pure optimisers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "described",
    [
        Adam(1e-2, eps=1e-5),
        Adam(1e-2, weight_decay=0.1),
        AdamW(1e-2, weight_decay=0.1),
        SGD(0.1),
        RMSprop(1e-2, weight_decay=0.1),
        SGD(0.1, momentum=0.9, weight_decay=0.01),
    ],
    ids=["adam", "adam_decay", "adamw", "sgd", "rmsprop", "momentum"],
)
def test_pure_optimisers_are_torchs(described: Optimiser) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(20))
    usual = described.build([parameter])
    theta = parameter.detach().clone()
    state = described.pure_state(theta)
    for _ in range(6):
        parameter.grad = torch.randn(20)
        theta, state = described.pure(theta, parameter.grad, state, torch.tensor(described.lr))
        usual.step()
        torch.testing.assert_close(theta, parameter.detach(), atol=1e-6, rtol=1e-5)


# --- flat weights -----------------------------------------------------------------------------------------


def test_weights_are_views_of_one_tensor() -> None:
    net = controller("squashed", normalise=True)
    before = [p.detach().clone() for p in net.parameters()]
    flat = compiled.FlatWeights(net)
    for p, kept in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, kept)
    flat.flat.add_(1.0)
    for p, kept in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, kept + 1.0)
    observation = torch.randn(4, 3)
    here = net.mode(observation)
    others = [b + 0.5 if b.is_floating_point() else b for b in flat.buffers()]
    with flat.replaced(torch.zeros_like(flat.flat), others) as replaced:
        assert not torch.equal(replaced.mode(observation), here)
    assert torch.equal(net.mode(observation), here)
    with pytest.raises(RuntimeError), flat.replaced(torch.zeros_like(flat.flat), others):
        raise RuntimeError
    assert torch.equal(net.mode(observation), here)


def test_acting_in_numpy_follows_whole_updates(traced: list[int]) -> None:
    _, whole = both(controller("gaussian"))
    act, observation = whole.acting(), np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    before = act(observation, None)["action"]
    whole.update(acted(controller("gaussian", seed=1)).as_rows(), Reinforce())
    after = act(observation, None)["action"]
    assert not np.allclose(before, after)
    np.testing.assert_allclose(
        after, whole.model.mode(torch.from_numpy(observation)).detach().numpy(), atol=1e-6
    )


# --- the same numbers -------------------------------------------------------------------------------------


def _dictionaries() -> tuple[Categorical, Any]:
    torch.manual_seed(0)
    entries = {"body": Entry((3,)), "gear": Entry((4,), "one_hot"), "camera": Entry((6, 6, 1), "image")}
    policy = Categorical(Features(entries, (8,), normalise=True), 4, init="default")
    data = acted(controller("categorical"))
    observation = {
        "body": torch.randn(5, 4, 3),
        "gear": torch.randint(4, (5, 4)),
        "camera": torch.randint(256, (5, 4, 6, 6, 1), dtype=torch.uint8),
    }
    data.inputs["step", "observation"] = TensorDict(observation, batch_size=[5, 4])
    return policy, data


def _on_trajectories(kind: str) -> tuple[Any, Any, Any, dict[str, Any]]:
    data = acted(controller(kind, seed=1))
    return controller(kind, normalise=True), data, ClippedSurrogate(torch.tensor(0.1), entropy=0.01), {}


def _twins(discrete: bool = False, head: str = "mse") -> ActionCritic:
    torch.manual_seed(0)
    options = {} if head == "mse" else CATEGORICAL
    sizes = {"actions": 4} if discrete else {"action": 2}
    return ActionCritic(features(hidden=()), hidden=(8,), head=head, **sizes, **options)


def _actor(kind: str) -> Any:
    actor = controller(kind, seed=3)
    actor.learn_temperature(0.4)
    return actor


def _q(head: str) -> tuple[Any, Any, Any, dict[str, Any]]:
    torch.manual_seed(0)
    net = Greedy(features(), 4, head, {} if head == "mse" else CATEGORICAL)
    batch = transitions(actions=4)
    batch.weight = torch.rand(16)
    return net, batch, QLearning(), {"target": copy.deepcopy(net)}


CASES: dict[str, Callable[[], tuple[Any, Any, Any, dict[str, Any]]]] = {
    **{f"ppo {k}": lambda k=k: _on_trajectories(k) for k in ("categorical", "dials", "gaussian")},
    "ppo squashed": lambda: (*_on_trajectories("squashed")[:2], ClippedSurrogate(0.2), {}),
    "ppo dictionary": lambda: (*_dictionaries(), ClippedSurrogate(0.2, entropy=0.1), {}),
    "ppo reference": lambda: (*_with_reference(), ClippedSurrogate(0.2, kl=0.1), {}),
    "reinforce": lambda: (*_on_trajectories("gaussian")[:2], Reinforce(entropy=0.1), {}),
    "value": lambda: (StateCritic(features()), acted(controller("gaussian")), ValueRegression(clip=0.3), {}),
    "value hl_gauss": lambda: (
        StateCritic(features(), "hl_gauss", **CATEGORICAL),
        acted(controller("gaussian")),
        ValueRegression(),
        {},
    ),
    **{f"dqn {h}": lambda h=h: _q(h) for h in ("mse", "hl_gauss", "two_hot", "c51", "mse_softmax")},
    "sac critic": lambda: (_twins(), transitions(), SoftBellman(), _read(_twins(), "squashed")),
    "sac critic two_hot": lambda: (
        _twins(head="two_hot"),
        transitions(),
        SoftBellman(),
        _read(_twins(head="two_hot"), "squashed"),
    ),
    "sac critic discrete": lambda: (
        _twins(True),
        transitions(actions=4),
        SoftBellman(),
        _read(_twins(True), "categorical"),
    ),
    "sac actor": lambda: (_actor("squashed"), transitions(), SoftImprovement(), {"critic": _twins()}),
    "sac actor discrete": lambda: (
        _actor("categorical"),
        transitions(actions=4),
        SoftImprovement(),
        {"critic": _twins(True)},
    ),
    "td3 critic": lambda: (
        _twins(),
        transitions(),
        TwinBellman(),
        {"target": _twins(), "target_actor": controller("deterministic")},
    ),
    "td3 actor": lambda: (
        controller("deterministic"),
        transitions(),
        DeterministicImprovement(),
        {"critic": _twins()},
    ),
}


def _with_reference() -> tuple[Any, Any]:
    policy, data = _on_trajectories("gaussian")[:2]
    with torch.no_grad():
        data.reference = controller("gaussian", seed=7).distribution(data)
    return policy, data


def _read(target: Any, kind: str) -> dict[str, Any]:
    return {"target": target, "actor": _actor(kind)}


@pytest.mark.parametrize("case", list(CASES))
def test_a_whole_update_is_the_update(case: str, traced: list[int]) -> None:
    model, batch, objective, read = CASES[case]()
    plain, whole = both(model)
    others = {name: Role(name, copy.deepcopy(m)) for name, m in read.items()}
    if hasattr(batch, "mask") and case != "ppo dictionary":
        batch = batch.as_rows()
    for _ in range(3):
        alike(plain.update(batch, objective, **others), whole.update(batch, objective, **others))
        close(plain, whole)
        for other in others.values():  # what is read moves too, and must not have been compiled in
            with torch.no_grad():
                for p in other.model.parameters():
                    p.mul_(0.9)
    assert len(traced) == 1
    assert plain.updates == whole.updates == 3


@pytest.mark.parametrize("norm", [1e-3, 1e3, None])
@pytest.mark.parametrize(
    "optimiser",
    [
        Adam(1e-2, schedule="linear", total=6),
        AdamW(1e-2, schedule="cosine", total=6, warmup=2, weight_decay=0.1),
        SGD(0.1, momentum=0.5, schedule="linear", total=6),
    ],
    ids=["adam", "adamw", "sgd"],
)
def test_optimisers_schedules_and_clipping(
    optimiser: Optimiser, norm: float | None, traced: list[int]
) -> None:
    plain, whole = both(controller("gaussian"), optimiser, norm)
    data = acted(controller("gaussian", seed=1)).as_rows()
    for _ in range(5):
        a, b = plain.update(data, Reinforce()), whole.update(data, Reinforce())
        alike(a, b)
        assert ("grad_norm" in b) == (norm is not None)
        close(plain, whole)


def test_what_moves_between_updates_is_not_compiled_in(traced: list[int]) -> None:
    """Statistics in buffers, and a clip range that is a tensor."""
    plain, whole = both(controller("gaussian", normalise=True))
    data = acted(controller("gaussian", seed=1)).as_rows()
    objective = ClippedSurrogate(torch.tensor(0.5))
    for i in range(3):
        alike(plain.update(data, objective), whole.update(data, objective))
        close(plain, whole)
        objective.clip = torch.tensor(0.2 / (i + 1))
        seen = torch.randn(30, 3) * 10 - 5
        for r in (plain, whole):
            r.observe(seen)
    assert len(traced) == 1
    whole.update(data, ClippedSurrogate(torch.tensor(0.5), entropy=0.1))  # another objective
    assert len(traced) == 2
    whole.update(data, ClippedSurrogate(0.5))
    whole.update(data, ClippedSurrogate(0.4))  # a plain number is part of the function
    assert len(traced) == 4
    whole.update(data[:7], ClippedSurrogate(0.4))  # and so is the size
    assert len(traced) == 5


@pytest.mark.parametrize("shuffled", [False, True])
def test_minibatches_that_divide_evenly(shuffled: bool, traced: list[int]) -> None:
    plain, whole = both(controller("gaussian"))
    data = acted(controller("gaussian", seed=1)).as_rows()  # 20 rows
    generators = [torch.Generator().manual_seed(5) if shuffled else None for _ in range(2)]
    metrics = [
        r.fit(data, ClippedSurrogate(0.2), epochs=3, minibatch=5, generator=g)
        for r, g in zip((plain, whole), generators, strict=True)
    ]
    alike(*metrics)
    close(plain, whole)
    assert plain.updates == whole.updates == 12


def test_the_last_minibatch_is_filled_up(traced: list[int]) -> None:
    plain, whole = both(controller("gaussian"))
    data = acted(controller("gaussian", seed=1)).as_rows()
    whole.fit(data, Reinforce(), epochs=2, minibatch=8)
    filled = torch.cat([torch.arange(20), torch.arange(4)])
    for part in list(filled.split(8)) * 2:
        plain.update(data[part], Reinforce())
    close(plain, whole)
    assert whole.updates == 6


@dataclass
class Regression:
    """Means on a target; NaN in the batch makes the loss NaN."""

    def __call__(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (model.mode(batch.inputs["step", "observation"]).sum(-1) - batch.target).square().mean()
        return loss, {"loss": loss.detach() + 1.0}

    def weight(self, batch: Any) -> Tensor:
        return torch.tensor(1.0)


def test_metrics_are_the_objectives_own(traced: list[int]) -> None:
    """An objective may report another loss than the sum that it minimises."""
    plain, whole = both(controller("gaussian"))
    data = acted(controller("gaussian", seed=1)).as_rows()
    alike(plain.update(data, Regression()), whole.update(data, Regression()))


@pytest.mark.parametrize("place", [0, 11, 19])
def test_what_is_not_finite_leaves_the_weights(place: int, traced: list[int]) -> None:
    plain, whole = both(controller("gaussian"))
    data = acted(controller("gaussian", seed=1)).as_rows()
    data.target[place] = math.nan
    for r in (plain, whole):
        with pytest.raises(
            NonFiniteError, match=f"loss of 'actor' is not finite at update {place // 5}"
        ) as found:
            r.fit(data, Regression(), epochs=2, minibatch=5)
        assert found.value.batch is not None
        assert r.updates == place // 5
    close(plain, whole)
    data.target[place] = 0.0  # and it can go on
    alike(*(r.fit(data, Regression(), minibatch=5) for r in (plain, whole)))
    close(plain, whole)


def test_a_function_for_each_set_of_models(traced: list[int]) -> None:
    """What an update reads is known by the model itself, not by a name or an address that may be given again."""
    _, whole = both(_twins())
    batch, actor = transitions(), Role("actor", controller("squashed"))
    for _ in range(2):
        target = Role("target", _twins())
        whole.update(batch, SoftBellman(), target=target, actor=actor)
    assert len(traced) == 2
    whole.update(batch, SoftBellman(), target=target, actor=actor)
    assert len(traced) == 2


# --- roles around it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimiser", [Adam(1e-2), SGD(0.1), SGD(0.1, momentum=0.9)])
def test_a_restored_role_goes_on_bit_for_bit(optimiser: Optimiser, traced: list[int], tmp_path: Path) -> None:
    data = acted(controller("gaussian", seed=1)).as_rows()
    whole = both(controller("gaussian", normalise=True), optimiser)[1]
    whole.fit(data, Reinforce(), epochs=2, minibatch=5)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    again = both(controller("gaussian", seed=9, normalise=True), optimiser)[1]
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for r in (whole, again):
        r.fit(data, Reinforce(), epochs=2, minibatch=5)
    assert whole.updates == again.updates == 16
    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tau", [0.005, 1.0])
def test_copies_follow_flat_as_they_follow_apart(tau: float, traced: list[int]) -> None:
    pairs = []
    batch = transitions()
    for r in both(_twins(), norm=None):
        target, actor = r.copy(frozen=True), Role("actor", controller("squashed"))
        for _ in range(3):
            r.update(batch, SoftBellman(), target=target, actor=actor)
            target.follow(r, tau)
        pairs.append((r, target))
    close(pairs[0][0], pairs[1][0])
    close(pairs[0][1], pairs[1][1])
    if tau == 1.0:
        close(pairs[1][0], pairs[1][1], atol=0.0)
    pairs[1][1].model.requires_grad_(False)
    before = pairs[1][1].flat_weights().flat.clone()
    pairs[1][0].update(batch, SoftBellman(), target=pairs[1][1], actor=actor)
    assert torch.equal(pairs[1][1].flat_weights().flat, before)  # memory of its own


def test_a_copy_that_learns_has_an_optimiser_of_its_own(traced: list[int]) -> None:
    data = acted(controller("gaussian", seed=1)).as_rows()
    plain, whole = both(controller("gaussian"))
    for r in (plain, whole):
        r.update(data, Reinforce())
    copies = [r.copy(frozen=False) for r in (plain, whole)]
    for r in copies:
        r.update(data, Reinforce())
    close(*copies)
    for r in (plain, whole):
        r.update(data, Reinforce())
    close(plain, whole)


def test_objectives_must_be_dataclasses() -> None:
    _, whole = both(controller("gaussian"))
    with pytest.raises(UsageError, match="an objective that is a dataclass, not function"):
        whole.update(acted(controller("gaussian")), lambda model, batch: (model.log_std.sum(), {}))


# --- the binary -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GUERDON_CACHE", str(folder))
        patch.setattr(compiled, "_LOADED", {})
        yield folder / "compiled"


def _forbidden(*_: Any) -> None:
    raise AssertionError("this would be compiled")


@needs_compiler
def test_the_binary_gives_the_same_numbers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PPO's update with all that can move: statistics, the clip range, the learning rate, rows of minibatches."""
    data = acted(controller("gaussian", seed=1), 5, 4).as_rows()

    def learn(r: Role) -> list[dict[str, Tensor]]:
        r.observe(torch.full((10, 3), 2.0))
        objective = ClippedSurrogate(torch.tensor(0.3), entropy=0.01)
        metrics = []
        for i in range(2):
            generator = torch.Generator().manual_seed(i)
            metrics.append(r.fit(data, objective, epochs=2, minibatch=5, generator=generator))
            objective.clip = torch.tensor(0.1)
            r.observe(torch.randn(10, 3, generator=generator) * 4)
        return metrics

    def fresh() -> tuple[Role, Role]:
        return both(controller("gaussian", normalise=True), Adam(1e-2, schedule="linear", total=30, eps=1e-5))

    plain, whole = fresh()
    for a, b in zip(learn(plain), learn(whole), strict=True):
        alike(a, b)
    close(plain, whole)
    assert len(list(cache.glob("*.pt2"))) == 1
    # another process finds it on disk
    compiled._LOADED.clear()
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_build", _forbidden)
        again = fresh()[1]
        learn(again)
        close(whole, again, atol=0.0)
        poisoned = acted(controller("gaussian", seed=1), 5, 4).as_rows()
        poisoned.advantage[3] = math.inf
        before = again.flat_weights().flat.clone()
        with pytest.raises(NonFiniteError, match="not finite at update 16"):
            again.fit(poisoned, ClippedSurrogate(torch.tensor(0.3), entropy=0.01), minibatch=5)
        assert torch.equal(again.flat_weights().flat, before)
        # a changed objective, size or optimiser meets no stale binary
        for r, objective, rows in (
            (fresh()[1], ClippedSurrogate(torch.tensor(0.3), entropy=0.02), 5),
            (fresh()[1], ClippedSurrogate(torch.tensor(0.3), entropy=0.01), 10),
            (
                both(controller("gaussian", normalise=True), Adam(1e-2))[1],
                ClippedSurrogate(torch.tensor(0.3)),
                5,
            ),
        ):
            with pytest.raises(UsageError, match="would be compiled"):
                r.fit(data, objective, minibatch=rows)


@needs_compiler
def test_the_binary_reads_other_models(cache: Path) -> None:
    """SAC's critic: twins, a slow copy that follows, an actor whose weights and temperature move."""
    plain, whole = both(_twins(), Adam(1e-2), None)
    batch = transitions()
    pairs = []
    for r in (plain, whole):
        target, actor = r.copy(frozen=True), Role("actor", _actor("squashed"))
        metrics = []
        for _ in range(4):
            metrics.append(r.update(batch, SoftBellman(), target=target, actor=actor))
            target.follow(r, 0.3)
            with torch.no_grad():
                for p in actor.model.parameters():
                    p.mul_(0.8)
        pairs.append(metrics)
    for a, b in zip(*pairs, strict=True):
        alike(a, b)
    close(plain, whole)


def test_constants_are_part_of_the_hash() -> None:
    """Numbers that tracing keeps beside the code (tables in an objective) tell functions apart."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def graph(table: list[float]) -> Any:
        return make_fx(lambda x: x * torch.tensor(table), tracing_mode="fake")(torch.ones(2))

    one, same, other = graph([1.0, 2.0]), graph([1.0, 2.0]), graph([1.0, 3.0])
    assert one.code == other.code
    example = [torch.ones(2)]
    assert compiled._key(one, example) == compiled._key(same, example)
    assert compiled._key(one, example) != compiled._key(other, example)
    assert compiled._key(one, example) != compiled._key(one, [torch.ones(3)])
    assert compiled._key(one, example) != compiled._key(one, [torch.ones(2, dtype=torch.float64)])


def test_where_binaries_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("GUERDON_CACHE", raising=False)
    assert compiled.cache_folder() == Path("/somewhere/guerdon/compiled")
    monkeypatch.setenv("GUERDON_CACHE", "/elsewhere")
    assert compiled.cache_folder() == Path("/elsewhere/compiled")
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler" in str(compiled.available())
