"""Runs that live in a bucket: the record, the card, exact resuming, what a sweep reads of them."""

import functools
import json
import os
import signal
from pathlib import Path

import bucket as buckets
import pytest
from etils import epath
from test_interruption import figures
from test_sweep import members_of, write_member
from test_train import POOLED, TINY, silent

from eqst import card, checkpoint, record, train
from eqst.sweeps import bucket as bucket_checks
from eqst.sweeps import members, outcomes, single


def test_the_bucket_is_one(bucket: buckets.Bucket) -> None:
    path = epath.Path("gs://b/folder/file")
    path.write_text("1")
    with pytest.raises(OSError, match="appended"), path.open("a") as file:
        file.write("2")
    assert (bucket.folder / "b/folder/file").read_text() == "1"
    path.unlink()
    assert not path.parent.exists() and not path.parent.is_dir()


def test_the_record_is_rewritten_at_the_latest_before_a_checkpoint(
    bucket: buckets.Bucket, monkeypatch
) -> None:
    workdir = epath.Path("gs://b/run")
    kept = record.Record(workdir, 0, False, silent)
    for step in range(5):
        kept.write(step, {"loss": 0.5})
    assert card.metrics_of(workdir) == ()  # a bucket takes an object once a second
    kept.flush()
    assert [row["step"] for row in card.metrics_of(workdir)] == [0, 1, 2, 3, 4]
    kept.write(5, {"loss": 0.5})
    # Taken up at a checkpoint before: what came after it will be written again.
    again = record.Record(workdir, 3, False, silent)
    again.write(4, {"loss": 0.25})
    again.flush()
    assert [row["loss"] for row in card.metrics_of(workdir)] == [0.5, 0.5, 0.5, 0.5, 0.25]
    monkeypatch.setattr(record, "FLUSH_SECONDS", 0.0)  # and while it trains, for who looks
    again.write(5, {"loss": 0.125})
    assert card.metrics_of(workdir)[-1] == {"step": 5, "loss": 0.125}


@pytest.mark.long
def test_a_run_in_a_bucket_resumes_exactly(
    bucket: buckets.Bucket, configure, tmp_path: Path
) -> None:
    """Stopped between checkpoints, and killed after rows that no checkpoint has."""
    settings = configure(TINY | POOLED | {"data.cache_dir": str(tmp_path / "cache")})
    train.train(settings, tmp_path / "local", silent)

    def stop(line: str) -> None:
        if line.startswith("step 1/"):
            os.kill(os.getpid(), signal.SIGTERM)

    class Died(Exception):
        pass

    def die(line: str) -> None:
        if line.startswith("step 5/"):
            raise Died

    with pytest.raises(train.Interrupted):
        train.train(settings, "gs://b/run", stop)
    with pytest.raises(Died):
        train.train(settings, "gs://b/run", die)
    said: list[str] = []
    train.train(settings, "gs://b/run", said.append)
    assert said[0] == "resumed at step 4 of 6"
    assert figures(bucket.folder / "b/run") == figures(tmp_path / "local")
    ends = [checkpoint.load(where, which="last") for where in ("gs://b/run", tmp_path / "local")]
    one, other = (card.named_leaves(loaded.params) for loaded in ends)
    assert one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)
    assert checkpoint.load("gs://b/run").step == checkpoint.load(tmp_path / "local").step
    with pytest.raises(Exception, match="holds a run with other settings"):
        changed = configure(
            TINY | POOLED | {"data.cache_dir": str(tmp_path / "cache"), "train.steps": 7}
        )
        train.train(changed, "gs://b/run", silent)


def test_a_sweep_reads_members_of_a_bucket(bucket: buckets.Bucket, tmp_path: Path) -> None:
    from test_sweep import CONFIG

    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    member = members_of(path)[0]
    workdir = epath.Path("gs://b/w")
    assert not members.done(workdir, member)
    write_member(bucket.folder / "b/w" / member.name, member, [1.0, 2.0], 2.0)
    write_member(tmp_path / "local" / member.name, member, [1.0, 2.0], 2.0)
    assert members.done(workdir, member)
    assert outcomes.outcome(workdir, member) == outcomes.outcome(tmp_path / "local", member)
    # Evaluated on others: at no moment is there a mixture that counts as done.
    folder = workdir / member.name / "heldout"
    facts = json.loads((folder / "results.json").read_text()) | {"recordings": ["a", ""]}
    is_done = functools.partial(members.done, workdir, member)
    assert is_done() and is_done("a")
    bucket.written.clear()
    single._write(folder, json.dumps(facts), "protocol\n")
    assert is_done("a") and not is_done("b")
    assert [x.rpartition("/")[2] for x in bucket.written] == ["results.json.tmp", "errors.csv.tmp"]


def test_which_workdirs_are_refused(bucket: buckets.Bucket, monkeypatch) -> None:
    for wrong in ("runs/a", "/runs/a", "s3://b/a", "gs:/b"):
        with pytest.raises(ValueError, match=r"give a bucket, --workdir=gs://BUCKET/FOLDER"):
            bucket_checks.require(wrong)
    bucket_checks.require("gs://b/a")
    bucket_checks.probe("gs://b/a")
    assert not epath.Path("gs://b/a").exists()  # it leaves nothing
    monkeypatch.setattr(bucket, "open", lambda *_: (_ for _ in ()).throw(OSError("403 no right")))
    with pytest.raises(ValueError, match="gs://b/a cannot be used from here .*403.*gcloud auth"):
        bucket_checks.probe("gs://b/a")
