"""What each preset is planned to take on a card, and what --fit would change on smaller ones. No card, no weights.

    python benchmarks/cards.py > benchmarks/cards.txt

Shapes of the bases are written here, so that nothing is fetched. PREDICTED: no figure has been measured on a card.
"""

import json
import tempfile
from pathlib import Path

import torch
from measure import where

from lite_trgrpo.check import memory
from lite_trgrpo.config import loading

QWEN25 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32768}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 40960}
SHAPES = {  # preset -> hidden, layers, heads, key-value heads, intermediate, vocabulary, tied embeddings
    "math-0.5b": (QWEN25, 896, 24, 14, 2, 4864, 151_936, True),
    "math-1.5b": (QWEN25, 1536, 28, 12, 2, 8960, 151_936, True),
    "math-4b": (QWEN3 | {"head_dim": 128}, 2560, 36, 32, 8, 9728, 151_936, True),
    "logic-4b": (QWEN3 | {"head_dim": 128}, 2560, 36, 32, 8, 9728, 151_936, True),
    "math-7b": (QWEN25, 3584, 28, 28, 4, 18944, 152_064, False),
}
CARDS = (6, 8, 12, 16, 24)


def base(folder: Path, preset: str) -> str:
    kind, hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = SHAPES[preset]
    shape = kind | {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    (folder / preset).mkdir()
    (folder / preset / "config.json").write_text(json.dumps(shape))
    return str(folder / preset)


def main() -> None:
    print(f"{where()}\n\npredicted peak (GiB) on cards of {', '.join(map(str, CARDS))} GB; 'no' where nothing fits\n")
    with tempfile.TemporaryDirectory() as folder:
        for preset in SHAPES:
            config = loading.load(preset, named={"model.name": base(Path(folder), preset)})
            for size in CARDS:
                result, _ = memory.check_memory(config, size * 10**9)
                parts = "  ".join(f"{name} {size_ / 2**30:.2f}" for name, size_ in result["parts"].items())
                changes = result["changes"]
                said = "fits" if result["fits"] else "no" if changes is None else "with " + ", ".join(changes)
                peak = f"peak {result['peak'] / 2**30:5.2f}"
                print(f"{preset:10} {size:3} GB  {peak}  ({parts}; {result['slots']} rows)  {said}")
                if result["fits"]:
                    break  # larger cards too


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
