"""Attention over groups against the plain model: log-probabilities and gradients of the packed forward, and fit."""

import random
import types
from itertools import chain

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, GPTNeoXConfig, GPTNeoXForCausalLM

from lite_trgrpo.check.plan import LiveBytes
from lite_trgrpo.config import loading
from lite_trgrpo.model import hf
from lite_trgrpo.model.network import Network
from lite_trgrpo.model.policy import sample_all, sample_groups
from lite_trgrpo.records import Prompt, Sampling
from lite_trgrpo.rollout.attention import Packed
from lite_trgrpo.rollout.cache import GroupCache
from tests.test_backend import policy_of, relative_error
from tests.tiny import (
    END,
    HYBRID_TARGETS,
    HYBRIDS,
    KINDS,
    PAD,
    VOCABULARY,
    tiny_model,
    tiny_model_folder,
    tiny_tokenizer,
)

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.2, "bos_token_id": None,
    "eos_token_id": END, "pad_token_id": PAD,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny_model_folder(root / kind, kind) for kind in KINDS + HYBRIDS}


def folder_of(model, path):
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def ragged_rows(seed=0):
    """(prompt, completion): prompts shorter and longer than gemma's window of 8, members scattered."""
    draw = random.Random(seed)

    def ids(length):
        return tuple(draw.randrange(3, VOCABULARY) for _ in range(length))

    groups = [(1, (5, 1, 0)), (20, (12, 2, 1, 30)), (8, (1,)), (7, (9, 9)), (9, (17, 0, 10)), (1, (1,)), (30, (0,))]
    rows = [
        (prompt, ids(n)) for prompt, lengths in ((ids(length), lengths) for length, lengths in groups) for n in lengths
    ]
    draw.shuffle(rows)
    return rows


def plain(policy, rows):
    """log p of all completion ids, one after the other, from the padded rows' full logits."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.tensor([[*p, *c, *[PAD] * (width - len(p) - len(c))] for p, c in rows])
    real = torch.tensor([[i < len(p) + len(c) for i in range(width)] for p, c in rows]).long()
    logprobs = torch.log_softmax(policy.model(input_ids=ids, attention_mask=real, use_cache=False).logits, -1)
    parts = [
        logprobs[i, len(p) - 1 : len(p) + len(c) - 1].gather(-1, torch.tensor(c, dtype=torch.long).unsqueeze(-1))
        for i, (p, c) in enumerate(rows)
    ]
    return torch.cat(parts).squeeze(-1)


def packed(policy, rows):
    logprobs, _ = policy.logprobs(rows, 1.0)
    return torch.cat([logprobs[i, : len(completion)] for i, (_, completion) in enumerate(rows)])


def gradients(policy, logprobs):
    """Of a sum with a weight of its own for every token."""
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(3)).to(logprobs.dtype)
    parts = torch.autograd.grad(logprobs @ weights, list(policy.trainable().values()), allow_unused=True)
    assert all(part is not None for part in parts)
    return torch.cat([part.flatten() for part in parts])


def in_double(policy):
    """The model in float64 throughout: transformers' norms would round to fp32 even there."""
    policy.model.double()
    for module in policy.model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            epsilon = getattr(module, "variance_epsilon", None) or module.eps
            scale = module.weight + 1.0 if type(module).__name__.startswith("Gemma") else module.weight
            module.forward = types.MethodType(
                lambda _, x, scale=scale, epsilon=epsilon: (
                    x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * scale
                ),
                module,
            )
    return policy


# -- the packed forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_padded_in_float64(folders, kind, checkpointing):
    policy = in_double(policy_of(folders[kind], gradient_checkpointing=checkpointing))
    rows = ragged_rows()
    found, expected = packed(policy, rows), plain(policy, rows)
    assert found.dtype == torch.float64
    assert relative_error(found, expected) < 1e-12
    assert relative_error(gradients(policy, found), gradients(policy, expected)) < 1e-10


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", HYBRIDS)
def test_hybrid_update_equals_each_row_alone(folders, kind, checkpointing):
    """Their rows are padded: no pad may reach a state, and no row another's."""
    policy = policy_of(folders[kind], gradient_checkpointing=checkpointing, lora_targets=HYBRID_TARGETS)
    rows = ragged_rows()
    assert policy.network.by_groups and not policy.network.packs
    found, expected = packed(policy, rows), torch.cat([plain(policy, [row]) for row in rows])
    assert relative_error(found, expected) < 1e-5
    assert relative_error(gradients(policy, found), gradients(policy, expected)) < 1e-4


def test_the_order_of_the_rows_changes_nothing(folders):
    policy = in_double(policy_of(folders["gemma3_text"]))
    rows = ragged_rows()
    with torch.no_grad():
        logprobs, entropy = policy.logprobs(rows, 0.7)
        again = policy.logprobs(rows[::-1], 0.7)
    for a, b in zip((logprobs, entropy), again, strict=True):
        torch.testing.assert_close(a, b.flip(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_reference_is_the_base(folders, kind):
    policy = policy_of(folders[kind])
    rows = ragged_rows()
    with torch.no_grad(), policy.reference():
        off = packed(policy, rows)
        base = tiny_model(kind)
        expected = plain(types.SimpleNamespace(model=base), rows)
        on = plain(policy, rows)
    torch.testing.assert_close(off, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(off, on, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert (packed(policy, rows) - off).abs().max() > 1e-2, "outside, the adapter is on again"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_nf4_gradients(folders, checkpointing):
    policy = policy_of(folders["qwen2"], quantization="nf4", gradient_checkpointing=checkpointing)
    rows = ragged_rows()
    found, expected = packed(policy, rows), plain(policy, rows)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(gradients(policy, found), gradients(policy, expected)) < 1e-4


def test_prompt_tokens_are_read_once(folders):
    policy = policy_of(folders["qwen2"])
    rows, read = ragged_rows(), []
    policy.network.decoder.embed_tokens.register_forward_hook(lambda _, inputs, out: read.append(inputs[0].numel()))
    policy.logprobs(rows, 1.0)
    # an answer's last token predicts nothing and is not read
    assert read == [sum(map(len, {p for p, _ in rows})) + sum(max(0, len(c) - 1) for _, c in rows)]


def test_all_completions_empty(folders):
    logprobs, entropy = policy_of(folders["qwen2"]).logprobs([((5, 6), ()), ((7,), ())], 1.0)
    assert logprobs.shape == entropy.shape == (2, 0)


@pytest.mark.parametrize("window", [1, 2, 5, 6, 11, 12, None])
def test_packed_attention_written_out(window):
    """Every pair of tokens by hand: same group, prompt or same answer, not ahead, less than `window` behind."""
    spans, heads, width = [(6, (3, 0, 5)), (1, (2,)), (4, ()), (12, (1, 1))], 4, 8
    groups = Packed(spans, torch.device("cpu"))
    owner, position = [], []  # of a token: (group, answer or -1), position
    for g, (prompt, answers) in enumerate(spans):
        for a, length in [(-1, prompt), *enumerate(answers)]:
            owner += [(g, a)] * length
            position += range(prompt if a >= 0 else 0, (prompt if a >= 0 else 0) + length)
    assert groups.positions.tolist() == [position]
    n = len(owner)
    seen = torch.tensor(
        [
            [
                owner[k] in (owner[q], (owner[q][0], -1)) and 0 <= position[q] - position[k] < (window or n)
                for k in range(n)
            ]
            for q in range(n)
        ]
    )
    q, k, v = (torch.randn(1, h, n, width, dtype=torch.float64) for h in (heads, 2, 2))
    found = groups.attend(0, q, k, v, 0.3, window)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(found, (scores.softmax(-1) @ v).transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_scores_do_not_overflow_in_fp16():
    """q k^T itself is beyond fp16 where its scaled value is not; fp16 is what a card without bf16 decodes in."""
    cache = GroupCache(1, 1, 4, 4)
    q, k, v = (torch.full((1, 1, 1, 64), x, dtype=torch.float16) for x in (40.0, 40.0, 1.0))  # 64 * 40 * 40 = 102,400
    cache.read_into([(0, 1)])
    cache.keep(0, k[0], v[0])
    cache.arrange([0], [1], [0], torch.device("cpu"))
    torch.testing.assert_close(cache.attend(0, q, k, v, 0.125, None), v, rtol=1e-3, atol=0)


@pytest.mark.slow
def test_packed_gradients_of_a_real_model():
    """In fp32 they are closer to the truth (7e-6) than the padded ones (2e-5), so the truth is what to compare with."""
    policy = demo_policy()
    questions = ["What is 12 + 34?", "Name three primes.", "Who wrote Faust? Answer in one sentence, please."]
    prompts = [policy.encode(question) for question in questions]
    groups = sample_all(policy, prompts, Sampling(3, 32, key=(1,)))
    rows = [(p.ids, c.ids) for p, group in zip(prompts, groups, strict=True) for c in group]
    in_fp32 = gradients(policy, packed(policy, rows))
    in_double(policy)
    found, expected = packed(policy, rows), plain(policy, rows)
    exact = gradients(policy, expected)
    assert relative_error(found, expected) < 1e-12
    assert relative_error(gradients(policy, found), exact) < 1e-12
    assert relative_error(in_fp32.double(), exact) < 1e-5


def demo_policy():
    """SmolLM2-135M of the preset `demo`, with an adapter that does something."""
    policy = hf.load(loading.load(preset="demo").model, seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    return policy


# -- which models it fits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantization": "nf4"},
                                     {"quantization": "nf4", "dtype": "bfloat16"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS + HYBRIDS)
def test_groups_fit(folders, kind, options, capfd):
    targets = {"lora_targets": HYBRID_TARGETS} if kind in HYBRIDS else {}
    assert policy_of(folders[kind], **options, **targets).network.by_groups
    assert "warning" not in capfd.readouterr().err


def assert_right(policy):
    """What is sampled and scored is what the plain model says."""
    prompts = [Prompt(tuple(range(3, 3 + length)), "") for length in (1, 14, 5)]
    for options in ({"members": 1, "greedy": True}, {"members": 3, "temperature": 0.7}):
        groups = sample_all(policy, prompts, Sampling(max_new_tokens=12, key=(5,), **options))
        rows = [(p.ids, c.ids) for p, group in zip(prompts, groups, strict=True) for c in group]
        with torch.no_grad():
            torch.testing.assert_close(packed(policy, rows), plain(policy, rows), rtol=1e-4, atol=1e-4)
        for prompt, group in zip(prompts, groups, strict=True):
            for completion in group:
                row = torch.tensor([prompt.ids + completion.ids])
                with torch.no_grad():
                    logits = policy.model(input_ids=row, use_cache=False).logits[0, len(prompt.ids) - 1 : -1]
                logprobs = torch.log_softmax(logits / options.get("temperature", 1.0), -1)
                ids = torch.tensor(completion.ids)
                if options.get("greedy"):
                    assert ids.tolist() == logits.argmax(-1).tolist()
                picked = logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
                torch.testing.assert_close(torch.tensor(completion.logprobs), picked, rtol=1e-4, atol=1e-4)


def test_a_model_that_groups_do_not_fit_falls_back(tmp_path, caplog):
    """BLOOM's attention knows no replacement."""
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["bloom"](**SIZES))
    policy = policy_of(folder_of(model.float(), tmp_path))
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("lite_trgrpo")]
    assert len(warnings) == 1 and "'bloom'" in warnings[0]
    assert (policy.network.by_groups, policy.packs, policy.network.pads) == (False, False, True)
    assert_right(policy)


def test_prompts_of_one_length_share_a_batch_where_pads_would_be_seen(tmp_path, monkeypatch):
    """RWKV reads no attention mask: a pad on the left would reach its state."""
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["rwkv"](**SIZES))
    policy, masks = policy_of(folder_of(model.float(), tmp_path), lora_targets=["key", "value"]), []
    assert not policy.network.pads
    real = policy.model.generate
    monkeypatch.setattr(
        policy.model, "generate", lambda **given: (masks.append(given["attention_mask"]), real(**given))
    )
    found = sample_all(policy, [Prompt((5,) * n, "") for n in (4, 1, 4)], Sampling(2, 3))
    assert [len(group) for group in found] == [2, 2, 2]
    assert [(tuple(mask.shape), bool(mask.all())) for mask in masks] == [((2, 1), True), ((4, 4), True)]


def test_soft_caps_are_those_of_the_models_own_attention(folders):
    """The padded rows that others are compared with go through our replacement too, so here is transformers' eager."""
    policy, rows = policy_of(folders["gemma2"]), ragged_rows()
    found = packed(policy, rows)
    policy.model.get_base_model().set_attn_implementation("eager")
    assert relative_error(found, plain(policy, rows)) < 1e-5
    policy.network.config.attn_logit_softcapping = 50.0
    for module in policy.model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = 50.0
    assert relative_error(found, plain(policy, rows)) > 1e-2


def test_a_config_without_key_value_heads(tmp_path):
    """GPT-NeoX (Pythia) has as many key-value heads as query heads, and does not say so."""
    policy = policy_of(folder_of(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)).float(), tmp_path))
    assert_right(policy)


@pytest.mark.parametrize("place", [Packed, GroupCache])
def test_attention_that_yields_nan_does_not_fit(folders, monkeypatch, place):
    """NaN > bound is false: what overflows must not pass for what agrees."""
    attend = place.attend
    monkeypatch.setattr(place, "attend", lambda *arguments: attend(*arguments) * torch.nan)
    assert not policy_of(folders["qwen2"]).network.by_groups


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_attention_that_is_a_little_wrong_does_not_fit(folders, monkeypatch, kind):
    attend = Packed.attend
    monkeypatch.setattr(
        Packed,
        "attend",
        lambda self, layer, q, k, v, scaling, *rest: attend(self, layer, q, k, v, scaling * 1.5, *rest),
    )
    assert not policy_of(folders[kind]).network.by_groups


# -- transformers' own generate -----------------------------------------------------------------------------


def test_the_generate_engine_is_right(folders):
    policy = policy_of(folders["llama"])
    prompts = [Prompt(tuple(range(3, 3 + length)), "") for length in (1, 14, 5)]
    ours, theirs = (
        sample_all(policy, prompts, Sampling(1, 20, greedy=True, temperature=0.7, engine=engine))
        for engine in ("groups", "generate")
    )
    for [mine], [other] in zip(ours, theirs, strict=True):
        assert (mine.ids, mine.stopped, mine.text) == (other.ids, other.stopped, other.text)
        torch.testing.assert_close(torch.tensor(mine.logprobs), torch.tensor(other.logprobs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ["groups", "generate"])
def test_greedy_members_are_alike(folders, engine):
    policy = policy_of(folders["llama"])
    [group] = sample_all(policy, [Prompt((5, 6, 7), "")], Sampling(3, 5, greedy=True, engine=engine))
    assert group[0].ids == group[1].ids == group[2].ids


def test_a_models_own_generation_settings_stay_out(tmp_path):
    """Qwen2.5 ships a repetition penalty: GRPO's answers come from the policy itself."""
    model = tiny_model("qwen2")
    model.generation_config = GenerationConfig(eos_token_id=[END], pad_token_id=PAD, do_sample=True, top_k=3,
                                               repetition_penalty=5.0, no_repeat_ngram_size=1)  # fmt: skip
    policy = policy_of(folder_of(model, tmp_path))
    prompts = [Prompt(tuple(range(3, 3 + length)), "") for length in (1, 14, 5)]
    ours, theirs = (
        sample_all(policy, prompts, Sampling(1, 40, greedy=True, engine=engine)) for engine in ("groups", "generate")
    )
    assert [c.ids for [c] in ours] == [c.ids for [c] in theirs]


def test_generate_leaves_the_callers_random_numbers_alone(folders):
    policy = policy_of(folders["qwen2"])
    prompts = [Prompt((5, 6, 7), ""), Prompt((8, 9), "")]
    sampling = Sampling(2, 6, engine="generate", key=(4,))
    expected = sample_all(policy, prompts, sampling)
    torch.manual_seed(0)
    numbers = torch.rand(3)
    torch.manual_seed(0)
    found, drawn = {}, []
    for p, group in sample_groups(policy, prompts, sampling):
        found[p] = group
        drawn.append(torch.rand(1))  # between two groups, as rewards may
    drawn.append(torch.rand(1))
    assert [found[p] for p in range(2)] == expected
    assert torch.equal(torch.cat(drawn), numbers)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "lfm2", "qwen3_5_text"])
def test_generate_draws_what_our_engine_draws(folders, kind):
    """The same random numbers, whatever stands beside an answer: prompts are padded, and no pad may be seen."""
    policy = policy_of(folders[kind])
    prompts = [Prompt(tuple(range(3, 3 + length)), "") for length in (9, 1, 33, 20)]
    ours = sample_all(policy, prompts, Sampling(3, 12, temperature=0.8, key=(4, 2)))
    for rows in (64, 5, 1):
        sampling = Sampling(3, 12, temperature=0.8, key=(4, 2), engine="generate", max_rows=rows)
        theirs = sample_all(policy, prompts, sampling)
        assert [[c.ids for c in group] for group in theirs] == [[c.ids for c in group] for group in ours]
        for mine, other in zip(chain(*ours), chain(*theirs), strict=True):
            torch.testing.assert_close(torch.tensor(mine.logprobs), torch.tensor(other.logprobs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 5, 6, 64])
def test_generate_decodes_at_most_max_rows(folders, rows):
    """What the retry after running out of memory lowers must lower something."""
    policy, widths, grown = policy_of(folders["llama"]), [], []
    policy.network.decoder.embed_tokens.register_forward_hook(lambda _, inputs, out: widths.append(len(inputs[0])))
    prompts = [Prompt(tuple(range(3, 3 + length)), "") for length in (4, 1, 9)]
    sampling = Sampling(4, 6, engine="generate", max_rows=rows)
    found = list(policy.sample(prompts, sampling, [range(4)] * 3, lambda answer: grown.append(answer.ids[-1])))
    assert max(widths) == min(rows, 12)
    assert len(grown) == sum(len(completion.ids) for _, _, completion in found)


def test_generate_keeps_no_scores(folders):
    """One log-probability a token: memory must not grow with the vocabulary times the length."""
    policy, wide = policy_of(folders["llama"]), 100 * VOCABULARY
    policy.model.get_base_model().resize_token_embeddings(wide)
    policy.network = Network(policy.model, PAD, False)
    peaks = []
    for tokens in (5, 40):
        with LiveBytes() as memory:
            list(policy.sample([Prompt((5, 6), "")], Sampling(8, tokens, engine="generate"), [range(8)]))
        peaks.append(memory.peak)
    assert peaks[1] - peaks[0] < 8 * wide * 4, "less than one more [8, V]"
