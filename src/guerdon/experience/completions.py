"""Experience of a language model: answers to prompts, in groups, with the figures that tell how they look."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import FeedbackError, UsageError
from guerdon.experience.base import check_groups
from guerdon.experience.prompts import Prompted, Prompts, Sampler
from guerdon.randomness import row_seeds


def write_answers(path: str | Path, traj: Trajectories) -> None:
    """Texts as JSONL: each answer with its ``prompt`` and ``text``, how it was sampled (``temperature`` and what else
    ``inputs["sampler"]`` notes), and its ``reward`` where it has one. Of trajectories without texts nothing is written."""
    if traj.outputs is None or "text" not in traj.outputs:
        return
    how = {"temperature": traj.inputs["temperature"], **dict(traj.inputs.get("sampler", {}))}
    columns = {"prompt": traj.prompts, "text": traj.texts, **{k: v.tolist() for k, v in how.items()}}
    if traj.reward is not None:
        columns["reward"] = traj.score().tolist()
    rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


class Completions(Prompted):
    """Answers to drawn prompts, some of which may be drawn to be thrown away.

    Args:
        prompts, group_size, seed: see `Prompted`.
        draw: answers drawn to each prompt, of which the first ``group_size`` that pass are kept; None draws as many as
            are kept.
        passes: which of the drawn answers pass, a function of ``[B]`` trajectories to bool ``[B]``. Where fewer pass
            than are wanted, the first of the others fill the group up, so that groups are always complete.
    """

    def __init__(
        self,
        prompts: Prompts | Sequence[str],
        group_size: int = 1,
        seed: int = 0,
        draw: int | None = None,
        passes: Callable[[Trajectories], Tensor] | None = None,
    ) -> None:
        super().__init__(prompts, group_size, seed)
        if draw is not None and draw < group_size:
            raise UsageError(f"{draw} answers are drawn and {group_size} kept; draw at least as many")
        self.draw = draw
        self.passes = passes
        self.passed: float | None = None  # share of the answers of the last `collect` that passed
        self._end: int | None = None  # the actor's end-of-text token

    def collect(self, actor: Sampler, n: int, group_size: int | None = None, **options: Any) -> Trajectories:
        """``n`` answers of ``actor``, those to one prompt side by side; see `Prompted.collect`.

        Raises:
            UsageError: ``n`` is not a multiple of ``group_size``, or that is more than are drawn.
            FeedbackError: ``passes`` gave no bool a row.
        """
        size = group_size or self.group_size
        drawn = self.draw or size
        tokenizer = getattr(getattr(actor, "model", actor), "tokenizer", None)
        self._end = getattr(tokenizer, "eos_token_id", None)
        if self.passes is None and drawn == size:
            return super().collect(actor, n, group_size, **options)
        if size > drawn:
            raise UsageError(f"groups of {size} cannot be kept of {drawn} answers; set draw higher")
        check_groups(n, size)
        places = [place for place in self.prompts.draw(n // size) for _ in range(drawn)]
        seeds = row_seeds(self.seed, self.rows, len(places))
        self.rows += len(places)
        texts = [self.prompts.texts[place] for place in places]
        group = torch.tensor(places, dtype=torch.int64)
        traj = actor.sample(texts, seeds, group=group, **self._options(seeds, drawn), **options)
        return self._kept(traj, drawn, size)

    def _kept(self, traj: Trajectories, drawn: int, size: int) -> Trajectories:
        """The first ``size`` answers of each ``drawn`` that pass, in the order in which they were drawn."""
        good = torch.ones(len(traj), dtype=torch.bool)
        if self.passes is not None:
            good = torch.as_tensor(self.passes(traj)).cpu()
            if good.shape != (len(traj),) or good.dtype != torch.bool:
                raise FeedbackError(
                    f"passes gave {good.dtype} {list(good.shape)} for {len(traj)} answers; return a bool for each"
                )
        self.passed = good.float().mean().item()
        rank = torch.where(good, 0, drawn).view(-1, drawn) + torch.arange(drawn)
        place = rank.argsort(dim=1)[:, :size].sort(dim=1).values
        rows = (place + torch.arange(0, len(traj), drawn)[:, None]).flatten()
        kept = traj[rows.to(traj.mask.device)]
        return kept.select_steps(0, max(1, int(kept.lengths.max())))

    def statistics(self, traj: Trajectories) -> dict[str, Tensor]:
        """Figures to log about judged answers, as 0-d tensors.

        ``reward``: the mean score. ``length``: mean number of tokens. ``ended``: share that ended with the end-of-text
        token (the others ran into the limit). ``distinct``: how many different answers there are, the prompt counted
        with them, as a share of all. ``passed``: share of the drawn answers that passed, where there is a filter.
        """
        found = {**super().statistics(traj), "length": traj.lengths.float().mean()}
        token = traj.inputs["step", "token"]
        if self._end is not None:
            last = token.gather(1, (traj.lengths - 1).clamp(min=0)[:, None]).squeeze(1)
            found["ended"] = (last == self._end).float().mean()
        rows = torch.cat(
            [
                torch.where(traj.inputs["prompt_mask"], traj.inputs["prompt_token"], -1),
                torch.where(traj.mask, token, -1),
            ],
            dim=1,
        )
        found["distinct"] = torch.tensor(len(rows.unique(dim=0)) / max(1, len(rows)))
        if self.passes is not None and self.passed is not None:
            found["passed"] = torch.tensor(self.passed)
        return found
