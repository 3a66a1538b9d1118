"""Answers that share a prompt: the same log-probabilities and gradients as row by row, for less work."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guerdon.errors import ShapeError
from guerdon.policies import lora, shared_prompts
from guerdon.policies.shared_prompts import (
    answer_log_probs,
    answer_logits,
    answer_states,
    can_share,
    output_weight,
    same_prompts,
)

V = 64
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=V, num_key_value_heads=2, initializer_range=0.2, **{**SIZES, **changes})
    )


def qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(vocab_size=V, num_key_value_heads=2, initializer_range=0.2, **SIZES))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=V,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config)


def made(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().eval()


def pairs() -> dict[str, Tensor]:
    """Chosen rows, then rejected ones; prompts and answers of several lengths, with columns that nobody uses."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(V, (3, 7), generator=generator)[[0, 1, 2, 0, 1, 2]]
    prompt_mask = torch.ones(6, 7, dtype=torch.bool)
    prompt_mask[:, 0] = False
    prompt_mask[[1, 4], :4] = False
    token = torch.randint(V, (6, 6), generator=generator)
    mask = torch.arange(6) < torch.tensor([4, 5, 1, 2, 5, 3])[:, None]
    return {"prompt_token": prompt, "prompt_mask": prompt_mask, "token": token, "mask": mask}


def plain(model: Any, batch: dict[str, Tensor], heat: Tensor | None = None) -> Tensor:
    """``log p`` of every answer token by transformers alone, one row at a time, nothing padded."""
    rows = torch.zeros(batch["mask"].shape)
    rows = list(rows.unbind())
    for b, row in enumerate(rows):
        prompt = batch["prompt_token"][b][batch["prompt_mask"][b]]
        answer = batch["token"][b][batch["mask"][b]]
        logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
        if heat is not None:
            logits = logits / heat[b]
        found = logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]
        rows[b] = torch.cat([found, row[len(answer) :]])
    return torch.stack(rows)


def gradient(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2, qwen2])
def test_log_probabilities_and_gradients_are_those_of_single_rows(make: Any, share: bool) -> None:
    model, batch = made(make), pairs()
    heat = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.5, 1.0])
    expected = plain(model, batch, heat)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    exact = gradient(model, (expected * weight).sum())
    found = answer_log_probs(model, **batch, temperature=heat, share=share)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found[~batch["mask"]] == 0).all()
    assert (gradient(model, (found * weight).sum()) - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_logits_and_states_are_those_of_single_rows(make: Any, share: bool) -> None:
    model, batch = made(make), pairs()
    logits = answer_logits(model, **batch, share=share)
    before = answer_states(model, **batch, share=share)
    after = answer_states(model, **batch, after=True, share=share)
    assert logits.shape == (6, 6, V)
    assert before.shape == after.shape == (6, 6, 32)
    for b in range(6):
        prompt = batch["prompt_token"][b][batch["prompt_mask"][b]]
        answer = batch["token"][b][batch["mask"][b]]
        tokens = torch.cat([prompt, answer])[None]
        states = model.base_model(input_ids=tokens).last_hidden_state[0]
        p, n = len(prompt), len(answer)
        torch.testing.assert_close(before[b, :n], states[p - 1 : -1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after[b, :n], states[p:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            logits[b, :n], model(input_ids=tokens).logits[0, p - 1 : -1], rtol=1e-5, atol=1e-5
        )
    assert (logits[:, 5] == 0).all()  # nobody's


def test_answers_of_a_single_token_need_the_prompt_alone() -> None:
    model, batch = made(llama), pairs()
    batch = {**batch, "mask": batch["mask"] & (torch.arange(6) < 1)}
    expected = plain(model, batch)
    for share in (False, True):
        found = answer_log_probs(model, **batch, share=share)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_prompts_of_one_length_need_no_attention_mask() -> None:
    model, batch = made(llama), pairs()
    batch = {**batch, "prompt_mask": torch.ones_like(batch["prompt_mask"])}
    expected = plain(model, batch)
    asked: list[bool] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, inputs: asked.append(inputs.get("attention_mask") is not None), with_kwargs=True
    )
    for share in (False, True):
        found = answer_log_probs(model, **batch, share=share)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert asked
    assert not any(asked[-3:])


def test_same_prompts_are_found_wherever_they_lie() -> None:
    prompt = torch.tensor([[1, 2, 3], [9, 2, 3], [1, 2, 3], [8, 2, 3], [1, 2, 4]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    rows, number = same_prompts(prompt, mask)  # what is padded does not count, what is real does
    assert sorted(rows.tolist()) == [0, 1, 4]
    assert rows[number].tolist() == [0, 1, 0, 1, 4]


def test_it_reads_each_prompt_once() -> None:
    model, batch = made(llama), pairs()
    read: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    assert can_share(model)
    assert output_weight(model) is not None
    read.clear()
    answer_log_probs(model, **batch, share=True)
    assert read == [3 * 6, 6 * 4]  # three prompts of at most 6 tokens, six answers without their last token
    read.clear()
    answer_log_probs(model, **batch, share=False)
    assert read == [6 * 10]


# --- when prompts are shared ------------------------------------------------------------------------------


def calls(model: Any, batch: dict[str, Tensor]) -> int:
    assert output_weight(model) is not None  # tried before the calls are counted
    count: list[int] = []
    hook = model.base_model.register_forward_pre_hook(lambda module, args: count.append(1))
    answer_log_probs(model, **batch)
    hook.remove()
    return len(count)


@pytest.fixture
def tiny_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even the smallest model is worth a second pass."""
    monkeypatch.setattr(shared_prompts, "_WORK", {"cpu": 0.0, "cuda": 0.0})


def test_it_shares_where_enough_is_saved(tiny_counts: None) -> None:
    model, batch = made(llama), pairs()
    assert can_share(model)
    assert output_weight(model) is not None
    assert calls(model, batch) == 2
    apart = {**batch, "prompt_token": torch.arange(42).view(6, 7)}
    assert calls(model, apart) == 1  # no two prompts are the same
    long = {
        **batch,
        "token": torch.zeros(6, 40, dtype=torch.int64),
        "mask": torch.ones(6, 40, dtype=torch.bool),
    }
    assert calls(model, long) == 1  # three prompts of 6 tokens in 6 rows of 46: less than a tenth
    model.train()
    assert calls(model, batch) == 1  # with dropout, two answers would share its noise
    model.eval()
    model.gradient_checkpointing_enable()
    assert calls(model, batch) == 1  # what is computed again has no cache


def test_a_compiled_model_is_called_as_a_whole(tiny_counts: None) -> None:
    model, batch = made(llama), pairs()
    expected = answer_log_probs(model, **batch)
    asked: list[int] = []
    model.register_forward_pre_hook(lambda module, args: asked.append(1))
    model.compile(backend="eager")
    torch.testing.assert_close(answer_log_probs(model, **batch), expected, rtol=1e-5, atol=1e-5)
    assert len(asked) == 1


def test_small_models_are_not_worth_a_second_pass() -> None:
    assert calls(made(llama), pairs()) == 1


def test_a_model_that_remembers_otherwise_is_found_out(tiny_counts: None) -> None:
    """A cache that forgets the first tokens (or anything else that changes the states) is noticed, and not used."""

    class Forgetful(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.config = inner, inner.config

        def forward(self, **inputs: Any) -> Any:
            out = self.inner.base_model(**inputs)
            if inputs["use_cache"]:
                for layer in out.past_key_values.layers:
                    layer.keys = layer.keys * (torch.arange(layer.keys.shape[2]) > 1)[:, None]
            return out

    model = made(llama)
    assert can_share(model.base_model)
    assert not can_share(Forgetful(model).eval())


def test_windows_shorter_than_the_text_are_not_shared(tiny_counts: None) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    def mistral(window: int) -> Any:
        config = MistralConfig(
            vocab_size=V, num_key_value_heads=2, initializer_range=0.2, sliding_window=window, **SIZES
        )
        return made(lambda: MistralForCausalLM(config))

    batch = pairs()
    assert not can_share(mistral(3))
    near, far = mistral(10), mistral(11)  # the longest row has 11 tokens
    for model in (near, far):
        assert can_share(model)
        assert output_weight(model) is not None
        torch.testing.assert_close(
            answer_log_probs(model, **batch), plain(model, batch), rtol=1e-5, atol=1e-5
        )
    assert calls(near, batch) == 1
    assert calls(far, batch) == 2


def test_a_reference_without_its_adapter_stays_without_it(tiny_counts: None) -> None:
    """The frozen copy of an adapted model is that model with the adapter off, in every pass."""
    model, batch = made(llama), pairs()
    expected = plain(model, batch).detach()
    lora.add(model, lora.LoRA(rank=2, targets=("q_proj", "v_proj", "up_proj")))
    for parameter in lora.parameters(model):
        parameter.data = torch.full_like(parameter, 0.3)
    reference = lora._Without(model)
    with torch.no_grad():
        adapted = answer_log_probs(model, **batch)
        for share in (None, False, True):
            found = answer_log_probs(reference, **batch, share=share)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        logits = answer_logits(reference, **batch, share=True).log_softmax(-1)
    chosen = logits.gather(-1, batch["token"][..., None])[..., 0][batch["mask"]]
    torch.testing.assert_close(chosen, expected[batch["mask"]], rtol=1e-5, atol=1e-5)
    assert (adapted - expected).abs().max() > 0.1
    torch.testing.assert_close(adapted, plain(model, batch).detach(), rtol=1e-5, atol=1e-5)


# --- the head ---------------------------------------------------------------------------------------------


def test_heads_that_do_more_than_multiply_are_left_to_the_model() -> None:
    from transformers import CohereConfig, CohereForCausalLM

    scaled = made(
        lambda: CohereForCausalLM(CohereConfig(vocab_size=V, logit_scale=0.3, initializer_range=0.2, **SIZES))
    )
    batch = pairs()
    assert output_weight(scaled) is None
    torch.testing.assert_close(
        answer_log_probs(scaled, **batch, share=False), plain(scaled, batch), rtol=1e-5, atol=1e-5
    )
    model = made(llama)
    weight = output_weight(model)
    assert weight is model.lm_head.weight
    adapted = copy.deepcopy(model)
    lora.add(adapted, lora.LoRA(rank=2, targets=("lm_head",)))
    assert output_weight(adapted) is None


def test_masks_that_do_not_fit_are_refused() -> None:
    batch = pairs()
    with pytest.raises(ShapeError, match="mask"):
        answer_logits(made(llama), **{**batch, "mask": batch["mask"][:, 1:]})
