"""How fast, beside what others use: `python -m eqst.speed --output=DIR [--section=NAME]`.

Everything is timed in turns in one run, after warm-up; a row is one thing timed, with the median,
the 10th and 90th percentile, and its ratio to ours (above 1: ours is faster). Rivals that are not
installed are left out and named (`pip install 'eqst[rivals]'` brings them).
"""

from __future__ import annotations

import os
import pathlib
import platform
import time
from typing import Any

import jax
from absl import flags

from eqst import card, charts, command, contests, files, throughput
from eqst.timing import FULL, Say, Section, Size

# What is meant for an accelerator is run on a CPU only when it is asked for by name.
_ON_DEVICES = {"device_steps": throughput.device_steps}
SECTIONS = contests.SECTIONS | _ON_DEVICES


def table(sections: dict[str, Section]) -> str:
    """The sections as text."""
    lines = []
    for name, section in sections.items():
        lines += [f"{name}: {section.about}"]
        for row in section.rows:
            facts = [f"{key} {value:.4g}" for key, value in row.items() if key != "what"]
            lines.append(f"  {row['what']:44s} {', '.join(facts)}")
        for target in section.targets:
            verdict = "kept" if target["kept"] else "MISSED"
            lines.append(
                f"  target: {target['what']} {target['value']:.3g}, {target['bound']}: {verdict}"
            )
    return "\n".join(lines)


def _machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        found = [
            x for x in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x
        ]
        model = found[0].split(":")[1].strip() if found else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "load_before": os.getloadavg()[0],
    }


def _define_flags() -> None:
    flags.DEFINE_string("output", None, "Folder for speed.json and .png; it is made.")
    flags.DEFINE_multi_enum("section", None, list(SECTIONS), "Only this one (may be repeated).")
    flags.DEFINE_integer("rounds", FULL.rounds, "Of timing, at least 2.", lower_bound=2)
    flags.DEFINE_bool("overwrite", False, "Replace results that exist.")
    flags.mark_flags_as_required(["output"])


def run(output: str, names: list[str], size: Size, *, overwrite: bool, say: Say = print) -> None:
    """What the command does; results are written after every section."""
    results = ("speed.json", "speed.png")
    with files.result_folder(output, *results, overwrite=overwrite) as folder:
        _run_into(folder, names, size, say)


def _run_into(folder: pathlib.Path, names: list[str], size: Size, say: Say) -> None:
    about: dict[str, Any] = {"command": command.line("eqst.speed"), "commit": card.commit()}
    about |= {"size": size._asdict(), "machine": _machine(), "versions": card.versions()}
    done: dict[str, Section] = {}
    for name in names:
        began = time.monotonic()
        done[name] = SECTIONS[name](size, say)
        say(table({name: done[name]}))
        say(f"{name}: {time.monotonic() - began:.0f} s; {len(names) - len(done)} sections left")
        content: dict[str, Any] = {
            **about,
            "sections": {key: x._asdict() for key, x in done.items()},
        }
        files.write_json(folder / "speed.json", content)
    charts.speed(content, folder / "speed.png")
    say(f"{folder / 'speed.json'} and speed.png")


def main() -> None:
    """The command."""
    values = flags.FLAGS
    size = FULL._replace(rounds=values.rounds)
    by_default = contests.SECTIONS if jax.default_backend() == "cpu" else SECTIONS
    run(values.output, values.section or list(by_default), size, overwrite=values.overwrite)


if __name__ == "__main__":
    command.start("eqst.speed", _define_flags, main)
