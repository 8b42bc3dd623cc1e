"""What each preset is planned to take on a card, and what --fit would change on smaller ones. No card, no weights.

    python benchmarks/cards.py > benchmarks/cards.txt

The shapes of the bases come with the package, so nothing is fetched. These are
predictions; only the overhead was measured, on an H100.
"""

import torch
from measure import where

from lite_trgrpo.check import memory
from lite_trgrpo.config import loading

CARDS = (6, 8, 12, 16, 24)


def main() -> None:
    print(f"{where()}\n\npredicted peak (GiB) on cards of {', '.join(map(str, CARDS))} GB; 'no' where nothing fits\n")
    for preset in (name for name in loading.presets() if name != "demo"):
        for size in CARDS:
            result, _ = memory.check_memory(loading.load(preset), size * 10**9)
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
