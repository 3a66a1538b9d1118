"""The losses of sequence learning against naive loops, and their reduction to SAC's."""

import pytest
import torch

from guerdon import compiled
from guerdon.batch import Transitions
from guerdon.critics.action import ActionCritic
from guerdon.dynamics.one_step import OneStepModel
from guerdon.objectives.action_value import SoftBellman, SoftImprovement
from guerdon.objectives.sequence import (
    LatentPrediction,
    OneStepPrediction,
    SequenceBellman,
    SequenceImprovement,
    TimeAwareBellman,
)
from guerdon.optim import Adam
from guerdon.policies.action_sequence import Encoder, SequenceGaussian
from guerdon.policies.features import Entry, Features
from guerdon.roles import Role, RoleSettings

N, S, A, J = 6, 3, 2, 4


def models(latent=0, timed=False, seed=0):
    torch.manual_seed(seed)
    features = Features({"": Entry((S,))}, (8,), "relu")
    actor = SequenceGaussian(features, [-2.0] * A, [2.0] * A, latent=latent)
    actor.learn_temperature(0.3)
    state = actor.state_size
    encoder = Encoder(Features({"": Entry((S,))}, (8,), "relu"), latent) if latent else None
    model = OneStepModel(state, A, (8, 8), encoder)
    if latent:
        actor.take_encoder(encoder)

    def critic():
        flat = Features({"": Entry((state + timed,))}, (), "relu")
        return ActionCritic(flat, action=A, hidden=(8, 8))

    return actor, critic(), critic(), model


def batch(rows=N, draws=J, seed=1, weight=None):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g)
    return Transitions(
        observation=normal(rows, S),
        action=normal(rows, A).tanh(),
        reward=normal(rows),
        next_observation=normal(rows, S),
        terminated=torch.arange(rows) % 3 == 0,
        truncated=torch.arange(rows) % 3 == 1,
        discount=torch.full((rows,), 0.9),
        previous_action=normal(rows, A).tanh(),
        noise=normal(rows, draws, A),
        weight=weight,
    )


def gradient(loss, model):
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat([torch.zeros(1) if g is None else g.flatten() for g in found])


# --- the critic -------------------------------------------------------------------------------------------


def test_the_critic_bootstraps_with_the_action_taken_as_the_previous_one_and_beyond_truncation():
    actor, critic, target, _ = models()
    data = batch(draws=2)
    loss, _ = SequenceBellman()(critic, data, target=target, actor=actor)
    expected = torch.zeros(())
    for i in range(N):
        action, log_prob = actor.draw_sequence(
            data.next_observation[i : i + 1], data.action[i : i + 1], data.noise[i : i + 1, 1:2]
        )
        value = target.q(data.next_observation[i : i + 1], action[:, 0]).amin(0) - 0.3 * log_prob[:, 0]
        goes_on = 0.0 if data.terminated[i] else 0.9  # a truncated step is followed by something
        y = (data.reward[i] + goes_on * value).detach()
        q = critic.q(data.observation[i : i + 1], data.action[i : i + 1])
        expected = expected + (q - y).square().sum() / N
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, critic), gradient(expected, critic))
    unlike = batch(draws=2)
    unlike.action = -unlike.action
    assert not torch.allclose(SequenceBellman()(critic, unlike, target=target, actor=actor)[0], loss)


class AfterPrevious:
    """A sequence actor as SAC's objectives know actors: it draws one action, after the given previous ones."""

    kind = "gaussian"

    def __init__(self, actor, before, after):
        self.inner, self.before, self.after = actor, before, after
        self.log_temperature = actor.log_temperature

    def draw(self, observation, noise):
        previous = self.after if torch.equal(observation, self.seen_after) else self.before
        actions, log_probs = self.inner.draw_sequence(observation, previous, noise[:, None])
        return actions[:, 0], log_probs[:, 0]


def test_length_one_reduces_to_sac_with_a_previous_action():
    actor, critic, target, model = models()
    data = batch(draws=2)
    plain = AfterPrevious(actor, data.previous_action, data.action)
    plain.seen_after = data.next_observation
    ours = SequenceBellman()(critic, data, target=target, actor=actor)[0]
    sacs = SoftBellman()(critic, data, target=target, actor=plain)[0]
    torch.testing.assert_close(ours, sacs)

    first = batch(draws=2)
    first.noise = first.noise[:, :1]
    improvement = SequenceImprovement(1, target_entropy=-2.0)
    ours = improvement(actor, first, critic=critic, recalled=model)[0]
    sacs = SoftImprovement(target_entropy=-2.0)(plain, data, critic=critic)[0]
    torch.testing.assert_close(ours, sacs)
    torch.testing.assert_close(gradient(ours, actor), gradient(sacs, actor))


# --- the actor --------------------------------------------------------------------------------------------


def naive_improvement(actor, critic, model, data, recall, timed=False):
    """Row by row, action by action."""
    total = torch.zeros(())
    for i in range(N):
        row = slice(i, i + 1)
        actions, log_probs = actor.draw_sequence(
            data.observation[row], data.previous_action[row], data.noise[row]
        )
        state, losses = actor.state(data.observation[row]), []
        for j in range(J):
            seen = torch.cat([state, torch.full((1, 1), float(j))], -1) if timed else state
            q = critic.q(seen, actions[:, j]).amin(0)
            losses.append((0.3 * log_probs[:, j] - q).sum())
            if recall == "model":
                state = model(state, actions[:, j]).detach()
            elif recall == "backprop":
                state = model(state, actions[:, j])
        total = total + (losses[-1] if recall == "backprop" else sum(losses)) / N
    return total


@pytest.mark.parametrize("recall", ["model", "backprop", "none"])
def test_recalled_states_are_the_models_without_gradient_unless_asked(recall):
    actor, critic, _, model = models()
    data = batch()
    improvement = SequenceImprovement(J, recall=recall)
    actor.log_temperature.requires_grad_(False)
    own = actor.log_temperature
    loss, metrics = improvement(actor, data, critic=critic, recalled=model)
    expected = naive_improvement(actor, critic, model, data, recall)
    torch.testing.assert_close(metrics["loss"], expected.detach())
    weights = [p for name, p in actor.named_parameters() if name != "log_temperature"]
    ours = torch.autograd.grad(loss, weights, retain_graph=True)
    naive = torch.autograd.grad(expected, weights)
    for mine, theirs in zip(ours, naive, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    reaches_model = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert any(g is not None for g in reaches_model) == (recall == "backprop")
    assert own.grad is None


def test_states_from_the_replay_stop_counting_where_the_episode_ends():
    actor, critic, _, _ = models()
    weight = torch.ones(N, J)
    weight[0, 2:] = 0.0
    data = batch(rows=N * J, draws=1, weight=weight.flatten())
    data.observation[2] = data.observation[3] = 1e3  # beyond the end of the first run
    loss = SequenceImprovement(J, recall="replay")(actor, data, critic=critic)[1]["loss"]
    observation = data.observation.view(N, J, S)
    noise = data.noise.view(N, J, A)
    previous = data.previous_action.view(N, J, A)[:, 0]
    actions, log_probs = actor.draw_sequence(observation[:, 0], previous, noise)
    expected = torch.zeros(())
    for i in range(N):
        for j in range(J):
            if i or j < 2:
                q = critic.q(observation[i, j][None], actions[i, j][None]).amin()
                expected = expected + (0.3 * log_probs[i, j] - q) / N
    torch.testing.assert_close(loss, expected.detach())


def test_the_temperature_sees_the_entropy_averaged_over_the_sequence():
    actor, critic, _, model = models()
    data = batch()
    loss, metrics = SequenceImprovement(J, target_entropy=-0.7)(actor, data, critic=critic, recalled=model)
    (slope,) = torch.autograd.grad(loss, actor.log_temperature)
    log_probs = actor.draw_sequence(data.observation, data.previous_action, data.noise)[1]
    torch.testing.assert_close(slope, -log_probs.mean().detach() + 0.7)
    torch.testing.assert_close(metrics["entropy"], -log_probs.mean().detach())
    assert metrics["alpha"] == pytest.approx(0.3)


def test_the_loss_is_a_sum_over_the_sequence():
    actor, critic, _, model = models()
    for weight in [*critic.head.parameters()]:
        torch.nn.init.zeros_(weight)
    data = batch()
    loss = SequenceImprovement(J)(actor, data, critic=critic, recalled=model)[1]["loss"]
    log_probs = actor.draw_sequence(data.observation, data.previous_action, data.noise)[1]
    torch.testing.assert_close(loss, 0.3 * J * log_probs.mean().detach())


# --- the model --------------------------------------------------------------------------------------------


def test_the_model_fits_the_next_state():
    actor, _, _, model = models()
    data = batch()
    loss = OneStepPrediction()(model, data, actor=actor)[0]
    expected = torch.nn.functional.mse_loss(model(data.observation, data.action), data.next_observation)
    torch.testing.assert_close(loss, expected)


# --- variants ---------------------------------------------------------------------------------------------


def test_a_time_aware_critic_learns_from_recalled_states_and_their_position():
    actor, critic, target, model = models(timed=True)
    weight = torch.ones(N, J)
    weight[1, 1:] = 0.0
    data = batch(rows=N * J, draws=2, weight=weight.flatten())
    loss = TimeAwareBellman(J)(critic, data, target=target, actor=actor, recalled=model)[0]
    expected, real = torch.zeros(()), 0
    for i in range(N):
        state = data.observation[i * J]
        for j in range(J):
            row = i * J + j
            if weight[i, j]:
                after, taken = data.next_observation[row], data.action[row]
                action, log_prob = actor.draw_sequence(
                    after[None], taken[None], data.noise[row, 1][None, None]
                )
                q = target.q(torch.cat([after, torch.zeros(1)])[None], action[:, 0]).amin()
                goes_on = 0.0 if data.terminated[row] else 0.9
                y = (data.reward[row] + goes_on * (q - 0.3 * log_prob[0, 0])).detach()
                seen = torch.cat([state, torch.tensor([float(j)])])[None]
                expected = expected + (critic.q(seen, taken[None]) - y).square().sum()
                real += 1
            state = model(state, data.action[row]).detach()
    torch.testing.assert_close(loss, expected / real)
    improvement = SequenceImprovement(J, time_aware=True)
    short = batch()
    found = improvement(actor, short, critic=critic, recalled=model)[1]["loss"]
    naive = naive_improvement(actor, critic, model, short, "model", timed=True)
    torch.testing.assert_close(found, naive.detach())


def test_a_latent_model_foresees_what_the_slow_encoder_makes_of_observations():
    actor, _, _, model = models(latent=5)
    slow = models(latent=5, seed=9)[3]
    weight = torch.ones(N, J)
    weight[2, 1:] = 0.0
    data = batch(rows=N * J, weight=weight.flatten())
    loss = LatentPrediction(J, decay=0.5)(model, data, target=slow)[0]
    expected = torch.zeros(())
    for i in range(N):
        state = model.encoder(data.observation[i * J])
        for j in range(J):
            state = model(state, data.action[i * J + j])
            goal = slow.encoder(data.next_observation[i * J + j]).detach()
            expected = expected + weight[i, j] * 0.5**j * (state - goal).square().mean() / N
    torch.testing.assert_close(loss, expected)
    assert gradient(loss, model.encoder).abs().sum() > 0
    assert gradient(loss, slow).abs().sum() == 0
    found = SequenceImprovement(J)(actor, batch(), critic=models(latent=5)[1], recalled=model)[0]
    assert torch.isfinite(found)


# --- whole updates ----------------------------------------------------------------------------------------


def traced(function, examples):
    """What is compiled, as it was traced."""
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
    return lambda inputs: graph(*inputs)


@pytest.mark.parametrize(("recall", "latent"), [("model", 0), ("model", 5), ("backprop", 0), ("replay", 0)])
def test_whole_updates_can_be_traced_and_equal_plain_ones(monkeypatch, recall, latent):
    monkeypatch.setattr(compiled, "compile_function", traced)
    runs = batch(rows=N * J, draws=1, weight=torch.ones(N * J))
    found = {}
    for compile in (False, "update"):
        names = ("actor", "critic", "target", "model")
        settings = RoleSettings(Adam(1e-3), max_grad_norm=None, compile=compile)
        roles = {n: Role(n, m, settings) for n, m in zip(names, models(latent), strict=True)}
        actor, critic, target, model = roles.values()
        recalled = {"recalled": model} if recall in ("model", "backprop") else {}
        slow = model.copy(frozen=True)
        for seed in range(2):  # the second with other weights and numbers than it was traced with
            critic.update(batch(draws=2, seed=seed), SequenceBellman(), target=target, actor=actor)
            if latent:
                model.update(runs, LatentPrediction(J), target=slow)
                actor.model.take_encoder(model.model.encoder)
            else:
                model.update(batch(seed=seed), OneStepPrediction(), actor=actor)
            data = runs if recall == "replay" else batch(seed=seed)
            actor.update(data, SequenceImprovement(J, recall=recall), critic=critic, **recalled)
        found[compile] = [p.detach().clone() for r in roles.values() for p in r.model.parameters()]
    for plain, whole in zip(found[False], found["update"], strict=True):
        torch.testing.assert_close(plain, whole, atol=1e-5, rtol=1e-4)
