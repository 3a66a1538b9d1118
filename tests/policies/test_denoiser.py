"""The small denoiser, its text encoder and its tokenizer: called as their big relatives are."""

from __future__ import annotations

import json

import pytest
import torch

from guerdon.policies.denoiser import (
    Denoiser,
    DenoiserConfig,
    TextEncoder,
    TextEncoderConfig,
    WordTokenizer,
    load_text_to_image,
    save_text_to_image,
)
from guerdon.policies.schedule import NoiseSchedule, guidance_embedding


def stirred(denoiser: Denoiser) -> Denoiser:
    """With an output that is no longer zero."""
    torch.manual_seed(1)
    for name, weight in denoiser.named_parameters():
        if name.startswith(("conv_out", "cond_proj")):
            torch.nn.init.normal_(weight, std=0.1)
    return denoiser


@pytest.mark.parametrize(("channels", "size"), [(3, 16), (1, 16), (3, 8), (4, 24)])
def test_output_has_the_shape_of_the_input_and_starts_at_zero(channels: int, size: int) -> None:
    denoiser = Denoiser(DenoiserConfig(in_channels=channels, sample_size=size))
    x, context = torch.randn(5, channels, size, size), torch.randn(5, 7, 64)
    noise = denoiser(x, torch.arange(5), context).sample
    assert noise.shape == x.shape
    assert noise.abs().max() == 0
    assert noise.is_contiguous()


def test_scalar_and_batched_timesteps_and_the_tuple_form_agree() -> None:
    denoiser = stirred(Denoiser()).eval()
    x, context = torch.randn(4, 3, 16, 16), torch.randn(4, 12, 64)
    batched = denoiser(x, torch.full((4,), 321), encoder_hidden_states=context).sample
    assert batched.abs().max() > 0
    for timestep in (321, torch.tensor(321), torch.tensor([321])):
        assert torch.equal(denoiser(x, timestep, context, return_dict=False)[0], batched)


def test_examples_do_not_see_each_other() -> None:
    denoiser = stirred(Denoiser()).eval()
    x, context, times = torch.randn(6, 3, 16, 16), torch.randn(6, 12, 64), torch.arange(6) * 150
    together = denoiser(x, times, context).sample
    alone = torch.cat([denoiser(x[i : i + 1], times[i : i + 1], context[i : i + 1]).sample for i in range(6)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_student_told_its_guidance_starts_as_its_teacher() -> None:
    teacher = stirred(Denoiser()).eval()
    student = Denoiser(DenoiserConfig(time_cond_proj_dim=256)).eval()
    missing = student.load_state_dict(teacher.state_dict(), strict=False)
    assert missing.missing_keys == ["cond_proj.weight"]
    assert not missing.unexpected_keys
    x, context, told = (
        torch.randn(3, 3, 16, 16),
        torch.randn(3, 12, 64),
        guidance_embedding(torch.tensor([0.0, 2, 5])),
    )
    expected = teacher(x, 500, context).sample
    assert torch.equal(student(x, 500, context, timestep_cond=told).sample, expected)
    assert not torch.equal(stirred(student)(x, 500, context, timestep_cond=told).sample, expected)


def test_the_caption_and_its_order_reach_the_output() -> None:
    denoiser = stirred(Denoiser()).eval()
    x, context = torch.randn(1, 3, 16, 16), torch.randn(2, 12, 64)
    first, second = (denoiser(x, 500, words[None]).sample for words in context)
    assert (first - second).abs().max() > 1e-3


def test_wrong_sizes_and_unexpected_conditions_are_refused() -> None:
    denoiser = Denoiser()
    with pytest.raises(ValueError, match="multiples of 4"):
        denoiser(torch.randn(1, 3, 18, 16), 0, torch.randn(1, 4, 64))
    with pytest.raises(ValueError, match="time_cond_proj_dim"):
        denoiser(torch.randn(1, 3, 16, 16), 0, torch.randn(1, 4, 64), timestep_cond=torch.randn(1, 256))


def test_lora_finds_the_names_it_finds_in_diffusers() -> None:
    peft = pytest.importorskip("peft")
    denoiser = stirred(Denoiser())
    x, context = torch.randn(2, 3, 16, 16), torch.randn(2, 12, 64)
    before = denoiser(x, 10, context).sample.detach()
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    adapted = peft.inject_adapter_in_model(config, denoiser)
    names = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
    assert len(names) == 4 * 4
    assert torch.allclose(adapted(x, 10, context).sample, before, atol=1e-6)
    adapted(x, 10, context).sample.square().sum().backward()
    assert all(w.grad is not None for name, w in adapted.named_parameters() if "lora_B" in name)


def test_it_learns_one_picture() -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(DenoiserConfig(block_out_channels=(8, 16)))
    x, context, noise = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 64), torch.randn(2, 3, 16, 16)
    optimiser = torch.optim.Adam(denoiser.parameters(), 5e-3)
    losses = []
    for _ in range(60):
        loss = (denoiser(x, 100, context).sample - noise).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_tokenizer_is_called_as_a_hugging_face_tokenizer() -> None:
    tokenizer = WordTokenizer.from_words(["a", "red", "ring", "grey"], 6, {"gray": "grey"})
    assert tokenizer.vocabulary == ["<pad>", "<unk>", "a", "grey", "red", "ring"]
    out = tokenizer(
        ["A red, RING!", "", "a gray zebra"],
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    assert out.input_ids.tolist() == [[2, 4, 5, 0, 0, 0], [0] * 6, [2, 3, 1, 0, 0, 0]]
    assert out["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [0] * 6, [1, 1, 1, 0, 0, 0]]
    assert tokenizer.batch_decode(out.input_ids) == ["a red ring", "", "a grey"]
    assert tokenizer("a red", padding=True).input_ids == [[2, 4]]
    assert tokenizer("a " * 9, return_tensors="pt").input_ids.shape == (1, 6)
    with pytest.raises(ValueError, match="9 words"):
        tokenizer("a " * 9, truncation=False)
    assert WordTokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer


def test_text_encoder_is_called_as_clips() -> None:
    encoder = TextEncoder(TextEncoderConfig(vocab_size=9, max_length=6, hidden_size=64))
    out = encoder(torch.randint(0, 9, (3, 6)))
    assert out[0].shape == (3, 6, 64)
    assert out[0] is out.last_hidden_state
    words = encoder(torch.tensor([[3, 3]]))[0][0]
    assert not torch.equal(words[0], words[1])  # the same word, another place


def test_saved_and_loaded_models_are_the_same(tmp_path) -> None:
    tokenizer = WordTokenizer.from_words(["a", "red"], 4)
    denoiser = stirred(Denoiser(DenoiserConfig(block_out_channels=(8, 16), time_cond_proj_dim=256)))
    encoder = TextEncoder(TextEncoderConfig(len(tokenizer), 4))
    schedule = NoiseSchedule(clip_sample=1.0)
    save_text_to_image(
        tmp_path, "consistency", denoiser, encoder, tokenizer, schedule.to_dict(), torch.float32
    )
    loaded, loaded_encoder, loaded_tokenizer, config = load_text_to_image(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert NoiseSchedule(**config["schedule"]) == schedule
    assert config["kind"] == "consistency"
    assert loaded.config == denoiser.config
    assert loaded_tokenizer == tokenizer
    for ours, theirs in ((denoiser, loaded), (encoder, loaded_encoder)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
