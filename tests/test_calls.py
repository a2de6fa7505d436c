"""Several steps in one compiled call: learnt, recorded and saved is what single steps give."""

import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from test_processes import (
    SAME_CURVE,
    assert_same_curve,
    ends,
    settings_of,
    started,
    train_words,
)
from test_replicas import MEMBERS, assert_same_run
from test_train import POOLED, TINY, silent

from eqst import checkpoint, config, cost, loop, mesh, objective, recipes, train

STEPS = 50
LONGER = {
    "train.steps": STEPS,
    "train.log_every": 10,
    "train.eval_every": 10,
    "train.checkpoint_every": 10,
    "train.learning_rate": 1e-3,  # what rounding differs by grows with it
    "train.devices": 1,
}
TWO_LENGTHS = {"data.segment_seconds": (1.0, 0.6), "features.window": 512, "features.hop": 256}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def settings(cache: Path, *changes: dict) -> config.Config:
    made = recipes.paper()
    for change in (TINY, POOLED, LONGER, {"data.cache_dir": str(cache)}, *changes):
        made.update_from_flattened_dict(change)
    return config.validate(made)


@pytest.fixture
def curve(monkeypatch):
    """The loss of every step that was taken, in their order."""
    found: list[float] = []

    class Spy(loop.Log):
        def add(self, step, terms, waited):
            found.extend(np.asarray(terms.loss).reshape(-1))
            super().add(step, terms, waited)

    monkeypatch.setattr(loop, "Log", Spy)
    return found


def stop_at(start: str):
    """What sends SIGTERM to this process at a line that starts so."""

    def say(line: str) -> None:
        if line.startswith(start):
            os.kill(os.getpid(), signal.SIGTERM)

    return say


@pytest.mark.long
@pytest.mark.parametrize("lengths", [{}, TWO_LENGTHS], ids=["one length", "two lengths"])
def test_the_loss_curve_is_that_of_single_steps(lengths, cache, curve, tmp_path):
    """Also from a checkpoint of single steps, between two calls, and back again."""
    single = settings(cache, lengths)
    several = settings(cache, lengths, {"train.steps_per_call": 10})
    train.train(single, tmp_path / "single", silent)
    wanted = list(curve)
    assert len(wanted) == STEPS
    curve.clear()
    lines: list[str] = []
    train.train(several, tmp_path / "several", lines.append)
    np.testing.assert_allclose(curve, wanted, rtol=SAME_CURVE)
    assert_same_curve(tmp_path / "single", tmp_path / "several")
    assert sum(line.startswith("a step, on a device: ") for line in lines) == 1
    facts = json.loads((tmp_path / "several" / "summary.json").read_text())
    assert facts["steps"] == STEPS
    assert facts["pairs_per_s"] == pytest.approx(STEPS * 8 / facts["step_seconds"])
    one = json.loads((tmp_path / "single" / "summary.json").read_text())
    if not lengths:  # of several the figure is of the one compiled last, or of their mean
        flops = [x["step_gflop_per_device"] for x in (one, facts)]
        np.testing.assert_allclose(flops[1], flops[0], rtol=0.1)

    mixed = tmp_path / "mixed"
    curve.clear()
    with pytest.raises(train.Interrupted):
        train.train(single, mixed, stop_at("step 10/"))
    stopped = checkpoint.load(mixed, which="last").step
    assert stopped == len(curve) and stopped % 10
    with pytest.raises(train.Interrupted):
        train.train(several, mixed, stop_at("step 30/"))
    stopped = checkpoint.load(mixed, which="last").step
    assert stopped == len(curve) and stopped in (30, 40)
    train.train(single, mixed, silent)
    np.testing.assert_allclose(curve, wanted, rtol=SAME_CURVE)
    assert_same_curve(tmp_path / "single", mixed)


@pytest.mark.long
def test_on_several_devices_with_a_shared_corpus_and_a_split_state(cache, curve, tmp_path):
    wide = {"model.hidden": 64}
    train.train(settings(cache, wide), tmp_path / "one", silent)
    wanted = list(curve)
    curve.clear()
    on_four = {"train.devices": 4, "train.fsdp": 2, "data.shard_corpus": True}
    made = settings(cache, wide, on_four, {"train.steps_per_call": 5})
    state = train.train(made, tmp_path / "four", silent)
    np.testing.assert_allclose(curve, wanted, rtol=SAME_CURVE)
    assert_same_curve(tmp_path / "one", tmp_path / "four")
    rules = mesh.Shardings.of(mesh.make_mesh(4, fsdp=2))
    for leaf, place in zip(*(jax.tree.leaves(x) for x in (state, rules.state(state))), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


@pytest.mark.long
def test_members_of_one_program(cache, tmp_path):
    changes = {"train.steps": 12, "train.log_every": 4, "train.eval_every": 12}
    changes |= {"train.checkpoint_every": 4, "train.devices": 4}
    ahead = {"train.steps_per_call": 4, "data.shard_corpus": True}
    folders = [tmp_path / f"together/{i}" for i in range(2)]
    train.train_together(
        [settings(cache, changes, ahead, own) for own in MEMBERS[:2]], folders, silent
    )
    for i, own in enumerate(MEMBERS[:2]):
        alone = tmp_path / f"alone/{i}"
        train.train(settings(cache, changes, own), alone, silent)
        # What changes no result may differ, and does.
        for folder in (alone, folders[i]):
            card = json.loads((folder / "config.json").read_text())
            card["config"]["train"]["steps_per_call"] = 0
            card["config"]["data"]["shard_corpus"] = 0
            (folder / "config.json").write_text(json.dumps(card))
        assert_same_run(alone, folders[i])


@pytest.mark.long
def test_in_two_processes(cache, tmp_path):
    changes = POOLED | {"train.steps": 20, "train.log_every": 5, "train.eval_every": 5}
    changes |= {"train.checkpoint_every": 5, "train.learning_rate": 1e-3}
    train.train(settings_of(cache, changes), tmp_path / "one", silent)
    ahead = changes | {"train.steps_per_call": 5, "data.shard_corpus": True}
    with started(train_words(tmp_path / "two", cache, ahead), cache) as children:
        results = ends(children)
    assert [code for code, _, _ in results] == [0, 0], results
    assert "2 cpu device(s)" in results[0][1]
    assert_same_curve(tmp_path / "one", tmp_path / "two")


@pytest.mark.long
def test_a_loss_that_is_not_finite_is_named_by_its_step(cache, tmp_path, monkeypatch):
    made = settings(cache, {"train.steps_per_call": 10})
    real = objective.pair_terms
    labels = []

    class Spy(loop.Log):
        def add(self, step, terms, waited):
            labels.append(np.asarray(terms.shape_db))
            super().add(step, terms, waited)

    monkeypatch.setattr(loop, "Log", Spy)
    train.train(made, tmp_path / "whole", silent)
    # The mean error of step 23 tells it from the others; a pair cannot know its step.
    shape_db = np.concatenate(labels)
    assert len(set(shape_db)) == STEPS
    source = train.batches.make_source(
        made, train.corpus.open_corpus(made.data, "train", silent), mesh.make_mesh(1), silent
    )
    poison = float(source.see(np.int32(23), source.constants, 0).label_BKP[0, 0, 0])

    def poisoned(settings, prediction, label_KP, weights):
        terms = real(settings, prediction, label_KP, weights)
        return terms._replace(loss=jax.numpy.where(label_KP[0, 0] == poison, np.nan, terms.loss))

    monkeypatch.setattr(objective, "pair_terms", poisoned)
    with pytest.raises(FloatingPointError, match="nan at step 23;"):
        train.train(made, tmp_path / "poisoned", silent)
    assert checkpoint.load(tmp_path / "poisoned", which="last").step == 20


@pytest.mark.long
def test_a_profile_begins_and_ends_with_a_call(cache, tmp_path):
    lines: list[str] = []
    made = settings(cache, {"train.steps_per_call": 10, "train.profile_steps": 3})
    train.train(made, tmp_path, lines.append)
    (line,) = (x for x in lines if x.startswith("profile of "))
    assert line.startswith("profile of 10 steps")
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_calls_cover_every_step_once():
    for first, steps, ahead in ((0, 50, 10), (7, 50, 10), (40, 50, 10), (3, 6, 1), (49, 50, 50)):
        calls = list(loop._calls(first, steps, ahead))
        taken = [step + i for step, count in calls for i in range(count)]
        assert taken == list(range(first, steps))
        assert all(
            count in (1, ahead) and (count == 1 or step % ahead == 0) for step, count in calls
        )
        assert len({count for _, count in calls}) <= 2


def test_flop_of_a_loop_are_those_of_a_step():
    """The compiler counts a loop's body once; the day it counts turns, this fails."""

    def step(x, _):
        return x @ x / 100, x.sum()

    x = np.eye(64, dtype=np.float32)
    one = cost.of_step(jax.jit(lambda x: step(x, 0)).lower(x).compile())

    def loop_of(turns):
        def turn(x, _):
            x, a = step(x, 0)
            x, b = step(x, 0)
            return x, (a, b)

        return jax.jit(lambda x: jax.lax.scan(turn, x, np.arange(turns))).lower(x).compile()

    for turns in (2, 16):
        assert cost.of_step(loop_of(turns), 2).flops == pytest.approx(one.flops, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train.steps_per_call": 4}, r"is 4; it has to divide 10 \(what steps, log_every,"),
        ({"train.steps_per_call": 5} | TWO_LENGTHS, "as a multiple of the 2 data.segment_seconds"),
        (
            {"train.steps_per_call": 5, "data.pipeline": "tfdata", "data.rendering": "device"},
            "train.steps_per_call above 1 and data.shard_corpus need data.pipeline 'resident'",
        ),
        (
            {"data.shard_corpus": True, "data.pipeline": "tfdata", "data.rendering": "device"},
            "train.steps_per_call above 1 and data.shard_corpus need data.pipeline 'resident'",
        ),
    ],
)
def test_steps_that_cannot_be_one_call_are_refused(changes, expected, cache):
    with pytest.raises(config.ConfigError, match=expected) as caught:
        settings(cache, changes)
    assert "\n" not in str(caught.value)
