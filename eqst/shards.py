"""A set as `eqst.build` makes it: fixed chunks of recordings in ArrayRecord shards, and its reader.

A split's chunks lie recording after recording in the order of `info.json`, so that sample t of a
recording is in chunk `first + t // chunk`: a segment costs the one or two chunks it lies in, from
wherever the shards are, and no copy of the corpus is made. To TFDS the folder is a prepared set of
its own (dataset_info.json, features.json); what it has no place for is in `info.json` (recordings,
what was rejected, sizes and checksums of the shards) and `power.npy` (loudness of every 100 ms).

Neither writing nor reading needs tensorflow.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from eqst.store import Corpus, CorpusError, weights

FORMAT = 1
INFO, POWER = "info.json", "power.npy"
SPLITS = ("train", "dev")


def shard_name(name: str, split: str, number: int, count: int) -> str:
    """As TFDS names it."""
    return f"{name}-{split}.array_record-{number:05d}-of-{count:05d}"


def check_installed(what: str) -> None:
    """Raises CorpusError where what reads and writes sets is missing."""
    names = ("tensorflow_datasets", "array_record")
    if any(importlib.util.find_spec(name) is None for name in names):
        raise CorpusError(f"{what} needs the extra [data]: pip install 'eqst[data]'")


# ---- writing


def _features(chunk: int) -> Any:
    import tensorflow_datasets as tfds

    # Not features.Audio: it imports tensorflow, and stores each sample as an integer of 1 to 10
    # bytes; as bytes they are two each, and are read without a copy.
    return tfds.features.FeaturesDict(
        {
            "audio": tfds.features.Tensor(shape=(chunk,), dtype=np.int16, encoding="bytes"),
            "length": tfds.features.Scalar(np.int32),  # samples of `audio` that are the recording's
            "talker": tfds.features.Text(),
            "recording": tfds.features.Text(),
            "chunk": tfds.features.Scalar(np.int32),  # its number in the recording
            "gain": tfds.features.Scalar(np.float32),  # brings audio / 32768 to -23 LUFS
        }
    )


def chunk_examples(
    samples_T: np.ndarray, first: int, last: int, chunk: int, facts: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The examples of chunks `first` .. `last` - 1 of a recording; the last may be a short one."""
    for number in range(first, last):
        piece_T = samples_T[number * chunk : (number + 1) * chunk]
        audio_T = np.zeros(chunk, np.int16)
        audio_T[: len(piece_T)] = piece_T
        yield {"audio": audio_T, "length": len(piece_T), "chunk": number, **facts}


def write_shard(
    path: pathlib.Path, examples: Iterable[dict[str, Any]], chunk: int
) -> dict[str, Any]:
    """Writes one shard by TFDS's own writer; the same examples give the same bytes.

    TFDS's GeneratorBasedBuilder is not used: it sends all examples through one process and a
    shuffler that writes the set to disk twice, and starts anew where it was interrupted. Here each
    shard is a piece of work of its own.

    Returns:
      its number of examples, their bytes, and the file's bytes and checksum.

    Raises:
      OSError: it cannot be written.
    """
    from tensorflow_datasets.core import example_serializer, file_adapters, writer

    features = _features(chunk)
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    count = size = 0

    def serialised() -> Iterator[tuple[int, bytes]]:
        nonlocal count, size
        for example in examples:
            proto = serializer.get_tf_example(features.encode_example(example))
            # Without being asked to, protobuf orders the features by a hash of the process's own.
            record = proto.SerializeToString(deterministic=True)
            yield count, record
            count, size = count + 1, size + len(record)

    file_format = file_adapters.FileFormat.ARRAY_RECORD
    try:
        writer.ExampleWriter(file_format=file_format).write(path, serialised())
    except RuntimeError as error:  # ArrayRecord's word for a full disk, among others
        reason = str(error).split(";")[0]
        raise OSError(f"{path} cannot be written ({reason}): the same command goes on") from None
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "examples": count,
        "example_bytes": size,
        "bytes": path.stat().st_size,
        "sha256": digest,
    }


def write_metadata(
    folder: pathlib.Path,
    name: str,
    version: str,
    chunk: int,
    sample_rate: int,
    shards: dict[str, list[dict[str, Any]]],
) -> None:
    """What makes a folder of shards a prepared set to TFDS.

    Args:
      folder: holds the shards of all splits.
      name, version: of the set.
      chunk: samples of an example.
      sample_rate: in Hz.
      shards: by split, what `write_shard` returned for each.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info

    identity = dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version(version), data_dir=os.fspath(folder), module_name=""
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=_features(chunk),
        description="Recordings at -23 LUFS in chunks of one length, by eqst.build.",
        metadata=tfds.core.MetadataDict(sample_rate=sample_rate),
    )
    info.set_file_format("array_record")
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard["examples"] for shard in written],
            num_bytes=sum(shard["example_bytes"] for shard in written),
            filename_template=tfds.core.ShardedFileTemplate(
                dataset_name=name, data_dir=folder, split=split, filetype_suffix="array_record"
            ),
        )
        for split, written in shards.items()
    ]
    info.set_splits(tfds.core.SplitDict(splits))
    info.write_to_directory(folder)


# ---- reading


class Chunks:
    """The int16 samples of a split in a row, each chunk at full length; reads what is sliced."""

    def __init__(self, paths: list[str], counts: list[int], chunk: int):
        """Opens nothing yet.

        Args:
          paths: of the shards, in order.
          counts: how many chunks each has.
          chunk: samples of one.
        """
        from array_record.python import array_record_data_source

        self._chunk, self._paths, self._ends = chunk, paths, np.cumsum(counts)
        # With the numbers given it does not open every shard to count.
        parts = [f"{path}[0:{count}]" for path, count in zip(paths, counts, strict=True)]
        self._records = array_record_data_source.ArrayRecordDataSource(parts)

    def __len__(self) -> int:
        return len(self._records) * self._chunk

    def __getitem__(self, where: slice) -> np.ndarray:
        first, last = where.start // self._chunk, -(-where.stop // self._chunk)
        samples_T = np.concatenate([self._read(number) for number in range(first, last)])
        begin = where.start - first * self._chunk
        return samples_T[begin : begin + where.stop - where.start]

    def _read(self, number: int) -> np.ndarray:
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            example = tf_example_pb2.Example.FromString(self._records[number])
            audio_T = np.frombuffer(example.features.feature["audio"].bytes_list.value[0], "<i2")
        # ArrayRecord has RuntimeError for a wrong hash and IndexError for a cut that fits its
        # blocks; what passes it may be no example.
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise self._damaged(number, str(error) or type(error).__name__) from None
        except Exception as error:  # protobuf's, whose name has moved between its versions
            raise self._damaged(number, type(error).__name__) from None
        if len(audio_T) != self._chunk:
            raise self._damaged(number, f"{len(audio_T)} samples, not {self._chunk}")
        return audio_T

    def _damaged(self, number: int, reason: str) -> CorpusError:
        path = self._paths[int(np.searchsorted(self._ends, number, side="right"))]
        return CorpusError(
            f"{path} is damaged ({reason.splitlines()[0][:120]}): copy it again; its sha256 is in "
            f"{INFO}"
        )


class Built(NamedTuple):
    """A set opened.

    Attributes:
      corpus: its recordings, named "tfds/RECORDING".
      talker_R: the talker of each, named as a `folder:` source names it: hashes agree.
      official: the split of each talker.
      digest: of all that is in the set.
    """

    corpus: Corpus
    talker_R: tuple[str, ...]
    official: dict[str, str]
    digest: str


def hashed_name(talker: str) -> str:
    """What is hashed to split talkers: their name as a `folder:` source has it."""
    return f"folder/{talker}"


def is_set(folder: os.PathLike | str) -> bool:
    """Whether a folder is a set that `eqst.build` finished."""
    return (epath.Path(folder) / INFO).exists()


def read_info(folder: os.PathLike | str) -> dict[str, Any]:
    """A set's info.json. Raises CorpusError: damaged, or of another format."""
    path = epath.Path(folder) / INFO
    try:
        info = json.loads(path.read_text())
        version = info["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CorpusError(f"{path} is damaged: copy the set again, or build it again") from None
    if version != FORMAT:
        raise CorpusError(
            f"{path} is of format {version}, this version of EQST reads {FORMAT}: build it again"
        )
    return info


def load(folder: os.PathLike | str) -> Built:
    """Opens a set; its shards are opened when something is read from them.

    Args:
      folder: of one version; a local one, or a bucket's (gs://..) where the clients for it are
        installed: etils' for the small files, ArrayRecord's own for the shards.

    Raises:
      CorpusError: a file is missing, has another size, or is damaged.
    """
    check_installed(f"tfds:{folder}")
    root, info = epath.Path(folder), read_info(folder)
    for split in info["shards"].values():
        for shard in split:
            _check_size(root / shard["name"], shard["bytes"])
    rows, chunk, order = info["recordings"], info["chunk"], list(info["shards"])
    try:
        with (root / POWER).open("rb") as file:
            power_V = np.load(file)
    except (OSError, ValueError, EOFError):
        power_V = np.zeros(0)
    if len(power_V) != sum(row["blocks"] for row in rows):
        raise CorpusError(f"{root / POWER} is damaged: copy it again, or build the set again")
    length_R = np.array([row["length"] for row in rows], np.int64)
    weight_R = weights(length_R)
    samples = tuple(
        Chunks([str(root / x["name"]) for x in part], [x["examples"] for x in part], chunk)
        for part in info["shards"].values()
    )
    rejected = info["rejected"]
    corpus = Corpus(
        sample_rate=info["sample_rate"],
        talker_R=tuple(f"tfds/{row['recording']}" for row in rows),
        store_R=np.array([order.index(row["split"]) for row in rows], np.int32),
        start_R=np.array([row["first_chunk"] for row in rows], np.int64) * chunk,
        length_R=length_R,
        gain_R=np.array([row["gain"] for row in rows], np.float32),
        weight_R=weight_R / weight_R.sum(),
        power_R=tuple(np.split(power_V, np.cumsum([row["blocks"] for row in rows])[:-1])),
        samples=samples,
        skipped=(f"{len(rejected)} files or recordings of {root}: see {INFO}",) if rejected else (),
    )
    return Built(
        corpus,
        tuple(hashed_name(row["talker"]) for row in rows),
        {hashed_name(row["talker"]): row["split"] for row in rows},
        hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest(),
    )


def _check_size(path: epath.Path, size: int) -> None:
    try:
        there = path.stat().length
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CorpusError(f"{path} cannot be read ({reason}): copy it again") from None
    if there != size:
        raise CorpusError(f"{path} is damaged: {there} bytes, not {size}: copy it again")
