"""The option reference is what the code says."""

import runpy
from pathlib import Path

from lite_trgrpo.config.schema import SECTIONS, Weight

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_reference_equals_the_code():
    written = "\n".join(runpy.run_path(str(DOCS / "reference.py"))["lines"]()) + "\n"
    assert (DOCS / "options.md").read_text(encoding="utf-8") == written, "python docs/reference.py > docs/options.md"


def test_it_has_every_option_and_its_default():
    text = (DOCS / "options.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == sum(len(section.model_fields) for section in SECTIONS.values()) - 1 + len(Weight.model_fields)
    assert any("`preflight`" in row and "`true`" in row for row in rows)
    assert any("`functions`" in row and "`{ exact = 1.0 }`" in row for row in rows)
