"""docs/sagan.ipynb runs from top to bottom."""

import shutil

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")


@pytest.fixture
def notebook():
    return nbformat.read(ROOT / "docs/sagan.ipynb", as_version=4)


def test_it_is_saved_without_outputs(notebook):
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.slow
def test_every_cell_runs_in_a_clone(tmp_path, notebook):
    results = (".git", ".venv", "cache", "samples", "attn", "models", "logs", "exports", "ablation")
    shutil.copytree(ROOT, tmp_path / "clone", ignore=shutil.ignore_patterns(*results))
    (options,) = (cell for cell in notebook.cells if "STEPS = 400" in cell.source)
    for old, new in (("STEPS = 400", "STEPS = 2"), ("--dataset toy ", "--dataset toy --toy_num 40 --num_samples 4 ")):
        options.source = options.source.replace(old, new)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": tmp_path / "clone/docs"}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "training finished at step 2" in printed and "EMA generator, step 2" in printed
    assert "torch.Size([8, 3, 64, 64]) torch.Size([8, 256, 256])" in printed
    shown = [kind for output in outputs for kind in output.get("data", ())]
    assert shown.count("image/png") == 3 and shown.count("image/gif") == 2 and shown.count("text/html") == 3
