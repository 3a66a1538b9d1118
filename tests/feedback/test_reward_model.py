"""Reward models: where they read, what padding, tokenizers and files do to them, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from guerdon.batch import Preferences, Trajectories, pad_steps
from guerdon.errors import FeedbackError, ShapeError, UsageError
from guerdon.feedback.base import Feedback, PairFeedback
from guerdon.feedback.preference_model import PreferenceModel
from guerdon.feedback.reward_model import (
    Rescale,
    RewardModel,
    RewardModelFeedback,
    last_tokens,
    same_tokenizer,
)
from guerdon.objectives.judges import RewardPairs
from guerdon.optim import AdamW
from guerdon.policies.language import LanguagePolicy
from guerdon.policies.lora import LoRA
from guerdon.randomness import row_seeds
from guerdon.roles import Role, RoleSettings
from guerdon.tasks.tokens import tiny_llama, tokenizer

PROMPTS = ["a b c d", "h", "e f"]
TEXTS = ["a b", "c", "d e f g h"]


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=10, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def policy(kind: str = "llama") -> LanguagePolicy:
    model = gpt2() if kind == "gpt2" else tiny_llama(width=16, layers=1)
    return LanguagePolicy(model, tokenizer(), max_new_tokens=5)


def by_hand(judge: RewardModel, actor: LanguagePolicy, prompt: str, text: str, end: bool = True) -> Tensor:
    """The head on the last state of the bare sequence, with nothing to pad."""
    ids = torch.tensor([[*actor.tokens(prompt), *actor.answer_tokens(text, end)]])
    model: Any = judge.model
    return model.score(model.base_model(input_ids=ids).last_hidden_state[0, -1])


# --- where it reads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("end", [True, False])
def test_the_score_is_read_at_the_last_real_token(kind: str, end: bool) -> None:
    """Also where the answer ends with the very token that pads."""
    actor = policy(kind)
    judge = RewardModel.from_policy(actor)
    scores = judge.score(actor.encode(PROMPTS, TEXTS, end))
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    wanted = torch.cat([by_hand(judge, actor, p, t, end) for p, t in zip(PROMPTS, TEXTS, strict=True)])
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=1e-5)
    assert scores.unique().numel() == 3


def test_padding_and_neighbours_change_nothing() -> None:
    actor = policy()
    judge = RewardModel.from_policy(actor)
    traj = actor.encode(PROMPTS, TEXTS)
    scores = judge.score(traj)
    alone = torch.cat([judge.score(actor.encode([p], [t])) for p, t in zip(PROMPTS, TEXTS, strict=True)])
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(judge.score(pad_steps(traj, 11)), scores, atol=1e-5, rtol=1e-5)
    other = traj.clone()
    other.inputs["step", "token"][~traj.mask] = 7  # what stands in masked places
    other.inputs["prompt_token"][~traj.inputs["prompt_mask"]] = 3
    torch.testing.assert_close(judge.score(other), scores, atol=1e-5, rtol=1e-5)


def test_scores_are_float32_under_autocast() -> None:
    actor = policy()
    judge = RewardModel.from_policy(actor, outputs=2)
    traj = actor.encode(PROMPTS, TEXTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = judge.scores(traj)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, judge.scores(traj), atol=0.05, rtol=0.05)


def test_of_long_texts_the_beginning_is_left_out() -> None:
    tokens, mask = (
        torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
        torch.tensor([[True] * 4, [True, True, False, False]]),
    )
    cut, kept = last_tokens(tokens, mask, 3)
    assert cut[0].tolist() == [2, 3, 4]
    assert cut[1, :2].tolist() == [5, 6]
    assert kept.tolist() == [[True] * 3, [True, True, False]]
    actor = policy()
    judge = RewardModel.from_policy(actor, max_length=4)
    long, short = (
        judge.score(actor.encode(["a a a h a b c"], ["d"])),
        judge.score(actor.encode(["b c"], ["d"])),
    )
    torch.testing.assert_close(long, short, atol=1e-5, rtol=1e-5)


def test_an_encoder_reads_in_its_own_way(tmp_path: Path) -> None:
    """A model of BERT's kind: prompt and answer as a pair, pooled by itself, padding masked."""
    from tokenizers import processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    inner = tokenizer().backend_tokenizer
    inner.add_special_tokens(["[CLS]", "[SEP]", "[PAD]"])
    cls, sep = (inner.token_to_id(t) for t in ("[CLS]", "[SEP]"))
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )
    own = PreTrainedTokenizerFast(
        tokenizer_object=inner, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(own),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=1,
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    judge = RewardModel.from_pretrained(tmp_path, policy()).eval()
    assert judge.reads == "texts"
    scores = judge.score(policy().encode(PROMPTS, TEXTS))
    for prompt, text, score in zip(PROMPTS, TEXTS, scores, strict=True):
        ids = torch.tensor([own(prompt, text)["input_ids"]])
        torch.testing.assert_close(model(input_ids=ids).logits[0, 0], score, atol=1e-5, rtol=1e-5)


# --- several outputs, mean and deviation ------------------------------------------------------------------


def test_several_outputs_need_a_direction() -> None:
    actor = policy()
    traj = actor.encode(PROMPTS, TEXTS)
    judge = RewardModel.from_policy(actor, outputs=3)
    assert judge.scores(traj).shape == (3, 3)
    with pytest.raises(UsageError, match="3 outputs and no direction"):
        judge.score(traj)
    direction = torch.tensor([0.6, -0.8, 0.0])
    pointed = RewardModel.from_policy(actor, outputs=3, direction=direction)
    torch.testing.assert_close(pointed.score(traj), judge.scores(traj) @ direction)
    with pytest.raises(UsageError, match="one number each"):
        RewardModel.from_policy(actor, outputs=2, direction=direction)


def test_normalised_scores_come_from_the_stored_mean_and_deviation(tmp_path: Path) -> None:
    actor = policy()
    traj = actor.encode(PROMPTS, TEXTS)
    judge = RewardModel.from_policy(actor, outputs=2)
    raw = judge.scores(traj)
    judge.standardise(raw)
    scaled = judge.scores(traj)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std(0), torch.ones(2), atol=1e-5, rtol=0)
    judge.save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path, actor)
    torch.testing.assert_close(again.scores(traj), raw)  # only on request
    again.normalised = True
    torch.testing.assert_close(again.scores(traj), scaled)
    with pytest.raises(ShapeError, match=r"expected \[N, 2\]"):
        judge.standardise(raw[:, :1])


def test_ratings_of_every_attribute_on_one_scale() -> None:
    """HelpSteer's 0 to 4 becomes 10 to 90; the way back; missing ratings stay missing."""
    scale, rating = Rescale(), torch.tensor([0.0, 4.0, 2.5, torch.nan])
    assert scale.common(rating)[:3].tolist() == [10.0, 90.0, 60.0]
    torch.testing.assert_close(scale.own(scale.common(rating)), rating, equal_nan=True)
    assert scale.common(rating)[3].isnan()


# --- making it --------------------------------------------------------------------------------------------


def test_it_starts_from_the_policys_backbone_and_leaves_the_policy_alone() -> None:
    actor = policy()
    state = torch.get_rng_state()
    first, second, same = (RewardModel.from_policy(actor, seed=seed) for seed in (0, 1, 0))
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in actor.model.base_model.state_dict().items():
        for judge in (first, second):
            own: Any = judge.model.base_model
            assert torch.equal(own.state_dict()[name], weight)
            assert own.state_dict()[name].data_ptr() != weight.data_ptr()
    heads: list[Any] = [judge.model.score.weight for judge in (first, second, same)]
    assert not torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2])


def test_it_judges_without_dropout_and_in_the_policys_precision() -> None:
    """A fresh model is no model in training; its weights have the type of the policy's, whatever the config says."""
    actor = policy("gpt2")  # a GPT-2 drops out by default
    actor.model.config.dtype = torch.bfloat16  # type: ignore[union-attr]
    judge = RewardModel.from_policy(actor)
    traj = actor.encode(PROMPTS, TEXTS)
    assert torch.equal(judge.score(traj), judge.score(traj))
    assert {p.dtype for p in judge.parameters()} == {torch.float32}


def test_an_adapter_of_the_policy_is_folded_in() -> None:
    actor = policy()
    role = Role("actor", actor, RoleSettings(AdamW(1e-2), lora=LoRA(2)))
    with torch.no_grad():
        for p in role._parameters:
            p.add_(0.1)
    judge = RewardModel.from_policy(actor)
    ids = torch.tensor([[2, 3, 4]])
    wanted = actor.model.base_model(input_ids=ids).last_hidden_state
    model: Any = judge.model
    torch.testing.assert_close(
        model.base_model(input_ids=ids).last_hidden_state, wanted, atol=1e-5, rtol=1e-5
    )
    assert not any("lora" in name for name, _ in judge.named_parameters())


@pytest.mark.parametrize("lora", [None, LoRA(2)])
def test_it_learns_from_pairs_head_and_all(lora: LoRA | None, tmp_path: Path) -> None:
    """A few steps on four pairs; with an adapter the head learns too, and what is saved holds both."""
    actor = policy()
    before = [p.clone() for p in actor.parameters()]
    chosen = actor.encode(PROMPTS, ["a a", "a", "a a a"])
    rejected = actor.encode(PROMPTS, ["b", "b b b", "b b"])
    judge = RewardModel.from_policy(actor)
    role = Role("reward", judge, RoleSettings(AdamW(3e-2), lora=lora))
    head = role.model.model.score  # type: ignore[union-attr]
    names = [name for name, p in head.named_parameters() if p.requires_grad]  # type: ignore[union-attr]
    assert names
    for _ in range(15):
        metrics = role.update(Preferences(chosen=chosen, rejected=rejected), RewardPairs())
    assert float(metrics["accuracy"]) == 1
    assert (role.compare(chosen, rejected) > 0.9).all()
    assert all(torch.equal(a, b) for a, b in zip(before, actor.parameters(), strict=True))
    role.save(tmp_path)
    again = RewardModel.from_pretrained(tmp_path, actor)
    torch.testing.assert_close(again.score(chosen), role.score(chosen), atol=1e-5, rtol=1e-5)


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_reads_what_is_saved(kind: str, tmp_path: Path) -> None:
    """Its own pooling, in a padded batch of answers that end with the end-of-text token, gives the same scores."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    actor = policy(kind)
    judge = RewardModel.from_policy(actor, outputs=2)
    judge.save_pretrained(tmp_path)
    model, own = (
        loader.from_pretrained(tmp_path) for loader in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    assert own.pad_token_id != own.eos_token_id
    assert actor.tokenizer.pad_token_id is None  # the policy's tokenizer stays as it was
    texts = [f"{p} {t} {own.eos_token}" for p, t in zip(PROMPTS, TEXTS, strict=True)]
    batch = own(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(found, judge.scores(actor.encode(PROMPTS, TEXTS)), atol=1e-5, rtol=1e-5)


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    actor = policy()
    with pytest.raises(UsageError, match="there is no such folder"):
        RewardModel.from_pretrained(tmp_path / "none")
    actor.save_pretrained(tmp_path / "policy")
    with pytest.raises(UsageError, match=r"no reward model: it has no weights for score\.weight"):
        RewardModel.from_pretrained(tmp_path / "policy")
    PreferenceModel.from_policy(actor).save_pretrained(tmp_path / "pairs")
    with pytest.raises(UsageError, match="judges pairs"):
        RewardModel.from_pretrained(tmp_path / "pairs")
    RewardModel.from_policy(actor).save_pretrained(tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\x10\0\0\0")
    with pytest.raises(UsageError, match="no reward model at"):
        RewardModel.from_pretrained(tmp_path / "damaged")


# --- other tokenizers -------------------------------------------------------------------------------------


def test_another_tokenizer_reads_the_texts(tmp_path: Path) -> None:
    """A judge whose vocabulary is in another order scores what was said, not the policy's token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(
        models.WordLevel(
            {"<end>": 9, "<unk>": 8} | {w: i for i, w in enumerate("hgfedcba")}, unk_token="<unk>"
        )
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    reverse = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>")
    other, actor = LanguagePolicy(tiny_llama(width=16, layers=1, seed=5), reverse), policy()
    assert not same_tokenizer(reverse, actor.tokenizer)
    assert same_tokenizer(tokenizer(), actor.tokenizer)
    RewardModel.from_policy(other).save_pretrained(tmp_path)
    judge = RewardModel.from_pretrained(tmp_path, actor)
    assert judge.reads == "texts"
    assert RewardModel.from_pretrained(tmp_path, other).reads == "tokens"
    traj = actor.encode(PROMPTS, TEXTS)
    wanted = RewardModel.from_pretrained(tmp_path, other).score(other.encode(PROMPTS, TEXTS))
    torch.testing.assert_close(judge.score(traj), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(FeedbackError, match="the trajectories carry none"):
        judge.score(traj.with_(outputs=None))


def test_a_chat_template_makes_two_messages() -> None:
    actor = policy()
    own = tokenizer()
    own.chat_template = (
        "{% for m in messages %}{{ 'a ' if m.role == 'user' else ' h ' }}{{ m.content }}{% endfor %}"
    )
    judge = RewardModel(RewardModel.from_policy(actor).model, own, "texts").eval()
    plain = RewardModel.from_policy(actor)
    wanted = plain.score(actor.encode(["a b c"], ["h d"], end=False))
    torch.testing.assert_close(judge.score(actor.encode(["b c"], ["d"])), wanted, atol=1e-5, rtol=1e-5)


# --- as a judge -------------------------------------------------------------------------------------------


def test_as_a_judge_it_scores_in_batches_and_compares() -> None:
    actor = policy()
    judge = RewardModelFeedback(RewardModel.from_policy(actor), batch=2)
    assert isinstance(judge, Feedback)
    assert isinstance(judge, PairFeedback)
    a, b = (actor.sample(PROMPTS, row_seeds(seed, 0, 3)) for seed in (0, 1))
    score: Tensor = judge.score(a)
    assert not score.requires_grad
    torch.testing.assert_close(score, judge.model.score(a).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        judge.compare(a, b), torch.sigmoid(score - judge.score(b)), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(judge.compare(a, b) + judge.compare(b, a), torch.ones(3))
    with torch.no_grad():
        next(judge.model.parameters()).fill_(torch.nan)
    with pytest.raises(FeedbackError, match="returned nan for the prompt 'a b c d'"):
        judge.score(a)
    with pytest.raises(FeedbackError, match="gives no score"):
        RewardModelFeedback(PreferenceModel.from_policy(actor)).score(a)


def test_a_roles_reward_model_is_a_judge() -> None:
    """The way that methods use it: by a role, in batches of its own size."""
    actor = policy()
    role = Role("reward", RewardModel.from_policy(actor), RoleSettings(sample_batch=2))
    traj: Trajectories = actor.sample(PROMPTS, row_seeds(0, 0, 3))
    torch.testing.assert_close(role.score(traj), role.model.score(traj), atol=1e-5, rtol=1e-5)  # type: ignore[operator]
