"""Talking to a model: text appears as soon as it is certain, base and adapter side by side, answers scored."""

import re
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from lite_trgrpo.cli import app
from lite_trgrpo.records import Completion, Prompt, Sampling
from lite_trgrpo.rollout.engine import Answer
from lite_trgrpo.terminal.chat import spoken
from tests.tiny import END, tiny_model_folder, tiny_tokenizer

SAMPLING = Sampling(1, 40, temperature=1.0, key=(1,))


class Scripted:
    """Says given ids one after another, decoded by the tiny model's real tokenizer: most characters are lone bytes."""

    def __init__(self, ids, cut=0):
        self.tokenizer, self.ids = tiny_tokenizer(), ids[: len(ids) - cut]

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def sample(self, prompts, sampling, wanted, grown):
        answer = Answer(0, 0)
        for token in self.ids:
            answer.ids.append(token)
            grown(answer)
        ids = tuple(self.ids)
        yield 0, 0, Completion(ids, (True,) * len(ids), (0.0,) * len(ids), self.decode(ids), True)


def pieces_of(text, cut=0):
    pieces = []
    ids = tiny_tokenizer()(text).input_ids
    answer = spoken(Scripted([*ids, END], cut), Prompt((1,), ""), SAMPLING, pieces.append)
    return pieces, answer


@pytest.mark.parametrize("text", ["naïve — 42", "中文 ok", "🙂 and 👩‍🔬.", "\ufffd is what it says", " a  b"])
def test_a_character_is_printed_once_it_is_whole(text):
    pieces, answer = pieces_of(text)
    assert "".join(pieces) == answer.text == text
    assert len(pieces) > 2
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_shown_at_the_end():
    pieces, answer = pieces_of("ok 中", cut=2)  # the end token, and the last of the three bytes
    assert answer.text.startswith("ok ") and answer.text.endswith("\ufffd")
    assert "".join(pieces) == answer.text and "\ufffd" not in "".join(pieces[:-1])


def test_what_a_decoder_takes_back_is_printed_whole_at_the_end():
    texts = iter(["one", "once", "upon"])  # the third does not go on with what was printed
    policy = SimpleNamespace(
        decode=lambda ids: next(texts),
        sample=lambda prompts, sampling, wanted, grown: [
            [grown(Answer(0, 0)) for _ in range(3)] and (0, 0, Completion((1,), (True,), (0.0,), "upon a time", True))
        ],
    )
    pieces = []
    spoken(policy, Prompt((1,), ""), SAMPLING, pieces.append)
    assert pieces == ["one", "\n", "upon a time"]


def test_streaming_changes_no_answer(tmp_path):
    from lite_trgrpo.config.schema import Model
    from lite_trgrpo.model import hf
    from lite_trgrpo.model.policy import sample_all

    policy = hf.load(Model(name=str(tiny_model_folder(tmp_path / "model"))), seed=0)
    prompt, pieces = policy.encode("3 + 4"), []
    answer = spoken(policy, prompt, SAMPLING, pieces.append)
    assert answer == sample_all(policy, [prompt], SAMPLING)[0][0]
    assert "".join(pieces) == answer.text and len(pieces) > 5


@pytest.fixture
def chat(tiny_config, tmp_path):
    """An adapter that changes answers, and a way to chat with it."""
    from lite_trgrpo.config import loading
    from lite_trgrpo.model import hf

    config = loading.load(file=tiny_config)
    policy = hf.load(config.model, seed=0)
    for parameter in policy.trainable().values():
        parameter.data.normal_(std=0.2)
    policy.save_adapter(tmp_path / "adapter")

    def talk(said, *flags, adapter=True):
        given = ["chat", "-c", str(tiny_config), *flags, *(("-a", str(tmp_path / "adapter")) if adapter else ())]
        result = CliRunner().invoke(app, given, input=said)
        assert result.exit_code == 0, result.stderr
        return result

    return talk


def test_base_and_adapter_answer_as_they_do_alone_turn_after_turn(chat):
    both = chat("2 + 2\nand 3?\n\n", "--compare").stdout
    parts = [piece for turn in both.split("> ") for piece in turn.split("adapter: ")]
    with_base = [part.removeprefix("base: ") for part in parts if part.startswith("base: ")]
    with_adapter = [turn.split("adapter: ")[1] for turn in both.split("> ") if "adapter: " in turn]
    alone = [
        [turn for turn in chat("2 + 2\nand 3?\n\n", adapter=on).stdout.split("> ") if turn] for on in (False, True)
    ]
    assert [with_base, with_adapter] == alone
    assert with_base != with_adapter


def test_a_gold_answer_scores_the_last_answer(chat):
    """The tiny config's reward is the sum of the ids modulo 3, solved from 1 on."""
    result = chat("/gold 4\n2 + 2\n/gold 4\n\n")
    assert sum("/gold 42" in line for line in result.stderr.splitlines()) == 1  # the first came before any question
    [scored] = [one for one in result.stdout.splitlines() if "reward" in one]
    assert float(re.findall(r"\d+(?:\.\d+)?", scored)[0]) in (0, 1, 2)


def test_new_begins_another_conversation(chat):
    again = chat("what?\n/new\n/quit\n2 + 2\n\n")
    answers = [turn for turn in again.stdout.split("> ") if turn.strip()]
    assert len(answers) == 2
    with_history = chat("what?\n2 + 2\n\n").stdout.split("> ")
    assert answers[1] != with_history[2]


def test_gold_without_an_answer_asks_for_one(chat):
    assert "/gold 42" in chat("2 + 2\n/gold\n\n").stderr


def test_an_own_reward_finds_the_gold_answer_in_its_column(capsys, tmp_path):
    from lite_trgrpo import build
    from lite_trgrpo.config.loading import load
    from lite_trgrpo.records import Example, Group
    from lite_trgrpo.terminal import chat

    file = tmp_path / "own.py"
    file.write_text(
        "def same(completions, res, **columns):\n    return [float(c == r) for c, r in zip(completions, res)]\n"
    )
    config = load("demo", overrides=["data.answer=res", f"rewards.functions={{'{file}:same' = 1.0}}"])
    answer = Completion((5,), (True,), (0.0,), "17", True)
    last = Group(Example("9 + 8?", {}, "chat"), Prompt((1,), ""), (answer,))
    with build.scoring_of(config) as scorer:
        chat._score(scorer, config, "adapter", last, "17")
    assert re.search(r":same 1\b", capsys.readouterr().out)


def test_the_presets_reward_sees_the_gold_answer(capsys):
    from lite_trgrpo import build
    from lite_trgrpo.config.loading import load
    from lite_trgrpo.records import Example, Group
    from lite_trgrpo.terminal import chat

    answer = Completion((5,), (True,), (0.0,), "9 + 8 = 17", True)
    last = Group(Example("9 + 8?", {}, "chat"), Prompt((1,), ""), (answer,))
    said = []
    with build.scoring_of(load("demo")) as scorer:
        for gold in ("17", "18"):
            chat._score(scorer, load("demo"), "adapter", last, gold)
            said.append(capsys.readouterr().out)
    assert all(line.startswith("adapter") for line in said)
    assert "number 1" in said[0] and "number 0" in said[1]
    solved, unsolved = (re.sub(r"\d", "", line) for line in said)
    assert solved != unsolved, "the verdict stands beside the numbers"
