"""Are our relatives of GRPO those of TRL and verl?

    python benchmarks/relatives.py          seconds; needs trl (dev extra), and verl for its columns

The same random log-probabilities (new, old, reference), advantages and mask go through `policy_loss` and through the
code that the two projects install, in float64 on the CPU: TRL's `GRPOTrainer._compute_loss` and
`_generate_and_score_completions` on an object that holds its options and no model, verl's functions in
`trainer/ppo/core_algos.py`. Compared are the loss, |ours - theirs| / |theirs|, and its gradient by the
log-probabilities, in norm. Below stand the places where TRL and verl part, each with the error between ours and the
one that is not followed. Ends with 1 if an error exceeds 1e-5, or if what is said to part does not.

verl is no dependency, its servers neither: VERL below is enough, and an empty module stands in for ray.
"""

import datetime
import importlib
import importlib.metadata
import platform
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer

from lite_trgrpo.objective import denominators, group_advantages, policy_loss

LIMIT = 1e-5
VERL = "pip install --no-deps verl==0.9.1 omegaconf tensordict pyvers orjson cloudpickle codetiming"
CAP = 24  # max_new_tokens
Outcome = tuple[Tensor, Tensor]  # loss, its gradient by the log-probabilities
NO_DUAL = 1e9  # verl cannot switch dual clip off; its ratio is at most e^20 = 4.9e8


class Inputs(NamedTuple):
    logprobs: Tensor  # [B, T]
    old: Tensor
    ref: Tensor
    advantages: Tensor  # [B]
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Case:
    """One objective in three dialects; None where a project has no such thing."""

    name: str
    ours: dict[str, Any]
    aggregation: str
    trl: dict[str, Any] | None
    verl: dict[str, Any] | None
    note: str = ""
    spread: float = 1.0  # of log r; small for GSPO's narrow bounds, so that they cut some rows and not others
    far: bool = False  # the reference
    empty_row: bool = False


def inputs(case: Case) -> Inputs:
    """16 ragged rows with ratios on both sides of every bound and cap, likely tokens and unlikely ones."""
    generator = torch.Generator().manual_seed(11)
    rows, width = 16, 20
    draw = torch.randn(4, rows, width, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths[0], lengths[1] = width, 0 if case.empty_row else 1
    mask = torch.arange(width) < lengths[:, None]
    old = -7 * torch.rand(rows, width, generator=generator, dtype=torch.float64) ** 2 - 1e-3
    new = (old + case.spread * draw[0]).clamp(max=-1e-4)
    ref = (new + (2.0 if case.far else 0.6) * draw[1]).clamp(max=-1e-4)
    return Inputs(*(torch.where(mask, part, 0.0) for part in (new, old, ref)), draw[2, :, 0], mask)


def of(function: Callable[[Tensor], Tensor], given: Inputs) -> Outcome:
    leaf = given.logprobs.clone().requires_grad_()
    loss = function(leaf)
    loss.backward()
    return loss.detach(), leaf.grad


def our_side(case: Case, given: Inputs) -> Outcome:
    denominator = denominators(given.mask.sum(1), case.aggregation, CAP).double()
    fixed = {"old_logprobs": given.old, "advantages": given.advantages[:, None], "mask": given.mask}
    return of(partial(policy_loss, **fixed, ref_logprobs=given.ref, denominator=denominator, **case.ours), given)


def trl_shell(kind: type, **options: Any) -> Any:
    """A trainer without a model: the options that its loss and its advantages read, one process, one micro-batch."""
    trainer = object.__new__(kind)
    args = {name: option.default for name, option in GRPOConfig.__dataclass_fields__.items()}
    args |= {"use_bias_correction_kl": False, "steps_per_generation": 1, **options}
    alone = SimpleNamespace(
        num_processes=1, process_index=0, device=torch.device("cpu"), gather=lambda x: x, reduce=lambda x, **_: x
    )
    own = {
        "loss_type": "grpo", "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2,
        "beta": 0.0, "max_completion_length": CAP, "current_gradient_accumulation_steps": 1, "use_vllm": False,
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False), "accelerator": alone,
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "_entropy_bonus_enabled": False,
        "aux_loss_enabled": False, "_metrics": defaultdict(lambda: defaultdict(list)),
    }  # fmt: skip
    vars(trainer).update(own | options, args=SimpleNamespace(**args))
    return trainer


def trl_side(case: Case, given: Inputs) -> Outcome:
    trainer = trl_shell(RLOOTrainer if case.trl.get("loss_type") == "rloo" else GRPOTrainer, **case.trl)
    nothing = torch.zeros(len(given.mask), 0, dtype=torch.long)
    batch = {
        "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": given.mask.long(),
        "completion_mask": given.mask.long(), "advantages": given.advantages, "old_per_token_logps": given.old,
        "ref_per_token_logps": given.ref, "num_items_in_batch": given.mask.sum(), "old_logps": given.old.sum(1),
    }  # fmt: skip

    def loss(leaf: Tensor) -> Tensor:
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (leaf, torch.zeros_like(leaf), None)
        return trainer._compute_loss(trainer.model, batch)

    return of(loss, given)


def trl_advantages(estimator: str, rewards: Tensor) -> Tensor:
    """[P, G] -> [P, G], out of the whole of TRL's scoring, with generation and reward functions replaced."""
    count = rewards.numel()
    absent = ("tools", "reward_clip_range", "environment_factories", "environments", "ref_model", "pad_to_multiple_of")
    logs = {"prompt": [], "completion": [], "advantages": [], "rewards": defaultdict(list)}
    trainer = trl_shell(RLOOTrainer if estimator == "rloo" else GRPOTrainer, **dict.fromkeys(absent), **{
        "scale_rewards": "none" if estimator == "dr-grpo" else "group", "num_generations": rewards.shape[1],
        "multi_objective_aggregation": "sum_then_normalize", "normalize_advantages": False,
        "reward_weights": torch.ones(1, dtype=rewards.dtype), "reward_func_names": ["reward"],
        "mask_truncated_completions": False, "_tokenizer": SimpleNamespace(pad_token_id=0), "num_iterations": 1,
        "_logs": logs, "_pending_extra_logs": {}, "_pending_metrics": {},
    })  # fmt: skip
    one = [[1]] * count
    rloo = (one, one, [""] * count)
    trainer._generate = lambda prompts: rloo if estimator == "rloo" else (one, one, None, [""] * count, *[None] * 4)
    trainer._calculate_rewards = lambda *_: rewards.reshape(-1, 1)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (torch.zeros(count, 1), None, None)
    return trainer._generate_and_score_completions([{"prompt": ""}] * count)["advantages"].reshape(rewards.shape)


def load_verl() -> SimpleNamespace | str:
    """verl's functions and the options of its actor, or why there are none."""
    loaded = sys.modules.get("ray")
    sys.modules["ray"] = loaded or mock.MagicMock()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            core = importlib.import_module("verl.trainer.ppo.core_algos")
            options = importlib.import_module("verl.workers.config").ActorConfig
    except ImportError as error:
        return f"not installed ({error}): {VERL}"
    finally:
        if loaded is None:
            del sys.modules["ray"]
    return SimpleNamespace(core=core, options=options)


MODES = {"sequence": "seq-mean-token-mean", "token": "token-mean", "constant": "seq-mean-token-sum-norm"}


def verl_side(verl: SimpleNamespace, case: Case, given: Inputs) -> Outcome:
    """Policy loss plus `kl_loss_coef` times the aggregated `kl_penalty`, as its actor adds them."""
    own = {"policy": "vanilla", "scale": CAP, **case.verl}
    policy, scale = own.pop("policy"), own.pop("scale")
    options = verl.options(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **own)
    options.global_batch_info["loss_scale_factor"] = scale
    mode = MODES[case.aggregation]

    def loss(leaf: Tensor) -> Tensor:
        advantages = given.advantages[:, None].expand_as(leaf)
        total, _ = verl.core.get_policy_loss_fn(policy)(given.old, leaf, advantages, given.mask, mode, options)
        if options.use_kl_loss:
            kl = verl.core.kl_penalty(leaf, given.ref, options.kl_loss_type)
            total = total + options.kl_loss_coef * verl.core.agg_loss(kl, given.mask, mode, **options.global_batch_info)
        return total

    return of(loss, given)


def verl_advantages(verl: SimpleNamespace, estimator: str, rewards: Tensor) -> Tensor:
    groups = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1]).numpy()
    one_token = torch.ones(rewards.numel(), 1, dtype=torch.bool)
    function = partial(verl.core.compute_grpo_outcome_advantage, epsilon=1e-4)
    options = {"norm_adv_by_std_in_grpo": estimator == "grpo"}
    if estimator == "rloo":
        function, options = verl.core.compute_rloo_outcome_advantage, {}
    return function(rewards.reshape(-1, 1).clone(), one_token, groups, **options)[0].reshape(rewards.shape)


PLAIN = {"clip_ratio_c": NO_DUAL}
KL = {"beta": 0.1}
CISPO = {"trust_region": "cispo", "clip_high": 4.0}
NEITHER = "R2VPO's penalty, linear weights, A of reinforce-rej (against plain loops: tests/test_relatives.py)"


def verl_kl(kind: str) -> dict[str, Any]:
    return {**PLAIN, "use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": kind}


CASES = [
    Case("grpo", {}, "sequence", {}, PLAIN),
    Case("dr-grpo", {}, "constant", {"loss_type": "dr_grpo"}, PLAIN),
    Case("dapo", {"clip_high": 0.28}, "token", {"loss_type": "dapo", "epsilon_high": 0.28},
         {**PLAIN, "clip_ratio_high": 0.28}),
    Case("dual clip", {"dual_clip": 3.0}, "token", {"loss_type": "dapo", "delta": 3.0}, {"clip_ratio_c": 3.0},
         "TRL's delta; alike while c > 1 + eps_high"),
    Case("gspo", {"trust_region": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}, "sequence",
         {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
         {"policy": "gspo", "clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4},
         "gradient as verl's, s grad log pi_t, so that a token weight acts on its token; at weight 1 also TRL's", 1e-3),
    Case("cispo", CISPO, "token", {"loss_type": "cispo", "epsilon_high": 5.0},
         {"policy": "cispo", "clip_ratio_low": 1.0, "clip_ratio_high": 4.0}, "cap 5, TRL's epsilon_high", 2.0),
    Case("sapo", {"trust_region": "sapo"}, "sequence", {"loss_type": "sapo"}, {"policy": "sapo"},
         "TRL holds tau in fp32; verl takes the sequence mean, whatever is set"),
    Case("dppo", {"trust_region": "dppo"}, "token", None, {"policy": "dppo_tv", "clip_ratio_c": 20.0},
         spread=2.0),
    Case("kl k1", {**KL, "kl": "k1"}, "sequence", None, verl_kl("k1"), "TRL's GRPO has k3 alone"),
    Case("kl k2", {**KL, "kl": "k2"}, "sequence", None, verl_kl("k2")),
    Case("kl k3", {**KL, "kl": "k3"}, "sequence", {"beta": 0.1}, verl_kl("k3"), "TRL's bias correction off"),
]  # fmt: skip
PARTINGS = [  # against the one that is not followed
    Case("cispo", CISPO, "token", None, {"policy": "cispo", "clip_ratio_high": 4.0},
         "verl lifts r to 1 - clip_ratio_low (0.2 unless set) as well. As TRL and the paper: only the cap"),
    Case("dual clip", {}, "sequence", None, {}, "on in verl, c = 3, unless set. As TRL: off unless asked for"),
    Case("dppo", {"trust_region": "dppo"}, "token", None, {"policy": "dppo_tv"},
         "verl's cap is clip_ratio_c, 3 unless set, though its own fallback is 20. As the paper: 20"),
    Case("kl k3", KL, "sequence", {"beta": 0.1, "use_bias_correction_kl": True}, None,
         "TRL multiplies it by r unless told not to. As verl and GRPO's paper: it stands alone"),
    Case("kl k3", KL, "sequence", None, verl_kl("k3"),
         "verl cuts k3 at 10 (and log r at 20), without gradient beyond. As TRL: no cut", far=True),
    Case("grpo", {}, "sequence", {}, None,
         "TRL counts an answer whose tokens are all masked in B. As verl: no part of B", empty_row=True),
    Case("dr-grpo", {}, "constant", None, {**PLAIN, "scale": None},
         "verl divides by the batch's padded width unless loss_scale_factor is set. As TRL: max_new_tokens"),
    Case("rloo", {}, "sequence", {"loss_type": "rloo"}, None,
         "TRL clips the product of a sequence's ratios (and has its KL in the reward). As verl: every token's"),
]  # fmt: skip
ESTIMATORS = {"grpo": "eps 1e-4 as TRL, whose std is corrected in fp32; verl's own is 1e-6", "dr-grpo": "", "rloo": ""}


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def compare(case: Case, verl: SimpleNamespace | str) -> dict[str, list[float]]:
    """Errors of loss and gradient by project; one that lacks the case, or is missing, is left out."""
    given = inputs(case)
    theirs = {} if case.trl is None else {"TRL": trl_side(case, given)}
    if case.verl is not None and not isinstance(verl, str):
        theirs["verl"] = verl_side(verl, case, given)
    ours = our_side(case, given)
    return {name: [relative(*pair) for pair in zip(ours, other, strict=True)] for name, other in theirs.items()}


def compare_advantages(estimator: str, verl: SimpleNamespace | str) -> dict[str, list[float]]:
    """As `compare`, of [P, G] advantages; there is no gradient."""
    rewards = torch.randn(5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rewards[1], rewards[2] = 0.5, (rewards[2] > 0).double()  # a group without signal, one of right and wrong
    theirs = {"TRL": trl_advantages(estimator, rewards)}
    if not isinstance(verl, str):
        theirs["verl"] = verl_advantages(verl, estimator, rewards)
    ours = group_advantages(rewards, estimator=estimator)
    return {name: [relative(ours, other)] for name, other in theirs.items()}


def line(name: str, found: dict[str, list[float]], note: str) -> str:
    trl, verl = ([*(f"{error:.1e}" for error in found.get(project, [])), "-", "-"] for project in ("TRL", "verl"))
    return f"{name:20}{trl[0]:10}{trl[1]:10}{verl[0]:10}{verl[1]:10}{note}".rstrip()


def report() -> int:
    """Print the tables; 1 if anything that should agree does not, or the other way round."""
    verl = load_verl()
    names = ["trl", "torch", "transformers", *([] if isinstance(verl, str) else ["verl"])]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"{datetime.date.today()}, Python {platform.python_version()}, {versions}; float64, CPU")
    print(f"verl: {verl if isinstance(verl, str) else 'its installed functions'}\n")
    print("relative error of   TRL: loss gradient  verl:loss gradient  (-: has none, or is not installed)")
    rows = [(f"A of {name}", compare_advantages(name, verl), note) for name, note in ESTIMATORS.items()]
    rows += [(f"{case.name}, {case.aggregation}", compare(case, verl), case.note) for case in CASES]
    print("\n".join(line(*row) for row in rows))
    print(f"In neither: {NEITHER}\n\nWhere TRL and verl part: ours against the one that it does not follow")
    parted = [(f"{case.name}, {case.aggregation}", compare(case, verl), case.note) for case in PARTINGS]
    print("\n".join(line(*row) for row in parted))
    wrong = sum(not error <= LIMIT for _, found, _ in rows for pair in found.values() for error in pair)
    stale = sum(not max(pair) > LIMIT for _, found, _ in parted for pair in found.values())
    print(f"\n{wrong} errors exceed {LIMIT}; {stale} partings are none")
    return int(wrong + stale > 0)


if __name__ == "__main__":
    sys.exit(report())
