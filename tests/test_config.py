"""Every setting is checked, every message is one line, every config file loads from anywhere."""

import ast
import dataclasses
import json
import math
import pathlib
import runpy

import pytest
from absl import flags
from ml_collections import config_flags

from eqst import config
from eqst.config import BOUNDS, CHOICES, Config, ConfigError, as_dict, from_dict, validate

FILES = sorted((pathlib.Path(__file__).resolve().parents[1] / "configs").glob("*.py"))
# ml_collections 1.1 loads files by a call that Python 3.15 will drop; theirs to change.
pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method:DeprecationWarning")
PAPER_VARIANTS = {
    "linear_mel_bl": ("linear", "subtract"),
    "db_mel_bl": ("db", "subtract"),
    "db_mel_pm": ("db", "learned"),
}


def leaves(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def changed(key, value):
    values = as_dict(Config())
    *groups, name = key.split(".")
    group = values
    for part in groups:
        group = group[part]
    group[name] = value
    return values


def refusal(values):
    with pytest.raises(ConfigError) as caught:
        from_dict(values)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("config: ") and len(message) < 400
    return message


def parsed(monkeypatch, path, *arguments):
    command = ["eqst.train", f"--config={path}", *arguments]
    monkeypatch.setattr("sys.argv", command)  # where ml_collections looks for overrides
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(command)
    return values.config


def test_there_are_config_files():
    assert set(PAPER_VARIANTS) <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_loads_and_validates_from_any_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [x for x in __import__("sys").path if x not in ("", ".")])
    loaded = validate(parsed(monkeypatch, path, "--config.train.steps=7", "--config.loss.gain=1"))
    assert loaded.train.steps == 7 and loaded.loss.gain == 1.0
    assert from_dict(json.loads(json.dumps(as_dict(loaded)))) == loaded


@pytest.mark.parametrize("name", PAPER_VARIANTS)
def test_the_papers_variants_are_what_the_design_says(name, monkeypatch):
    (path,) = (path for path in FILES if path.stem == name)
    loaded = validate(parsed(monkeypatch, path))
    assert (loaded.features.scale, loaded.model.comparison) == PAPER_VARIANTS[name]
    assert (loaded.features.kind, loaded.features.mel_bands, loaded.model.channels) == (
        "mel",
        128,
        20,
    )


def test_defaults_stand_and_survive_json():
    assert validate(config.default()) == Config()
    assert from_dict(json.loads(json.dumps(as_dict(Config())))) == Config()
    hash(Config())  # static under jit


def test_unknown_override_is_refused():
    settings = config.default()
    with pytest.raises(AttributeError):
        settings.train.batchsize = 3


def test_every_number_has_bounds_and_every_bound_a_setting():
    flat = dict(leaves(as_dict(Config())))
    unbounded = set()
    for key, value in flat.items():
        first = value[0] if isinstance(value, tuple) else value
        if isinstance(first, (int, float)) and not isinstance(first, bool):
            unbounded.add(key)
    assert unbounded == set(BOUNDS)
    assert set(CHOICES) <= set(flat)


@pytest.mark.parametrize("key", BOUNDS)
def test_numbers_out_of_range(key):
    default = dict(leaves(as_dict(Config())))[key]
    for bound, step in zip(BOUNDS[key], (-1, 1), strict=True):
        if math.isinf(bound):
            continue
        wrong = bound + step
        value = [wrong] * len(default) if isinstance(default, tuple) else wrong
        message = refusal(changed(key, value))
        assert key in message and str(wrong) in message
        assert all(str(x) in message for x in BOUNDS[key])


@pytest.mark.parametrize("key", CHOICES)
def test_unknown_choices_are_named(key):
    message = refusal(changed(key, "nonsense"))
    assert key in message and "'nonsense'" in message
    assert all(choice in message for choice in CHOICES[key])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train.steps", 10.0, ("train.steps", "10.0", "int")),
        ("train.steps", True, ("train.steps", "True", "int")),
        ("train.steps", "10", ("train.steps", "'10'", "int")),
        ("train.learning_rate", "fast", ("train.learning_rate", "'fast'", "float")),
        ("train.learning_rate", False, ("train.learning_rate", "False", "float")),
        ("train.learning_rate", math.nan, ("train.learning_rate", "nan", "finite")),
        ("data.segment_seconds", 3.0, ("data.segment_seconds", "3.0", "tuple of float")),
        ("data.segment_seconds", [3.0, "x"], ("data.segment_seconds", "'x'", "float")),
        ("data.segment_seconds", [math.inf], ("data.segment_seconds", "inf", "finite")),
        ("data.segment_seconds", [], ("data.segment_seconds", "empty")),
        ("data.sources", "synthetic", ("data.sources", "'synthetic'", "tuple of str")),
        ("data.permissive_only", 1, ("data.permissive_only", "1", "bool")),
        ("model", 3, ("model", "3", "group")),
        ("data", None, ("data", "None", "group")),
    ],
)
def test_wrong_types(key, value, words):
    message = refusal(changed(key, value))
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.sources": ["mp3s"]}, ("'mp3s'", "folder:PATH")),
        ({"data.sources": ["folder:"]}, ("'folder:'", "folder:PATH")),
        ({"data.sources": []}, ("data.sources", "empty")),
        ({"data.source_weights": [1.0, 2.0]}, ("data.source_weights", "2 values for 1")),
        ({"data.source_weights": [0.0]}, ("data.source_weights", "not all 0")),
        ({"data.folds": 1}, ("folds", "1")),
        ({"data.folds": 5, "data.fold": 5}, ("data.fold", "5 of 5")),
        ({"features.hop": 1000}, ("features.hop", "1000", "2048")),
        ({"features.window": 65536, "data.segment_seconds": [1.0]}, ("65536", "44100")),
        ({"features.low_hz": 1000.0, "features.high_hz": 1000.0}, ("features.low_hz", "1000")),
        ({"data.noise_low_db": -10.0}, ("noise_low_db", "-10.0", "-25.0")),
        ({"model.stride_time": [4, 2]}, ("kernel_time", "stride_time", "length")),
        ({"data.rendering": "pooled"}, ("'pooled'", "features.kind")),
        ({"model.comparison": "direct"}, ("'direct'", "'mel'")),
        ({"features.kind": "pooled"}, ("'learned'", "'pooled'")),
        ({"data.pipeline": "tfdata", "data.rendering": "exact"}, ("'tfdata'", "'exact'")),
        ({"data.rendering": "host"}, ("'host'", "tfdata")),
        ({"data.warp": 1.1, "data.rendering": "exact"}, ("data.warp", "'exact'")),
        ({"loss.parameters": 0.0, "loss.response": 0.0}, ("loss weights", "0")),
    ],
)
def test_settings_that_do_not_go_together(changes, words, configure):
    with pytest.raises(ConfigError) as caught:
        configure(changes)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_unknown_and_missing_keys():
    values = as_dict(Config())
    values["train"]["batchsize"] = 3
    assert "train.batchsize" in refusal(values) and "batch_size" in refusal(values)
    values = as_dict(Config())
    del values["data"]["warp"]
    assert "data.warp" in refusal(values)
    values = as_dict(Config()) | {"extra": {}}
    assert "extra" in refusal(values)


def test_ints_and_lists_become_floats_and_tuples():
    loaded = from_dict(changed("data.segment_seconds", [3, 10]))
    assert loaded.data.segment_seconds == (3.0, 10.0)
    assert all(isinstance(x, float) for x in loaded.data.segment_seconds)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.seed = 3


def test_the_page_of_settings_has_them_as_they_are():
    """configs/README.md: the defaults, and what the named config files have in their place."""
    page = (FILES[0].parent / "README.md").read_text(encoding="utf-8")
    heads, _, *rows = [
        [cell.strip(" `") for cell in line.strip("|\n").split("|")]
        for line in page[page.index("| key |") :].splitlines()
    ]
    assert heads[1] == "default" and len(rows) > 10
    columns = [config.default()]
    columns += [runpy.run_path(str(FILES[0].parent / name))["get_config"]() for name in heads[2:-1]]
    for key, *cells in ((row[0], *row[1:-1]) for row in rows):
        values = [str(dict(leaves(column.to_dict()))[key]) for column in columns]
        wanted = [values[0], *("" if x == values[0] else x for x in values[1:])]
        given = [str(ast.literal_eval(cell)) if cell else "" for cell in cells]
        assert given == wanted, f"{key}: {wanted}"
