"""The README is true: its layout, and its three recipes for changing the program."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import ablation
import pytest
import torch
from conftest import ROOT, run_main

import export
from exporting.loading import load_generator
from parameter import Config, get_parameters

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
SMALL = "--imsize 64 --z_dim 16 --g_conv_dim 8 --d_conv_dim 8 --batch_size 4 --num_workers 0 --device cpu"

LOSS = """LOSSES = {"softplus": Loss(
    lambda real, fake: (F.softplus(-real).mean(), F.softplus(fake).mean()), lambda fake: F.softplus(-fake).mean()
), """
SOURCE = """        case "gray":
            decode = lambda index, size: Image.new("RGB", (size, size), (index, index, index))
            return Source("gray", range(20), decode, "1", "20 gray images")
"""


def test_the_layout_names_every_folder_and_program():
    named = re.findall(r"[\w.]+/?", README.partition("\n## Layout\n")[2])
    folders = {f"{name}/" for name in (*FOLDERS, "tests", "benchmarks", "docs")}
    assert folders | {path.name for path in ROOT.glob("*.py")} <= {*named}


def test_imports_run_one_way():
    """From the units of a level in the README's list to those of later levels only."""
    section = README.partition("Imports run one way: ")[2].splitlines()[0]
    levels = [re.findall(r"`(\w+)`", level) for level in section.split("→")]
    level_of = {unit: number for number, units in enumerate(levels) for unit in units}
    assert {*level_of} == {path.stem for path in ROOT.glob("*.py")} | {*FOLDERS}
    for path in [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]:
        unit = path.stem if path.parent == ROOT else path.parent.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for imported in {name.partition(".")[0] for name in names} & {*level_of} - {unit}:
                assert level_of[imported] > level_of[unit], f"{path.name} imports {imported}"


def test_links_to_files_lead_somewhere():
    for page in (*PAGES, ROOT / "benchmarks" / "README.md"):
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def commands(program: str) -> list[list[str]]:
    """The words after a program's name of each command line in README and docs, without comments and "..."."""
    lines = re.findall(rf"^    (?:python|.*torchrun .*) ?{re.escape(program)} (.*)$",
                       "\n".join(page.read_text(encoding="utf-8") for page in PAGES), re.M)  # fmt: skip
    assert len(lines) > 1
    return [[word for word in shlex.split(line, comments=True) if word != "..."] for line in lines]


def test_the_commands_of_the_program_parse():
    """Of the README, the docs and the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
    (demo,) = re.findall(r"^\t.*python main\.py (.*)$", makefile, re.M)
    exports = [export.parse(words)[1] for words in commands("export.py")]
    for words in [shlex.split(demo), *commands("main.py"), *exports]:
        if words != ["--help"]:
            assert isinstance(get_parameters(words), Config), words


def test_the_commands_of_the_ablation_parse(tmp_path, monkeypatch):
    """To the first run, before which those of all others are parsed."""
    monkeypatch.setattr(ablation, "train", lambda run: 7)
    monkeypatch.setattr(ablation, "seconds_per_step", lambda *_: 0.5)
    for words in commands("benchmarks/ablation.py"):
        assert run_main(tmp_path, *words, program=ablation)[0] == 7, words


def test_the_lines_of_python_of_the_readme(monkeypatch):
    block = re.search(r"((?:    .*\n)*    G = torch.hub.load.*\n(?:    .*\n)+)", README)[1]
    monkeypatch.chdir(ROOT)
    torch.manual_seed(1)
    exec(textwrap.dedent(block), results := {"torch": torch})
    torch.manual_seed(1)
    assert torch.equal(results["images"], load_generator("pretrained/faces64/G.safetensors")(torch.randn(16, 128)))


@pytest.mark.slow
def test_the_recipes_for_a_loss_a_dataset_and_an_attention_layer(tmp_path):
    """Followed on a copy of the program, which then trains with all three."""
    for path in [*ROOT.glob("*.py"), *(ROOT / folder for folder in FOLDERS)]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    for name, old, new in (
        ("networks/losses.py", "LOSSES = {", LOSS),
        ("parameter.py", 'one_of("hinge", ', 'one_of("softplus", "hinge", '),
        ("datasets/sources.py", '        case "toy":', SOURCE + '        case "toy":'),
        ("parameter.py", '"folder", "toy")', '"folder", "toy", "gray")'),
        ("sagan_models.py", "else (16, 32)", "else (8, 16, 32)"),
    ):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert old in text, f"{name} no longer has {old!r}: correct the recipe here and in the README"
        (tmp_path / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    options = shlex.split(f"{SMALL} --dataset gray --adv_loss softplus --total_step 2")
    for words in (["main.py", *options], ["export.py", "--pretrained_model=latest", "--format=safetensors"]):
        subprocess.run([sys.executable, *words], cwd=tmp_path, check=True, capture_output=True)
    assert "Trained on gray" in next(tmp_path.glob("exports/*/2/model_card.md")).read_text("utf-8")
    layers = ("G_attn1", "G_attn2", "G_attn3", "D_attn1", "D_attn2")
    assert {path.name for path in tmp_path.glob("attn/*/2_*.png")} == {f"2_{layer}.png" for layer in layers}
