import ast
import dataclasses
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from errors import UserError
from parameter import Config, get_parameters

ROOT = Path(__file__).parent.parent
REFERENCE = dict(
    model="sagan", adv_loss="hinge", imsize=64, g_num=5, z_dim=128, g_conv_dim=64, d_conv_dim=64, lambda_gp=10,
    version="sagan_celeb", total_step=1000000, d_iters=5, batch_size=64, num_workers=2, g_lr=0.0001, d_lr=0.0004,
    lr_decay=0.95, beta1=0.0, beta2=0.9, pretrained_model=None, train=True, parallel=False, dataset="celeb",
    use_tensorboard=False, image_path="./data", log_path="./logs", model_save_path="./models",
    sample_path="./samples", attn_path="./attn", log_step=10, sample_step=100, model_save_step=1.0)  # fmt: skip


def test_no_option_means_the_reference_s_31_defaults():
    config = dataclasses.asdict(get_parameters([]))
    assert len(REFERENCE) == 31
    assert {name: config[name] for name in REFERENCE} == REFERENCE


@pytest.mark.parametrize("word, value", [("true", True), ("TRUE", True), ("1", True), ("Yes", True), ("false", False),
                                         ("False", False), ("0", False), ("no", False)])  # fmt: skip
def test_booleans(word, value):
    assert get_parameters(["--use_tensorboard", word]).use_tensorboard is value


@pytest.mark.parametrize("arguments, words", [
    ("--imsize 48", "32, 64, 128, 256"), ("--imsize big", "imsize"), ("--batch_size 0", "batch_size"),
    ("--batch_size -3", "batch_size"), ("--batch_size 1.5", "batch_size"), ("--g_lr 0", "g_lr"), ("--d_lr x", "d_lr"),
    ("--g_lr nan", "g_lr"), ("--d_lr inf", "d_lr"), ("--total_step 0", "total_step"), ("--beta1 1", "beta1"),
    ("--z_dim 0", "z_dim"), ("--g_conv_dim 12", "multiple of 8"), ("--d_conv_dim -8", "multiple of 8"),
    ("--adv_loss lsgan", "wgan-gp"), ("--dataset imagenet", "toy"), ("--model biggan", "sagan"),
    ("--train maybe", "true or false"), ("--device gpu", "cuda"), ("--pretrained_model last", "latest"),
    ("--version a/b", "version"), ("--version ..", "version"),
    (f"--version {101 * 'v'}", "version"), ("--no_such_option 1", "no_such_option"),
    ("--batch 3", "--batch"), ("--seed", "seed"), ("--lr_schedule cosine", "linear"),
    ("--num_workers -1", "num_workers"),
    ("--model_save_step 0", "model_save_step"), ("--sample_step 0", "sample_step"), ("--crop_size 0", "crop_size"),
    ("stray", "stray"), ("--ema_decay 1", "ema_decay"), ("--n_critic 0", "n_critic"), ("--log_step -1", "log_step"),
])  # fmt: skip
def test_bad_values_are_one_line_and_exit_code_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit:
        get_parameters(shlex.split(arguments))
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert not out
    assert err.count("\n") == 1
    assert words in err


def test_a_config_made_in_code_is_checked_too():
    with pytest.raises(UserError, match="batch_size"):
        Config(batch_size=0)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().batch_size = 3


def test_d_iters_warns_and_names_n_critic(capsys):
    get_parameters(["--d_iters", "5"])
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--n_critic" in err
    get_parameters([])
    assert not capsys.readouterr().err


def test_command_brings_the_same_configuration_back():
    config = Config(dataset="folder", image_path="my images", hflip=True, g_lr=3e-5, imsize=32)
    words = shlex.split(config.command())
    assert words[:2] == ["python", "main.py"]
    assert get_parameters(words[2:]) == config
    assert get_parameters(shlex.split(config.command(pretrained_model="latest"))[2:]).pretrained_model == "latest"


def test_command_starts_what_started_this_process(monkeypatch):
    torchrun = dict(
        TORCHELASTIC_RUN_ID="none", LOCAL_WORLD_SIZE="8", TORCHELASTIC_MAX_RESTARTS="0", GROUP_WORLD_SIZE="1"
    )
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    assert Config(imsize=32).command() == "torchrun --nproc_per_node=8 main.py --imsize 32"
    assert Config(parallel=True).command() == "python main.py --parallel true"
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert Config().command() == "torchrun --nproc_per_node=8 --max_restarts=3 --nnodes=2 ... main.py"
    assert Config(parallel=True).command().startswith("torchrun")


def test_summary_names_every_option():
    summary = Config().summary()
    for field in dataclasses.fields(Config):
        assert f"{field.name} {field.default}" in " ".join(summary.split())


def test_config_can_be_saved_as_json():
    assert Config(**json.loads(json.dumps(dataclasses.asdict(Config())))) == Config()


def test_every_option_has_a_help_text_and_is_read_by_something():
    """An option that nothing reads is a defect. d_iters is read here alone: its one effect is a warning."""
    read = {"d_iters"}
    folders = (".", "networks", "datasets", "training", "metrics", "visuals")
    for path in [path for folder in folders for path in (ROOT / folder).glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                if owner == "config" or (owner == "self" and path.name == "parameter.py"):
                    read.add(node.attr)
    read |= set(Config().architecture)
    for field in dataclasses.fields(Config):
        assert field.metadata["help"], field.name
        assert field.name in read, f"--{field.name} is read by nothing"


def test_help_is_quick_and_imports_no_torch():
    code = "import sys, main; sys.argv = ['main.py', '--help']\ntry: main.main()\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    seconds = []
    for _ in range(3):  # the best of three: the first may read Python itself from a cold disk
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert "--imsize" in done.stdout
    assert min(seconds) < 0.5


def test_the_readme_s_table_has_every_option_and_its_default():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(Config):
        assert f"| `--{field.name}` | {field.default} | {field.metadata['help']}" in readme, field.name
