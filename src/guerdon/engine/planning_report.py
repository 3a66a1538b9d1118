"""What a user of the planner sees: the plan as a table, why it is better than plans without a search, memory, files.

`make_plan` does it all for a graph whose calls are on language models, whichever method the graph is of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from guerdon.engine.cluster import ClusterSpec
from guerdon.engine.cost import CostModel
from guerdon.engine.estimate import Estimator
from guerdon.engine.graph import DataflowGraph
from guerdon.engine.mapping import JUDGING
from guerdon.engine.plan import BASELINES, Found, Progress, baseline, search
from guerdon.engine.shapes import GiB, ModelShape, Workload
from guerdon.engine.simulate import Row, Timeline, timeline
from guerdon.errors import DataError, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class Report:
    """A plan that was searched for, and what belongs to it.

    ``others`` are the plans without a search, None where one does not fit.
    """

    estimator: Estimator
    found: Found
    others: Mapping[str, Found | None]
    timeline: Timeline

    def show(self, console: Console) -> None:
        """Print tables and sentences."""
        found, cluster, work = self.found, self.estimator.cluster, self.estimator.workload
        name = self.estimator.graph.name
        console.print(
            f"[bold]{name + ': ' if name else ''}{found.seconds:.1f} s an iteration[/bold], simulated, on {cluster.nodes} x "
            f"{cluster.gpus_per_node} {cluster.name}",
            highlight=False,
        )
        console.print(
            f"{work.batch} sequences of {work.prompt} + {work.response} tokens, {self.updates()}; "
            f"{work.batch * work.length / found.seconds:,.0f} tokens a second",
            highlight=False,
        )
        for table in (self.plan_table(), self.baseline_table(), self.memory_table()):
            console.print()
            console.print(table)
        console.print()
        for line in self.remarks():
            console.print(line, highlight=False)

    def updates(self) -> str:
        """How often models are updated in an iteration, in words."""
        counts = {call.name: call.minibatches for call in self.estimator.graph.calls if call.kind == "train"}
        return ", ".join(f"{name} {n} step{'s' * (n > 1)}" for name, n in counts.items()) or "no updates"

    def plan_table(self) -> Table:
        """A row a call: where, in which layout, how long."""
        table = _table("call", "role", "GPUs", ">dp", ">pp", ">tp", ">parts", ">seconds", ">starts at")
        plan = self.found.plan
        first: dict[str, Row] = {}
        for row in self.timeline.rows:
            if row.kind != "weights":
                first.setdefault(row.call, row)
        for call, row in first.items():
            mesh, layout = plan.assignments[call]
            where = f"{mesh.size} ({mesh})" if mesh.size < self.estimator.cluster.gpus else f"all {mesh.size}"
            sizes = (str(n) for n in (layout.dp, layout.pp, layout.tp, plan.micro_batches[call]))
            stays = " (weights in host memory)" if row.role in plan.offload else ""
            table.add_row(
                call, row.role + stays, where, *sizes, f"{row.end - row.start:.2f}", f"{row.start:.2f}"
            )
        moving = self.timeline.seconds_of("weights")
        if moving > 0:
            table.add_row("weights on their way", "", "", "", "", "", "", f"{moving:.2f}", "")
        return table

    def baseline_table(self) -> Table:
        """A row a plan without a search: how much longer it takes, and what costs it the most."""
        table = _table("plan", ">seconds", ">of searched", ">GiB a GPU", "what makes the difference")
        mine = self.found
        table.add_row("searched", f"{mine.seconds:.2f}", "1.00", f"{mine.estimate.peak / GiB:.1f}", "")
        for name, other in self.others.items():
            label = name.replace("_", " ")
            if other is None:
                table.add_row(label, "-", "-", "-", "does not fit the memory")
                continue
            table.add_row(
                label,
                f"{other.seconds:.2f}",
                f"{other.seconds / mine.seconds:.2f}",
                f"{other.estimate.peak / GiB:.1f}",
                self.difference(other),
            )
        return table

    def difference(self, other: Found) -> str:
        """What makes ``other`` slower than the plan, in words: the calls that gain most, and calls side by side."""
        mine, theirs = self.found.plan.prediction["calls"], other.plan.prediction["calls"]
        gains = {call: theirs[call] - seconds for call, seconds in mine.items()}
        most = sorted(gains, key=lambda call: -gains[call])[:2]
        slower = [call for call in most if gains[call] > 0.01 * self.found.seconds]
        said = [f"{call} takes {theirs[call]:.1f} s, not {mine[call]:.1f}" for call in slower]
        little = 0.01 * self.found.seconds
        together, apart = sum(mine.values()) - self.found.seconds, sum(theirs.values()) - other.seconds
        if together > max(apart, 0) + little:
            gained = f"{together - apart:.1f} s fewer of calls side by side"
            said.append(gained if apart > little else "no calls side by side")
        if apart > together + little:
            said.append("each call has fewer GPUs")
        return "; ".join(said)

    def memory_table(self) -> Table:
        """A row for each stretch of GPUs that hold the same: who lives there, and how full they get."""
        table = _table("GPUs", "live there", ">peak GiB", ">of")
        homes = self.found.plan.homes()
        n = self.estimator.cluster.gpus_per_node
        for low, high, bytes_ in self.timeline.memory:
            here = [
                role
                for role, mesh in homes.items()
                if mesh.span(n)[0] <= low < mesh.span(n)[1] and role not in self.found.plan.offload
            ]
            gpus = f"{low}-{high - 1}" if high - low > 1 else str(low)
            capacity = f"{self.timeline.capacity / GiB:.1f}"
            table.add_row(gpus, ", ".join(here) or "nobody", f"{bytes_ / GiB:.1f}", capacity)
        return table

    def remarks(self) -> list[str]:
        """How the search went, and what the figures are."""
        found = self.found
        text = f"{found.evaluations:,} of {found.space:.1e} plans priced"
        if found.start is not None:
            result = (
                f"would give {found.start.seconds:.1f} s" if found.start.fits else "does not fit the memory"
            )
            text += f"; the fastest place for each call alone {result}"
        lines = [text + "."]
        if found.clocked:
            lines.append("The clock ended the search: another run may end with another plan.")
        better = [
            name for name, other in self.others.items() if other is not None and other.seconds < found.seconds
        ]
        if better:
            lines.append(f"The search missed a better plan ({', '.join(better)}); give it more time.")
        lines.append(
            "Seconds and bytes are from formulas, not measured; they rank plans and promise nothing."
        )
        return lines


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    return table


# --- from a user's words to a plan ------------------------------------------------------------------------------


def model_shape(text: str) -> ModelShape:
    """A shape by name ("70b"), or by the path of a transformers config.json or its folder. Raises `UsageError` for an unknown
    name and `DataError` for a file that cannot be used."""
    path = Path(text)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix != ".json":
        return ModelShape.named(text)
    try:
        return ModelShape.from_config(json.loads(path.read_text(encoding="utf-8")), path.parent.name)
    except OSError as error:
        raise DataError(f"cannot read the model's config {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def resized(
    graph: DataflowGraph, batch: int, minibatches: int | None = None, epochs: int | None = None
) -> DataflowGraph:
    """The graph with ``batch`` sequences where it answers (or, without answers, in its first call), the other calls in
    proportion. ``epochs`` and ``minibatches`` of each are those of the updates; None keeps the method's own.

    Raises `UsageError` where the minibatches do not divide an update's sequences.
    """
    counts = [call.sequences for call in graph.order() if call.sequences and call.on_model]
    answers = [c.sequences for c in graph.order() if c.sequences and c.kind == "generate"]
    base = max(answers) if answers else counts[0] if counts else batch
    calls = []
    for call in graph.calls:
        rows = call.sequences or base
        if call.kind != "train":
            calls.append(replace(call, sequences=max(1, round(rows * batch / base))))
            continue
        passes = max(1, round(rows / base)) if epochs is None else epochs
        each = max(1, call.minibatches // max(1, round(rows / base))) if minibatches is None else minibatches
        rows = passes * batch if epochs is not None else max(1, round(rows * batch / base))
        if rows % (each * passes):
            raise UsageError(
                f"{each} minibatches do not divide the {rows // passes} sequences of '{call.name}'"
            )
        calls.append(replace(call, sequences=rows, minibatches=each * passes))
    return DataflowGraph(calls, graph.name)


def shapes_for(
    graph: DataflowGraph,
    actor: ModelShape,
    critic: ModelShape | None = None,
    reward: ModelShape | None = None,
) -> dict[str, ModelShape]:
    """A shape for each role: judging ones (critic, reward, cost, ...) have the critic's or the reward model's and give one
    number, all others the actor's. Raises `UsageError` where a critic's is needed and not given."""
    found = {}
    for role in graph.roles():
        if not any(word in role for word in JUDGING):
            found[role] = actor
            continue
        shape = (reward or critic) if "reward" in role else (critic or reward)
        if shape is None:
            raise UsageError(
                f"the method has a role '{role}' whose size is not the actor's; give it, for example as --critic 7b"
            )
        found[role] = shape.as_scalar()
    return found


def make_plan(
    graph: DataflowGraph,
    *,
    actor: str,
    critic: str | None = None,
    reward: str | None = None,
    cluster: str = "8x8xH100",
    batch: int = 512,
    prompt: int = 1024,
    response: int = 1024,
    minibatches: int | None = None,
    epochs: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    offload: bool = False,
    least: int | None = None,
    timeline_path: str | Path | None = None,
    out: str | Path | None = None,
    costs: CostModel | None = None,
    progress: Progress | None = None,
) -> Report:
    """Search a plan for a method's ``graph`` and write what was asked for.

    Args:
        graph: of the method; `guerdon.planning.trace` makes it. A feedback in it is a program that takes no GPU, unless it was
            traced with ``judge="model"``.
        actor, critic, reward: sizes: a name ("70b") or a transformers config. The reward model's is the critic's by default.
        cluster: "8x8xH100", a shipped name or a .toml file.
        batch: sequences an iteration (of pairs, both), of ``response`` tokens to prompts of ``prompt`` tokens.
        minibatches, epochs: of the updates; None: the method's own.
        seconds, seed: of the search; without ``seconds`` it takes a fixed number of steps and gives the same plan every time.
        offload: whether frozen models may live in the host's memory.
        timeline_path: a picture of two iterations; ``out``: the plan as JSON.

    Raises `UsageError` for graphs without calls on language models, sizes that do not go together, and where nothing fits.
    """
    sizes = [model_shape(text) if text else None for text in (actor, critic, reward)]
    assert sizes[0] is not None
    shapes = shapes_for(graph, sizes[0], sizes[1], sizes[2])
    work = Workload(batch, prompt, response, minibatches=1)
    graph = resized(graph, batch, minibatches, epochs)
    estimator = Estimator(graph, shapes, ClusterSpec.load(cluster), work, costs, least=least, offload=offload)
    found = search(estimator, seconds, seed, progress=progress)
    others = {name: baseline(estimator, name) for name in BASELINES}
    report = Report(estimator, found, others, timeline(estimator, found.plan))
    if timeline_path is not None:
        report.timeline.draw(timeline_path, graph.name)
    if out is not None:
        found.plan.to_json(out)
    return report


def plan_command(graph: DataflowGraph, console: Console | None = None, **options: object) -> Report:
    """`make_plan` with a progress bar on ``console``, after which it prints the report."""
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = console or RichConsole()
    columns = (TextColumn("searching"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)

        def progress(share: float, best: float | None) -> None:
            said = "nothing fits yet" if best is None else f"best {best:.1f} s"
            bar.update(task, completed=share, description=said)

        report = make_plan(graph, progress=progress, **options)  # type: ignore[arg-type]
    report.show(console)
    for option, what in (("timeline_path", "timeline"), ("out", "plan")):
        if options.get(option) is not None:
            console.print(f"{what}: {options[option]}", highlight=False)
    return report
