"""ReaLHF: weights moved between layouts, PPO under plans that differ, an estimator held against a clock, and the search.

The first two parts are measured here: real processes, real tensors, small models. The third is simulated: seconds of clusters
of 16 to 64 H100 by the formulas of `guerdon.engine.cost`. No throughput of a system is measured or claimed.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from guerdon.engine import parallel
from guerdon.engine.cluster import ClusterSpec
from guerdon.engine.estimate import Estimator
from guerdon.engine.graph import DataflowGraph
from guerdon.engine.meshes import DeviceMesh, ExecutionPlan
from guerdon.engine.plan import BASELINES, baseline, exhaustive, search
from guerdon.engine.pools import ResourcePool
from guerdon.engine.ppo_calls import PPOCalls
from guerdon.engine.profile import LayerProfile, ProfiledCost
from guerdon.engine.protocols import Layout
from guerdon.engine.reallocation import Reallocation, received
from guerdon.engine.runtime import Done, Runtime
from guerdon.engine.shapes import ModelShape, Workload
from guerdon.engine.sharded import Blueprint
from guerdon.engine.shards import Groups, Mesh, take
from guerdon.engine.simulate import timeline
from guerdon.engine.workers import Worker, WorkerGroup, register
from guerdon.reproductions.runner import Check, Results

TITLE = "ReaLHF: an execution plan for every call, weights moved in between (Mei et al., 2024)"
CLAIM = (
    "Weights go from any layout to any other bit for bit with the bytes foretold; PPO's numbers do not depend on the plan; an "
    "estimator made of profiled layers ranks plans as a clock does (measured on two cores); a random walk over plans beats the "
    "best symmetric plan and a heuristic one (simulated clusters)."
)
SEEDS = 3
# Fixed before the seeds that count were run.
THRESHOLDS = {
    "measured: weights that are not bit for bit those moved": 0.0,
    "measured: ranks whose bytes differ from the plan's": 0.0,
    "measured: slices that a rank sends to itself": 0.0,
    "measured: largest difference of weights between plans, 3 PPO steps": 1e-4,
    "measured: rank correlation of estimated and measured seconds, 6 plans": 0.7,
    "measured: mean relative error of estimated seconds, 6 plans": 0.4,
    "simulated: searched over exhaustive optimum, tiny space, most": 1.0 + 1e-9,
    "simulated: searched over best symmetric plan, most": 1.02,
    "simulated: best symmetric plan over searched, mean": 1.05,
    "simulated: heuristic over searched, least": 1.3,
    "simulated: heuristic over searched, mean": 1.3,
    "simulated: largest over smallest searched plan among seeds": 1.05,
    "simulated: cost of the greedy start over searched, least": 1.0,
}
NOTES = (
    "Thresholds stood before any run; seeds from 100 on served to see that the programs work, how long they take, and for "
    "the choices named here. Measured, layouts: a GPT-2-like model of width 64 with four layers (four stages need four) "
    "goes between all 36 ordered pairs of layouts on four processes over gloo; the bytes that each rank receives are "
    "compared with the plan's. PPO: two layers, 16 prompts of unequal lengths, four minibatches, three iterations; plan "
    "'mixed' generates with tp2 dp2, trains the actor with pp2 dp2 and the critic with tp4, and judges on half of the "
    "ranks; 'apart' puts calls on different ranks in different layouts. Measured, clock: 4 layers of width 256, 16 "
    "prompts of 32 tokens, answers of 32, two minibatches, 32-bit numbers, two processes over gloo with a thread each. "
    "Micro-batches follow the rule of the published code. Plans take turns; the median of three iterations counts, after "
    "one to warm up. Layers are timed in one process, before and after the runs, and so is the start of a collective: its "
    "mean between small computations, because the median of all-reduces back to back is about a third of what a program "
    "waits for one (with that, tensor parallel generation came out three times too fast). The searched plan is run too "
    "and not judged. This part is about two free cores. On the seeds from 100 on other programs were at work: while they "
    "took 0.4 cores the ranks correlated by 0.83 with an error of 0.18, with 0.7 to 0.8 cores by 0.71 to 0.77 and 0.16 to "
    "0.25, with 1.0 by 0.71 and 0.42, and with most of both cores taken by -0.4 to 0.2, because a plan on one process is "
    "then as fast as one on two. The table says how much others took. Simulated: H100 with 170 GB/s inside a machine and "
    "20 GB/s for each group that leaves it, batch 512, prompts and answers of 1024 tokens, four minibatches. All plans, "
    "the heuristic one too, choose their micro-batches by the same formulas. That helps the heuristic: with a 70B actor "
    "on 64 GPUs the searched plan was 1.22 times as fast (1.67, 1.43 and 1.40 in the other settings), so the check that "
    "asks 1.3 of every setting fails there; the mean is judged beside it. The tiny space are 7B models on 8 GPUs, which "
    "these formulas fit without offloading: each call's six fastest places, 46,656 plans, of which the greedy one does "
    "not fit. No throughput of a system was measured."
)

# --- weights from layout to layout, and PPO under three plans (measured) ---------------------------------------

LAYOUTS = [  # (pp, tp, dp)
    Layout(pp=pp, tp=tp, dp=dp)
    for pp, tp, dp in [(1, 1, 4), (1, 2, 2), (2, 1, 2), (2, 2, 1), (1, 4, 1), (4, 1, 1)]
]
ALL = (0, 1, 2, 3)
STEPS = 3


class Mover(Worker):
    """A rank that takes part in reallocations."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        parallel.join(self.master_address, self.master_port, self.rank, self.world_size)
        self.groups = Groups()

    @register("one_to_all")
    def moves(self, seed: int) -> list[dict[str, int]]:
        """Every ordered pair of layouts: weights that came out wrong, bytes received and foretold, slices sent to oneself."""
        blueprint = Blueprint.gpt(4, 64, 4, 128, 32, seed=seed)  # four layers, for four stages
        parameters = blueprint.parameters
        found = []
        for old, new in product(LAYOUTS, LAYOUTS):
            source, target = Mesh(old), Mesh(new)
            store = blueprint.cut(source, self.rank)
            move = Reallocation(parameters, source, target, ranks_per_node=2, groups=self.groups)
            made = move.run(store.views)
            wanted = target.holding(parameters, self.rank)
            wrong = len(made.keys() ^ wanted.keys())
            for name, (parameter, share) in wanted.items():
                wrong += not torch.equal(made[name], take(blueprint.weights(parameter), parameter, share))
            own = sum(m.sender in m.receivers for m in move.plan)
            foretold = received(move.plan, self.rank)
            found.append({"wrong": wrong, "received": move.received, "foretold": foretold, "own": own})
        return found


def _tiny(outputs: int | None, seed: int) -> Blueprint:
    return Blueprint.gpt(2, 64, 4, 128, 64, outputs, seed, scale=0.1)


def _prompt(seed: int, row: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + row)
    length = int(torch.randint(2, 12, (1,), generator=generator))
    return {"prompt": torch.randint(1, 128, (length,), generator=generator)}


def plans_of_four() -> dict[str, dict[str, Mesh]]:
    """Plans for four ranks, as different as they can be."""
    same = {call.name: Mesh(Layout(dp=4), ALL) for call in PPOCalls().graph().calls}
    mixed = {
        "actor_gen": Mesh(Layout(dp=2, tp=2), ALL),
        "actor_train": Mesh(Layout(dp=2, pp=2), ALL),
        "critic_train": Mesh(Layout(dp=1, tp=4), ALL),
        "rew_inf": Mesh(Layout(dp=2), (0, 1)),
    }
    apart = {
        "actor_gen": Mesh(Layout(dp=1, pp=2), (0, 1)),
        "rew_inf": Mesh(Layout(dp=1, tp=2), (2, 3)),
        "ref_inf": Mesh(Layout(dp=1), (3,)),
        "critic_inf": Mesh(Layout(dp=2, tp=2), ALL),
        "actor_train": Mesh(Layout(dp=1, pp=2, tp=2), ALL),
        "critic_train": Mesh(Layout(dp=2), (1, 2)),
    }
    return {"dp4": same, "mixed": same | mixed, "apart": apart}


def correctness(seed: int, folder: Path) -> dict[str, Any]:
    """Reallocations, and how far weights are apart after three steps of PPO under different plans."""
    with WorkerGroup(ResourcePool([4]), Mover, backend="process", name="movers") as group:
        ranks = group.call("moves", seed)
    found: dict[str, Any] = {
        "moves": len(ranks[0]),
        "wrong": sum(move["wrong"] for rank in ranks for move in rank),
        "differ": sum(move["received"] != move["foretold"] for rank in ranks for move in rank),
        "own": sum(move["own"] for move in ranks[0]),
        "bytes": sum(move["received"] for rank in ranks for move in rank),
    }
    from safetensors.torch import load_file

    calls = PPOCalls(seed=seed)
    models = {
        "actor": partial(_tiny, None, 4 * seed),
        "reference": partial(_tiny, None, 4 * seed),
        "critic": partial(_tiny, 1, 4 * seed + 1),
        "reward": partial(_tiny, 1, 4 * seed + 2),
    }
    weights: dict[str, dict[str, Tensor]] = {}
    losses: dict[str, list[float]] = {}
    for name, plan in plans_of_four().items():
        with Runtime(calls.graph(), plan, models, calls, partial(_prompt, seed), 16) as runtime:
            done = runtime.run(STEPS)
            for role in ("actor", "critic"):
                path = folder / name / f"{role}.safetensors"
                runtime.save(role, str(path))
                weights.setdefault(name, {}).update({f"{role}.{k}": v for k, v in load_file(path).items()})
        told = sorted((d.call, d.iteration, d.metrics["loss"]) for d in done if d.call.endswith("train"))
        losses[name] = [loss for *_, loss in told]
    first = weights["dp4"]
    untrained = {
        f"{role}.{p.name}": blueprint.weights(p)
        for role in ("actor", "critic")
        for blueprint in [models[role]()]
        for p in blueprint.parameters
    }
    others = [name for name in weights if name != "dp4"]
    return {
        **found,
        "apart": {name: _apart(first, weights[name]) for name in others},
        "losses": {
            name: max(abs(a - b) for a, b in zip(losses["dp4"], losses[name], strict=True)) for name in others
        },
        "moved": _apart(first, untrained),
    }


def _apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# --- the estimator and a clock (measured) ----------------------------------------------------------------------

LAYERS, WIDTH, HEADS, VOCABULARY = 4, 256, 4, 256
ROWS, PROMPT, ANSWER = 16, 32, 32
REPEATS = 3


def _small(outputs: int | None, seed: int) -> Blueprint:
    return Blueprint.gpt(LAYERS, WIDTH, HEADS, VOCABULARY, PROMPT + ANSWER, outputs, seed)


def _text(seed: int, row: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + row)
    return {"prompt": torch.randint(VOCABULARY, (PROMPT,), generator=generator)}


def plans_of_two() -> dict[str, ExecutionPlan]:
    """Six plans for two processes. A pass has as many micro-batches as stages, training with stages twice as many; all answers
    are generated at once (the rule of the published code)."""
    names = [call.name for call in PPOCalls().graph().calls]
    both, first, second = DeviceMesh(0, 1, 0, 2), DeviceMesh(0, 1, 0, 1), DeviceMesh(0, 1, 1, 1)
    dp, tp, pp, one = Layout(2), Layout(1, 1, 2), Layout(1, 2, 1), Layout(1)
    split = {name: (second if name.startswith(("critic", "rew")) else first, one) for name in names}
    mixed = {
        "actor_gen": (both, dp),
        "rew_inf": (first, one),
        "ref_inf": (second, one),
        "critic_inf": (both, dp),
        "actor_train": (both, tp),
        "critic_train": (both, pp),
    }
    places = {
        "dp2": dict.fromkeys(names, (both, dp)),
        "tp2": dict.fromkeys(names, (both, tp)),
        "pp2": dict.fromkeys(names, (both, pp)),
        "actor on 0, critic on 1": split,
        "mixed": mixed,
        "all on 0": dict.fromkeys(names, (first, one)),
    }

    def parts(name: str, layout: Layout) -> int:
        if name.endswith("gen"):
            return 1
        return 2 * layout.pp if name.endswith("train") and layout.pp > 1 else layout.pp

    return {
        plan: ExecutionPlan(1, 2, at, {name: parts(name, layout) for name, (_, layout) in at.items()})
        for plan, at in places.items()
    }


class Profiler(Worker):
    """A process with one thread that times layers."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    @register("one_to_all")
    def profile(self, outputs: int | None) -> LayerProfile:
        """Of the small model."""
        batches, lengths = (1, 2, 4, 8, 16), (PROMPT, PROMPT + ANSWER)
        return LayerProfile.measure(_small(outputs, 0), (1, 2), batches, lengths)


class Talker(Worker):
    """One of two processes that compute and talk in turns, as shards of a layer do."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        parallel.join(self.master_address, self.master_port, self.rank, self.world_size)

    @register("one_to_all")
    def start(self, count: int = 200) -> float:
        """Seconds of a small all-reduce between small computations, on average: its start, and waking up for it."""
        small, square = torch.zeros(64), torch.randn(64, 64)
        seconds = 0.0
        for _ in range(count):
            for _ in range(20):
                square @ square
            begin = time.perf_counter()
            dist.all_reduce(small)
            seconds += time.perf_counter() - begin
        return seconds / count


def sounding() -> tuple[ClusterSpec, list[LayerProfile]]:
    """What two processes can do on this machine at the moment, and what layers take in one."""
    with WorkerGroup(ResourcePool([1]), Profiler, backend="process", name="profiler") as group:
        profiles = [group.call("profile", outputs)[0] for outputs in (None, 1)]
    with WorkerGroup(ResourcePool([2]), Talker, backend="process", name="talkers") as group:
        start = 1e6 * float(np.mean(group.call("start")))
    return replace(ClusterSpec.measure(2), collective_us=start, small_collective_us=start), profiles


def mean_of(
    soundings: Sequence[tuple[ClusterSpec, list[LayerProfile]]],
) -> tuple[ClusterSpec, list[LayerProfile]]:
    """Of soundings taken at different times, for the machine may have other work to do too."""

    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    clusters = [cluster for cluster, _ in soundings]
    start = mean(c.collective_us for c in clusters)
    cluster = replace(
        clusters[0],
        collective_us=start,
        small_collective_us=start,
        intra_node_gb_s=mean(c.intra_node_gb_s for c in clusters),
        reallocation_ms=mean(c.reallocation_ms for c in clusters),
    )
    profiles = []
    for same in zip(*(profiles for _, profiles in soundings), strict=True):
        points = [
            replace(at[0], seconds=mean(p.seconds for p in at))
            for at in zip(*(p.points for p in same), strict=True)
        ]
        optimiser = mean(p.optimiser for p in same)
        profiles.append(replace(same[0], points=tuple(points), optimiser=optimiser))
    return cluster, profiles


def estimator_of_two(
    found: tuple[ClusterSpec, list[LayerProfile]], calls: PPOCalls, plan: ExecutionPlan | None = None
) -> Estimator:
    """What the soundings promise; with the micro-batches of a plan, if one is given, and no others."""
    cluster, profiles = found
    costs = ProfiledCost(
        cluster,
        profiles,
        sharded_optimiser=False,
        weight_bytes=4,
        grad_bytes=4,
        optimiser_bytes=8,
        checkpointing=False,
        activation_bytes=4,
    )
    graph = calls.graph()
    if plan is not None:
        graph = DataflowGraph([replace(c, micro_batches=plan.micro_batches[c.name]) for c in graph.calls])
    actor, judge = _small(None, 0).shape("actor"), _small(1, 0).shape("judge")
    shapes = {"actor": actor, "reference": actor, "critic": judge, "reward": judge}
    workload = Workload(ROWS, PROMPT, ANSWER, calls.minibatches)
    return Estimator(graph, shapes, cluster, workload, costs, least=1, iterations=1)


def clock(seed: int, folder: Path, repeats: int = REPEATS) -> dict[str, Any]:
    """Estimated and measured seconds of an iteration, plan by plan and call by call; also of the plan that the search finds."""
    calls = PPOCalls(end=-1, max_new_tokens=ANSWER, minibatches=2, seed=seed)
    soundings = [sounding()]
    plans = plans_of_two()
    plans["searched"] = search(estimator_of_two(soundings[0], calls), seed=seed, evaluations=5000).plan
    models = {
        role: partial(_small, None if role in ("actor", "reference") else 1, seed)
        for role in ("actor", "reference", "critic", "reward")
    }
    runs: dict[str, list[list[Done]]] = {name: [] for name in plans}
    with ExitStack() as open_:
        runtimes = {}
        for name, plan in plans.items():
            made = Runtime(calls.graph(), plan, models, calls, partial(_text, seed), ROWS)
            runtimes[name] = open_.enter_context(made)
            made.run(1)  # processes meet, memory is found
        pids = [place.pid for runtime in runtimes.values() for place in runtime.group.places]
        began, busy = time.perf_counter(), _cores_busy(pids)
        for _, (name, runtime) in product(range(repeats), runtimes.items()):  # they take turns
            runs[name].append(runtime.run(1))
        others = (_cores_busy(pids) - busy) / (time.perf_counter() - began)
    soundings.append(sounding())
    found: dict[str, Any] = {}
    for name, plan in plans.items():
        told = timeline(estimator_of_two(mean_of(soundings), calls, plan), plan)
        found[name] = {
            "estimated": told.total,
            "measured": statistics.median(map(_seconds, runs[name])),
            "calls": {
                call.name: {
                    "estimated": sum(r.end - r.start for r in told.rows if r.call == call.name),
                    "measured": statistics.median(
                        d.end - d.start for run in runs[name] for d in run if d.call == call.name
                    ),
                }
                for call in calls.graph().calls
            },
        }
    six = [found[name] for name in plans_of_two()]
    return {
        "plans": found,
        "correlation": spearman([f["estimated"] for f in six], [f["measured"] for f in six]),
        "error": float(np.mean([abs(f["estimated"] / f["measured"] - 1) for f in six])),
        "others": others,
        "start_us": [cluster.collective_us for cluster, _ in soundings],
        "searched": {n: [*map(str, place)] for n, place in plans["searched"].assignments.items()},
    }


def _cores_busy(pids: Sequence[int]) -> float:
    """Seconds that the machine's cores have worked for others than this process and ``pids`` (Linux; NaN elsewhere)."""
    try:
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, irq, soft, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
        own = time.process_time()
        for pid in pids:
            after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            own += (int(after_name[11]) + int(after_name[12])) / tick
        return (user + nice + system + irq + soft) / tick - own
    except (OSError, ValueError):
        return math.nan


def _seconds(run: Sequence[Done]) -> float:
    return max(done.end for done in run) - min(done.start for done in run)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """The correlation of ranks; equal values share the mean of theirs."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        x = np.asarray(values)
        return np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x])

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


# --- the search (simulated) ------------------------------------------------------------------------------------

SETTINGS = ((16, "7B", "7B"), (16, "13B", "7B"), (32, "34B", "7B"), (64, "70B", "7B"))  # GPUs, actor, critic
BATCH = Workload(batch=512, prompt=1024, response=1024, minibatches=4)
TINY = (8, "7B", "7B")  # small enough to try every plan made of each call's six fastest places


def _simulated(gpus: int, actor: str, judge: str) -> Estimator:
    """PPO's six calls; the reference is as large as the actor, the judges give one number."""
    large, scalar = ModelShape.named(actor), ModelShape.named(judge).as_scalar()
    shapes = {"actor": large, "reference": large, "critic": scalar, "reward": scalar}
    graph = PPOCalls(minibatches=BATCH.minibatches).graph()
    return Estimator(graph, shapes, ClusterSpec.load("h100-flat").with_gpus(gpus), BATCH)


def searching(
    seed: int,
    folder: Path,
    evaluations: int = 60_000,
    settings: Sequence[tuple[int, str, str]] = SETTINGS,
    keep: int = 6,
) -> dict[str, Any]:
    """Simulated seconds of the searched plan beside plans without a search."""
    tiny = _simulated(*TINY)
    best = exhaustive(tiny, keep)
    walked = search(tiny, seed=seed, evaluations=min(evaluations, 20_000), keep=keep)
    found: dict[str, Any] = {
        "tiny": {"exhaustive": best.seconds, "searched": walked.seconds, "plans": best.evaluations},
        "settings": {},
    }
    for gpus, actor, judge in settings:
        estimator = _simulated(gpus, actor, judge)
        made = search(estimator, seed=seed, evaluations=evaluations)
        assert made.start is not None
        others = {name: plan.seconds if (plan := baseline(estimator, name)) else None for name in BASELINES}
        found["settings"][f"{gpus} GPUs, {actor} + {judge}"] = {
            "searched": made.seconds,
            "others": others,
            "greedy": made.start.cost,
            "greedy_fits": made.start.fits,
            "worse_accepted": made.worse,
            "evaluations": made.evaluations,
            "space": float(made.space),
            "trace": [[n, cost] for n, cost in made.trace],
        }
    return found


ARMS: dict[str, Callable[[int, Path], dict[str, Any]]] = {
    "correctness": correctness,
    "clock": clock,
    "search (simulated)": searching,
}


# --- judging ----------------------------------------------------------------------------------------------


def judge(results: Results) -> list[Check]:
    """Measured figures on each seed; simulated ones over the seeds."""
    checks: list[Check] = []

    def check(name: str, value: float, sense: str, seed: int | None = None) -> None:
        checks.append(Check(name, value, sense, THRESHOLDS[name], seed))

    for seed, f in results.get("correctness", {}).items():
        check("measured: weights that are not bit for bit those moved", f["wrong"], "<=", seed)
        check("measured: ranks whose bytes differ from the plan's", f["differ"], "<=", seed)
        check("measured: slices that a rank sends to itself", f["own"], "<=", seed)
        apart = max(f["apart"].values())
        check("measured: largest difference of weights between plans, 3 PPO steps", apart, "<=", seed)
    for seed, f in results.get("clock", {}).items():
        check(
            "measured: rank correlation of estimated and measured seconds, 6 plans",
            f["correlation"],
            ">=",
            seed,
        )
        check("measured: mean relative error of estimated seconds, 6 plans", f["error"], "<=", seed)
    found = list(results.get("search (simulated)", {}).values())
    if found:
        tiny = max(f["tiny"]["searched"] / f["tiny"]["exhaustive"] for f in found)
        check("simulated: searched over exhaustive optimum, tiny space, most", tiny, "<=")
        rows = [row for f in found for row in f["settings"].values()]
        symmetric = [row["others"]["symmetric"] / row["searched"] for row in rows]
        check("simulated: searched over best symmetric plan, most", 1 / min(symmetric), "<=")
        check("simulated: best symmetric plan over searched, mean", float(np.mean(symmetric)), ">=")
        heuristic = [(row["others"]["megatron_heuristic"] or math.inf) / row["searched"] for row in rows]
        check("simulated: heuristic over searched, least", min(heuristic), ">=")
        check("simulated: heuristic over searched, mean", float(np.mean(heuristic)), ">=")
        by_setting = [[f["settings"][name]["searched"] for f in found] for name in found[0]["settings"]]
        agree = max(max(values) / min(values) for values in by_setting)
        check("simulated: largest over smallest searched plan among seeds", agree, "<=")
        greedy = min(row["greedy"] / row["searched"] for row in rows)
        check("simulated: cost of the greedy start over searched, least", greedy, ">=")
    return checks


def table(results: Results) -> list[list[str]]:
    """A row a claim, a plan and a setting."""
    rows = [["what", "measured or simulated", "figure", "mean", "seeds"]]

    def row(what: str, kind: str, figure: str, values: Sequence[float], form: str = ".2f") -> None:
        seeds = " ".join(format(v, form) for v in values) if len(values) > 1 else ""
        rows.append([what, kind, figure, format(float(np.mean(values)), form), seeds])

    found = list(results.get("correctness", {}).values())
    if found:
        what = f"{found[0]['moves']} pairs of layouts, 4 processes"
        row(what, "measured", "weights that came out wrong", [f["wrong"] for f in found], ".0f")
        row(what, "measured", "MB received", [f["bytes"] / 1e6 for f in found])
        for name in found[0]["apart"]:
            what = f"PPO, 3 steps, plan '{name}' against dp4"
            row(what, "measured", "largest difference of a weight", [f["apart"][name] for f in found], ".1e")
        row("PPO, 3 steps", "measured", "largest movement of a weight", [f["moved"] for f in found], ".1e")
    found = list(results.get("clock", {}).values())
    for name in found[0]["plans"] if found else ():
        pairs = [f["plans"][name] for f in found]
        row(f"iteration, {name}", "measured", "s, estimated", [p["estimated"] for p in pairs])
        row(f"iteration, {name}", "measured", "s, by the clock", [p["measured"] for p in pairs])
    if found:
        row("six plans", "measured", "rank correlation", [f["correlation"] for f in found])
        row("six plans", "measured", "mean relative error", [f["error"] for f in found])
        row("meanwhile", "measured", "cores that other programs kept busy", [f["others"] for f in found])
    found = list(results.get("search (simulated)", {}).values())
    for name in found[0]["settings"] if found else ():
        made = [f["settings"][name] for f in found]
        row(name, "simulated", "s, searched", [m["searched"] for m in made], ".1f")
        for other in BASELINES:
            seconds = made[0]["others"][other]
            said = "does not fit" if seconds is None else f"{seconds:.1f}"
            rows.append([name, "simulated", f"s, {other}", said, ""])
    return rows


def draw(results: Results, path: Path) -> None:
    """Estimated against measured seconds; seconds of searched plans; the course of the search."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from guerdon.run.plots import PALETTE, save

    figure, (clocks, settings, course) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    found = list(results.get("clock", {}).values())
    for i, name in enumerate(found[0]["plans"] if found else ()):
        pairs = [f["plans"][name] for f in found]
        x, y = [p["measured"] for p in pairs], [p["estimated"] for p in pairs]
        clocks.scatter(x, y, color=PALETTE[i % len(PALETTE)], label=name, s=22)
    if found:
        highest = max(p[key] for f in found for p in f["plans"].values() for key in ("measured", "estimated"))
        clocks.plot([0, 1.1 * highest], [0, 1.1 * highest], color="#B0B0B0", linewidth=0.8)
    clocks.set(title="an iteration, two processes (measured)", xlabel="measured s", ylabel="estimated s")
    found = list(results.get("search (simulated)", {}).values())
    names = list(found[0]["settings"]) if found else []
    for i, kind in enumerate(("searched", *BASELINES) if found else ()):
        seconds = [
            np.mean([f["settings"][n]["searched"] for f in found])
            if kind == "searched"
            else found[0]["settings"][n]["others"][kind] or math.nan
            for n in names
        ]
        settings.bar(np.arange(len(names)) + 0.2 * i - 0.3, seconds, 0.18, color=PALETTE[i], label=kind)
    settings.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=7)
    settings.set(title="PPO (simulated)", ylabel="s an iteration")
    for f, (i, name) in product(found, enumerate(names)):
        trace = np.array(f["settings"][name]["trace"])
        label = name if f is found[0] else None
        best = f["settings"][name]["searched"]
        course.step(
            trace[:, 0], trace[:, 1] / best, where="post", color=PALETTE[i], linewidth=1.2, label=label
        )
    course.set(title="the search (simulated)", xlabel="plans priced", ylabel="best so far over the last")
    if found:
        course.set_xscale("log")
    for panel in (clocks, settings, course):
        panel.set_axisbelow(True)
    save(figure, path)
