"""Time and peak memory of the merge on files of Qwen2.5-1.5B's shapes (random bfloat16, 3 GB): half a minute.

    python benchmarks/merge.py [FOLDER]

Linux only: the peak is the process's VmHWM. FOLDER (default: a temporary one) takes 6 GB.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from lite_trgrpo.export import merge

WIDTH, INNER, VOCABULARY, LAYERS, RANK = 1536, 8960, 151936, 28, 16
LINEAR = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (256, WIDTH), "self_attn.v_proj": (256, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}  # fmt: skip


def write_base(folder: Path) -> None:
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in LINEAR.items()}
    shapes["model.embed_tokens.weight"] = (VOCABULARY, WIDTH)
    tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"dtype": "bfloat16"}')


def peak_mib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(base: Path) -> None:
    tensors = {}
    for i in range(LAYERS):
        for name, (out, into) in LINEAR.items():
            module = f"{merge.PREFIX}model.layers.{i}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, into)
            tensors[f"{module}.lora_B.weight"] = torch.randn(out, RANK)
    adapter = merge.Adapter({"lora_alpha": 32.0}, tensors)
    before, started = peak_mib(), time.perf_counter()
    merge.merge(base, adapter, base / "merged")
    seconds = time.perf_counter() - started
    print(f"{seconds:.0f} s, peak {peak_mib():.0f} MiB, of which {before:.0f} were there before (torch, the adapter)")


def main() -> None:
    if len(sys.argv) > 2:
        return measure(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        write_base(Path(folder))
        size = (Path(folder) / "model.safetensors").stat().st_size / 2**20
        print(f"torch {torch.__version__}; base of {size:.0f} MiB in one file", flush=True)
        subprocess.run([sys.executable, __file__, folder, "measure"], check=True)  # a fresh process has a fresh peak


if __name__ == "__main__":
    main()
