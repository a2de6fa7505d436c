"""The notebooks: stored clean, alike in how they start, and run whole in a kernel of their own."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

COLAB = Path(__file__).resolve().parents[1] / "colab"
NAMES = ("ablations", "latents", "match")

# In a process of its own: what Jupyter's machinery warns of is no business of these tests.
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3")
try:
    client.execute(cwd=".")
finally:
    nbformat.write(notebook, sys.argv[2])
"""


def stored(name: str) -> nbformat.NotebookNode:
    return nbformat.read(COLAB / f"{name}.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NAMES)
def test_stored_without_outputs_and_valid(name):
    assert {path.stem for path in COLAB.glob("*.ipynb")} == set(NAMES)
    notebook = stored(name)
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown"
    # Something to read stands before every cell but the first pair.
    assert all("code" != kinds[i - 1] for i, kind in enumerate(kinds) if kind == "code")
    text = json.dumps(notebook)
    assert "/work" not in text and "/tmp" not in text


def test_all_begin_with_one_install_cell():
    first = [code_cells(stored(name))[0].source for name in NAMES]
    assert first[0] == first[1] == first[2]
    assert first[0].startswith("# @title Install EQST")


def run_install(tmp_path: Path, source: str, *path: str) -> subprocess.CompletedProcess:
    """The install cell as a program: with `path` for imports, or without any package at all."""
    (tmp_path / "cell.py").write_text(source)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYTHONPATH": os.pathsep.join(path)} if path else {}
    command = [sys.executable, *([] if path else ["-S"]), "cell.py"]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_the_install_cell_says_in_one_line_what_it_needs(tmp_path):
    source = code_cells(stored("match"))[0].source
    done = run_install(tmp_path, source)
    assert done.returncode == 1
    assert done.stderr == (
        "EQST is not installed: give REPOSITORY above, and run this cell again\n"
    )
    wrong = source.replace('REPOSITORY = ""', 'REPOSITORY = "nowhere/at-all.git"')
    done = run_install(tmp_path, wrong)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "eqst-keep.txt").exists()


def test_the_install_cell_keeps_the_jax_that_is_there(tmp_path):
    """With pip and git replaced by programs that write down what they were asked."""
    source = code_cells(stored("match"))[0].source
    clone = tmp_path / "mine"
    clone.mkdir()
    source = source.replace('REPOSITORY = ""', f'REPOSITORY = "{clone}"')
    source = source.replace('find_spec("eqst") is None', 'find_spec("eqst") is not None')
    source = source.replace("done = subprocess.run(", "print(command); done = subprocess.run(")
    source = source.replace("command, capture", '[sys.executable, "-c", ""], capture')
    done = run_install(tmp_path, source, str(COLAB.parent))
    assert done.returncode == 0, done.stderr
    jax_version = importlib.metadata.version("jax")
    kept = (tmp_path / "eqst-keep.txt").read_text().split()
    assert kept == [f"jax=={jax_version}", f"jaxlib=={importlib.metadata.version('jaxlib')}"]
    assert f"{clone}[report]" in done.stdout and "'-c', 'eqst-keep.txt'" in done.stdout


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A function (name, fields of its form) -> the notebook, run in an empty folder."""
    cache = tmp_path_factory.mktemp("cache")

    def execute(name: str, **form: str) -> nbformat.NotebookNode:
        folder = tmp_path_factory.mktemp(name)
        notebook = stored(name)
        for field, value in form.items():
            cell = next(x for x in code_cells(notebook) if f'{field} = ""' in x.source)
            cell.source = cell.source.replace(f'{field} = ""', f"{field} = {value!r}")
        nbformat.write(notebook, folder / f"{name}.ipynb")
        environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
        environment["PYTHONPATH"] = str(COLAB.parent)
        environment["XDG_CACHE_HOME"] = str(cache)
        # Nearly all of their time is compilation, which this halves.
        environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
        words = [f"{name}.ipynb", "done.ipynb"]
        done = subprocess.run(
            [sys.executable, "-c", EXECUTE, *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return nbformat.read(folder / "done.ipynb", as_version=4)

    return execute


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def shown(notebook: nbformat.NotebookNode, kind: str) -> int:
    """How many outputs of a kind, such as image/png, there are."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return sum(kind in output.data for output in outputs if "data" in output)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_ablations_run_whole(executed):
    notebook = executed("ablations")
    text = printed(notebook)
    for variant in ("db_mel_pm", "db_mel_bl", "linear_mel_bl"):
        assert f"| {variant} (1)" in text
    assert shown(notebook, "image/png") == 2
    assert "Traceback" not in text
    if (COLAB / "results" / "ablation.json").is_file():
        assert "no stored ablation" not in text


@pytest.mark.long
@pytest.mark.timeout(600)
def test_latents_run_whole(executed):
    notebook = executed("latents")
    text = printed(notebook)
    assert "step 24, commit" in text or "step 12, commit" in text
    assert "predictor/enter/kernel" in text and "(2560, 64)" in text
    assert "fed_L        nullified" in text and "shape error" in text
    assert shown(notebook, "image/png") == 3


@pytest.mark.long
@pytest.mark.timeout(600)
def test_latents_of_a_trained_model(executed):
    """The ablation's own, whose recordings are not here: its curve is near the true one."""
    text = printed(executed("latents", WORKDIR=str(COLAB / "weights" / "db_mel_pm")))
    assert "db mel, learned comparison" in text and "synthetic talkers instead: " in text
    assert float(text.split("shape error ")[1].split()[0]) < 3.0  # 3.8 if untouched


@pytest.mark.timeout(600)
def test_match_runs_whole(executed):
    notebook = executed("match")
    text = printed(notebook)
    assert '"type": "high_shelf"' in text
    found, untouched = (float(x.split()[0]) for x in text.split("shape error ")[1].split(" dB, "))
    assert found < untouched
    assert shown(notebook, "image/png") == 2
    assert sum("audio" in str(output) for cell in code_cells(notebook) for output in cell.outputs)
