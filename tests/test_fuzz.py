"""Random files, settings and command lines: each is used, or refused in one line.

Hypothesis draws the cases from a fixed seed (derandomize), so that a run is the same everywhere;
EQST_FUZZ=10 tries ten times as many, others every time. What it has found so far stands at the end
as plain cases.
"""

import io
import math
import os
import struct
import sys
import time
import tracemalloc
import unittest.mock

import numpy as np
import pytest
import soundfile
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

from eqst import audio, command, eq, match, train
from eqst.audio import AudioError
from eqst.config import Config, ConfigError, as_dict, from_dict, validate

EFFORT = int(os.environ.get("EQST_FUZZ", "1"))
# ml_collections 1.1 loads files by a call that Python 3.15 will drop; theirs to change.
pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method:DeprecationWarning")

RATE = 8000
KNOWN = eq.EqParams(np.array([100.0, 700.0, 2500.0, 3500.0]), np.full(4, 3.0), np.ones(4))
# Far above what any of these small files needs, far below what their headers can claim.
MOST_BYTES, MOST_SECONDS = 150e6, 20.0


def fuzz(examples: int):
    """Settings of one fuzzed test."""
    return settings(
        derandomize=EFFORT == 1, deadline=None, max_examples=examples * EFFORT, database=None,
        print_blob=False,
    )  # fmt: skip


def one_line(error: BaseException, most: int = 600) -> str:
    text = str(error)
    assert text and len(text.splitlines()) == 1 and len(text) < most, text
    return text


# ---- files


class File(bytes):
    """The content of a file; hypothesis prints it when a test fails, and should not print all."""

    def __repr__(self) -> str:
        return f"{len(self)} bytes, {bytes(self[:80])!r}.."


def encoded(container: str, subtype: str, rate: int = RATE) -> bytes:
    samples = 0.1 * np.random.default_rng(0).standard_normal((round(1.1 * rate), 1))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return File(file.getvalue())


GOOD = [
    encoded(*kind)
    for kind in [
        ("WAV", "PCM_16"), ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"),
        ("WAV", "PCM_U8"), ("WAV", "ULAW"), ("WAV", "IMA_ADPCM"), ("WAV", "MS_ADPCM"),
        ("WAVEX", "PCM_24"), ("RF64", "PCM_16"), ("W64", "PCM_16"), ("AIFF", "PCM_16"),
        ("AU", "PCM_16"), ("CAF", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"),
        ("MP3", "MPEG_LAYER_III", 16000),
    ]
]  # fmt: skip
MAGIC = [
    b"", b"RIFF", b"RIFX", b"RIFF\xff\xff\xff\xffWAVEfmt ", b"RF64", b"riff", b"fLaC", b"OggS",
    b"FORM", b"caff", b".snd", b"ID3\x03", b"\xff\xfb\x90\x00", b"NIST_1A", b"Creative Voice File",
    b"\x64\xa3\x01\x00", b"MATLAB 5.0", b"SOUND SAMPLE DATA ", b" paf", b"fap ", b"2BIT", b"TWIN",
]  # fmt: skip
SIZES = st.sampled_from([0, 1, 2, 3, 8, 255, 1024, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31,
                         2**32 - 1, 100_000]) | st.integers(0, 2**32 - 1)  # fmt: skip


@st.composite
def mutated(draw) -> File:
    """A good file with some bytes, words or sizes changed, cut, or put in; mostly in its header."""
    data = bytearray(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(data), 120)) | st.integers(0, len(data)))
        kind = draw(st.sampled_from(["byte", "u16", "u32", "u32be", "u64", "cut", "put", "drop"]))
        if kind == "byte":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "u16":
            data[at : at + 2] = struct.pack("<H", draw(SIZES) % 2**16)
        elif kind == "u32":
            data[at : at + 4] = struct.pack("<I", draw(SIZES))
        elif kind == "u32be":
            data[at : at + 4] = struct.pack(">I", draw(SIZES))
        elif kind == "u64":
            data[at : at + 8] = struct.pack("<Q", draw(SIZES) << draw(st.integers(0, 32)))
        elif kind == "cut":
            del data[at:]
        elif kind == "put":
            data[at:at] = draw(st.binary(min_size=1, max_size=40))
        else:
            del data[at : at + draw(st.integers(1, 40))]
    return File(data)


@st.composite
def wav_headers(draw) -> File:
    """A WAV whose header fields are drawn, most of them sensible, round 0.5 to 2 s of noise."""

    def mostly(good, wild=SIZES):
        return draw(wild if draw(st.integers(0, 9)) == 0 else st.sampled_from(good))

    tag, bits = mostly(
        [(1, 16), (1, 24), (1, 8), (3, 32), (3, 64), (6, 8), (7, 8)],
        st.tuples(st.integers(0, 65535), st.sampled_from([0, 4, 8, 12, 16, 32, 64, 128])),
    )
    channels = mostly([1, 1, 2, 3, 6, 12, 255, 1024], st.integers(0, 65535)) % 2**16
    rate = mostly([RATE, 11025, 44100, 192000, 3000])
    align = mostly([channels * bits // 8]) % 2**16
    length = round(min(draw(st.floats(0.5, 2.0)) * rate * channels * bits / 8, 4e5))
    body = np.random.default_rng(draw(st.integers(0, 9))).bytes(length)
    facts = struct.pack("<HHIIHH", tag, channels, rate, mostly([rate * align % 2**32]), align, bits)
    return File(
        b"RIFF" + struct.pack("<I", mostly([36 + len(body)])) + b"WAVEfmt "
        + struct.pack("<I", mostly([16])) + facts + b"data"
        + struct.pack("<I", mostly([len(body)])) + body
    )  # fmt: skip


def noise() -> st.SearchStrategy[File]:
    """Bytes of any kind, behind the first bytes of some format."""
    return st.builds(
        lambda head, body, times: File(head + body * times),
        st.sampled_from(MAGIC), st.binary(max_size=300), st.integers(1, 200),
    )  # fmt: skip


def float_files() -> st.SearchStrategy[File]:
    """WAV of 1.1 s of floats, among them all that float32 can hold."""
    wide = st.floats(width=32) | st.sampled_from([1e-45, 1e-38, 1e30, 3.4e38, -3.4e38])

    def build(values: list[float], scale: float) -> File:
        samples = np.resize(np.array(values, np.float32), round(1.1 * RATE))
        with np.errstate(all="ignore"):
            samples = samples + np.float32(scale) * np.sin(
                np.arange(len(samples)), dtype=np.float32
            )
        file = io.BytesIO()
        soundfile.write(file, samples, RATE, format="WAV", subtype="FLOAT")
        return File(file.getvalue())

    return st.builds(build, st.lists(wide, min_size=1, max_size=50), wide)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with a good reference, where one file after the other is tried."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "ref.wav").write_bytes(GOOD[0])
    return folder


def use(room, data: bytes) -> bool:
    """Reads and matches a file: whether that was possible; anything but AudioError passes."""
    for name in ("in", "out.wav"):
        (room / name).unlink(missing_ok=True)
    (room / "in").write_bytes(data)
    paths = [str(room / name) for name in ("in", "ref.wav", "out.wav")]
    matcher = match.Matcher(lambda a_T, b_T: answer(a_T, b_T), model_rate=RATE)
    began = time.monotonic()
    tracemalloc.start()
    try:
        said: list[str] = []
        found = match.run(
            *paths[:2], output=paths[2], load=lambda: matcher, say=said.append
        )  # fmt: skip
        assert np.isfinite(np.stack(found.params)).all() and math.isfinite(found.preamp_db)
        assert np.isfinite(audio.read(paths[2]).samples_TC).all()
        used = True
    except AudioError as error:
        one_line(error)
        assert not (room / "out.wav").exists()
        used = False
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert sorted(path.name for path in room.iterdir() if path.name != "out.wav") == [
        "in", "ref.wav",
    ]  # fmt: skip
    assert peak_bytes < MOST_BYTES, f"{peak_bytes / 1e6:.0f} MB for {len(data)} bytes"
    assert time.monotonic() - began < MOST_SECONDS
    return used


def answer(input_T: np.ndarray, reference_T: np.ndarray) -> eq.EqParams:
    """A model that looks at what it hears."""
    assert np.isfinite(input_T).all() and np.isfinite(reference_T).all()
    assert len(input_T) and len(reference_T)
    return KNOWN


@fuzz(250)
@given(mutated())
def test_mutated_files(room, data):
    use(room, data)


@fuzz(200)
@given(wav_headers())
def test_wav_headers(room, data):
    use(room, data)


@fuzz(250)
@given(noise())
def test_bytes_of_any_kind(room, data):
    use(room, data)


@fuzz(80)
@given(float_files())
def test_floats_of_any_size(room, data):
    use(room, data)


def test_the_good_files_are_used(room):
    assert all(use(room, data) for data in GOOD)


# ---- settings


def keys_of(values: dict, prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        found.append(prefix + key)
        if isinstance(value, dict):
            found += keys_of(value, f"{prefix}{key}.")
    return found


KEYS = keys_of(as_dict(Config()))
NUMBERS = (
    st.integers() | st.floats() | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, -(10**400),
        math.nan, math.inf, 1e308, 5e-324, 0.1, 1.0, 44100, 8000, 64, True, False])
)  # fmt: skip
LEAVES = NUMBERS | st.text(max_size=20) | st.none() | st.binary(max_size=5)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner)
    | st.dictionaries(st.text(max_size=5) | st.sampled_from(["steps", "kind"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def change(values: dict, key: str, value: object) -> None:
    """Sets a dotted key, as far as the way there still is one of groups."""
    *groups, name = key.split(".")
    for group in groups:
        values = values[group]
        if not isinstance(values, dict):
            return
    values[name] = value


def assert_config_or_one_line(make, keys) -> None:
    """`make` gives a Config that its own dict gives again, or one line that names a setting."""
    try:
        made = make()
    except ConfigError as error:
        text = one_line(error, most=10_000)  # a command cuts it
        named = [key for key in [*keys, *KEYS] if key.rpartition(".")[2] in text]
        assert text.startswith("config: ") and (named or "source" in text or "loss" in text), text
    else:
        assert isinstance(made, Config) and from_dict(as_dict(made)) == made
        hash(made)


@fuzz(600)
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3))
def test_settings_of_any_value(changes):
    values = as_dict(Config())
    for key, value in changes:
        change(values, key, value)
    assert_config_or_one_line(lambda: from_dict(values), [key for key, _ in changes])


@fuzz(300)
@given(st.dictionaries(st.text(max_size=10) | st.sampled_from(KEYS), VALUES, max_size=4))
def test_dictionaries_that_are_no_settings(values):
    assert_config_or_one_line(lambda: from_dict(as_dict(Config()) | values), list(values))
    assert_config_or_one_line(lambda: from_dict(values), list(values))


# ---- command lines


def call(entry: str, define, body, words: list[str]) -> str | None:
    """The line that a command line is refused with, or None; anything but SystemExit passes."""
    before, argv = set(flags.FLAGS), sys.argv
    sys.argv = [entry, *words]
    sys.modules.pop("config_config", None)
    try:
        with unittest.mock.patch.object(command, "keep_compiled"):  # it is for all of a process
            command.start(entry, define, body)
    except SystemExit as exit:
        assert isinstance(exit.code, str) and exit.code.startswith(f"{entry}: "), exit.code
        return one_line(exit)
    finally:
        sys.argv = argv
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
    return None


PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
TEXTS = PLAIN | NUMBERS.map(str) | st.sampled_from(
    ["", "(", "(1,", "(1, 2)", "1,2", "[1]", "{}", "{'a': 1}", "None", "true", "1e400", "0x10",
     "1_0", "('a',)", "(1.0, (2,))", "__import__('os')", "'", '"', "\\n", "synthetic",
     "folder:x", "-5"]
)  # fmt: skip
TYPED = st.sampled_from(KEYS) | PLAIN | st.builds("{}.{}".format, st.sampled_from(KEYS), PLAIN)


@fuzz(250)
@given(
    st.lists(st.tuples(st.sampled_from(["--", "-", "--no"]), TYPED, TEXTS | st.none()), max_size=3)
)
def test_overrides_of_any_text(changes):
    words = [
        f"{dashes}config.{key}" + ("" if text is None else f"={text}")
        for dashes, key, text in changes
    ]
    path = os.path.join(os.path.dirname(__file__), "..", "configs", "pooled.py")
    seen = []

    def body() -> None:
        seen.append(validate(flags.FLAGS.config))

    line = call("eqst.train", train.define_flags, body, [f"--config={path}", "--workdir=x", *words])
    assert (line is None) == (len(seen) == 1)
    if seen:
        assert from_dict(as_dict(seen[0])) == seen[0]


@fuzz(250)
@given(
    st.lists(
        st.builds(
            "{}{}{}{}".format,
            st.sampled_from(["--", "-", "", "---", "--no"]),
            st.sampled_from(["input", "reference", "output", "amount", "overwrite", "clip", "",
                             "workdir", "flagfile", "undefok", "v", "verbosity"]) | PLAIN,
            st.sampled_from(["=", "", "=="]),
            TEXTS | st.sampled_from(["/gone", ".", "/dev/null"]),
        ),
        max_size=5,
    )
)  # fmt: skip
def test_words_of_any_kind(words):
    """Nothing that is drawn here can be matched, for there is no input."""
    if not set(command.HELP) & set(words):
        assert call("eqst.match", match.define_flags, match.main, words)


# ---- what was found


def floats(*values: float) -> bytes:
    samples = 0.1 * np.random.default_rng(0).standard_normal(9000)
    samples[100 : 100 + len(values)] = values
    file = io.BytesIO()
    with np.errstate(over="ignore"):
        soundfile.write(file, samples.astype(np.float32), RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # A sum with infinities of both signs was a RuntimeWarning.
        (floats(np.inf, -np.inf), "not numbers"),
        # A NaN that signals was one when it was converted.
        (floats(1.0).replace(struct.pack("<f", 1.0), b"\x01\x00\xa0\x7f"), "not numbers"),
        # 3e38 times the EQ was infinite in the file that was written.
        (floats(3.4e38), "samples up to 3.4e.38, where full scale is 1"),
        (floats(1e13, -1e13), "samples up to 1e.13, where full scale is 1"),
        # libmpg123 wrote notes on stderr, and libsndfile that the file did not exist.
        (b"\xff\xfb\x90\x00" * 5000, "not audio that libsndfile reads .unknown content.|cut|damag"),
        # FLAC: 2^35 samples promised, some there.
        (GOOD[14][:21] + b"\xf8" + GOOD[14][22:], "cut short|damaged|does not say|not audio"),
    ],
    ids=["infinities", "signalling", "huge", "large", "mpeg", "promised"],
)
def test_files_that_were_found(data, expected, room, capfd):
    (room / "in").write_bytes(data)
    with pytest.raises(AudioError, match=expected):
        match.run(str(room / "in"), str(room / "ref.wav"), load=lambda: pytest.fail("loaded"))
    assert capfd.readouterr().err == ""
    assert not use(room, data)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.learning_rate", 10**400, "train.learning_rate is inf; it takes a finite number"),
        ("train.a\nb", 1, r"no setting 'train.a\\nb'; there are"),
        ("data.source_weights", [1e308], "data.source_weights is 1e.308; it lies between"),
    ],
)
def test_settings_that_were_found(key, value, expected):
    values = as_dict(Config())
    change(values, key, value)
    with pytest.raises(ConfigError, match=expected) as caught:
        from_dict(values)
    one_line(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--\x1e=1"], r"unknown option --\x1e: --help lists the options"),
        (["--input=\x85"], "--reference missing: give --reference=.. (see --help)"),
        (["--"], "--input and --reference missing: give --input=.. --reference=.. (see --help)"),
        (["--amount"], "Missing value for flag --amount; --help lists the options"),
    ],
)
def test_words_that_were_found(words, expected):
    assert call("eqst.match", match.define_flags, match.main, words) == f"eqst.match: {expected}"
