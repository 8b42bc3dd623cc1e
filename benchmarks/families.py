"""Families of models: the path that each takes, and how far it is from transformers' own code.

    python benchmarks/families.py > docs/families.md        two minutes

Tiny models with random weights and a LoRA adapter, in float32, of each family's own code in transformers. Four
prompts of unequal length, two answers each, in five slots, so that answers leave and begin at different times.
"""

import logging
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lite_trgrpo.config.schema import Model  # noqa: E402
from lite_trgrpo.errors import ModelError  # noqa: E402
from lite_trgrpo.model import hf  # noqa: E402
from lite_trgrpo.model.policy import sample_all  # noqa: E402
from lite_trgrpo.records import Prompt, Sampling  # noqa: E402
from tests import tiny  # noqa: E402

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SIZES = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.15, "bos_token_id": None,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16, "mamba_expand": 2}
# what a person calls it, its type in transformers, options beside SIZES (None: the tiny model of the tests), targets
FAMILIES: tuple[tuple[str, str, dict[str, object] | None, list[str]], ...] = (
    ("Qwen2, Qwen2.5", "qwen2", None, []),
    ("Qwen3", "qwen3", {"head_dim": 16}, []),
    ("Qwen3 with experts", "qwen3_moe", EXPERTS, []),
    ("Qwen3 with experts, attention alone", "qwen3_moe", EXPERTS, ATTENTION),
    ("Qwen3.5", "qwen3_5", None, []),
    ("Qwen3-Next without experts", "qwen3_next", None, tiny.HYBRID_TARGETS),
    ("Llama, SmolLM2", "llama", None, []),
    ("SmolLM3", "smollm3", {}, []),
    ("Mistral", "mistral", {"head_dim": 16, "sliding_window": 8}, []),
    ("Mistral 3", "mistral3", None, []),
    ("Gemma 2", "gemma2", None, []),
    ("Gemma 3", "gemma3_text", None, []),
    ("Gemma 4", "gemma4", None, []),
    ("Phi-3, Phi-4", "phi3", {}, []),
    ("OLMo 2", "olmo2", {}, []),
    ("OLMo 3", "olmo3", {"sliding_window": 8}, []),
    ("OLMo Hybrid", "olmo_hybrid", {"layer_types": ["linear_attention"] * 3 + ["full_attention"],
                                    "linear_num_value_heads": 4, "linear_num_key_heads": 4,
                                    "linear_key_head_dim": 16, "linear_value_head_dim": 16}, []),
    ("LFM2, LFM2.5", "lfm2", None, []),
    ("Bamba", "bamba", None, []),
    ("Jamba without experts", "jamba", {"mamba_d_state": 16, "num_experts": 1, "attn_layer_period": 2,
                                        "attn_layer_offset": 1}, []),
    ("Granite 4 Hybrid", "granitemoehybrid", {**MAMBA, "layer_types": ["mamba", "mamba", "attention", "mamba"],
                                              "num_local_experts": 0, "shared_intermediate_size": 128,
                                              "logits_scaling": 4.0}, []),
    ("Zamba 2", "zamba2", {"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 16, "mamba_ngroups": 1,
                           "n_mamba_heads": 8}, []),
    ("Pythia", "gpt_neox", {}, []),
    ("GLM-4", "glm4", {"head_dim": 16}, []),
    ("BLOOM", "bloom", {}, []),
    ("RecurrentGemma", "recurrent_gemma", {"num_hidden_layers": 3, "attention_window_size": 8, "lru_width": 64}, []),
)  # fmt: skip
HEAD = """# Families of models

[benchmarks/families.py](../benchmarks/families.py) wrote this page, with transformers {} and torch {}.

Each row is a family's own code in transformers at a tiny size, with random weights and an adapter, in float32. Four
prompts of 1 to 33 tokens get two answers of 20 tokens each, five at a time. They are compared with what transformers'
forward says of each answer alone, without padding or cache: how many greedy tokens are not its first choice, and the
largest error of a log-probability (nats), as sampled and in the update. Errors up to 1e-4 are rounding. Two families
have larger ones from their own code: Zamba 2 where it decodes with a cache, RecurrentGemma where rows are padded.

The numbers say nothing about quality, and a family that is not here may work: every checkpoint is checked on two short
groups when it is loaded, and `lite-trgrpo check memory` names its path before that.

| family | type | path | other tokens | error, sampled | error, update |
|---|---|---|---|---|---|"""
PROMPTS = [tuple(range(3, 3 + length)) for length in (9, 1, 33, 20)]


def model_of(kind: str, options: dict[str, object] | None) -> PreTrainedModel | None:
    if options is None:
        return None
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES | options)).float().eval()


def alone(policy: hf.TransformersPolicy, prompt: tuple[int, ...], ids: tuple[int, ...]) -> torch.Tensor:
    """Logits that the model itself gives to one row without padding, [T, V]."""
    with torch.no_grad():
        return policy.model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]


def measured(policy: hf.TransformersPolicy) -> tuple[int, float, float]:
    """-> greedy tokens that are not the model's first choice, largest error of a sampled token's log-probability, and
    of the update's (nats).
    """
    prompts = [Prompt(ids, "") for ids in PROMPTS]
    greedy = sample_all(policy, prompts, Sampling(2, 20, greedy=True, max_rows=5))
    sampled = sample_all(policy, prompts, Sampling(2, 20, key=(1,), max_rows=5))
    rows = [(p, c.ids) for p, group in zip(PROMPTS, sampled, strict=True) for c in group]
    with torch.no_grad():
        updated, _ = policy.logprobs(rows, 1.0)
    policy.model.eval()
    policy.network.attend_by_groups(False)  # from here on transformers alone
    base = policy.model.get_base_model()
    if getattr(policy.network.config, "attn_logit_softcapping", None):
        base.set_attn_implementation("eager")  # its SDPA leaves the cap out
    others = sum(
        token != choice
        for prompt, group in zip(PROMPTS, greedy, strict=True) for completion in group
        for token, choice in zip(completion.ids, alone(policy, prompt, completion.ids).argmax(-1).tolist(), strict=True)
    )  # fmt: skip
    drawn_error = update_error = 0.0
    for i, ((prompt, ids), completion) in enumerate(zip(rows, [c for g in sampled for c in g], strict=True)):
        logprobs = torch.log_softmax(alone(policy, prompt, ids), -1).gather(-1, torch.tensor(ids).unsqueeze(-1))[:, 0]
        drawn_error = max(drawn_error, (torch.tensor(completion.logprobs) - logprobs).abs().max().item())
        update_error = max(update_error, (updated[i, : len(ids)] - logprobs).abs().max().item())
    return others, drawn_error, update_error


def row(name: str, kind: str, options: dict[str, object] | None, targets: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        tiny.tiny_model_folder(Path(folder), kind, model=model_of(kind, options))
        try:
            policy = hf.load(Model(name=folder, lora_rank=4, lora_targets=targets or ["all-linear"]), seed=0)
        except ModelError as error:
            said = str(error).partition(" (")[0].partition(", which")[0]
            return f"| {name} | `{kind}` | refused: {said} | | | |"
        generator = torch.Generator().manual_seed(2)
        for parameter in policy.trainable().values():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        path = policy.network.path()
        others, drawn, updated = measured(policy)
    return f"| {name} | `{kind}` | {path} | {others} of {8 * 20} | {drawn:.0e} | {updated:.0e} |"


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("lite_trgrpo").setLevel(logging.ERROR)
    print(HEAD.format(transformers.__version__, torch.__version__))
    for family in FAMILIES:
        print(row(*family), flush=True)


if __name__ == "__main__":
    main()
