"""A conversation on the terminal: answers appear as they are written; a gold answer scores them."""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lite_trgrpo import build
from lite_trgrpo.config.schema import Config
from lite_trgrpo.errors import LiteError
from lite_trgrpo.model import oom
from lite_trgrpo.records import Completion, Example, Group, Message, Prompt, Sampling
from lite_trgrpo.rewards import Scorer
from lite_trgrpo.rollout.engine import Answer
from lite_trgrpo.terminal.screen import say
from lite_trgrpo.text import plain

if TYPE_CHECKING:
    from lite_trgrpo.model.hf import TransformersPolicy

CHATTING = 2  # stream of random numbers, beside the trainer's
GOLD, NEW = "/gold", "/new"
HELP = f"{NEW} starts another conversation, {GOLD} ANSWER scores the last answer, an empty line ends"
INCOMPLETE = "\ufffd"  # what a decoder makes of a character whose bytes are not all there yet


@dataclass(slots=True)
class Speaker:
    """One that is talked to, and the conversation as it knows it."""

    name: str
    """Printed before its answers; empty where it is alone."""
    messages: list[Message]
    base: bool = False
    """Answers without the adapter."""
    last: Group | None = field(default=None)
    """Its last answer, not scored."""


def converse(config: Config, compare: bool = False) -> None:
    """Until an empty line. The model sees the whole conversation at every turn; `compare` asks the base too."""
    policy = build.policy_of(config)
    system = [{"role": "system", "content": config.data.system}] if config.data.system else []
    speakers = [Speaker("adapter" if compare else "", list(system))]
    if compare:
        speakers.insert(0, Speaker("base", list(system), base=True))
    say(
        f"{config.model.adapter or config.model.name}: at most {config.rollout.max_new_tokens} tokens an answer, "
        f"sampled at temperature {config.rollout.temperature:g}\n{HELP}"
    )
    turn = 0
    with ExitStack() as held:
        scorer: Scorer | None = None
        while line := _ask():
            word, _, gold = line.partition(" ")
            if word == NEW:
                for speaker in speakers:
                    speaker.messages, speaker.last = list(system), None
            elif word.startswith("/") and word != GOLD:
                say(HELP)
            elif word != GOLD:
                for speaker in speakers:
                    _answered(policy, config, speaker, line, turn)
                turn += 1
            elif not gold or speakers[0].last is None:
                first = "" if speakers[0].last else "ask something first, then "
                say(f"{first}type {GOLD} and the right answer, e.g. {GOLD} 42")
            else:
                scorer = scorer or held.enter_context(build.scoring_of(config))
                for speaker in speakers:
                    if speaker.last is not None:
                        _score(scorer, config, speaker.name, speaker.last, gold.strip())


def _ask() -> str:
    """A line from the person; nothing more is the end of the conversation."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _answered(policy: "TransformersPolicy", config: Config, speaker: Speaker, question: str, turn: int) -> None:
    """One question and its answer. Ctrl-C ends the answer; what cannot be answered is said. Then both are forgotten."""
    try:
        _answer(policy, config, speaker, question, turn)
    except KeyboardInterrupt:
        print(" (interrupted)")
    except LiteError as error:
        say(f"not answered: {error}")
    except (RuntimeError, MemoryError) as error:
        if not oom.ran_out(error):
            raise
        say(oom.advice("this answer does", "rollout.max_new_tokens"))
        oom.free()


def _answer(policy: "TransformersPolicy", config: Config, speaker: Speaker, question: str, turn: int) -> None:
    conversation = [*speaker.messages, {"role": "user", "content": question}]
    sampling = Sampling(
        1, config.rollout.max_new_tokens, temperature=config.rollout.temperature,
        key=(config.train.seed, CHATTING, turn), **config.rollout.decoding(),
    )  # fmt: skip
    if speaker.name:
        print(f"{speaker.name}: ", end="")
    asked = list(conversation)
    with policy.reference() if speaker.base else nullcontext():
        prompt = _encoded(policy, config, asked)
        answer = spoken(policy, prompt, sampling, lambda text: print(plain(text), end="", flush=True))
    print("" if answer.stopped else " (truncated)")
    speaker.messages = [*conversation, {"role": "assistant", "content": answer.text}]
    speaker.last = Group(Example(asked, {}, "chat"), prompt, (answer,))


def _encoded(policy: "TransformersPolicy", config: Config, asked: list[Message]) -> Prompt:
    """The conversation as the model reads it, without its oldest turns where it is longer than the context."""
    prompt, limit = policy.encode(asked), policy.context()
    first = next((i for i, message in enumerate(asked) if message["role"] != "system"), 0)
    while limit is not None and len(prompt.ids) + config.rollout.max_new_tokens > limit and len(asked) > first + 2:
        del asked[first : first + 2]  # a question and its answer
        prompt = policy.encode(asked)
    return prompt


def spoken(policy: "TransformersPolicy", prompt: Prompt, sampling: Sampling, tell: Callable[[str], None]) -> Completion:
    """Draw one answer; `tell` gets its text piece by piece, each as soon as nothing that follows can change it."""
    shown = ""

    def grown(answer: Answer) -> None:
        nonlocal shown
        text = policy.decode(answer.ids).rstrip(INCOMPLETE)
        if text.startswith(shown) and text != shown:  # else wait: a decoder may think again about a piece of a word
            tell(text[len(shown) :])
            shown = text

    [(_, _, answer)] = policy.sample([prompt], sampling, [[0]], grown)
    if not answer.text.startswith(shown):
        tell("\n")
        shown = ""
    tell(answer.text[len(shown) :])
    return answer


def _score(scorer: Scorer, config: Config, name: str, last: Group, gold: str) -> None:
    """Print the reward of the last answer against a gold one, or why it cannot be scored."""
    columns = {column: gold for column in ("answer", config.data.answer) if column}  # a reward may ask for either
    example = Example(last.example.prompt, columns, "chat")
    try:
        [scored] = scorer.score([Group(example, last.prompt, last.completions)])
    except LiteError as error:
        say(f"not scored: {error}")
        return
    parts = {function: values[0] for function, values in scored.parts.items()}
    verdict = "solved" if next(iter(parts.values())) >= config.rewards.solved_at else "not solved"
    listed = ", ".join(f"{function} {value:g}" for function, value in parts.items())
    print(f"{name + ': ' if name else ''}reward {scored.rewards[0]:g} ({listed}): {verdict}")
