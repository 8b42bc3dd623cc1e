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
    """What is trained."""

    name: str = Field(
        min_length=1,
        description="Base model: a Hub id, a folder, a .gguf file, or package:NAME/FILE.gguf (inside a Python package)",
    )
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit); the default branch if unset")
    sha256: str | None = Field(None, description="Refuse a .gguf file whose SHA-256 is another")
    upstream: str | None = Field(
        None, description="Hub id that the adapter names as its base; needed where name is a file that has one"
    )
    backend: Literal["auto", "transformers", "unsloth"] = Field(
        "auto", description="auto: unsloth where a card and its package are there, else transformers"
    )
    adapter: str | None = Field(None, description="Folder or Hub id of a LoRA adapter to continue from")
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none", description="nf4: 4-bit base weights, double quantisation; int8: 8-bit (bitsandbytes); none: 16 or 32"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Compute type of the base; auto: bfloat16 where the card has it, else float16; float32 on CPU",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes the card if torch can use one")
    lora_rank: int = Field(16, ge=1, le=1024, description="Rank r of the LoRA update")
    lora_alpha: float = Field(32, gt=0, description="The update is scaled by alpha / r (alpha / sqrt(r) with rsLoRA)")
    lora_targets: list[str] = Field(
        ["all-linear"],
        min_length=1,
        description="Module names that get LoRA, or all-linear: every linear layer but the head",
    )
    lora_dropout: float = Field(0.0, description="Must be 0: dropout makes the ratio differ from 1 before any update")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead of alpha / r")
    dora: bool = Field(False, description="DoRA: the length of each row of the weights is learned too; slower")
    trust_remote_code: bool = Field(False, description="Run Python code that a model repository brings. Dangerous")
    prompt_format: str | None = Field(
        None, description='For bases without a chat template, e.g. "Question: {prompt}\\nAnswer:"; {system} may appear'
    )
    template_options: dict[str, Any] = Field(
        {}, description="Passed to the chat template, e.g. { enable_thinking = false }"
    )

    @field_validator("lora_targets", mode="before")
    @classmethod
    def _one_target_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("lora_dropout")
    @classmethod
    def _no_dropout(cls, value: float) -> float:
        if value != 0:
            raise ValueError(
                "must be 0: with dropout the policy that is trained differs from the one that sampled, so the "
                "ratio is wrong before the first update. Remove the line"
            )
        return value


class Data(Section):
    """Where the prompts come from."""

    source: str = Field(
        min_length=1,
        description="A .jsonl, .csv or .parquet file, a Hub data set id, reasoning-gym:TASK, or builtin:addition",
    )
    subset: str | None = Field(None, description="Configuration name of a Hub data set, e.g. main")
    split: str = Field("train", description="Split of a Hub data set to train on")
    revision: str | None = Field(None, description="Hub revision of the data set")
    eval_source: str | None = Field(
        None, description="Another source for the held-out rows (subset, revision and options are of `source`)"
    )
    eval_split: str | None = Field(None, description="Split of the Hub data set that holds the held-out rows")
    prompt: str = Field("prompt", description="Column that holds the prompt: a string or a list of chat messages")
    answer: str = Field("answer", description="Column with the gold answer, seen by rewards as `answer`; '' for none")
    system: str | None = Field(None, description="System message put before every prompt that has none")
    options: dict[str, Any] = Field({}, description="Arguments of a generator, e.g. { size = 2000 }")
    max_prompt_tokens: int = Field(512, ge=1, description="Longer prompts are counted, reported and left out (tokens)")
    scan: str | None = Field(
        None,
        description="A file of `lite-trgrpo check --scan 500`: training takes only prompts that the base solved there "
        "between 10 % and 90 % of the time",
    )
    seed: int = Field(
        0, ge=0, le=MAX_SEED, description="Of generators and of the choice of held-out rows; not of a run's sampling"
    )


class Rewards(Section):
    """How an answer is scored."""

    functions: dict[str, float] = Field(
        {"exact": 1.0},
        description="Weight by name of a built-in or file.py:function; the reward is the weighted sum",
    )
    options: dict[str, dict[str, Any]] = Field({}, description="Keyword arguments by function name")
    must_stop: bool = Field(False, description="An answer that the token cap cut off gets at most 0 from each function")
    solved_at: float = Field(1.0, description="An answer is solved when the first function gives at least this")
    seconds: float = Field(5.0, gt=0, description="Longest that a function may take for one answer (seconds)")
    memory: str = Field("4GB", description="Most that the process of the functions may hold, e.g. 512MB (Linux only)")
    on_failure: str | float = Field(
        "skip",
        description="Where a function hangs, crashes or raises: skip the answer (not gradable), fail the run, or a "
        "number, its value for the answer",
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

    @model_validator(mode="after")
    def _options_have_a_function(self) -> "Rewards":
        stray = [name for name in self.options if name not in self.functions]
        if stray:
            raise ValueError(f"options for {stray} but functions only has {list(self.functions)}")
        return self


class Rollout(Section):
    """How answers are sampled."""

    group_size: int = Field(8, description="Answers a prompt (the paper's G)")
    max_new_tokens: int = Field(256, ge=1, description="Cap of an answer's length (tokens)")
    temperature: float = Field(1.0, gt=0, description="All probabilities are those of softmax(logits / temperature)")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Below 1 the sampler is no longer the policy: for experiments only"
    )
    top_k: int = Field(0, ge=0, description="Above 0 the sampler is no longer the policy: for experiments only")
    top_up_rounds: int = Field(
        0,
        ge=0,
        description="Rounds in which groups without signal are replaced by fresh prompts (DAPO's dynamic sampling)",
    )
    max_rows: int = Field(128, ge=1, description="At most this many answers are decoded side by side")
    cache_mib: int | None = Field(
        None,
        ge=1,
        description="Memory for keys and values while sampling (MiB): as many of max_rows as fit. Unset: 2048 on CPU, "
        "a third of what is free on the card; a run keeps what was resolved at its start",
    )
    engine: Literal["groups", "generate", "vllm"] = Field(
        "groups", description="groups: ours; generate: transformers' own, as a reference; vllm: unsloth's, on a card"
    )

    @field_validator("group_size")
    @classmethod
    def _a_group_has_two(cls, value: int) -> int:
        if value < 2:
            raise ValueError("must be at least 2: an answer is judged against the others of its group")
        return value

    def decoding(self) -> dict[str, Any]:
        """What `records.Sampling` takes of it beside the distribution: how answers are decoded."""
        found = {"max_rows": self.max_rows, "engine": self.engine}
        return found if self.cache_mib is None else found | {"cache_bytes": self.cache_mib * 2**20}


class Objective(Section):
    """The loss, in the paper's symbols (docs/method.md)."""

    weights: Literal["offset", "centred", "reverse", "constant", "linear", "none"] = Field(
        "offset",
        description="Token weight w: offset, centred: TR-GRPO in two readings; reverse: w(1 - p); constant: their mean "
        "(fair control); linear: a p + 1 - a; none: 1",
    )
    alpha: float = Field(2.0, description="alpha in w = clip(alpha (sigmoid(kappa (p - centre)) - mu), low, high)")
    kappa: float = Field(9.0, description="kappa, the slope (the paper's tau)")
    low: float = Field(1.0, gt=0, description="Lower bound of w")
    high: float = Field(1.4, gt=0, description="Upper bound of w")
    share: float = Field(0.3, ge=0, le=1, description="a of the linear weight a p + 1 - a")
    weights_from: Literal["current", "sampling"] = Field(
        "current", description="The policy whose p sets the weight: the one being trained, or the one that sampled"
    )
    normalise_weights: bool = Field(False, description="Divide w by its mean over the step's tokens")
    placement: Literal["surrogate", "ratio"] = Field(
        "surrogate", description="surrogate: w outside min and KL; ratio: Eq. 9 as printed, w on the ratio"
    )
    advantage: Literal["grpo", "dr-grpo", "rloo", "reinforce-rej"] = Field(
        "grpo", description="A from the group's rewards R: (R - mean) / std, R - mean, R - mean of the others, R"
    )
    trust_region: Literal["clip", "sequence", "cispo", "sapo", "dppo", "penalty"] = Field(
        "clip", description="What holds pi near pi_old: PPO's clip, GSPO, CISPO, SAPO, DPPO (binary TV), R2VPO"
    )
    clip_low: float = Field(0.2, ge=0, lt=1, description="eps_low: the ratio's lower bound is 1 - eps_low")
    clip_high: float = Field(0.2, ge=0, description="eps_high: the ratio's upper bound is 1 + eps_high")
    dual_clip: float | None = Field(None, gt=1, description="c: where A < 0 the gain is never below c A")
    penalty: float = Field(1.0, ge=0, description="lambda of r A - lambda (r - 1)^2 (trust_region = penalty)")
    aggregation: Literal["sequence", "token", "constant"] = Field(
        "sequence",
        description="Mean over answers of their token means, over all tokens of the step, or over B * max_new_tokens",
    )
    beta: float = Field(0.0, ge=0, description="KL coefficient; above 0 the base model is the reference")
    kl: Literal["k1", "k2", "k3"] = Field("k3", description="KL estimator: -log x, (log x)^2 / 2, x - log x - 1")
    mask_truncated: bool = Field(False, description="Leave answers cut off by the token cap out of the loss")

    @model_validator(mode="after")
    def _fits_together(self) -> "Objective":
        if self.placement == "ratio" and self.trust_region != "clip":
            raise ValueError(
                f"placement = ratio is Eq. 9 as printed, whose trust region is clip, not {self.trust_region}; "
                "set placement = surrogate"
            )
        if self.dual_clip is not None and self.trust_region not in ("clip", "sequence"):
            raise ValueError(f"dual_clip belongs to trust_region clip or sequence, not {self.trust_region}; unset it")
        if self.low > self.high:
            raise ValueError(f"low = {self.low} is above high = {self.high}; swap them")
        return self


class Train(Section):
    """The loop."""

    steps: int = Field(200, ge=1, description="Optimizer batches: each samples, scores and updates once")
    prompts_per_step: int = Field(8, ge=1, description="Prompts a step (the letter P); any number works")
    updates_per_batch: int = Field(1, ge=1, description="Optimizer updates made with each batch of answers")
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate of AdamW")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Learning rate after the warm-up")
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit"] = Field(
        "adamw", description="AdamW with its state in fp32, or in 8 bits (bitsandbytes), or paged to host memory too"
    )
    weight_decay: float = Field(0.0, ge=0, description="Of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm")
    micro_batch_tokens: int = Field(
        4096,
        ge=1,
        description="Tokens of one forward and backward, a shared prompt counted once; never changes the result",
    )
    memory: str | None = Field(
        None,
        description="Most that the run may take, e.g. 6GB: of the card, or on CPU of the process (Linux only). What "
        "goes beyond it is met as out of memory: done in smaller pieces",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward: less memory, more time")
    checkpoint_every: int = Field(50, ge=0, description="Steps between checkpoints; 0: not by number of steps")
    checkpoint_minutes: float = Field(10, ge=0, description="Minutes after which there is one anyway; 0: never")
    keep_checkpoints: int = Field(3, ge=1, description="Newest checkpoints that stay, beside the one to fall back on")
    prefer_half: bool = Field(
        False, description="Of four prompts take the one whose remembered solve rate is nearest to 50 %; new ones first"
    )
    preflight: bool = Field(True, description="Refuse to start, or to go on after step 1, where nothing can be learned")
    track: Literal["tensorboard", "wandb", "trackio"] | None = Field(
        None, description="Send the metrics there too; its package must be installed"
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Of adapter initialisation, data order and sampling")

    @field_validator("memory")
    @classmethod
    def _memory_is_a_size(cls, value: str | None) -> str | None:
        if value is not None:
            memory_bytes(value)
        return value


class Eval(Section):
    """The held-out score."""

    every: int = Field(0, ge=0, description="Steps between evaluations; 0: only before and after")
    rows: int = Field(200, ge=0, description="Held-out rows; at most half of a source that has no split of its own")
    samples: int = Field(4, ge=0, description="Sampled answers a row, for pass@k; 0: only the greedy answer")
    max_new_tokens: int | None = Field(None, ge=1, description="Cap while evaluating; the rollout's if unset (tokens)")
    stop_loops: bool = Field(False, description="Cut off answers that repeat themselves; they count as truncated")


class Guards(Section):
    """When a run is in trouble. A step that is beyond a limit is a yellow light, `window` in a row are a red one."""

    rollbacks: int = Field(
        0,
        ge=0,
        description="Red lights that go back to the last good checkpoint, at half the rate; one more ends",
    )
    window: int = Field(5, ge=2, description="Steps in a row that turn a yellow light red")
    entropy: float = Field(
        0.01, ge=0, description="entropy_sampled below which answers hardly vary: collapse, unless solved (nats)"
    )
    grad_norm: float = Field(10.0, gt=0, description="Above it the gradient has blown up (before clipping)")
    kl: float = Field(
        2.0,
        gt=0,
        description="Above it the policy has left its base (objective.beta > 0), or itself in one step (nats)",
    )
    truncated: float = Field(0.95, gt=0, le=1, description="From this share on all answers count as cut off")
    length: float = Field(0.9, gt=0, le=1, description="Mean length that runs to the cap, as a share of the cap")


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

    def changed(self, section: str, **values: Any) -> "Config":
        """The same run with other values in one section; they are not validated again."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=values)})


KINDS = (Model, Data, Rewards, Rollout, Objective, Train, Eval, Guards)
SECTIONS: dict[str, type[Section]] = dict(zip(Config.model_fields, KINDS, strict=True))
