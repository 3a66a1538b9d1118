"""Contrastive preference learning on an image generator: a cell of the matrix as a script of its own.

    python examples/cpl_on_a_consistency_model.py [OUT.png]

CPL (Hejna et al., 2024) was published for controllers that learn from recorded segments. Here a consistency model learns
with it from comparisons of its own pictures. Two minutes on two cores; docs/matrix.md walks through it.
"""

import sys

import torch

from guerdon import tasks
from guerdon.evaluation.pictures import grid
from guerdon.experience.denoisings import Denoisings
from guerdon.feedback.teachers import BradleyTerry, label
from guerdon.objectives.preference import PairwiseObjective
from guerdon.optim import Adam
from guerdon.roles import Role, RoleSettings
from guerdon.tasks.base import Pieces

ROUNDS = 30
SAMPLER = {"steps": 4, "guidance": 8.0}


def train(bias: float, certainty: float, seed: int = 0) -> tuple[list[float], list[torch.Tensor]]:
    """The mean reward of each round, and pictures of the same four prompts now and then."""
    task = tasks.find("shapes")(Pieces(reward="redness"))
    actor = Role("actor", task.policy("consistency"), RoleSettings(Adam(2e-4)))
    experience = Denoisings(task.prompts(), group_size=2, seed=seed)  # two pictures to each prompt
    teacher = BradleyTerry(task.feedback(), scale=certainty)  # says which of two it likes better, and errs
    objective = PairwiseObjective("cpl", beta=1.0, bias=bias, discount=0.99, reference_free=False)
    rewards, shown = [], []
    for number in range(ROUNDS):
        traj = experience.collect(actor, 64, **SAMPLER)
        traj = traj.with_(reference_log_prob=traj.log_prob)  # each round is held to the policy it began with
        pairs = label(traj[0::2], traj[1::2], teacher, seed=number)
        actor.update(pairs, objective)
        rewards.append(float(teacher.score(traj).mean()))  # for the plot alone: training never sees a score
        if number % 10 == 0 or number == ROUNDS - 1:
            shown.append(actor.sample(task.prompts()[:4], torch.arange(4), **SAMPLER).images)
    return rewards, shown


def main(path: str) -> None:
    """Three runs, one picture."""
    from matplotlib.figure import Figure

    arms = {
        "CPL, biased (0.5)": train(bias=0.5, certainty=50.0),
        "CPL, unbiased": train(bias=1.0, certainty=50.0),
        "a teacher that tosses coins": train(bias=0.5, certainty=0.0),
    }
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.25))
    for (name, (rewards, _)), colour in zip(arms.items(), ("#0072B2", "#56B4E9", "#999999"), strict=True):
        left.plot(range(1, len(rewards) + 1), rewards, label=name, color=colour, linewidth=2)
        print(f"{name:<30} reward {rewards[0]:.2f} -> {rewards[-1]:.2f}")
    left.set_xlabel("round (32 comparisons each)")
    left.set_ylabel("redness of the pictures")
    left.legend(frameon=False, fontsize=8)
    left.spines[["top", "right"]].set_visible(False)
    shown = arms["CPL, biased (0.5)"][1]
    labels = [f"round {min(10 * i + 1, ROUNDS)}" for i in range(len(shown))]
    right.imshow(grid(shown, labels=labels))
    right.axis("off")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpl_on_a_consistency_model.png")
