"""The value of a prompt under a frozen language model: one number a prompt, read from the model's own hidden states.

Where a whole answer is one action, the expected reward depends on the prompt alone. A-LoL (Baheti et al., 2024) fits it
once, on rewards of the reference's own answers, with a small head on the reference's last hidden states; only the head
learns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from guerdon.batch import Trajectories
from guerdon.errors import DataError, UsageError, nearest

HeadName = Literal["attention", "mlp"]
States = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Row numbers (int64 ``[B]``) to the hidden states ``[B, P, d]`` of their prompts and the mask ``[B, P]``."""


class PromptValue(nn.Module):
    """Hidden states of a prompt to its value, between 0 and ``max_value``.

    Both heads end in ``max_value * sigmoid`` of a linear layer, whose weights start at zero: the first value of every
    prompt is half of ``max_value``.

    Args:
        width: of the hidden states.
        head: ``"attention"``, one learned query that attends to all states of the prompt; ``"mlp"``, the mean of the
            states through one hidden layer (for models that encode the prompt apart).
        max_value: the largest reward there is: 1 for a probability, the number of terms for a sum of probabilities.
        heads: of the attention, at most; fewer where the width does not divide by them.
        dropout: while the head is fitted.

    Raises `UsageError` for an unknown head or a maximum that is not positive.
    """

    def __init__(
        self,
        width: int,
        head: HeadName = "attention",
        max_value: float = 1.0,
        heads: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if head not in get_args(HeadName):
            raise UsageError(
                f"there is no head '{head}' of a prompt's value; {nearest(head, get_args(HeadName))}"
            )
        if not max_value > 0:
            raise UsageError(f"max_value is {max_value}; it is the largest reward, above 0")
        self.head, self.max_value = head, max_value
        if head == "attention":
            while width % heads:
                heads -= 1
            self.query = nn.Parameter(torch.randn(1, 1, width) / width**0.5)
            self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        else:
            self.hidden = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout))
        self.output = nn.Linear(width, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """``[B]`` values of ``states [B, P, d]``; where ``mask [B, P]`` is false nothing is read, so a value does not
        depend on what else is in the batch."""
        states = states.float()
        if self.head == "attention":
            query = self.query.expand(len(states), -1, -1)
            found, _ = self.attention(query, states, states, key_padding_mask=~mask, need_weights=False)
            pooled = found[:, 0]
        else:
            real = torch.where(mask[..., None], states, 0.0)
            pooled = self.hidden(real.sum(1) / mask.sum(1, keepdim=True))
        return self.max_value * torch.sigmoid(self.output(pooled)[:, 0])


def prompt_states(policy: Any, traj: Trajectories) -> tuple[Tensor, Tensor]:
    """``(states [B, P, d], mask [B, P])``: a language policy's last hidden states at the tokens of each row's prompt,
    padded at the end. The answers are not read. Meant for ``role.evaluate(prompt_states, traj)``."""
    prompt, real = traj.inputs["prompt_token"], traj.inputs["prompt_mask"]
    length = real.sum(1, keepdim=True)
    place = torch.arange(int(length.max()), device=prompt.device)
    # behind the end a causal model sees nothing, so no attention mask is needed
    shifted = (prompt.shape[1] - length + place).clamp(max=prompt.shape[1] - 1)
    states = policy.model.base_model(input_ids=prompt.gather(1, shifted), use_cache=False).last_hidden_state
    return states, place < length


def fit_prompt_value(
    states: States,
    reward: Tensor,
    head: HeadName = "attention",
    *,
    max_value: float = 1.0,
    epochs: int = 10,
    lr: float = 1e-5,
    batch_size: int = 16,
    seed: int = 0,
) -> tuple[PromptValue, list[float]]:
    """A head fitted to ``reward [N]`` by squared error; the weights of the epoch with the lowest training error are kept
    (Baheti et al., 2024).

    Args:
        states: gives the frozen hidden states of some of the ``N`` rows; asked again in every epoch, so that they need
            not all be held.
        reward: ``[N]``, of the reference's own answers, each between 0 and ``max_value``.
        epochs, lr, batch_size: of AdamW.
        seed: of initial weights, order and dropout; the global random state is left as it was.

    Returns the head, ready to answer, and the mean squared error of each epoch, taken while it trained.
    Raises `DataError` for rewards outside of the range, which the head cannot reach (see `check_range`).
    """
    check_range(reward, max_value, "the reference's answers")
    rows = torch.arange(len(reward))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = states(rows[:1])[0]
        value = PromptValue(first.shape[-1], head, max_value).to(first.device)
        optimiser = torch.optim.AdamW(value.parameters(), lr)
        errors: list[float] = []
        best = {name: weight.clone() for name, weight in value.state_dict().items()}
        value.train()
        for _ in range(epochs):
            total = 0.0
            for part in torch.randperm(len(rows)).split(batch_size):
                seen, mask = states(part)
                error = (value(seen, mask) - reward[part].to(seen.device)).square()
                optimiser.zero_grad(set_to_none=True)
                error.mean().backward()
                optimiser.step()
                total += float(error.detach().sum())
            errors.append(total / len(rows))
            if errors[-1] == min(errors):
                best = {name: weight.clone() for name, weight in value.state_dict().items()}
    value.load_state_dict(best)
    return value.eval().requires_grad_(False), errors


def advantages(
    value: PromptValue, data: Any, states: Callable[[Trajectories], tuple[Tensor, Tensor]]
) -> Tensor:
    """``float32 [N]``, reward minus value of every row of recorded ``data``, in the order of its rows.

    Args:
        data: rows with rewards, taken 64 at a time, rows of similar length together.
        states: a batch to the hidden states and the mask that ``value`` was fitted to: the frozen reference's, for
            those of a model that learns drift away from the head.

    Raises `DataError` for rows without a reward, or one that no value can reach (see `check_range`).
    """
    order = torch.arange(len(data)) if data.lengths is None else data.lengths.argsort(stable=True)
    found = torch.empty(len(data))
    for rows in order.split(64):
        batch = data.take(rows)
        if batch.reward is None:
            raise DataError("the recorded answers have no rewards to learn from; add a column 'reward'")
        check_range(batch.score(), value.max_value, "the recorded answers")
        with torch.no_grad():
            found[rows] = batch.score().float().cpu() - value(*states(batch)).float().cpu()
    return found


def check_range(reward: Tensor, max_value: float, whose: str) -> None:
    """Raise `DataError` unless every reward lies between 0 and ``max_value``: a value that ends in a sigmoid cannot
    reach others, and all advantages would have one sign without any error."""
    low, high = reward.min().item(), reward.max().item()
    if low < 0 or high > max_value:
        raise DataError(
            f"rewards of {whose} lie between {low:.3g} and {high:.3g}, but a prompt's value between 0 and {max_value:g}: "
            "bring them there (sigmoid of a reward model's score, say), or set max_value to the largest possible reward"
        )
