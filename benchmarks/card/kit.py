"""Shared by the scripts here, which show on a CUDA card what no CPU can: devices, models, the engine in mid-run.

Each script prints one `[ok ...]` or `[FAIL ...]` line per part, so that one broken part costs nothing but itself.
CARD_CPU=1 runs the same paths on a CPU with tiny shapes. `benchmarks/gpu.py` measures the memory plan and whole steps;
these scripts look inside them.
"""

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # the models of tests/, the tables of benchmarks/

from measure import with_random_b  # noqa: E402

from lite_trgrpo.config.schema import Model  # noqa: E402
from lite_trgrpo.model.hf import TransformersPolicy, load  # noqa: E402
from lite_trgrpo.records import Sampling  # noqa: E402
from lite_trgrpo.rollout.engine import Decoder, Engine  # noqa: E402

CPU = bool(os.environ.get("CARD_CPU"))
DEVICE = "cpu" if CPU else "cuda"
TINY = (128, 256, 2, 2, 2, 512)
# hidden, intermediate, layers, heads, key-value heads, vocabulary: Qwen2.5's
SHAPES = {
    "0.5b": TINY if CPU else (896, 4864, 24, 14, 2, 151936),
    "1.5b": TINY if CPU else (1536, 8960, 28, 12, 2, 151936),
}
Result = TypeVar("Result")


def sync() -> None:
    """Wait for the card, so that a clock around it tells the truth."""
    if not CPU:
        torch.cuda.synchronize()


def free() -> None:
    """Give the card's cached memory back between two models."""
    if not CPU:
        torch.cuda.empty_cache()


def half() -> torch.dtype:
    """The 16-bit type of this card."""
    return torch.bfloat16 if CPU or torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def guarded(name: str, work: Callable[[], Result]) -> Result | None:
    """Run one part and print how it went; None where it failed."""
    started = time.perf_counter()
    try:
        result = work()
    except Exception:
        print(f"[FAIL {time.perf_counter() - started:6.1f} s] {name}", flush=True)
        traceback.print_exc(limit=-6, file=sys.stdout)
        sys.stdout.flush()
        return None
    print(f"[ok   {time.perf_counter() - started:6.1f} s] {name}", flush=True)
    return result


def folder_of(shape: str) -> Path:
    """A model of random weights as a folder, in memory where the system allows; made once per machine."""
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

    from tests.tiny import END, PAD, tiny_tokenizer

    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and not CPU else Path(tempfile.gettempdir())
    folder = parent / f"card-{shape}{'-tiny' if CPU else ''}"
    finished = folder / "finished"
    if finished.exists():
        return folder
    hidden, inner, layers, heads, shared, vocabulary = SHAPES[shape]
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=shared, vocab_size=vocabulary, max_position_embeddings=32768, rope_theta=1e6,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=half())
    model.generation_config = GenerationConfig(eos_token_id=[END, PAD], pad_token_id=PAD)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    finished.touch()
    return folder


def policy_of(shape: str, **options: Any) -> TransformersPolicy:
    """That model with an adapter that changes its answers."""
    return with_random_b(load(Model(name=str(folder_of(shape)), device=DEVICE, **options), seed=0))


def engine_of(policy: TransformersPolicy, rows: int, decoder: Decoder | None = None) -> Engine:
    """Groups of 8 with prompts of 300 tokens, read and under way; no answer ever ends, so `rows` stay."""
    members, length = 8, 300
    generator = torch.Generator().manual_seed(2)
    last = policy.network.config.vocab_size - 1
    prompts = torch.randint(5, last, (rows // members, length), generator=generator).tolist()
    engine = Engine(decoder or policy.network, prompts, Sampling(members, 256, key=(1,)), frozenset(), rows)
    engine._admit()
    return engine


def label_of(shape: str, options: dict[str, Any]) -> str:
    """`1.5b nf4`."""
    return f"{shape} {options.get('quantization', 'bf16')}"
