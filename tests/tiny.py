"""Tiny real models and a tiny real tokenizer, built offline from a seed: what the Hub would hold, in 300 kB.

The weights are random but not small, so that logits differ enough for a wrong position or mask to show.
"""

import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

KINDS = ("qwen2", "llama", "gemma2", "gemma3_text")
HYBRIDS = ("lfm2", "qwen3_5_text", "qwen3_next", "bamba")
MULTIMODAL = ("gemma4", "qwen3_5", "mistral3")
HYBRID_TARGETS = [
    "q_proj",
    "v_proj",
    "in_proj",
    "in_proj_qkv",
    "in_proj_qkvz",
]  # PEFT fits qwen3_next's others to experts
VOCABULARY = 384
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PAD, START, END = range(len(SPECIAL))  # their ids
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES, THINGS = ("Ada", "Ben", "Cleo", "Dan"), ("apples", "books", "coins", "eggs")


def gsm8k_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows shaped like GSM8K's: a question of sentences; a worked answer whose last line is `#### number`."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        name, thing = draw.choice(NAMES), draw.choice(THINGS)
        a, b, c = draw.randint(2, 99), draw.randint(2, 9), draw.randint(2, 9)
        question = (
            f"{name} buys {a} {thing} and {b} bags with {c} {thing} in each bag. How many {thing} does {name} have?"
        )
        steps = (
            f"The bags hold {b} * {c} = <<{b}*{c}={b * c}>>{b * c} {thing}.\nIn total {name} has {a + b * c} {thing}."
        )
        rows.append({"question": question, "answer": f"{steps}\n#### {a + b * c}"})
    return rows


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 384 tokens with a ChatML template; <|im_end|> ends a turn, <|endoftext|> pads."""
    texts = ["Please reason step by step, and put your final answer within \\boxed{}.", "system user assistant"]
    texts += [row[column] for row in gsm8k_rows(200, seed=7) for column in ("question", "answer")]
    tokenizer = Tokenizer(BPE())
    # Qwen2's own splitting: AutoTokenizer puts it in whatever a qwen2 folder says
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, min_frequency=1, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY, "the texts have too few pairs to merge"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"], chat_template=CHATML, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def tiny_model(kind: str = "qwen2", seed: int = 0, hidden_size: int = 64) -> PreTrainedModel:
    """A random model of two layers in float32; every width is a multiple of 64, so nf4's blocks fit.

    `qwen2` and both Gemmas tie their embeddings, `llama` does not; the Gemmas have one layer with a sliding window of 8
    tokens and one that sees everything. Hybrids have three layers, of which the second attends; the others
    carry a state: a short convolution in `lfm2`, with a gated delta rule in Qwen3.5 and Qwen3-Next (here without
    experts), with Mamba-2 in `bamba`.
    """
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": hidden_size, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": END, "pad_token_id": PAD,
    }  # fmt: skip
    torch.manual_seed(seed)
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True)).float().eval()
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).float().eval()
    if kind == "gemma2":  # scores reach 3, so the cap bends them; transformers' SDPA would leave it out
        heads = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "attn_logit_softcapping": 1.0}
        return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, attn_implementation="eager")).float().eval()
    if kind == "gemma3_text":
        layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
        heads = {"head_dim": 16, "query_pre_attn_scalar": 16}
        return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **layers, **heads)).float().eval()
    if kind in HYBRIDS:
        config = CONFIG_MAPPING[kind](**sizes | {"num_hidden_layers": 3} | _hybrid_layers(kind))
        return AutoModelForCausalLM.from_config(config).float().eval()
    raise ValueError(f"no tiny {kind!r}; there are {', '.join(KINDS + HYBRIDS)}")


def _hybrid_layers(kind: str) -> dict[str, object]:
    """The options of the second layer, which attends, and of the others, which do not."""
    if kind == "lfm2":
        return {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}
    if kind == "bamba":
        return {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
                "mamba_chunk_size": 16}  # fmt: skip
    heads = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "head_dim": 16}
    widths = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    layers = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    return layers | heads | widths | ({"num_experts": 0} if kind == "qwen3_next" else {})


def tiny_model_folder(
    path: Path, kind: str = "qwen2", seed: int = 0, hidden_size: int = 64, model: PreTrainedModel | None = None
) -> Path:
    """Model, tokenizer and generation config as an ordinary Hugging Face folder (safetensors) -> its path."""
    if model is None:
        model = tiny_multimodal(kind) if kind in MULTIMODAL else tiny_model(kind, seed, hidden_size)
    model.generation_config = GenerationConfig(bos_token_id=None, eos_token_id=[END, PAD], pad_token_id=PAD)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def tiny_multimodal(kind: str) -> PreTrainedModel:
    """A random language model beside a tower for images, as `gemma4`, `qwen3_5` and `mistral3` have it."""
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
        "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": END, "pad_token_id": PAD,
    }  # fmt: skip
    tower = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    if kind == "gemma4":  # two layers of different width
        layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "global_head_dim": 32}
        text |= layers | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCABULARY}
        tower |= {"num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 32}
        tokens = {"audio_config": None, "image_token_id": VOCABULARY - 1}
    elif kind == "qwen3_5":
        text |= _hybrid_layers("qwen3_5_text") | {"num_hidden_layers": 3}
        tower = {"hidden_size": 64, "intermediate_size": 64, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
        tokens = {f"{name}_token_id": VOCABULARY - i for i, name in
                  enumerate(("image", "video", "vision_start", "vision_end"), 1)}  # fmt: skip
    else:
        text |= {"model_type": "mistral"}
        tower |= {"model_type": "pixtral", "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
        tokens = {"image_token_index": VOCABULARY - 1}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](text_config=text, vision_config=tower, **tokens)
    return AutoModelForImageTextToText.from_config(config).float().eval()
