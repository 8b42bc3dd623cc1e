"""Reward functions that hang, grow, die, raise or talk too much, and answers written to break a verifier."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from lite_trgrpo.cli import app
from lite_trgrpo.errors import MissingPackageError, RewardError
from lite_trgrpo.records import Group
from lite_trgrpo.rewards import BUILTINS, Sandbox, failure_counts, load, score, serialization
from lite_trgrpo.rewards.process import environment
from tests.test_rewards import group

posix = pytest.mark.skipif(sys.platform == "win32", reason="forks, sessions and signals")

# What each of these functions does stands in the answer
OWN = """
import os, signal, subprocess, sys, threading, time

def accidents(completions, **columns):
    return [accident(text) or float(len(text)) for text in completions]

def accident(text):
    if text == "hang":
        time.sleep(1000)
    if text == "compute":
        9 ** 9 ** 9  # one operation in C, which lets no other thread run
    if text == "die":
        os._exit(3)
    if text == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "raise":
        return {}["\\x1b[31mred"]
    if text == "leave":
        sys.exit(5)
    if text == "ask":
        return input()
    if text == "grow":
        kept = []
        while True:
            kept.append(bytearray(2**24))
    if text == "print":
        print("x" * 100_000_000)
        print("x" * 1000, file=sys.stderr)
        os.write(1, b'{"values": [7]}\\n')
        return 1.0
    if text == "child":
        return float(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]).pid)
    if text == "session":
        words = [sys.executable, "-c", "import time; time.sleep(1000)"]
        return float(subprocess.Popen(words, start_new_session=True).pid)
    if text == "daemon":
        script = "import os, time\\nif os.fork(): os._exit(0)\\nos.setsid(); print(os.getpid(), flush=True)\\n"
        words = [sys.executable, "-c", script + "os.close(1); time.sleep(1000)"]
        return float(subprocess.run(words, stdout=subprocess.PIPE).stdout)
    if text == "fork":
        return 2.0 if os.fork() == 0 else (time.sleep(0.3), 1.0)[1]
    if text == "forge":
        for descriptor in range(3, 12):
            try:
                os.write(descriptor, b'{"values": [7]}\\n')
            except OSError:
                pass
        time.sleep(0.3)
    if text == "thread":
        threading.Thread(target=time.sleep, args=(1000,)).start()

def together(completions, **columns):
    return [accident(text) or float(len(completions)) for text in completions]

def slow(completions, **columns):
    with open(os.path.join(os.path.dirname(__file__), "calls"), "a") as log:
        log.write(f"{len(completions)} ")
    time.sleep(0.3 * len(completions))
    return [float(len(completions))] * len(completions)

def pairs_only(completions, **columns):
    return [1 / (len(set(completions)) - 1) if len(completions) > 1 else 0.0 for _ in completions]

def returns(completions, what, **columns):
    return eval(what[0])

def sees(completions, **columns):
    return [float(os.environ.get(text) is not None) for text in completions]

def escapes(completions, **columns):
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [sum((i + 1) * ord(letter) for i, letter in enumerate(text)) for text in texts]
"""
SECONDS = 1.0  # and yet no harmless call may take that long on a busy machine
GB = 2**30


@pytest.fixture
def own(tmp_path: Path) -> str:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return str(file)


def sandbox(name: str, **changes: Any) -> Sandbox:
    return Sandbox({name: 1.0}, {}, **({"seconds": SECONDS, "memory": GB // 4} | changes))


# -- what goes well ----------------------------------------------------------------------------------------


def test_in_the_sandbox_as_outside(own: str) -> None:
    functions = {"math": 1.0, "number": 0.5, "exact": -1.0, f"{own}:accidents": 0.1, f"{own}:escapes": 0.0}
    chat = [{"role": "user", "content": "6 * 7?"}]
    texts = ["42", r"\boxed{42}", "41", "\ud83d\ude00\udfff", "a\u202eb\x1b[31m\x00\r\n\u2028", ""]
    groups = [
        group(texts, chat, prefix="<think>", answer="42", row=1),
        group([], answer="42", row=2),
        group(["7"], answer=None, level=(1, 2), when=date(2026, 1, 2), row=3),
    ]
    with Sandbox(functions, {}, truncated_max_zero=True, seconds=20, memory=GB) as scorer:
        assert repr(scorer.score(groups)) == repr(
            score(groups, load(functions, {}, truncated_max_zero=True))
        )  # repr: NaN is NaN


def test_a_group_is_scored_while_the_caller_goes_on(own: str) -> None:
    with sandbox(f"{own}:slow", seconds=5) as scorer:
        started = time.monotonic()
        tickets = [scorer.start(group([text] * 2, row=row)) for row, text in enumerate("ab")]
        assert time.monotonic() - started < 0.6 and not tickets[0].done()
        assert [ticket.result().example.origin for ticket in tickets] == ["data.jsonl:0", "data.jsonl:1"]


@pytest.mark.parametrize("value", [
    None, True, 0, -(2**70), 0.1, math.inf, "", "\ud83d", "\ude00\ud83d\ude00", "\x00\n\r\u2028\x85\u202e\x1b", [], {},
    [1, [2, {"a": (3,)}]], (), ((0, 0), (1,)), {1: "a", (2, 3): None, "": 0}, {"\0": "tuple", "value": []},
    Decimal("1.10"), b"\x00\xff", date(2026, 11, 22), datetime(2026, 11, 22, 1, 2, 3, 4),
])  # fmt: skip
def test_columns_cross_the_pipe_unchanged(value: Any) -> None:
    line = serialization.dumps(serialization.pack(value))
    assert line.count(b"\n") == 1
    back = serialization.unpack(serialization.loads(line))
    assert back == value and repr(back) == repr(value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the package leaves files open
def test_rows_of_every_reasoning_gym_task_cross_the_pipe_unchanged() -> None:
    """Through plain JSON the gold answer of arc_agi scored 0.05: its scorer compares with a tuple of tuples."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    for task in sorted(set(DATASETS) - {"composite"}):
        row = reasoning_gym.create_dataset(task, size=1, seed=1)[0]
        assert serialization.unpack(serialization.loads(serialization.dumps(serialization.pack(row)))) == row, task


def test_a_column_that_cannot_be_sent_is_named(own: str) -> None:
    with sandbox(f"{own}:slow") as scorer, pytest.raises(RewardError, match=r"data\.jsonl:1.*complex.*\(1\+2j\)"):
        scorer.score([group(["a"], odd=1 + 2j)])


# -- what is wrong before the run --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("nubmer", {}), ("own.py:lenght", {}), ("own.py:slow", {"bonus": 1})])
def test_what_cannot_be_loaded_is_said_as_outside(name: str, options: dict, own: str, monkeypatch) -> None:
    monkeypatch.chdir(Path(own).parent)
    with pytest.raises(RewardError) as outside:
        load({name: 1.0}, {name: options})
    with pytest.raises(RewardError) as inside:
        Sandbox({name: 1.0}, {name: options}, seconds=1, memory=GB)
    assert str(inside.value) == str(outside.value)


def test_a_file_that_ends_the_process_when_imported(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("import os; os._exit(4)")
    with pytest.raises(RewardError, match=r"\b4\b.*bad\.py:f"):
        sandbox(f"{file}:f")


def test_a_missing_package_keeps_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reasoning_gym.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)  # the worker looks where this process does
    with pytest.raises(MissingPackageError, match=r"pip install 'lite-trgrpo\[data\]'"):
        sandbox("reasoning-gym")


# -- accidents ---------------------------------------------------------------------------------------------


def outcome(name: str, texts: list[str], **changes: Any) -> tuple[Group, list[str]]:
    """-> a scored group of these answers, and what a person was told."""
    told: list[str] = []
    with sandbox(name, tell=told.append, **changes) as scorer:
        (scored,) = scorer.score([group(texts)])
    return scored, told


ACCIDENTS = [
    ("hang", "timeout", "1 s"),
    ("die", "crash", "exit code 3"),
    ("killed", "crash", "SIGKILL"),
    ("grow", "crash", "rewards.memory"),
    ("raise", "error", "KeyError: '\\x1b[31mred' (own.py line "),
    ("leave", "error", "SystemExit: 5 (own.py line "),
    ("ask", "error", "EOFError"),
]


def test_accidents_are_found_counted_and_told_once(own: str) -> None:
    """Each takes its own answer out of its group, and no other one."""
    told: list[str] = []
    with sandbox(f"{own}:accidents", tell=told.append) as scorer:
        scored = scorer.score([group(["fine", text, "good"], row=i) for i, (text, *_) in enumerate(ACCIDENTS)])
    for found, (_, kind, _) in zip(scored, ACCIDENTS, strict=True):
        assert found.rewards[0] == found.rewards[2] == 4.0 and math.isnan(found.rewards[1])
        assert found.failures == {f"{own}:accidents": {1: kind}}
    assert failure_counts(scored) == {"reward_timeouts": 1, "reward_crashes": 3, "reward_errors": 3}
    for line, (text, _, detail) in zip(told, [ACCIDENTS[0], ACCIDENTS[1], ACCIDENTS[4]], strict=True):
        assert detail in line and f"'{text}'" in line and "\x1b" not in line
        assert "rewards.on_failure" in line


@pytest.mark.parametrize(("text", "kind", "detail"), ACCIDENTS[1:5:3])
def test_the_run_fails_if_that_is_the_policy(own: str, text: str, kind: str, detail: str) -> None:
    with pytest.raises(RewardError) as caught:
        outcome(f"{own}:accidents", ["fine", text], on_failure="fail")
    message = str(caught.value)
    assert all(part in message for part in (f"'{own}:accidents'", detail, "data.jsonl:1", f"'{text}'"))
    assert "rewards.on_failure" in message and "\n" not in message


def test_a_stated_value_stands_where_there_is_none(own: str) -> None:
    scored, told = outcome(f"{own}:accidents", ["fine", "raise"], on_failure=-2.0)
    assert scored.rewards == (4.0, -2.0)
    assert scored.failures == {f"{own}:accidents": {1: "error"}} and "-2" in told[0]


def test_a_skipped_answer_has_no_total_from_the_other_functions(own: str) -> None:
    """The sum of the others would be a silent 0 for the one that failed; a function of weight 0 is only shown."""
    for weight, total in ((1.0, math.nan), (0.0, 0.5)):
        with Sandbox({"exact": 0.5, f"{own}:accidents": weight}, {}, seconds=SECONDS, memory=GB) as scorer:
            (scored,) = scorer.score([group(["raise"], answer="raise")])
        assert scored.rewards == pytest.approx((total,), nan_ok=True)
        assert scored.parts["exact"] == (1.0,) and failure_counts([scored])["reward_errors"] == 1


def test_values_come_from_the_whole_group_or_what_is_left_of_it(own: str) -> None:
    """A function may compare answers, so calls with one answer only find the guilty."""
    scored, _ = outcome(f"{own}:together", ["a", "raise", "b", "c"])
    assert scored.rewards == pytest.approx((3.0, math.nan, 3.0, 3.0), nan_ok=True)


def test_a_group_that_fails_only_together_fails_together(own: str) -> None:
    scored, told = outcome(f"{own}:pairs_only", ["a", "a"])
    assert failure_counts([scored])["reward_errors"] == 2 and "ZeroDivisionError" in told[0]


@pytest.mark.slow
def test_a_slow_function_has_time_for_each_answer(own: str) -> None:
    """Four answers take 1.2 s of 4 * 1: that is looked into after 1 s, once, and is no time-out."""
    with sandbox(f"{own}:slow") as scorer:
        scored = scorer.score([group(["a", "b", "c", "d"])]) + scorer.score([group(["a", "b", "c", "d"])])
    assert [(found.rewards, found.failures) for found in scored] == [((4.0,) * 4, {})] * 2
    assert Path(own).with_name("calls").read_text() == "4 1 1 1 1 4 4 "


def test_prints_lead_nowhere(own: str, capfd: pytest.CaptureFixture) -> None:
    scored, told = outcome(f"{own}:accidents", ["print", "fine"], seconds=10)
    assert scored.rewards == (1.0, 4.0) and told == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        ("[1.0]", r"\b1\b.*\b2\b"),
        ("[1.0, '1.0']", r"str '1.0'.*data\.jsonl:1.*'b'"),
        ("[1.0, float('nan')]", r"nan.*data\.jsonl:1.*'b'"),
        ("[1.0, 10**400]", "int 1000"),
        ("'12'", "str '12'"),
        ("[[1.0], [1.0]]", "list"),
    ],
)
def test_what_is_no_reward_ends_the_run_whatever_the_policy(own: str, returned: str, named: str) -> None:
    with sandbox(f"{own}:returns") as scorer, pytest.raises(RewardError, match=rf"'{own}:returns'.*{named}"):
        scorer.score([group(["a", "b"], what=returned)])


# -- nothing let in, nothing left --------------------------------------------------------------------------


SECRET = {
    "HF_TOKEN": "hf_x", "HUGGING_FACE_HUB_TOKEN": "x", "WANDB_API_KEY": "x", "WANDB_PROJECT": "x", "my_secret": "x",
    "AWS_PROFILE": "x", "OPENAI_KEY": "x", "GITHUB_PAT": "x", "PGPASSWORD": "x", "SSH_AUTH_SOCK": "x", "APIKEYS": "x",
    "GOOGLE_APPLICATION_CREDENTIALS": "x", "HTTPS_PROXY": "http://me:word@proxy:80", "KEY": "x", "MY_PWD": "x",
    "SSHPASS": "x", "JWT": "x", "BEARER": "x", "COOKIES": "x", "PRIVATEKEY": "x", "HOOK": "https://hooks/T0/x",
    "SENTRY_DSN": "https://token@host/1", "PLANTED": "x",
}  # fmt: skip
PASSED = {
    "PATH": "/bin", "HOME": "/", "HF_HOME": "x", "TOKENIZERS_PARALLELISM": "false", "LANG": "C", "LC_ALL": "C",
    "OMP_NUM_THREADS": "1", "Path": "x", "SystemRoot": "x",
}  # fmt: skip


def test_the_environment_is_what_is_needed_and_what_the_person_names() -> None:
    fixed = {"CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}
    assert environment(SECRET | PASSED) == PASSED | fixed
    assert environment(SECRET | PASSED, ["JWT"]) == PASSED | fixed | {"JWT": "x"}


def test_a_reward_function_sees_no_credential_and_no_card(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for name, value in (SECRET | {"JUDGE_URL": "seen"}).items():
        monkeypatch.setenv(name, value)
    with Sandbox({f"{own}:sees": 1.0}, {}, seconds=5, memory=GB, pass_env=["JUDGE_URL"]) as scorer:
        (scored,) = scorer.score([group([*SECRET, "JUDGE_URL"])])
    assert scored.rewards == (0.0,) * len(SECRET) + (1.0,)
    assert environment(os.environ)["CUDA_VISIBLE_DEVICES"] == ""


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until(condition: Any, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("text", ["fork", "forge"])
def test_a_forked_child_or_a_forged_reply_shifts_no_reward_to_another_group(own: str, text: str) -> None:
    """A child that comes back from the function, or a line that a function writes into the pipe itself."""
    scored, _ = outcome(f"{own}:accidents", [text], seconds=20)
    assert scored.rewards == ((1.0,) if text == "fork" else pytest.approx((math.nan,), nan_ok=True))
    with sandbox(f"{own}:accidents", seconds=20) as scorer:
        groups = scorer.score([group(["ab"]), group([text]), group(["abc"]), group(["abcd"])])
    assert [groups[i].rewards for i in (0, 2, 3)] == [(2.0,), (3.0,), (4.0,)]


@posix
def test_a_file_that_writes_into_the_pipe_while_it_is_loaded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(
        "import os\nfor descriptor in range(3, 12):\n    try:\n        os.write(descriptor, b'{}\\n')\n"
        "    except OSError:\n        pass\ndef reward(completions, **_):\n    return [1.0 for _ in completions]\n"
    )
    with pytest.raises(RewardError, match=r"loud\.py"):
        Sandbox({f"{tmp_path / 'loud.py'}:reward": 1.0}, {}, seconds=20, memory=GB)


@pytest.mark.parametrize("text", ["child", pytest.param("session", marks=posix), pytest.param("daemon", marks=posix)])
def test_what_a_function_started_ends_with_its_worker(own: str, text: str) -> None:
    """Also in a session of its own, and after the process that started it has gone."""
    with sandbox(f"{own}:accidents", seconds=20) as scorer:
        (scored,) = scorer.score([group([text, "thread"])])
        assert alive(int(scored.rewards[0]))
    assert wait_until(lambda: not alive(int(scored.rewards[0])))


def test_closing_does_not_wait_for_a_hang(own: str) -> None:
    scorer = sandbox(f"{own}:accidents", seconds=1000)
    waiting = [scorer.start(group(["hang"])), scorer.start(group(["fine"]))]
    worker = psutil.Process(scorer._process._process.pid)
    started = time.monotonic()
    scorer.close()
    assert time.monotonic() - started < 5 and not worker.is_running() and waiting[1].cancelled()


@posix
@pytest.mark.parametrize("text", ["fine", "hang", "session", pytest.param("compute", marks=pytest.mark.slow)])
def test_the_worker_dies_with_its_parent(own: str, text: str) -> None:
    """Also when the parent had no time to say so, and when the function lets no thread run (until its deadline)."""
    script = (
        "import sys; from lite_trgrpo.rewards import Sandbox; from tests.test_rewards import group\n"
        f"scorer = Sandbox({{'{own}:accidents': 1.0}}, {{}}, seconds=2, memory={GB})\n"
        f"ticket = scorer.start(group(['{text}']))\n"
        f"started = {'ticket.result().rewards[0]' if text in ('fine', 'session') else 0}\n"
        "print(scorer._process._process.pid, int(started), flush=True); input()"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout and parent.stdin
    with parent, parent.stdin, parent.stdout:
        worker, started = map(int, parent.stdout.readline().split())
        assert alive(worker) and (text != "session" or alive(started))
        os.kill(parent.pid, signal.SIGKILL)
    assert wait_until(lambda: not alive(worker) and not (text == "session" and alive(started)))


def test_ctrl_c_in_the_terminal_does_not_reach_the_worker(own: str) -> None:
    with sandbox(f"{own}:accidents") as scorer:
        assert os.getpgid(scorer._process._process.pid) != os.getpgid(0)


@pytest.mark.skipif(sys.platform != "linux", reason="no other system keeps a process to it")
def test_it_says_whether_memory_is_limited(own: str) -> None:
    with sandbox(f"{own}:accidents") as scorer:
        assert scorer.memory_limited


# -- torture -----------------------------------------------------------------------------------------------

# A verifier that works them out does not come to an end
TOWERS = ["9**9**9**9", r"\boxed{9^{9^{9^9}}}", r"\boxed{14!!!}", r"\boxed" + "{" * 40 + "1" + "}" * 40]


def hostile(count: int) -> list[str]:
    """Answers written to break a verifier; none of them is a tower."""
    draw = random.Random(0)
    kinds: list[Callable[[int], str]] = [
        lambda n: r"\boxed" + "{" * (n // 20 + 2) + "1" + "}" * (n // 20),  # closed ones are a tower
        lambda n: "$" + "(" * (n // 20 + 2) + "1" + ")" * (n // 20) + "$",
        lambda n: r"\frac{" * (n // 20) + "1",
        lambda n: r"\frac{1}{ \sqrt[ \left( \right] \over ^ _ }{ \begin{matrix} 1 & 2"[: n % 60],
        lambda n: r"\boxed{" + "7" * n + "}",
        lambda n: "9e" + "9" * (n % 6),
        lambda n: "".join(chr(draw.randrange(32)) for _ in range(n)) + "41",
        lambda n: "\x1b[2J\x1b]0;title\x07" * n + "41",
        lambda n: "\u202e\u2066\u200f" * n + "24",
        lambda n: "".join(chr(draw.randrange(0xD800, 0xE000)) for _ in range(n)),
        lambda n: "".join(chr(draw.randrange(1, 0x110000)) for _ in range(n)),
        lambda n: "<answer>" * n + "41" + "</answer>" * (n % 3),
        lambda n: "<think>" * (n % 3) + "</think><answer>41</answer>",
        lambda n: "a-" * n + " is a fool",
        lambda n: "__import__('os').abort()",
        lambda n: "\0" * n,
    ]
    return [kinds[i % len(kinds)](draw.randint(1, 2000)) for i in range(count)]


@pytest.mark.slow
@pytest.mark.night
@pytest.mark.parametrize("name", BUILTINS)
def test_a_thousand_hostile_answers(name: str) -> None:
    """No value is lost but those of the towers, which only `math` works out; gold still scores full marks."""
    gold = "Zoe is a fool" if name == "knights-and-knaves" else "42"
    full = "<think></think><answer>Zoe is a fool</answer>" if name == "knights-and-knaves" else gold
    texts = [*hostile(1000 - 5 - len(TOWERS)), "8" * 10**6, "1," * 10**6, " " * 10**6, "-" * 10**6, "\udc00", *TOWERS]
    random.Random(1).shuffle(texts)
    texts = [text for start in range(0, 1000, 7) for text in (*texts[start : start + 7], full)]
    groups = [
        group(texts[start : start + 8], row=start, answer=gold, metadata={"source_dataset": "chain_sum"})
        for start in range(0, len(texts), 8)
    ]
    options = {"overlong": {"max_tokens": 100, "buffer": 50}}
    with Sandbox(
        {name: 1.0}, {key: value for key, value in options.items() if key == name}, seconds=5, memory=GB
    ) as scorer:
        scored = scorer.score(groups)
    answers = [(c.text, value) for found in scored for c, value in zip(found.completions, found.rewards, strict=True)]
    lost = [text for text, value in answers if math.isnan(value)]
    assert sorted(lost) == (sorted(TOWERS) if name == "math" else [])
    assert failure_counts(scored) == {"reward_timeouts": len(lost), "reward_crashes": 0, "reward_errors": 0}
    if name not in ("format", "overlong"):
        assert {value for text, value in answers if text == full} == {3.0 if name == "knights-and-knaves" else 1.0}
        assert all(value < 1 for text, value in answers if text != full and not math.isnan(value))


# -- a whole run -------------------------------------------------------------------------------------------


def test_a_run_survives_and_tells(tiny_config: Path, tmp_path: Path) -> None:
    """The reward raises at one answer in three."""
    (tmp_path / "reward.py").write_text(
        "def length(completion_ids, **_):\n    return [1 // (sum(ids) % 3) for ids in completion_ids]\n"
    )
    arguments = ["train", "-c", tiny_config, "-o", tmp_path / "r", "-s", "eval.samples=1"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.stderr
    told = " ".join(result.stderr.split())
    assert told.count("reward.py:length") == 1 and "ZeroDivisionError" in told and "reward.py line 2" in told
    metrics, groups = (
        [json.loads(line) for line in (tmp_path / "r" / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "rollouts.jsonl")
    )
    for line in metrics:
        answers = [answer for group in groups if group["step"] == line["step"] for answer in group["completions"]]
        raised = [answer for answer in answers if sum(answer["ids"]) % 3 == 0]
        assert line["reward_errors"] == line["ungradable"] == len(raised)
        assert all((a["reward"] is None) == ("failures" in a) == (a in raised) for a in answers)
    assert sum(line["reward_errors"] for line in metrics) > 0
