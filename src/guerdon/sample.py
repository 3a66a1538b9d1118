"""``guerdon sample``, ``evaluate`` and ``export``: what a trained policy makes, how good it is, and it as a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guerdon import launch
from guerdon.batch import Trajectories
from guerdon.engine.local import LocalEngine
from guerdon.errors import UsageError
from guerdon.evaluation import control
from guerdon.evaluation.control import Film
from guerdon.experience.environments import make
from guerdon.policies.base import Policy
from guerdon.policies.control import Controller, load_controller
from guerdon.policies.language import LanguagePolicy, is_language_model
from guerdon.policies.pretrained import load_policy
from guerdon.policies.saving import read_json
from guerdon.randomness import row_seeds
from guerdon.roles import Role
from guerdon.run.config import read_config
from guerdon.search import beam_search
from guerdon.tasks.base import Pieces
from guerdon.tasks.control import EPISODES, SEED, Control, parse_options
from guerdon.tasks.text import Text


def _steps(text: str) -> list[int]:
    """``"1,2,4"`` as numbers. Raises `UsageError` for anything else."""
    try:
        steps = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(
            f"--steps '{text}': expected whole numbers separated by commas, such as 1,2,4,8"
        ) from None
    if any(n < 1 for n in steps):
        raise UsageError(f"--steps '{text}': a sampler takes at least one step")
    return steps


def _actors(folder: str, untrained: bool, device: str) -> tuple[list[tuple[str, Role]], dict[str, Any], Any]:
    """Labelled policies, their sampling options and their task (None for a bare model)."""
    if (Path(folder) / "config.json").is_file() and (Path(folder) / "checkpoints").is_dir():
        trained = launch.load(folder, device=device)
        actors = [("", trained.actor)]
        if untrained:
            actors = [
                ("before", launch.load(folder, untrained=True, device=device).actor),
                ("after", trained.actor),
            ]
        return actors, trained.sampling, trained
    if untrained:
        raise UsageError(f"{folder} is a model, not a run, so it has no untrained form")
    if not Path(folder).exists() and folder.startswith("runs/"):
        raise UsageError(f"there is no run at {folder}")
    engine = LocalEngine(device)
    policy: Any = LanguagePolicy.from_pretrained(folder) if is_language_model(folder) else load_policy(folder)
    return [("", engine.role("actor", policy))], {}, None


# options of ``guerdon sample`` that are about texts, by the names of the sampler
_OF_TEXTS = ("temperature", "top_k", "top_p", "greedy", "max_new_tokens")


def sample(folder: str, options: Any) -> Iterator[str]:
    """Generate with the policy in ``folder`` (a run, or any model that `load_policy` reads); yields lines to
    print. Pictures go to ``options.out``; texts are printed."""
    steps: list[int | None] = [*_steps(options.steps)] or [None]
    if options.count < 1:
        raise UsageError(f"--count is {options.count}; it must be at least 1")
    actors, sampling, trained = _actors(folder, options.untrained, options.device)
    prompts = list(options.prompt)
    if not prompts:
        if trained is None:
            raise UsageError("give at least one --prompt")
        prompts = trained.task.experience(0).prompts.texts[:6]
    rows = [prompt for prompt in prompts for _ in range(options.count)]
    seeds = row_seeds(options.seed, 0, len(rows))
    if options.guidance is not None:
        sampling = {**sampling, "guidance": options.guidance}
    if not isinstance(actors[0][1].model, Policy):
        raise UsageError(f"{folder} holds a judge, not a policy: it cannot answer prompts")
    written = {name: value for name in _OF_TEXTS if (value := getattr(options, name)) not in (None, False)}
    if (written or options.beams) and not isinstance(actors[0][1].model, LanguagePolicy):
        name = next(iter(written), "beams").replace("_", "-")
        raise UsageError(f"{folder} holds no language model; --{name} does not apply to it")
    sampling = {**sampling, **written}
    if options.beams:
        yield from _beams(actors, prompts, options)
        return
    made: list[tuple[str, Trajectories]] = []
    for label, actor in actors:
        for number in steps:
            own = {**sampling, "steps": number} if number is not None else sampling
            words = [label, f"{number} step{'s' * (number != 1)}" if number is not None else ""]
            made.append((", ".join(filter(None, words)), actor.sample(rows, seeds, **own)))
    outputs = made[0][1].outputs
    if outputs is not None and "image" in outputs:
        from guerdon.evaluation.pictures import grid

        picture = grid(
            [traj.images.cpu() for _, traj in made], labels=[label for label, _ in made], captions=rows
        )
        try:
            picture.save(options.out)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot write the picture to '{options.out}': {error}") from error
        yield f"{len(rows)} sample{'s' * (len(rows) != 1)} in {len(made)} row{'s' * (len(made) != 1)}: {options.out}"
    elif outputs is not None and "text" in outputs:
        for label, traj in made:
            for prompt, text in zip(traj.prompts, traj.texts, strict=True):
                yield json.dumps({"prompt": prompt, "text": text} | ({"model": label} if label else {}))
    else:
        for label, traj in made:
            actions = traj.outputs["action"].tolist() if traj.outputs is not None else []
            for prompt, action in zip(traj.prompts, actions, strict=True):
                yield json.dumps({"prompt": prompt, "action": action} | ({"model": label} if label else {}))


def _beams(actors: list[tuple[str, Role]], prompts: list[str], options: Any) -> Iterator[str]:
    """The likeliest answers that a beam search finds, one a prompt."""
    if options.beams < 1:
        raise UsageError(f"--beams is {options.beams}; it must be at least 1")
    for label, actor in actors:
        limit = options.max_new_tokens or actor.model.max_new_tokens
        traj = actor.evaluate(
            lambda model, rows, limit=limit: beam_search(model, rows, options.beams, max_new_tokens=limit),
            prompts,
        )
        for prompt, text in zip(traj.prompts, traj.texts, strict=True):
            yield json.dumps({"prompt": prompt, "text": text} | ({"model": label} if label else {}))


def evaluate(folder: str, options: Any) -> Iterator[str]:
    """Measure the policy in ``folder``; yields the lines of a table.

    A controller (of a run, or a saved model with ``options.env``) plays whole episodes. Any other run's policy is
    measured as training does, before and after, at one or several numbers of steps. A language model of its own is
    measured on recorded rows (``options.data``) or on answers to ``options.prompts`` that ``options.reward`` judges.

    Raises `UsageError` for options that do not apply to what is in the folder.
    """
    steps: list[int | None] = [*_steps(options.steps)] or [None]
    if _holds_model(folder):
        yield from _episodes(load_controller(folder), None, folder, options)
        return
    if is_language_model(folder):
        yield from _language(folder, options)
        return
    if not (Path(folder) / "config.json").is_file():
        raise UsageError(f"there is no run at {folder}")
    for name in ("data", "prompts", "reward"):
        if getattr(options, name) is not None:
            raise UsageError(
                f"{folder} is a run, measured as it was trained; --{name} is for a bare language model"
            )
    trained = launch.load(folder, device=options.device)
    if isinstance(trained.actor.model, Controller) and isinstance(trained.task, Control):
        yield from _episodes(trained.actor.model, trained.task, folder, options)
        return
    for name, default in _OF_EPISODES.items():
        if getattr(options, name) != default:
            raise UsageError(
                f"{folder} holds no controller of an environment; --{name.replace('_', '-')} does not apply to it"
            )
    function = read_config(folder)["config"].get("function")
    if function:
        raise UsageError(
            f"{folder} was trained on the Python function '{function}', which its folder does not hold; "
            "measure it from Python, with guerdon.launch.load"
        )
    untrained = launch.load(folder, untrained=True, device=options.device)
    header: list[str] | None = None
    for number in steps:
        sampling = {**trained.sampling, "steps": number} if number is not None else trained.sampling
        for label, loaded in (("before", untrained), ("after", trained)):
            figures = loaded.task.measure(loaded.actor, loaded.feedback, **sampling).figures
            if header is None:
                header = list(figures)
                yield f"{'steps':>6}  {'model':<7}" + "".join(
                    f"  {name:>{max(len(name), 8)}}" for name in header
                )
            shown = "".join(f"  {figures[name]:>{max(len(name), 8)}.4g}" for name in header)
            yield f"{number or '':>6}  {label:<7}{shown}"


def _language(folder: str, options: Any) -> Iterator[str]:
    """Figures of a bare language model."""
    pieces = Pieces(model=folder, data=options.data, prompts=options.prompts, reward=options.reward)
    if options.data is None and (options.prompts is None or options.reward is None):
        raise UsageError(
            f"{folder} is a language model: say what to measure it on, --data FILE, or --prompts FILE with --reward"
        )
    task = Text(pieces)
    policy = task.policy("language")
    if options.data is not None:
        task.hold_out(policy)
    actor = LocalEngine(options.device).role("actor", policy)
    figures = task.measure(actor, task.feedback()).figures
    yield "".join(f"  {name:>{max(len(name), 8)}}" for name in figures)
    yield "".join(f"  {value:>{max(len(name), 8)}.4g}" for name, value in figures.items())


# --- controllers ------------------------------------------------------------------------------------------

# options of ``guerdon evaluate`` that are about episodes, and their defaults
_OF_EPISODES: dict[str, Any] = {
    "episodes": EPISODES,
    "seed": SEED,
    "stochastic": False,
    "video": None,
    "env": None,
    "env_options": None,
}


def _holds_model(folder: str) -> bool:
    """Whether ``folder`` is a saved controller rather than a run."""
    return isinstance(read_json(Path(folder) / "config.json").get("policy"), str)


def _episodes(controller: Controller, task: Control | None, folder: str, options: Any) -> Iterator[str]:
    if options.steps:
        raise UsageError(f"{folder} holds a controller, which takes no sampling steps; leave out --steps")
    if options.env is None and task is None:
        raise UsageError(f"{folder} is a model, not a run, so it names no environment; give one with --env")
    # options that a run was trained with hold for its own environment
    env_options = dict(task.env_options) if options.env is None and task is not None else {}
    env_options |= parse_options(options.env_options)
    film = None
    if options.video is not None:
        film = Film(options.video)
        env_options = {"render_mode": "rgb_array", **env_options}
    env_id = options.env if task is None or options.env is not None else task.env_id
    count = min(max(options.episodes, 1), EPISODES)
    environments = make(env_id, count, options.seed, **env_options)
    try:
        played = control.evaluate(
            controller, environments, options.episodes, not options.stochastic, options.seed, film
        )
    finally:
        environments.close()
    figures = played.figures()
    yield f"{'episodes':>8}" + "".join(f"  {name:>8}" for name in figures)
    yield f"{options.episodes:>8}" + "".join(f"  {value:>8.4g}" for value in figures.values())
    if film is not None:
        film.save()
        yield f"film of the first environment, {film.frames} pictures: {film.path}"


def export(folder: str, options: Any) -> Iterator[str]:
    """Write the controller in ``folder`` (a run or a saved model) to a file for use elsewhere; yields what to say.

    Raises `UsageError` where there is no controller, and as `guerdon.export.export` does.
    """
    from guerdon.export import export as write

    if _holds_model(folder):
        controller: Any = load_controller(folder)
    elif (Path(folder) / "config.json").is_file():
        controller = launch.load(folder, device="cpu").actor.model
    else:
        raise UsageError(f"there is no run at {folder}")
    if not isinstance(controller, Controller):
        raise UsageError(
            f"{folder} holds a {controller.kind} policy; only controllers of environments are exported"
        )
    out = options.out or f"controller.{'h' if options.format == 'c' else 'onnx'}"
    said = write(controller, out, options.format)
    yield f"{out}: {said}"
