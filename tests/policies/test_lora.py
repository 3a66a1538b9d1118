"""Low-rank adapters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from guerdon.errors import UsageError
from guerdon.policies import lora
from guerdon.policies.denoiser import Denoiser, DenoiserConfig
from guerdon.policies.lora import LoRA


@pytest.fixture
def module() -> Denoiser:
    torch.manual_seed(0)
    net = Denoiser(
        DenoiserConfig(sample_size=8, block_out_channels=(8, 16), cross_attention_dim=8, norm_num_groups=4)
    )
    nn.init.normal_(net.conv_out.weight, std=0.1)
    return net.eval()


def output(module: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, c = torch.randn(2, 3, 8, 8, generator=generator), torch.randn(2, 4, 8, generator=generator)
    return module(x, 500, c).sample


def stir(module: nn.Module) -> None:
    for parameter in lora.parameters(module):
        nn.init.normal_(parameter, std=0.5)


def test_a_new_adapter_changes_nothing_and_is_all_that_learns(module: Denoiser) -> None:
    before = output(module)
    assert not lora.has_lora(module)
    lora.add(module, LoRA(rank=2))
    assert lora.has_lora(module)
    assert torch.equal(output(module), before)
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert len(trained) == len(lora.parameters(module)) == 4 * 4 * 2


def test_initial_weights_depend_on_the_seed_alone() -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        module = Denoiser(DenoiserConfig(block_out_channels=(8, 16)))
        return lora.adapter_state_dict(lora.add(module, LoRA(), seed))

    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    first = weights(0)
    torch.random.set_rng_state(state)
    second, third = weights(0), weights(1)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], third[k]) for k in first)
    module = Denoiser(DenoiserConfig(block_out_channels=(8, 16)))
    state = torch.random.get_rng_state()
    lora.add(module, LoRA())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_disabled_is_the_module_before(module: Denoiser) -> None:
    before = output(module)
    lora.add(module, LoRA(rank=2))
    stir(module)
    assert not torch.equal(output(module), before)
    with lora.disabled(module):
        assert torch.equal(output(module), before)
        with lora.disabled(module):
            pass
        assert torch.equal(output(module), before)
        assert all(p.requires_grad for p in lora.parameters(module))
    assert not torch.equal(output(module), before)
    with pytest.raises(KeyError), lora.disabled(module):
        raise KeyError
    assert not torch.equal(output(module), before)


def test_merged_gives_the_same_output_and_restores_every_bit(module: Denoiser) -> None:
    lora.add(module, LoRA(rank=2, alpha=6))
    stir(module)
    weights = {k: v.clone() for k, v in module.state_dict().items()}
    before = output(module)
    with lora.merged(module), torch.no_grad():
        torch.testing.assert_close(output(module), before, atol=1e-4, rtol=1e-4)
        with pytest.raises(RuntimeError, match="merged"), lora.disabled(module):
            pass
        with lora.merged(module):  # nothing left to merge
            torch.testing.assert_close(output(module), before, atol=1e-4, rtol=1e-4)
    assert torch.equal(output(module), before)
    assert all(torch.equal(v, weights[k]) for k, v in module.state_dict().items())
    with lora.disabled(module):
        off = output(module)
        with lora.merged(module):  # an adapter that is off stays off
            assert torch.equal(output(module), off)


def test_folding_leaves_a_plain_module(module: Denoiser) -> None:
    names = set(module.state_dict())
    lora.add(module, LoRA(rank=2, alpha=6))
    stir(module)
    before = output(module)
    merged = lora.merged_state_dict(module)
    assert set(merged) == set(lora.base_state_dict(module)) == names
    lora.fold(module)
    assert set(module.state_dict()) == names
    assert not lora.has_lora(module)
    torch.testing.assert_close(output(module), before, atol=1e-4, rtol=1e-4)
    lora.add(module, LoRA(rank=4))  # and another one can go on top


def test_state_goes_out_and_in(module: Denoiser) -> None:
    lora.add(module, LoRA(rank=2))
    stir(module)
    state = {k: v.clone() for k, v in lora.adapter_state_dict(module).items()}
    before = output(module)
    stir(module)
    lora.load_adapter_state_dict(module, state)
    assert torch.equal(output(module), before)
    with pytest.raises(UsageError, match="do not fit"):
        lora.load_adapter_state_dict(module, {k: v[:1] for k, v in state.items()})


def test_adapters_are_float32_on_half_precision_weights(module: Denoiser) -> None:
    module.to(torch.bfloat16)
    lora.add(module, LoRA(rank=2))
    assert all(p.dtype == torch.float32 for p in lora.parameters(module))
    weight = module.attend_up_middle.to_q.base_layer.weight
    with lora.merged(module):  # not merged: rounding would change the policy
        assert module.attend_up_middle.to_q.base_layer.weight.data_ptr() == weight.data_ptr()


def test_mistakes_are_named(module: Denoiser) -> None:
    with pytest.raises(UsageError, match="no layer of Denoiser is called q_proj"):
        lora.add(module, LoRA(targets=("q_proj",)))
    lora.add(module, LoRA())
    with pytest.raises(UsageError, match="already"):
        lora.add(module, LoRA())


def test_language_models_take_adapters() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2)).eval()
    tokens = torch.arange(6)[None]
    before = model(tokens).logits
    lora.add(model, LoRA(rank=2, targets=("c_attn",)))
    stir(model)
    assert not torch.equal(model(tokens).logits, before)
    with lora.disabled(model):
        assert torch.equal(model(tokens).logits, before)
    after = model(tokens).logits
    torch.testing.assert_close(lora.fold(model)(tokens).logits, after, atol=1e-5, rtol=1e-4)
