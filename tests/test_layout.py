"""The shape of the project, read from its syntax trees: who may import what, what is refused."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "eqst"

# Data flows one way: a module may import only modules named before it.
ORDER = (
    # what stands alone
    *(
        "config",
        "recipes",
        "files",
        "command",
        "processes",
        "stopping",
        "mesh",
        "card",
        "seal",
        "lock",
        "arrays",
        "saving",
    ),
    "checkpoint",
    # the equaliser and its responses
    *("halfangle", "biquad", "curvefit", "eq", "settings"),
    # sound
    *("loudness", "audio", "render", "analysis", "talkers", "synthetic", "store", "shards"),
    *("parallel", "layouts", "corpus", "chunking", "build"),
    # what is learnt from, and what learns
    *(
        "pairs",
        "float64",
        "features",
        "evidence",
        "pooled",
        "augment",
        "observe",
        "data",
        "resident",
        "predictor",
    ),
    *("objective", "batches", "record", "cost", "learner", "loop", "train"),
    # what is done with it
    *("metrics", "comparison", "bayes", "linear", "baselines", "trials"),
    *("latents", "latentstats", "verdict", "claims", "charts", "picture"),
    *("match", "evaluate", "triples", "accuracy", "timing", "rivals", "contests"),
    *("scaling", "throughput", "speed"),
    # a sweep's runs
    *("sweeps.spaces", "sweeps.members", "sweeps.turn", "sweeps.single", "sweeps.local"),
    *("sweeps.outcomes", "sweeps.progress", "sweeps.slurm"),
    *("sweeps.bucket", "sweeps.clone", "sweeps.gcloud", "sweeps.queued"),
    *("sweeps.deletion", "sweeps.orders", "sweeps.pool"),
    # the open benchmark
    *("transfer", "tasks", "contestants", "leaderboard", "benchmark"),
    # the page
    *("webpage.markup", "webpage.drawing", "webpage.examples", "webpage.scenarios"),
    *("webpage.page", "webpage.site", "webpage.findings", "webpage.insights"),
    *("webpage.material", "webpage.chapters", "report"),
)

# A large dependency stays inside the one module that owns it (or two).
OWNERS = {
    "tensorflow": {"data"},
    "tensorflow_datasets": {"corpus", "shards"},
    "array_record": {"shards"},
    "flax": {"predictor"},
    "orbax": {"arrays"},
    "matplotlib": {"picture", "charts"},
    "torch": {"rivals", "contests"},
}

# These know neither DSP nor models: they could serve another project as they are.
STANDALONE = ("halfangle", "processes", "mesh", "card")

VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "common", "base"}
MAX_LINES = 450
TOP_LEVEL = {"pyproject.toml", "README.md", "eqst", "configs", "launch", "tests", "colab"}


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """`biquad` for eqst/biquad.py, `webpage.site` for eqst/webpage/site.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything imported anywhere in the file, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Names of the project's own modules that the file imports."""
    found = {name.removeprefix("eqst.") for name in imports(path) if name.startswith("eqst.")}
    folders = {name.split(".")[0] for name in ORDER if "." in name}
    return {".".join(x.split(".")[: 2 if x.split(".")[0] in folders else 1]) for x in found}


@pytest.mark.parametrize("path", package_files(), ids=module_name)
def test_large_dependencies_have_one_owner(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    stolen = {root for root in roots if root in OWNERS and module_name(path) not in OWNERS[root]}
    assert not stolen, f"{path.name} imports {stolen}, which belong to {OWNERS}"


@pytest.mark.parametrize("path", package_files(), ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    name = module_name(path)
    if path.stem == "__init__":
        assert not own_imports(path)
        return
    assert name in ORDER, f"place {name!r} in ORDER (tests/test_layout.py)"
    later = own_imports(path) - set(ORDER[: ORDER.index(name)])
    assert not later, f"{name} imports {sorted(later)}, which come after it"
    if name in STANDALONE:
        assert not own_imports(path)


@pytest.mark.parametrize("path", package_files(), ids=module_name)
def test_module_is_short_and_named_for_something(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path.name} has {lines} lines: which two things is it?"
    assert path.stem not in VAGUE_NAMES


@pytest.mark.parametrize("path", package_files(), ids=module_name)
def test_flags_live_in_entry_points_only(path: Path) -> None:
    names = set(imports(path))
    if module_name(path) == "command":  # defines none, and parses everyone's
        return
    if any(name.startswith(("absl.flags", "ml_collections.config_flags")) for name in names):
        assert '__name__ == "__main__"' in path.read_text(encoding="utf-8")


def default_hiding_gets(path: Path) -> list[int]:
    """Lines with `something.get(key, default)`; the process environment is no config."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "get"
            and (len(node.args) == 2 or node.keywords)
            and ast.unparse(node.func.value) not in ("os.environ", "environ")
        ):
            lines.append(node.lineno)
    return lines


def test_no_default_hides_in_a_get() -> None:
    files = package_files() + sorted((REPO / "configs").glob("*.py"))
    found = {path.name: default_hiding_gets(path) for path in files}
    assert not {name: lines for name, lines in found.items() if lines}


def test_the_get_rule_sees_what_it_should(tmp_path: Path) -> None:
    source = "a.get('x', 1)\nb.get('x')\nos.environ.get('x', '')\nc.get('x', default=2)\n"
    (tmp_path / "case.py").write_text(source)
    assert default_hiding_gets(tmp_path / "case.py") == [1, 4]


def test_every_config_is_made_from_the_package_alone() -> None:
    for path in sorted((REPO / "configs").glob("*.py")):
        foreign = {n for n in imports(path) if n.split(".")[0] == "configs"}
        assert not foreign, f"{path.name}: `from configs import ..` breaks outside the root"


def test_top_level_is_the_given_one() -> None:
    if not (REPO / ".git").exists():
        pytest.skip("not a git clone: what is in the folder says nothing about the project")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=REPO, check=True, capture_output=True, text=True).stdout
    names = {line.split("/")[0] for line in files.splitlines()}
    visible = {name for name in names if not name.startswith(".")}
    assert visible <= TOP_LEVEL, f"beside the given layout: {visible - TOP_LEVEL}"
    assert "pyproject.toml" in visible and "eqst" in visible


IMPORT_TOGETHER = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
heavy = sorted({"tensorflow", "orbax", "matplotlib"} & set(sys.modules))
assert not heavy, f"importing {sys.argv[1:]} also imported {heavy}"
"""


@pytest.mark.long
def test_modules_import_together_without_their_heavy_parts() -> None:
    """Training needs no tensorflow, matching no orbax, and no two modules define the same flag."""
    names = [f"eqst.{path.stem}" for path in PACKAGE.glob("*.py") if path.stem != "data"]
    command = [sys.executable, "-W", "error", "-c", IMPORT_TOGETHER, *sorted(names)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["README.md", "colab/results/README.md"])
def test_what_a_readme_links_to_is_there(name: str) -> None:
    text = (REPO / name).read_text(encoding="utf-8")
    links = [x for x in re.findall(r"\]\(([^)]+)\)", text) if not x.startswith(("http", "#"))]
    assert len(links) > 5
    folder = (REPO / name).parent
    for link in links:
        path, _, anchor = link.partition("#")
        assert (folder / path).exists(), link
        headings = re.findall(r"^#+ (.*)$", (folder / path).read_text(), re.M) if anchor else []
        assert not anchor or anchor in map(_anchor, headings), link


def _anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")
