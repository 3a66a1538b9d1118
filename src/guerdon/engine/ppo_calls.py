"""PPO on a language model as six calls on four models, for the runtime of `guerdon.engine.runtime`.

The workload of ReaLHF (Mei et al., 2024, section 2): the actor answers; reward model, reference and critic look at the
answers; actor and critic learn. The mathematics is that of `guerdon.credit` and `guerdon.objectives`; what is here is where
its numbers come from when each replica has some of the sequences and each stage some of the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from guerdon.credit import gae
from guerdon.engine.graph import DataflowGraph, ModelFunctionCall, ParamRealloc
from guerdon.engine.model_worker import Rows, Work
from guerdon.engine.pipelines import forward, generate, token_log_prob
from guerdon.engine.shards import Share
from guerdon.objectives.policy_gradient import clipped_surrogate
from guerdon.objectives.value import clipped_value, mse
from guerdon.randomness import mix

Made = tuple[dict[str, list[Tensor]], dict[str, float]]

_SEEN = ("token", "answer")
_LEARNT_FROM = (*_SEEN, "log_prob", "reference_log_prob", "value", "score", "ended")


@dataclass(frozen=True)
class PPOCalls:
    """What PPO's six calls do.

    Args:
        end: the token that ends an answer; -1: none does.
        max_new_tokens: of an answer.
        temperature: of sampling.
        kl: weight of the reward ``log_prob(reference) - log_prob`` of each token.
        gamma, lam: of generalised advantage estimation.
        clip, value_clip: how far the ratio moves from 1 and a value from what it was.
        reward_clip: scores are kept between minus and plus this.
        minibatches: steps of the optimiser in an iteration.
        max_ratio: a minibatch whose mean ratio is above it is skipped.
        lr, critic_lr, eps: of Adam. ``eps`` is PPO's published one.
        max_grad_norm: longer gradients are scaled down to this.
        seed: of sampling; a sequence's tokens depend on it, the sequence's number and the weights.
    """

    end: int = 0
    max_new_tokens: int = 16
    temperature: float = 1.0
    kl: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    reward_clip: float = 20.0
    minibatches: int = 4
    max_ratio: float = 5.0
    lr: float = 1e-3
    critic_lr: float = 1e-3
    eps: float = 1e-5
    max_grad_norm: float = 1.0
    seed: int = 0

    def graph(self, average: float | None = None) -> DataflowGraph:
        """The six calls. With ``average`` the reference follows the actor: it becomes ``average`` times the actor and the rest
        of itself after each of the actor's updates."""
        follow = () if average is None else (ParamRealloc("actor", "reference", average),)
        renamed = {"log_prob": "reference_log_prob"}
        m = self.minibatches
        return DataflowGraph(
            [
                ModelFunctionCall(
                    "actor_gen", "actor", "generate", ("prompt",), (*_SEEN, "log_prob", "ended")
                ),
                ModelFunctionCall("rew_inf", "reward", "inference", _SEEN, ("score",)),
                ModelFunctionCall("ref_inf", "reference", "inference", _SEEN, ("log_prob",), renamed),
                ModelFunctionCall("critic_inf", "critic", "inference", _SEEN, ("value",)),
                ModelFunctionCall(
                    "actor_train", "actor", "train", _LEARNT_FROM, (), minibatches=m, post=follow
                ),
                ModelFunctionCall("critic_train", "critic", "train", _LEARNT_FROM, (), minibatches=m),
            ],
            "ppo",
            data=("prompt",),
        )

    def optimiser(self, role: str, weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(weights, lr=self.critic_lr if role == "critic" else self.lr, eps=self.eps)

    def __call__(self, work: Work) -> Made:
        """Do a call."""
        if work.call.kind == "generate":
            return self._answer(work)
        if work.call.kind == "train":
            return {}, self._learn(
                work, self._critic_loss if work.call.role == "critic" else self._actor_loss
            )
        made = self._look(work)
        return made, _means(made, work) if "score" in made else {}

    # -- answering and looking -----------------------------------------------------------------------------

    def _answer(self, work: Work) -> Made:
        rows = work.rows
        found: dict[str, list[Tensor]] = {word: [] for word in work.call.outputs}
        for wave in _cuts(len(rows), work.micro_batches or 1):
            prompts = [prompt.tolist() for prompt in rows.columns["prompt"][wave]]
            made = generate(
                work.part.model,
                prompts,
                torch.tensor([mix(self.seed, number) for number in rows.numbers[wave]]),
                end=self.end,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                micro_batches=work.part.place.stages,
            )
            token, log_prob, mask = made.token.cpu(), made.log_prob.cpu(), made.mask.cpu()
            for i, prompt in enumerate(prompts):
                real = mask[i]
                answer = token[i][real]
                before = torch.zeros(len(prompt))
                found["token"].append(torch.cat([torch.tensor(prompt), answer]))
                found["answer"].append(torch.cat([before.bool(), torch.ones_like(answer).bool()]))
                found["log_prob"].append(torch.cat([before, log_prob[i][real]]))
                found["ended"].append((answer[-1:] == self.end).reshape(1))
        told = {"length": [a.sum() for a in found["answer"]], "ended": found["ended"]}
        return found, _means(told, work)

    def _look(self, work: Work) -> dict[str, list[Tensor]]:
        rows, word = work.rows, work.call.outputs[0]
        batches = _micro(work, _padded(rows.columns))
        if word == "log_prob":
            found = forward(work.part.model, batches, token_log_prob)
        else:
            found = forward(work.part.model, batches, _first)
        each = [row for part in found for row in part.cpu()]
        each = [row[: len(token)] for row, token in zip(each, rows.columns["token"], strict=True)]
        return {word: [row[-1:] for row in each] if word == "score" else each}

    # -- learning ------------------------------------------------------------------------------------------

    def _learn(self, work: Work, loss_of: Callable[[float], Callable[..., Tensor]]) -> dict[str, float]:
        """One step of the optimiser a minibatch; means over the minibatches."""
        part, optimiser = work.part, work.optimiser
        assert optimiser is not None
        batches = [self._credit(rows) for rows in work.minibatches]
        # how many tokens each minibatch has, and the sum of their advantages, on all replicas
        facts = torch.zeros(2, len(batches), dtype=torch.float64)
        for m, batch in enumerate(batches):
            facts[0, m], facts[1, m] = batch["answer"].sum(), batch["advantage"].double().sum()
        _add_up(facts, part.data)
        count, mean = facts[0].sum(), facts[1].sum() / facts[0].sum()
        squares = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            squares += ((batch["advantage"].double() - mean) * batch["answer"]).square().sum()
        _add_up(squares, part.data)
        deviation = (squares / (count - 1).clamp(min=1)).sqrt() + 1e-8
        found = torch.zeros(3)
        for tokens, batch in zip(facts[0].tolist(), batches, strict=True):
            normal = ((batch["advantage"].double() - mean) / deviation).float()
            batch["advantage"] = torch.where(batch["answer"], normal, 0.0)
            optimiser.zero_grad()
            numbers = part.forward_backward(_micro(work, batch), loss_of(max(tokens, 1.0)), numbers=3)
            if numbers[1] <= self.max_ratio:
                scale = (self.max_grad_norm / (part.gradient_norm() + 1e-6)).clamp(max=1.0)
                assert part.gradients is not None
                part.gradients.flat.mul_(scale)
                optimiser.step()
            else:
                numbers[2] = 1.0
            found += numbers.cpu() / len(batches)
        names = ("loss", "ratio", "skipped")
        return dict(zip(names, found.tolist(), strict=True))

    def _credit(self, rows: Rows) -> dict[str, Tensor]:
        """A minibatch ``[B, T]`` with advantages and targets at the answers' tokens; ``before`` is the value of the state
        before each token."""
        batch = _padded(rows.columns)
        answer, value = batch["answer"], batch["value"]
        before = torch.cat([torch.zeros_like(value[:, :1]), value[:, :-1]], 1)
        ended = batch["ended"][:, 0]
        last = torch.tensor([len(token) - 1 for token in rows.columns["token"]], dtype=torch.long)[:, None]
        score = batch["score"][:, 0].clamp(-self.reward_clip, self.reward_clip)
        reward = self.kl * (batch["reference_log_prob"] - batch["log_prob"]) * answer
        # an answer that was cut off is not judged; what it would have come to is the critic's to say
        reward = reward.scatter_add(1, last, torch.where(ended, score, 0.0)[:, None])
        bootstrap = torch.where(ended, 0.0, value.gather(1, last)[:, 0])
        batch["advantage"], batch["target"] = gae(
            reward, before, answer, bootstrap=bootstrap, gamma=self.gamma, lam=self.lam
        )
        return batch | {"before": before * answer}

    def _actor_loss(self, tokens: float) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
        def loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
            answer, old = batch["answer"], batch["log_prob"]
            new = torch.where(answer, token_log_prob(logits, batch), old)
            losses = clipped_surrogate(new, old, batch["advantage"], self.clip) * answer
            ratio = ((new.detach() - old).exp() * answer).sum()
            return torch.stack([losses.sum() / tokens, ratio / tokens, torch.zeros_like(ratio)])

        return loss

    def _critic_loss(self, tokens: float) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
        def loss(out: Tensor, batch: dict[str, Tensor]) -> Tensor:
            answer, old, target = batch["answer"], batch["before"], batch["target"]
            value = torch.cat([torch.zeros_like(old[:, :1]), out[:, :-1, 0]], 1)
            kept = clipped_value(value, old, self.value_clip)
            losses = 0.5 * torch.maximum(mse(value, target), mse(kept, target)) * answer
            nothing = torch.zeros_like(losses[0, 0])
            return torch.stack([losses.sum() / tokens, nothing + 1.0 / tokens * answer.sum(), nothing])

        return loss


# --- sequences as batches -----------------------------------------------------------------------------------


def _cuts(count: int, parts: int) -> list[slice]:
    parts = max(1, min(parts, count))
    return [slice(*Share(i, parts).cut(count)) for i in range(parts)]


def _padded(columns: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """``[B, T]`` of each word, filled up on the right with zeros, and which places are real."""
    batch = {
        word: nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        if tensors
        else torch.zeros(0, 1, dtype=torch.bool if word in ("answer", "ended") else torch.float32)
        for word, tensors in columns.items()
    }
    lengths = torch.tensor([len(token) for token in columns["token"]], dtype=torch.long)
    batch["mask"] = torch.arange(batch["token"].shape[1]) < lengths[:, None]
    return batch


def _micro(work: Work, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Parts for the pipeline, where the model is: as many as the plan says, else one a stage (training: two), each as long as
    its longest row."""
    device = next(iter(work.part.weights.values())).device
    stages = work.part.place.stages
    wanted = work.micro_batches or (stages if work.call.kind != "train" or stages == 1 else 2 * stages)
    parts = []
    for cut in _cuts(len(batch["mask"]), wanted):
        part = {word: tensor[cut] for word, tensor in batch.items()}
        if len(part["mask"]):
            longest = int(part["mask"].sum(1).max())
            wide = batch["mask"].shape[1]
            cut_off = {w: t[:, :longest] if t.shape[1] == wide else t for w, t in part.items()}
            parts.append({word: tensor.to(device) for word, tensor in cut_off.items()})
    return parts


def _means(numbers: dict[str, list[Tensor]], work: Work) -> dict[str, float]:
    """Means over the sequences of all replicas, of one number a sequence."""
    sums = torch.zeros(len(numbers) + 1, dtype=torch.float64)
    sums[-1] = len(work.rows)
    for i, tensors in enumerate(numbers.values()):
        sums[i] = sum(float(tensor) for tensor in tensors)
    _add_up(sums, work.part.data)
    return dict(zip(numbers, (sums[:-1] / sums[-1]).tolist(), strict=True))


def _first(out: Tensor, batch: object) -> Tensor:
    """The one number that comes out for each token."""
    return out[..., 0]


def _add_up(numbers: Tensor, group: dist.ProcessGroup | None) -> None:
    if group is not None:
        dist.all_reduce(numbers, group=group)
