"""The memory a run will take, found before any weight is loaded.

Nothing here is a formula for activations: the model is built without data (torch's FakeTensorMode), and the code that a
run would use reads prompts, decodes and takes gradients on it, while the bytes of all tensors alive are counted. So the
plan follows the code, for any architecture. What it cannot see: buffers inside kernels, and the allocator's leftovers.
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lite_trgrpo.config.schema import Config
from lite_trgrpo.errors import FOREIGN, first_line
from lite_trgrpo.model.hook import has_states, states_in
from lite_trgrpo.model.loading import class_of, no_dropout
from lite_trgrpo.model.lora import add_lora, prepare
from lite_trgrpo.model.network import Network
from lite_trgrpo.model.packing import batches
from lite_trgrpo.records import Sampling
from lite_trgrpo.rollout.attention import Packed
from lite_trgrpo.rollout.cache import GroupCache
from lite_trgrpo.rollout.engine import READ_AT_ONCE, line_count, slot_count
from lite_trgrpo.rollout.sampling import draw

# of a weight; nf4: 4 bits, an 8-bit scale for 64 of them, a 32-bit one for 256 scales; int8: a scale a row besides
BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
STATE_BYTES = {"adamw": 8.0, "adamw-8bit": 2.0, "paged-adamw-8bit": 0.0}  # of Adam for a weight, on the device


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes by part. Rollout and update follow each other, so the larger of the two counts."""

    weights: int
    adapter: int
    """LoRA weights, their gradients and the optimizer's state."""
    cache: int
    """Keys and values of `slots` answers and their prompts."""
    rollout: int
    """Further memory of sampling at its peak (bytes)."""
    update: int
    """Peak of forward and backward of the largest micro-batch: activations, logits (bytes)."""
    slots: int
    """Answers decoded side by side."""
    path: str
    """How the model samples and is trained."""

    @property
    def peak(self) -> int:
        return self.weights + self.adapter + max(self.cache + self.rollout, self.update)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations create, while they are alive; real ones or fake ones."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.add, out)
        return out

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    @contextmanager
    def above(self, found: dict[str, int], name: str) -> Iterator[None]:
        """Put the block's peak above what was alive before it into `found`."""
        before = self.peak = self.live
        yield
        found[name] = self.peak - before


def plan(config: Config, model_config: Any, dtype: torch.dtype, prompt_tokens: int) -> Plan:
    """`model_config`: the base's, of transformers; `prompt_tokens`: of the longest prompt.

    Layers are alike, so 2 and 4 of them tell what any number takes: every part is a constant and so much a layer.
    Where kinds of layers take turns, one turn and two of them do.
    """
    text = model_config.get_text_config()
    layers, turn = text.num_hidden_layers, _turn(text)
    if layers <= 2 * turn:
        return _counted(config, model_config, dtype, prompt_tokens, layers)
    one, two = (_counted(config, model_config, dtype, prompt_tokens, n) for n in (turn, 2 * turn))
    sizes = {part.name: (getattr(one, part.name), getattr(two, part.name)) for part in fields(Plan) if part.type is int}
    return replace(one, **{name: a + (b - a) * (layers - turn) // turn for name, (a, b) in sizes.items()})


def _turn(text: Any) -> int:
    """Layers after which their kinds repeat, at least 2; the whole depth where they never do."""
    layers = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None)
    if not kinds:
        return layers if has_states(text) else 2
    return max(2, next(n for n in range(1, layers + 1) if all(kinds[i] == kinds[i % n] for i in range(layers))))


def _counted(config: Config, model_config: Any, dtype: torch.dtype, prompt_tokens: int, layers: int) -> Plan:
    """The plan for the first `layers` of the model, with as many slots as the whole model would have."""
    found: dict[str, int] = {}
    groups, sampling = config.train.prompts_per_step, _sampling(config)
    model = _model(config, model_config, dtype, layers)
    with FakeTensorMode(), LiveBytes() as memory:
        _without_data(model)
        network = Network(model, 0, config.train.gradient_checkpointing)
        for tensor in (*network.model.parameters(), *network.model.buffers()):
            memory.add(tensor)
        frozen = sum(_bytes(name, p, config) for name, p in network.model.named_parameters() if not p.requires_grad)
        trained = sum(p.numel() for p in network.trainable().values())
        wanted, why = [[0] * prompt_tokens] * groups, "rollout.engine = generate"
        try:
            network.by_groups = sampling.engine != "generate"
            sizes = (size * model_config.get_text_config().num_hidden_layers // layers for size in network.cache_bytes)
        except FOREIGN as error:
            network.by_groups, why = False, first_line(error)
        network.attend_by_groups(network.by_groups)
        slots = slot_count(wanted, sampling, *(sizes if network.by_groups else (0, 0)))
        with memory.above(found, "rollout"):
            kept = (_sample if network.by_groups else _generate)(network, slots, groups, sampling, prompt_tokens)
        with memory.above(found, "update"):
            _teach(network, config, prompt_tokens)
        unpacked = _largest_quantised(network.model, config)
    return Plan(
        weights=int(frozen),
        adapter=int(trained * (4 + 4 + STATE_BYTES[config.train.optimizer])),
        cache=kept,
        rollout=found["rollout"] - kept + unpacked,
        update=found["update"] - 4 * trained + unpacked,  # the gradients are counted with the adapter
        slots=slots,
        path=network.path(why),
    )


def fitting(
    config: Config, model_config: Any, dtype: torch.dtype, prompt_tokens: int, limit: int
) -> tuple[Config, list[str]] | None:
    """Change what harms least until the plan's peak is below `limit` (bytes): -> options, the changes; None: nothing
    helps. No change alters what is computed, but for nf4 (rounded base weights) and 8-bit Adam.
    """
    changes: list[str] = []
    row = prompt_tokens + config.rollout.max_new_tokens
    while (found := plan(config, model_config, dtype, prompt_tokens)).peak > limit:
        update_is_larger = found.update > found.cache + found.rollout
        if update_is_larger and config.train.micro_batch_tokens > row:
            change: tuple[str, str, Any] = (
                "train",
                "micro_batch_tokens",
                max(row, config.train.micro_batch_tokens // 2),
            )
        elif not update_is_larger and found.slots > 1:
            change = ("rollout", "max_rows", found.slots // 2)
        elif update_is_larger and not config.train.gradient_checkpointing:
            change = ("train", "gradient_checkpointing", True)
        elif config.model.quantization == "none":
            change = ("model", "quantization", "nf4")
        elif config.train.optimizer == "adamw":
            change = ("train", "optimizer", "adamw-8bit")
        else:
            return None
        section, key, value = change
        config = config.changed(section, **{key: value})
        changes = [line for line in changes if not line.startswith(f"{section}.{key} ")]
        changes.append(f"{section}.{key} = {str(value).lower() if isinstance(value, bool) else value}")
    return config, changes


def _model(config: Config, model_config: Any, dtype: torch.dtype, layers: int) -> Any:
    model_config = copy.deepcopy(model_config)
    text = model_config.get_text_config()
    if layers < text.num_hidden_layers:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    no_dropout(model_config)
    with torch.device("meta"):
        model = add_lora(class_of(model_config).from_config(model_config, dtype=dtype), config.model)
    prepare(model)
    return model


def _without_data(model: nn.Module) -> None:
    """Under FakeTensorMode: every parameter and buffer as one on the CPU that holds nothing; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    kind = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if kind else empty
                if tensor is not None:
                    store[name] = made[id(tensor)]  # type: ignore[assignment]


def _sampling(config: Config) -> Sampling:
    rollout = config.rollout
    return Sampling(rollout.group_size, rollout.max_new_tokens, **rollout.decoding())


@torch.no_grad()
def _sample(network: Network, slots: int, prompts: int, sampling: Sampling, prompt_tokens: int) -> int:
    """Read as many prompts as are read at once, then one step with every slot at its last token -> bytes kept."""
    network.model.eval()
    lines = line_count(slots, prompts)
    cache = GroupCache(slots, lines, sampling.max_new_tokens, prompt_tokens)
    at_once = 1 if network.recurrent else max(1, min(lines, READ_AT_ONCE // prompt_tokens))
    ids = torch.zeros(1, at_once * prompt_tokens, dtype=torch.long)
    for _ in range(2 if network.recurrent else 1):  # a second prompt is read beside the states of all rows
        cache.read_into([(line, prompt_tokens) for line in range(at_once)])
        groups = Packed([(prompt_tokens, ())] * at_once, network.device, keep=cache)
        network.hidden(ids, groups.positions, groups)
    cache.arrange(
        [min(row // sampling.members, lines - 1) for row in range(slots)],
        [prompt_tokens] * slots, [sampling.max_new_tokens - 1] * slots, network.device,
    )  # fmt: skip
    ids = torch.zeros(slots, 1, dtype=torch.long)
    logits = network.logits(network.hidden(ids, ids, cache)[:, 0])
    draw(logits, torch.zeros(slots, dtype=torch.float64), temperature=1.0)
    pairs = [tensor for pair in (*cache.rows.values(), *cache.lines.values()) for tensor in pair]
    return sum(tensor.nbytes for tensor in (*pairs, *cache.row_states.values(), *cache.line_states.values()))


@torch.no_grad()
def _generate(network: Network, rows: int, prompts: int, sampling: Sampling, prompt_tokens: int) -> int:
    """The same of transformers' `generate`, where each answer has its prompt's keys and values to itself."""
    from transformers import DynamicCache

    network.model.eval()
    cache = DynamicCache(config=network.config)
    ids = torch.zeros(rows, prompt_tokens, dtype=torch.long)
    network.decoder(input_ids=ids, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            longer = (0, 0, 0, sampling.max_new_tokens - 1)
            layer.keys, layer.values = F.pad(layer.keys, longer), F.pad(layer.values, longer)
    hidden = network.decoder(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).last_hidden_state
    logits = network.logits(hidden[:, 0])
    draw(logits, torch.zeros(rows, dtype=torch.float64), temperature=1.0)
    kept = [tensor for layer in cache.layers for tensor in vars(layer).values() if isinstance(tensor, Tensor)]
    return sum(tensor.nbytes for tensor in (*kept, *states_in(cache).values()))


def _teach(network: Network, config: Config, prompt_tokens: int) -> None:
    """Forward and backward of the largest micro-batch that the options allow."""
    answers, tokens = config.rollout.group_size, config.rollout.max_new_tokens
    groups = range(config.train.prompts_per_step)
    rows = [((p,) * prompt_tokens, (0,) * tokens) for p in groups for _ in range(answers)]
    batch = max(batches(rows, lambda row: row, config.train.micro_batch_tokens, network.packs), key=len)
    logprobs, _ = network.logprobs(batch, config.rollout.temperature)
    logprobs.sum().backward()


def _bytes(name: str, parameter: nn.Parameter, config: Config) -> float:
    quantised = ".base_layer." in name and parameter.ndim == 2
    size = BYTES.get(config.model.quantization) if quantised else None
    return parameter.numel() * (size or parameter.dtype.itemsize)


def _largest_quantised(model: nn.Module, config: Config) -> int:
    """A quantised layer is unpacked while it is used: its weight in the compute type."""
    if config.model.quantization == "none":
        return 0
    return max(p.nbytes for name, p in model.named_parameters() if ".base_layer." in name)
