"""The command line: ``guerdon train | resume | sample | evaluate | export | list | reproduce | matrix | plan | bench``.

Nothing heavy is imported before it is needed, so that ``guerdon --help`` and ``guerdon list`` answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable
from typing import Any, Literal

from guerdon import __version__
from guerdon.errors import GuerdonError, UsageError, nearest

USAGE = """\
guerdon: any policy (a controller, a language model, an image generator) learns from any feedback.

  guerdon train METHOD [--task TASK] [options]   train; METHOD --help lists its options
  guerdon resume runs/NAME                       continue a stopped run where it was
  guerdon sample runs/NAME --prompt TEXT         generate with a trained model
  guerdon evaluate runs/NAME                     measure a trained model
  guerdon export runs/NAME --format onnx|c       a controller as a file for use elsewhere
  guerdon list [--family F] [--policy P] [--status S]
                                                 the methods: what works, what is planned
  guerdon tasks                                  the ready problems
  guerdon reproduce METHOD [--seeds N]           run the experiment that shows the paper's claim
  guerdon matrix [--rows R,R] [--columns C,C]    every objective on every kind of policy, measured
  guerdon plan METHOD [--draw graph.svg]         its calls as a graph; --actor 7b: a plan for a cluster
  guerdon bench roles|images|control|language|engine   speed beside plain PyTorch and other libraries

Start here:  guerdon train rlcm
Help on one command:  guerdon COMMAND --help
"""


@dataclasses.dataclass
class Common:
    """What every ``guerdon train METHOD`` takes."""

    task: str | None = None  # the problem to train on ('guerdon tasks' lists them)
    name: str | None = None  # the run's folder under --runs; a free one is chosen
    runs: str = "runs"  # where runs are kept
    seed: int = 0  # of everything random
    model: str | None = None  # path or hub name of a model, in place of the task's own
    data: str | None = None  # recorded rows for a language model: JSONL, JSON, Parquet or CSV
    prompts: str | None = None  # file of prompts: text, one a line, or JSONL with a 'prompt' column
    max_length: int | None = None  # tokens of prompt and answer together; longer ones are cut
    max_prompt: int | None = None  # tokens of a prompt; longer ones are cut
    max_new_tokens: int | None = None  # tokens of a sampled answer
    env: str | None = None  # id of a gymnasium environment to train in
    env_options: str | None = None  # its keyword arguments, a JSON object
    reward: str | None = None  # a reward's name, file.py:function, or a sum such as 'a + 0.5*b'
    cost: str | None = None  # likewise what a constrained method keeps below a limit
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    engine: str = "local"  # where the roles run: local (this process) or ray (worker processes)
    workers: int = 2  # processes under ray
    placement: str = "colocate"  # colocate, split, standalone, inline, or a plan as a JSON file
    address: str | None = None  # of a Ray cluster; by default one is started here for the run
    shard: bool = False  # under ray, shard weights and optimiser over the workers (FSDP2)
    samplers: int = 0  # processes that step the environments; 0 steps them where the method runs
    threads: int | None = None  # CPU threads; by default chosen by the size of the model
    precision: str | None = None  # float32, bfloat16 or float16 for the matrix work
    compile: bool | None = (
        None  # compile models; controllers on the CPU compile their updates unless told not to
    )
    recompute: bool = False  # log-probabilities of answers again by the trained model; logs the difference
    log: str = ""  # further loggers, comma-separated: tensorboard, wandb, trackio
    checkpoint_every: float = 10.0  # seconds between checkpoints
    checkpoint_steps: int | None = None  # rounds between checkpoints, instead of seconds
    max_seconds: float | None = None  # stop after about this much training
    until: float | None = None  # stop when the reward (the mean return of the last 100 episodes) reaches this
    quiet: bool = False  # no progress bar


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors of the user's making are one line and status 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if args[0] in ("-V", "--version"):
        print(f"guerdon {__version__}")
        return 0
    command, rest = args[0], args[1:]
    try:
        if command not in COMMANDS:
            raise UsageError(f"unknown command '{command}'; {nearest(command, COMMANDS)}")
        return COMMANDS[command](rest)
    except GuerdonError as error:
        print(f"guerdon: {' '.join(str(error).split())}", file=sys.stderr)  # one line, whatever a file raised
        return error.exit_status
    except KeyboardInterrupt as error:
        text = str(error)
        print(f"guerdon: {text or 'stopped'}", file=sys.stderr)
        return int(getattr(error, "exit_status", 130))
    except BrokenPipeError:  # "guerdon list | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


# --- parsing ----------------------------------------------------------------------------------------------


def _parse(
    kind: type, args: list[str], prog: str, default: Any = None, description: str | None = None
) -> Any:
    """``args`` as an instance of the dataclass ``kind``. An unknown option is a `UsageError` that offers the
    nearest; a bad value is tyro's message and exit status 2."""
    import tyro

    known = [f.name.replace("_", "-") for f in dataclasses.fields(kind)]
    for arg in args:
        match = re.match(r"--([A-Za-z][\w-]*)", arg)
        if match and match.group(1) not in ("help", "h"):
            option = match.group(1).replace("_", "-").lower()
            if option not in known and option.removeprefix("no-") not in known:
                close = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
                hint = f"did you mean '--{close[0]}'?" if close else f"see '{prog} --help'"
                raise UsageError(f"unknown option '--{match.group(1)}'; {hint}")
    config = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(kind, args=args, prog=prog, default=default, description=description, config=config)


def _positional(args: list[str], what: str, usage: str) -> tuple[str, list[str]]:
    if not args or args[0].startswith("-"):
        if args and args[0] in ("-h", "--help"):
            print(usage)
            raise SystemExit(0)
        raise UsageError(f"{what} is missing; usage: {usage.splitlines()[0]}")
    return args[0], args[1:]


def _peek(args: list[str], option: str) -> str | None:
    """The value of ``--option`` in ``args``, before they are parsed."""
    for i, arg in enumerate(args):
        if arg == f"--{option}" and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith(f"--{option}="):
            return arg.split("=", 1)[1]
    return None


# --- commands ---------------------------------------------------------------------------------------------


def _train(args: list[str]) -> int:
    from guerdon import catalog

    usage = "guerdon train METHOD [--task TASK] [options]"
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: {usage}\n\nMethods that work today ('guerdon list' shows all):")
        for system in catalog.systems(status="ready"):
            if system.cls is not None:  # studies and engines are reproduced, not trained
                print(f"  {system.slug:<20}{system.summary}")
        print("\nguerdon train METHOD --help lists a method's options.")
        return 0
    slug, rest = _positional(args, "the method", usage)
    system = catalog.find(slug)
    from guerdon import launch, tasks
    from guerdon.tasks.base import Pieces

    cls = launch.method_class(slug)
    pieces = Pieces(model=_peek(rest, "model"), env=_peek(rest, "env"), data=_peek(rest, "data"))
    task = _peek(rest, "task") or launch.task_for(slug, pieces)
    tasks.find(task)
    launch.policy_kind(slug, task)
    recipe = launch.method_for(slug, task, pieces)
    # One flat dataclass, so that --help is one list: the method's own options first, then what all share.
    options = _merged(cls, recipe)
    description = f"{system.title} ({system.reference}). Task '{task}'."
    chosen = _parse(options, rest, f"guerdon train {slug}", description=description)
    values = {f.name: getattr(chosen, f.name) for f in dataclasses.fields(options)}
    shared = {f.name: values.pop(f.name) for f in dataclasses.fields(Common)}
    log = tuple(filter(None, (part.strip() for part in shared.pop("log").split(","))))
    quiet = shared.pop("quiet")
    shared["task"] = task
    result = launch.train(slug, log=log, progress=not quiet, **shared, **values)
    _print_result(result)
    return 0


def _merged(cls: type, defaults: Any) -> type:
    """The fields of the method's dataclass (with ``defaults``) and of `Common` in one dataclass."""
    fields = _fields(cls, defaults) + _fields(Common, Common())
    return dataclasses.make_dataclass("Options", fields)


def _fields(owner: type, defaults: Any) -> list[Any]:
    """A dataclass's fields for `dataclasses.make_dataclass`, with their comments as help texts."""
    import typing

    import tyro

    hints, texts = typing.get_type_hints(owner), _help(owner)
    fields: list[Any] = []
    for f in dataclasses.fields(owner):
        value = getattr(defaults, f.name)
        kind = typing.Annotated[hints[f.name], tyro.conf.arg(help=texts.get(f.name, ""))]  # type: ignore[valid-type]
        default = dataclasses.field(default=value)
        fields.append((f.name, kind, default))
    return fields


def _help(owner: type) -> dict[str, str]:
    """The comment behind each field of a dataclass."""
    import inspect

    texts = {}
    for line in inspect.getsource(owner).splitlines():
        match = re.match(r"\s{4}(\w+)\s*:.*?#\s(.*)$", line)
        if match:
            texts[match.group(1)] = match.group(2)
    return texts


def _print_result(result: Any) -> None:
    print()
    names = [n for n in result.before if n in result.after]
    width = max((len(n) for n in names), default=0)
    if names:
        print(f"{'':{width}}  {'before':>10}  {'after':>10}")
    for name in names:
        print(f"{name:{width}}  {result.before[name]:>10.4g}  {result.after[name]:>10.4g}")
    print(f"\ntrained for {result.seconds:.0f} s; model and metrics in {result.folder}")
    for picture in result.pictures:
        compares = os.path.basename(picture) == "before_after.png"
        print(f"{'same prompts and seeds, before above after' if compares else 'also'}: {picture}")


def _resume(args: list[str]) -> int:
    folder, rest = _positional(args, "the run's folder", "guerdon resume runs/NAME [--quiet]")
    unknown = [option for option in rest if option != "--quiet"]
    if unknown:
        raise UsageError(f"unknown option '{unknown[0]}'; 'guerdon resume' takes the folder and --quiet")
    from guerdon import launch

    _print_result(launch.resume(folder, progress="--quiet" not in rest))
    return 0


@dataclasses.dataclass
class SampleOptions:
    """What ``guerdon sample`` takes."""

    prompt: tuple[str, ...] = ()  # one or more prompts; by default some of the task's
    steps: str = ""  # sampling steps, comma-separated for a row each, such as 1,2,4,8
    count: int = 1  # samples of each prompt
    seed: int = 0  # of the noise
    guidance: float | None = None  # guidance scale; by default as in training
    temperature: float | None = None  # of texts; by default as in training
    top_k: int | None = None  # of texts: draw from this many likeliest tokens
    top_p: float | None = None  # of texts: draw from the likeliest tokens that make up this probability
    greedy: bool = False  # of texts: always the likeliest token
    beams: int | None = None  # of texts: the likeliest answer that a search with so many beams finds
    max_new_tokens: int | None = None  # of texts: tokens of an answer
    out: str = "grid.png"  # the picture to write
    untrained: bool = False  # also show the model as it was before training
    device: str = "auto"  # auto, cpu, cuda


def _sample(args: list[str]) -> int:
    usage = "guerdon sample runs/NAME|MODEL [--prompt TEXT] [--steps 1,2,4,8] [--out grid.png]"
    folder, rest = _positional(args, "the run's folder", usage)
    options = _parse(_described(SampleOptions), rest, "guerdon sample FOLDER")
    from guerdon import sample

    for line in sample.sample(folder, options):
        print(line)
    return 0


@dataclasses.dataclass
class EvaluateOptions:
    """What ``guerdon evaluate`` takes."""

    episodes: int = 10  # of a controller: whole episodes to play
    seed: int = 7777  # of the episodes; by default those that training measures on
    stochastic: bool = False  # act with the policy's noise instead of its likeliest action
    video: str | None = None  # film to write, .gif, or .mp4 where imageio-ffmpeg is installed
    env: str | None = None  # environment to play in; by default the run's own
    env_options: str | None = None  # its keyword arguments, a JSON object, beside the run's
    steps: str = ""  # of a generator: sampling steps, comma-separated for a row each
    data: str | None = None  # of a bare language model: recorded rows to measure it on
    prompts: str | None = None  # of a bare language model: prompts to answer
    reward: str | None = None  # of a bare language model: the judge of its answers
    device: str = "auto"  # auto, cpu, cuda


def _evaluate(args: list[str]) -> int:
    usage = "guerdon evaluate runs/NAME|MODEL [--episodes N] [--video out.gif] [--env ID] | [--steps 1,2,4,8]"
    folder, rest = _positional(args, "the run's folder", usage)
    options = _parse(_described(EvaluateOptions), rest, "guerdon evaluate FOLDER")
    from guerdon import sample

    for line in sample.evaluate(folder, options):
        print(line)
    return 0


@dataclasses.dataclass
class ExportOptions:
    """What ``guerdon export`` takes."""

    format: Literal["onnx", "c"] | None = None  # by default what the ending of --out says, else onnx
    out: str | None = None  # file to write; controller.onnx or controller.h


def _export(args: list[str]) -> int:
    usage = "guerdon export runs/NAME|MODEL [--format onnx|c] [--out controller.onnx|controller.h]"
    folder, rest = _positional(args, "the run's folder", usage)
    options = _parse(_described(ExportOptions), rest, "guerdon export FOLDER")
    from guerdon import sample

    for line in sample.export(folder, options):
        print(line)
    return 0


def _described(owner: type) -> type:
    """The dataclass with its fields' comments as help texts."""
    made = dataclasses.make_dataclass(owner.__name__, _fields(owner, owner()))
    made.__doc__ = owner.__doc__
    return made


def _list(args: list[str]) -> int:
    from guerdon import catalog

    filters: dict[str, str] = {}
    rest = list(args)
    while rest:
        option = rest.pop(0)
        if option in ("-h", "--help"):
            print("guerdon list [--family FAMILY] [--policy KIND] [--status ready|planned]")
            return 0
        name, _, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or name not in ("family", "policy", "status"):
            hint = nearest(name, ("family", "policy", "status"))
            raise UsageError(f"unknown option '{option}'; {hint}")
        if not value:
            if not rest:
                raise UsageError(f"--{name} needs a value")
            value = rest.pop(0)
        filters[name] = value
    chosen = catalog.systems(**filters)
    if sys.stdout.isatty():
        catalog.show(chosen)
    else:
        print(catalog.render(chosen))
    return 0


def _tasks(args: list[str]) -> int:
    from guerdon.tasks import TASKS

    for name, (_, _, kinds, summary) in TASKS.items():
        print(f"{name:<10}{', '.join(kinds):<26}{summary}")
    return 0


@dataclasses.dataclass
class ReproduceOptions:
    """What ``guerdon reproduce`` takes."""

    seeds: int | None = None  # how many seeds; by default the experiment's own number
    first_seed: int = 0  # the first of them
    arms: str = ""  # only these arms, comma-separated
    out: str = "results"  # where SLUG.json and SLUG.png go
    fresh: bool = False  # forget what an interrupted reproduction already measured


def _reproduce(args: list[str]) -> int:
    slug, rest = _positional(args, "the method", "guerdon reproduce METHOD [--seeds N]")
    options = _parse(_described(ReproduceOptions), rest, f"guerdon reproduce {slug}")
    from guerdon.reproductions import runner

    return runner.main(slug, options)


@dataclasses.dataclass
class PlanOptions:
    """What ``guerdon plan`` takes."""

    task: str | None = None  # the problem on which the method is traced; by default its own
    policy: str | None = None  # a kind of policy ('language') where the method trains several
    env: str | None = None  # id of a gymnasium environment, for controllers
    reward: str | None = None  # a judge, as for 'guerdon train'
    cost: str | None = None  # likewise of costs
    draw: str | None = None  # write the graph of calls to this file (.svg, .png, .pdf)
    actor: str | None = None  # size of the actor (7b, 70b, a config.json): search a plan for a cluster
    critic: str | None = None  # size of critics
    reward_model: str | None = (
        None  # size of the model that judges, by default the critic's; none: it takes no GPU
    )
    cluster: str = "8x8xH100"  # nodes x GPUs x kind, a shipped name, or a .toml file
    batch: int = 512  # answers an iteration
    prompt: int = 1024  # tokens of a prompt
    response: int = 1024  # tokens of an answer
    offload: bool = False  # frozen models may wait in the host's memory
    seconds: float | None = None  # of search; by default a fixed number of steps
    seed: int = 0  # of the search
    timeline: str | None = None  # write a picture of two iterations to this file
    out: str | None = None  # write the plan to this JSON file


def _plan(args: list[str]) -> int:
    slug, rest = _positional(
        args, "the method", "guerdon plan METHOD [--draw graph.svg] [--actor 7b --cluster 2x8xH100]"
    )
    options = _parse(_described(PlanOptions), rest, f"guerdon plan {slug}")
    from guerdon import planning

    return planning.main(slug, options)


def _matrix(args: list[str]) -> int:
    from guerdon.matrix import command

    return command.main(_parse(_described(command.MatrixOptions), args, "guerdon matrix"))


def _bench(args: list[str]) -> int:
    what, rest = _positional(
        args, "what to time", "guerdon bench roles|images|control|language|engine [--out results]"
    )
    from guerdon import benchmarks

    return benchmarks.main(what, rest)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "resume": _resume,
    "sample": _sample,
    "evaluate": _evaluate,
    "export": _export,
    "list": _list,
    "tasks": _tasks,
    "reproduce": _reproduce,
    "matrix": _matrix,
    "plan": _plan,
    "bench": _bench,
}

if __name__ == "__main__":
    sys.exit(main())
