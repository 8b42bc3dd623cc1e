"""Decoding groups against the plain model: the same tokens, the right frequencies, no work done twice."""

from collections import Counter, deque
from dataclasses import replace

import pytest
import torch

from lite_trgrpo.errors import ModelError
from lite_trgrpo.model.policy import sample_all, sample_groups
from lite_trgrpo.records import Prompt, Sampling
from lite_trgrpo.rollout import engine as engine_module
from lite_trgrpo.rollout.cache import GroupCache
from lite_trgrpo.rollout.engine import Engine, slot_count
from tests.test_attention import demo_policy
from tests.test_backend import policy_of
from tests.tiny import HYBRID_TARGETS, HYBRIDS, KINDS, PAD, VOCABULARY, tiny_model_folder

SLOTS = (1, 2, 3, 5, 7, 64)
LENGTHS = (9, 1, 33, 3, 20, 8)  # around gemma's window of 8 and the cache's steps of 16


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    few = ["q_proj", "v_proj", "down_proj"]  # each adapter costs a third of a millisecond a step
    found = {kind: policy_of(tiny_model_folder(root / kind, kind), lora_targets=few) for kind in KINDS}
    return found | {
        kind: policy_of(tiny_model_folder(root / kind, kind), lora_targets=HYBRID_TARGETS) for kind in HYBRIDS
    }


def ids_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]


def prompts_of(lengths, seed=0):
    return [Prompt(ids, "") for ids in ids_of(lengths, seed)]


def decoded(policy, prompts, sampling, slots, ends=None, reverse=False):
    """-> the engine after its work, and {(prompt, member): answer}."""
    policy.model.eval()
    engine = Engine(policy.network, prompts, sampling, policy.end_ids if ends is None else frozenset(ends), slots)
    if reverse:
        engine._queue = deque(reversed(engine._queue))
    answers = {(answer.prompt, answer.member): answer for answer in engine.answers()}
    assert len(answers) == len(prompts) * sampling.members
    return engine, answers


@torch.no_grad()
def plain_logits(policy, prompt, ids):
    row = torch.tensor([[*prompt, *ids]])
    return policy.model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].float()


def assert_scored(policy, prompts, answers, temperature=1.0, ends=None):
    ends = policy.end_ids if ends is None else ends
    for (p, _), answer in answers.items():
        expected = torch.log_softmax(plain_logits(policy, prompts[p], answer.ids) / temperature, -1)
        picked = expected.gather(-1, torch.tensor(answer.ids).unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(torch.tensor(answer.logprobs), picked, rtol=1e-4, atol=1e-4)
        assert [i for i, token in enumerate(answer.ids) if token in ends] == [len(answer.ids) - 1] * answer.stopped


# -- the same as the plain model ----------------------------------------------------------------------------


def generated(policy, prompt, tokens):
    ids = torch.tensor([prompt])
    output = policy.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
        eos_token_id=list(policy.end_ids), pad_token_id=PAD,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS + HYBRIDS)
def test_greedy_equals_generate_for_any_number_of_slots(policies, kind):
    policy, prompts = policies[kind], ids_of(LENGTHS)
    expected = [generated(policy, prompt, 20) for prompt in prompts]
    assert max(map(len, expected)) == 20
    for slots in SLOTS:
        members = min(slots, 2)
        _, answers = decoded(policy, prompts, Sampling(members, 20, greedy=True), slots)
        assert all(answer.ids == expected[p] for (p, _), answer in answers.items()), slots


@pytest.mark.slow
@pytest.mark.parametrize("slots", [2, 5, 64])
def test_greedy_equals_generate_on_a_real_model(slots):
    policy = demo_policy()
    questions = ["What is 12 + 34?", "Name three primes.", "Who wrote Faust? Answer in one sentence, please.", "Hi"]
    prompts = [policy.encode(question).ids for question in questions]
    expected = [generated(policy, prompt, 48) for prompt in prompts]
    _, answers = decoded(policy, prompts, Sampling(2, 48, greedy=True), slots)
    assert all(answer.ids == expected[p] for (p, _), answer in answers.items())
    assert_scored(policy, prompts, answers)


@pytest.mark.parametrize("kind", KINDS + HYBRIDS)
def test_sampled_answers_do_not_depend_on_slots_or_order(policies, kind):
    policy, prompts, sampling = policies[kind], ids_of(LENGTHS), Sampling(4, 20, temperature=0.8, key=(7, 1))
    ends = range(3, 50)  # random models rarely end an answer
    _, first = decoded(policy, prompts, sampling, 64, ends)
    assert_scored(policy, prompts, first, 0.8, ends)
    assert len({len(answer.ids) for answer in first.values()}) > 8, "rows leave at different times"
    longer = [tuple(answer.ids) for answer in first.values() if len(answer.ids) > 1]
    assert len(set(longer)) == len(longer), "members are different draws"
    for slots in (1, 3, 7, 64):
        _, answers = decoded(policy, prompts, sampling, slots, ends, reverse=slots != 7)
        assert {key: answer.ids for key, answer in answers.items()} == {k: a.ids for k, a in first.items()}


def test_another_key_is_another_draw(policies):
    prompts = ids_of([5])
    found = [decoded(policies["qwen2"], prompts, Sampling(3, 9, key=(7, k)), 8)[1] for k in range(2)]
    assert all(found[0][key].ids != found[1][key].ids for key in found[0])


def assert_frequencies(tokens, probabilities):
    """Pearson's chi-squared with bins of at least 8 expected; fails by chance once in 30,000."""
    order = probabilities.argsort().tolist()
    counts, bins, expected, observed = Counter(tokens), [], 0.0, 0
    for token in order:
        expected += probabilities[token].item() * len(tokens)
        observed += counts[token]
        if expected >= 8:
            bins.append((observed, expected))
            expected, observed = 0.0, 0
    assert len(bins) > 20
    statistic = sum((o - e) ** 2 / e for o, e in bins)
    assert statistic < len(bins) + 4 * (2 * len(bins)) ** 0.5, (statistic, len(bins))


def test_frequencies_are_those_of_the_model(policies):
    """Of a first token, and of second tokens, whose exact distribution is a sum over all first tokens."""
    policy, prompt, members = policies["gemma3_text"], ids_of([11])[0], 4000
    _, answers = decoded(policy, [prompt, prompt[:3]], Sampling(members, 2, temperature=0.6, key=(2,)), 512, ends=())
    rows = torch.tensor([[*prompt, token] for token in range(VOCABULARY)])
    with torch.no_grad():
        logits = policy.model(input_ids=rows, use_cache=False).logits[:, -2:]
    probabilities = torch.softmax(logits / 0.6, -1)
    first = probabilities[0, 0]
    assert_frequencies([answers[0, m].ids[0] for m in range(members)], first)
    assert_frequencies([answers[0, m].ids[1] for m in range(members)], first @ probabilities[:, 1])
    [(common, _)] = Counter(answers[0, m].ids[0] for m in range(members)).most_common(1)
    after = [a.ids[1] for (p, _), a in answers.items() if p == 0 and a.ids[0] == common]
    assert_frequencies(after, probabilities[common, 1])


def test_bf16_answers_are_scored_like_the_packed_forward(tmp_path):
    policy = policy_of(tiny_model_folder(tmp_path, "gemma3_text"), dtype="bfloat16")
    prompts = prompts_of(LENGTHS)
    groups = sample_all(policy, prompts, Sampling(3, 20, key=(3,), max_rows=5))
    rows = [(p.ids, c.ids) for p, group in zip(prompts, groups, strict=True) for c in group]
    with torch.no_grad():
        logprobs, _ = policy.logprobs(rows, 1.0)
    gap = torch.cat([logprobs[i, : len(c)] for i, (_, c) in enumerate(rows)]) - torch.tensor(
        [x for group in groups for c in group for x in c.logprobs]
    )
    assert gap.abs().median() < 0.05


# -- work and memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_5_text"])
def test_nothing_is_computed_twice(policies, kind):
    policy, prompts = policies[kind], ids_of(LENGTHS)
    forwarded = []
    hook = policy.network.decoder.embed_tokens.register_forward_hook(
        lambda _, inputs, out: forwarded.append(inputs[0].numel())
    )
    for slots in (1, 4, 64):
        forwarded.clear()
        _, answers = decoded(policy, prompts, Sampling(3, 20, key=(1,)), slots, ends=range(3, 50))
        kept = sum(len(answer.ids) for answer in answers.values())
        # an answer's first token comes from its prompt
        assert sum(forwarded) == sum(map(len, prompts)) + kept - len(answers)
    hook.remove()


@pytest.mark.parametrize(("members", "slots"), [(8, 16), (8, 64), (8, 7), (1, 16), (6, 2), (40, 16)])
def test_no_slot_is_idle_while_anybody_waits(policies, members, slots, monkeypatch):
    """Answers of very unequal length: as many steps as their sum asks for, not as their groups' longest do."""
    prompts = ids_of([5] * max(8, 8 * slots // members))
    idle, real = [], Engine._step

    def step(self):
        waits = self._queue or any(line.waiting for line in self._lines)
        idle.append(bool(waits) and len(self._rows) < self.slots)
        return real(self)

    monkeypatch.setattr(Engine, "_step", step)
    _, answers = decoded(policies["qwen2"], prompts, Sampling(members, 40, key=(4,)), slots, ends=range(3, 30))
    assert {len(answer.ids) for answer in answers.values()} >= {1, 2, 40}
    assert idle and not any(idle)


def stored_bytes(cache):
    kept = sum(store.nbytes for pairs in (cache.rows, cache.lines) for pair in pairs.values() for store in pair)
    return kept + sum(state.nbytes for states in (cache.row_states, cache.line_states) for state in states.values())


def test_moving_costs_no_more_for_long_answers(policies, monkeypatch):
    policy, per_token, moved, real = policies["llama"], [], [], GroupCache._move

    def move(self, stores, states, source, target, tokens):
        if source != target:
            moved.append(sum(store[source, :, :tokens].nbytes for pair in stores.values() for store in pair))
        real(self, stores, states, source, target, tokens)

    monkeypatch.setattr(GroupCache, "_move", move)
    for tokens, ends in ((32, range(3, 30)), (128, range(3, 10))):
        moved.clear()
        _, answers = decoded(policy, ids_of([4] * 12), Sampling(4, tokens, key=(6,)), 16, ends)
        kept = sum(len(answer.ids) for answer in answers.values())
        per_token.append((kept / len(answers), sum(moved) / kept / policy.network.cache_bytes[0]))
    (short, once), (long, again) = per_token
    assert long > 2.5 * short
    assert 0 < again < 1.2 * once < 1.2


@pytest.mark.parametrize("mib", [4.0, 1.0, 0.25, 0.1])
@pytest.mark.parametrize(("members", "tokens"), [(8, 40), (8, 1), (3, 17), (64, 5)])
@pytest.mark.parametrize("kind", ["qwen2", "lfm2"])
def test_the_cache_stays_within_its_budget(policies, kind, members, tokens, mib):
    policy, budget = policies[kind], int(mib * 2**20)
    prompts = ids_of([1 + i % 40 for i in range(320)])
    sampling = Sampling(members, tokens, cache_bytes=budget)
    slots = slot_count(prompts, sampling, *policy.network.cache_bytes)
    assert 1 < slots <= sampling.max_rows
    engine = Engine(policy.network, prompts, sampling, policy.end_ids, slots)
    policy.model.eval()
    next(engine.answers())
    assert 0 < stored_bytes(engine.cache) <= budget


def test_slots(policies):
    """As many rows as the limits ask for; one row where nothing fits."""
    sampling = Sampling(4, 64)
    assert slot_count([(5,) * 16] * 100, sampling, 1024) == sampling.max_rows
    assert slot_count([(5,) * 16] * 3, sampling, 1024) == 12
    assert slot_count([], sampling, 1024) == 1
    counted = [slot_count([(5,) * 16] * 100, Sampling(4, 64, cache_bytes=2**n), 1024) for n in range(10, 25)]
    assert counted[0] == 1 and counted[-1] == 128 and counted == sorted(counted)


def test_one_row_is_enough(policies):
    policy, prompts = policies["gemma3_text"], prompts_of(LENGTHS)
    plenty, one = (sample_all(policy, prompts, Sampling(2, 18, key=(8,), cache_bytes=n)) for n in (2**31, 1))
    assert [[c.ids for c in group] for group in one] == [[c.ids for c in group] for group in plenty]


def test_prompts_are_read_in_more_than_one_forward(policies, monkeypatch):
    policy, prompts = policies["gemma3_text"], ids_of(LENGTHS)
    _, at_once = decoded(policy, prompts, Sampling(2, 10, key=(9,)), 64)
    monkeypatch.setattr(engine_module, "READ_AT_ONCE", 12)  # less than some prompts have alone
    _, one_by_one = decoded(policy, prompts, Sampling(2, 10, key=(9,)), 64)
    assert {k: a.ids for k, a in one_by_one.items()} == {k: a.ids for k, a in at_once.items()}


# -- the stream ---------------------------------------------------------------------------------------------


def test_a_finished_group_does_not_wait_for_the_others(policies, monkeypatch):
    policy, prompts = policies["qwen2"], prompts_of([5] * 30)
    monkeypatch.setattr(policy, "end_ids", frozenset(range(3, 50)))
    steps, sampling = [], Sampling(4, 50)
    hook = policy.network.decoder.register_forward_hook(lambda *_: steps.append(1))
    seen = [(p, [len(c.ids) for c in group], len(steps)) for p, group in sample_groups(policy, prompts, sampling)]
    hook.remove()
    assert sorted(p for p, _, _ in seen) == list(range(30))
    assert all(len(lengths) == 4 for _, lengths, _ in seen)
    assert seen[0][2] < len(steps) / 4
    assert all(max(lengths) <= step for _, lengths, step in seen)
    assert [step for _, _, step in seen] == sorted(step for _, _, step in seen)


@pytest.mark.parametrize("engine", ["groups", "generate"])
def test_some_members_alone_are_the_same_answers(policies, engine):
    """What is missing after memory ran out is drawn again, and comes out as it would have."""
    policy, prompts, sampling = policies["qwen2"], prompts_of(LENGTHS), Sampling(4, 12, key=(5,), engine=engine)
    whole = sample_all(policy, prompts, sampling)
    wanted = [[0, 3], [], [2], [0, 1, 2, 3], [], [1]]
    found = {(p, m): completion for p, m, completion in policy.sample(prompts, replace(sampling, max_rows=3), wanted)}
    assert sorted(found) == [(p, m) for p, members in enumerate(wanted) for m in members]
    assert all(completion.ids == whole[p][m].ids for (p, m), completion in found.items())


@pytest.mark.parametrize("engine", ["groups", "generate"])
def test_a_closed_stream_leaves_the_policy_as_it_was(policies, engine):
    policy, prompts, sampling = policies["llama"], prompts_of(LENGTHS), Sampling(3, 12, key=(5,), engine=engine)
    expected = sample_all(policy, prompts, sampling)
    stream = sample_groups(policy, prompts, sampling)
    next(stream)
    stream.close()
    assert torch.is_grad_enabled()
    assert sample_all(policy, prompts, sampling) == expected


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3_5_text"])
def test_streams_side_by_side_and_an_update_in_between(policies, tmp_path, kind):
    """A consumer may score, and even sample, while it is handed groups."""
    policy = policy_of(tiny_model_folder(tmp_path, kind), gradient_checkpointing=True)
    prompts, other = prompts_of((9, 1, 20)), prompts_of((3, 12), seed=1)
    sampling = Sampling(2, 10, key=(5,), max_rows=3)
    expected, expected_other = (sample_all(policy, x, sampling) for x in (prompts, other))
    found = {}
    for p, group in sample_groups(policy, prompts, sampling):
        found[p] = group
        assert sample_all(policy, other, sampling) == expected_other
        policy.logprobs([(prompts[p].ids, c.ids) for c in group], 1.0)[0].sum().backward()
    assert [found[p] for p in range(len(prompts))] == expected


# -- hostile ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "tokens", "named"),
    [([2049], 1, r"\b2049\b.*\b1\b.*\b2048\b"), ([3, 2000], 49, r"\b2000\b.*\b49\b.*\b2048\b"), ([4, 0], 5, "prompt")],
)
def test_prompts_that_cannot_be_answered(policies, lengths, tokens, named):
    with pytest.raises(ModelError, match=named):
        sample_all(policies["qwen2"], prompts_of(lengths), Sampling(2, tokens))


@pytest.mark.parametrize("engine", ["groups", "generate"])
def test_no_prompts_no_groups(policies, engine):
    assert list(sample_groups(policies["qwen2"], [], Sampling(4, 5, engine=engine))) == []
    assert list(policies["qwen2"].sample([], Sampling(4, 5, engine=engine), [])) == []


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("members", [1, 3])
def test_few_tokens_and_members(policies, members, tokens):
    policy, prompts = policies["gemma3_text"], ids_of((1, 9))
    for slots in (1, 2, 64):
        _, answers = decoded(policy, prompts, Sampling(members, tokens, key=(3,)), slots, ends=())
        assert all(len(answer.ids) == tokens and not answer.stopped for answer in answers.values())
        assert_scored(policy, prompts, answers, ends=())


@pytest.mark.parametrize("slots", SLOTS)
def test_every_answer_ends_with_its_first_token(policies, slots, monkeypatch):
    monkeypatch.setattr(Engine, "_step", None)  # never called
    _, answers = decoded(policies["qwen2"], ids_of([4] * 9), Sampling(3, 50), slots, ends=range(VOCABULARY))
    assert all(len(answer.ids) == 1 and answer.stopped for answer in answers.values())


@pytest.mark.parametrize("kind", (*KINDS, "lfm2"))
def test_forty_prompts_of_one_to_forty_tokens(policies, kind):
    policy, prompts = policies[kind], ids_of(range(1, 41))
    _, answers = decoded(policy, prompts, Sampling(2, 12, key=(2,)), 11, ends=range(3, 30))
    assert_scored(policy, prompts, answers, ends=range(3, 30))


def test_equal_prompts_are_answered_apart(policies):
    policy, [prompt] = policies["llama"], ids_of([6])
    _, answers = decoded(policy, [prompt] * 4, Sampling(3, 12, key=(2,)), 5)
    assert_scored(policy, [prompt] * 4, answers)
    assert len({tuple(answer.ids) for answer in answers.values()}) == 12


# -- loops --------------------------------------------------------------------------------------------------
