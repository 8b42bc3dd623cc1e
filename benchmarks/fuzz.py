"""Damaged inputs of every kind: does each end in a result or in our own error, and is nothing changed in silence?

    python benchmarks/fuzz.py                       2,000 inputs, about fifteen minutes
    python benchmarks/fuzz.py --inputs 200 --seed 1

Data files, configs, GGUF headers, adapters and run folders are written whole, then bytes are flipped, cut, doubled or
replaced by what breaks parsers. Whatever is raised besides our own errors counts as a traceback. Where another reader
can say what was meant (json and csv for rows, the file written again for configs), what was read is compared with it.
"""

import argparse
import contextlib
import csv
import io
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from gguf import GGUFWriter
from measure import where

from lite_trgrpo import report
from lite_trgrpo.config import loading
from lite_trgrpo.config.schema import Data, Model
from lite_trgrpo.data.examples import read_examples
from lite_trgrpo.errors import LiteError
from lite_trgrpo.model import hf, weights
from lite_trgrpo.store import resuming
from lite_trgrpo.store.run import Run
from tests.accidents import tiny_run, train

SHARES = {"data": 0.4, "configs": 0.3, "GGUF headers": 0.08, "adapters": 0.07, "run folders": 0.15}
BREAKING = [
    b"\0", b"\xff\xfe", b"\x1b[31m", b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b"1e999", b"NaN", b"null", b'"', b"\n",
    b"\r\n", b",", b"=", b"'''", b"\xe2\x80\xae", b"\xed\xa0\x80", b"-1", b"true", b"{}", b"[]", b"../../x", b"a" * 300,
]  # fmt: skip


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The content with one to three mutations."""
    for _ in range(draw.randint(1, 3)):
        a, b = sorted(draw.randint(0, len(content)) for _ in range(2))
        b = min(b, a + draw.choice([1, 4, 40, len(content)]))
        content = draw.choice([
            content[:a] + content[b:],
            content[:b] + content[a:],
            content[:a] + draw.choice(BREAKING) + content[a:],
            content[:a] + draw.choice(BREAKING) + content[b:],
            content[:a] + bytes([draw.randrange(256)]) + content[a + 1 :],
        ])  # fmt: skip
    return content


def of_data(folder: Path, draw: random.Random) -> str:
    """-> what was changed in silence; empty: nothing."""
    rows = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1), "note": 'ä, \u202f"x"'} for i in range(6)]
    kind = draw.choice([".jsonl", ".csv", ".json"])
    if kind == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, ["prompt", "answer", "note"])
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue()
    else:
        content = json.dumps(rows) if kind == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path = folder / f"data{kind}"
    path.write_bytes(damaged(content.encode(), draw))
    found = read_examples(Data(source=str(path)), str(path), "train")
    text = path.read_bytes().decode("utf-8-sig")
    if kind == ".csv":
        meant = [row for row in csv.DictReader(io.StringIO(text, newline="")) if any(row.values())]
    elif text.startswith("[") and kind == ".json":
        meant = json.loads(text)
    else:
        meant = [json.loads(line) for line in io.StringIO(text, newline=None) if line.strip()]
    read = [(row.prompt, row.columns["answer"]) for row in found]
    wanted = [(row["prompt"], row["answer"]) for row in meant]
    return "" if repr(read) == repr(wanted) else f"{wanted} was read as {read}"  # repr: NaN is not equal to itself


def of_config(folder: Path, draw: random.Random) -> str:
    path = folder / "config.toml"
    path.write_bytes(damaged(loading.preset_path("demo").read_bytes(), draw))
    config = loading.load(file=path)
    again = folder / "again.toml"
    again.write_text(loading.to_toml(config), encoding="utf-8")
    return "" if loading.load(file=again) == config else "a config is another one when it is written and read again"


def of_gguf(folder: Path, draw: random.Random) -> str:
    path = folder / "model.gguf"
    writer = GGUFWriter(path, "llama")
    for name in ("block_count", "context_length", "embedding_length", "feed_forward_length"):
        writer.add_uint32(f"llama.{name}", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(damaged(path.read_bytes(), draw))
    weights.locate(Model(name=str(path)))
    return "a file without layers became a model"


def of_adapter(folder: Path, draw: random.Random) -> str:
    copy = folder / "adapter"
    shutil.copytree(folder.parent / "whole" / "adapter", copy, dirs_exist_ok=True)
    path = copy / draw.choice(["adapter_config.json", "adapter_model.safetensors"])
    path.write_bytes(damaged(path.read_bytes(), draw))
    hf.load(Model(name=str(folder.parent / "model"), adapter=str(copy)), seed=0)
    return ""


def of_run(folder: Path, draw: random.Random) -> str:
    run = Run(folder / "run")
    shutil.copytree(folder.parent / "whole", run.folder, dirs_exist_ok=True)
    newest = max(run.checkpoints.glob("step-*"))
    names = ["metrics.jsonl", "eval.jsonl", "rollouts.jsonl", "run.json", "config.toml", newest / "state.json"]
    path = run.folder / draw.choice(names)
    path.write_bytes(damaged(path.read_bytes(), draw))
    for step in (lambda: resuming.options_of(run.folder, [], {}), lambda: resuming.checkpoint_of(run, 9),
                 lambda: report.write(run)):  # fmt: skip
        with contextlib.suppress(LiteError):
            step()
    return ""


KINDS: dict[str, Callable[[Path, random.Random], str]] = {
    "data": of_data, "configs": of_config, "GGUF headers": of_gguf, "adapters": of_adapter, "run folders": of_run,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        os.environ["LITE_TRGRPO_CACHE"] = str(top / "cache")
        assert train(tiny_run(top), top / "whole").exit_code == 0
        for kind, look in KINDS.items():
            for i in range(round(options.inputs * SHARES[kind])):
                draw = random.Random(f"{options.seed}:{kind}:{i}")
                (folder := top / "one").mkdir()
                try:
                    changed = look(folder, draw)
                    counts[kind]["changed" if changed else "read"] += 1
                    if changed:
                        print(f"{kind} {i}: {changed[:300]}", flush=True)
                except LiteError as error:
                    counts[kind]["refused"] += 1
                    if "\n" in str(error) and kind != "data" and kind != "configs":
                        print(f"{kind} {i}: more than one line: {error}"[:300], flush=True)
                except Exception:
                    counts[kind]["traceback"] += 1
                    print(f"{kind} {i}: {''.join(traceback.format_exc().splitlines(True)[-4:])}"[:600], flush=True)
                shutil.rmtree(folder)
    print(where())
    print(f"\nseed {options.seed}\n\n| inputs | read | refused in our words | tracebacks | changed in silence |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for kind, count in counts.items():
        print(f"| {count.total()} {kind} | {count['read']} | {count['refused']} | {count['traceback']} | "
              f"{count['changed']} |")  # fmt: skip


if __name__ == "__main__":
    main()
