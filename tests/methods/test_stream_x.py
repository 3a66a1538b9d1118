"""Stream Q, SARSA, AC and TD against the paper's algorithms written with autograd and lists of tensors; then what
they learn, what they keep, and how they resume."""

import copy
import json
import math
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces

from experience.environments_for_tests import Truncates
from guerdon.engine.local import LocalEngine
from guerdon.errors import NonFiniteError, UsageError
from guerdon.experience.environments import make
from guerdon.experience.rollouts import Rollouts
from guerdon.experience.stream import Stream
from guerdon.methods.online.stream_ac import StreamAC
from guerdon.methods.online.stream_q import StreamQ
from guerdon.methods.online.stream_td import StreamTD
from guerdon.run import Run
from guerdon.streaming import Learner
from guerdon.tasks.series import make_series


class Training:
    """One run of a method, with what it began from."""

    def __init__(self, folder, method, experience, seed=0, resume=False, **options):
        experience = Rollouts(experience, seed)
        engine = LocalEngine("cpu", threads=1)
        with Run(folder, engine=engine, seed=seed, progress=False, resume=resume, **options) as run:
            run.track("experience", experience)
            models = method.models(experience.environments, torch.Generator().manual_seed(seed))
            self.initial = copy.deepcopy(models)
            settings = method.roles()
            self.roles = {n: run.role(n, m, settings=settings[n]) for n, m in models.items()}
            self.generator = torch.Generator()
            self.generator.set_state(run.generator.get_state())
            method.train(run, experience=experience, **self.roles)
        self.records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def weights(self, name="actor"):
        return torch.cat([p.detach().flatten() for p in self.roles[name].model.parameters()])


class Naive:
    """A network, its trace and ObGD, one tensor at a time, as the paper's algorithms write it."""

    def __init__(self, module, decay, kappa, lr=None):
        self.module, self.decay, self.kappa, self.lr = module, decay, kappa, lr
        self.parameters = list(module.parameters())
        self.reset()

    def reset(self):
        self.traces = [torch.zeros_like(p) for p in self.parameters]

    def __call__(self, x):
        return self.module(torch.from_numpy(x))

    def value(self, x):
        with torch.no_grad():
            return self(x)

    def step(self, prediction, delta):
        gradients = torch.autograd.grad(prediction, self.parameters)
        self.traces = [self.decay * z + g for z, g in zip(self.traces, gradients, strict=True)]
        norm = sum(z.abs().sum().item() for z in self.traces)
        bound = self.kappa * max(abs(delta), 1.0) * norm
        size = self.lr if self.lr is not None else (1 / bound if bound > 1 else 1.0)
        with torch.no_grad():
            for p, z in zip(self.parameters, self.traces, strict=True):
                p += size * delta * z

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.parameters])


# --- the algorithms ---------------------------------------------------------------------------------------


def naive_q(method, module, stream, generator):
    """The network after ``method.steps`` steps, and how often its trace was cut and was not, by reason."""
    learner = Naive(
        module,
        method.gamma * method.lam,
        method.kappa,
        method.alpha if method.optimiser == "sgd" else None,
    )
    sarsa = method.target == "sarsa"
    counts = dict.fromkeys(("greedy", "random", "random but greedy", "end"), 0)
    ahead = None
    for t in range(1, method.steps + 1):
        if (t - 1) % method.log_every == 0:
            rows = min(method.log_every, method.steps - t + 1)
            chances = iter(torch.rand(rows, 4, generator=generator).tolist())
        now, which, later, which_later = next(chances)
        epsilon = max(
            method.epsilon_end,
            1 + (method.epsilon_end - 1) * t / (method.exploration_fraction * method.steps),
        )
        q = learner(stream.observation)
        best = int(q.argmax())
        random = now < epsilon and ahead is None
        action = ahead if ahead is not None else int(which * len(q)) if random else best
        move = stream.step(action)
        done = move.terminated or move.truncated
        following = learner.value(move.observation)
        after = int(following.argmax())
        if sarsa and later < epsilon:
            after = int(which_later * len(q))
        delta = move.reward + method.gamma * (1 - done) * float(following[after]) - q[action].item()
        learner.step(q[action], delta)
        if done or (action != best and not sarsa):
            learner.reset()
        reason = "random" if action != best else "random but greedy" if random else "greedy"
        counts["end" if done else reason] += 1
        ahead = after if sarsa and not done else None
    return learner.weights(), counts


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target": "sarsa"},
        {"layer_norm": False, "sparsity": 0.0, "normalise": False, "scale_reward": False, "alpha": 1e-3}
        | {"optimiser": "sgd", "time_feature": False},
    ],
    ids=["q", "sarsa", "classic"],
)
def test_stream_q_is_the_papers_algorithm_and_cuts_traces_after_the_step(tmp_path, options):
    method = StreamQ(steps=260, log_every=100, exploration_fraction=0.7, **options)
    training = Training(tmp_path / "run", method, make("CartPole-v1", 1, 3))
    scaled, begun = method.normalise, _flat(training.initial["actor"])
    stream = Stream(make("CartPole-v1", 1, 3), 0.99, scaled, scaled, 500 if method.time_feature else None)
    expected, counts = naive_q(method, training.initial["actor"].features, stream, training.generator)
    assert_same(training.weights(), expected, begun)
    assert min(counts["greedy"], counts["random"], counts["end"]) > 5
    assert options.get("target") or counts["random but greedy"] > 5


def _flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def assert_same(got, expected, begun):
    """Equal but for rounding, which learning amplifies: apart by less than a hundredth of the way they have come."""
    assert (expected - begun).norm() > 0.1
    assert (got - expected).norm() < 1e-2 * (expected - begun).norm()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("entropy", [0.01, 0.5])
def test_stream_ac_has_a_bound_for_each_network_and_pushes_entropy_up(tmp_path, env_id, entropy):
    method = StreamAC(steps=250, log_every=100, hidden=(16, 16), entropy=entropy)
    training = Training(tmp_path / "run", method, make(env_id, 1, 3))
    continuous = env_id == "Pendulum-v1"
    begun = {name: _flat(model) for name, model in training.initial.items()}

    stream = Stream(make(env_id, 1, 3), time_limit=200 if continuous else 500)
    actor = Naive(training.initial["actor"].features, 0.99 * 0.8, 3.0)
    critic = Naive(training.initial["critic"], 0.99 * 0.8, 2.0)
    signs = set()
    for t in range(method.steps):
        if t % method.log_every == 0:
            draw = torch.randn if continuous else torch.rand
            noise = iter(draw(min(100, method.steps - t), 1, generator=training.generator))
        observation = stream.observation
        output = actor(observation)
        if continuous:
            mean, deviation = output[:1], F.softplus(output[1:])
            policy = torch.distributions.Normal(mean, deviation)
            action = (mean + deviation * next(noise)).detach()
        else:
            policy = torch.distributions.Categorical(logits=output)
            action = (policy.probs.detach().cumsum(0) <= next(noise)).sum()
        value = critic(observation)[0]
        move = stream.step(action.numpy())  # the environment clips, log pi is of the raw action
        done = move.terminated or move.truncated
        following = float(critic.value(move.observation)[0])
        delta = move.reward + 0.99 * (1 - done) * following - value.item()
        sign = math.copysign(1, delta)
        signs.add(sign)
        actor.step((policy.log_prob(action) + entropy * sign * policy.entropy()).sum(), delta)
        critic.step(value, delta)
        if done:
            actor.reset()
            critic.reset()
    assert signs == {-1.0, 1.0}
    for name, naive in (("actor", actor), ("critic", critic)):
        assert_same(training.weights(name), naive.weights(), begun[name])


def test_stream_td_is_the_papers_algorithm(tmp_path):
    method = StreamTD(steps=250, log_every=100, hidden=(16, 16))
    training = Training(tmp_path / "run", method, make_series(1, 120))
    stream, begun = Stream(make_series(1, 120)), _flat(training.initial["critic"])
    critic = Naive(training.initial["critic"], 0.99 * 0.8, 2.0)
    for _ in range(method.steps):
        value = critic(stream.observation)[0]
        move = stream.step(0)
        following = float(critic.value(move.observation)[0])
        critic.step(value, move.reward + 0.99 * (1 - move.terminated) * following - value.item())
        if move.terminated:
            critic.reset()
    assert_same(training.weights("critic"), critic.weights(), begun)


def test_no_gradient_flows_through_the_next_value(tmp_path):
    """The naive versions above detach it; were it not detached, they would differ from themselves."""
    method = StreamTD(steps=100, hidden=(16, 16))
    training = Training(tmp_path / "run", method, make_series(1, 120))
    stream = Stream(make_series(1, 120))
    critic = Naive(training.initial["critic"], 0.99 * 0.8, 2.0)
    for _ in range(method.steps):
        value = critic(stream.observation)[0]
        move = stream.step(0)
        following = critic(move.observation)[0]
        critic.step(value - 0.99 * following, move.reward + 0.99 * following.item() - value.item())
    assert not torch.allclose(training.weights("critic"), critic.weights(), atol=1e-2)


# --- one step at a time -----------------------------------------------------------------------------------


def test_one_optimiser_step_each_environment_step_at_batch_one(tmp_path, monkeypatch):
    shapes, steps = [], []
    forward, step = Learner.__init__, Learner.step

    def watched(self, network, *arguments):
        forward(self, network, *arguments)
        self.forward = lambda x: (shapes.append(x.shape), network.forward(x))[1]

    monkeypatch.setattr(Learner, "__init__", watched)
    monkeypatch.setattr(Learner, "step", lambda self, delta: (steps.append(1), step(self, delta))[1])
    training = Training(tmp_path / "run", StreamQ(steps=123, log_every=50), make("CartPole-v1", 1, 0))
    assert len(steps) == training.roles["actor"].updates == 123
    assert shapes == [(5,)] * 123
    assert [r["step"] for r in training.records] == [0, 1, 2]


def test_nothing_is_stored_memory_does_not_grow_with_steps(tmp_path):
    method, experience = StreamTD(steps=3000, hidden=(16, 16), log_every=100), Rollouts(make_series(0, 4000))
    engine = LocalEngine("cpu", threads=1)
    sizes = _Sizes()
    with Run(tmp_path / "run", engine=engine, seed=0, progress=False, checkpoint_every=1e9) as run:
        critic = run.role(
            "critic", method.models(experience.environments)["critic"], settings=method.roles()["critic"]
        )
        tracemalloc.start()
        try:
            method.train(run, critic, experience, predicted=sizes)
        finally:
            tracemalloc.stop()
    assert sizes.taken[-1] - sizes.taken[10] < 20_000  # bytes in 2,000 steps; storing them would take 500,000


class _Sizes:
    """Memory in use at every hundredth prediction."""

    def __init__(self):
        self.calls, self.taken = 0, []

    def __call__(self, prediction):
        assert math.isfinite(prediction)
        self.calls += 1
        if self.calls % 100 == 0:
            self.taken.append(tracemalloc.get_traced_memory()[0])


# --- switches ---------------------------------------------------------------------------------------------


def test_each_of_the_five_ingredients_has_a_switch(tmp_path):
    """Traces, bounded steps, sparse weights, LayerNorm, scaling (of observations, of rewards) and the time feature:
    leaving out one changes what is learned."""
    switches = (
        {"lam": 0.0},
        {"optimiser": "sgd", "alpha": 1e-3},
        {"sparsity": 0.0},
        {"layer_norm": False},
        {"normalise": False},
        {"scale_reward": False},
        {"time_feature": False},
        {"optimiser": "adaptive"},
    )
    learned = [
        Training(tmp_path / str(i), StreamQ(steps=100, **switch), make("CartPole-v1", 1, 0)).weights()
        for i, switch in enumerate(({}, *switches))
    ]
    for weights in learned[1:]:
        assert weights.shape != learned[0].shape or not torch.allclose(weights, learned[0], atol=1e-3)


@pytest.mark.parametrize("method", [StreamQ, StreamAC])
def test_a_cut_episode_ends_as_published_unless_told_otherwise(tmp_path, method):
    """With rewards of 1 for ever and discount 0.5, values go to 2 where a cut episode goes on, and stay below it
    where it ends."""

    class Cut(Truncates):
        def __init__(self):
            super().__init__(length=2)

        def reward(self):
            return 1.0

        def show(self, action):
            return np.array([self.steps, 0.0, 0.0])

    if method is StreamQ:
        Cut.action_space = spaces.Discrete(2)
    values = {}
    for bootstrap in (False, True):
        options = {"steps": 1500, "gamma": 0.5, "lam": 0.0, "hidden": (16,), "sparsity": 0.0}
        options |= {"normalise": False, "scale_reward": False, "time_feature": False}
        made = method(**options, bootstrap_truncated=bootstrap)
        training = Training(tmp_path / str(bootstrap), made, make(Cut, 1, 0))
        states = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
        if method is StreamQ:
            values[bootstrap] = training.roles["actor"].model.outputs(states).max(1).values
        else:
            values[bootstrap] = training.roles["critic"].model(states)[:, 0]
    torch.testing.assert_close(values[False], torch.tensor([1.5, 1.0]), atol=0.1, rtol=0)
    assert (values[True] > 1.7).all()


def test_overshoots_are_counted_and_rare(tmp_path):
    method = StreamQ(steps=2000, count_overshoots=True)
    bounded = Training(tmp_path / "obgd", method, make("CartPole-v1", 1, 0)).records
    assert np.mean([r["overshoots"] for r in bounded]) < 0.02
    plain = StreamQ(steps=300, log_every=100, count_overshoots=True, optimiser="sgd", alpha=0.3)
    plain_records = Training(tmp_path / "sgd", plain, make("CartPole-v1", 1, 0)).records
    assert np.mean([r["overshoots"] for r in plain_records]) > 0.1
    ac = StreamAC(steps=500, count_overshoots=True, hidden=(16,))
    assert Training(tmp_path / "ac", ac, make("Pendulum-v1", 1, 0)).records[0]["overshoots"] < 0.05


def test_what_diverges_stops_and_says_so(tmp_path):
    classic = {"optimiser": "sgd", "layer_norm": False, "normalise": False, "scale_reward": False}
    method = StreamQ(steps=3000, alpha=10.0, **classic)
    with pytest.raises(NonFiniteError, match="TD error"):
        Training(tmp_path / "q", method, make("CartPole-v1", 1, 0))
    with pytest.raises(NonFiniteError):
        Training(tmp_path / "ac", StreamAC(steps=3000, alpha=1.0, **classic), make("Pendulum-v1", 1, 0))


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="did you mean 'sarsa'"):
        StreamQ(target="sarsas")
    with pytest.raises(UsageError, match="no list of actions"):
        StreamQ().models(make("Pendulum-v1", 1, 0))
    with pytest.raises(UsageError, match="Discrete and Box"):
        StreamAC().models(_dials())


def _dials():
    class Dials(Truncates):
        action_space = spaces.MultiDiscrete([2, 3])

    return make(Dials, 1, 0)


# --- what is learned --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    method = StreamQ(steps=10_000, exploration_fraction=0.3, time_feature=False)
    return Training(tmp_path_factory.mktemp("learned") / "run", method, make("CartPole-v1", 1, 1))


def test_stream_q_learns_cartpole_in_seconds_and_plain_steps_do_not(learned, tmp_path):
    def returns(records):
        return np.mean([r["episode_return"] for r in records[-4:] if r["episodes"]])

    classic = {"optimiser": "sgd", "layer_norm": False, "normalise": False, "scale_reward": False}
    plain = StreamQ(
        steps=10_000, exploration_fraction=0.3, time_feature=False, sparsity=0.0, alpha=1e-4, **classic
    )
    assert returns(learned.records) > 120
    assert returns(Training(tmp_path / "plain", plain, make("CartPole-v1", 1, 1)).records) < 60


def test_the_trained_controller_acts_on_raw_observations(learned):
    environments = make("CartPole-v1", 8, 99)
    act, observation = learned.roles["actor"].model.actor(), environments.reset()
    lengths = []
    for _ in range(300):
        observation = environments.step(act(observation, None)["action"]).observation
        lengths += [length for _, length in environments.finished()]
    assert np.mean(lengths or [300]) > 60


def test_pixels_learn_through_autograd(tmp_path):
    class Pixels(Truncates):
        observation_space = spaces.Box(0.0, 1.0, (10, 10, 4), np.float32)
        action_space = spaces.Discrete(3)

        def show(self, action):
            return self.np_random.random((10, 10, 4))

    method = StreamQ(steps=20, log_every=10, hidden=(16,))
    training = Training(tmp_path / "run", method, make(Pixels, 1, 0))
    assert [tuple(c.weight.shape) for c in training.roles["actor"].model.features.convolutions] == [
        (16, 4, 3, 3)
    ]
    stream = Stream(make(Pixels, 1, 0))
    expected, _ = naive_q(method, training.initial["actor"].features, stream, training.generator)
    torch.testing.assert_close(training.weights(), expected, atol=1e-5, rtol=1e-4)


def test_series_is_seeded_and_its_returns_sum_what_is_still_to_come():
    first, same, other = (make_series(seed, 50) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.env.values, same.env.values)
    assert not np.array_equal(first.env.values, other.env.values)
    values = first.env.values
    expected = [sum(0.9**k * values[t + k] for k in range(400)) for t in range(3)]
    np.testing.assert_allclose(first.env.returns(0.9)[:3], expected, rtol=1e-9)
    observation = first.reset()
    decay, sums = np.array([0.0, 0.9, 0.99, 0.999])[:, None], 0.0
    for t in range(50):
        sums = decay * sums + (1 - decay) * first.env._signals[t]
        np.testing.assert_allclose(observation[0], (sums / (1 - decay ** (t + 1))).ravel(), rtol=1e-5)
        step = first.step(np.zeros(1))
        assert step.reward[0] == pytest.approx(values[t])
        assert step.terminated[0] == (t == 49)
        observation = step.observation
    np.testing.assert_array_equal(observation, same.reset())


def test_predictions_come_in_the_series_own_units(tmp_path):
    predictions = []
    method, experience = StreamTD(steps=6000, hidden=(32, 32)), Rollouts(make_series(0, 6001))
    engine = LocalEngine("cpu", threads=1)
    with Run(tmp_path / "run", engine=engine, seed=0, progress=False) as run:
        critic = run.role(
            "critic", method.models(experience.environments)["critic"], settings=method.roles()["critic"]
        )
        method.train(run, critic, experience, predicted=predictions.append)
    actual = experience.environments.env.returns(0.99)[1:6001]
    late = slice(4500, None)
    mean = np.cumsum(actual) / np.arange(1, 6001)
    error = np.sqrt(np.mean((np.array(predictions) - actual)[late] ** 2))
    assert error < 0.9 * np.sqrt(np.mean((mean - actual)[late] ** 2))


# --- resuming ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["max", "sarsa", "ac"])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, target):
    def method():
        if target == "ac":
            return StreamAC(steps=600, hidden=(16, 16), log_every=100)
        return StreamQ(steps=600, log_every=100, target=target)

    class KilledError(Exception):
        pass

    def killed(self, *arguments, **options):
        if self.calls == 350:
            raise KilledError
        self.calls += 1
        return type(self).step(self, *arguments, **options)

    env_id = "CartPole-v1"
    whole = Training(tmp_path / "whole", method(), make(env_id, 1, 5), checkpoint_steps=1)
    broken = make(env_id, 1, 5)
    assert broken.saveable
    broken.calls = 0
    broken.step = killed.__get__(broken)
    with pytest.raises(KilledError):
        Training(tmp_path / "run", method(), broken, checkpoint_steps=1)
    again = Training(tmp_path / "run", method(), make(env_id, 1, 5), resume=True, checkpoint_steps=1)
    assert torch.equal(again.weights(), whole.weights())
    assert again.records == whole.records


@pytest.mark.parametrize("method", [StreamQ, StreamAC])
def test_a_run_whose_environment_cannot_be_saved_goes_on_in_a_new_episode_without_old_traces(
    tmp_path, method, monkeypatch
):
    class KilledError(Exception):
        pass

    traces = []
    forward, broken = Learner.accumulate, make("CartPole-v1", 1, 5, "gymnasium")
    assert not broken.saveable
    step, calls = broken.step, iter(range(150))

    def killed(action):
        if next(calls, None) is None:
            raise KilledError
        return step(action)

    broken.step = killed
    made = method(steps=300, log_every=100, hidden=(16, 16))
    with pytest.raises(KilledError):
        Training(tmp_path / "run", made, broken, checkpoint_steps=1)
    monkeypatch.setattr(
        Learner,
        "accumulate",
        lambda self, *a: (traces.append(np.abs(self.trace).sum()), forward(self, *a))[1],
    )
    again = Training(
        tmp_path / "run", made, make("CartPole-v1", 1, 5, "gymnasium"), resume=True, checkpoint_steps=1
    )
    assert traces[0] == 0
    assert max(traces) > 0
    assert [r["steps"] for r in again.records] == [100, 200, 300]
