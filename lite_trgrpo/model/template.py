"""Prompts as the model reads them, and the tokens that end an answer."""

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

from lite_trgrpo.errors import ModelError
from lite_trgrpo.records import Message, Prompt

LONGEST = 1_000_000  # characters of a chat template, and of what it adds to a prompt
NO_TEMPLATE = (
    "the tokenizer has no chat template, so this is a base model: declare how a prompt is written, "
    "e.g. --set 'model.prompt_format=\"Question: {prompt}\\nAnswer:\"'"
)


class Template:
    """A tokenizer with its chat template, or a declared format for bases that have none."""

    def __init__(self, tokenizer: Any, prompt_format: str | None, options: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.format = prompt_format
        self.options = options
        if prompt_format is None and tokenizer.chat_template is None:
            raise ModelError(NO_TEMPLATE)
        if len(tokenizer.chat_template or "") > LONGEST:
            raise ModelError(f"the chat template has more than {LONGEST:,} characters: its file is damaged")
        if prompt_format is not None and "{prompt}" not in prompt_format:
            raise ModelError(f"model.prompt_format {prompt_format!r} does not contain {{prompt}}")

    def encode(self, prompt: str | list[Message]) -> Prompt:
        """Special tokens come from the template alone; a declared format gets those that the tokenizer puts before it
        (one BOS), but not those after it: an end token there would tell the model that all is said.
        """
        if self.format is not None:
            text = self._formatted(prompt)
            ids, bare = (self.tokenizer(text, add_special_tokens=add).input_ids for add in (True, False))
            starts = (i for i in range(len(ids) - len(bare) + 1) if ids[i : i + len(bare)] == bare)
            ids = ids[: next(starts, len(ids)) + len(bare)]
            return Prompt(tuple(ids), self.tokenizer.decode(ids))
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = self._render(messages, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return Prompt(tuple(ids), self.tokenizer.decode(ids), _opened(text))

    def decode(self, ids: Sequence[int], ends: Collection[int]) -> str:
        """The text of an answer without end, padding and turn tokens. Others stay: `<think>` may be a special one."""
        return self.tokenizer.decode([i for i in ids if i not in ends and i not in self._silent])

    @cached_property
    def _silent(self) -> set[int]:
        """Begin, end and padding, and the special tokens that mark turns in the chat template, but no pairs of tags."""
        special = {i: str(token) for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        tags = {text.replace("</", "<", 1) for text in special.values() if text.startswith("</")}
        try:
            rendered = self._render([{"role": "user", "content": "q"}], add_generation_prompt=True)
        except ModelError:  # a base without a chat template
            rendered = ""
        written = set(self.tokenizer(rendered, add_special_tokens=False).input_ids)
        turns = {i for i, text in special.items() if i in written and text.replace("</", "<", 1) not in tags}
        return turns | {self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}

    def _formatted(self, prompt: str | list[Message]) -> str:
        assert self.format is not None
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        system = "\n".join(m["content"] for m in prompt if m["role"] == "system")
        if system and "{system}" not in self.format:
            raise ModelError(f"a prompt has a system message, but model.prompt_format {self.format!r} no {{system}}")
        rest = "\n".join(m["content"] for m in prompt if m["role"] != "system")
        # replace, not str.format: a prompt may contain braces
        return self.format.replace("{system}", system).replace("{prompt}", rest)

    def _render(self, messages: list[Message], **options: Any) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, **(self.options | options))
        except Exception as error:  # a template is a program of the model's author and may raise anything
            roles = [m["role"] for m in messages]
            raise ModelError(
                f"the chat template refuses messages with roles {roles}: {error}. Some models know no system role: "
                "put the instruction into the prompt and unset data.system"
            ) from None
        if len(text) > LONGEST + sum(len(m["content"]) for m in messages):
            raise ModelError(f"the chat template adds more than {LONGEST:,} characters to a prompt: it is damaged")
        return text

    def end_ids(self, generation_config: Any) -> frozenset[int]:
        """Every token that ends an answer: of the tokenizer, of the generation config, and of the template."""
        ids = {self.tokenizer.eos_token_id}
        declared = generation_config.eos_token_id if generation_config is not None else None
        ids.update(declared if isinstance(declared, list) else [declared])
        if self.format is None:
            ids.add(self._turn_end())
        ids.discard(None)
        if not ids:
            raise ModelError("the model has no end token: tokenizer, generation config and template name none")
        return frozenset(ids)

    def _turn_end(self) -> int | None:
        """The added (special) token that the template writes right after an assistant's answer, if any."""
        marker = "zzANSWERzz"
        conversation = [{"role": "user", "content": "q"}, {"role": "assistant", "content": marker}]
        tail = self._render(conversation, add_generation_prompt=False).rpartition(marker)[2]
        ids = self.tokenizer(tail.lstrip(), add_special_tokens=False).input_ids
        return ids[0] if ids and ids[0] in self.tokenizer.added_tokens_decoder else None


def _opened(text: str) -> str:
    """`<think>` and the white space after it, where the rendered prompt ends by opening it."""
    if text.rstrip().endswith("<think>"):
        return text[text.rindex("<think>") :]
    return ""
