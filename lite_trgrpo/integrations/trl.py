"""The same run on many cards: TRL's GRPOTrainer with our loss, under `accelerate launch`.

    with trainer_of(config, folder) as trainer:     # options as `config.load` gives them
        trainer.train()

TRL samples (with vLLM where asked), distributes, accumulates and saves. From here come prompts, rewards and the
objective: advantages, token weights and loss are those of `objective.py`, equal to our own loop's to rounding.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import groupby
from math import isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lite_trgrpo import build
from lite_trgrpo.config.schema import Config, Objective
from lite_trgrpo.data.examples import load_examples
from lite_trgrpo.errors import ConfigError, DataError, MissingPackageError
from lite_trgrpo.model import hf
from lite_trgrpo.model.loading import resolve_device, resolve_dtype
from lite_trgrpo.model.template import Template
from lite_trgrpo.objective import beyond_bounds, denominators, group_advantages, kl_estimate, policy_loss
from lite_trgrpo.records import Completion, Example, Group, Prompt
from lite_trgrpo.rewards import Scorer
from lite_trgrpo.training.weighting import reading, weights_of

try:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise MissingPackageError("this needs TRL. Type: pip install 'lite-trgrpo[trl]'") from error

# What `objective` decides: a value of TRL's own would be read by nobody.
DECIDED = [
    "loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "scale_rewards",
    "multi_objective_aggregation", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy",
    "off_policy_mask_threshold",
]  # fmt: skip
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
OPTIMIZERS = {"adamw": "adamw_torch", "adamw-8bit": "adamw_bnb_8bit", "paged-adamw-8bit": "paged_adamw_8bit"}


class TRGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose loss is `objective`, whatever loss_type and epsilon say; all else is TRL's.

    prompt_ids: token ids by prompt text, where they are known; without it TRL's own tokenisation.
    Raises ConfigError for an option of `args` that `objective` decides.
    """

    def __init__(
        self,
        *arguments: Any,
        args: GRPOConfig,
        objective: Objective | None = None,
        prompt_ids: Mapping[str, Sequence[int]] | None = None,
        **rest: Any,
    ) -> None:
        defaults = {field.name: field.default for field in fields(args)}
        if changed := [name for name in DECIDED if getattr(args, name) != defaults[name]]:
            raise ConfigError(f"GRPOConfig sets {', '.join(changed)}, which `objective` decides; take it out")
        self.objective = objective or Objective()
        self.known_ids = prompt_ids
        args.beta, args.mask_truncated_completions = self.objective.beta, self.objective.mask_truncated
        args.router_aux_loss_coef = 0.0
        super().__init__(*arguments, args=args, **rest)
        adapters = getattr(self.model, "peft_config", {})
        if "ref" in adapters:  # TRL's reference is the adapter as it came; ours is the base, also when one is continued
            self.model.delete_adapter("ref")
        for parameter in self.model.parameters():
            if adapters and parameter.requires_grad:
                parameter.data = parameter.data.float()  # TRL makes it bf16 on a 4-bit base, which loses small updates

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
        if self.known_ids is None:
            return super()._tokenize_prompts(prompts)
        return [list(self.known_ids[prompt]) for prompt in prompts], None, {}

    def _calculate_rewards(self, *arguments: Any) -> Tensor:
        parts = super()._calculate_rewards(*arguments)  # [all B, functions], of all processes
        total = (parts * self.reward_weights.to(parts.device)).nansum(1)
        self._totals = torch.where(parts.isnan().all(1), torch.nan, total)
        return parts

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Adds what belongs to the whole step, over all processes: advantages, denominators, mean weight."""
        batch = super()._generate_and_score_completions(inputs)
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        members = self.num_generations if self.model.training else self.num_generations_eval
        rewards = self._totals.double().view(-1, members)  # [P, G]
        advantages = group_advantages(rewards, estimator=self.objective.advantage).flatten()
        counted = self.accelerator.gather(mask.sum(1)) * ~self._totals.isnan()
        divisors = denominators(counted, self.objective.aggregation, self.max_completion_length)
        own = slice(self.accelerator.process_index * len(mask), (self.accelerator.process_index + 1) * len(mask))
        batch["advantages"] = advantages[own].to(divisors.dtype)
        batch["denominator"] = divisors[own]
        batch["loss_mask"] = mask.bool() & (counted[own] > 0).unsqueeze(1)
        if self.objective.weights == "constant":
            batch["mean_weight"] = self._mean_weight(batch)
        if self.objective.weights_from == "sampling":
            batch["started_logps"] = self._started(batch)
        return batch

    @torch.no_grad()
    def _started(self, batch: Mapping[str, Any]) -> Tensor:
        """[B, T] log p under the policy that is about to be trained, which is the one that sampled."""
        if batch.get("old_per_token_logps") is not None:
            return batch["old_per_token_logps"]
        rows = self.args.per_device_train_batch_size
        return self._get_per_token_logps_and_entropies(self.model, *_inputs(batch), batch_size=rows)[0]

    def _mean_weight(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean weight over the tokens of the step that teach something: see `weighting.step_mean`."""
        teaches = batch["loss_mask"]
        if self.objective.beta == 0 and self.objective.trust_region != "penalty":
            teaches = teaches & (batch["advantages"] != 0).unsqueeze(1)
        weights = reading(self._started(batch), self.objective)
        total = torch.stack([weights[teaches].double().sum(), teaches.sum().double()])
        total = self.accelerator.reduce(total, reduction="sum")
        return (total[0] / total[1]) if total[1] else torch.ones_like(total[1])

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        objective, mask = self.objective, inputs["loss_mask"]
        found = self._get_per_token_logps_and_entropies(model, *_inputs(inputs), compute_entropy=True)
        logprobs, entropy = found[0].float(), found[1]
        old = inputs.get("old_per_token_logps")
        old = logprobs.detach() if old is None else old.float()
        advantages = inputs["advantages"].unsqueeze(1)
        ratio = inputs.get("importance_sampling_ratio")  # of vLLM's sampling; positive, so no clip changes sides
        advantages = advantages if ratio is None else advantages * ratio
        seen = inputs["started_logps"] if objective.weights_from == "sampling" else logprobs
        weights = weights_of(seen, objective, float(inputs.get("mean_weight", 1.0)))
        reference = inputs.get("ref_per_token_logps")
        loss = policy_loss(
            logprobs, old, advantages, mask, weights=weights, ref_logprobs=reference,
            clip_low=objective.clip_low, clip_high=objective.clip_high, dual_clip=objective.dual_clip,
            penalty=objective.penalty, beta=objective.beta, kl=objective.kl,
            placement=objective.placement, trust_region=objective.trust_region, denominator=inputs["denominator"],
        )  # fmt: skip
        with torch.no_grad():
            w = torch.ones_like(logprobs) if weights is None else weights
            moved = logprobs + w.log() if objective.placement == "ratio" else logprobs
            outside = beyond_bounds(
                moved, old, advantages, mask, objective.trust_region, objective.clip_low, objective.clip_high
            )
            kl = {} if reference is None else {"kl": kl_estimate(reference - logprobs)}
            self._log_means(mask, prob_mean=logprobs.exp(), entropy=entropy, weight_mean=w, clip_fraction=outside, **kl)
        if self.model.training:  # a step may be one of several that a generated batch is divided into
            loss = loss * self.args.steps_per_generation / self.current_gradient_accumulation_steps
        return loss * self.accelerator.num_processes  # gradients are averaged over processes; our losses add up

    def _log_means(self, mask: Tensor, **values: Tensor) -> None:
        """Means over the tokens in the loss, of all processes."""
        sums = torch.stack([mask.sum().double(), *(value[mask].double().sum() for value in values.values())])
        count, *totals = self.accelerator.reduce(sums, reduction="sum").tolist()
        for name, total in zip(values, totals, strict=True):
            self._metrics["train" if self.model.training else "eval"][name].append(total / max(1.0, count))


def _inputs(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Input of the log-probabilities: ids [B, prompt + T], attention mask, T."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1), batch["completion_ids"].shape[1]


@contextmanager
def trainer_of(config: Config, folder: Path, **changes: Any) -> Iterator[TRGRPOTrainer]:
    """The run that `config` describes, as a trainer; the reward functions run in their own process until the end.

    changes: arguments of GRPOConfig, e.g. use_vllm=True, vllm_mode="colocate"; `rollout_func` goes to the trainer.
    Not taken over: held-out scores, guards, top-up rounds, train.memory, our engine.
    """
    rollout = changes.pop("rollout_func", None)
    device = resolve_device(config.model.device)
    arguments = trl_arguments(config, folder, device, **changes)  # starts the processes' group and picks their card
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    with build.scoring_of(config) as scoring:
        training, _ = load_examples(config.data, config.eval.rows)
        model, template, _ = hf.parts(config.model, device, config.train.seed)
        ends = template.end_ids(model.get_base_model().generation_config)
        model.generation_config.eos_token_id = sorted(ends)  # TRL reads them from here
        encoded = [(example, template.encode(example.prompt)) for example in training]
        encoded = [pair for pair in encoded if len(pair[1].ids) <= config.data.max_prompt_tokens]
        if len(encoded) < config.train.prompts_per_step:
            raise DataError(
                f"{len(encoded)} prompts are within data.max_prompt_tokens, but train.prompts_per_step = "
                f"{config.train.prompts_per_step}: TRL would never fill a step; lower the latter"
            )
        rows = [{"prompt": prompt.text, "place": place} for place, (_, prompt) in enumerate(encoded)]
        yield TRGRPOTrainer(
            model, [reward_function(encoded, template, ends, config, scoring)], args=arguments,
            train_dataset=Dataset.from_list(rows), processing_class=template.tokenizer, rollout_func=rollout,
            objective=config.objective, prompt_ids={prompt.text: prompt.ids for _, prompt in encoded},
        )  # fmt: skip


def trl_arguments(config: Config, folder: Path, device: torch.device, **changes: Any) -> GRPOConfig:
    """GRPOConfig of our options. A step's answers are divided over the processes, then into equal micro-batches."""
    train, rollout, dtype = config.train, config.rollout, resolve_dtype(config.model.dtype, device)
    answers = train.prompts_per_step * rollout.group_size
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by every launcher
    if answers % processes:
        raise ConfigError(
            f"train.prompts_per_step {train.prompts_per_step} x rollout.group_size {rollout.group_size} = {answers} "
            f"answers a step cannot be divided over {processes} processes; change one of the three"
        )
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens  # TRL pads, and reads a prompt with every answer
    fitting = max(1, train.micro_batch_tokens // longest)
    rows = max(n for n in range(1, answers // processes + 1) if answers // processes % n == 0 and n <= fitting)
    settings: dict[str, Any] = dict(
        output_dir=str(folder), per_device_train_batch_size=rows, num_generations=rollout.group_size,
        gradient_accumulation_steps=answers // processes // rows, num_iterations=train.updates_per_batch,
        max_completion_length=rollout.max_new_tokens, temperature=rollout.temperature, top_p=1.0,
        top_k=0, max_steps=train.steps * train.updates_per_batch, learning_rate=train.learning_rate,
        lr_scheduler_type=SCHEDULES[train.schedule], warmup_steps=train.warmup_steps * train.updates_per_batch,
        optim=OPTIMIZERS[train.optimizer], weight_decay=train.weight_decay, max_grad_norm=train.max_grad_norm,
        gradient_checkpointing=train.gradient_checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, seed=train.seed, report_to="none",
        save_steps=max(1, train.checkpoint_every) * train.updates_per_batch, logging_steps=1,
        save_strategy="steps" if train.checkpoint_every else "no", save_total_limit=train.keep_checkpoints,
    )  # fmt: skip
    if device.type == "cpu":
        settings |= {"use_cpu": True, **({"ddp_backend": "gloo"} if processes > 1 else {})}
    return GRPOConfig(**(settings | changes))


def reward_function(
    encoded: Sequence[tuple[Example, Prompt]], template: Template, ends: frozenset[int], config: Config, scorer: Scorer
) -> Callable[..., list[float | None]]:
    """The configured rewards as one function in TRL's manner; an answer is read from its ids, as in our own loop."""

    def completion(ids: Sequence[int]) -> Completion:
        text = template.decode(ids, ends)
        return Completion(tuple(ids), (True,) * len(ids), (0.0,) * len(ids), text, ids[-1] in ends)

    def reward(
        completion_ids: Sequence[Sequence[int]], place: Sequence[int], log_metric: Any, **_: Any
    ) -> list[float | None]:
        rows = zip(place, completion_ids, strict=True)
        groups = [
            Group(encoded[number][0], encoded[number][1], [completion(ids) for _, ids in members])
            for number, members in groupby(rows, key=lambda row: row[0])
        ]
        scored = scorer.score(groups)
        for name in config.rewards.functions:
            values = [value for group in scored for value in group.parts[name]]
            graded = [value for value in values if not isnan(value)]
            log_metric(f"reward/{name}", sum(graded) / max(1, len(graded)))
        first = [value for group in scored for value in group.parts[next(iter(config.rewards.functions))]]
        log_metric("solved", sum(value >= config.rewards.solved_at for value in first) / len(first))
        return [None if isnan(total) else total for group in scored for total in group.rewards]

    return reward
