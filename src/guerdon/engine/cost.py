"""What a call on a language model costs on a cluster: seconds and bytes a GPU, from closed formulas.

The formulas are those of the planners of HybridFlow (Sheng et al. 2024) and ReaLHF (Mei et al. 2024): a layer's time from
its operations, the weights it reads and its all-reduces; a pipeline's from its stages and micro-batches. Computing and
communicating are added up, never overlapped, for every plan alike. Nothing here was measured on a GPU: it ranks plans and
promises no seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from guerdon.engine.cluster import ClusterSpec
from guerdon.engine.protocols import Layout
from guerdon.engine.reshard import formula
from guerdon.engine.shapes import GiB, ModelShape, Workload, brief, layouts_of
from guerdon.errors import UsageError

__all__ = ["Call", "CostModel", "GiB", "ModelShape", "Workload", "brief", "layouts_of"]


@dataclass(frozen=True)
class Call:
    """What a call costs: ``seconds``, ``active`` bytes a GPU beside what is resident, how often a replica's share was cut."""

    seconds: float
    active: float
    parts: int = 1


class CostModel:
    """Seconds and bytes of calls on ``cluster``.

    Args:
        cluster: rates and bandwidths.
        weight_bytes, grad_bytes, optimiser_bytes: bytes a weight while training in bf16 with Adam: weights and gradients in
            16 bits; a 32-bit copy and two moments, shared by the replicas (ZeRO stage 1).
        activation_bytes: bytes a feature of what ranks send to one another.
        checkpointing: whether training keeps only each layer's input and computes the layer again in the backward pass.
    """

    def __init__(
        self,
        cluster: ClusterSpec,
        weight_bytes: float = 2,
        grad_bytes: float = 2,
        optimiser_bytes: float = 12,
        checkpointing: bool = True,
        activation_bytes: float = 2,
    ) -> None:
        self.cluster = cluster
        self.weight_bytes = weight_bytes
        self.grad_bytes = grad_bytes
        self.optimiser_bytes = optimiser_bytes
        self.checkpointing = checkpointing
        self.activation_bytes = activation_bytes

    # --- memory, bytes a GPU ----------------------------------------------------------------------------

    def model_bytes(self, shape: ModelShape) -> int:
        """All weights of a model."""
        return int(self.weight_bytes * shape.parameters)

    def weights(self, shape: ModelShape, layout: Layout) -> float:
        """The weights of one shard."""
        return self.weight_bytes * shape.parameters / (layout.pp * layout.tp)

    def resident(self, shape: ModelShape, layout: Layout, trains: bool) -> float:
        """What a model holds all the time: its weights; with training, gradients and this replica's optimiser states."""
        if not trains:
            return self.weights(shape, layout)
        shard = shape.parameters / (layout.pp * layout.tp)
        return shard * (self.weight_bytes + self.grad_bytes) + shard * self.optimiser_bytes / layout.dp

    def total(self, shape: ModelShape, trains: bool) -> float:
        """The least that a model holds on all GPUs together: every weight, gradient and optimiser state once."""
        return shape.parameters * (self.weight_bytes + trains * (self.grad_bytes + self.optimiser_bytes))

    def layer_activations(self, shape: ModelShape, tokens: float, tp: int) -> float:
        """Everything that one layer computes for ``tokens``: h (10 + 24 / tp) bytes a token (Korthikanti et al. 2022,
        equation 2, without the scores of attention, which fused kernels never store)."""
        return tokens * shape.hidden * (10 + 24 / tp)

    def activations(
        self, shape: ModelShape, layout: Layout, tokens: float, in_flight: int, trains: bool
    ) -> float:
        """Activations for micro-batches of ``tokens``, of which a stage holds ``in_flight`` at once: the inputs of its layers
        while training, one layer's inside, and the output layer's logits in 16 bits with what is computed from them in 32."""
        logits = 0.0 if shape.scalar else 6.0 * tokens * shape.vocabulary / layout.tp
        inside = self.layer_activations(shape, tokens, layout.tp)
        if not trains:
            return inside + logits
        layers = shape.layers / layout.pp
        kept = 2.0 * tokens * shape.hidden * layers if self.checkpointing else inside * layers
        return in_flight * kept + inside + logits

    def kv_cache(self, shape: ModelShape, layout: Layout, tokens: float) -> float:
        """Keys and values of ``tokens``, in 16 bits; a head is not split over GPUs."""
        shards = layout.pp * min(layout.tp, shape.kv_heads)
        return 4.0 * tokens * shape.kv_width * shape.layers / shards

    # --- one layer, one stage ---------------------------------------------------------------------------

    def matmul(self, parameters: float, tokens: float) -> float:
        """Seconds to multiply ``tokens`` with a matrix of ``parameters`` in 16 bits: the slower of computing and reading it."""
        return max(
            2 * parameters * tokens / self.cluster.flops, 2 * parameters / self.cluster.memory_bandwidth
        )

    def layer_forward(
        self, shape: ModelShape, tokens: float, context: float, tp: int, times: int = 1
    ) -> float:
        """One layer on ``tokens`` that belong to sequences of ``context`` tokens, its arithmetic done ``times`` times (2 for a
        backward pass): matrices, causal attention (2 tokens context width), two all-reduces of the residual stream, launch."""
        reduce = self.cluster.all_reduce(self.activation_bytes * tokens * shape.hidden, tp)
        return self.layer_compute(shape, tokens, context, tp, times) + 2 * reduce

    def layer_compute(
        self, shape: ModelShape, tokens: float, context: float, tp: int, times: int = 1
    ) -> float:
        """One layer without its communication."""
        attention = 2 * tokens * context * shape.attention_width / tp / self.cluster.flops
        compute = self.matmul(shape.layer_parameters / tp, tokens) + attention
        return times * (compute + self.cluster.launch_us * 1e-6)

    def ends_compute(self, shape: ModelShape, tokens: float, tp: int, times: int = 1) -> float:
        """Embedding and output layer together, without communication; the embedding looks up and costs nothing here."""
        return times * self.matmul(shape.head_parameters / tp, tokens)

    def stage_forward(
        self, shape: ModelShape, layout: Layout, tokens: float, context: float, times: int = 1
    ) -> float:
        """One stage of the pipeline on a micro-batch of ``tokens``; embedding and output layer count evenly for all stages."""
        ends = self.ends_compute(shape, tokens, layout.tp, times)
        layers = shape.layers * self.layer_forward(shape, tokens, context, layout.tp, times)
        return (layers + ends) / layout.pp + self._hop(shape, layout, tokens)

    def _hop(self, shape: ModelShape, layout: Layout, tokens: float) -> float:
        """Sending a micro-batch to the next stage, over the slowest link of the pipeline: each tensor shard sends its part of
        2 h tokens bytes (in 16 bits)."""
        if layout.pp == 1:
            return 0.0
        rate = self.cluster.bandwidth(layout.pp, layout.tp * layout.dp)
        return (
            self.activation_bytes * shape.hidden * tokens / layout.tp / rate
            + self.cluster.collective_us * 1e-6
        )

    def layer_decode(self, shape: ModelShape, sequences: float, context: float, tp: int) -> float:
        """One token more for each of ``sequences``: weights read (or operations, if slower), keys and values read, two small
        all-reduces, launch."""
        reduce = self.cluster.all_reduce(self.activation_bytes * sequences * shape.hidden, tp, small=True)
        return self.decode_compute(shape, sequences, context, tp) + 2 * reduce

    def decode_compute(self, shape: ModelShape, sequences: float, context: float, tp: int) -> float:
        """The same without communication."""
        read = self.matmul(shape.layer_parameters / tp, sequences)
        cache = (
            4 * sequences * context * shape.kv_width / min(tp, shape.kv_heads) / self.cluster.memory_bandwidth
        )
        return read + cache + self.cluster.decode_launch_us * 1e-6

    def decode_ends(self, shape: ModelShape, sequences: float, tp: int) -> float:
        """Embedding and output layer on one token more for each of ``sequences``, without communication."""
        return self.ends_compute(shape, sequences, tp)

    def stage_decode(self, shape: ModelShape, layout: Layout, sequences: float, context: float) -> float:
        """One stage of the pipeline on one token more for each of ``sequences``."""
        layers = shape.layers * self.layer_decode(shape, sequences, context, layout.tp)
        ends = self.decode_ends(shape, sequences, layout.tp)
        return (layers + ends) / layout.pp + self._hop(shape, layout, sequences)

    # --- calls ------------------------------------------------------------------------------------------

    def infer(self, shape: ModelShape, layout: Layout, work: Workload, free: float = math.inf) -> Call | None:
        """One forward pass over the batch, in as many micro-batches as are fastest within ``free`` bytes; None: none fits."""
        ways = (
            self.inference(shape, layout, work, parts)
            for parts in _parts(_share(work.batch, layout), layout.pp)
        )
        return _fastest(ways, free)

    def inference(self, shape: ModelShape, layout: Layout, work: Workload, parts: int) -> Call:
        """One forward pass over the batch in ``parts`` micro-batches."""
        tokens = math.ceil(_share(work.batch, layout) / parts) * work.length
        active = self.activations(shape, layout, tokens, 1, trains=False)
        seconds = (layout.pp + parts - 1) * self.stage_forward(shape, layout, tokens, work.length)
        return Call(seconds, active, parts)

    def train(self, shape: ModelShape, layout: Layout, work: Workload, free: float = math.inf) -> Call | None:
        """All updates of an iteration, in as many micro-batches as are fastest within ``free`` bytes; None where a replica has
        no sequence of a minibatch or nothing fits."""
        if work.minibatch < layout.dp:
            return None
        ways = (
            self.training(shape, layout, work, parts)
            for parts in _parts(_share(work.minibatch, layout), layout.pp)
        )
        return _fastest(ways, free)

    def training(self, shape: ModelShape, layout: Layout, work: Workload, parts: int) -> Call:
        """All updates of an iteration, each minibatch in ``parts`` micro-batches.

        (forward + backward + forward again with checkpointing) x (pp + m - 1) for m micro-batches, then the all-reduce of the
        gradients over replicas and one pass of the optimiser; times minibatches and epochs.
        """
        tokens = math.ceil(_share(work.minibatch, layout) / parts) * work.length
        active = self.activations(shape, layout, tokens, min(parts, layout.pp), trains=True)
        forward = self.stage_forward(shape, layout, tokens, work.length)
        backward = self.stage_forward(shape, layout, tokens, work.length, times=2)
        passes = forward * (2 if self.checkpointing else 1) + backward
        fixed = self.synchronise(shape, layout) + self.optimise(shape, layout)
        seconds = work.epochs * work.minibatches * (passes * (layout.pp + parts - 1) + fixed)
        return Call(seconds, active, parts)

    def synchronise(self, shape: ModelShape, layout: Layout) -> float:
        """The all-reduce of a shard's gradients over its replicas."""
        bytes_ = self.grad_bytes * shape.parameters / (layout.tp * layout.pp)
        return self.cluster.all_reduce(bytes_, layout.dp, layout.tp)

    def optimise(self, shape: ModelShape, layout: Layout) -> float:
        """One pass of the optimiser over this GPU's share of weights, gradients and states."""
        bytes_ = self.weight_bytes + self.grad_bytes + self.optimiser_bytes
        return bytes_ * shape.parameters / layout.world_size / self.cluster.memory_bandwidth

    def generate(
        self, shape: ModelShape, layout: Layout, work: Workload, free: float = math.inf
    ) -> Call | None:
        """Answers to the batch, by ``layout.dp`` replicas, in waves as large as their keys and values fit ``free`` bytes;
        None: not one sequence fits."""
        share = _share(work.batch, layout)
        one = self.kv_cache(shape, layout, work.length)
        chunk = max(1, _PREFILL // work.prompt)  # sequences prefilled at once
        waves, last = 1, 0
        while waves != last:  # a smaller wave may need a smaller buffer for its prefill
            last = waves
            wave = math.ceil(share / waves)
            inside = self.activations(shape, layout, min(chunk, wave) * work.prompt, 1, trains=False)
            fitting = math.inf if free == math.inf else math.floor((free - inside) / one)
            if fitting < 1:
                if wave == 1:
                    return None
                fitting = wave // 2
            waves = max(waves, math.ceil(share / fitting))
        return self.generation(shape, layout, work, waves)

    def generation(self, shape: ModelShape, layout: Layout, work: Workload, waves: int) -> Call:
        """Answers to the batch in ``waves``: each a prefill and ``response - 1`` decoding steps at the mean context (times are
        linear in it)."""
        chunk = max(1, _PREFILL // work.prompt)
        wave = math.ceil(_share(work.batch, layout) / waves)
        active = self.activations(shape, layout, min(chunk, wave) * work.prompt, 1, trains=False)
        active += wave * self.kv_cache(shape, layout, work.length)
        parts = min(layout.pp, wave)  # micro-batches that fill the pipeline
        each = math.ceil(wave / parts)
        pieces = math.ceil(each / chunk)
        prompts = math.ceil(each / pieces) * work.prompt
        prefill = (layout.pp + parts * pieces - 1) * self.stage_forward(shape, layout, prompts, work.prompt)
        step = max(parts, layout.pp) * self.stage_decode(shape, layout, each, work.prompt + work.response / 2)
        return Call(waves * (prefill + step * (work.response - 1)), active, waves)

    def ways(
        self,
        kind: str,
        shape: ModelShape,
        layout: Layout,
        work: Workload,
        only: int | None = None,
    ) -> list[Call]:
        """Every number of micro-batches (of waves, where ``kind`` is "generate") worth having for a call that "train"s, is an
        "inference" or "generate"s: the fastest first, each further one slower and smaller. Empty: a replica would have nothing
        to do.

        ``only``: this number of parts and no other.
        """
        sequences = work.minibatch if kind == "train" else work.batch
        share = _share(sequences, layout)
        if sequences < layout.dp:
            return []
        parts = _waves(share) if kind == "generate" else _parts(share, layout.pp)
        call = {"generate": self.generation, "train": self.training, "inference": self.inference}[kind]
        found = [call(shape, layout, work, m) for m in (parts if only is None else [only]) if m <= share]
        kept: list[Call] = []
        for way in sorted(found, key=lambda c: (c.seconds, c.active)):
            if not kept or way.active < kept[-1].active:
                kept.append(way)
        return kept

    def to_generation(
        self, shape: ModelShape, train: Layout, generate: Layout, engine: str = "hybridflow"
    ) -> float:
        """Seconds to move weights from the training to the generation layout of the same GPUs, by one of the engines of
        `guerdon.engine.reshard`. Raises `UsageError` for layouts that do not nest."""
        _nested(train, generate)
        received = float(formula(engine, self.model_bytes(shape), train, generate.pp, generate.tp).received)
        if received == 0:
            return 0.0
        cluster = self.cluster
        if engine == "zero":
            rate = cluster.bandwidth(train.world_size)
        else:
            shards, stages = train.tp // generate.tp, train.pp // generate.pp
            if engine == "vanilla":
                shards, stages = train.tp, train.pp
            if stages == 1 or train.world_size <= cluster.gpus_per_node:
                rate = cluster.bandwidth(shards)
            else:
                near = max(1, cluster.gpus_per_node // (train.tp * train.dp))  # stages in one node
                rate = cluster.between_nodes(shards * min(stages, near))
        return received / rate + cluster.collective_us * 1e-6

    def reallocate(
        self, shape: ModelShape, source: Layout, target: Layout, same_gpus: bool, across_nodes: bool
    ) -> float:
        """Seconds to move weights to ``target`` on any GPUs: a target shard over the bandwidth, and a start; 0 for the same
        layout on the same GPUs (Mei et al. 2024)."""
        if same_gpus and source == target:
            return 0.0
        rate = (self.cluster.inter_node_gb_s if across_nodes else self.cluster.intra_node_gb_s) * 1e9
        return self.weights(shape, target) / rate + self.cluster.reallocation_ms * 1e-3

    def load(self, shape: ModelShape, layout: Layout) -> float:
        """Seconds to bring the weights of a shard back from the host's memory, where a copy always stays."""
        return self.weights(shape, layout) / (self.cluster.host_gb_s * 1e9)

    # --- ZeRO stage 3, for comparison with DeepSpeed-Chat -----------------------------------------------

    def zero3_resident(self, shape: ModelShape, gpus: int, trains: bool) -> float:
        """Bytes a GPU where weights, gradients and optimiser states are shared by all GPUs."""
        return self.total(shape, trains) / gpus

    def _zero3_gather(self, shape: ModelShape, gpus: int) -> float:
        """Gathering every layer's weights once, layer by layer (a reduce-scatter of the gradients takes as long)."""
        outside = shape.parameters - shape.layers * shape.layer_parameters
        one = self.cluster.all_gather(self.weight_bytes * shape.layer_parameters, gpus)
        return shape.layers * one + self.cluster.all_gather(self.weight_bytes * outside, gpus)

    def zero3(self, shape: ModelShape, gpus: int, work: Workload, free: float, trains: bool) -> Call | None:
        """A forward pass over the batch, or all updates of an iteration, with ZeRO stage 3 on ``gpus`` replicas; None: nothing
        fits. Each micro-batch gathers the weights of each layer (training: again for the backward pass, which computes the
        layer anew with them, and scatters the gradients)."""
        alone, sequences = Layout(gpus), work.minibatch if trains else work.batch
        share = math.ceil(sequences / gpus)
        buffer = (
            2 * self.weight_bytes * max(shape.layer_parameters, shape.hidden * shape.vocabulary)
        )  # this layer and the next
        best: Call | None = None
        for parts in _parts(share, 1):
            tokens = math.ceil(share / parts) * work.length
            active = buffer + self.activations(shape, alone, tokens, 1, trains)
            if active > free:
                continue
            passes = self.stage_forward(shape, alone, tokens, work.length)
            if trains:
                passes *= 2 if self.checkpointing else 1
                passes += self.stage_forward(shape, alone, tokens, work.length, times=2)
            seconds = parts * (passes + (3 if trains else 1) * self._zero3_gather(shape, gpus))
            if trains:
                seconds = work.epochs * work.minibatches * (seconds + self.optimise(shape, alone))
            if best is None or seconds < best.seconds:
                best = Call(seconds, active, parts)
        return best


def _nested(train: Layout, generate: Layout) -> None:
    if train.pp % generate.pp or train.tp % generate.tp or train.world_size != generate.world_size:
        raise UsageError(
            f"generation with {brief(generate)} does not fit training with {brief(train)}: pp and tp must divide the "
            "trainer's, on as many GPUs"
        )


_PREFILL = 16384  # tokens a replica prefills at once; more would only take memory


def _parts(share: int, pp: int) -> list[int]:
    """Numbers of micro-batches worth trying for ``share`` sequences: powers of two, from one for each stage."""
    found, parts = [], min(share, pp)
    while parts < share:
        found.append(parts)
        parts *= 2
    return [*found, share]


def _waves(share: int) -> list[int]:
    """Numbers of waves worth trying for ``share`` sequences: 1, 2, 3, 4, 6, 8, 12, ... and one sequence at a time."""
    found = {w for i in range(share.bit_length()) for w in (2**i, 3 * 2**i) if w < share}
    return sorted(found | {share})


def _share(sequences: int, layout: Layout) -> int:
    """The most sequences that one replica gets."""
    return math.ceil(sequences / layout.dp)


def _fastest(ways: Iterable[Call], free: float) -> Call | None:
    return min((way for way in ways if way.active <= free), key=lambda way: way.seconds, default=None)
