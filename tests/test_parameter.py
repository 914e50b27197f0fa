import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from errors import UserError
from parameter import EXPORT_PATH, Config, get_parameters, option_groups, option_text

# The reference's options with the defaults of its README, which for four of them are not those of its own parser:
# that has adv_loss wgan-gp, imsize 32, version sagan_1 and dataset cifar, and cannot run with these.
REFERENCE = dict(
    model="sagan", adv_loss="hinge", imsize=64, g_num=5, z_dim=128, g_conv_dim=64, d_conv_dim=64, lambda_gp=10,
    version="sagan_celeb", total_step=1000000, d_iters=5, batch_size=64, num_workers=2, g_lr=0.0001, d_lr=0.0004,
    lr_decay=0.95, beta1=0.0, beta2=0.9, pretrained_model=None, train=True, parallel=False, dataset="celeb",
    use_tensorboard=False, image_path="./data", log_path="./logs", model_save_path="./models",
    sample_path="./samples", attn_path="./attn", log_step=10, sample_step=100, model_save_step=1.0)  # fmt: skip


def test_defaults_are_those_of_the_reference_readme():
    config = dataclasses.asdict(get_parameters([]))
    assert {name: config[name] for name in REFERENCE} == REFERENCE


def test_boolean_words():
    for value, words in ((True, "true TRUE 1 Yes"), (False, "false False 0 no")):
        assert all(get_parameters(["--use_tensorboard", word]).use_tensorboard is value for word in words.split())


@pytest.mark.parametrize("arguments, words", [
    ("--model paper --imsize 256", "32, 64 and 128"), ("--conditional true", "needs --model paper"),
    ("--attribute Smiling", "--conditional true"), ("--model paper --attribute ''", "a name"),
    ("--model paper --conditional true --dataset toy --attribute Smiling", "--dataset celeb"),
    ("--augment flip", "color, translation, cutout"), ("--augment none,color", "none, or"), ("--metrics fid,x", "kid"),
    ("--class_name ,", "separated by commas"), ("--imsize 48", "--imsize must be one of 32, 64, 128, 256, not 48"),
    ("--imsize big", "imsize"), ("--batch_size 0", "batch_size"), ("--batch_size 1.5", "batch_size"),
    ("--g_lr 0", "g_lr"), ("--g_lr nan", "g_lr"), ("--d_lr inf", "d_lr"), ("--total_step 0", "total_step"),
    ("--beta1 1", "beta1"), ("--z_dim 0", "z_dim"), ("--g_conv_dim 12", "multiple of 8"),
    ("--d_conv_dim -8", "multiple of 8"), ("--adv_loss hinged", "wgan-gp"), ("--dataset imagenet", "toy"),
    ("--model biggan", "sagan, paper"), ("--lr_schedule cosine", "linear"), ("--train maybe", "true or false"),
    ("--device gpu", "cuda"), ("--pretrained_model last", "latest"), ("--version a/b", "version"),
    ("--version ..", "version"), (f"--version {101 * 'v'}", "version"), ("--no_such_option 1", "no_such_option"),
    ("--batch 3", "--batch"), ("--seed", "seed"), ("stray", "stray"), ("--num_workers -1", "num_workers"),
    ("--model_save_step 0", "model_save_step"), ("--sample_step 0", "sample_step"), ("--crop_size 0", "crop_size"),
    ("--ema_decay 1", "ema_decay"), ("--n_critic 0", "n_critic"), ("--log_step -1", "log_step"),
])  # fmt: skip
def test_invalid_options_are_one_line_and_exit_code_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit:
        get_parameters(shlex.split(arguments))
    out, err = capsys.readouterr()
    assert (exit.value.code, out, err.count("\n")) == (2, "", 1) and words in err


@pytest.mark.parametrize("values", [dict(batch_size=0), dict(train="false"), dict(lambda_gp=float("inf"))])
def test_a_config_created_in_code_is_checked_too(values):
    with pytest.raises(UserError, match=f"--{next(iter(values))}"):
        Config(**values)


def test_blanks_around_the_commas_of_a_list_are_no_other_configuration():
    lists = {"augment": "color,cutout", "metrics": "faces,hog"}
    words = [f"--{name}= {value}".replace(",", " , ") for name, value in lists.items()]
    assert get_parameters(words) == Config(**lists)


def test_an_unknown_home_is_a_plain_name_and_output_folders_are_all_that_the_program_writes_to():
    assert Config(sample_path="~no_such_user/x").sample_folder == Path("~no_such_user/x/sagan_celeb")
    assert Config(sample_path="~/x").sample_folder == Path.home() / "x/sagan_celeb"
    paths = {f"{name}_path": f"{name}s" for name in ("sample", "attn", "model_save", "log", "cache")}
    config = Config(**paths, version="v")
    assert config.output_folders == [Path(path) for path in (*paths.values(), EXPORT_PATH)]


def test_d_iters_warns_and_names_n_critic(capsys):
    get_parameters(["--d_iters", "5"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "--n_critic" in line
    get_parameters([])
    assert not capsys.readouterr().err


def test_command_line_and_json_give_the_same_config(monkeypatch):
    """But for overwrite, which is left out."""
    config = Config(dataset="folder", image_path="my images", hflip=True, g_lr=3e-5, version="-1", use_ema=False)
    for changes in ({}, {"pretrained_model": "latest"}):
        _, _, *words = shlex.split(dataclasses.replace(config, overwrite=True).command_line(**changes))
        assert get_parameters(words) == dataclasses.replace(config, **changes)
    assert Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    monkeypatch.setattr(sys, "argv", ["/clone/export.py"])
    assert Config().command_line() == "python /clone/main.py"
    monkeypatch.setattr(sys, "argv", ["another.py"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert Config(imsize=32).command_line() == "torchrun --nproc_per_node=8 main.py --imsize 32"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "a")
    words = "--nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=a main.py"
    assert Config().command_line() == f"torchrun --nproc_per_node=8 {words}"
    assert Config(parallel=True).command_line() == "python main.py --parallel true"
    monkeypatch.setattr(sys, "platform", "win32")  # single quotes are part of a word in its shell
    assert Config(version=r"a b", log_path=r"C:\x").command_line().endswith(r'--version "a b" --log_path C:\x')


def test_machines_may_differ_in_paths_and_decoding_only():
    here, there = Config(), Config(image_path="a", cache_path="b", num_workers=9, download=True)
    assert here.checksum == there.checksum != Config(seed=1).checksum


def test_summary_has_every_option_and_its_value():
    config = Config(imsize=32, sample_path="./" + 200 * "long-", train=False)
    values = dataclasses.asdict(config).items()
    assert {f"{name}={option_text(value)}" for name, value in values} <= {*config.summary().split()}


def test_every_option_is_used():
    """An option that nothing reads is a defect. d_iters is the exception: its one effect is a warning."""
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for folder in (ROOT, *packages) for path in folder.glob("*.py"))
    own_code = (ROOT / "parameter.py").read_text(encoding="utf-8")
    used = {"d_iters", *Config().architecture, *re.findall(r"\bconfig\.(\w+)", code)}
    assert used | {*re.findall(r"\bself\.(\w+)", own_code)} >= {*Config.__dataclass_fields__}


@pytest.mark.parametrize("program, options", [
    ("main", Config.__dataclass_fields__), ("export", ("format", "maps", "export_path")),
])  # fmt: skip
def test_help_imports_nothing_heavy(program, options, tmp_path):
    """From any folder; Python need not add that of the script to its path."""
    command = [sys.executable, "-I", "-X", "importtime", str(ROOT / f"{program}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "parameter" in imported and not {"torch", "numpy", "PIL", "matplotlib", "onnx"} & imported
    assert all(f"--{name} " in done.stdout for name in options)


def test_docs_options_has_the_tables_of_config():
    """If it fails, put the text of its message in place of everything from "## Network" on in docs/options.md."""
    lines = []
    for title, fields in option_groups().items():
        lines += [f"## {title}", "", "| option | default | allowed | meaning |", "|---|---|---|---|"]
        for field in fields:
            allowed, meaning = field.metadata["constraint"].description, field.metadata["help"]
            lines.append(f"| `--{field.name}` | {option_text(field.default)} | {allowed} | {meaning} |")
        lines.append("")
    expected = "\n".join(lines)
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert page[page.find("## Network") :] == expected, expected
