"""The warehouse: exact geometry, honest episodes, and scenes that are as hard, and as drivable, as they claim."""

from __future__ import annotations

import json

import gymnasium
import numpy as np
import pytest
import torch

from guerdon.errors import CheckpointError, DataError, ShapeError, UsageError
from guerdon.tasks.warehouse import (
    SCENES,
    PathFollower,
    Patrol,
    Scene,
    Warehouse,
    exploration_features,
    shortest_path,
)
from guerdon.tasks.warehouse.scene import MAX_SPEED, RADIUS, TARGET_RADIUS

EMPTY = Scene("empty", 10.0, 10.0, (2.0, 5.0, 2.0, 5.0), (9.0, 1.0, 9.0, 1.0))


def place(env: Warehouse, x: float, y: float, heading: float = 0.0) -> None:
    """Put every vehicle at rest at one pose."""
    env.x[:], env.y[:], env.heading[:], env.speed[:], env.turn[:] = x, y, heading, 0.0, 0.0


def wander(env: Warehouse, steps: int, seed: int = 0):
    """Step with persistent random commands, which drive into everything."""
    random = np.random.default_rng(seed)
    turn = np.zeros(env.num_envs)
    for _ in range(steps):
        turn = 0.9 * turn + random.normal(0, 0.4, env.num_envs)
        yield env.step(np.stack([np.full(env.num_envs, MAX_SPEED), turn], 1))


def naive_ray(scene: Scene, discs, x: float, y: float, angle: float, reach: float = 6.0) -> float:
    """One ray against the four edges of each box and wall, and against each disc, by plain segment intersection."""
    dx, dy = np.cos(angle), np.sin(angle)
    best = reach
    for x0, y0, x1, y1 in (*scene.boxes, (0.0, 0.0, scene.width, scene.height)):
        for ax, ay, bx, by in ((x0, y0, x1, y0), (x1, y0, x1, y1), (x1, y1, x0, y1), (x0, y1, x0, y0)):
            matrix = np.array([[dx, ax - bx], [dy, ay - by]])
            if abs(np.linalg.det(matrix)) > 1e-12:
                t, u = np.linalg.solve(matrix, [ax - x, ay - y])
                if t >= 0 and 0 <= u <= 1:
                    best = min(best, t)
    for (cx, cy), radius in discs:
        b, c = dx * (x - cx) + dy * (y - cy), (x - cx) ** 2 + (y - cy) ** 2 - radius**2
        if b * b - c >= 0 and -b - np.sqrt(b * b - c) >= 0:
            best = min(best, -b - np.sqrt(b * b - c))
    return best


# ------------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize("name", ["complex_dynamic", "room"])
def test_lidar_equals_a_naive_ray_caster(name):
    env = Warehouse(12, name)
    env.reset(seed=3)
    R = env.n_rays
    for step, (observation, *_) in enumerate(wander(env, 121)):
        if step % 60:
            continue
        discs = env._discs(env.along)
        for row in range(env.num_envs):
            x, y = env.x[row], env.y[row]
            moving = [(discs[:, m, row], p.radius) for m, p in enumerate(env.scene.patrols)]
            for ray in range(R):
                angle = env.heading[row] + 2 * np.pi * ray / R
                static = naive_ray(env.scene, [], x, y, angle)
                assert observation[row, 4 + ray] * 6 == pytest.approx(static, abs=2e-3)
                if moving:
                    everything = naive_ray(env.scene, moving, x, y, angle)
                    assert observation[row, 9 + R + ray] * 6 == pytest.approx(everything, abs=2e-3)


@pytest.mark.parametrize("name", SCENES)
def test_no_two_bodies_ever_overlap(name):
    env = Warehouse(48, name, time_limit=120)
    env.reset(seed=0)
    contacts = 0
    for _ in wander(env, 240):
        place_ = np.stack([env.x, env.y], -1)
        assert env.scene.clearance(place_).min() >= RADIUS - 1e-6
        contacts += env.touching.sum()
        if env.scene.patrols:
            gap = np.hypot(*(env._discs(env.along) - place_.T[:, None])) - RADIUS
            assert (gap >= np.array([[p.radius] for p in env.scene.patrols]) - 1e-6).all()
    assert contacts > 100


def test_nothing_is_tunnelled_not_even_a_wall_without_thickness():
    scene = Scene("foil", 10.0, 10.0, (2, 5, 2, 5), (9, 5, 9, 5), boxes=((5.0, 0.0, 5.0, 10.0),))
    env = Warehouse(64, scene)
    env.reset(seed=0)
    for _ in wander(env, 300):
        assert (env.x <= 5.0 - RADIUS + 1e-6).all()
    assert env.coverage() < 40 * 20 + 1


def test_a_corner_is_not_cut():
    # the straight line of the centre passes the corner of the box at 0.3 m, less than the radius
    scene = Scene("corner", 10.0, 10.0, (2, 5, 2, 5), (9, 9, 9, 9), boxes=((5.0, 1.0, 5.2, 4.7),))
    env = Warehouse(1, scene)
    env.reset(seed=0)
    place(env, 3.0, 5.0)
    nearest = np.inf
    for _ in range(20):
        env.step(np.array([[MAX_SPEED, 0.0]]))
        nearest = min(nearest, scene.clearance(np.array([env.x[0], env.y[0]])))
    assert env.collisions[0] == 1  # one contact, however long
    assert nearest >= RADIUS - 1e-6
    assert env.x[0] > 6.0  # it slid over the corner
    assert env.y[0] == pytest.approx(4.7 + RADIUS, abs=2e-3)


def test_head_on_contact_stops_the_vehicle_at_the_wall():
    env = Warehouse(1, EMPTY)
    env.reset(seed=0)
    place(env, 8.0, 5.0)
    rewards = [env.step(np.array([[MAX_SPEED, 0.0]]))[1][0] for _ in range(20)]
    assert env.x[0] == pytest.approx(10 - RADIUS, abs=1e-9)
    assert env.speed[0] < 0.1
    assert sum(rewards) == pytest.approx(-0.01)  # the penalty is for a contact that begins


def test_a_patrol_waits_for_the_vehicle_in_its_way_and_goes_on():
    scene = Scene(
        "lane", 12.0, 12.0, (6, 9, 6, 9), (10, 10, 10, 10), patrols=(Patrol((2, 6), (10, 6), 0.4, 1.0),)
    )
    env = Warehouse(1, scene, time_limit=1000)
    env.reset(seed=0)
    place(env, 6.0, 6.0)
    env.along[:] = 0.0
    for _ in range(40):  # 8 s: it would be at x = 10
        env.step(np.zeros((1, 2)))
    assert env._discs(env.along)[0, 0, 0] == pytest.approx(6 - RADIUS - 0.4, abs=0.051)
    assert env.x[0] == 6.0
    assert env.collisions[0] == 1
    place(env, 6.0, 9.0)
    for _ in range(20):
        env.step(np.zeros((1, 2)))
    assert env._discs(env.along)[0, 0, 0] > 8.0


def test_patrols_go_out_and_back_at_their_speed():
    env = Warehouse(2, "simple_dynamic")
    env.reset(seed=0)
    place(env, 2.0, 2.0)
    patrol = env.scene.patrols[0]
    line = patrol.end[0] - patrol.start[0]
    env.along[:, 0] = line - 0.1
    places = []
    for _ in range(5):
        env.step(np.zeros((2, 2)))
        places.append(env._discs(env.along)[0, 0, 0])
    gone = line - 0.1 + patrol.speed * 0.2 * np.arange(1, 6)
    assert places == pytest.approx(patrol.start[0] + line - np.abs(gone - line))


def test_speed_and_turn_follow_the_command_with_the_lag():
    env = Warehouse(1, EMPTY)
    env.reset(seed=0)
    place(env, 1.0, 5.0)
    for step in range(1, 6):
        env.step(np.array([[5.0, 0.0]]))  # saturates at 1.5
        time = 0.2 * step
        assert env.speed[0] == pytest.approx(1.5 * (1 - np.exp(-time / 0.2)))
        assert env.x[0] == pytest.approx(1 + 1.5 * (time - 0.2 * (1 - np.exp(-time / 0.2))))
    place(env, 5.0, 5.0)
    env.speed[:], env.turn[:] = 1.0, 1.0
    for _ in range(5):  # a quarter or so of a circle of radius 1 about (5, 6)
        env.step(np.array([[1.0, 1.0]]))
    assert env.heading[0] == pytest.approx(1.0)
    assert (env.x[0], env.y[0]) == pytest.approx((5 + np.sin(1.0), 6 - np.cos(1.0)), abs=1e-3)


def test_unit_actions_are_the_same_physics():
    plain, unit = Warehouse(4, "room"), Warehouse(4, "room", unit_actions=True)
    plain.reset(seed=1)
    unit.reset(seed=1)
    actions = np.random.default_rng(0).uniform(-1, 1, (30, 4, 2))
    for action in actions:
        ours = unit.step(action)[0]
        theirs = plain.step(action * [0.75, 1.0] + np.array([0.75, 0.0]))[0]
    np.testing.assert_array_equal(ours, theirs)


# ------------------------------------------------------------------------------------------------ observations


def test_observation_holds_what_the_layout_says():
    env = Warehouse(3, EMPTY)
    env.reset(seed=0)
    place(env, 2.0, 1.0, np.pi / 2)
    observation, *_ = env.step(np.zeros((3, 2)))
    R = env.n_rays
    assert observation.shape == (3, 9 + R) == env.observation_space.shape
    assert observation.dtype == np.float32
    row = observation[0]
    assert row[:4] == pytest.approx([0.1, 0.05, 1.0, 0.0], abs=1e-6)
    assert row[4] == 1.0  # ahead (up) the wall is 9 m away
    assert row[4 + R // 4] == pytest.approx(2 / 6, abs=1e-4)  # to the left: x = 0
    assert row[4 + R // 2] == pytest.approx(1 / 6, abs=1e-4)  # behind: y = 0
    assert row[4 + R :] == pytest.approx([0, 0, 7 / 20, -1.0, 0.0], abs=1e-6)  # the target is to the right
    assert exploration_features(observation).shape == (3, 4 + R)
    assert torch.equal(
        exploration_features(torch.from_numpy(observation)), torch.from_numpy(observation[:, : 4 + R])
    )


def test_exploration_features_do_not_see_what_moves():
    env = Warehouse(1, "simple_dynamic")
    env.reset(seed=0)
    place(env, 5.0, 9.9)  # beside the first patrol's line
    seen = []
    for along in (0.0, 2.0, 4.0):
        env.along[:, 0] = along
        seen.append(env._observe(np.arange(1)))
    features = [exploration_features(o) for o in seen]
    assert all((f == features[0]).all() for f in features)
    lidars = [o[0, 9 + env.n_rays :] for o in seen]
    assert not np.array_equal(lidars[0], lidars[1])
    assert not np.array_equal(lidars[1], lidars[2])


@pytest.mark.parametrize("name", SCENES)
def test_observations_stay_in_their_space(name):
    env = Warehouse(16, name)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    for observation, *_ in wander(env, 60):
        assert env.observation_space.contains(observation)


# ------------------------------------------------------------------------------------------------ episodes


def test_arrival_pays_one_and_terminates():
    env = Warehouse(2, EMPTY)
    env.reset(seed=0)
    env.x[0], env.y[0] = 9.0, 1.0 + TARGET_RADIUS - 0.01
    observation, reward, terminated, truncated, infos = env.step(np.zeros((2, 2)))
    assert reward.tolist() == [1.0, 0.0]
    assert terminated.tolist() == [True, False]
    assert not truncated.any()
    assert infos["final_info"]["success"][0]
    assert infos["final_obs"][0, :2] == pytest.approx([9 / 20, (1 + TARGET_RADIUS - 0.01) / 20])
    assert observation[0, :2] == pytest.approx([0.1, 0.25])  # after the reset
    assert env.steps.tolist() == [0, 1]


def test_the_time_limit_truncates_and_tells_the_episode():
    env = Warehouse(3, EMPTY, time_limit=4, step_cost=0.25)
    env.reset(seed=0)
    place(env, 5.0, 5.0)
    for step in range(4):
        _, reward, terminated, truncated, infos = env.step(np.tile([1.0, 0.0], (3, 1)))
        assert reward == pytest.approx(-0.25)
        assert not terminated.any()
        assert truncated.all() == (step == 3)
        assert bool(infos) == (step == 3)
    told = infos["final_info"]
    assert told["steps"].tolist() == [4] * 3
    assert not told["success"].any()
    assert told["path_length"] == pytest.approx(0.8 - 0.2 * (1 - np.exp(-4)))
    assert (env.length == 0).all()


def test_terminate_on_collision():
    env = Warehouse(2, EMPTY, terminate_on_collision=True, collision_penalty=0.5)
    env.reset(seed=0)
    env.x[0], env.heading[:] = 9.5, 0.0
    for _ in range(5):
        _, reward, terminated, truncated, infos = env.step(np.array([[1.5, 0.0], [0.0, 0.0]]))
        if terminated[0]:
            break
    assert terminated.tolist() == [True, False]
    assert reward.tolist() == [-0.5, 0.0]
    assert infos["final_info"]["collisions"][0] == 1
    assert not infos["final_info"]["success"][0]
    assert not truncated.any()


def test_seeds_reproduce_and_differ():
    def play(seed):
        env = Warehouse(8, "simple_dynamic", time_limit=20)
        first, _ = env.reset(seed=seed)
        return np.stack([first, *(o for o, *_ in wander(env, 50))])

    assert np.array_equal(play(5), play(5))
    assert not np.array_equal(play(5)[0], play(6)[0])


def test_a_resumed_run_goes_on_bit_exactly(tmp_path):
    env = Warehouse(8, "complex_dynamic", time_limit=30)
    env.reset(seed=2)
    list(wander(env, 25))
    torch.save(env.state_dict(), tmp_path / "state.pt")
    other = Warehouse(8, "complex_dynamic", time_limit=30)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for ours, theirs in zip(wander(env, 60, 1), wander(other, 60, 1), strict=True):
        for a, b in zip(ours[:4], theirs[:4], strict=True):
            assert np.array_equal(a, b)
    assert np.array_equal(env.visited, other.visited)
    with pytest.raises(CheckpointError, match="number of environments"):
        Warehouse(4, "complex_dynamic").load_state_dict(env.state_dict())


def test_returned_arrays_are_fresh():
    env = Warehouse(4, "room", time_limit=10)
    env.reset(seed=0)
    kept = [(tuple(a.copy() for a in step[:4]), step[:4]) for step in wander(env, 25)]
    for copies, arrays in kept:
        for copy, array in zip(copies, arrays, strict=True):
            assert np.array_equal(copy, array)


def test_coverage_counts_cells_per_row_and_together():
    env = Warehouse(2, EMPTY)  # cells of 0.25 m
    env.reset(seed=0)
    assert env.coverage() == 1
    env.heading[:] = [0.0, np.pi / 2]
    for _ in range(20):
        env.step(np.tile([1.0, 0.0], (2, 1)))
    assert env.visited[0].sum() == env.visited[0, 20].sum() == int(env.x[0] / 0.25) - 8 + 1
    assert env.visited[1, :, 8].sum() == int(env.y[1] / 0.25) - 20 + 1
    assert env.coverage() == (env.visited[0] | env.visited[1]).sum()
    env.reset()
    assert env.coverage() > 10  # episodes do not clear it
    env.reset_coverage()
    assert env.coverage() == 0


# ------------------------------------------------------------------------------------------------ scenes


@pytest.mark.parametrize("name", SCENES)
def test_gymnasium_makes_every_scene_by_its_id(name):
    env = gymnasium.make_vec(f"guerdon/Warehouse-{name.replace('_', '-')}-v0", num_envs=2)
    assert isinstance(env.unwrapped, Warehouse)
    assert env.unwrapped.scene == Scene.load(name)
    assert env.reset(seed=0)[0].shape == env.observation_space.shape


@pytest.mark.parametrize("name", SCENES)
def test_every_scene_can_be_driven_in_time(name):
    env = Warehouse(4, name)
    env.reset(seed=1)
    driver = PathFollower(env)
    straight = [
        shortest_path(env.scene, (env.x[row], env.y[row]), tuple(env.target[row])).length for row in range(4)
    ]
    # the driver does not look out for patrols, so in their scenes it need not always get through
    left, arrived = set(range(4)), 0
    for _ in range(int(0.6 * env.time_limit)):
        *_, terminated, truncated, infos = env.step(driver.act())
        for row in left & set(np.flatnonzero(terminated | truncated)):
            arrived += 1
            # the target's rim is enough, and the path is only as fine as the grid
            ratio = (infos["final_info"]["path_length"][row] + TARGET_RADIUS) / straight[row]
            assert 0.95 < ratio < 1.2
            left.remove(row)
        if not left:
            break
    assert arrived >= (2 if env.scene.patrols else 4)


def test_a_random_policy_does_not_solve_the_complex_scene():
    env = Warehouse(400, "complex_static")
    env.reset(seed=0)
    random = np.random.default_rng(0)
    arrived = 0
    for _ in range(300):
        arrived += env.step(random.uniform([0, -1], [MAX_SPEED, 1], (400, 2)))[2].sum()
    assert arrived < 0.005 * 400


def test_shortest_path_against_a_known_one():
    # round the end of a thin wall: straight to the rounded corner, a quarter circle at least, and straight on
    scene = Scene("wall", 10.0, 10.0, (2, 2, 2, 2), (8, 2, 8, 2), boxes=((4.9, 0.0, 5.1, 6.0),))
    path = shortest_path(scene, (2.0, 2.0), (8.0, 2.0), resolution=0.1)
    corner = np.array([4.9, 6.0])
    away = np.hypot(*(corner - [2, 2]))
    tangent = np.sqrt(away**2 - RADIUS**2)
    lean = np.arctan2(*(corner - [2, 2])[::-1]) + np.arcsin(RADIUS / away)  # the tangent's angle
    exact = 2 * (tangent + RADIUS * (lean)) + 0.2  # it turns from `lean` to level on either side
    assert exact <= path.length < 1.03 * exact
    assert scene.clearance(path.points).min() >= RADIUS - 1e-9
    assert path.points[0].tolist() == [2, 2]
    assert path.points[-1].tolist() == [8, 2]


def test_no_way_is_said():
    scene = Scene("shut", 10.0, 10.0, (2, 2, 2, 2), (8, 2, 8, 2), boxes=((4.9, 0.0, 5.1, 10.0),))
    with pytest.raises(UsageError, match="no way"):
        shortest_path(scene, (2, 2), (8, 2))


def test_a_scene_goes_through_json(tmp_path):
    scene = Scene.load("simple-dynamic")
    scene.save(tmp_path / "mine.json")
    assert Scene.load(tmp_path / "mine.json") == scene
    assert Warehouse(1, tmp_path / "mine.json").scene == scene


def test_bad_scenes_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="complex_static"):
        Scene.load("complex_statik")
    with pytest.raises(DataError, match="start region"):
        Scene("s", 10.0, 10.0, (2, 2, 3, 3), (8, 8, 8, 8), boxes=((3.2, 2.0, 4.0, 4.0),))
    with pytest.raises(DataError, match="inside the plane"):
        Scene("s", 10.0, 10.0, (2, 2, 3, 3), (8, 8, 8, 8), boxes=((9.0, 2.0, 11.0, 4.0),))
    with pytest.raises(DataError, match="runs into"):
        Scene("s", 10.0, 10.0, (2, 2, 3, 3), (8, 8, 8, 8), ((5, 5, 6, 6),), (Patrol((4, 5.5), (8, 5.5)),))
    with pytest.raises(DataError, match="start region"):
        Scene("s", 10.0, 10.0, (2, 2, 3, 3), (8, 8, 8, 8), patrols=(Patrol((1, 2.5), (8, 2.5)),))
    (tmp_path / "bad.json").write_text(json.dumps({"name": "x", "start": [1, 2, 3]}))
    with pytest.raises(DataError, match=r"bad\.json is not a scene"):
        Scene.load(tmp_path / "bad.json")


def test_bad_actions_and_options_are_refused():
    env = Warehouse(2, "room")
    env.reset(seed=0)
    with pytest.raises(ShapeError, match="shape"):
        env.step(np.zeros((3, 2)))
    with pytest.raises(ShapeError, match="finite"):
        env.step(np.full((2, 2), np.nan))
    with pytest.raises(UsageError, match="rgb_array"):
        Warehouse(1, "room", render_mode="human")
    with pytest.raises(UsageError, match="time_limit"):
        Warehouse(1, "room", time_limit=0)


# ------------------------------------------------------------------------------------------------ pictures


def test_pictures(tmp_path):
    from PIL import Image

    from guerdon.tasks.warehouse.render import TARGET, VEHICLE, draw, save_gif

    env = Warehouse(2, "simple_dynamic", render_mode="rgb_array")
    env.reset(seed=0)
    place(env, 10.0, 2.0, np.pi / 2)
    frame = env.render()
    assert frame.shape == (400, 400, 3)
    assert frame.dtype == np.uint8
    assert tuple(frame[400 - 36, 200]) == VEHICLE  # x = 10 m, y = 1.8 m: behind the centre
    assert tuple(frame[400 - 160, 168]) == TARGET
    frames = [frame]
    for _ in range(4):
        env.step(np.tile([1.5, 0.0], (2, 1)))
        frames.append(env.render())
    save_gif(frames, tmp_path / "drive.gif")
    with Image.open(tmp_path / "drive.gif") as image:
        assert image.n_frames == 5
    draw(tmp_path / "one.png", env.scene, [np.array([[2, 2], [5, 10]])])
    draw(tmp_path / "all.png", [Scene.load(name) for name in SCENES[:4]])
    with Image.open(tmp_path / "all.png") as image:
        assert image.width > 800
    with pytest.raises(UsageError, match="one scene"):
        draw(tmp_path / "x.png", [env.scene], [np.zeros((2, 2))])
    with pytest.raises(UsageError, match="no frames"):
        save_gif([], tmp_path / "x.gif")
    assert Warehouse(1, "room").render() is None
