"""The losses beside those of TRL (skipped where it is not installed): the same numbers and gradients on the same
log-probabilities, the same loss from texts, the same losses step for step in training."""

from __future__ import annotations

import math
import os
import re
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon.batch import Preferences, Trajectories
from guerdon.objectives.judges import RewardPairs
from guerdon.objectives.preference import PairwiseObjective
from guerdon.objectives.sides import with_reference
from guerdon.optim import Adam
from guerdon.policies.language import LanguagePolicy
from guerdon.roles import Role, RoleSettings
from guerdon.tasks.tokens import tiny_llama, tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
trl = pytest.importorskip("trl")

BETA = 0.3
LENGTHS = [3, 1, 5, 2], [2, 4, 1, 5]

# TRL's name of a loss and its settings; what guerdon calls the same
SAME: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("sigmoid", {}, {}),
    ("hinge", {}, {}),
    ("ipo", {}, {"length_normalise": True}),
    ("exo_pair", {"label_smoothing": 0.01}, {"label_smoothing": 0.01}),
    ("nca_pair", {}, {}),
    ("robust", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    ("bco_pair", {}, {}),
    ("sppo_hard", {}, {}),
    ("aot", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    ("aot_unpaired", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    ("apo_zero", {}, {}),
    ("apo_down", {}, {}),
    ("discopop", {"discopop_tau": 0.2}, {"discopop_tau": 0.2}),
    ("sigmoid_norm", {}, {}),
    ("sigmoid", {"ld_alpha": 0.4}, {"tail": 0.4}),
    ("sigmoid", {"f_divergence_type": "forward_kl"}, {"divergence": "forward_kl"}),
    ("robust", {"f_divergence_type": "js_divergence"}, {"divergence": "js"}),
    # TRL's exponent is one minus that of the paper
    (
        "ipo",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        {"divergence": "alpha", "alpha": 0.3, "length_normalise": True},
    ),
]


class Table(nn.Module):
    """A policy whose log-probabilities are parameters."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values.clone())

    def log_prob(self, traj: Trajectories) -> Tensor:
        return torch.where(traj.mask, self.values, 0.0)


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities ``[8, 5]`` of chosen and rejected answers under policy and reference, and their mask."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(5)[None] < torch.tensor(LENGTHS[0] + LENGTHS[1])[:, None]
    policy, reference = -2 * torch.rand(2, 8, 5, generator=generator)
    return torch.where(mask, policy, 0.0), torch.where(mask, reference, 0.0), mask


def trl_loss(
    loss: str, log_prob: Tensor, reference: Tensor, mask: Tensor, **settings: Any
) -> tuple[Tensor, dict[str, float]]:
    """TRL's own loss function on given log-probabilities, without a trainer around it."""
    tail = {"ld_alpha": None} | settings
    weight = torch.ones(mask.shape)
    if tail["ld_alpha"] is not None:
        lengths = mask.sum(1)
        shorter = torch.minimum(lengths[:4], lengths[4:]).repeat(2)
        weight = torch.where(torch.arange(5) < shorter[:, None], 1.0, tail["ld_alpha"])
    reference_sum = (reference * weight).sum(1)  # as TRL stores it when it is computed beforehand
    identity = lambda x: x
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(
            device="cpu", gather=identity, gather_for_metrics=identity, unwrap_model=identity
        ),
        args=types.SimpleNamespace(discopop_tau=settings.get("discopop_tau", 0.05)),
        beta=BETA,
        loss_types=[loss],
        loss_weights=[1.0],
        ld_alpha=tail["ld_alpha"],
        f_divergence_type=settings.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=settings.get("f_alpha_divergence_coef", 0.5),
        label_smoothing=settings.get("label_smoothing", 0.0),
        precompute_ref_logps=True,
        use_weighting=False,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    rows = mask.shape[0]
    prompt = torch.ones(rows, 1, dtype=torch.long)  # one token, whose prediction is not asked for
    inputs = {
        "input_ids": torch.ones(rows, 6, dtype=torch.long),
        "attention_mask": torch.cat([prompt, mask.long()], 1),
        "completion_mask": torch.cat([0 * prompt, mask.long()], 1),
        "ref_chosen_logps": reference_sum[:4],
        "ref_rejected_logps": reference_sum[4:],
    }
    zeros = torch.zeros(mask.shape)
    answer = types.SimpleNamespace(log_probs=log_prob, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    value = trl.DPOTrainer._compute_loss(trainer, lambda **_: answer, inputs, False)
    return value, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def pairs_of(reference: Tensor, mask: Tensor) -> Preferences:
    def side(rows: slice) -> Trajectories:
        return Trajectories(
            inputs=TensorDict({"step": TensorDict({}, batch_size=[4, 5])}, batch_size=[4]),
            log_prob=torch.zeros(4, 5),
            mask=mask[rows],
            reference_log_prob=reference[rows],
        )

    return Preferences(chosen=side(slice(0, 4)), rejected=side(slice(4, 8)))


@pytest.mark.parametrize(("loss", "settings", "options"), SAME)
def test_loss_gradient_and_metrics_equal(
    loss: Any, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    log_prob, reference, mask = drawn()
    theirs = log_prob.clone().requires_grad_()
    expected, metrics = trl_loss(loss, theirs, reference, mask, **settings)
    (slope,) = torch.autograd.grad(expected, theirs)
    mine = Table(log_prob)
    value, found = PairwiseObjective(loss, BETA, **options)(mine, pairs_of(reference, mask))
    torch.testing.assert_close(value, expected)
    (own,) = torch.autograd.grad(value, mine.values)
    torch.testing.assert_close(own, torch.where(mask, slope, 0.0))
    if not {"length_normalise", "divergence", "tail"} & set(options) and loss != "sigmoid_norm":
        # theirs are beta times the plain log-ratio; guerdon's are of what the loss compares
        names = {
            "rewards/chosen": "rewards_chosen",
            "rewards/rejected": "rewards_rejected",
            "rewards/margins": "margin",
            "rewards/accuracies": "accuracy",
            "logps/chosen": "log_prob_chosen",
            "logps/rejected": "log_prob_rejected",
        }
        for name, own_name in names.items():
            assert float(found[own_name]) == pytest.approx(metrics[name], abs=1e-5), name


@pytest.mark.parametrize("centering", [None, 0.05])
@pytest.mark.parametrize("margin", [None, [0.5, -0.3, 0.0, 1.2]])
def test_reward_loss_equals(margin: list[float] | None, centering: float | None) -> None:
    score = torch.randn(8, generator=torch.Generator().manual_seed(3))
    identity = lambda x: x
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(gather=identity, gather_for_metrics=identity),
        args=types.SimpleNamespace(center_rewards_coefficient=centering),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(8, 2, dtype=torch.long)}
    _, reference, mask = drawn()
    batch = pairs_of(reference, mask)
    if margin is not None:
        inputs["margin"] = batch.chosen.inputs["margin"] = torch.tensor(margin)
    theirs = score.clone().requires_grad_()
    answer = types.SimpleNamespace(logits=theirs[:, None])
    expected = trl.RewardTrainer.compute_loss(trainer, lambda **_: answer, inputs)
    mine = score.clone().requires_grad_()
    model = types.SimpleNamespace(score=lambda traj: mine)
    loss, metrics = RewardPairs(centering=centering or 0.0)(model, batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, mine), torch.autograd.grad(expected, theirs))
    for name in ("accuracy", "margin"):
        assert float(metrics[name]) == pytest.approx(trainer._metrics["train"][name][0])


def test_every_loss_of_trl_is_covered_or_named() -> None:
    covered = {loss for loss, _, _ in SAME}
    text = trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    known = set(re.findall(r"'(\w+)'", text))
    # its "sft" is a term here, averaged within each answer and not over the batch: PairwiseObjective(nll=...)
    assert known - covered == {"sft"}


PROMPTS = ["a", "b c", "d e f", "g", "h a b", "c", "d d", "e"]
CHOSEN = ["a a", "b", "d e f g", "h", "c", "c c", "a", "e e e"]
REJECTED = ["b", "c c c", "d", "a b", "h h h h", "d", "b b", "f"]


def trainer(folder: Path, steps: int, **settings: Any) -> Any:
    """TRL's trainer of a tiny model on eight pairs."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    rows = {
        "prompt": PROMPTS,
        "chosen": [f" {c}" for c in CHOSEN],
        "rejected": [f" {r}" for r in REJECTED],
    }
    config = trl.DPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **settings,
    )
    tokens = tokenizer()
    tokens.pad_token = tokens.eos_token
    return trl.DPOTrainer(
        tiny_llama(width=16, layers=1),
        ref_model=tiny_llama(width=16, layers=1),
        args=config,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokens,
    )


def test_the_same_losses_step_for_step(tmp_path: Path) -> None:
    """From texts to updates: tokens, end of text, masks, log-probabilities, loss, clipping, optimiser."""
    theirs = trainer(tmp_path, 6, beta=BETA)
    seen: list[Tensor] = []
    losses: list[float] = []
    compute = theirs.compute_loss

    def watched(model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        seen.append(inputs["input_ids"].clone())
        loss = compute(model, inputs, *rest, **more)
        losses.append(loss.item())
        return loss

    theirs.compute_loss = watched
    theirs.train()
    assert len(losses) == 6

    policy = LanguagePolicy(tiny_llama(width=16, layers=1), tokenizer())
    role = Role("actor", policy, RoleSettings(Adam(1e-2), max_grad_norm=1.0))
    reference = role.copy(frozen=True)
    sides = [policy.encode(PROMPTS, texts) for texts in (CHOSEN, REJECTED)]
    data = with_reference(Preferences(chosen=sides[0], rejected=sides[1]), reference)
    own = []
    for ids in seen:  # their batches: find each pair by its tokens
        rows = [number(policy, line.tolist()) for line in ids[:4]]
        assert rows == [number(policy, line.tolist(), REJECTED) for line in ids[4:]]
        own.append(float(role.update(data[torch.tensor(rows)], PairwiseObjective(beta=BETA))["loss"]))
    assert own[0] == pytest.approx(math.log(2), abs=1e-6)
    assert own == pytest.approx(losses, abs=2e-6)
    assert own[-1] < 0.9 * own[0]


def number(policy: LanguagePolicy, ids: list[int], texts: list[str] = CHOSEN) -> int:
    """Which row these tokens (padded on the right) are: prompt, answer, end of text."""
    for i, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        row = policy.tokens(prompt) + policy.answer_tokens(text)
        if ids[: len(row)] == row and set(ids[len(row) :]) <= {0}:
            return i
    raise AssertionError(f"TRL made other tokens: {ids}")
