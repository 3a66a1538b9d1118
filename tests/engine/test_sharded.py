"""A transformer split over four processes gives the logits, gradients, updates and answers of the whole one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from four_processes import Answers, run
from torch import Tensor, nn
from torch.nn import functional as F

from guerdon.engine.pipelines import ShardedActor, log_prob
from guerdon.engine.protocols import Layout
from guerdon.engine.reshard import account
from guerdon.engine.sharded import describe
from guerdon.engine.shards import take
from guerdon.errors import UsageError
from guerdon.policies.generation import generate

V, END = 37, 0  # a vocabulary that no number of ranks divides
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 42, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}


def build(name: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    if name.startswith("gpt2"):
        config = transformers.GPT2Config(
            vocab_size=V,
            n_embd=32,
            n_layer=4,
            n_head=8,
            n_positions=32,
            initializer_range=0.15,
            tie_word_embeddings=name == "gpt2 tied",
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        family = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[name]
        config = getattr(transformers, family + "Config")(
            **SIZES, **HEADS, initializer_range=0.15, tie_word_embeddings=False
        )
        model = getattr(transformers, family + "ForCausalLM")(config)
    with torch.no_grad():  # as if trained: biases start at zero and norms at one
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def batch(rows: int = 8, length: int = 7) -> dict[str, Tensor]:
    """Texts, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    token = torch.randint(1, V, (rows, length), generator=generator)
    start = torch.randint(0, 4, (rows, 1), generator=generator)
    mask = torch.arange(length) >= start
    return {"token": token, "mask": mask, "weight": torch.rand(rows, length, generator=generator) * mask}


def loss_of(logits: Tensor, part: Mapping[str, Tensor], total: float) -> Tensor:
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), part["token"][:, 1:], reduction="none")
    return (nll * part["weight"][:, :-1]).sum() / total


def whole_logits(model: Any, part: Mapping[str, Tensor]) -> Tensor:
    position = (part["mask"].long().cumsum(1) - 1).clamp(min=0)
    return model(part["token"], attention_mask=part["mask"].long(), position_ids=position).logits


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((found[n] - expected[n]).abs().max().item() for n in found)


TRAINING = [
    ("llama", Layout(dp=1, tp=4)),
    ("llama", Layout(dp=1, pp=2, tp=2)),
    ("llama", Layout(dp=1, pp=4)),
    ("qwen2", Layout(dp=2, tp=2)),
    ("qwen3", Layout(dp=1, tp=4)),
    ("qwen3", Layout(dp=2, pp=2)),
    ("gpt2 tied", Layout(dp=1, tp=4)),
    ("gpt2 tied", Layout(dp=2, tp=2)),
    ("gpt2", Layout(dp=1, pp=2, tp=2)),
]


def training(name: str, layout: Layout) -> dict[str, Any]:
    """Two steps of Adam, beside the whole model's."""
    model, everything = build(name), batch()
    actor = ShardedActor(model, layout)
    total = everything["weight"].sum().item()
    replica = layout.coordinates(dist.get_rank()).dp
    own = {key: value.chunk(layout.dp)[replica] for key, value in everything.items()}
    # micro-batches of unequal sizes
    parts = [
        dict(zip(own, rows, strict=True)) for rows in zip(*(x.split(3) for x in own.values()), strict=True)
    ]
    seen: list[Tensor] = []

    def loss(logits: Tensor, part: Mapping[str, Tensor]) -> Tensor:
        expected = whole_logits(model, part)
        seen.append((logits - expected)[part["mask"]].abs().max().detach())
        return loss_of(logits, part, total)

    found: dict[str, Any] = {"losses": [], "gradients": [], "norms": []}
    one = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-3)
    many = torch.optim.Adam(actor.weights.values(), lr=0.01, eps=1e-3)
    for _ in range(2):
        one.zero_grad()
        many.zero_grad()
        expected = loss_of(whole_logits(model, everything), everything, total)
        expected.backward()
        value = actor.forward_backward(parts, loss)
        gradients = {n: p.grad for n, p in model.named_parameters()}
        shares = actor.held
        expected_shards = {n: take(gradients[n], p, s) for n, (p, s) in shares.items()}
        found["gradients"].append(apart({n: w.grad for n, w in actor.weights.items()}, expected_shards))
        found["losses"].append(abs(value - expected).item())
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        found["norms"].append(abs(actor.gradient_norm() / norm - 1).item())
        one.step()
        many.step()
    found["logits"] = max(float(x) for x in seen) if seen else None
    found["weights"] = apart(actor.state(), {n: p.detach() for n, p in model.named_parameters()})
    found["moved"] = apart(actor.state(), {n: p.detach() for n, p in build(name).named_parameters()})
    actor.close()
    return found


GENERATING = [
    ("llama", Layout(dp=1, tp=4), 1, 4, "hybridflow"),
    ("llama", Layout(dp=1, tp=4), 1, 2, "hybridflow"),
    ("llama", Layout(dp=1, tp=4), 1, 2, "vanilla"),
    ("llama", Layout(dp=1, tp=4), 1, 1, "hybridflow"),
    ("llama", Layout(dp=1, pp=2, tp=2), 1, 1, "hybridflow"),
    ("qwen3", Layout(dp=1, pp=2, tp=2), 2, 1, "hybridflow"),
    ("qwen2", Layout(dp=1, pp=2, tp=2), 2, 2, "hybridflow"),
    ("gpt2 tied", Layout(dp=1, tp=4), 1, 2, "hybridflow"),
    ("gpt2 tied", Layout(dp=2, tp=2), 1, 1, "hybridflow"),
    ("gpt2", Layout(dp=1, pp=2, tp=2), 1, 1, "hybridflow"),
]
PROMPTS = [[5, 6, 7], [8], [9, 10], [5, 6, 7, 8, 9], [11, 12], [13], [14, 15, 16]]
SEEDS = torch.arange(100, 107)


def generating(name: str, train: Layout, pp: int, tp: int, engine: str) -> dict[str, Any]:
    model, rank = build(name), dist.get_rank()
    actor = ShardedActor(model, train, pp, tp, engine)
    before = actor.store.flat.clone()
    replica = train.coordinates(rank).dp
    rows = slice(len(PROMPTS) * replica // train.dp, len(PROMPTS) * (replica + 1) // train.dp)
    found: dict[str, Any] = {}
    for how in ({"temperature": 1.3}, {"greedy": True}):
        options = {"end": END, "max_new_tokens": 6, **how}
        mine = actor.generate(PROMPTS, SEEDS, fill=END, **options)
        whole = generate(model, PROMPTS[rows], SEEDS[rows], **options)
        kind = "greedy" if "greedy" in how else "sampled"
        T = whole.token.shape[1]
        assert not mine.mask[:, T:].any()
        found[kind] = torch.equal(mine.token[:, :T], whole.token) and torch.equal(
            mine.mask[:, :T], whole.mask
        )
        found[kind + " log_prob"] = (mine.log_prob[:, :T] - whole.log_prob).abs().max().item()
        found[kind + " lengths"] = mine.mask.sum(1).tolist()
    # what training finds for the tokens just sampled, from the weights that it has itself
    longest = max(len(p) for p in PROMPTS[rows])
    prompt = torch.tensor([[END] * (longest - len(p)) + p for p in PROMPTS[rows]])
    real = torch.arange(longest) >= torch.tensor([[longest - len(p)] for p in PROMPTS[rows]])
    token, mask = torch.cat([prompt, mine.token], 1), torch.cat([real, mine.mask], 1)
    trained = log_prob(actor.model, token, mask)[:, longest:]
    found["old log_prob"] = ((trained - mine.log_prob) * mine.mask).abs().max().item()
    # a batch that leaves replicas without a row
    few = actor.generate(PROMPTS[:2], SEEDS[:2], end=END, max_new_tokens=3, greedy=True)
    found["few"] = len(few.token)
    with actor.generation_weights() as weights:
        found["traffic"] = weights.traffic == account(actor.parameters, train, pp, tp, engine, rank)
        found["rows"] = actor.engine.rows(len(PROMPTS))
    found["untouched"] = torch.equal(before, actor.store.flat)
    found["views"] = all(
        w.untyped_storage().data_ptr() == actor.store.flat.untyped_storage().data_ptr()
        for w in actor.weights.values()
    )
    actor.close()
    return found


def learning() -> list[float]:
    """Updates with the answers just given, in turns: what is generated comes from what was just learned."""
    model = build("llama")
    actor = ShardedActor(model, Layout(dp=1, tp=4), tp=2)
    optimiser = torch.optim.SGD(actor.weights.values(), lr=1.0)
    shares = []
    for step in range(8):
        answers = actor.generate(PROMPTS, SEEDS + 100 * step, fill=END, end=END, max_new_tokens=5)
        hit = (answers.token == 7) & answers.mask
        shares.append((hit.sum() / answers.mask.sum()).item())
        longest = max(map(len, PROMPTS))
        prompt = torch.tensor([[END] * (longest - len(p)) + p for p in PROMPTS])
        real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in PROMPTS])
        token = torch.cat([prompt, answers.token], 1)
        advantage = (hit.float() - 1 / V) * answers.mask
        weight = F.pad(advantage, (longest - 1, 1))  # at the place before each answer token
        part = {"token": token, "mask": torch.cat([real, answers.mask], 1), "weight": weight}
        optimiser.zero_grad()
        actor.forward_backward([part], lambda logits, p: loss_of(logits, p, 10.0))
        optimiser.step()
    actor.close()
    return shares


def checks() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for n, case in enumerate(TRAINING):
        found[f"training {n}"] = partial(training, *case)
    for n, generation in enumerate(GENERATING):
        found[f"generating {n}"] = partial(generating, *generation)
    found["learning"] = learning
    return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return run(checks, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("case", range(len(TRAINING)))
def test_logits_gradients_and_updates_are_those_of_the_whole_model(answers: Answers, case: int) -> None:
    found = answers[f"training {case}"]
    assert any(rank["logits"] is not None for rank in found)
    for rank in found:
        assert rank["logits"] is None or rank["logits"] < 1e-5
        assert max(rank["losses"]) < 1e-5
        assert max(rank["gradients"]) < 1e-5
        assert max(rank["norms"]) < 1e-5
        assert rank["weights"] < 1e-5
        assert rank["moved"] > 1e-3


@pytest.mark.parametrize("case", range(len(GENERATING)))
def test_answers_are_those_of_the_whole_model(answers: Answers, case: int) -> None:
    for rank in answers[f"generating {case}"]:
        for kind in ("greedy", "sampled"):
            assert rank[kind]
            assert rank[kind + " log_prob"] < 1e-5
        assert rank["old log_prob"] < 1e-5
        assert rank["traffic"]  # to the byte, norms and unequal stages included
        assert rank["untouched"]
        assert rank["views"]
        assert rank["few"] == 2 // GENERATING[case][1].dp


def test_answers_end_at_different_lengths(answers: Answers) -> None:
    lengths = [n for rank in answers["generating 1"] for n in rank["sampled lengths"]]
    assert len(set(lengths)) > 1


def test_peers_of_a_tensor_group_sample_the_same_rows_and_replicas_different_ones(answers: Answers) -> None:
    rows = [rank["rows"] for rank in answers["generating 1"]]
    assert rows[0] == rows[2] == slice(0, 3)  # t = 4 to t_g = 2, groups {0, 2} and {1, 3}
    assert rows[1] == rows[3] == slice(3, 7)


def test_training_and_generating_take_turns(answers: Answers) -> None:
    shares = answers["learning"]
    assert shares == [shares[0]] * 4
    assert sum(shares[0][-3:]) / 3 > 5 * max(shares[0][0], 1 / V)


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be split over ranks"):
        describe(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="dropout"):
        describe(build("gpt2").train())


def test_each_weight_is_split_as_its_place_asks() -> None:
    _, llama = describe(build("qwen2"))
    found = {p.name: (p.dim, p.parts, p.unit) for p in llama}
    at = "model.layers.0."
    assert found[at + "self_attn.q_proj.bias"] == (0, (), 4)
    assert found[at + "self_attn.o_proj.weight"] == (1, (), 4)
    assert found[at + "mlp.down_proj.weight"] == (1, (), 1)
    assert found[at + "input_layernorm.weight"] == (None, (), 1)
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == (0, (), 1)
    _, gpt2 = describe(build("gpt2 tied"))
    found = {p.name: (p.dim, p.parts, p.unit) for p in gpt2}
    at = "transformer.h.0."
    assert found[at + "attn.c_attn.weight"] == (1, (32, 32, 32), 4)
    assert found[at + "attn.c_attn.bias"] == (0, (32, 32, 32), 4)
    assert found[at + "attn.c_proj.weight"] == (0, (), 4)
    assert found[at + "attn.c_proj.bias"] == (None, (), 1)
    assert {p.name: p.layer for p in gpt2}["transformer.wte.weight"] == "both"
