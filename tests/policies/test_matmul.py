"""The faster matrix library: same numbers, same gradients, and it steps aside wherever it must."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guerdon.errors import UsageError
from guerdon.policies import lora, matmul
from guerdon.policies.matmul import (
    FastLinear,
    fast_linears,
    library,
    linear,
    plain_linears,
    token_log_probs,
    turned_linear,
)

SHAPES = [(64, 64, 256), (96, 256, 400), (5, 512, 512), (640, 128, 128)]  # rows, inputs, outputs


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever this machine prefers, the other library is what is to be tested."""
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path_factory.mktemp("cache")))
    if not matmul._tried(torch.get_num_threads())["exact"]:
        pytest.skip("oneDNN does not compute in float32 here")
    monkeypatch.setenv("GUERDON_MATMUL", "onednn")
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The products that oneDNN was asked for."""
    found: list[Any] = []
    real = matmul._onednn

    def counted(product: Any, *operands: Any) -> Tensor:
        found.append(product)
        return real(product, *operands)

    monkeypatch.setattr(matmul, "_onednn", counted)
    return found


def operands(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, inputs, requires_grad=True)
    return x, torch.randn(outputs, inputs, requires_grad=True), torch.randn(outputs, requires_grad=True)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


# --- the product ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_float32_and_no_coarser(shape: tuple[int, int, int], calls: list[Any]) -> None:
    """Products and gradients are as near to float64's as float32 allows; bfloat16 or TF32 would miss by 1e-3."""
    leaves = operands(*shape)
    y = linear(*leaves)
    assert calls
    grad = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, leaves, grad)]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_y = F.linear(*doubles)
    exact = [exact_y, *torch.autograd.grad(exact_y, doubles, grad.double())]
    for a, b in zip(found, exact, strict=True):
        assert error(a, b) < 2e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_a_turned_weight_gives_the_same(shape: tuple[int, int, int]) -> None:
    x, weight, bias = operands(*shape)
    turned = weight.detach().t().contiguous().requires_grad_()
    y, z = linear(x, weight, bias), turned_linear(x, turned, bias)
    grad = torch.randn_like(y)
    a, b = torch.autograd.grad(y, (x, weight), grad), torch.autograd.grad(z, (x, turned), grad)
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(a[0], b[0])
    torch.testing.assert_close(a[1], b[1].t(), rtol=1e-5, atol=1e-4)


def test_any_number_of_leading_dimensions_and_any_strides(calls: list[Any]) -> None:
    weight = torch.randn(128, 64, requires_grad=True)
    x = torch.randn(3, 64, 8, 7).permute(0, 2, 3, 1).requires_grad_()  # [3, 8, 7, 64], not contiguous
    y, z = linear(x, weight), F.linear(x, weight)
    assert calls
    assert y.shape == (3, 8, 7, 128)
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
    # the gradient of a sum is one number, expanded
    for a, b in zip(
        torch.autograd.grad(y.sum(), (x, weight)), torch.autograd.grad(z.sum(), (x, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_only_what_is_asked_for_is_computed(calls: list[Any]) -> None:
    x, weight, bias = operands(64, 256, 256)
    frozen = linear(x, weight.detach())
    calls.clear()
    (found,) = torch.autograd.grad(frozen.sum(), x)
    assert len(calls) == 1
    assert found.shape == x.shape
    with torch.no_grad():
        assert linear(x, weight, bias).grad_fn is None
    assert linear(x.detach(), weight.detach()).grad_fn is None


def test_second_derivatives_are_torchs() -> None:
    def penalty(product: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        leaves = operands(64, 128, 128)
        (grad,) = torch.autograd.grad(product(*leaves).tanh().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaves)

    for a, b in zip(penalty(linear), penalty(F.linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_it_steps_aside(calls: list[Any]) -> None:
    """Small products, other types, autocast, transforms and tracing are torch's."""
    x, weight = torch.randn(64, 256), torch.randn(256, 256)
    linear(x[:2], weight)
    linear(x.double(), weight.double())
    linear(x.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    torch.func.vmap(linear, in_dims=(0, None))(x.expand(3, 64, 256), weight)
    torch.func.grad(lambda w: linear(x, w).sum())(weight)
    torch.func.jvp(lambda v: linear(v, weight), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        linear(torch.autograd.forward_ad.make_dual(x, x), weight)
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils.flop_counter import FlopCounterMode

    make_fx(lambda x, weight: linear(x, weight))(x, weight)
    with FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 64 * 256 * 256
    assert not calls
    linear(x, weight)
    assert len(calls) == 1


def test_gradients_for_many_directions_at_once() -> None:
    x, weight, _ = operands(64, 128, 128)
    y = linear(x, weight)
    directions = torch.randn(3, *y.shape)
    (batched,) = torch.autograd.grad(y, weight, directions, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        (one,) = torch.autograd.grad(y, weight, directions[i], retain_graph=True)
        torch.testing.assert_close(batched[i], one, rtol=1e-5, atol=1e-4)


def test_wrong_shapes_get_torchs_error() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(64, 128), torch.randn(256, 256))
    with pytest.raises(RuntimeError):
        linear(torch.randn(64, 256), torch.randn(256, 256), torch.randn(128))


# --- which library ----------------------------------------------------------------------------------------


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, and a measurement that finds oneDNN faster the first time alone."""
    answers = iter([{"exact": True, "faster": True}, {"exact": True, "faster": False}])
    monkeypatch.setenv("GUERDON_MATMUL", "auto")
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    monkeypatch.setattr(matmul, "_try", lambda: next(answers))
    matmul._tried.cache_clear()
    yield tmp_path
    matmul._tried.cache_clear()


def test_the_choice_is_measured_once_and_kept(tried: Path) -> None:
    """A resumed run has to compute as the run before it, so a measurement is made once a machine."""
    assert library() == library() == "onednn"
    matmul._tried.cache_clear()  # as in another process
    assert library() == "onednn"
    (kept,) = tried.rglob("matmul-*.json")
    kept.write_text("{damaged")
    matmul._tried.cache_clear()
    assert library() == "mkl"
    matmul._tried.cache_clear()
    assert library() == "mkl"  # it was measured anew, and kept


def test_what_rounds_is_never_used(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    monkeypatch.setattr(matmul, "_tried", lambda threads: {"exact": False, "faster": True})
    for asked in ("auto", "onednn"):
        monkeypatch.setenv("GUERDON_MATMUL", asked)
        assert library() == "mkl"


def test_rounding_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert matmul._try()["exact"]

    def rounded(product: Any, *operands: Any) -> Tensor:
        return product(*(x.bfloat16() for x in operands)).float()

    monkeypatch.setattr(matmul, "_onednn", rounded)
    assert not matmul._try()["exact"]


def test_trying_draws_no_random_numbers_and_leaves_the_setting() -> None:
    before = torch.random.get_rng_state()
    setting = torch.backends.mkldnn.matmul.fp32_precision
    assert set(matmul._try()) == {"exact", "faster"}
    with pytest.raises(ZeroDivisionError):
        matmul._onednn(lambda: 1 / 0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.backends.mkldnn.matmul.fp32_precision == setting
    assert torch.get_float32_matmul_precision() == "highest"


def test_products_of_several_threads_leave_the_setting() -> None:
    from concurrent.futures import ThreadPoolExecutor

    setting = torch.backends.mkldnn.matmul.fp32_precision
    x, weight = torch.randn(64, 256), torch.randn(256, 256)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: linear(x, weight), range(200)))
    assert torch.backends.mkldnn.matmul.fp32_precision == setting


def test_the_environment_overrides_the_measurement(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    monkeypatch.setenv("GUERDON_MATMUL", "mkl")
    linear(torch.randn(64, 256), torch.randn(256, 256))
    assert not calls
    monkeypatch.setenv("GUERDON_MATMUL", "onednm")
    with pytest.raises(UsageError, match="did you mean 'onednn'"):
        library()


# --- layers of a model ------------------------------------------------------------------------------------


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, initializer_range=0.1, **sizes, **heads)).eval()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=128,
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config).eval()


TOKENS = torch.arange(192).view(8, 24) * 7 % 128


def loss_and_gradient(model: Any) -> tuple[Tensor, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(input_ids=TOKENS).logits.flatten(0, 1), TOKENS.flatten())
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_models_loss_and_gradient_stay(make: Any, calls: list[Any]) -> None:
    model = make()
    loss, gradient = loss_and_gradient(model)
    assert not calls
    fast = loss_and_gradient(fast_linears(model))
    assert len(calls) >= 12
    torch.testing.assert_close(fast[0], loss, rtol=1e-6, atol=0)
    assert error(fast[1], gradient.double()) < 1e-5
    calls.clear()
    again = loss_and_gradient(plain_linears(model))
    assert not calls
    assert torch.equal(again[1], gradient)
    assert not any("Fast" in type(child).__name__ for child in model.modules())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_copies_files_and_pickles_are_those_of_the_model(make: Any, tmp_path: Path) -> None:
    plain, model = make(), fast_linears(make())
    assert plain.state_dict().keys() == model.state_dict().keys()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not any("Fast" in type(child).__name__ for child in loaded.modules())
    torch.testing.assert_close(loaded(TOKENS).logits, twin(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("make", "targets"), [(llama, ("q_proj", "up_proj")), (gpt2, ("c_attn", "c_fc"))])
def test_adapters_go_around_fast_layers_and_plain_ones_alike(make: Any, targets: tuple[str, ...]) -> None:
    settings = lora.LoRA(rank=4, targets=targets)
    before, after, plain = fast_linears(make()), make(), make()
    for model in (before, after, plain):
        lora.add(model, settings)
    fast_linears(after)
    grads = []
    for model in (before, after, plain):
        for parameter in lora.parameters(model):
            parameter.data = torch.full_like(parameter, 0.01)
        grads.append(loss_and_gradient(model)[1])
        lora.fold(model)
    assert error(grads[0], grads[2].double()) < 1e-5
    assert error(grads[1], grads[2].double()) < 1e-5
    assert type(before) is type(plain)
    torch.testing.assert_close(before(TOKENS).logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_layers_of_other_classes_are_left_alone() -> None:
    class Mine(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(4, 4), Mine(4, 4), nn.Conv2d(1, 1, 1))
    fast_linears(module)
    assert [type(m) for m in module] == [FastLinear, Mine, nn.Conv2d]


def test_gradient_checkpointing_recomputes_through_fast_layers() -> None:
    from torch.utils.checkpoint import checkpoint

    layer = fast_linears(nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)))
    x = torch.randn(64, 128, requires_grad=True)
    whole = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    parts = torch.autograd.grad(
        checkpoint(layer, x, use_reentrant=False).square().sum(), [x, *layer.parameters()]
    )
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def test_compilation_sees_plain_layers(calls: list[Any]) -> None:
    layer = fast_linears(nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)))
    x = torch.randn(64, 128, requires_grad=True)
    expected = layer(x)
    calls.clear()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    assert not calls


# --- log-probabilities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1, 7, 40])
def test_log_probabilities_in_chunks_are_the_plain_ones(chunk: int | None) -> None:
    hidden = torch.randn(4, 10, 32, requires_grad=True)
    weight = torch.randn(200, 32, requires_grad=True)
    token = torch.randint(200, (4, 10))
    heat = torch.rand(4, 1).expand(4, 10) + 0.5
    plain = F.log_softmax(F.linear(hidden, weight) / heat[..., None], -1).gather(-1, token[..., None])[..., 0]
    found = token_log_probs(hidden, weight, token, heat, chunk)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    grad = torch.randn(4, 10)
    for a, b in zip(
        torch.autograd.grad(found, (hidden, weight), grad),
        torch.autograd.grad(plain, (hidden, weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_chunks_never_hold_all_logits() -> None:
    """No tensor of the forward or backward pass is larger than a chunk's logits (or the weight)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for part in torch.utils._pytree.tree_leaves(out):
                if isinstance(part, Tensor):
                    Largest.size = max(Largest.size, part.numel())
            return out

    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    with Largest():
        token_log_probs(hidden, weight, torch.arange(64), chunk=4).sum().backward()
    assert Largest.size == 8000  # the weight; all logits are 64,000 numbers


def test_chunks_under_autocast_agree_with_the_whole() -> None:
    hidden, weight = torch.randn(64, 32, requires_grad=True), torch.randn(500, 32, requires_grad=True)
    token = torch.arange(64)
    with torch.autocast("cpu", torch.bfloat16):
        whole = token_log_probs(hidden, weight, token)
        parts = token_log_probs(hidden, weight, token, chunk=16)
    torch.testing.assert_close(parts, whole, rtol=2e-2, atol=2e-2)
    for a, b in zip(
        torch.autograd.grad(parts.sum(), (hidden, weight)),
        torch.autograd.grad(whole.sum(), (hidden, weight)),
        strict=True,
    ):
        assert a.dtype == torch.float32
        assert error(a, b.double()) < 2e-2


def test_chunks_refuse_second_derivatives() -> None:
    hidden, weight = torch.randn(8, 8, requires_grad=True), torch.randn(50, 8)
    found = token_log_probs(hidden, weight, torch.arange(8), chunk=2)
    with pytest.raises(UsageError, match="first derivatives"):
        torch.autograd.grad(found.sum(), hidden, create_graph=True)
