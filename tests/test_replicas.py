"""Several runs as one program: each is what it would have been alone."""

import json
import os
import pickle
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_processes import ends, started, wait_for_line
from test_train import POOLED, TINY, losses, silent

from eqst import batches, checkpoint, config, corpus, mesh, processes, recipes, train

# Rounding alone: sums in another order, in products of several members at once.
SAME_PARAMS, SAME_CURVE = 1e-4, 1e-4

MEMBERS = (
    {"seed": 0},
    {"seed": 1, "train.learning_rate": 2e-3},
    {"seed": 2, "loss.parameters": 0.0, "train.weight_decay": 0.1},
    {"seed": 0, "loss.response": 0.0, "train.clip_norm": 0.1, "train.ema_decay": 0.5},
)
# As many as a usual sweep has of them; of the convolutional model four are slow enough.
EIGHT = (*MEMBERS, *({"seed": i, "train.learning_rate": 1e-3 * i} for i in range(3, 7)))
MEL = {"data.rendering": "device", "features.mel_bands": 16, "model.dropout": 0.1}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def settings(cache: Path, *changes: dict) -> config.Config:
    made = recipes.paper()
    for change in (TINY, {"data.cache_dir": str(cache), "train.devices": 1}, *changes):
        made.update_from_flattened_dict(change)
    return config.validate(made)


def assert_same_run(one: Path, other: Path) -> None:
    """Parameters and every figure of the record, but the times."""
    for which in ("last", "best"):
        a, b = (checkpoint.load(folder, which=which) for folder in (one, other))
        assert a.step == b.step
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=SAME_PARAMS, atol=SAME_PARAMS),
            a.params,
            b.params,
        )
    rows = [
        [json.loads(line) for line in (x / "metrics.jsonl").read_text().splitlines()]
        for x in (one, other)
    ]
    for left, right in zip(*rows, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - {"pairs_per_s", "input_wait"}:
            np.testing.assert_allclose(right[name], left[name], rtol=SAME_CURVE, err_msg=name)
    cards = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    for card in cards:
        del card["config"]["train"]["devices"], card["sha256"]
    measured = [card.pop("normalisation") for card in cards]
    for name, values in measured[0].items():  # other programs on more devices round otherwise
        np.testing.assert_allclose(measured[1][name], values, rtol=1e-5, atol=1e-5)
    assert cards[0] == cards[1]


@pytest.fixture(scope="module")
def alone(cache, tmp_path_factory):
    """A function from changes to the folder of the run of those alone, trained once for all."""
    made: dict[str, Path] = {}

    def folder(*changes: dict) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("alone")
            train.train(settings(cache, *changes), made[key], silent)
        return made[key]

    return folder


@pytest.mark.long
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(
    ("variant", "members"), [(POOLED, EIGHT), (MEL, MEMBERS)], ids=["pooled", "mel-dropout"]
)
def test_members_of_one_program_are_what_they_are_alone(
    variant, members, devices, cache, alone, tmp_path
):
    configs = [settings(cache, variant, x, {"train.devices": devices}) for x in members]
    folders = [tmp_path / f"together/{i}" for i in range(len(members))]
    lines: list[str] = []
    state = train.train_together(configs, folders, lines.append)
    assert all(leaf.shape[0] == len(members) for leaf in jax.tree.leaves(state))
    assert any(f"{len(members)} of them in one program" in line for line in lines)
    for own, folder in zip(members, folders, strict=True):
        assert_same_run(alone(variant, own), folder)
    first, second = (losses(folder) for folder in folders[:2])
    assert not np.allclose(first, second, rtol=0.01)


TOGETHER = """
import pickle, sys
from eqst import processes, train
from eqst.stopping import Interrupted
processes.join()
try:
    with train.explained(""):
        train.train_together(*pickle.load(open(sys.argv[1], "rb")), lambda x: print(x, flush=True))
except Interrupted as event:
    print(event)
    sys.exit(processes.EXIT_INTERRUPTED)
"""


@pytest.mark.long
def test_members_on_the_devices_of_two_processes(cache, alone, tmp_path):
    """Each process has two of four devices, and each device a member; stopped and gone on."""
    configs = [settings(cache, POOLED, x, {"train.devices": 0}) for x in MEMBERS]
    folders = [tmp_path / f"together/{i}" for i in range(len(MEMBERS))]
    (tmp_path / "given").write_bytes(pickle.dumps((configs, folders)))
    words = [sys.executable, "-c", TOGETHER, str(tmp_path / "given")]
    with started(words, cache, 2, devices=2) as children:
        wait_for_line(children[0], "step 1/6")
        children[1].send_signal(signal.SIGTERM)
        results = ends(children)
    assert [code for code, _, _ in results] == [processes.EXIT_INTERRUPTED] * 2, results
    with started(words, cache, 2, devices=2) as children:
        results = ends(children)
    assert [code for code, _, _ in results] == [0, 0], results
    assert results[0][1].startswith("resumed at step ") and "4 cpu device(s)" in results[0][1]
    for own, folder in zip(MEMBERS, folders, strict=True):
        assert_same_run(alone(POOLED, own), folder)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.long)])
def test_members_may_hold_out_folds_of_their_own(devices, cache, alone, tmp_path):
    """And draw, measure and judge on the talkers of their own fold, as a run alone does."""
    folds = [{"data.folds": 3, "data.fold": i % 3, "seed": i} for i in range(4)]
    configs = [settings(cache, POOLED, x, {"train.devices": devices}) for x in folds]
    folders = [tmp_path / f"together/{i}" for i in range(len(folds))]
    lines: list[str] = []
    train.train_together(configs, folders, lines.append)
    assert any("each member holds out its fold of 3" in line for line in lines)
    for own, folder in zip(folds, folders, strict=True):
        assert_same_run(alone(POOLED, own), folder)
    record = (folders[0] / "metrics.jsonl").read_text()
    assert "valid_shape_db" in record and "train_exact_shape_db" not in record


def test_folds_draw_the_same_examples_from_one_corpus_as_from_their_own(cache):
    """Bitwise, and no talker that a fold holds out is ever drawn."""
    folds = [{"data.folds": 4, "data.fold": i, "train.batch_size": 32} for i in range(4)]
    configs = [settings(cache, MEL, own) for own in folds]
    whole, weight_NR = corpus.open_folds([x.data for x in configs], silent)
    devices, step = mesh.make_mesh(1), np.int32(3)
    supply = batches.make_source(configs[0], whole, devices, silent)
    for own, weight_R in zip(configs, weight_NR, strict=True):
        recordings = corpus.open_corpus(own.data, "train", silent)
        drawn = {whole.talker_R[r] for r in np.flatnonzero(weight_R)}
        assert drawn == set(recordings.talker_R) < set(whole.talker_R)
        alone = batches.make_source(own, recordings, devices, silent)
        shared = batches.of_member(supply, own.seed, weight_R)
        seen = [jax.jit(x.see, static_argnums=2)(step, x.constants, 0) for x in (alone, shared)]
        jax.tree.map(np.testing.assert_array_equal, *seen)


def test_members_lie_apart_before_they_share_devices():
    shapes = {
        members: dict(mesh.make_mesh(4, members=members).shape) for members in (1, 2, 3, 4, 6, 8)
    }
    replicas = {members: shape["replica"] for members, shape in shapes.items()}
    assert replicas == {1: 1, 2: 2, 3: 1, 4: 4, 6: 2, 8: 4}
    assert all(x["replica"] * x["data"] == 4 for x in shapes.values())
    both = mesh.make_mesh(4, fsdp=2, members=4)
    assert dict(both.shape) == {"replica": 2, "data": 1, "fsdp": 2}
    # All members see the same example numbers.
    batch = mesh.global_batch(both, np.arange(4))
    assert [x.data.tolist() for x in batch.addressable_shards] == [[0, 1], [2, 3]] * 2


@pytest.mark.long
def test_what_was_stopped_together_goes_on_alone_and_the_other_way_round(cache, tmp_path):
    configs = [settings(cache, POOLED, x) for x in MEMBERS[:2]]
    whole = [tmp_path / f"whole/{i}" for i in range(2)]
    for made, folder in zip(configs, whole, strict=True):
        train.train(made, folder, silent)

    def stop(line: str) -> None:
        if line.startswith("step 3/"):
            os.kill(os.getpid(), signal.SIGTERM)

    folders = [tmp_path / f"down/{i}" for i in range(2)]
    with pytest.raises(train.Interrupted, match="saved at step"):
        train.train_together(configs, folders, stop)
    for made, folder, wanted in zip(configs, folders, whole, strict=True):
        train.train(made, folder, silent)
        assert_same_run(wanted, folder)

    folders = [tmp_path / f"up/{i}" for i in range(2)]
    for made, folder in zip(configs, folders, strict=True):
        with pytest.raises(train.Interrupted):
            train.train(made, folder, stop)
    lines: list[str] = []
    train.train_together(configs, folders, lines.append)
    assert any(line.startswith("resumed at step") for line in lines)
    for wanted, folder in zip(whole, folders, strict=True):
        assert_same_run(wanted, folder)


@pytest.mark.long
def test_members_that_were_killed_between_their_saves_go_on_from_the_step_they_share(
    cache, tmp_path
):
    import shutil

    configs = [settings(cache, POOLED, x) for x in MEMBERS[:2]]
    folders = [tmp_path / f"run/{i}" for i in range(2)]
    train.train_together(configs, folders, silent)
    again = [tmp_path / f"again/{i}" for i in range(2)]
    for folder, copy in zip(folders, again, strict=True):
        shutil.copytree(folder, copy)
    shutil.rmtree(again[1] / "checkpoints/last/6")  # the other has 4 and 6
    lines: list[str] = []
    train.train_together(configs, again, lines.append)
    assert "resumed at step 4 of 6" in lines
    for folder, copy in zip(folders, again, strict=True):
        assert_same_run(folder, copy)
    shutil.rmtree(again[1] / "checkpoints/last/6")
    shutil.rmtree(again[0] / "checkpoints/last/4")
    with pytest.raises(config.ConfigError, match="have none in common"):
        train.train_together(configs, again, silent)


@pytest.mark.long
@pytest.mark.parametrize("every", [2, 20], ids=["after a checkpoint", "before the first"])
def test_a_member_that_diverges_is_left_behind_alone(every, cache, tmp_path):
    longer = {"train.steps": 40, "train.warmup_steps": 0, "train.checkpoint_every": every}
    longer |= {"train.keep_newest": 3}
    wild = {"seed": 1, "train.weight_decay": 9.0, "train.learning_rate": 9.0}  # w <- -80 w
    configs = [settings(cache, POOLED, longer, x) for x in (MEMBERS[0], wild)]
    folders = [tmp_path / f"run/{i}" for i in range(2)]
    lines: list[str] = []
    with pytest.raises(FloatingPointError, match="1 of 2 were left behind: .*run/1: "):
        train.train_together(configs, folders, lines.append)
    assert sum("left behind" in line for line in lines) == 1
    assert (folders[0] / "summary.json").exists() and not (folders[1] / "summary.json").exists()
    assert all(np.isfinite(losses(folders[1])))
    train.train(configs[0], tmp_path / "alone", silent)
    assert_same_run(tmp_path / "alone", folders[0])
    # Together they have no step in common to go on from: nothing of the first is begun anew.
    behind = "0" if every == 20 else "8"
    with pytest.raises(config.ConfigError, match=f"are at steps 40, {behind} .* none in common"):
        train.train_together(configs, folders, silent)
    assert_same_run(tmp_path / "alone", folders[0])


def test_members_that_cannot_share_a_program_are_refused(cache, tmp_path):
    one = settings(cache, POOLED)
    folders = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(config.ConfigError, match="differ in model.hidden: 16 -> 8: they may in"):
        train.train_together([one, settings(cache, POOLED, {"model.hidden": 8})], folders, silent)
    pair = [settings(cache, MEL, {"data.pipeline": "tfdata"}, {"seed": seed}) for seed in (0, 1)]
    with pytest.raises(config.ConfigError, match="pipeline=resident"):
        train.train_together(pair, folders, silent)
    folds = {"data.folds": 3, "data.different_recordings": True}
    pair = [settings(cache, MEL, folds, {"data.fold": fold}) for fold in (0, 1)]
    with pytest.raises(config.ConfigError, match="differ in data.fold: 0 -> 1"):
        train.train_together(pair, folders, silent)
    assert list(tmp_path.iterdir()) == []
