"""CoPG: the optimum from anybody's answers on problems with closed forms, its sources, and what resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.engine.local import LocalEngine
from guerdon.errors import UsageError
from guerdon.experience.datasets import InMemory
from guerdon.experience.prompts import Prompted, Prompts
from guerdon.methods.online.copg import CoPG
from guerdon.objectives.contrastive import ContrastivePolicyGradient
from guerdon.policies.tabular import CategoricalTable
from guerdon.randomness import row_seeds
from guerdon.reproductions import copg as experiment
from guerdon.roles import Role
from guerdon.run import Run
from guerdon.tasks.bandit import CONTEXTS, MEANS, Bandit
from guerdon.tasks.enumlm import world
from tiny import Watched, train

BETA = 0.2
REWARD = torch.from_numpy(MEANS)
OPTIMUM = (REWARD / BETA).log_softmax(1)  # the reference is uniform


def answers(n: int, seed: int, size: int = 2) -> Trajectories:
    """Rated answers of a behaviour that favours the first arms, side by side in groups of ``size``."""
    behaviour = CategoricalTable(CONTEXTS, 5)
    behaviour.logits.data.copy_(torch.tensor([1.5, 1.0, 0.0, -0.5, -0.5]).expand(4, 5))
    names = [CONTEXTS[i // size % 4] for i in range(n)]
    with torch.no_grad():
        traj = behaviour.sample(names, row_seeds(seed, 0, n))
    context, action = (traj.inputs["step", name][:, 0] for name in ("context", "action"))
    return traj.judged(REWARD[context, action])


def learn(
    method: CoPG, folder: Path, policy: Any = None, seed: int = 0, **pieces: Any
) -> tuple[Watched, list[dict[str, Any]]]:
    """The actor after training, with every batch it learned from."""
    actor = Watched("actor", policy or CategoricalTable(CONTEXTS, 5), method.roles()["actor"])
    engine = LocalEngine("cpu", threads=1)
    with Run(folder / "run", engine=engine, seed=seed, progress=False, checkpoint_every=1e9) as run:
        method.train(run, actor=actor, **pieces)
    engine.close()
    return actor, actor.calls


def table(actor: Role) -> Tensor:
    return actor.model.logits.detach().log_softmax(1)  # type: ignore[union-attr,operator]


def kl(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum(1).mean())


# --- the bandit of the paper ------------------------------------------------------------------------------


def test_of_all_baselines_the_contrast_alone_leads_to_the_optimum() -> None:
    """Three arms, rewards 2.5, 2 and 1, data from (0.1, 0.2, 0.7), exact gradients."""
    regret = {
        name: experiment.exact_regret(name, seed=0, steps=800, rate=1.0)[-1] for name in experiment.BASELINES
    }
    assert regret["CoPG"] < 1e-3
    assert regret["b = E[R_b]"] < 1e-3
    assert regret["b = 0"] == pytest.approx(
        0.505, abs=2e-3
    )  # by solving for where the expected gradient vanishes
    assert regret["b = E[R]"] == pytest.approx(0.107, abs=2e-3)
    assert regret["IPO on ranks"] == pytest.approx(0.077, abs=2e-3)


# --- sources ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
def test_recorded_answers_of_a_bad_behaviour_lead_to_the_optimum(size: int, tmp_path: Path) -> None:
    method = CoPG(beta=BETA, group_size=size, epochs=30, minibatch=256 // size, lr=0.05, max_grad_norm=10.0)
    data = answers(1600, 0, size)
    assert kl(torch.zeros(4, 5).log_softmax(1), OPTIMUM) > 0.5
    actor, calls = learn(method, tmp_path, rated=InMemory(data))
    assert kl(table(actor), OPTIMUM) < 1e-3
    for batch, objective, _ in calls[:3]:
        assert isinstance(objective, ContrastivePolicyGradient)
        assert batch.group.tolist() == [i // size for i in range(len(batch.mask))]
        context = batch.inputs["step", "context"].view(-1, size)
        assert (context == context[:, :1]).all()


@pytest.mark.parametrize("kept", [1, 4])
def test_sampled_answers_and_those_of_past_rounds_lead_to_the_optimum(kept: int, tmp_path: Path) -> None:
    method = CoPG(
        source="sampled",
        beta=BETA,
        rounds=60,
        prompts_per_round=32,
        kept_rounds=kept,
        minibatch=32,
        lr=0.05,
        max_grad_norm=10.0,
    )
    experience = Prompted(Prompts(CONTEXTS, seed=0), seed=0)
    actor, calls = learn(method, tmp_path, experience=experience, feedback=Bandit().feedback())
    assert kl(table(actor), OPTIMUM) < 0.02
    stale = max(int(batch.version.max() - batch.version.min()) for batch, _, _ in calls)
    assert (stale > 0) == (kept > 1)


def test_the_diagnostics_tell_when_the_optimum_is_reached(tmp_path: Path) -> None:
    method = CoPG(beta=BETA, epochs=60, minibatch=128, lr=0.05, max_grad_norm=10.0)
    _, calls = learn(method, tmp_path, rated=InMemory(answers(800, 0)))
    spread = [float(metrics["spread"]) for _, _, metrics in calls]
    assert spread[0] > 0.15
    assert spread[-1] < 0.01
    assert float(calls[-1][2]["loss"]) < 1e-3


def test_pairs_of_equal_answers_are_dropped_before_batching(tmp_path: Path) -> None:
    data = answers(400, 0)
    action = data.inputs["step", "action"].view(-1, 2)
    differ = int((action[:, 0] != action[:, 1]).sum())
    assert differ < 200
    _, calls = learn(CoPG(minibatch=50), tmp_path, rated=InMemory(data))
    seen = torch.cat([batch.inputs["step", "action"].view(-1, 2) for batch, _, _ in calls])
    assert len(seen) == differ
    assert (seen[:, 0] != seen[:, 1]).all()


def test_micro_batches_of_groups_give_the_same_policy(tmp_path: Path) -> None:
    data = InMemory(answers(120, 0, 3))
    tables = [
        table(learn(CoPG(group_size=3, lr=0.1, micro_batch=size), tmp_path / str(size), rated=data)[0])
        for size in (None, 4)
    ]
    torch.testing.assert_close(tables[0], tables[1])


def test_rewards_are_not_whitened(tmp_path: Path) -> None:
    """Ten times the reward at ten times beta is the same problem; at the same beta it is another."""
    base = {"epochs": 30, "minibatch": 256, "lr": 0.05, "max_grad_norm": 100.0}
    data = answers(1600, 0)
    large = InMemory(data.judged(10 * data.score() - 3))
    same = learn(CoPG(beta=10 * BETA, **base), tmp_path / "a", rated=large)[0]
    assert kl(table(same), OPTIMUM) < 1e-3
    harder = learn(CoPG(beta=BETA, **base), tmp_path / "b", rated=large)[0]
    assert kl(table(harder), OPTIMUM) > 0.2


def test_a_language_model_improves_on_answers_of_a_bad_policy(tmp_path: Path) -> None:
    here = world(100)
    data = here.rated(1600, 100, temperature=2.0, group_size=2)
    method = CoPG(beta=0.5, epochs=3, minibatch=32, lr=1e-3)
    actor, _ = learn(method, tmp_path, here.policy(), rated=InMemory(data))
    assert here.measures(actor)["gap"] > 0.3


def test_a_killed_run_goes_on_with_the_rounds_it_kept(tmp_path: Path) -> None:
    options: dict[str, Any] = {"source": "sampled", "prompts_per_round": 8, "minibatch": 4, "lr": 0.05}

    def run(folder: Path, stop: int | None = None) -> Tensor:
        method = CoPG(rounds=6, kept_rounds=3, **options)
        engine = LocalEngine("cpu", threads=1)
        experience = Prompted(Prompts(CONTEXTS, seed=0), seed=0)

        class KilledError(Exception):
            pass

        class Judge:
            name = "judge"

            def score(self, traj: Trajectories) -> Tensor:
                if experience.rows == stop:
                    raise KilledError
                return Bandit().feedback().score(traj)

        resume = folder.exists()
        actor = engine.role("actor", CategoricalTable(CONTEXTS, 5), settings=method.roles()["actor"])
        try:
            with Run(folder, engine=engine, seed=3, progress=False, checkpoint_steps=1, resume=resume) as run:
                run.adopt("actor", actor)
                run.track("experience", experience)
                method.train(run, actor=actor, experience=experience, feedback=Judge())
        except KilledError:
            return run_again(folder)
        return table(actor)

    def run_again(folder: Path) -> Tensor:
        return run(folder)

    assert torch.equal(run(tmp_path / "whole"), run(tmp_path / "killed", stop=5 * 16))
    records = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed")]
    assert records[0] == records[1]


# --- options ----------------------------------------------------------------------------------------------


def test_options_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="group_size is 1"):
        CoPG(group_size=1)
    with pytest.raises(UsageError, match="no rated answers to learn from"):
        learn(CoPG(), tmp_path / "a")
    with pytest.raises(UsageError, match="needs prompts and a reward"):
        learn(CoPG(source="sampled"), tmp_path / "b")


def test_it_says_what_its_options_make_use_of() -> None:
    assert CoPG().unread == {"experience", "feedback"}
    assert not CoPG().judged
    assert CoPG(source="sampled").unread == {"rated"}
    assert CoPG(source="sampled").judged


def test_no_other_network_and_no_advantage_is_needed(tmp_path: Path) -> None:
    assert set(CoPG().roles()) == {"actor"}
    traj = answers(8, 0)
    assert traj.advantage is None
    assert traj.value is None
    actor = train(
        CoPG(source="sampled", rounds=1, prompts_per_round=8, lr=0.1),
        CategoricalTable(CONTEXTS, 5),
        Prompted(CONTEXTS),
        Bandit().feedback(),
        tmp_path,
    )
    assert actor.updates >= 1
