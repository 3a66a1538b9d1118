"""Directions in reward space: how they are drawn, written and read."""

from __future__ import annotations

import pytest
import torch

from guerdon.errors import DataError, ShapeError, UsageError
from guerdon.experience.completions import Completions
from guerdon.experience.directions import (
    DirectionalPrompt,
    DirectionSampler,
    answer_prompts,
    at_angles,
    objective_weights,
    reprompted,
)
from guerdon.tasks import topics


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the sampler ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5])
def test_directions_have_unit_length_and_stay_in_their_range(size: int) -> None:
    sampler = DirectionSampler(size, spread=40, centre=-30)
    drawn = sampler.draw(200, 4, generator())
    assert drawn.shape == (200, 4, size)
    assert torch.allclose(drawn.norm(dim=-1), torch.ones(200, 4), atol=1e-5)
    centre = torch.zeros(size)
    centre[:2] = at_angles([-30.0])[0]
    angle = (drawn @ centre).clamp(-1, 1).acos().rad2deg()
    assert angle.max() <= 40.01
    assert angle.max() > 38


def test_directions_may_have_negative_components_and_cover_the_angles_evenly() -> None:
    drawn = DirectionSampler(2, spread=45).draw(500, 8, generator())
    angle = torch.atan2(drawn[..., 1], drawn[..., 0]).rad2deg()
    assert (drawn[..., 1] < 0).float().mean() == 0.5
    counts = torch.histc(angle, 6, -45, 45)
    assert counts.min() > 0.9 * counts.mean()
    # one of the eight in each eighth of the range
    assert torch.equal(((angle + 45) / 11.25).long().clamp(max=7), torch.arange(8).expand(500, 8))


def test_on_a_sphere_directions_are_uniform_within_the_cap() -> None:
    drawn = DirectionSampler(3, spread=60).draw(1, 20_000, generator())[0]
    # Archimedes: heights above the equator are uniform on a sphere in three dimensions
    height = drawn[:, 0]
    assert height.mean().item() == pytest.approx(0.75, abs=0.01)
    assert height.var().item() == pytest.approx(0.5**2 / 12, rel=0.05)
    assert drawn[:, 1:].mean(0).abs().max() < 0.02


def test_a_single_direction_is_the_centre_where_the_range_is_empty() -> None:
    assert torch.allclose(DirectionSampler(2, spread=0).draw(2, 1), torch.tensor([1.0, 0.0]))
    assert torch.allclose(DirectionSampler(3, spread=0).draw(1, 1), torch.tensor([1.0, 0.0, 0.0]))


def test_the_sampler_refuses_what_is_no_range_of_directions() -> None:
    with pytest.raises(UsageError, match="at least 2"):
        DirectionSampler(1)
    with pytest.raises(UsageError, match="0 to 180"):
        DirectionSampler(2, spread=200)


# --- the prompt -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("angle", "numbers"), [(-15, (97, -26)), (15, (97, 26)), (0, (100, 0)), (45, (71, 71)), (-45, (71, -71))]
)
def test_directions_are_written_in_whole_hundredths_and_read_back(
    angle: float, numbers: tuple[int, int]
) -> None:
    prompt = DirectionalPrompt()
    v = at_angles([angle])[0]
    text = prompt.write("Why is the sky blue?", v)
    assert f"weighted rating = helpfulness*{numbers[0]} + verbosity*{numbers[1]}." in text
    assert text.endswith("\nWhy is the sky blue?")
    found = prompt.read(text)
    assert found.norm().item() == pytest.approx(1)
    assert torch.allclose(found, v, atol=0.006)


def test_a_direction_goes_where_the_prompt_wants_it() -> None:
    prompt = DirectionalPrompt(("a", "b", "c"), "[{rating}]")
    chat = "<system>Be kind. {direction}</system> Hello {name}"
    assert prompt.write(chat, [0, 0.6, -0.8]) == "<system>Be kind. [a*0 + b*60 + c*-80]</system> Hello {name}"
    assert prompt.plain(chat) == "<system>Be kind. </system> Hello {name}"
    assert torch.allclose(prompt.read(prompt.write(chat, [0, 0.6, -0.8])), torch.tensor([0, 0.6, -0.8]))


def test_what_is_no_direction_is_refused() -> None:
    prompt = DirectionalPrompt()
    for wrong in ([0.5, 0.5], [1.0], [1.0, 0.0, 0.0]):  # weights that sum to 1 are no direction
        with pytest.raises(ShapeError, match="unit vector"):
            prompt.write("x", wrong)
    for text in (
        "no numbers",
        "helpfulness*5",
        "unhelpfulness*1 + verbosity*2",
        "helpfulness*0 + verbosity*0",
    ):
        with pytest.raises(DataError, match="no direction"):
            prompt.read(text)
    with pytest.raises(UsageError, match="rating"):
        DirectionalPrompt(system="be good")
    with pytest.raises(UsageError, match="single words"):
        DirectionalPrompt(("two words", "b"))


# --- answers behind other prompts -------------------------------------------------------------------------


def test_reprompted_answers_are_the_same_tokens_behind_another_prompt() -> None:
    policy = topics.fresh_policy(0, 16, 1)
    asked, _ = topics.prompts()
    traj = policy.sample(asked[:5], torch.arange(5), group=torch.arange(5), max_new_tokens=6)
    texts = [topics.RENDERER.write(text, [0.6, 0.8]) for text in asked[:5]]
    moved = reprompted(policy, traj, texts)
    assert moved.prompts == texts
    assert moved.texts == traj.texts
    assert torch.equal(moved.group, traj.group)
    for row in range(5):
        length = int(traj.lengths[row])
        assert moved.lengths[row] == length
        assert torch.equal(
            moved.inputs["step", "token"][row, :length], traj.inputs["step", "token"][row, :length]
        )
        prompt = moved.inputs["prompt_token"][row][moved.inputs["prompt_mask"][row]].tolist()
        assert prompt == policy.tokens(texts[row])
    back = reprompted(policy, moved, asked[:5])
    assert torch.allclose(policy.log_prob(back).sum(1), policy.log_prob(traj).sum(1), atol=1e-5)
    with pytest.raises(ShapeError, match="4 prompts for 5 answers"):
        reprompted(policy, traj, texts[:4])


def test_answers_to_written_prompts_take_the_noise_of_the_experience() -> None:
    policy = topics.fresh_policy(0, 16, 1)
    asked, _ = topics.prompts()
    plain, written = Completions(asked[:3], seed=5), Completions(asked[:3], seed=5)
    expected = plain.collect(policy, 4, max_new_tokens=4)
    places = written.prompts.draw(4)
    found = answer_prompts(written, policy, [asked[p] for p in places], places, max_new_tokens=4)
    assert torch.equal(found.inputs["step", "token"], expected.inputs["step", "token"])
    assert torch.equal(found.group, expected.group)
    assert written.state_dict() == plain.state_dict()


def test_outputs_of_a_reward_model_are_averaged_into_objectives() -> None:
    scores = torch.tensor([[3.0, 6.0, 100.0, 100.0, 7.0, 9.0]])
    assert torch.allclose(scores @ objective_weights("0,1,5; 4", 2, 6), torch.tensor([[6.0, 7.0]]))
    assert torch.equal(objective_weights("", 3, 3), torch.eye(3))
    for outputs in ("", "0", "0;6", "0;", "0;x", "0;-1", "0;1;2"):
        with pytest.raises(UsageError, match="6 outputs"):
            objective_weights(outputs, 2, 6)
