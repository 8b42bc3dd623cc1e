"""What float16 leaves of the adapter's gradient, by the loss's denominator, with the loss scale and without it.

    python benchmarks/half.py        one minute on two cores; the demo's model

The cosine is taken with the gradient in float32. A card without bfloat16 (T4, RTX 20, GTX 16) trains in float16.
"""

import dataclasses

import torch
from measure import groups_of, policy_for, questions, where

from lite_trgrpo.config.schema import Objective
from lite_trgrpo.model.oom import Limits
from lite_trgrpo.model.policy import sample_all
from lite_trgrpo.records import Sampling
from lite_trgrpo.training import update as module

DENOMINATORS = (1_024, 32_768, 262_144)


def gradient(policy, rows, denominator):
    parameters, seen = list(policy.trainable().values()), []
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.flatten().double() for p in parameters))
    rows = [dataclasses.replace(row, denominator=float(denominator)) for row in rows]
    module.update(
        policy, optimizer, rows, Objective(), temperature=1.0, updates=1, limits=Limits(2048, 64), max_grad_norm=1e9
    )
    return torch.cat(seen)


def main() -> None:
    exact, half = policy_for(dtype="float32"), policy_for(dtype="float16")
    prompts = [exact.encode(question) for question in questions(2, long=False)]
    groups = groups_of(prompts, sample_all(exact, prompts, Sampling(members=4, max_new_tokens=32)))
    rows = module.prepare_rows(groups, Objective(), 32)
    scale = module.loss_scale
    print(where())
    print("\n| denominator | cosine without the scale | with it | norm, with it, over float32's |")
    print("| ---: | ---: | ---: | ---: |")
    for denominator in DENOMINATORS:
        wanted = gradient(exact, rows, denominator)
        module.loss_scale = lambda rows, limits: 1.0
        plain = gradient(half, rows, denominator)
        module.loss_scale = scale
        scaled = gradient(half, rows, denominator)
        cosines = [torch.cosine_similarity(found, wanted, dim=0).item() for found in (plain, scaled)]
        ratio = (scaled.norm() / wanted.norm()).item()
        print(f"| {denominator:,} | {cosines[0]:.4f} | {cosines[1]:.5f} | {ratio:.4f} |")


if __name__ == "__main__":
    main()
