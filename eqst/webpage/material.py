"""What the page is made of: finished runs, and what else was given."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from eqst import card, claims, trials
from eqst.config import Config, from_card
from eqst.verdict import VARIANTS

# The paper's three models by their name in configs/: what the seed's page calls them.
_TITLES = (
    "Baseline model",
    "Baseline model with dB valued representation",
    "Proposed model with dB valued representation",
)
TITLES = dict(zip(VARIANTS, _TITLES, strict=True))


class Member(NamedTuple):
    """A finished run.

    Attributes:
      name: for people.
      folder: where it lies.
      variant: which of the paper's it is, or its kind of features.
      raw: whether its features are not normalised (`features.normalise`).
      run: its model.
      left: steps that its training has not done yet, as far as its record says.
    """

    name: str
    folder: pathlib.Path
    variant: str
    raw: bool
    run: trials.Run
    left: int


class Request(NamedTuple):
    """What the command was asked for; paths may be empty but for the first."""

    workdirs: tuple[str, ...]
    data: str
    manifest: str
    music: str
    triples: str
    results: str
    pairs: int


def default_results() -> str:
    """colab/results of the clone this package lies in, or nothing."""
    folder = pathlib.Path(__file__).resolve().parents[2] / "colab" / "results"
    return str(folder) if folder.is_dir() else ""


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
    found += [pathlib.Path(stem) for stem in card.exported_in(root)]
    if not found:
        raise ValueError(
            f"--workdir={workdir} holds no run: give the folder that eqst.train or a sweep wrote to"
        )
    return sorted(found, key=lambda path: (path.relative_to(root).parts[0] != "variant", path))


def _steps_left(folder: pathlib.Path, config: Config) -> int:
    """By the run's record; exported weights may have none, and were a finished run's."""
    steps = [row["step"] for row in card.metrics_of(folder)]
    if not steps and card.is_exported(folder):
        return 0
    return config.train.steps - max(steps, default=0)


def members(workdirs: Sequence[str], say: Callable[[str], None] = print) -> list[Member]:
    """The first run given of every variant, with normalised features and with raw ones; the one
    whose examples are shown comes first. Of a sweep's runs those that are still in training are
    left out, with a line.

    Raises:
      ValueError: a folder holds no run, none is finished, or they are of several sample rates.
    """
    found: dict[tuple[str, bool], Member] = {}
    for workdir in workdirs:
        root = pathlib.Path(workdir)
        for folder in folders(workdir):
            config = from_card(card.card_of(folder)["config"])
            left = _steps_left(folder, config)
            if left > 0 and folder != root:
                say(f"note: {folder} has {left:,} steps of its training to go: left out")
                continue
            variant = claims.variant(config)
            if variant not in TITLES:
                variant = config.features.kind
            raw = not config.features.normalise
            if (variant, raw) not in found:
                inside = f"{root.name}/{folder.relative_to(root)}"
                name = trials.name_of(root) if folder == root else inside
                if any(member.name == name for member in found.values()):
                    name = str(folder)
                member = Member(name, folder, variant, raw, trials.open_run(folder), left)
                found[variant, raw] = member
    if not found:
        raise ValueError(
            f"--workdir={workdirs[0]}: no run there is finished: go on with its training, or name "
            "one run's own folder"
        )
    rates = {member.name: member.run.config.data.sample_rate for member in found.values()}
    if len(set(rates.values())) > 1:
        told = ", ".join(f"{name} {rate} Hz" for name, rate in rates.items())
        raise ValueError(f"--workdir: runs of one sample rate can be compared, not {told}")
    return sorted(found.values(), key=lambda x: (x.raw, x.variant != "db_mel_pm"))


def of_variants(runs: Sequence[Member]) -> dict[str, Member]:
    """The paper's models among the runs, by variant, in the page's order; raw ones only where there
    is no other."""
    by_variant = {member.variant: member for member in reversed(runs)}  # raw ones come last
    return {name: by_variant[name] for name in TITLES if name in by_variant}
