"""Measure the package: code lines, comments, the longest function and module, options, modules on the top level.

A code line holds at least one token that is neither a comment nor part of a docstring.

    python benchmarks/size.py            the totals
    python benchmarks/size.py --folders  also the code lines of each folder
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lite_trgrpo"
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def docstring_lines(tree: ast.AST) -> set[int]:
    """Line numbers of docstrings, and of the strings that document an attribute under it."""
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def measured(text: str) -> tuple[int, int, int]:
    """Source text -> code lines, comment lines, lines of its longest function (without the docstring)."""
    tree = ast.parse(text)
    documented = docstring_lines(tree)
    code: set[int] = set()
    comments = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments += 1
        if token.type not in SILENT:
            code.update(range(token.start[0], token.end[0] + 1))
    code -= documented
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    longest = max((len(code & set(range(f.lineno, (f.end_lineno or 0) + 1))) for f in functions), default=0)
    return len(code), comments, longest


def main() -> None:
    sys.path.insert(0, str(ROOT))
    files = sorted(PACKAGE.rglob("*.py"))
    sizes = {path: measured(path.read_text(encoding="utf-8")) for path in files}
    folders: Counter[str] = Counter()
    for path, (code, _, _) in sizes.items():
        folders[path.relative_to(PACKAGE).parts[0]] += code
    code, comments = (sum(size[i] for size in sizes.values()) for i in (0, 1))
    module = max(files, key=lambda path: len(path.read_text(encoding="utf-8").splitlines()))
    function = max(sizes, key=lambda path: sizes[path][2])
    top = [path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")]
    options = len(re.findall(r"^\| `", (ROOT / "docs" / "options.md").read_text(encoding="utf-8"), re.MULTILINE))
    print(f"code lines of lite_trgrpo/      {code:,}")
    print(f"comment lines per 100 of code   {100 * comments / code:.1f}")
    print(f"longest function (code lines)   {sizes[function][2]}  in {function.relative_to(ROOT)}")
    length = len(module.read_text(encoding="utf-8").splitlines())
    print(f"longest module (all lines)      {length}  {module.relative_to(ROOT)}")
    print(f"modules on the top level        {len(top)}  {' '.join(sorted(top))}")
    print(f"options in docs/options.md      {options}")
    print(f"lines of README.md              {len((ROOT / 'README.md').read_text(encoding='utf-8').splitlines())}")
    if "--folders" in sys.argv:
        for name, lines in folders.most_common():
            print(f"{lines:6}  {name}")


if __name__ == "__main__":
    main()
