"""Every option of a run, once: type, default, help, unit. Nothing else in the project defines an option."""

import math
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_SEED = 2**63 - 1  # what torch.manual_seed takes


def memory_bytes(text: str) -> int:
    """`2GB`, `512MB` -> bytes, with 1 GB = 2^30 as graphics cards count."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB)", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError("must be a size, e.g. 2GB or 512MB")
    return int(float(match[1]) * {"MB": 2**20, "GB": 2**30}[match[2].upper()])


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Model(Section):
    """The base model and its LoRA adapter."""

    name: str = Field(
        min_length=1,
        description="Base model: a Hub id, a folder, a .gguf file, or package:NAME/FILE.gguf (inside a Python package)",
    )
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit); the default branch if unset")
    sha256: str | None = Field(None, description="Expected SHA-256 of the .gguf file")
    upstream: str | None = Field(
        None, description="Hub id to record as the adapter's base, for a base loaded from a file"
    )
    backend: Literal["auto", "transformers", "unsloth"] = Field(
        "auto",
        description="Library that runs the model. auto: transformers, except for rollout.engine = vllm. unsloth brings "
        "its own kernels, but samples prompt by prompt and pads the update",
    )
    adapter: str | None = Field(None, description="Folder or Hub id of a LoRA adapter to continue from")
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none",
        description="Precision of the base weights. nf4: 4-bit with double quantisation; int8: 8-bit (bitsandbytes); "
        "none: 16- or 32-bit, per dtype",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Compute type of the base. auto: bfloat16 if the GPU has it, else float16; float32 on CPU"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device to run on. auto: the GPU if torch can use it, else the CPU"
    )
    lora_rank: int = Field(16, ge=1, le=1024, description="Rank r of the LoRA update")
    lora_alpha: float = Field(
        32, gt=0, description="Scale alpha of the LoRA update: alpha / r, or alpha / sqrt(r) with rslora"
    )
    lora_targets: list[str] = Field(
        ["all-linear"],
        min_length=1,
        description="Names of the modules that get LoRA; all-linear: every linear layer except the head",
    )
    rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead of alpha / r")
    trust_remote_code: bool = Field(
        False, description="Run Python code from the model repository. Dangerous: it can do anything you can"
    )
    prompt_format: str | None = Field(
        None,
        description='Format for a base without a chat template, e.g. "Question: {prompt}\\nAnswer:"; may hold {system}',
    )
    template_options: dict[str, Any] = Field(
        {}, description="Arguments of the chat template, e.g. { enable_thinking = false }"
    )

    @field_validator("lora_targets", mode="before")
    @classmethod
    def _one_target_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Data(Section):
    """The prompts and their gold answers."""

    source: str = Field(
        min_length=1,
        description="A .jsonl, .csv or .parquet file, a Hub data set id, reasoning-gym:TASK, or builtin:addition",
    )
    subset: str | None = Field(None, description="Configuration name of a Hub data set, e.g. main")
    split: str = Field("train", description="Split of a Hub data set to train on")
    revision: str | None = Field(None, description="Hub revision of the data set")
    eval_source: str | None = Field(
        None,
        description="Source of the held-out rows, in the same forms as source; subset, revision and options do not "
        "apply to it",
    )
    eval_split: str | None = Field(None, description="Split of the Hub data set that holds the held-out rows")
    prompt: str = Field("prompt", description="Column that holds the prompt: a string or a list of chat messages")
    answer: str = Field(
        "answer",
        description="Column with the gold (reference) answer, passed to rewards as `answer`; an empty text if the "
        "data have none",
    )
    system: str | None = Field(None, description="System message for every prompt that has none")
    options: dict[str, Any] = Field({}, description="Arguments of a generator, e.g. { size = 2000 }")
    max_prompt_tokens: int = Field(
        512, ge=1, description="Longest prompt (tokens); longer ones are left out and counted"
    )
    scan: str | None = Field(
        None,
        description="File of `lite-trgrpo check --scan 500`: train only on prompts that the base model solved 10 to "
        "90 % of the time in that scan",
    )
    seed: int = Field(
        0,
        ge=0,
        le=MAX_SEED,
        description="Seed for generated data and for the held-out split (sampling uses train.seed)",
    )


class Rewards(Section):
    """How an answer is scored."""

    functions: dict[str, float] = Field(
        {"exact": 1.0},
        description="Reward functions with weights, e.g. { exact = 1.0 }: built-ins (docs/data.md) or "
        "file.py:function. The reward is the weighted sum",
    )
    options: dict[str, dict[str, Any]] = Field({}, description="Keyword arguments of each function, by its name")
    truncated_max_zero: bool = Field(False, description="Cap the score of each function at 0 for truncated answers")
    solved_by: str | None = Field(
        None, description="Function that decides whether an answer is solved; unset: the first of rewards.functions"
    )
    solved_at: float = Field(1.0, description="Lowest value of that function at which an answer counts as solved")
    seconds: float = Field(5.0, gt=0, le=86_400, description="Time limit of a function for one answer (seconds)")
    memory: str = Field("4GB", description="Memory limit of the reward process, e.g. 512MB (Linux only)")
    pass_env: list[str] = Field(
        [], description='Environment variables that reward functions may see, e.g. ["JUDGE_URL"]; others are withheld'
    )
    on_failure: str | float = Field(
        "skip",
        description="If a function times out, crashes or raises: skip (treat the answer as not gradable), fail (stop "
        "the run), or a number (the score of that function)",
    )

    @field_validator("functions")
    @classmethod
    def _some_function(cls, value: dict[str, float]) -> dict[str, float]:
        if not value:
            raise ValueError("must name at least one function, e.g. { math = 1.0 }")
        return value

    @field_validator("memory", mode="before")
    @classmethod
    def _a_number_is_in_mb(cls, value: Any) -> Any:
        return f"{value}MB" if type(value) is int else value

    @field_validator("memory")
    @classmethod
    def _memory_is_a_size(cls, value: str) -> str:
        if memory_bytes(value) < 2**28:
            raise ValueError("must be at least 256MB; Python and the built-ins need that much")
        return value

    @field_validator("on_failure", mode="before")
    @classmethod
    def _known_policy(cls, value: Any) -> Any:
        number = type(value) in (int, float) and math.isfinite(value)
        if not number and value not in ("skip", "fail"):
            raise ValueError("must be skip, fail or a number, e.g. -1.0")
        return value

    @property
    def decisive(self) -> str:
        """The function that decides whether an answer is solved."""
        return self.solved_by or next(iter(self.functions))

    @model_validator(mode="after")
    def _options_have_a_function(self) -> "Rewards":
        stray = [name for name in self.options if name not in self.functions]
        if stray:
            raise ValueError(f"options for {stray} but functions only has {list(self.functions)}")
        if self.solved_by is not None and self.solved_by not in self.functions:
            raise ValueError(f"solved_by = {self.solved_by!r} is not one of functions, {list(self.functions)}")
        return self


class Rollout(Section):
    """How answers are sampled."""

    group_size: int = Field(8, le=4096, description="Answers per prompt (the paper's G)")
    max_new_tokens: int = Field(256, ge=1, le=1_000_000, description="Longest answer (tokens)")
    temperature: float = Field(
        1.0, ge=0.01, le=100, description="Sampling temperature. Log-probabilities in the loss use it too"
    )
    top_up_rounds: int = Field(
        0,
        ge=0,
        description="Times per step that groups whose answers all got the same reward are replaced by fresh prompts "
        "(DAPO: dynamic sampling); 0: off",
    )
    max_rows: int = Field(128, ge=1, le=65_536, description="Most answers decoded at the same time")
    cache_mib: int | None = Field(
        None,
        ge=1,
        description="Memory for keys and values while sampling (MiB); limits how many answers are decoded at once, up"
        " to max_rows. Unset: 2048 on CPU, a third of the free memory on a GPU; fixed when the run starts",
    )
    engine: Literal["groups", "generate", "vllm"] = Field(
        "groups",
        description="Sampling engine. groups: built in; generate: that of transformers, for reference; vllm: vLLM "
        "through unsloth (CUDA only)",
    )

    @field_validator("group_size")
    @classmethod
    def _a_group_has_two(cls, value: int) -> int:
        if value < 2:
            raise ValueError("must be at least 2: an answer is judged against the others of its group")
        return value

    def decoding(self) -> dict[str, Any]:
        """Arguments of `records.Sampling` that say how answers are decoded, not from which distribution."""
        found = {"max_rows": self.max_rows, "engine": self.engine}
        return found if self.cache_mib is None else found | {"cache_bytes": self.cache_mib * 2**20}


class Weight(Section):
    """Constants of the token weight w = clip(alpha (sigmoid(kappa (p - centre)) - mu), low, high)."""

    alpha: float = Field(2.0, description="alpha, the scale")
    kappa: float = Field(9.0, description="kappa, the slope (the paper's tau)")
    low: float = Field(1.0, gt=0, description="Lower bound of w")
    high: float = Field(1.4, gt=0, description="Upper bound of w")
    a: float = Field(0.3, ge=0, le=1, description="a of the linear weight a p + 1 - a")

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> "Weight":
        if self.low > self.high:
            raise ValueError(f"low = {self.low} is above high = {self.high}; swap them")
        return self


class Objective(Section):
    """The loss, in the paper's symbols (docs/method.md)."""

    weights: Literal["offset", "centred", "reverse", "constant", "linear", "none"] = Field(
        "offset",
        description="Token weight w(p). offset, centred: two interpretations of the TR-GRPO formula; reverse: w(1 - "
        "p); constant: the mean weight of the step for every token (control); linear: a p + 1 - a; none: "
        "1",
    )
    weight: Weight = Field(Weight(), description="Constants of the token weight, a table: see below")
    weights_from: Literal["current", "sampling"] = Field(
        "current", description="Policy whose p sets the weight: the one being trained, or the one that sampled"
    )
    placement: Literal["surrogate", "ratio"] = Field(
        "surrogate",
        description="Where w multiplies. surrogate: the whole clipped term and the KL term; ratio: the probability "
        "ratio inside them, as in Eq. 9 of the paper",
    )
    advantage: Literal["grpo", "dr-grpo", "rloo", "reinforce-rej"] = Field(
        "grpo",
        description="Advantage from the rewards R of a group. grpo: (R - mean) / std; dr-grpo: R - mean; rloo: R - "
        "mean of the others; reinforce-rej: R",
    )
    trust_region: Literal["clip", "sequence", "cispo", "sapo", "dppo", "penalty"] = Field(
        "clip",
        description="What keeps pi near pi_old. clip: PPO; sequence: GSPO; cispo; sapo; dppo: binary TV; penalty: "
        "R2VPO",
    )
    clip_low: float = Field(0.2, ge=0, lt=1, description="eps_low: the ratio's lower bound is 1 - eps_low")
    clip_high: float = Field(0.2, ge=0, description="eps_high: the ratio's upper bound is 1 + eps_high")
    dual_clip: float | None = Field(
        None, gt=1, description="Dual clip c: where A < 0 the gain is never below c A; unset: off"
    )
    penalty: float = Field(1.0, ge=0, description="lambda of r A - lambda (r - 1)^2 (trust_region = penalty)")
    aggregation: Literal["sequence", "token", "constant"] = Field(
        "sequence",
        description="How token losses are averaged. sequence: within each answer, then over answers; token: over all "
        "tokens of the step; constant: sum divided by B * max_new_tokens (B: number of answers)",
    )
    beta: float = Field(0.0, ge=0, description="KL coefficient; above 0 the base model is the reference")
    kl: Literal["k1", "k2", "k3"] = Field(
        "k3", description="KL estimator, with x = pi_ref / pi. k1: -log x; k2: (log x)^2 / 2; k3: x - log x - 1"
    )
    mask_truncated: bool = Field(False, description="Leave truncated answers out of the loss")

    @model_validator(mode="after")
    def _fits_together(self) -> "Objective":
        if self.placement == "ratio" and self.trust_region != "clip":
            raise ValueError(
                f"placement = ratio is Eq. 9 as printed, whose trust region is clip, not {self.trust_region}; "
                "set placement = surrogate"
            )
        if self.dual_clip is not None and self.trust_region not in ("clip", "sequence"):
            raise ValueError(f"dual_clip belongs to trust_region clip or sequence, not {self.trust_region}; unset it")
        return self


class Train(Section):
    """The loop."""

    steps: int = Field(200, ge=1, le=10_000_000, description="Number of steps; each samples, scores and updates once")
    prompts_per_step: int = Field(8, ge=1, le=65_536, description="Prompts per step")
    updates_per_batch: int = Field(1, ge=1, le=1000, description="Optimizer updates per batch of answers")
    learning_rate: float = Field(2e-5, gt=0, le=1000, description="Peak learning rate of AdamW")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up; 0: none")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Learning rate after the warm-up")
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit"] = Field(
        "adamw", description="AdamW with state in fp32, in 8 bits (bitsandbytes), or in 8 bits and paged to host memory"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="Largest gradient norm; larger gradients are scaled down to it")
    micro_batch_tokens: int = Field(
        4096,
        ge=1,
        description="Tokens per forward and backward pass, a shared prompt counted once. Never changes the result",
    )
    memory: str | None = Field(
        None,
        description="Memory limit, e.g. 6GB: of the GPU, or of the process on CPU (Linux only). Work that would "
        "exceed it is split into smaller batches; unset: no limit",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward: less memory, more time")
    checkpoint_every: int = Field(50, ge=0, description="Save a checkpoint every N steps (0: off)")
    checkpoint_minutes: float = Field(
        10, ge=0, le=100_000, description="Also save a checkpoint every N minutes (0: off)"
    )
    keep_checkpoints: int = Field(
        3, ge=1, description="Number of newest checkpoints to keep, besides the best and the last good one"
    )
    preflight: bool = Field(
        True, description="Stop before training, or after step 1, if the rewards give no learning signal"
    )
    track: Literal["tensorboard", "wandb", "trackio"] | None = Field(
        None, description="Also send the metrics to this tracker; its package must be installed"
    )
    seed: int = Field(
        0, ge=0, le=MAX_SEED, description="Seed for the adapter's initial weights, data order and sampling"
    )

    @field_validator("memory")
    @classmethod
    def _memory_is_a_size(cls, value: str | None) -> str | None:
        if value is not None:
            memory_bytes(value)
        return value


class Eval(Section):
    """The held-out score."""

    every: int = Field(0, ge=0, description="Evaluate every N steps (0: only before and after training)")
    rows: int = Field(
        200, ge=0, description="Number of held-out rows; if they are taken from the training source, at most half of it"
    )
    samples: int = Field(4, ge=0, le=4096, description="Sampled answers per row, for pass@k; 0: only the greedy answer")
    max_new_tokens: int | None = Field(
        None, ge=1, description="Longest answer while evaluating (tokens); unset: rollout.max_new_tokens"
    )


class Guards(Section):
    """Health limits of a run: crossing one is a warning, staying beyond it is critical."""

    rollbacks: int = Field(
        0,
        ge=0,
        description="Maximum number of roll-backs (to the last good checkpoint, at half the learning rate) before a "
        "critical guard stops the run; 0: only warn",
    )
    entropy: float = Field(
        0.01,
        ge=0,
        description="Warn if the entropy of sampled tokens (metric entropy_sampled, nats) falls below this while "
        "prompts are still unsolved: answers hardly vary any more",
    )


class Config(Section):
    """A whole run."""

    model: Model
    data: Data
    rewards: Rewards = Rewards()
    rollout: Rollout = Rollout()
    objective: Objective = Objective()
    train: Train = Train()
    eval: Eval = Eval()
    guards: Guards = Guards()

    @model_validator(mode="after")
    def _system_message_has_a_place(self) -> "Config":
        form = self.model.prompt_format
        if self.data.system and form is not None and "{system}" not in form:
            raise ValueError(
                f"data.system is set, but model.prompt_format {form!r} has no {{system}}, so the model would never "
                "read it. Write {system} into the format, or unset data.system"
            )
        return self

    def changed(self, section: str, **values: Any) -> "Config":
        """The same run with other values in one section; they are not validated again."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=values)})


KINDS = (Model, Data, Rewards, Rollout, Objective, Train, Eval, Guards)
SECTIONS: dict[str, type[Section]] = dict(zip(Config.model_fields, KINDS, strict=True))
