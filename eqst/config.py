"""Every setting, its default and its check: ConfigDict on the outside, frozen dataclasses within.

A config file starts from `default()` and sets only what differs; `--config.key=value` changes
single values; `validate` turns the result into frozen dataclasses, which is all the other modules
ever see. The defaults stand once, in the dataclasses below.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import types
import typing
from typing import Any

from ml_collections import config_dict


class ConfigError(ValueError):
    """A setting that cannot be used: one line with the key, the value, the bound."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Where recordings come from and how pairs are made of them (design section 3)."""

    # Any of "synthetic", "folder:PATH" and "tfds:NAME" (or the path of a TFDS set's version: see
    # `corpus`); several are mixed with these weights.
    sources: tuple[str, ...] = ("synthetic",)
    source_weights: tuple[float, ...] = (1.0,)
    # A CSV with the columns path, split and permissive, paths relative to the CSV's own folder.
    # Empty: a folder's talkers are split by `dev_share`.
    manifest: str = ""
    permissive_only: bool = False
    dev_share: float = 0.2
    # Train talkers held out for the evaluation during training and for choosing: a share of them,
    # or fold `fold` of `folds` (cross-validation). With neither, that evaluation is on the train
    # talkers themselves and says so.
    valid_share: float = 0.1
    folds: int = 0
    fold: int = 0
    cache_dir: str = ""  # empty: $XDG_CACHE_HOME/eqst or ~/.cache/eqst
    sample_rate: int = 44100
    # Several lengths are taken in turn, batch by batch.
    segment_seconds: tuple[float, ...] = (3.0,)
    context_seconds: float = 1.5
    # plain: the input is untouched; coloured: one random EQ on both first; mixed: half and half.
    protocol: str = "mixed"
    different_recordings: bool = False
    min_loudness_lufs: float = -35.0
    # host: audio filtered exactly in tf.data; exact: the same filter inside the jitted step;
    # device: the STFT power is multiplied by |H|^2 in the step; pooled: the statistics of the
    # segment are made once and moved by the EQ's band gains (for pooled features alone).
    rendering: str = "device"
    # tfdata: segments are read by tf.data; resident: the corpus lies in the device's memory.
    pipeline: str = "resident"
    # Each device holds a share of the resident corpus, not a copy; a step hands segments round.
    shard_corpus: bool = False
    # Augmentation, of both segments alike, before the EQ. The frequency axis is stretched by a
    # factor log-uniform in 1 / warp .. warp.
    warp: float = 1.0
    # A share of pairs gets a smooth random curve of this deviation, as microphones have.
    curve_share: float = 0.0
    curve_db: float = 4.0
    # A share of pairs gets a floor of coloured noise, so far under the loudest band's mean power.
    noise_share: float = 0.0
    noise_low_db: float = -75.0
    noise_high_db: float = -25.0
    # In a share of pairs one of the two gets a floor of its own, as takes of one talker may.
    one_sided_noise_share: float = 0.0
    # A share of segments is gated, each by itself: what is quiet falls by 3 .. 40 dB.
    gate_share: float = 0.0
    synthetic_talkers: int = 320
    synthetic_seconds: float = 24.0
    synthetic_seed: int = 0


@dataclasses.dataclass(frozen=True)
class Features:
    """STFT and bands (design section 4)."""

    # mel: [frames, mel bands]; pooled: statistics over time in narrow bands.
    kind: str = "mel"
    window: int = 2048
    hop: int = 1024
    mel_bands: int = 128
    low_hz: float = 20.0
    high_hz: float = 20000.0
    scale: str = "db"  # linear | db
    floor_db: float = -80.0
    normalise: bool = True  # off: features as they are (for the paper's claims on its latents)
    bands_per_octave: int = 8


@dataclasses.dataclass(frozen=True)
class Model:
    """Encoder, comparison, predictor and heads (design section 4)."""

    # subtract and learned compare the CNN's latents of mel features; direct feeds the difference
    # and the mean of two pooled statistics to the predictor.
    comparison: str = "learned"
    head: str = "grid"  # grid | continuous
    channels: int = 20
    # One convolution per entry; the mel axis is never strided.
    kernel_time: tuple[int, ...] = (5, 3, 3)
    kernel_mel: tuple[int, ...] = (5, 5, 5)
    stride_time: tuple[int, ...] = (4, 2, 2)
    hidden: int = 512
    blocks: int = 2
    dropout: float = 0.0
    bfloat16: bool = False


@dataclasses.dataclass(frozen=True)
class Loss:
    """Weights of the objective's terms; 0 leaves a term out."""

    parameters: float = 1.0
    response: float = 1.0
    # Among settings of equal shape, prefer the one with least gain.
    gain: float = 0.0


@dataclasses.dataclass(frozen=True)
class Train:
    """The loop."""

    batch_size: int = 64
    steps: int = 1000
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    log_every: int = 50
    eval_every: int = 500
    eval_pairs: int = 256
    checkpoint_every: int = 500
    # Of the checkpoints to go on from the newest so many stay (two: one to fall back on), and for
    # good those of every so many steps (0: none). The best one always stays.
    keep_newest: int = 2
    keep_every: int = 0
    devices: int = 0  # 0: all there are
    # So many steps are one compiled call (resident path): less to do for the host, on accelerators.
    # Not for CPUs, whose convolutions are slow inside a loop. SIGTERM waits for the calls handed
    # over (two at most; four of several processes): keep a call within seconds.
    steps_per_call: int = 1
    # Over how many devices the large leaves of parameters and optimiser state are split.
    fsdp: int = 1
    init_from: str = ""  # another workdir, whose best parameters it starts from
    tensorboard: bool = False
    # So many of the first steps are traced, into WORKDIR/profile.
    profile_steps: int = 0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out pairs of `eqst.evaluate` (design section 5)."""

    seconds: tuple[float, ...] = (1.0, 3.0, 10.0, 20.0)
    pairs: int = 1000
    tune_pairs: int = 1500
    bootstrap: int = 1000
    seed: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    seed: int = 0
    eq_table: str = "paper"
    data: Data = dataclasses.field(default_factory=Data)
    features: Features = dataclasses.field(default_factory=Features)
    model: Model = dataclasses.field(default_factory=Model)
    loss: Loss = dataclasses.field(default_factory=Loss)
    train: Train = dataclasses.field(default_factory=Train)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)


CHOICES = {
    "eq_table": ("paper", "practical"),
    "data.protocol": ("plain", "coloured", "mixed"),
    "data.rendering": ("host", "exact", "device", "pooled"),
    "data.pipeline": ("tfdata", "resident"),
    "features.scale": ("linear", "db"),
    "features.kind": ("mel", "pooled"),
    "model.comparison": ("subtract", "learned", "direct"),
    "model.head": ("grid", "continuous"),
}

# Pooled features take a second window, this many times longer, for the lowest bands.
POOLED_WINDOW_FACTOR = 4

# Settings that may differ between two runs on one workdir without changing a result.
FREE_KEYS = (
    *("train.keep_newest", "train.keep_every"),
    *("train.devices", "train.fsdp", "train.log_every", "train.tensorboard"),
    *("train.profile_steps", "train.steps_per_call", "data.cache_dir", "data.shard_corpus"),
)

# Inclusive bounds of numbers (each element, for a tuple).
BOUNDS = {
    **dict.fromkeys(("seed", "data.synthetic_seed", "evaluation.seed"), (0, 2**31 - 1)),
    "data.source_weights": (0.0, 1e9),
    **dict.fromkeys(("data.dev_share", "data.valid_share"), (0.0, 0.9)),
    "data.folds": (0, 100),
    "data.fold": (0, 99),
    "data.sample_rate": (8000, 192000),
    "data.segment_seconds": (0.5, 60.0),
    "data.context_seconds": (0.0, 10.0),
    "data.min_loudness_lufs": (-70.0, 0.0),
    "data.warp": (1.0, 2.0),
    "data.curve_db": (0.0, 40.0),
    **dict.fromkeys(("data.curve_share", "data.noise_share"), (0.0, 1.0)),
    **dict.fromkeys(("data.one_sided_noise_share", "data.gate_share"), (0.0, 1.0)),
    "data.noise_low_db": (-200.0, 0.0),
    "data.noise_high_db": (-200.0, 0.0),
    "data.synthetic_talkers": (2, 1_000_000),
    "data.synthetic_seconds": (5.0, 600.0),
    "features.window": (64, 65536),
    "features.hop": (16, 65536),
    "features.mel_bands": (8, 1024),
    "features.low_hz": (0.0, 1000.0),
    "features.high_hz": (1000.0, 96000.0),
    "features.floor_db": (-200.0, -20.0),
    "features.bands_per_octave": (1, 48),
    "model.channels": (1, 1024),
    **dict.fromkeys(("model.kernel_time", "model.kernel_mel"), (1, 31)),
    "model.stride_time": (1, 16),
    "model.hidden": (4, 16384),
    "model.blocks": (0, 64),
    "model.dropout": (0.0, 0.9),
    **dict.fromkeys(("loss.parameters", "loss.response", "loss.gain"), (0.0, 1e6)),
    **dict.fromkeys(("train.batch_size", "train.eval_pairs", "train.fsdp"), (1, 1_000_000)),
    **dict.fromkeys(("train.steps", "train.steps_per_call", "train.log_every"), (1, 2**31 - 1)),
    "train.learning_rate": (1e-9, 10.0),
    "train.warmup_steps": (0, 2**31 - 1),
    "train.weight_decay": (0.0, 10.0),
    "train.clip_norm": (1e-6, 1e9),
    "train.ema_decay": (0.0, 0.999999),
    **dict.fromkeys(("train.eval_every", "train.checkpoint_every"), (1, 2**31 - 1)),
    "train.devices": (0, 1_000_000),
    "train.keep_newest": (2, 1_000_000),
    "train.keep_every": (0, 2**31 - 1),
    "train.profile_steps": (0, 1000),
    "evaluation.seconds": (0.5, 60.0),
    "evaluation.pairs": (4, 1_000_000),
    "evaluation.tune_pairs": (16, 1_000_000),
    "evaluation.bootstrap": (10, 100_000),
}


def default() -> config_dict.ConfigDict:
    """All settings at their defaults, locked against unknown keys."""
    return config_dict.ConfigDict(dataclasses.asdict(Config()), type_safe=True).lock()


def as_dict(config: Config) -> dict[str, Any]:
    """The settings as plain nested dicts, lists and numbers (for JSON)."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """Settings from nested dicts as made by `as_dict`, perhaps through JSON (lists for tuples).

    Raises:
      ConfigError: a key is missing or unknown, or a value has the wrong type or range.
    """
    return _check(_build(Config, values, "", None))


def from_card(values: dict[str, Any]) -> Config:
    """`from_dict` for a run's card: what it lacks, being older, is at its default; it says so."""
    absent: list[str] = []
    config = _check(_build(Config, values, "", absent))
    absent = [key for key in absent if key not in FREE_KEYS]  # these change no result
    if absent:
        line = "the run has no %s yet: taken at the default"
        logging.getLogger("eqst").warning(line, ", ".join(absent))
    return config


def validate(config: config_dict.ConfigDict) -> Config:
    """The frozen, checked form of a ConfigDict.

    Raises:
      ConfigError: in one line, the key, its value and what would be allowed.
    """
    return from_dict(config.to_dict())


def differing_keys(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Settings that differ between two configs, as 'key: old -> new'."""
    lines = []
    for key in sorted(set(old) | set(new)):
        path = f"{prefix}{key}"
        a, b = old[key] if key in old else None, new[key] if key in new else None
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differing_keys(a, b, f"{path}.")
        elif path not in FREE_KEYS and json.dumps(a) != json.dumps(b):
            lines.append(f"{path}: {a} -> {b}")
    return lines


def _build(kind: type, values: Any, prefix: str, absent: list[str] | None) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"config: {prefix[:-1]} is {values!r}, not a group of settings")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in fields:
            raise ConfigError(f"config: no setting {prefix + key!r}; there are {', '.join(fields)}")
    built = {}
    for name in fields:
        hint = hints[name]
        if name not in values:
            if absent is None:
                raise ConfigError(f"config: setting {prefix}{name} is missing")
            absent.append(f"{prefix}{name}")
            built[name] = getattr(kind(), name)
        elif dataclasses.is_dataclass(hint):
            group = f"{prefix}{name}."
            built[name] = _build(typing.cast(type, hint), values[name], group, absent)
        else:
            built[name] = _cast(hint, values[name], f"{prefix}{name}")
    return kind(**built)


def _cast(hint: Any, value: Any, key: str) -> Any:
    """`value` as type `hint`; ints pass as floats, lists as tuples, nothing else is converted."""
    if isinstance(hint, types.GenericAlias):
        item = typing.get_args(hint)[0]
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"config: {key} is {value!r}; it takes a tuple of {item.__name__}")
        return tuple(_cast(item, element, key) for element in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1023 else math.inf  # Python's have no bound
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"config: {key} is {value!r}; it takes a {hint.__name__}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"config: {key} is {value!r}; it takes a finite number")
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"config: {message}")


def _check(config: Config) -> Config:
    parts = {name: x for name, x in vars(config).items() if dataclasses.is_dataclass(x)}
    flat = vars(config) | {
        f"{group}.{key}": x for group, part in parts.items() for key, x in vars(part).items()
    }
    for key, allowed in CHOICES.items():
        _require(flat[key] in allowed, f"{key} is {flat[key]!r}; choose {' or '.join(allowed)}")
    for key, (low, high) in BOUNDS.items():
        values = flat[key] if isinstance(flat[key], tuple) else (flat[key],)
        _require(len(values) > 0, f"{key} is empty; it takes at least one value")
        for value in values:
            _require(low <= value <= high, f"{key} is {value}; it lies between {low} and {high}")
    data, model, features = config.data, config.model, config.features
    _require(len(data.sources) > 0, "data.sources is empty; name at least one source")
    for source in data.sources:
        kind, _, rest = source.partition(":")
        known = source == "synthetic" or (kind in ("folder", "tfds") and rest != "")
        _require(known, f"source {source!r} is not synthetic, folder:PATH or tfds:NAME")
    _require(
        len(data.source_weights) == len(data.sources) and sum(data.source_weights) > 0,
        f"data.source_weights has {len(data.source_weights)} values for {len(data.sources)} "
        "sources; give one each, not all 0",
    )
    _require(
        data.folds == 0 or (data.folds > 1 and data.fold < data.folds),
        f"data.fold is {data.fold} of {data.folds} folds; take 2 folds or more and fold < folds",
    )
    _require(
        data.noise_low_db <= data.noise_high_db,
        f"data.noise_low_db is {data.noise_low_db}, above noise_high_db ({data.noise_high_db})",
    )
    _require(
        features.low_hz < features.high_hz,
        f"features.low_hz is {features.low_hz}, not below high_hz ({features.high_hz})",
    )
    longest = features.window * (POOLED_WINDOW_FACTOR if features.kind == "pooled" else 1)
    shortest = round(min(data.segment_seconds) * data.sample_rate)
    _require(
        longest <= shortest,
        f"features.window is {features.window}: windows of {longest} samples do not fit a segment "
        f"of {shortest} samples (data.segment_seconds)",
    )
    _require(
        features.window % features.hop == 0,
        f"features.hop is {features.hop}; it has to divide features.window ({features.window})",
    )
    _require(
        len(model.kernel_time) == len(model.kernel_mel) == len(model.stride_time),
        "model.kernel_time, kernel_mel and stride_time differ in length",
    )
    _require(
        features.kind == "pooled" or data.rendering != "pooled",
        "data.rendering 'pooled' needs features.kind 'pooled'",
    )
    _require(
        (features.kind == "pooled") == (model.comparison == "direct"),
        f"model.comparison {model.comparison!r} does not go with features.kind {features.kind!r}",
    )
    _require(
        data.pipeline == "resident" or data.rendering in ("host", "device"),
        f"data.pipeline 'tfdata' renders on 'host' or 'device', not {data.rendering!r}",
    )
    _require(
        data.pipeline == "tfdata" or data.rendering != "host",
        "data.rendering 'host' needs data.pipeline 'tfdata'",
    )
    shares = data.curve_share + data.noise_share + data.one_sided_noise_share + data.gate_share
    _require(
        data.warp == 1.0 and shares == 0.0 or data.rendering in ("device", "pooled"),
        "data.warp, curve_share and the noise shares need data.rendering 'device' or 'pooled', "
        f"not {data.rendering!r}",
    )
    _require(
        data.gate_share == 0.0 or data.rendering == "pooled",
        f"data.gate_share needs data.rendering 'pooled', not {data.rendering!r}",
    )
    kept, saved = config.train.keep_every, config.train.checkpoint_every
    said = f"train.keep_every is {kept}; take 0 or a multiple of checkpoint_every ({saved})"
    _require(kept % saved == 0, said)
    _require(config.loss.parameters + config.loss.response > 0, "both loss weights are 0")
    _check_resident(data, config.train)
    return config


def _check_resident(data: Data, train: Train) -> None:
    """What only the resident path does, and which steps can be one call of it."""
    ahead, lengths = train.steps_per_call, len(data.segment_seconds)
    _require(
        data.pipeline == "resident" or (ahead == 1 and not data.shard_corpus),
        "train.steps_per_call above 1 and data.shard_corpus need data.pipeline 'resident'",
    )
    bound = math.gcd(train.steps, train.log_every, train.eval_every, train.checkpoint_every)
    _require(
        ahead == 1 or (bound % ahead == 0 and ahead % lengths == 0),
        f"train.steps_per_call is {ahead}; it has to divide {bound} (what steps, log_every, "
        f"eval_every and checkpoint_every have in common), as a multiple of the {lengths} "
        "data.segment_seconds, or be 1",
    )
