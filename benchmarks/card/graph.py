"""The engine's decode step as a CUDA graph: are the answers those of the plain engine, and what is gained?

A graph is captured for each shape of the step. Layers and head are in it; the draw and the lists stay outside. On a
CPU there are no graphs: the recorded work is done again instead, from the same static tensors.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from kit import CPU, engine_of, free, guarded, label_of, policy_of, sync
from torch import Tensor

from lite_trgrpo.rollout.engine import Engine

CASES: list[tuple[str, dict[str, Any]]] = [("1.5b", {"quantization": "nf4"}), ("1.5b", {})]
COMPARED = 6 if CPU else 40  # steps
TIMED = 12
BUCKET = 16  # tokens by which the cache grows: within one, a step keeps its shape
CACHE_TENSORS = ("_place", "_prompts", "_tokens", "_row")  # what `GroupCache.arrange` sets anew for each step


@dataclass
class Captured:
    """One shape of the step."""

    inputs: list[Tensor]
    work: Callable[[], tuple[Tensor, Tensor]]
    graph: Any = None
    outputs: tuple[Tensor, Tensor] | None = None


@dataclass
class GraphedDecoder:
    """A `rollout.engine.Decoder` that replays graphs of another one's decode steps."""

    network: Any
    shapes: dict[tuple[Any, ...], Captured] = field(default_factory=dict)
    seconds: float = 0.0
    """Spent in captures."""
    pool: Any = None
    ready: Tensor | None = None
    """Logits of the step that was just replayed."""

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def recurrent(self) -> bool:
        return self.network.recurrent

    def logits(self, hidden: Tensor) -> Tensor:
        ready, self.ready = self.ready, None
        return self.network.logits(hidden) if ready is None else ready

    def hidden(self, ids: Tensor, positions: Tensor, groups: Any) -> Tensor:
        if not all(hasattr(groups, name) for name in CACHE_TENSORS):  # prompts being read
            return self.network.hidden(ids, positions, groups)
        inputs = [ids, positions, *(getattr(groups, name) for name in CACHE_TENSORS)]
        shape = (len(ids), groups._lines, groups._width, groups._dense, groups._line_tokens, groups._row_tokens)
        if shape not in self.shapes:
            self.shapes[shape] = self._capture([value.clone() for value in inputs], groups)
        captured = self.shapes[shape]
        for static, value in zip(captured.inputs, inputs, strict=True):
            static.copy_(value)
        if captured.graph is None:
            captured.outputs = captured.work()
        else:
            captured.graph.replay()
        assert captured.outputs is not None
        hidden, self.ready = captured.outputs
        return hidden

    def _capture(self, inputs: list[Tensor], groups: Any) -> Captured:
        started = time.perf_counter()

        def work() -> tuple[Tensor, Tensor]:
            for name, value in zip(CACHE_TENSORS, inputs[2:], strict=True):
                setattr(groups, name, value)
            groups._masks = {}  # else a mask of another step would be recorded
            hidden = self.network.hidden(inputs[0], inputs[1], groups)
            return hidden, self.network.logits(hidden[:, 0])

        captured = Captured(inputs, work)
        if not CPU:
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                work()  # libraries allocate their workspaces; the cache is written twice at the same places
            torch.cuda.current_stream().wait_stream(beside)
            captured.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured.graph, pool=self.pool):
                captured.outputs = work()
            self.pool = self.pool or captured.graph.pool()
            groups._masks = {}
            sync()
        self.seconds += time.perf_counter() - started
        return captured


def run(engine: Engine, steps: int) -> float:
    """-> seconds a step."""
    sync()
    started = time.perf_counter()
    for _ in range(steps):
        engine._step()
    sync()
    return (time.perf_counter() - started) / max(1, steps)


def largest_gap(plain: Engine, graphed: Engine) -> float:
    """Largest difference of log p over tokens that both have drawn."""
    pairs = zip(plain._rows, graphed._rows, strict=True)
    gaps = [
        abs(p - q)
        for (one, _), (other, _) in pairs
        for x, y, p, q in zip(one.ids, other.ids, one.logprobs, other.logprobs, strict=True)
        if x == y
    ]
    return max(gaps, default=float("nan"))


@torch.no_grad()
def compared(shape: str, options: dict[str, Any]) -> None:
    policy = policy_of(shape, dtype="bfloat16", **options)
    for rows in (8, 64):
        decoder = GraphedDecoder(policy.network)
        plain, graphed = engine_of(policy, rows), engine_of(policy, rows, decoder)
        run(plain, COMPARED)
        run(graphed, COMPARED)
        same = sum(one.ids == other.ids for (one, _), (other, _) in zip(plain._rows, graphed._rows, strict=True))
        gap = largest_gap(plain, graphed)
        to_next_bucket = -len(plain._rows[0][0].ids) % BUCKET + 2  # and capture its graph before the clock starts
        run(plain, to_next_bucket)
        run(graphed, to_next_bucket)
        a, b = run(plain, TIMED), run(graphed, TIMED)
        print(
            f"{label_of(shape, options)}, {rows} rows: plain {1000 * a:.2f} ms a step, graph {1000 * b:.2f} ms, "
            f"x{a / b:.2f}; {same} of {rows} answers equal over {COMPARED} steps, largest |log p| gap {gap:.4f}; "
            f"{len(decoder.shapes)} shapes captured in {decoder.seconds:.2f} s",
            flush=True,
        )
        if not CPU:
            newest = next(reversed(decoder.shapes.values()))
            sync()
            started = time.perf_counter()
            for _ in range(20):
                newest.graph.replay()
            sync()
            print(f"    replay alone {1000 * (time.perf_counter() - started) / 20:.2f} ms a step")
    free()


if __name__ == "__main__":
    for shape, options in CASES:
        guarded(f"graph {label_of(shape, options)}", lambda shape=shape, options=options: compared(shape, options))
