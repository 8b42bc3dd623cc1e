"""The live panel: it fits the terminal whatever the run does, says what matters, and model text stays text."""

import inspect
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from lite_trgrpo.cli import app
from lite_trgrpo.config.schema import Guards
from lite_trgrpo.records import Completion, Example, Group, Prompt
from lite_trgrpo.terminal.drawing import bar, curve, duration, fold
from lite_trgrpo.terminal.panel import Panel, contrast
from lite_trgrpo.training import guards

GB = 2**30
CLOCK = {
    "rollout_s": 2.0, "reward_s": 0.0, "update_s": 1.0, "tokens_per_s": 145.0,
    "rss_mib": 1024.0, "rss_peak_mib": 2048.0,
}  # fmt: skip


def line(step, **other):
    """One of metrics.jsonl."""
    return {
        "step": step, "reward_mean": step / 100, "solved": 0.5, "groups_with_signal": 0.25, "truncated": 0.125,
        "length_mean": 11.0, "entropy_sampled": 0.5, "grad_norm": 0.25, "weight_mean": 1.25, "guards": {},
        "clock": CLOCK,
        **other,
    }  # fmt: skip


def scored(step, value=0.5, **other):
    """One of eval.jsonl."""
    estimate = {"value": value, "low": value - 0.1, "high": value + 0.1}
    return {"step": step, "pass@1": estimate, "clock": {"eval_s": 30.0}, "rows": [], **other}


def group(*answers, rewards, question="What is 1 + 1?", gold="2"):
    completions = [Completion((1, 2), (True,) * 2, (0.0,) * 2, text, True) for text in answers]
    return Group(Example(question, {"answer": gold}, "here:1"), Prompt((1,), ""), completions, rewards)


PAIR = [group("it is 2", "it is 3", rewards=(1.0, 0.0))]
HOSTILE = "\x1b[2J\x1b]0;owned\x07 [red]markup[/red] \u202egnp.exe \u2066\x9b31m\r\n\t\x00" * 50
EVERY_GUARD = dict.fromkeys(guards.NAMES, "critical")


def panel(history=(), evaluations=(), groups=(), steps=40, **other):
    found = {"name": "demo", "eval_every": 0, "cap": 16, "limit": 4 * GB, "doing": "updating", **other}
    return Panel(steps=steps, history=list(history), evaluations=list(evaluations), groups=groups, **found)


CASES = {
    "nothing yet": panel(),
    "before the first step": panel(evaluations=[scored(0)]),
    "in the middle": panel([line(i) for i in range(1, 20)], [scored(0), scored(10)], PAIR),
    "no evaluation": panel([line(1)], groups=PAIR),
    "numbers that are none": panel(
        [line(i, reward_mean=None, grad_norm=None, entropy_sampled=math.nan, kl=None) for i in (1, 2)],
        groups=[group("a", "b", rewards=(math.nan, math.nan))],
    ),
    "an update without weights": panel([{k: v for k, v in line(1).items() if k != "weight_mean"}]),
    "huge numbers": panel(
        [line(10**9, length_mean=1e12, grad_norm=1e30, clock={**CLOCK, "update_s": 1e9, "tokens_per_s": 1e15})],
        [scored(0), scored(10**9, gain={"value": -1.0})], PAIR, steps=2 * 10**9, limit=1,
    ),
    "rewards that fail": panel([line(1, reward_errors=7, reward_timeouts=2)]),
    "hostile text": panel(
        [line(1)], groups=[group(HOSTILE, HOSTILE, rewards=(1.0, 0.0), question=HOSTILE, gold=HOSTILE)],
        name=HOSTILE, cap=4096, said=(0, HOSTILE),
    ),
    "wide characters": panel(
        [line(1)], groups=[group("答えは二です。" * 900, "🙂" * 900, rewards=(1.0, 0.0), question="一足す一は" * 90)],
        name="実験" * 50, cap=4096,
    ),
    "an endless word": panel([line(1)], groups=[group("x" * 100_000, "", rewards=(1.0, 0.0))], cap=4096),
    "every guard critical": panel([line(1, guards=EVERY_GUARD)], groups=PAIR, said=(0, "lower the rate " * 60)),
    "five thousand steps": panel([line(i) for i in range(1, 5001)], [scored(0)], PAIR, steps=5000),
    "resumed from an older version": panel(
        [line(1, clock={k: v for k, v in {**CLOCK, "cuda_peak_mib": 8e3}.items() if "rss_peak" not in k})]
    ),
    "on a card, with KL": panel([line(1, kl=0.01, clock={**CLOCK, "cuda_mib": 7e4, "cuda_peak_mib": 8e4})]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_fits_whatever_the_run_does(case):
    for width, height in [(80, 24), (140, 40), (100, 30), (40, 12), (20, 4), (8, 1)]:
        lines = [text.plain for text in CASES[case].lines(width, height)]
        assert 0 < len(lines) <= height
        assert max(cell_len(text) for text in lines) <= width
        assert all(text.isprintable() for text in lines), "what is no plain text could move the cursor"


def shown(found, width=80, height=22):
    return "\n".join(text.plain.rstrip() for text in found.lines(width, height))


def test_answers_that_no_reward_got_through_are_counted():
    assert re.search(r"\b9\b", shown(CASES["rewards that fail"])) and not re.search(r"\b9\b", shown(panel([line(1)])))


def test_all_that_matters_is_there_at_80_by_24():
    text = shown(panel([line(i) for i in range(1, 20)], [scored(0), scored(10, gain={"value": 0.25})], PAIR))
    for expected in (
        "19/40", "updating", "0.190", "0.01", "0.500", "[0.40, 0.60]", "+0.25", " 50%", " 25%", " 12%", " 11.0",
        " 67%", " 33%", "3.0 s", "145 tokens/s", "1.00 GB", "2.00", "4.00 GB", " 1.250", " 0.250", "● held_out",
        "What is 1 + 1?", "1.00, 2 tokens", "it is 2", "0.00, 2 tokens", "it is 3",
    ):  # fmt: skip
        assert expected in text, text


def test_model_text_cannot_write_escapes_or_markup():
    text = shown(CASES["hostile text"], 140, 40)
    assert "\x1b" not in text and "\u202e" not in text and "\x9b" not in text
    assert r"\x1b[2J" in text and "[red]markup[/red]" in text and r"\u202e" in text


def test_a_guard_that_is_not_ok_comes_with_advice_and_another_sign():
    text = shown(
        panel([line(9, guards={"kl": "warning", "entropy": "critical"})], said=(8, "lower train.learning_rate"))
    )
    assert "● finite" in text and "▲ kl" in text and "■ entropy" in text
    assert "lower train.learning_rate" in text


def test_a_warning_goes_some_steps_after_the_guards_are_ok_again():
    found = panel([line(1)], said=(1, "micro-batches were too large"))
    assert "micro-batches" in shown(found)
    found.history += [line(i) for i in range(2, 20)]
    assert "micro-batches" not in shown(found)


def test_every_guard_has_its_place():
    source = inspect.getsource(guards)
    assert {*guards._limits(Guards()), *re.findall(r"""Alert\(\s*["'](\w+)["']""", source)} == set(guards.NAMES)


def test_the_two_answers_are_of_one_question_and_the_first_spread_counts():
    same = group("a", "b", rewards=(1.0, 1.0))
    spread = group("w", "x", "y", "z", rewards=(0.5, math.nan, 1.0, 0.0))
    found, pair = contrast([same, spread])
    assert found is spread and [(name, c.text, r) for name, _, c, r in pair] == [("good", "y", 1.0), ("bad", "z", 0.0)]
    found, pair = contrast([same])
    assert found is same and [c.text for _, _, c, _ in pair] == ["a"]
    assert contrast([]) is None


def test_the_time_left_counts_steps_and_evaluations():
    """Steps of 3 s, evaluations of 30 s; done is step 20 of 40, to come those after 30 and 40 (0, 10, 20 are known)."""
    history, evaluations = [line(i) for i in range(1, 21)], [scored(i) for i in (0, 10, 20)]
    found = panel(history, evaluations, eval_every=10, stepped_at=time.monotonic())
    assert found.seconds_left() == pytest.approx(20 * 3 + 2 * 30, abs=1)
    assert panel().seconds_left() is None


def test_the_panel_of_a_resumed_run_knows_what_was_before(tmp_path):
    from lite_trgrpo import session
    from lite_trgrpo.config.loading import load
    from lite_trgrpo.store.run import Run

    run = Run.vacant(tmp_path / "run")
    run.create()
    run.log_eval(scored(0))
    for step in (1, 2):
        run.log_step(line(step), [], list)
    checkpoint = run.offsets()
    run.log_step(line(3), [], list)
    run.cut_back(checkpoint)  # as a resumed run does before anything is shown
    found = session._panel(load("demo"), run, GB)
    assert [one["step"] for one in found.history] == [1, 2] and len(found.evaluations) == 1
    run.cut_back({})
    fresh = session._panel(load("demo"), run, GB)
    assert (fresh.history, fresh.evaluations) == ([], [])


# -- cells --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "width", "options", "expected"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, {}, ["▁▂▃▄▅▆▇█"]),
        ([0, 7], 4, {}, ["▁▁██"]),  # stretched
        ([0, 0, 7, 7], 2, {}, ["▁█"]),  # means
        ([0.5], 2, {"low": 0.0, "high": 1.0}, ["▄▄"]),  # 1 + 0.5 * 7 = 4.5, to even: 4
        ([3, 3], 2, {}, ["▄▄"]),  # nothing changes
        ([0, None, math.nan, 7], 4, {}, ["▁  █"]),
        ([], 3, {}, ["   "]),
        ([None], 3, {}, ["   "]),
        ([0, 1], 2, {"rows": 2}, [" █", "▁█"]),
        ([-5, 5], 2, {"low": 0.0, "high": 1.0}, ["▁█"]),  # beyond the scale
    ],
)
def test_a_curve(values, width, options, expected):
    assert curve(values, width, **options) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0:00:00"), (3723.9, "1:02:03"), (360_000, "100:00:00"), (-1, "0:00:00"), (None, "-:--:--")],
)
def test_a_duration(seconds, expected):
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("shares", "expected"),
    [([(0.5, "a"), (0.25, "b")], "aab "), ([(0.7, "a"), (0.9, "b")], "aaab"), ([(9.0, "a")], "aaaa"), ([], "    ")],
)
def test_a_bar(shares, expected):
    assert bar(shares, 4) == expected


def test_a_long_answer_shows_its_beginning_and_its_end():
    words = [f"word{i}" for i in range(1000)]
    folded = fold(" ".join(words), 30, 6)
    assert len(folded) == 6
    assert folded[0].startswith("word0 ") and "word999" in " ".join(folded) and any(f.startswith("…") for f in folded)
    assert fold("二" * 100, 20, 3) == ("二" * 10, "…" + "二" * 8, "二" * 10)
    assert fold("two\nlines", 30, 2) == ("two lines", "")


# -- in a terminal ------------------------------------------------------------------------------------------

SCRIPT = """
import sys, time
from lite_trgrpo.terminal import panel
from lite_trgrpo.terminal.screen import say
from tests.test_panel import CASES
with panel.live(CASES["in the middle"]):
    say("said above")
    time.sleep(0.2)
    print("ready", file=sys.__stdout__, flush=True)
    sys.stdin.readline()
    time.sleep(1.5)
"""


def on_a_terminal(script: str, size: tuple[int, int], resized: tuple[int, int] | None = None, **variables: str) -> str:
    """Run a script whose stderr is a terminal of this many columns and lines; -> what it wrote there."""
    pty = pytest.importorskip("pty", reason="needs a pseudo-terminal")
    import fcntl
    import struct
    import termios

    def set_size(columns, rows):
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    master, slave = pty.openpty()
    set_size(*size)
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": str(Path(__file__).parent.parent), **variables}
    command = [sys.executable, "-c", script]
    written: list[bytes] = []
    reader = threading.Thread(target=_read, args=(master, written))
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=slave, env=environment, text=True
    ) as process:
        reader.start()  # a terminal that nobody reads takes some thousand characters, then its writer waits
        assert process.stdout.readline() == "ready\n"
        if resized:
            set_size(*resized)
        process.communicate("\n", timeout=60)
    os.close(slave)
    reader.join()
    os.close(master)
    return b"".join(written).decode()


def _read(descriptor: int, into: list[bytes]) -> None:
    with suppress(OSError):  # the other end is closed and everything was read
        while part := os.read(descriptor, 65536):
            into.append(part)


def drawn_lines(written: str) -> list[str]:
    """The lines after the last clearing of the screen, without escapes."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.split("\x1b[2J")[-1]))


def test_a_terminal_of_another_size_is_drawn_anew():
    written = on_a_terminal(SCRIPT, (140, 40), (60, 20))
    assert "said above" in written and written.count("\x1b[2J") == 1
    assert max(map(cell_len, drawn_lines(written.split("\x1b[2J")[0]))) == 140
    assert max(map(cell_len, drawn_lines(written))) == 60
    assert any("19/40" in one for one in drawn_lines(written))


@pytest.mark.parametrize(("variables", "colours"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_no_color_is_respected(variables, colours):
    written = on_a_terminal(SCRIPT, (80, 24), **variables)
    assert "● finite" in re.sub(r"\x1b\[[0-9;]*m", "", written)
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-7]m", written)) is colours


POSSIBLE = """
import sys
from lite_trgrpo.terminal import panel
print('ready')
print(panel.possible(), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("variables", "expected"), [({}, "True"), ({"TERM": "dumb"}, "False"), ({"PYTHONIOENCODING": "ascii"}, "False")]
)
def test_where_a_panel_can_be_drawn(variables, expected):
    assert on_a_terminal(POSSIBLE, (80, 24), **variables).strip() == expected


# -- without one --------------------------------------------------------------------------------------------


def trained(tiny_config, folder, *flags):
    result = CliRunner().invoke(app, ["train", "-c", str(tiny_config), "-o", str(folder), *flags])
    assert result.exit_code == 0, result.stderr
    return result


def test_json_lines_are_all_that_goes_to_stdout(tiny_config, tmp_path):
    result = trained(tiny_config, tmp_path / "run", "--json")
    found = [json.loads(one) for one in result.stdout.splitlines()]
    assert [(one.pop("kind"), one["step"]) for one in found] == [
        ("evaluation", 0), ("step", 1), ("step", 2), ("evaluation", 2),
    ]  # fmt: skip
    logs = [
        [json.loads(one) for one in (tmp_path / "run" / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "eval.jsonl")
    ]
    assert found[1:3] == logs[0]
    assert [found[0], found[3]] == [{k: v for k, v in one.items() if k != "rows"} for one in logs[1]]
    assert str(tmp_path / "run") in result.stderr and "1/2" not in result.stderr


def test_plain_is_a_line_a_step_on_stderr_and_the_comparison_on_stdout(tiny_config, tmp_path):
    result = trained(tiny_config, tmp_path / "run", "--plain")
    assert re.findall(r"\b[12]/2\b", result.stderr) == ["1/2", "2/2"]
    assert "pass@1" in result.stdout
