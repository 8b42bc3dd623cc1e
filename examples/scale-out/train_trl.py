"""A preset on every card of a machine, with TRL's engine: pip install 'lite-trgrpo[trl]' deepspeed

accelerate launch --config_file examples/scale-out/zero2.yaml examples/scale-out/train_trl.py --preset math-7b
"""

import argparse
from pathlib import Path

from lite_trgrpo.config import loading
from lite_trgrpo.integrations.trl import trainer_of

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--preset", default="math-7b")
parser.add_argument("--objective", help="a recipe laid over the preset")
parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
parser.add_argument("--output", type=Path, default=Path("runs/scale-out"))
parser.add_argument("--vllm", action="store_true", help="sample with vLLM on the same cards (pip install 'trl[vllm]')")
given = parser.parse_args()

vllm = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.4} if given.vllm else {}
with trainer_of(
    loading.load(given.preset, None, given.set, objective=given.objective), given.output, **vllm
) as trainer:
    trainer.train()
    trainer.save_model(str(given.output / "adapter"))
