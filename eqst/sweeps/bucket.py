"""A sweep's workdir in a bucket: whether it is one, and whether it can be used from here."""

from __future__ import annotations

import secrets

from etils import epath


def require(workdir: str) -> None:
    """Refuses a workdir that not every host of every TPU shares.

    Raises:
      ValueError: it is no bucket.
    """
    if not workdir.startswith("gs://"):
        raise ValueError(
            f"--workdir={workdir}: with --backend=tpu every host writes there, and TPUs come and "
            "go: give a bucket, --workdir=gs://BUCKET/FOLDER"
        )


def probe(workdir: str) -> None:
    """Tries whether a bucket can be used from here, by the library that will.

    Raises:
      ValueError: this machine cannot write to it, read it and delete in it.
    """
    path = epath.Path(workdir) / f".eqst-{secrets.token_hex(4)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("eqst")
        whole = path.read_text() == "eqst"
        path.unlink()
    except Exception as error:  # of whichever library reads buckets here
        raise ValueError(
            f"--workdir={workdir} cannot be used from here ({type(error).__name__}: "
            f"{str(error)[:200]}): pip install -e '.[data]', gcloud auth application-default login"
        ) from None
    if not whole:
        raise ValueError(f"--workdir={workdir} does not give back what was written to it")
