"""What the page is made of: finished runs, and what else was given."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from eqst import card, claims, trials
from eqst.config import from_card

# The paper's three models by their name in configs/: what the seed's page calls them.
TITLES = {
    "linear_mel_bl": "Baseline model",
    "db_mel_bl": "Baseline model with dB valued representation",
    "db_mel_pm": "Proposed model with dB valued representation",
}


class Member(NamedTuple):
    """A finished run: a name for people, its folder, its variant or kind of features, its model."""

    name: str
    folder: pathlib.Path
    variant: str
    run: trials.Run


class Request(NamedTuple):
    """What the command was asked for; paths may be empty but for the first."""

    workdirs: tuple[str, ...]
    data: str
    manifest: str
    music: str
    triples: str
    results: str
    pairs: int


def folders(workdir: str) -> list[pathlib.Path]:
    """A run itself (its folder, or its exported weights), those of a folder of exported weights,
    or those of a sweep, its factor `variant` first.

    Raises:
      ValueError: there is no run in it.
    """
    root = pathlib.Path(workdir)
    if card.is_exported(root):
        return [root]
    if not root.is_dir():
        raise ValueError(f"--workdir={workdir} is not a folder: give a run of eqst.train")
    if (root / card.CARD_NAME).is_file():
        return [root]
    found = sorted(
        path.parent for path in root.rglob(card.CARD_NAME) if (path.parent / "checkpoints").is_dir()
    )
    found += sorted(
        stem for path in root.glob("*.npz") if card.is_exported(stem := path.with_suffix(""))
    )
    if not found:
        raise ValueError(
            f"--workdir={workdir} holds no run: give the folder that eqst.train or a sweep wrote to"
        )
    return sorted(found, key=lambda path: (path.relative_to(root).parts[0] != "variant", path))


def members(workdirs: Sequence[str]) -> list[Member]:
    """The first run given of every variant; the one whose examples are shown comes first."""
    found: dict[str, Member] = {}
    for workdir in workdirs:
        root = pathlib.Path(workdir)
        for folder in folders(workdir):
            config = from_card(card.card_of(folder)["config"])
            kind = claims.variant(config)
            if kind not in TITLES:
                kind = config.features.kind
            if kind not in found:
                name = root.name if folder == root else f"{root.name}/{folder.relative_to(root)}"
                found[kind] = Member(name, folder, kind, trials.open_run(folder))
    return sorted(found.values(), key=lambda member: member.variant != "db_mel_pm")
