"""Judges that are functions: image rewards, a user's own file, sums, CLIP and the aesthetic head."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon.batch import Trajectories, encode_text
from guerdon.errors import FeedbackError, UsageError
from guerdon.feedback.base import Feedback, checked_scores
from guerdon.feedback.functions import (
    IMAGE_REWARDS,
    Aesthetic,
    Alignment,
    FunctionReward,
    MixedReward,
    clip_from_pretrained,
    compressibility,
    incompressibility,
    jpeg_kilobytes,
    parse_reward,
    redness,
    user_function,
)

PROMPTS = ["a red circle", "a blue ring", "ein grüner Würfel"]


def traj(prompts: list[str] | None = None, **outputs: Tensor) -> Trajectories:
    prompts = PROMPTS if prompts is None else prompts
    B = len(prompts)
    return Trajectories(
        inputs=TensorDict({}, batch_size=[B]),
        log_prob=torch.zeros(B, 2),
        mask=torch.ones(B, 2, dtype=torch.bool),
        outputs=TensorDict({"prompt": encode_text(prompts), **outputs}, batch_size=[B]),
    )


def pictures(count: int = 3, size: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, size, size, 3), generator=generator).to(torch.uint8)


# --- image rewards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "factor"), [(16, 4), (63, 4), (64, 1), (96, 1)])
def test_jpeg_size_is_pillows(size: int, factor: int) -> None:
    images = pictures(2, size).numpy()
    for pixels, kilobytes in zip(images, jpeg_kilobytes(images), strict=True):
        picture = Image.fromarray(pixels)
        if factor > 1:
            picture = picture.resize((size * factor, size * factor), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=95)
        assert kilobytes == pytest.approx(len(file.getvalue()) / 1000, abs=1e-6)


def test_jpeg_size_with_a_factor_and_a_quality_of_ones_own() -> None:
    images = pictures(1, 16).numpy()
    assert jpeg_kilobytes(images, enlarge=1) < jpeg_kilobytes(images)
    assert jpeg_kilobytes(images, quality=10) < jpeg_kilobytes(images)


def test_flat_pictures_compress_better_than_noise() -> None:
    flat = np.full((16, 16, 3), 200, np.uint8)
    half = flat.copy()
    half[:8] = 30
    images = np.stack([flat, half, pictures(1)[0].numpy()])
    scores = compressibility(images, [""] * 3)
    assert scores[0] > scores[1] > scores[2]
    assert (scores < 0).all()
    np.testing.assert_array_equal(incompressibility(images, [""] * 3), -scores)


def test_redness_looks_at_the_left_half() -> None:
    images = np.zeros((6, 4, 4, 3), np.uint8)
    images[0, :, :2, 0] = 255  # left red
    images[1, :, 2:, 0] = 255  # right red
    images[2] = 255  # white
    images[3, ..., 1] = 255  # green
    images[4, :, 0, 0] = 255  # a quarter red
    np.testing.assert_allclose(redness(images, [""] * 6), [1, 0, 0, -0.5, 0.5, 0], atol=1e-6)


@pytest.mark.parametrize("name", IMAGE_REWARDS)
def test_image_rewards_are_judges(name: str) -> None:
    judge = FunctionReward(IMAGE_REWARDS[name], name)
    assert isinstance(judge, Feedback)
    scores = judge.score(traj(image=pictures()))
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores, IMAGE_REWARDS[name](pictures().numpy(), PROMPTS), rtol=1e-6)


# --- what a function is given and what it may answer ------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [[1, 2, 3], (1.0, 2.0, 3.0), np.arange(1, 4), torch.arange(1, 4), np.float64([1, 2, 3]), [True, 2, 3.0]],
    ids=["ints", "tuple", "array", "tensor", "float64", "mixed"],
)
def test_any_list_of_numbers_will_do(answer: Any) -> None:
    scores = FunctionReward(lambda images, prompts: answer).score(traj(image=pictures()))
    assert scores.tolist() == [1.0, 2.0, 3.0]
    assert scores.dtype == torch.float32


def test_arguments_are_given_by_name() -> None:
    made = traj(
        image=pictures(),
        text=encode_text(["x", "yy", "zzz"]),
        action=torch.tensor([[1], [2], [3]]),
    )
    seen: dict[str, Any] = {}

    def everything(prompts: Any, traj: Any, texts: Any, images: Any, actions: Any, extra: float = 2.0) -> Any:
        seen.update(prompts=prompts, traj=traj, texts=texts, images=images, actions=actions)
        return [extra] * 3

    assert FunctionReward(everything).score(made).tolist() == [2.0] * 3
    assert seen["prompts"] == PROMPTS
    assert seen["texts"] == ["x", "yy", "zzz"]
    assert seen["images"].dtype == np.uint8
    assert seen["images"].shape == (3, 16, 16, 3)
    assert seen["actions"].tolist() == [[1], [2], [3]]
    assert seen["traj"] is made
    assert FunctionReward(lambda completions: [len(t) for t in completions]).score(made).tolist() == [1, 2, 3]


def test_two_arguments_of_any_name_are_what_was_made_and_the_prompts() -> None:
    judge = FunctionReward(lambda a, b: [len(x) + 100 * (str(x) == y) for x, y in zip(a, b, strict=True)])
    assert judge.score(traj(text=encode_text(["x", "a blue ring", "zzz"]))).tolist() == [1, 111, 3]
    assert judge.score(traj(image=pictures())).tolist() == [16, 16, 16]
    with pytest.raises(UsageError, match=r"takes 3 arguments; expected score\(images, prompts\)"):
        FunctionReward(lambda a, b, c: 0)
    with pytest.raises(UsageError, match="takes 0 arguments"):
        FunctionReward(lambda: 0)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda images, prompts: 0, "judges images, but this policy makes none"),
        (lambda texts: 0, "judges texts, but this policy makes none"),
        (lambda actions, prompts: 0, "judges actions, but this policy records none"),
    ],
)
def test_a_judge_of_something_else_is_refused(function: Callable[..., Any], what: str) -> None:
    with pytest.raises(FeedbackError, match=what):
        FunctionReward(function, "mine").score(traj())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, 2.0], "reward 'mine' returned 2 values for 3 samples; return one float a sample"),
        (np.zeros((3, 1)), r"reward 'mine' returned shape \[3, 1\] for 3 samples"),
        (3.0, r"reward 'mine' returned shape \[\] for 3 samples"),
        ([1, float("nan"), 3], "reward 'mine' returned nan for the prompt 'a blue ring'"),
        (torch.tensor([1, 2, float("inf")]), "reward 'mine' returned inf for the prompt 'ein grüner Würfel'"),
        ([1, None, 3], "reward 'mine' returned nan for the prompt 'a blue ring'"),
        (["good", "bad", "ugly"], "reward 'mine' must return 3 floats, got list"),
        ({"a": 1}, "reward 'mine' must return 3 floats, got dict"),
        ([[1], [2, 3], [4]], "reward 'mine' must return 3 floats, got list"),
        (None, "reward 'mine' returned nothing; return 3 floats"),
    ],
)
def test_a_wrong_answer_is_told(answer: Any, message: str) -> None:
    with pytest.raises(FeedbackError, match=message) as caught:
        FunctionReward(lambda images, prompts: answer, "mine").score(traj(image=pictures()))
    assert "\n" not in str(caught.value)


def test_checked_scores_do_not_keep_a_graph() -> None:
    leaf = torch.ones(3, requires_grad=True)
    assert not checked_scores(leaf * 2, PROMPTS, "mine").requires_grad


# --- a user's own file ------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def make(text: str, name: str = "mine.py") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return make


def test_a_function_of_a_file(write: Callable[..., Path]) -> None:
    path = write(
        "import numpy as np\nWEIGHT = 2\n\ndef score(images, prompts):\n"
        "    return [WEIGHT * len(p) + float(np.mean(i)) for i, p in zip(images, prompts)]\n"
    )
    judge = user_function(f"{path}:score")
    assert judge.name == "mine.py:score"
    wanted = 2 * np.array([len(p) for p in PROMPTS]) + pictures().numpy().mean((1, 2, 3))
    np.testing.assert_allclose(judge.score(traj(image=pictures())), wanted, rtol=1e-5)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no reward file at '.*nope.py' \(from --reward .*nope.py:score\)"):
        user_function(f"{tmp_path}/nope.py:score")
    with pytest.raises(UsageError, match="no reward file"):
        user_function(f"{tmp_path}:score")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_the_kind\n", r"mine.py cannot be imported: ModuleNotFoundError: .*nothing_of"),
        ("x = 1\ny = 1 / 0\n", r"mine.py cannot be imported: ZeroDivisionError: .*\(mine.py, line 2\)"),
        ("def score(:\n", r"mine.py cannot be imported: SyntaxError: .*\(mine.py, line 1\)"),
        ("import sys\nsys.exit(3)\n", "mine.py cannot be imported: SystemExit: 3"),
    ],
)
def test_a_file_that_cannot_be_imported(text: str, message: str, write: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=message):
        user_function(f"{write(text)}:score")


def test_a_file_that_is_no_python_file(write: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"mine.txt' is not a Python file"):
        user_function(f"{write('hello', 'mine.txt')}:score")


def test_a_missing_function_names_the_nearest(write: Callable[..., Path]) -> None:
    path = write("def score_images(images, prompts): ...\nscores = 3\n")
    with pytest.raises(UsageError, match=r"no function 'score_image'; did you mean 'score_images'\?"):
        user_function(f"{path}:score_image")
    with pytest.raises(UsageError, match="defines no function 'scores'"):
        user_function(f"{path}:scores")


def test_a_function_that_raises_is_named_with_its_line(write: Callable[..., Path]) -> None:
    path = write(
        "def helper(p):\n    raise KeyError(p)\n\n\n"
        "def score(images, prompts):\n    return [helper(p) for p in prompts]\n"
    )
    with pytest.raises(FeedbackError) as caught:
        user_function(f"{path}:score").score(traj(image=pictures()))
    assert str(caught.value) == "reward 'mine.py:score' raised KeyError: 'a red circle' (mine.py, line 2)"
    assert isinstance(caught.value.__cause__, KeyError)


# --- names and sums ---------------------------------------------------------------------------------------


def constant(value: float, name: str) -> Callable[[], FunctionReward]:
    return lambda: FunctionReward(lambda images, prompts: [value] * len(prompts), name)


KNOWN: dict[str, Callable[..., Feedback]] = {
    "one": constant(1.0, "one"),
    "ten": constant(10.0, "ten"),
    "given": lambda argument="5": constant(float(argument), "given")(),
}


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        ("one", 1),
        (" one ", 1),
        ("one + ten", 11),
        ("one+ten", 11),
        ("one + 0.5*ten", 6),
        ("2 * one + .5 * ten + one", 8),
        ("1e-1*ten", 1),
        ("-1*one", -1),
        ("ten + -2*one", 8),
        ("given", 5),
        ("given=7", 7),
        ("one + 2*given=3", 7),
    ],
)
def test_names_weights_and_arguments(spec: str, value: float) -> None:
    scores = parse_reward(spec, KNOWN).score(traj(image=pictures()))
    assert scores.tolist() == pytest.approx([value] * 3)


def test_a_file_in_a_sum(write: Callable[..., Path]) -> None:
    path = write("def score(images, prompts):\n    return [100.0] * len(prompts)\n")
    assert parse_reward(f"one + 0.5*{path}:score", KNOWN).score(traj(image=pictures())).tolist() == [51.0] * 3


def test_a_file_whose_path_holds_a_plus(tmp_path: Path) -> None:
    folder = tmp_path / "c++ 2*x"
    folder.mkdir()
    (folder / "mine.py").write_text("def score(images, prompts):\n    return [7.0] * len(prompts)\n")
    assert parse_reward(f"{folder}/mine.py:score", KNOWN).score(traj(image=pictures())).tolist() == [7.0] * 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tenn", r"unknown reward 'tenn'; did you mean 'ten'\? \(or file.py:function\)"),
        ("one + tenn", "unknown reward 'tenn'"),
        ("qqqqq", "unknown reward 'qqqqq'; known: given, one, ten"),
        ("x*one", r"unknown reward 'x\*one'"),
        ("", "--reward ''"),
        ("one +", r"--reward 'one \+'"),
        ("one=3", "--reward 'one=3': 'one' takes no argument"),
        ("nope.py:score", "no reward file at 'nope.py'"),
    ],
)
def test_other_texts_are_refused(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_reward(spec, KNOWN)


def test_a_sum_remembers_its_parts() -> None:
    mixed = parse_reward("one + 0.5*ten", KNOWN)
    assert isinstance(mixed, MixedReward)
    assert mixed.name == "one + 0.5*ten"
    mixed.score(traj(image=pictures()))
    assert mixed.parts == {"one": 1.0, "ten": 10.0}
    assert not isinstance(parse_reward("one", KNOWN), MixedReward)


# --- judges with a model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of transformers small enough for a test, with its tokenizer and processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = sorted({c for p in PROMPTS for c in p if c.isascii() and c != " "})
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 24, "eos_token_id": len(vocabulary) - 1}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**tiny, **text, "bos_token_id": len(vocabulary) - 2, "projection_dim": 12},
            vision_config={**tiny, "image_size": 16, "patch_size": 8, "projection_dim": 12},
            projection_dim=12,
        )
    )
    for parameter in model.parameters():  # large enough that pictures and prompts differ
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    sizes = {"shortest_edge": 16}, {"height": 16, "width": 16}
    CLIPImageProcessor(size=sizes[0], crop_size=sizes[1]).save_pretrained(folder)
    return folder


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def embeddings(folder: Path, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Unit-norm embeddings by transformers' own forward pass, pixels normalised by hand."""
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    pixels = ((images.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    tokens = tokenizer(prompts, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=pixels, **tokens)
    return out.image_embeds, out.text_embeds


def test_alignment_is_clips_cosine(clip_folder: Path) -> None:
    images = pictures()
    prompts = ["a red circle", "a blue ring", "a red ring " * 20]  # the last is cut to what the model takes
    image, text = embeddings(clip_folder, images, prompts)
    judge = Alignment(clip_from_pretrained(str(clip_folder)), scale=100.0)
    scores = judge.score(traj(prompts, image=images))
    torch.testing.assert_close(scores, 100 * (image * text).sum(-1), atol=1e-3, rtol=1e-4)
    assert scores.std() > 1e-2
    assert not scores.requires_grad
    single = judge.score(traj(prompts[1:2], image=images[1:2]))
    torch.testing.assert_close(single, scores[1:2], atol=1e-3, rtol=1e-4)  # padding does not matter


def head_weights(width: int = 12) -> dict[str, Tensor]:
    """Weights under the published head's names: dropout lies between, so numbers skip."""
    torch.manual_seed(1)
    widths = [width, 10, 6, 4, 1]
    state = {}
    for number, i, o in zip((0, 2, 4, 6), widths, widths[1:], strict=False):
        state |= {f"layers.{number}.weight": torch.randn(o, i), f"layers.{number}.bias": torch.randn(o)}
    return state


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_aesthetic_is_the_heads_rating_of_unit_features(
    suffix: str, clip_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    state, path = head_weights(), tmp_path / f"head{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, str(path))
    images = pictures(seed=4)
    hidden, _ = embeddings(clip_folder, images, PROMPTS[:1])
    torch.testing.assert_close(hidden.norm(dim=-1), torch.ones(3))
    for number in (0, 2, 4, 6):  # linear all the way, as published
        hidden = hidden @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
    scores = Aesthetic(path, str(clip_folder)).score(traj(image=images))
    torch.testing.assert_close(scores, hidden[:, 0], atol=1e-3, rtol=1e-4)
    assert scores.std() > 1e-3


def test_aesthetic_heads_that_do_not_fit(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no aesthetic head at '.*none.pth'"):
        Aesthetic(tmp_path / "none.pth", str(clip_folder))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"other.pth holds no 'layers.N.weight'"):
        Aesthetic(tmp_path / "other.pth", str(clip_folder))
    torch.save(head_weights(20), tmp_path / "wide.pth")
    with pytest.raises(UsageError, match=r"wide.pth judges features of width 20, but .* makes 12"):
        Aesthetic(tmp_path / "wide.pth", str(clip_folder))
    torch.save({"layers.0.weight": torch.zeros(3)}, tmp_path / "odd.pth")
    with pytest.raises(UsageError, match="not an aesthetic head: layer 0"):
        Aesthetic(tmp_path / "odd.pth", str(clip_folder))
    torch.save(head_weights(), tmp_path / "good.pth")
    with pytest.raises(UsageError, match="no CLIP model at"):
        Aesthetic(tmp_path / "good.pth", str(tmp_path / "no_clip"))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("a file ran code",))


@pytest.mark.parametrize("name", ["head.pth", "head.safetensors"])
def test_a_head_cannot_run_code_or_be_garbage(
    name: str, clip_folder: Path, tmp_path: Path, capfd: Any
) -> None:
    path = tmp_path / name
    torch.save({"layers.0.weight": Bomb()}, path)
    with pytest.raises(UsageError, match="holds no weights that can be read"):
        Aesthetic(path, str(clip_folder))
    path.write_bytes(b"garbage")
    with pytest.raises(UsageError, match="holds no weights that can be read"):
        Aesthetic(path, str(clip_folder))
    assert "ran code" not in capfd.readouterr().out
