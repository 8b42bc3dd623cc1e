"""A credential in the environment is found in no file and no output, whatever reward code does with what it sees."""

import os
import subprocess
import sys

import pytest

PLANTED = "hf_PlantedTokenThatMayAppearNowhere1"
TELLTALE = """
import os, sys
def tell(completion_ids, **_):
    print(dict(os.environ), file=sys.stderr)
    print(dict(os.environ))
    if sum(completion_ids[0]) % 5 == 0:
        raise RuntimeError(str(dict(os.environ)))
    return [sum(ids) % 3 for ids in completion_ids]
"""


@pytest.mark.slow
def test_a_planted_token_is_found_nowhere(tiny_config, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(TELLTALE)
    tiny_config.write_text(tiny_config.read_text().replace("reward.py:length", "reward.py:tell"))
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **dict.fromkeys(names, PLANTED)}
    run = tmp_path / "run"
    commands = [
        ["train", "--config", str(tiny_config), "--output", str(run)],
        ["train", "--resume", str(run), "--steps", "3"],
        ["train", "--config", str(tiny_config), "--set", f"model.name={tmp_path}/nothing"],  # an error
        ["eval", "--config", str(run / "config.toml"), "--adapter", str(run / "adapter"), "--json"],
        ["export", str(run), "--dry-run"],
    ]
    codes, said = [], ""
    for words in commands:
        done = subprocess.run(
            [sys.executable, "-m", "lite_trgrpo", *words],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        codes.append(done.returncode)
        said += done.stdout + done.stderr
    assert codes == [0, 0, 1, 0, 0], said
    assert (run / "adapter" / "adapter_model.safetensors").exists() and "RuntimeError" in said
    assert PLANTED not in said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert [path for path in files if PLANTED.encode() in path.read_bytes()] == []
