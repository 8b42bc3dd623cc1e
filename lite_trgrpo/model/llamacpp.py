"""A GGUF on llama-cpp-python: what will run it answers the held-out prompts. Greedy only, to check an export."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lite_trgrpo.config.schema import Model
from lite_trgrpo.errors import ExportError
from lite_trgrpo.model.policy import Sequences
from lite_trgrpo.model.template import Template
from lite_trgrpo.records import Completion, Message, Prompt, Sampling


class LlamaCppPolicy:
    """The part of `lite_trgrpo.model.policy.Policy` that scoring needs; the tokenizer is that of the merged model."""

    def __init__(self, gguf: Path, merged: Path, options: Model, context: int) -> None:
        import llama_cpp
        from transformers import AutoTokenizer, GenerationConfig

        tokenizer = AutoTokenizer.from_pretrained(merged, clean_up_tokenization_spaces=False)
        self.template = Template(tokenizer, options.prompt_format, options.template_options)
        self.end_ids = self.template.end_ids(GenerationConfig.from_pretrained(merged))
        self.llama: Any = llama_cpp.Llama(
            str(gguf), n_ctx=context, n_batch=context, logits_all=True, verbose=False,
            n_threads=torch.get_num_threads(), n_threads_batch=torch.get_num_threads(), n_gpu_layers=-1,
        )  # fmt: skip

    def encode(self, prompt: str | list[Message]) -> Prompt:
        """Raises ExportError where the GGUF's own tokenizer reads the prompt as other tokens."""
        encoded = self.template.encode(prompt)
        if self.template.format is None:
            own = self.llama.tokenize(encoded.text.encode(), add_bos=False, special=True)
            if tuple(own) != encoded.ids:
                raise ExportError(
                    f"the GGUF's tokenizer reads a prompt as {len(own)} other tokens than the model's ({own[:8]}... "
                    f"and {list(encoded.ids[:8])}...): the converter does not know it; try a newer llama.cpp"
                )
        return encoded

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, wanted: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, int, Completion]]:
        assert sampling.greedy and sampling.members == 1
        for p, prompt in enumerate(prompts):
            if wanted[p]:
                yield p, 0, self._answer(prompt, sampling)

    def logprobs(self, rows: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
        """Without gradient."""
        found = [self._scored(prompt, completion, temperature) for prompt, completion in rows]
        padded = nn.utils.rnn.pad_sequence(found, batch_first=True)
        return padded, torch.zeros_like(padded)

    def _read(self, ids: tuple[int, ...]) -> None:
        """What the ids share with those before (the system message, at least) is in the cache and is not read again."""
        before = self.llama.input_ids[: self.llama.n_tokens].tolist()
        same = next(
            (i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids))
        )
        self.llama.n_tokens = min(same, len(ids) - 1)
        self.llama.eval(ids[self.llama.n_tokens :])

    def _answer(self, prompt: Prompt, sampling: Sampling) -> Completion:
        ids: list[int] = []
        self._read(prompt.ids)
        while True:
            ids.append(int(self.llama.scores[self.llama.n_tokens - 1].argmax()))
            stopped = ids[-1] in self.end_ids
            if stopped or len(ids) == sampling.max_new_tokens:
                break
            self.llama.eval(ids[-1:])
        text = self.template.tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(tuple(ids), (True,) * len(ids), (0.0,) * len(ids), text, stopped)

    def _scored(self, prompt: tuple[int, ...], completion: tuple[int, ...], temperature: float) -> Tensor:
        self._read(prompt + completion[:-1])
        logits = torch.from_numpy(self.llama.scores[len(prompt) - 1 : self.llama.n_tokens].copy())  # [T, V]
        logprobs = torch.log_softmax(logits / temperature, dim=-1)
        return logprobs.gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)
