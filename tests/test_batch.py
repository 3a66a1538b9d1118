"""Batches: what the constructors refuse, slicing, joining, permuting, files; the same for every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

from guerdon.batch import (
    Batch,
    Preferences,
    Segments,
    Trajectories,
    Transitions,
    concatenate,
    decode_text,
    encode_text,
    pad_steps,
)
from guerdon.errors import DataError, ShapeError

PER_STEP = ("log_prob", "reward", "advantage", "target", "value", "reference_log_prob")


def make_fields(lengths: list[int], steps: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Every field of `Trajectories`, each per-step value telling its row and step (``row * 100 + step``)."""
    generator = torch.Generator().manual_seed(seed)
    B, T = len(lengths), max(steps or 1, *lengths, 1)
    mask = torch.arange(T)[None] < torch.tensor(lengths)[:, None]
    place = torch.arange(B)[:, None] * 100 + torch.arange(T)
    step = TensorDict(
        {
            "place": place,
            "wide": place[..., None, None].expand(B, T, 2, 3).float(),
            "deep": TensorDict({"place": place[..., None].expand(B, T, 2)}, batch_size=[B, T]),
        },
        batch_size=[B, T],
    )
    fields: dict[str, Any] = {name: place.float() * mask for name in PER_STEP}
    return fields | {
        "inputs": TensorDict(
            {"context": torch.randn(B, 3, generator=generator), "step": step}, batch_size=[B]
        ),
        "mask": mask,
        "group": torch.arange(B) // 2,
        "version": torch.full((B,), 7),
        "terminated": place % 3 == 0,
        "truncated": place % 5 == 0,
        "reference": TensorDict({"logits": place[..., None].expand(B, T, 4).float()}, batch_size=[B, T]),
        "outputs": TensorDict({"prompt": encode_text([f"row {i}" for i in range(B)])}, batch_size=[B]),
    }


def make(lengths: list[int], steps: int | None = None, seed: int = 0, **changes: Any) -> Trajectories:
    fields = make_fields(lengths, steps, seed) | changes
    return Trajectories(**{name: value for name, value in fields.items() if value is not None})


def transitions(rows: int = 5, **changes: Any) -> Transitions:
    fields: dict[str, Any] = {
        "observation": torch.randn(rows, 3),
        "action": torch.randn(rows, 2),
        "reward": torch.arange(rows).float(),
        "next_observation": torch.randn(rows, 3),
        "terminated": torch.zeros(rows, dtype=torch.bool),
        "discount": torch.full((rows,), 0.99),
        "index": torch.arange(rows),
    }
    return Transitions(**(fields | changes))


def segments(rows: int = 4, steps: int = 3, **changes: Any) -> Segments:
    fields: dict[str, Any] = {
        "observation": TensorDict({"eye": torch.randn(rows, steps, 2, 2)}, batch_size=[rows, steps]),
        "action": torch.randn(rows, steps, 2),
        "reward": torch.randn(rows, steps),
        "mask": torch.ones(rows, steps, dtype=torch.bool),
        "timestep": torch.arange(steps).expand(rows, steps),
    }
    return Segments(**(fields | changes))


def preferences(rows: int = 4, **changes: Any) -> Preferences:
    fields: dict[str, Any] = {
        "chosen": make([3, 1, 2, 3][:rows]),
        "rejected": make([2, 2, 1, 2][:rows]),
        "strength": torch.linspace(0.5, 1, rows),
        "annotator": torch.arange(rows),
    }
    return Preferences(**(fields | changes))


def leaves(batch: Any) -> dict[tuple[str, ...], Tensor]:
    """Every tensor of a batch by its path."""
    data = batch.to_tensordict()
    return {
        (key if isinstance(key, tuple) else (key,)): value
        for key, value in data.items(include_nested=True, leaves_only=True)
        if isinstance(value, Tensor)
    }


def assert_same(a: Any, b: Any) -> None:
    left, right = leaves(a), leaves(b)
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert value.dtype == right[key].dtype, key
        assert torch.equal(value, right[key]), key


# --- what constructors refuse -----------------------------------------------------------------------------

WRONG_TRAJECTORIES: list[tuple[str, Callable[[], Any], str]] = [
    ("log_prob", lambda: torch.zeros(2), r"log_prob has shape \[2\], expected two axes \[B, T\]"),
    ("reward", lambda: torch.zeros(2, 4), r"Trajectories.reward has shape \[2, 4\], expected \[2, 3\]"),
    ("reward", lambda: torch.zeros(2), r"Trajectories.reward has shape \[2\], expected \[2, 3\]"),
    ("advantage", lambda: torch.zeros(2, 3, 1), r"advantage has shape \[2, 3, 1\], expected \[2, 3\]"),
    ("value", lambda: torch.zeros(2, 3, dtype=torch.int64), "value is torch.int64, expected float"),
    ("mask", lambda: torch.ones(2, 3), "Trajectories.mask is torch.float32, expected bool"),
    ("terminated", lambda: torch.ones(2, 3, dtype=torch.int64), "terminated is torch.int64, expected bool"),
    ("group", lambda: torch.zeros(2), "Trajectories.group is torch.float32, expected int"),
    ("group", lambda: torch.zeros(3, dtype=torch.int64), "Trajectories.group has 3 rows, the batch has 2"),
    ("version", lambda: torch.zeros(2, 1, dtype=torch.int64), r"version has shape \[2, 1\], expected \[2\]"),
    ("group", lambda: torch.tensor(1), "Trajectories.group is a single number"),
    (
        "mask",
        lambda: torch.tensor([[True, True, True], [True, False, True]]),
        "Trajectories.mask: step 2 of row 1 is real but follows a masked step",
    ),
    (
        "mask",
        lambda: torch.tensor([[False, True, True], [True, True, False]]),
        "step 1 of row 0 is real but follows a masked step",
    ),
    ("reward", lambda: torch.tensor([[0, 0, 0], [0, float("inf"), 0]]), r"reward is inf at \[1, 1\]"),
    ("log_prob", lambda: torch.tensor([[float("nan"), 0, 0], [0, 0, 0.0]]), r"log_prob is nan at \[0, 0\]"),
    (
        "inputs",
        lambda: TensorDict({"step": TensorDict({"x": torch.zeros(2, 5)}, [2, 5])}, [2]),
        r"inputs\['step'\] has batch \[2, 5\], expected \[2, 3\]",
    ),
    (
        "inputs",
        lambda: TensorDict({"x": torch.zeros(3)}, [3]),
        "Trajectories.inputs has 3 rows, the batch has 2",
    ),
]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    WRONG_TRAJECTORIES,
    ids=[f"{w[0]}-{i}" for i, w in enumerate(WRONG_TRAJECTORIES)],
)
def test_trajectories_say_what_is_wrong(field: str, value: Callable[[], Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message) as caught:
        make([3, 2], **{field: value()})
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_masked_step_may_hold_anything() -> None:
    bad = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, float("nan")]])
    traj = make([3, 2], reward=bad, log_prob=bad.clone(), advantage=bad.clone())
    assert traj.score().tolist() == [3.0, 1.0]  # and it does not leak into sums


def test_only_the_first_three_fields_are_needed() -> None:
    traj = Trajectories(
        inputs=TensorDict({}, batch_size=[2]),
        log_prob=torch.zeros(2, 3),
        mask=torch.ones(2, 3, dtype=torch.bool),
    )
    assert traj.batch_size == torch.Size([2])
    assert (traj.steps, traj.lengths.tolist(), traj.prompts) == (3, [3, 3], ["", ""])
    for name, sentence in (("texts", "no text"), ("images", "no images")):
        with pytest.raises(KeyError, match=sentence):
            getattr(traj, name)
    with pytest.raises(ShapeError, match="not been judged"):
        traj.score()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": torch.tensor([0, 1, float("nan"), 0, 0])}, r"Transitions.reward is nan at \[2\]"),
        ({"reward": torch.zeros(5, 1)}, r"Transitions.reward has shape \[5, 1\], expected \[5\]"),
        ({"reward": torch.zeros(5, dtype=torch.int64)}, "Transitions.reward is torch.int64, expected float"),
        ({"terminated": torch.zeros(5)}, "Transitions.terminated is torch.float32, expected bool"),
        ({"index": torch.zeros(5)}, "Transitions.index is torch.float32, expected int"),
        ({"weight": torch.full((5,), float("inf"))}, r"Transitions.weight is inf at \[0\]"),
        ({"action": torch.zeros(4, 2)}, "Transitions.action has 4 rows, the batch has 5"),
    ],
)
def test_transitions_say_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        transitions(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": torch.zeros(4)}, r"Segments.reward has shape \[4\], expected two axes \[B, T\]"),
        ({"reward": torch.full((4, 3), float("nan"))}, r"Segments.reward is nan at \[0, 0\]"),
        ({"mask": torch.ones(4, 3)}, "Segments.mask is torch.float32, expected bool"),
        ({"mask": torch.tensor([[True, False, True]] * 4)}, "step 2 of row 0 is real but follows a masked"),
        ({"timestep": torch.zeros(4, 3)}, "Segments.timestep is torch.float32, expected int"),
        ({"action": torch.zeros(4, 2, 2)}, r"Segments.action has steps \[4, 2\], expected \[4, 3\]"),
    ],
)
def test_segments_say_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        segments(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected": make([1, 2])}, "Preferences.rejected has 2 rows, the batch has 4"),
        ({"strength": torch.zeros(4, 1)}, r"Preferences.strength has shape \[4, 1\], expected \[4\]"),
        (
            {"strength": torch.zeros(4, dtype=torch.int64)},
            "Preferences.strength is torch.int64, expected float",
        ),
        ({"annotator": torch.zeros(4)}, "Preferences.annotator is torch.float32, expected int"),
    ],
)
def test_preferences_say_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        preferences(**changes)


# --- rows: slicing, minibatches, joining ------------------------------------------------------------------

MAKERS: dict[str, Callable[[], Batch]] = {
    "trajectories": lambda: make([3, 1, 2, 3, 2]),
    "transitions": transitions,
    "segments": lambda: segments(5),
    "preferences": lambda: preferences(4),
}


@pytest.fixture(params=MAKERS, ids=str)
def any_batch(request: pytest.FixtureRequest) -> Batch:
    return MAKERS[request.param]()


def test_slices_take_the_same_rows_of_every_field(any_batch: Any) -> None:
    order = torch.tensor([3, 0, 2])
    taken, kept = any_batch[order], any_batch[1:3]
    assert type(taken) is type(any_batch)
    for key, value in leaves(any_batch).items():
        assert torch.equal(leaves(taken)[key], value[order])
        assert torch.equal(leaves(kept)[key], value[1:3])


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_minibatches_cover_each_row_once(any_batch: Any, size: int) -> None:
    rows = any_batch.batch_size[0]
    parts = list(any_batch.minibatches(size, torch.Generator().manual_seed(3)))
    sizes = [part.batch_size[0] for part in parts]
    assert sizes[:-1] == [size] * (len(sizes) - 1)
    assert sum(sizes) == rows
    key = {"Trajectories": "log_prob", "Preferences": "annotator"}.get(type(any_batch).__name__, "reward")
    seen = torch.cat([getattr(part, key).reshape(part.batch_size[0], -1) for part in parts])
    whole = getattr(any_batch, key).reshape(rows, -1)
    assert sorted(seen.tolist()) == sorted(whole.tolist())
    again = list(any_batch.minibatches(size, torch.Generator().manual_seed(3)))
    for one, other in zip(parts, again, strict=True):
        assert_same(one, other)


def test_minibatches_without_a_generator_keep_the_order(any_batch: Any) -> None:
    assert_same(torch.cat(list(any_batch.minibatches(2))), any_batch)


def test_minibatches_are_shuffled_by_the_generator() -> None:
    traj = make([1] * 50)
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.cat([p.inputs["step", "place"] for p in traj.minibatches(7, generator)]) for _ in "ab"
    )
    assert not torch.equal(first, second)
    assert not torch.equal(first, traj.inputs["step", "place"])


def test_cat_of_equal_widths() -> None:
    one, two = make([3, 1]), make([2, 3], seed=1)
    joined = torch.cat([one, two])
    assert joined.batch_size == torch.Size([4])
    assert_same(joined[:2], one)
    assert_same(joined[2:], two)


def test_concatenate_pads_steps_texts_and_prompts() -> None:
    def traj(lengths: list[int], words: list[str], width: int) -> Trajectories:
        B = len(lengths)
        inputs = make_fields(lengths)["inputs"]
        inputs["prompt_token"] = torch.arange(1, width + 1).expand(B, width).clone()
        inputs["prompt_mask"] = torch.ones(B, width, dtype=torch.bool)
        outputs = TensorDict({"prompt": encode_text(words), "text": encode_text(words[::-1])}, batch_size=[B])
        return make(lengths, inputs=inputs, outputs=outputs)

    parts = [traj([2, 1], ["no", "ünïcode"], 2), traj([4], ["a much longer prompt"], 5), traj([1], ["x"], 1)]
    joined = concatenate(parts)
    assert joined.log_prob.shape == (4, 4)
    assert joined.lengths.tolist() == [2, 1, 4, 1]
    assert joined.prompts == ["no", "ünïcode", "a much longer prompt", "x"]
    assert joined.texts == ["ünïcode", "no", "a much longer prompt", "x"]
    assert joined.inputs["prompt_token"].tolist() == [[0, 0, 0, 1, 2]] * 2 + [
        [1, 2, 3, 4, 5],
        [0, 0, 0, 0, 1],
    ]
    assert joined.inputs["prompt_mask"].sum(1).tolist() == [2, 2, 5, 1]
    assert joined.inputs["step", "deep", "place"].shape == (4, 4, 2)
    assert joined.reference.batch_size == torch.Size([4, 4])
    joined.check()
    for row, (part, own) in enumerate([(0, 0), (0, 1), (1, 0), (2, 0)]):
        steps = parts[part].steps
        for name in PER_STEP:
            assert torch.equal(getattr(joined, name)[row, :steps], getattr(parts[part], name)[own])
            assert not getattr(joined, name)[row, steps:].any()


def test_concatenate_refuses_what_does_not_belong_together() -> None:
    with pytest.raises(ShapeError, match="no trajectories to join"):
        concatenate([])
    with pytest.raises(ShapeError, match="cannot be joined"):
        concatenate([make([2]), make([2], reward=None)])
    widened = make([2])
    widened.inputs["prompt_token"] = torch.ones(1, 3)
    with pytest.raises(ShapeError, match="cannot be joined"):
        concatenate([widened, make([2])])
    with pytest.raises(ShapeError, match="cannot be joined"):
        concatenate([make([2]), make([2], outputs=None)])


def test_concatenate_leaves_its_parts_alone() -> None:
    one, two = make([1]), make([3])
    before = leaves(one)
    concatenate([one, two])
    assert one.steps == 1
    assert {k: v.shape for k, v in leaves(one).items()} == {k: v.shape for k, v in before.items()}


# --- steps: padding, permuting, selecting -----------------------------------------------------------------

LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=5)


@given(lengths=LENGTHS, extra=st.integers(0, 4))
def test_padding_changes_nothing_real(lengths: list[int], extra: int) -> None:
    traj = make(lengths)
    padded = pad_steps(traj, traj.steps + extra)
    padded.check()
    assert padded.steps == traj.steps + extra
    assert torch.equal(padded.lengths, traj.lengths)
    assert torch.equal(padded.score(), traj.score())
    assert not padded.mask[:, traj.steps :].any()
    assert_same(padded.select_steps(0, traj.steps), traj)


@given(lengths=LENGTHS, seed=st.integers(0, 1000))
def test_shuffled_steps_stay_together(lengths: list[int], seed: int) -> None:
    """Every per-step field, nested ones included, sees the same permutation; each row has its own."""
    traj = make(lengths)
    shuffled = traj.shuffle_steps(torch.Generator().manual_seed(seed))
    shuffled.check()  # real steps still come first
    assert torch.equal(shuffled.mask, traj.mask)
    place = shuffled.inputs["step", "place"]
    assert torch.equal(place.sort(1).values, traj.inputs["step", "place"])  # a permutation of each row
    for name in PER_STEP:
        assert torch.equal(getattr(shuffled, name), place.float() * shuffled.mask)
    assert torch.equal(shuffled.terminated, place % 3 == 0)
    assert torch.equal(shuffled.truncated, place % 5 == 0)
    step = shuffled.inputs["step"]
    assert torch.equal(step["wide"], place[..., None, None].expand(step["wide"].shape).float())
    assert torch.equal(step["deep", "place"], place[..., None].expand(step["deep", "place"].shape))
    assert torch.equal(shuffled.reference["logits"], place[..., None].expand(*place.shape, 4).float())
    assert torch.equal(shuffled.inputs["context"], traj.inputs["context"])
    assert torch.equal(shuffled.score(), traj.score())
    assert torch.equal(
        traj.inputs["step", "place"], make(lengths).inputs["step", "place"]
    )  # the original stays


def test_each_row_is_shuffled_by_an_order_of_its_own() -> None:
    place = make([8] * 16).shuffle_steps(torch.Generator().manual_seed(0)).inputs["step", "place"] % 100
    assert len({tuple(row) for row in place.tolist()}) > 12
    assert place.float().mean(0).std() < 1.5  # no step prefers a slot


@given(lengths=LENGTHS, seed=st.integers(0, 1000))
def test_a_permutation_can_be_undone(lengths: list[int], seed: int) -> None:
    traj = make(lengths)
    order = torch.rand(traj.log_prob.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
    assert_same(traj.permute_steps(order).permute_steps(order.argsort(1)), traj)


@given(lengths=LENGTHS, cut=st.integers(1, 4))
def test_selected_steps_join_to_the_whole(lengths: list[int], cut: int) -> None:
    traj = make(lengths)
    parts = [traj.select_steps(start, start + cut) for start in range(0, traj.steps, cut)]
    for name in (*PER_STEP, "mask", "terminated", "truncated"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts], dim=1), getattr(traj, name))
    step = torch.cat([p.inputs["step"] for p in parts], dim=1)
    assert torch.equal(step["deep", "place"], traj.inputs["step", "deep", "place"])
    assert sum(p.reference.batch_size[1] for p in parts) == traj.steps


@given(lengths=LENGTHS, seed=st.integers(0, 1000))
def test_a_score_is_placed_on_the_last_real_step(lengths: list[int], seed: int) -> None:
    traj = make(lengths, reward=None)
    score = torch.randn(len(lengths), generator=torch.Generator().manual_seed(seed))
    judged = traj.judged(score)
    for row, length in enumerate(lengths):
        wanted = torch.zeros(traj.steps)
        wanted[max(length - 1, 0)] = score[row]
        assert torch.equal(judged.reward[row], wanted)
    has_steps = torch.tensor(lengths) > 0
    assert torch.equal(judged.score(), torch.where(has_steps, score, 0.0))
    assert traj.reward is None


def test_judged_takes_rewards_of_steps_as_they_are() -> None:
    traj = make([3, 1], reward=None)
    rewards = torch.tensor([[1.0, 2.0, 3.0], [4.0, float("nan"), 5.0]])  # what is masked does not count
    assert traj.judged(rewards).reward.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert traj.judged(rewards.double()).score().tolist() == [6.0, 4.0]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (torch.zeros(3), r"Trajectories.reward has shape \[3\], expected \[2, 3\]"),
        (torch.zeros(2, 2), r"Trajectories.reward has shape \[2, 2\], expected \[2, 3\]"),
        (torch.tensor([0.0, float("nan")]), r"Trajectories.reward is nan at \[1\]"),
        (torch.full((2, 3), float("inf")), r"Trajectories.reward is inf at \[0, 0\]"),
    ],
)
def test_judged_refuses(score: Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        make([3, 1]).judged(score)


def test_with_shares_tensors_and_leaves_the_original() -> None:
    traj = make([2, 2])
    changed = traj.with_(advantage=torch.ones(2, 2))
    assert changed.log_prob.data_ptr() == traj.log_prob.data_ptr()
    assert not torch.equal(traj.advantage, changed.advantage)


def test_per_step_repeats_over_real_steps() -> None:
    values = make([2, 1]).per_step(torch.tensor([3.0, float("inf")]))
    assert values.tolist() == [[3, 3], [float("inf"), 0]]


# --- files ------------------------------------------------------------------------------------------------


def test_a_file_gives_back_the_batch(any_batch: Any, tmp_path: Path) -> None:
    path = tmp_path / "batch.safetensors"
    any_batch.save_file(path)
    loaded = type(any_batch).load_file(path)
    assert type(loaded) is type(any_batch)
    assert loaded.batch_size == any_batch.batch_size
    assert_same(loaded, any_batch)
    loaded.check()


def test_nested_batches_keep_class_and_shape(tmp_path: Path) -> None:
    pairs = preferences()
    pairs.save_file(tmp_path / "p.safetensors")
    loaded = Preferences.load_file(tmp_path / "p.safetensors")
    assert isinstance(loaded.chosen, Trajectories)
    assert loaded.chosen.inputs["step"].batch_size == torch.Size([4, 3])
    assert loaded.chosen.inputs["step", "deep"].batch_size == torch.Size([4, 3])
    assert loaded.rejected.prompts == pairs.rejected.prompts
    part = next(loaded.minibatches(2))
    assert part.rejected.shuffle_steps().batch_size == torch.Size([2])


def test_absent_fields_stay_absent(tmp_path: Path) -> None:
    make([2], reward=None, outputs=None, reference=None).save_file(tmp_path / "t.safetensors")
    loaded = Trajectories.load_file(tmp_path / "t.safetensors")
    assert loaded.reward is None
    assert loaded.outputs is None
    assert loaded.reference is None


def test_views_of_one_block_can_be_saved(tmp_path: Path) -> None:
    chain = torch.randn(4, 1, 2).transpose(0, 1)  # a denoising chain of one row: state and next overlap
    step = TensorDict({"state": chain[:, :-1], "next": chain[:, 1:]}, batch_size=[1, 3])
    same = torch.zeros(1, 3)
    traj = make([3], inputs=TensorDict({"step": step}, batch_size=[1]), value=same, target=same)
    traj.save_file(tmp_path / "t.safetensors")
    loaded = Trajectories.load_file(tmp_path / "t.safetensors")
    assert torch.equal(loaded.inputs["step", "state"], chain[:, :-1])
    assert torch.equal(loaded.inputs["step", "next"], chain[:, 1:])


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "batch.safetensors"
    transitions().save_file(path)
    with pytest.raises(DataError, match=r"batch.safetensors holds Transitions, expected Trajectories"):
        Trajectories.load_file(path)
    with pytest.raises(DataError, match=r"missing.safetensors: not a readable safetensors file"):
        Transitions.load_file(tmp_path / "missing.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="not a readable safetensors file"):
        Transitions.load_file(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, str(path))
    with pytest.raises(DataError, match="holds no batch, expected Transitions"):
        Transitions.load_file(path)


# --- texts ------------------------------------------------------------------------------------------------


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), max_size=5))
def test_texts_come_back(texts: list[str]) -> None:
    encoded = encode_text(texts)
    assert encoded.dtype == torch.uint8
    assert encoded.shape[0] == len(texts)
    assert decode_text(encoded) == texts


def test_text_is_utf8_padded_with_zeros() -> None:
    encoded = encode_text(["é", "abc", "", "日本"])
    assert encoded.shape == (4, 6)
    assert encoded[0].tolist() == [0xC3, 0xA9, 0, 0, 0, 0]
    assert not encoded[2].any()


def test_half_a_character_is_refused_in_a_sentence() -> None:
    with pytest.raises(DataError, match=r"'bad \\ud83d' is no valid Unicode"):
        encode_text(["good", "bad \ud83d"])
