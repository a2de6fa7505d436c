"""README.md and colab/results/README.md: their figures are those of the JSON beside the latter."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from eqst import comparison

PAGES = ("README.md", "colab/results/README.md")
ABLATION = "The paper's three models, and one factor at a time"
# A figure in a sentence: the factor and level of the JSON, then the difference at 3 s `plain`,
# bold where it is clear.
CLAIM = re.compile(r"`([^`]+: [^`]+)` (\*{0,2}[+-]\d\.\d\d\*{0,2})")

Row = dict[str, Any]


def section(text: str, heading: str) -> str:
    """From the heading to the next of any rank."""
    (found,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.M | re.S)
    return found


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table as rows of cells, without the line under its heads."""
    blocks = re.findall(r"(?:^\|.*\n)+", text + "\n", re.M)
    return [
        [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
        for lines in ([x for x in block.splitlines() if "---" not in x] for block in blocks)
    ]


def column_of(head: str) -> str | None:
    """'3 s `plain`' is the JSON's 'plain 3 s'."""
    if head.startswith("cross-validation"):
        return "cross-validation"
    found = re.fullmatch(r"(\d+ s) `(\w+)`", head)
    return f"{found[2]} {found[1]}" if found else None


def figure(x: dict[str, float]) -> tuple[str, ...]:
    """How a mean may stand: with its interval, or alone."""
    return f"{x['mean']:.2f} ({x['low']:.2f}-{x['high']:.2f})", f"{x['mean']:.2f}"


def difference(x: dict[str, Any]) -> tuple[str, ...]:
    """As `figure`, signed, and bold where the JSON says clear."""
    mean = f"**{x['mean']:+.2f}**" if x["clear"] else f"{x['mean']:+.2f}"
    return f"{mean} ({x['low']:+.2f} {x['high']:+.2f})", mean


@pytest.fixture(scope="module")
def stored(repo: Path) -> dict[str, Any]:
    return json.loads((repo / "colab/results/ablation.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=PAGES)
def page(request: pytest.FixtureRequest, repo: Path) -> tuple[str, str]:
    return request.param, (repo / request.param).read_text(encoding="utf-8")


def by_label(stored: dict[str, Any]) -> dict[str, Row]:
    return {
        f"{factor}: {row['level']}": row
        for factor, rows in stored["tables"].items()
        for row in rows
    }


def check_table(heads: list[str], rows: list[list[str]], labels: dict[str, Row]) -> set[str]:
    """Every cell of a table of variants or of levels; gives the labels it has. What is wrong is
    said as the rows that should stand there, to be pasted."""
    variants = re.fullmatch(r"model \((\d+) seeds\)", heads[0])
    assert variants or heads[0] == "`factor: level`", f"a table of what? {heads[0]}"
    found, wrong = set(), []
    for cells in rows:
        assert len(cells) == len(heads), cells
        name = cells[0].strip("`")
        label = f"variant: {name}" if variants else name
        assert label in labels, f"{label}: not in ablation.json"
        found.add(label)
        row, column, right = labels[label], None, [cells[0]]
        assert not variants or row["seeds"] == int(variants[1]), f"{label}: {row['seeds']} seeds"
        for head, cell in zip(heads[1:], cells[1:], strict=True):
            column = column_of(head) or column
            if head == "seeds":
                allowed: tuple[str, ...] = (str(row["seeds"]),)
            elif variants and head != "difference":
                allowed = figure(row["figures"][column])
            elif column in row["differences"]:
                allowed = difference(row["differences"][column])
            else:
                allowed = ("",)
            right.append(cell if cell in allowed else allowed[0])
        if right != cells:
            wrong.append(f"| {' | '.join(right)} |")
    assert not wrong, "ablation.json has\n" + "\n".join(wrong)
    return found


def test_the_ablation_is_the_jsons(page: tuple[str, str], stored: dict[str, Any]) -> None:
    """Each figure has the JSON's value, and is bold where, and only where, that says clear."""
    name, text = page
    text, labels = section(text, ABLATION), by_label(stored)
    in_tables = [check_table(table[0], table[1:], labels) for table in tables(text)]
    assert in_tables
    prose = " ".join(" ".join(x for x in text.splitlines() if not x.startswith("|")).split())
    claimed = set()
    for label, said in CLAIM.findall(prose):
        assert label in labels, f"{name}: {label}: not in ablation.json"
        allowed = difference(labels[label]["differences"]["plain 3 s"])
        assert said in allowed, f"{name}: {label}: {said}, but ablation.json has {allowed[0]}"
        claimed.add(label)
    stray = re.findall(r".{0,40}\d\.\d\d.{0,20}", CLAIM.sub("", prose))
    assert not stray, f"{name}: figures that nothing checks; put them as `factor: level` +0.12"
    # What is clear is said: at 3 s `plain` in the README, anywhere on the page of results.
    columns = ["plain 3 s"] if name == "README.md" else stored["columns"]
    clear = {
        label
        for label, row in labels.items()
        if any(row["differences"][x]["clear"] for x in columns if x in row["differences"])
    }
    missing = clear - claimed.union(*in_tables)
    assert not missing, f"{name}: clear, and not said: {sorted(missing)}"
    (nothing,) = re.findall(r"Nothing clear in ([^.]*)\.", prose)
    for factor in re.findall(r"`([^`]+)`", nothing):
        assert factor in stored["tables"], f"{name}: {factor} is no factor of ablation.json"
        assert not any(label.startswith(f"{factor}: ") for label in clear), f"{name}: {factor}"


def test_every_level_is_the_jsons(repo: Path, stored: dict[str, Any]) -> None:
    text = (repo / "colab/results/ablation.md").read_text(encoding="utf-8")
    assert comparison.table_text(stored["tables"], stored["columns"]) in text


def test_the_check_sees_what_it_should(stored: dict[str, Any]) -> None:
    """A wrong digit, a bold that is not clear, one that is missing, a wrong number of seeds."""
    labels = by_label(stored)
    heads = ["`factor: level`", "seeds", "3 s `plain`", "10 s `plain`"]
    for factor, level in (("loss", "parameters"), ("variant", "db_mel_bl")):
        row = labels[f"{factor}: {level}"]
        right = [difference(row["differences"][x])[0] for x in ("plain 3 s", "plain 10 s")]
        cells = [f"`{factor}: {level}`", str(row["seeds"]), *right]
        check_table(heads, [cells], labels)
        bold = right[0].replace("**", "") if "**" in right[0] else f"**{right[0][:5]}**"
        for number, wrong in ((1, "99"), (2, bold), (2, ""), (3, "+9.99"), (0, "`loss: none`")):
            with pytest.raises(AssertionError):
                check_table(heads, [[*cells[:number], wrong, *cells[number + 1 :]]], labels)


BASELINES = {
    "Bayes": "bayes",
    "Bayes, our best baseline": "bayes",
    "linear Bayes": "wiener",
    "ridge": "ridge",
    "Bayes, reference alone": "bayes_blind",
    "LTAS fit, tuned": "ltas_shrunk",
    "do nothing": "do_nothing",
    "mean setting": "mean_setting",
    "LTAS fit, plain": "ltas",
    "paper's grid, oracle": "oracle_grid",
    "settings, oracle": "oracle",
}
MODELS = {
    "**`pooled`**": "pooled_mixed_dev.json",
    "`pooled`": "pooled_real_dev.json",
    "`pooled`, packaged weights": "pooled_permissive_dev.json",
    "`smoke`, the main job": "smoke_dev.json",
    "`db_mel_pm`, the paper's proposal": "db_mel_pm_dev.json",
    "`db_mel_bl`": "db_mel_bl_dev.json",
    "`linear_mel_bl`": "linear_mel_bl_dev.json",
}


def test_the_held_out_talkers_are_the_jsons(page: tuple[str, str], repo: Path) -> None:
    name, text = page
    text = section(text, "Results" if name == "README.md" else "Held-out talkers")
    heads, *rows = tables(text)[0]
    assert len(rows) >= 7
    for cells in rows:
        row = dict(zip(heads, cells, strict=True))
        method = row["method"]
        file = MODELS[method] if method in MODELS else "pooled_mixed_dev.json"
        assert "" not in row or row[""] in ("", f"[json]({file})")
        figures = json.loads((repo / "colab/results" / file).read_text())["figures"]
        key = "model" if method in MODELS else BASELINES[method]
        for head, cell in row.items():
            if found := re.fullmatch(r"(\d+ s)( `(\w+)`)?", head):
                x = figures[found[3] or "plain"][found[1]][key]["shape_rmse_db"]
                assert cell.replace("**", "") in figure(x), f"{method}, {head}: {figure(x)[0]}"


def test_the_three_figures_of_one_name_are_the_jsons(repo: Path, stored: dict[str, Any]) -> None:
    results = repo / "colab/results"
    text = section((results / "README.md").read_text(), "Held-out talkers")
    ((_, *rows),) = (table for table in tables(text) if table[0][:2] == ["3 s `plain`", "where"])
    held_out = json.loads((results / "db_mel_pm_dev.json").read_text())["figures"]
    board = json.loads((results / "benchmark_leaderboard.json").read_text())["methods"]
    row = by_label(stored)["variant: db_mel_pm"]
    wanted = {
        "above, 400 pairs": held_out["plain"]["3 s"]["model"]["shape_rmse_db"],
        "ablation": row["figures"]["plain 3 s"],
        "open benchmark": board["db_mel_pm"]["scores"]["speech-3s-plain"]["figures"][
            "shape_rmse_db"
        ],
    }
    for (cell, where, _), (name, x) in zip(rows, wanted.items(), strict=True):
        assert name in where and cell in figure(x), figure(x)
    # None of them is of the config file as it stands.
    config = runpy.run_path(str(repo / "configs" / "db_mel_pm.py"))["get_config"]()
    assert config.train.learning_rate == 3e-3 and row["seeds"] == 5
    assert stored["first_settings"]["train"]["learning_rate"] == 1e-3


def test_the_demo_is_the_jsons(repo: Path) -> None:
    text = (repo / "colab/results/README.md").read_text(encoding="utf-8")
    ((_, *rows),) = (x for x in tables(section(text, "Held-out talkers")) if x[0][0] == "set")
    examples = json.loads((repo / "colab/results/demo_packaged.json").read_text())["examples"]
    sets = {
        "speech": "audio_files/ex",
        "sibilance": "application_examples/sibilance_examples/ex",
        "muddy bass": "application_examples/bassy_examples/ex",
        "music": "application_examples/mus_ex",
    }
    assert {cells[0].rpartition(" ")[0] for cells in rows} == set(sets)
    for title, *cells in rows:
        of = [x["bands64"] for x in examples if x["set"] == sets[title.rpartition(" ")[0]]]
        assert title.endswith(f"({len(of)})")
        means = [np.mean([x[key] for x in of]) for key in ("untouched", "theirs", "eqst")]
        gap_n = np.array([x["eqst"] - x["theirs"] for x in of])
        low, high = scipy.stats.ttest_1samp(gap_n, 0.0).confidence_interval()
        wanted = [
            *(f"{mean:.2f}" for mean in means),
            f"{gap_n.mean():+.2f} ({low:+.2f} {high:+.2f})",
            f"{np.mean([x['ltas_fit'] for x in of]):.2f}",
        ]
        assert cells == wanted, f"{title}: {wanted}"
