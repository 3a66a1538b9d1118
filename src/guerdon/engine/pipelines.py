"""What the ranks of a layout do together with a transformer that is split over them: score, learn, answer.

Micro-batches go through the stages one after the other; a stage hands its hidden states on and takes the next micro-batch
without waiting (GPipe: Huang et al., 2019). In training all go forward, then all backward; in generation they take turns
token by token, so that no stage waits while there are as many micro-batches as stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from guerdon.engine.protocols import Layout
from guerdon.engine.reallocation import Reallocation
from guerdon.engine.reshard import GenerationWeights, HybridEngine
from guerdon.engine.sharded import Architecture, Blueprint, ShardedTransformer, look
from guerdon.engine.shards import Groups, Mesh, Parameter, Place, Share, Store
from guerdon.errors import UsageError
from guerdon.policies.generation import Generated, inverse_cdf
from guerdon.randomness import uniform

Batch = Mapping[str, Tensor]

# --- from stage to stage ------------------------------------------------------------------------------------


class _Sent:
    """Messages on their way to the next or the last stage; they need their memory until they have arrived."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._waiting: list[tuple[dist.Work | None, Tensor]] = []

    def send(self, hidden: Tensor, step: int) -> None:
        parcel = hidden.detach().contiguous()
        self._waiting.append((dist.isend(parcel, self.place.pipeline[self.place.stage + step]), parcel))

    def wait(self) -> None:
        for work, _ in self._waiting:
            if work is not None:
                work.wait()
        self._waiting.clear()


def _receive(place: Place, step: int, shape: tuple[int, ...], model: ShardedTransformer) -> Tensor:
    like = next(iter(model.blocks.values()))[0]
    hidden = torch.empty(shape, dtype=like.dtype, device=like.device)
    dist.recv(hidden, place.pipeline[place.stage + step])
    return hidden


# --- scoring and training ------------------------------------------------------------------------------------


def forward_backward(
    model: ShardedTransformer, micro_batches: Sequence[Batch], loss: Callable[[Tensor, Batch], Tensor]
) -> Tensor | None:
    """Gradients of the sum of the micro-batches' losses, through all stages: all forward, then all backward.

    Args:
        micro_batches: each with ``token`` int64 ``[B, T]``, ``mask`` bool ``[B, T]``, and what the loss reads. Every
            stage is given the same ones.
        loss: of the outputs ``[B, T, V]`` and a micro-batch, a number, or ``[n]`` numbers of which the first is the loss and
            the others are counted alone; the shares of a batch's mean add up where each divides by the weight of the whole
            batch.

    Returns what the losses add up to at the last stage, None at the others.
    """
    place, width, sent = model.place, model.architecture.width, _Sent(model.place)
    passed: list[tuple[Tensor | None, Tensor]] = []
    total: Tensor | None = None
    for batch in micro_batches:
        token, mask = batch["token"], batch["mask"]
        position, allowed = look(mask, model.architecture.longest)
        hidden = None
        if not place.first:
            hidden = _receive(place, -1, (*token.shape, width), model).requires_grad_()
        out = model(token if hidden is None else hidden, position, allowed)
        if place.last:
            out = loss(out, batch)
            total = out.detach() if total is None else total + out.detach()
            out = out if out.ndim == 0 else out[0]
        else:
            sent.send(out, 1)
        passed.append((hidden, out))
    for hidden, out in passed:
        out.backward(None if place.last else _receive(place, 1, tuple(out.shape), model))
        if hidden is not None:
            assert hidden.grad is not None
            sent.send(hidden.grad, -1)
    sent.wait()
    return total


@torch.no_grad()
def forward(
    model: ShardedTransformer, micro_batches: Sequence[Batch], read: Callable[[Tensor, Batch], Tensor]
) -> list[Tensor]:
    """What ``read`` makes of the outputs of each micro-batch, float32 ``[B, T]``, on every rank of a replica.

    Args:
        micro_batches: each with ``token`` int64 ``[B, T]``, ``mask`` bool ``[B, T]``, and what ``read`` reads; the same ones on
            all ranks of a replica.
        read: of the outputs ``[B, T, V]`` and a micro-batch.
    """
    place, sent = model.place, _Sent(model.place)
    found = []
    for batch in micro_batches:
        token, mask = batch["token"], batch["mask"]
        position, allowed = look(mask, model.architecture.longest)
        shape = (*token.shape, model.architecture.width)
        out = model(token if place.first else _receive(place, -1, shape, model), position, allowed)
        if place.last:
            found.append(read(out, batch).float())
        else:
            sent.send(out, 1)
            found.append(torch.empty(token.shape, device=token.device))
    if (group := model.groups[place.pipeline]) is not None and found:
        flat = torch.cat([scores.flatten() for scores in found])
        dist.broadcast(flat, place.pipeline[-1], group=group)
        parts = flat.split([scores.numel() for scores in found])
        found = [part.view_as(scores) for part, scores in zip(parts, found, strict=True)]
    sent.wait()
    return found


def token_log_prob(logits: Tensor, batch: Batch) -> Tensor:
    """``[B, T]``: log-probability of each token given those before it, zero at the first one and where masked."""
    token, mask = batch["token"], batch["mask"]
    scores = logits[:, :-1].float().log_softmax(-1).gather(-1, token[:, 1:, None]).squeeze(-1)
    found = F.pad(scores, (1, 0)) * (mask & mask.roll(1, 1))
    return torch.cat([torch.zeros_like(found[:, :1]), found[:, 1:]], 1)


def log_prob(model: ShardedTransformer, token: Tensor, mask: Tensor) -> Tensor:
    """`token_log_prob` of texts ``[B, T]``, in the layout that ``model`` has.

    In the training layout these are the log-probabilities that ratios are taken to, and what those of sampling are held
    against. All ranks of a replica give it the same tokens, and all get the answer.
    """
    return forward(model, [{"token": token, "mask": mask}], token_log_prob)[0]


# --- generating --------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: ShardedTransformer,
    prompts: Sequence[Sequence[int]],
    seeds: Tensor | Sequence[int],
    *,
    end: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    greedy: bool = False,
    micro_batches: int = 1,
) -> Generated:
    """Answer prompts, as `guerdon.policies.generation.generate` does with the whole model.

    All ranks of a replica are given the same prompts and seeds and come to the same tokens: what is drawn depends on a
    row's seed alone, and the last stage tells the others.

    Args:
        end: the token that ends an answer; none does where it is not of the vocabulary.
        micro_batches: parts of the batch that take turns, at most one a prompt.
    """
    parts = max(1, min(micro_batches, len(prompts)))
    cuts = [slice(*Share(i, parts).cut(len(prompts))) for i in range(parts)]
    sent = _Sent(model.place)
    going = [
        _answer(model, prompts[cut], seeds[cut], sent, end, max_new_tokens, temperature, greedy)
        for cut in cuts
    ]
    done: dict[int, Generated] = {}
    while len(done) < parts:
        for number, answer in enumerate(going):
            if number not in done and (generated := next(answer)) is not None:
                done[number] = generated
    sent.wait()
    if parts == 1:
        return done[0]
    longest = max(part.token.shape[1] for part in done.values())

    def join(field: str, fill: int | bool) -> Tensor:
        tensors = [getattr(done[number], field) for number in range(parts)]
        return torch.cat([F.pad(t, (0, longest - t.shape[1]), value=fill) for t in tensors])

    return Generated(join("token", end), join("log_prob", 0), join("mask", False))


def _answer(
    model: ShardedTransformer,
    prompts: Sequence[Sequence[int]],
    seeds: Tensor | Sequence[int],
    sent: _Sent,
    end: int,
    max_new_tokens: int,
    temperature: float,
    greedy: bool,
) -> Iterator[Generated | None]:
    """One micro-batch: stops (with None) wherever another may have its turn, in the end with the answers."""
    place, device = model.place, next(iter(model.blocks.values()))[0].device
    rows, longest = len(prompts), max(map(len, prompts), default=0)
    token = torch.full((rows, longest), end, device=device)
    mask = torch.zeros((rows, longest), dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        token[row, longest - len(prompt) :] = torch.as_tensor(prompt, device=device)
        mask[row, longest - len(prompt) :] = True
    token.masked_fill_(~mask, 0)  # what stands in the padding is looked up, though not looked at
    draws = None if greedy else uniform(seeds, (max_new_tokens,), device)
    cache: dict[int, tuple[Tensor, Tensor]] = {}
    answer = torch.full((rows, max_new_tokens), end, device=device)
    log_prob = torch.zeros((rows, max_new_tokens), device=device)
    alive = torch.ones(rows, dtype=torch.bool, device=device)
    said = torch.zeros((rows, max_new_tokens), dtype=torch.bool, device=device)
    new, t, group = token, 0, model.groups[place.pipeline]
    while t < max_new_tokens and bool(alive.any()):
        position, allowed = look(mask, model.architecture.longest, new.shape[1])
        x = new if place.first else _receive(place, -1, (*new.shape, model.architecture.width), model)
        out = model(x, position, allowed, cache)
        step = torch.empty(
            (2, rows), dtype=torch.float64, device=device
        )  # tokens and their log-probabilities
        if place.last:
            logits = out[:, -1].float() / temperature
            if draws is None:
                chosen = logits.argmax(-1, keepdim=True)
            else:
                chosen, _ = inverse_cdf((logits - logits.amax(-1, keepdim=True)).exp(), draws[:, t])
            step[0], step[1] = chosen.squeeze(1), logits.log_softmax(-1).gather(1, chosen).squeeze(1)
        else:
            sent.send(out, 1)
        if group is not None:
            yield None
            dist.broadcast(step, place.pipeline[-1], group=group)
        answer[:, t] = torch.where(alive, step[0].long(), end)
        log_prob[:, t] = torch.where(alive, step[1].float(), 0.0)
        said[:, t] = alive
        alive = alive & (answer[:, t] != end)
        new = answer[:, t : t + 1]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        t += 1
    yield Generated(answer[:, :t], log_prob[:, :t], said[:, :t])


# --- one model on a mesh -------------------------------------------------------------------------------------


class ModelPart:
    """One rank's part of a model on a mesh, and what the ranks of the mesh do with it together.

    Args:
        architecture, parameters: what the model is, and all its weights.
        mesh: where it is; ``rank`` is one of its ranks.
        shards: this rank's, by name. With ``trains``, an optimiser that changes ``weights`` changes them.
    """

    def __init__(
        self,
        architecture: Architecture,
        parameters: Sequence[Parameter],
        mesh: Mesh,
        groups: Groups,
        rank: int,
        shards: Mapping[str, Tensor],
        trains: bool = False,
    ) -> None:
        self.architecture, self.parameters = architecture, list(parameters)
        self.mesh, self.groups, self.place = mesh, groups, mesh.place(rank)
        self.held = mesh.holding(self.parameters, rank)
        self.weights = {name: nn.Parameter(shard, requires_grad=trains) for name, shard in shards.items()}
        self.gradients = Store.empty(self.held, next(iter(shards.values())).device) if trains else None
        blocks: Mapping[str, list[Tensor]] = {name: [weight] for name, weight in self.weights.items()}
        share = [self.place.share]
        self.model = ShardedTransformer(architecture, self.parameters, self.place, groups, blocks, share)

    @classmethod
    def alone(cls, blueprint: Blueprint, trains: bool = False) -> ModelPart:
        """The whole model in this process, which takes no torch.distributed."""
        mesh, store = Mesh(Layout(1)), blueprint.cut(Mesh(Layout(1)), 0)
        return cls(blueprint.architecture, blueprint.parameters, mesh, Groups(), 0, store.views, trains)

    @property
    def data(self) -> dist.ProcessGroup | None:
        """The ranks that have this part in other replicas."""
        return self.groups[self.place.data]

    def forward_backward(
        self, micro_batches: Sequence[Batch], loss: Callable[[Tensor, Batch], Tensor], numbers: int = 1
    ) -> Tensor:
        """Gradients of the whole batch's loss on all ranks, and that loss, from this replica's micro-batches; see
        `forward_backward`. The replicas' losses are summed: each divides by the weight of the whole batch.

        Args:
            numbers: how many the loss gives; one is returned as a number, several as ``[numbers]``.
        """
        assert self.gradients is not None
        for name, weight in self.weights.items():
            if weight.grad is None:
                self.gradients.views[name].zero_()
                weight.grad = self.gradients.views[name]
        total = forward_backward(self.model, micro_batches, loss)
        found = torch.zeros(numbers, device=self.gradients.flat.device)
        if total is not None:
            found += total.float()
        if self.data is not None:
            dist.all_reduce(found, group=self.data)
            dist.all_reduce(self.gradients.flat, group=self.data)
        if (pipeline := self.groups[self.place.pipeline]) is not None:
            dist.broadcast(found, self.place.pipeline[-1], group=pipeline)
        return found if numbers > 1 else found[0]

    def gradient_norm(self) -> Tensor:
        """The norm of the whole model's gradient, weights that several ranks hold counted once."""
        assert self.gradients is not None
        flat, split = self.gradients.flat, self.gradients.split
        total = torch.stack([flat[:split].square().sum(), flat[split:].square().sum()])
        if (tensor := self.groups[self.place.tensor]) is not None:
            mine = total[:1].clone()
            dist.all_reduce(mine, group=tensor)
            total[:1] = mine
        norm = total.sum()
        if (pipeline := self.groups[self.place.pipeline]) is not None:
            dist.all_reduce(norm, group=pipeline)
        return norm.sqrt()


# --- the actor: one model, two layouts -----------------------------------------------------------------------


class ShardedActor(ModelPart):
    """A causal language model that trains in one layout and generates in another, on the ranks of torch.distributed.

    Every rank makes one from the same model, and all ranks call its methods together.

    Args:
        model: a transformers model, the same on every rank; its weights are copied, the own shards only.
        train: the training layout, over all ranks.
        pp, tp: of generation; None as in training.
        engine: how weights get from one to the other: "hybridflow" or "vanilla", see `guerdon.engine.reshard`.

    ``weights`` are this rank's shards, for an optimiser: they are views of one flat tensor, and stay so.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Layout,
        pp: int | None = None,
        tp: int | None = None,
        engine: str = "hybridflow",
    ) -> None:
        if engine == "zero":
            raise UsageError(
                "pieces of ZeRO do not compute by themselves; use engine 'hybridflow' or 'vanilla'"
            )
        blueprint, groups, rank = Blueprint.of(model), Groups(), dist.get_rank()
        pp, tp = train.pp if pp is None else pp, train.tp if tp is None else tp
        self.engine = HybridEngine(blueprint.parameters, train, pp, tp, engine, groups)
        generation = self.engine.layout
        mesh = Mesh(train)
        groups.make([*mesh.every_group(), *generation.groups("tp"), *generation.groups("pp")])
        self.store = blueprint.cut(mesh, rank, next(model.parameters()).device)
        super().__init__(
            blueprint.architecture, blueprint.parameters, mesh, groups, rank, self.store.views, trains=True
        )
        _, _, stage, index = generation.coordinates(rank)
        tensor, pipeline = (next(g for g in generation.groups(k) if rank in g) for k in ("tp", "pp"))  # type: ignore[arg-type]
        self.generation_place = Place(stage, pp, index, tp, tensor, pipeline)

    def generation_weights(self) -> GenerationWeights:
        """The weights to generate with; close them before training goes on."""
        return self.engine.gather(self.store)

    def generator(self, weights: GenerationWeights) -> ShardedTransformer:
        """This rank's part of the model in the generation layout."""
        place, blocks, shares = self.generation_place, weights.blocks, weights.shares
        return ShardedTransformer(self.architecture, self.parameters, place, self.groups, blocks, shares)

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Tensor, fill: int = 0, **options: Any
    ) -> Generated:
        """Answer a batch of prompts: each replica its share, after which every rank has those of its training replica.

        Args:
            prompts, seeds: of the whole batch, the same on all ranks.
            fill: the token that shorter answers are filled up with.
            options: of `generate`.
        """
        rows = self.engine.rows(len(prompts))
        with self.generation_weights() as weights:
            own = generate(self.generator(weights), prompts[rows], seeds[rows], **options)
        count = len(prompts)
        return Generated(
            self.engine.gather_rows(own.token, count, fill),
            self.engine.gather_rows(own.log_prob, count),
            self.engine.gather_rows(own.mask, count),
        )

    def close(self) -> None:
        """Give the process groups back; the world's stays."""
        self.groups.close()

    def state(self) -> dict[str, Tensor]:
        """The whole model's weights, on every rank."""
        everywhere = Mesh(Layout(dp=dist.get_world_size()))
        move = Reallocation(self.parameters, self.mesh, everywhere, groups=self.groups)
        return move.run(self.store.views, device=self.store.flat.device)
