"""An exported controller acts as the torch policy does."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from guerdon.critics.greedy import Greedy
from guerdon.errors import UsageError
from guerdon.export import export, to_c
from guerdon.policies.control import (
    Categorical,
    Controller,
    Deterministic,
    Gaussian,
    SquashedGaussian,
    load_controller,
)
from guerdon.policies.features import ACTIVATIONS, Entry, Features
from guerdon.policies.small import SmallController, SmallNetwork

ROWS = 200


def features(activation: Any = "tanh", size: int = 5, **options: Any) -> Features:
    return Features({"": Entry((size,))}, (16, 12), activation, **options)


def lively(controller: Controller) -> Controller:
    """With weights as after training, so that actions differ: biases, wide heads, statistics of observations."""
    with torch.no_grad():
        for p in controller.parameters():
            p.add_(0.4 * torch.randn_like(p))
        if isinstance(controller, Greedy):
            raw = controller.q_raw(observations(controller))  # so that no action is the best everywhere
            controller.head.bias -= raw.mean(0).flatten()
        scaler = getattr(controller.features, "scaler", None)
        if scaler is not None and list(controller.features.entries) == [""]:
            scaler.update(observations(controller) * 3 + 1)
        if isinstance(controller, SmallController):
            controller.mean.copy_(torch.randn_like(controller.mean))
            controller.variance.copy_(torch.rand_like(controller.variance) + 0.1)
    return controller


def observations(controller: Controller) -> Tensor:
    """``[ROWS, *shape]``, some of them far out, so that clips are reached."""
    if isinstance(controller, SmallController):
        shape = (controller.features.shape[0] - controller.timed,)
    else:
        shape = controller.features.entries[""].shape
    far = torch.where(torch.rand(ROWS, 1) < 0.2, 30.0, 2.0)
    return far.view(ROWS, *[1] * len(shape)) * torch.randn(ROWS, *shape)


def wide(head: str) -> Greedy:
    return Greedy(features("elu"), 4, head, {"low": -20.0, "high": 30.0, "bins": 21})


def small(head: str, outputs: int, **options: Any) -> SmallController:
    network = SmallNetwork((6,), outputs, (16, 16), generator=torch.Generator().manual_seed(0))
    return SmallController(network, head, **options)


RANGE = ([-2.0, -1.0, 0.5], [2.0, 3.0, 0.75])
CONTROLLERS: dict[str, Any] = {
    "categorical": lambda: Categorical(features(), 4),
    "categorical, normalised": lambda: Categorical(features(normalise=True), 4),
    "dials": lambda: Categorical(features("silu"), [3, 5, 2]),
    "gaussian": lambda: Gaussian(features(normalise=True), *RANGE),
    "gaussian without a range": lambda: Gaussian(features(), [-math.inf] * 3, [math.inf] * 3),
    "gaussian on a matrix": lambda: Gaussian(Features({"": Entry((2, 3))}, (8,), "elu"), *RANGE),
    "squashed": lambda: SquashedGaussian(features("relu", normalise=True), *RANGE),
    "deterministic": lambda: Deterministic(features("relu"), *RANGE),
    "no hidden layer": lambda: Deterministic(Features({"": Entry((3,))}, ()), *RANGE),
    "layer norm": lambda: Deterministic(features("elu", layer_norm=True), *RANGE),
    "greedy": lambda: Greedy(features("silu"), 4),
    **{
        f"greedy, {head}": lambda head=head: wide(head)
        for head in ("hl_gauss", "two_hot", "c51", "mse_softmax")
    },
    **{a: lambda a=a: Deterministic(features(a), *RANGE) for a in ACTIVATIONS},
    "small choice": lambda: small("choice", 4),
    "small normal, timed": lambda: small("normal", 4, timed=True),
    "small greedy, timed": lambda: small("greedy", 3, timed=True),
}


@pytest.fixture(params=CONTROLLERS)
def controller(request: pytest.FixtureRequest) -> Controller:
    torch.manual_seed(7)
    return lively(CONTROLLERS[request.param]())


def expected(controller: Controller, observation: Any) -> np.ndarray:
    """What the policy does, clipped as the environment would."""
    with torch.no_grad():
        action = controller.mode(observation).numpy()
    if isinstance(controller, Gaussian):
        action = np.clip(action, np.float32(controller.low), np.float32(controller.high))
    return action


def agree(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert (
        len(np.unique(wanted.round(3), axis=0)) > 2
    )  # a controller that always does the same proves nothing
    if wanted.dtype == np.int64:
        assert (found == wanted).mean() > 0.99  # a tie may break the other way
    else:
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


# --- C ----------------------------------------------------------------------------------------------------

STRICT = ["-Wall", "-Wextra", "-Wconversion", "-Wdouble-promotion", "-Wshadow", "-pedantic", "-Werror", "-O2"]
COMPILERS = {"gcc": "-std=c99", "g++": "-std=c++11"}


def compiled(controller: Controller, folder: Path, compiler: str = "gcc") -> Any:
    """The exported function in a shared library."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    export(controller, folder / "controller.h")
    text = (folder / "controller.h").read_text()
    signature = next(line for line in text.splitlines() if "guerdon_act(" in line)
    choice = "inline int" in signature
    answer = "int" if choice or "int *action" in signature else "float"
    call = "action[0] = guerdon_act(observation);" if choice else "guerdon_act(observation, action);"
    linkage = 'extern "C" ' if compiler == "g++" else ""
    prototype = f"{linkage}void act(const float *observation, {answer} *action)"
    (folder / "wrap.c").write_text(
        f'#include "controller.h"\n#include "controller.h"\n{prototype};\n{prototype} {{ {call} }}\n'
    )
    library = folder / f"{compiler}.so"
    language = ["-x", "c++"] if compiler == "g++" else []
    command = [
        compiler,
        COMPILERS[compiler],
        *STRICT,
        "-shared",
        "-fPIC",
        "-o",
        library,
        *language,
        folder / "wrap.c",
    ]
    done = subprocess.run([*map(str, command), "-lm"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library)).act


def run_c(act: Any, observation: np.ndarray, like: np.ndarray) -> np.ndarray:
    rows = np.ascontiguousarray(observation.reshape(len(observation), -1), np.float32)
    size = int(np.prod(like.shape[1:]))
    whole = like.dtype == np.int64
    action = np.zeros((len(rows), size), np.int32 if whole else np.float32)
    for row, into in zip(rows, action, strict=True):
        act(row.ctypes.data_as(ctypes.c_void_p), into.ctypes.data_as(ctypes.c_void_p))
    return action.reshape(like.shape).astype(like.dtype)


def test_c_acts_as_the_policy(controller: Controller, tmp_path: Path) -> None:
    observation = observations(controller)
    wanted = expected(controller, observation)
    act = compiled(controller, tmp_path)
    agree(run_c(act, observation.numpy(), wanted), wanted)


def test_cpp_takes_the_header_too(tmp_path: Path) -> None:
    torch.manual_seed(7)
    controller = lively(wide("hl_gauss"))
    observation = observations(controller)
    wanted = expected(controller, observation)
    agree(run_c(compiled(controller, tmp_path, "g++"), observation.numpy(), wanted), wanted)


def test_c_reads_the_parts_of_a_dictionary_in_order(tmp_path: Path) -> None:
    torch.manual_seed(1)
    entries = {"place": Entry((4,), "one_hot"), "speed": Entry((2,)), "goal": Entry((3,), "one_hot")}
    controller = lively(Deterministic(Features(entries, (16,)), *RANGE))
    place, goal, speed = torch.randint(0, 4, (ROWS,)), torch.randint(0, 3, (ROWS,)), torch.randn(ROWS, 2)
    wanted = expected(controller, {"place": place, "speed": speed, "goal": goal})
    text, said = to_c(controller)
    assert said == "float observation[4] -> float action[3]"
    assert "place: a number from 0 to 3, then speed: 2 numbers, then goal: a number from 0 to 2" in text
    flat = torch.cat([place[:, None], speed, goal[:, None]], 1).numpy()
    agree(run_c(compiled(controller, tmp_path), flat, wanted), wanted)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("categorical", "float observation[5] -> int below 4"),
        ("dials", "float observation[5] -> int action[3]"),
        ("squashed", "float observation[5] -> float action[3]"),
        ("small normal, timed", "float observation[5] -> float action[2]"),
    ],
)
def test_c_says_what_goes_in_and_out(name: str, said: str) -> None:
    assert to_c(CONTROLLERS[name]())[1] == said


# --- ONNX -------------------------------------------------------------------------------------------------


def session(controller: Controller, folder: Path) -> tuple[Any, str]:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    before = {name: value.clone() for name, value in controller.state_dict().items()}
    said = export(controller, folder / "controller.onnx")
    after = controller.state_dict()
    assert before.keys() == after.keys()
    assert all(
        value.equal(after[name]) and value.dtype == after[name].dtype for name, value in before.items()
    )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    return runtime.InferenceSession(str(folder / "controller.onnx"), options), said


def test_onnx_acts_as_the_policy(controller: Controller, tmp_path: Path) -> None:
    observation = observations(controller)
    wanted = expected(controller, observation)
    run, _ = session(controller, tmp_path)
    agree(run.run(["action"], {"observation": observation.numpy()})[0], wanted)
    one = run.run(["action"], {"observation": observation[:1].numpy()})[0]  # any number of rows
    np.testing.assert_allclose(one, wanted[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(84, 84, 4), (4, 84, 84), (10, 10, 4), (40, 40)])
def test_onnx_takes_images(shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(3)
    controller = lively(Categorical(Features({"": Entry(shape, "image")}, (16,), "relu"), 5))
    with torch.no_grad():
        controller.head.weight.normal_()
    image = torch.randint(0, 256, (12, *shape), dtype=torch.uint8)
    image[::2] //= 10
    image[::3] //= 5
    run, said = session(controller, tmp_path)
    assert said == f"observation uint8 [batch, {', '.join(map(str, shape))}] -> action int64 [batch]"
    found = run.run(["action"], {"observation": image.numpy()})[0]
    np.testing.assert_array_equal(found, expected(controller, image))


def test_onnx_has_an_input_for_each_part_of_a_dictionary(tmp_path: Path) -> None:
    torch.manual_seed(1)
    entries = {"camera": Entry((12, 12, 3), "image"), "place": Entry((4,), "one_hot"), "speed": Entry((2,))}
    controller = lively(Gaussian(Features(entries, (16,), normalise=True), *RANGE))
    seen = {
        "camera": torch.randint(0, 256, (30, 12, 12, 3), dtype=torch.uint8),
        "place": torch.randint(0, 4, (30,)),
        "speed": torch.randn(30, 2),
    }
    controller.features.scaler.update(controller.features.vector(seen))
    run, said = session(controller, tmp_path)
    assert said == (
        "camera uint8 [batch, 12, 12, 3], place int64 [batch], speed float32 [batch, 2] -> action float32 [batch, 3]"
    )
    found = run.run(["action"], {name: value.numpy() for name, value in seen.items()})[0]
    agree(found, expected(controller, seen))


# --- what cannot be done ----------------------------------------------------------------------------------


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = CONTROLLERS["squashed"]()
    sees = Categorical(Features({"": Entry((84, 84, 4), "image")}), 3)
    with pytest.raises(UsageError, match=r"looks at images.*export it as onnx"):
        export(sees, tmp_path / "sees.h")
    with pytest.raises(UsageError, match=r"names no format; name it .onnx or .h, or say --format"):
        export(vector, tmp_path / "controller.bin")
    with pytest.raises(UsageError, match="'onx' names no format; did you mean 'onnx'"):
        export(vector, tmp_path / "controller.bin", "onx")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"cannot write the controller to '.*no/such\.h': No such file"):
        export(vector, tmp_path / "no" / "such.h")
    nn.init.constant_(vector.mean.weight, math.nan)
    with pytest.raises(UsageError, match="are not numbers"):
        export(vector, tmp_path / "nan.h")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(UsageError, match=r'pip install "guerdon\[export\]"'):
        export(vector, tmp_path / "controller.onnx")


def test_a_format_goes_before_the_ending(tmp_path: Path) -> None:
    controller = CONTROLLERS["deterministic"]()
    export(controller, tmp_path / "controller.txt", "c")
    assert (tmp_path / "controller.txt").read_text() == to_c(controller)[0]


def test_a_saved_controller_exports_alike(tmp_path: Path) -> None:
    torch.manual_seed(0)
    controller = lively(CONTROLLERS["squashed"]())
    controller.save_pretrained(tmp_path / "model")
    assert to_c(load_controller(tmp_path / "model")) == to_c(controller)
