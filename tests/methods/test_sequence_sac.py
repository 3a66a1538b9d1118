"""SequenceSAC: what its parts do together, what it learns, what it leaves behind, and how it resumes."""

import json

import numpy as np
import pytest
import torch
from tests.evaluation.environments_for_frequency import Chase

from guerdon.dynamics.one_step import OneStepModel, Shooting
from guerdon.engine.local import LocalEngine
from guerdon.errors import UsageError
from guerdon.evaluation.frequency import return_by_length
from guerdon.experience.environments import make
from guerdon.experience.rollouts import Rollouts
from guerdon.methods.online.sequence_sac import SequenceSAC
from guerdon.objectives.sequence import SequenceBellman, SequenceImprovement, TimeAwareBellman
from guerdon.policies.action_sequence import SequenceGaussian
from guerdon.policies.control import load_controller
from guerdon.roles import Role
from guerdon.run import Run
from guerdon.run.checkpoint import load_newest
from guerdon.tasks.base import Pieces
from guerdon.tasks.control import Control

SMALL = {"hidden": (16,), "critic_hidden": (16, 16), "model_hidden": (16, 16), "batch_size": 16}


class Training:
    """One run, with every update that was made: ``updates`` of (role, objective, batch, names of the others)."""

    def __init__(
        self, folder, monkeypatch=None, env="Pendulum-v1", seed=0, resume=False, broken=None, **options
    ):
        self.method = SequenceSAC(**{"steps": 1000, "start": 960, **SMALL, **options})
        self.updates = []
        if monkeypatch is not None:
            self._watch(monkeypatch)
        engine = LocalEngine("cpu", threads=1)
        experience = Rollouts(make(env, self.method.environments, seed), seed=seed)
        if broken:
            experience.environments.step = broken.__get__(experience.environments)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            policy = Control(Pieces(env=env), self.method).policy("gaussian")
        assert isinstance(policy, SequenceGaussian)
        self.folder = folder
        with Run(folder, engine=engine, seed=seed, progress=False, resume=resume, checkpoint_steps=1) as run:
            self.actor = run.role("actor", policy, settings=self.method.roles()["actor"])
            run.track("experience", experience)
            self.method.train(run, self.actor, experience)
        self.records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def _watch(self, monkeypatch):
        update = Role.update

        def watched(role, batch, objective, **others):
            frozen = {name: weights(other).clone() for name, other in others.items()}
            figures = update(role, batch, objective, **others)
            for name, other in others.items():
                assert torch.equal(weights(other), frozen[name])
            self.updates.append((role.name, objective, batch, sorted(others)))
            return figures

        monkeypatch.setattr(Role, "update", watched)

    def of(self, name):
        return [update for update in self.updates if update[0] == name]


def weights(role):
    return torch.cat([p.detach().flatten() for p in role.model.parameters()])


def test_the_actor_is_updated_every_j_steps_critic_and_model_every_step(tmp_path, monkeypatch):
    training = Training(tmp_path / "run", monkeypatch, length=8)
    names = [name for name, *_ in training.updates]
    assert names == [n for t in range(1, 41) for n in ("critic", "model", *(["actor"] if t % 8 == 0 else []))]
    record = training.records[-1]
    assert (record["critic_updates"], record["actor_updates"], record["decisions"]) == (40, 5, 5)


def test_the_critic_learns_from_real_steps_and_is_untouched_by_the_actors_update(tmp_path, monkeypatch):
    training = Training(tmp_path / "run", monkeypatch, length=4)  # untouched: checked at every update
    for _, objective, batch, others in training.of("critic"):
        assert isinstance(objective, SequenceBellman)
        assert others == ["actor", "target"]  # no model, so nothing imagined
        assert batch.noise.shape == (16, 2, 1)
    for _, objective, batch, others in training.of("actor"):
        assert isinstance(objective, SequenceImprovement)
        assert others == ["critic", "recalled"]
        assert batch.noise.shape == (16, 4, 1)
        assert batch.previous_action.abs().sum() > 0
    # model and actor share a sample, which is not the critic's
    critic, model = training.of("critic"), training.of("model")
    assert training.of("actor")[0][2] is model[3][2]
    assert all(not torch.equal(c[2].index, m[2].index) for c, m in zip(critic, model, strict=True))


def test_the_models_slow_copy_recalls(tmp_path):
    training = Training(tmp_path / "run", tau=0.25, length=4)
    saved = load_newest(training.folder)[1]["objects"]
    live, slow = (saved[name]["weights"]["layers.0.weight"] for name in ("model", "model_target"))
    assert not torch.equal(live, slow)
    assert (live - slow).abs().max() < 0.1


SWITCHES = (
    {"cell": "rnn"},
    {"time_aware": True},
    {"recall": "backprop"},
    {"recall": "none"},
    {"recall": "replay"},
    {"latent": 5, "horizon": 3},
    {"length": 1},
    {"environments": 2},
)


@pytest.mark.parametrize("options", SWITCHES, ids=str)
def test_every_switch_does_what_it_says(tmp_path, monkeypatch, options):
    training = Training(tmp_path / "run", monkeypatch, **{"length": 4, **options})
    policy, method = training.actor.model, training.method
    assert type(policy.cell) is (torch.nn.RNNCell if method.cell == "rnn" else torch.nn.GRUCell)
    assert (TimeAwareBellman in map(type, [u[1] for u in training.of("critic")])) == method.time_aware
    assert bool(training.of("model")) == (method.recall in ("model", "backprop"))
    actor = training.of("actor")
    assert len(actor) == 40 // method.length
    assert {u[1].recall for u in actor} == {method.recall}
    assert len(actor[0][2].reward) == 16 * (4 if method.recall == "replay" else 1)
    if method.latent:
        encoder = load_newest(training.folder)[1]["objects"]["model"]["weights"]
        assert torch.equal(policy.project.weight, encoder["encoder.project.weight"])
        assert torch.equal(policy.features.layers[0].weight, encoder["encoder.features.layers.0.weight"])
    assert all(np.isfinite(v) for v in training.records[-1].values() if isinstance(v, float))


def test_it_learns_to_act_from_one_observation_for_several_steps(tmp_path):
    options = {"length": 4, "steps": 1000, "start": 100, "lr": 5e-3, "gamma": 0.9, "tau": 0.02, "alpha": 0.1}
    training = Training(tmp_path / "run", env=Chase, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = Control(Pieces(env=Chase), training.method).policy("gaussian")
    sweep = {"env_id": Chase, "lengths": (1, 4), "episodes": 30}
    before, after = (return_by_length(policy, **sweep) for policy in (untrained, training.actor.model))
    assert np.mean(before[4]) < -4.0
    assert np.mean(after[4]) > -1.5
    assert np.mean(after[1]) > -1.5

    saved = load_newest(training.folder)[1]["objects"]  # the planner with the same critic and model
    method, policy = training.method, training.actor.model
    critic, model = method.make_critic(policy), method.make_model(policy)
    critic.load_state_dict(saved["critic"]["weights"])
    model.load_state_dict(saved["model"]["weights"])
    planned = return_by_length(Shooting(policy, critic, model, gamma=0.9), **sweep)
    assert np.mean(planned[4]) > -1.5


def test_the_model_is_absent_from_the_exported_policy_and_from_acting(tmp_path, monkeypatch):
    training = Training(tmp_path / "run", length=4)

    def called(*arguments):
        raise AssertionError("acting called the model")

    monkeypatch.setattr(OneStepModel, "forward", called)
    training.actor.save(tmp_path / "model")
    loaded = load_controller(tmp_path / "model")
    assert isinstance(loaded, SequenceGaussian)
    kept = {name.partition(".")[0] for name in loaded.state_dict()}
    assert kept == {"features", "mean", "log_std", "start", "cell"}
    mine, theirs = (
        return_by_length(policy, "Pendulum-v1", lengths=(1, 8), episodes=2)
        for policy in (training.actor.model, loaded)
    )
    assert mine == theirs


def test_options_that_do_not_go_together_are_refused(tmp_path):
    for options, word in (
        ({"latent": 5, "recall": "replay"}, "latent"),
        ({"time_aware": True, "recall": "none"}, "time-aware"),
    ):
        with pytest.raises(UsageError, match=word):
            Training(tmp_path / word, **options)
    gaussian, sequence = (
        Control(Pieces(env="Pendulum-v1"), method).policy("gaussian") for method in (None, SequenceSAC())
    )
    for policy, word in ((gaussian, "not a Gaussian"), (sequence, "cell 'gru'")):
        with pytest.raises(UsageError, match=word):
            SequenceSAC(cell="rnn")._fitting(policy)


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    class KilledError(Exception):
        pass

    def killed(self, action):
        if self._steps == 1010:
            raise KilledError
        return type(self).step(self, action)

    options = {"steps": 2000, "length": 3}
    whole = Training(tmp_path / "whole", **options)
    with pytest.raises(KilledError):
        Training(tmp_path / "run", broken=killed, **options)
    assert load_newest(tmp_path / "run")[0] == 1  # forty updates, and a sequence under way, lie before it
    again = Training(tmp_path / "run", resume=True, **options)
    assert torch.equal(weights(again.actor), weights(whole.actor))
    assert again.records == whole.records
