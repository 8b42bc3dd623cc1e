"""The report: what is on the page, that nothing of a completion or the network gets into it, and that it is cheap."""

import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lite_trgrpo import report
from lite_trgrpo.cli import app
from lite_trgrpo.config import loading
from lite_trgrpo.report import reading
from lite_trgrpo.report.charts import Curve, chart
from lite_trgrpo.store.run import Run
from tests import browser
from tests.test_trainer import lines, run_toy

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\x1b[31m\u202e"
ALERT = {"guards": {"truncated": "yellow"}, "truncated": 0.96, "solved": 0.0}


class Page(HTMLParser):
    """What a browser would make of it: tags, attributes, texts by the tag they stand in."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.open = ["document"]
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.raw = path.read_text(encoding="utf-8")
        self.feed(self.raw)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open += [] if tag == "meta" else [tag]
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "every element ends where it should"

    def handle_data(self, data):
        self.texts.append((self.open[-1], data))

    def under(self, tag):
        return [data for found, data in self.texts if found == tag]

    @property
    def text(self):
        return " ".join(data for tag, data in self.texts if tag != "style")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A run of the trainer's own on a toy model, scored every five steps."""
    folder = tmp_path_factory.mktemp("toy") / "toy-run"
    run_toy(folder, {"train": {"steps": 15, "checkpoint_every": 5}, "eval": {"every": 5}})
    return folder


@pytest.fixture
def run(toy, tmp_path):
    """A copy that may be changed."""
    shutil.copytree(toy, tmp_path / "toy-run")
    return Run(tmp_path / "toy-run")


def change(path: Path, mend) -> None:
    """Rewrite a log with every line as `mend` returns it."""
    path.write_text("".join(json.dumps(mend(line)) + "\n" for line in lines(path)))


# -- what is on it ------------------------------------------------------------------------------------------


def test_the_page_of_a_run_holds_its_scores_curves_answers_and_settings(run):
    page = Page(report.write(run))
    after = run.evaluations()[-1]
    assert page.under("h2") == [
        "Held-out score", "Curves", "Before and after", "Most improved", "Least improved", "Token by token", "Guards",
        "Time and memory", "Settings",
    ]  # fmt: skip
    for key in ("pass@1", "pass@2"):
        assert f"{after[key]['value']:.3f}" in page.under("b")
        assert f"{after[key]['low']:.3f}, {after[key]['high']:.3f}]" in page.text
    assert f"{after['gain']['value']:+.3f}" in page.under("b")
    figures = {value for name, value in page.attributes if name == "aria-label"}
    assert figures == {
        "Reward", "Solved", "Length", "Truncated, and with signal", "Entropy", "KL", "Gradient norm",
        "Mean token weight",
    }  # fmt: skip
    assert page.tags.count("svg") == len(figures)
    assert "train.learning_rate" in page.text and "Every guard was ok." in page.text


def test_before_and_after_stand_side_by_side_and_the_most_improved_come_first(run):
    rows = [[{"prompt": f"q{i}", "answer": str(i), "greedy": f"{when} {i}", "solved": i in solved, "samples_solved": 0}
             for i in range(12)] for when, solved in (("old", {3}), ("new", {10, 11}))]  # fmt: skip
    lines_of = iter([rows[0], rows[1], rows[1], rows[1]])
    change(run.folder / "eval.jsonl", lambda line: line | {"rows": next(lines_of)})
    page = Page(report.write(run))
    shown = [text for text in page.under("pre") if text.startswith(("old", "new", "q"))]
    first, better, worse = shown[: 3 * 5], shown[3 * 5 : 3 * 7], shown[3 * 7 : 3 * 8]
    assert first == [text for i in range(5) for text in (f"q{i}", f"old {i}", f"new {i}")]
    assert better == ["q10", "old 10", "new 10", "q11", "old 11", "new 11"]
    assert worse == ["q3", "old 3", "new 3"]
    assert "2 of 12 prompts are answered better" in page.text and "1 of 12 prompts are answered worse" in page.text


def test_an_answer_is_shown_token_by_token_with_probability_and_weight(run):
    groups = [line for line in lines(run.folder / "rollouts.jsonl") if line["step"] == 15]
    [answer] = [a for group in groups for a in group["completions"] if "pieces" in a]
    assert answer["pieces"] == [*answer["text"], *(["$"] if answer["stopped"] else [])]
    answer["logprobs"] = [-3.0, -0.5, -0.001][: len(answer["pieces"])]
    answer["pieces"] = answer["pieces"][:3]
    change(run.folder / "rollouts.jsonl", lambda line: next((g for g in groups if g["prompt"] == line["prompt"]), line)
           if line["step"] == 15 else line)  # fmt: skip
    page = Page(report.write(run))
    # by hand: p = e^-3 = 0.0498, w = clip(2 (sigmoid(9 p) - 0.25), 1, 1.4): 2 (0.6102 - 0.25) = 0.72 -> 1;
    # p = e^-0.5 = 0.6065: 2 (0.9958 - 0.25) = 1.49 -> 1.4
    titles = [value for name, value in page.attributes if name == "title"]
    assert titles[:2] == ["p 0.0498, weight 1.000", "p 0.6065, weight 1.400"]
    assert len(titles) == 2 * len(answer["pieces"])  # once shaded by probability, once by weight


def test_alerts_and_roll_backs_are_told_with_what_to_do(run):
    thrown = {"guards": {"update_kl": "critical"}, "update_kl": 9.0, "rolled_back_to": 5}
    special = {7: ALERT, 8: ALERT, 9: thrown}
    change(run.folder / "metrics.jsonl", lambda line: line | special.get(line["step"], {}))
    page = Page(report.write(run))
    assert page.text.count("nearly every answer is truncated") == 1  # at step 7, when it came on
    assert "to the adapter of step 5" in page.text and "one update moved the policy" in page.text


def test_several_runs_share_their_figures_and_only_differing_options_are_listed(run, tmp_path):
    other = tmp_path / "other"
    run_toy(other, {"train": {"steps": 10, "checkpoint_every": 5, "seed": 1}})
    page = Page(report.compare([run, Run(other)], tmp_path / "both.html"))
    table = page.under("code")
    assert table == ["train.steps", "train.seed", "eval.every"]
    assert page.tags.count("figure") == 12 and page.tags.count("li") == 2 + 2 * 12
    for each in (run, Run(other)):
        assert each.folder.name in page.under("b")
        assert f"{each.evaluations()[-1]['pass@1']['value']:.3f} [" in page.text


def test_more_runs_than_colours_are_all_drawn():
    """They were kept by colour, so the ninth took the place of the first."""
    drawn = chart("Reward", "", [Curve(f"run {i}", [1, 2], [0.0, i]) for i in range(9)])
    assert len(drawn.legend) == 9 and drawn.svg.count("var(--c1)") == 2 * drawn.svg.count("var(--c2)") > 0


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.seed=3", "rollout.temperature=0.7", 'train.memory="6GB"'],
        ["data.system='say \"yes\" or it''s no; $HOME'", 'model.prompt_format="{system} Q: {prompt}\\nA:"'],
        ['rewards.functions={ number = 1.0, "my file.py:f" = 0.5 }', 'model.lora_targets=["q_proj", "v_proj"]'],
        ["rollout.cache_mib=512", 'model.revision="abc"', 'rewards.on_failure="fail"'],
    ],
)
def test_the_command_on_the_page_makes_the_same_run_again(tmp_path, overrides):
    config = loading.load("demo", overrides=overrides)
    run = Run(tmp_path / "run")
    run.create()
    run.describe(config, {})
    words = shlex.split(reading.command(reading.read(run)))
    assert words[:4] == ["lite-trgrpo", "train", "--preset", "demo"]
    assert loading.load("demo", overrides=words[5::2]) == config
    page = Page(report.write(run))  # a run that has only begun
    assert page.under("h2") == ["Held-out score", "Guards", "Time and memory", "Settings"]


def test_before_the_first_score_after_training_there_is_no_gain_and_no_arrow(run):
    path = run.folder / "eval.jsonl"
    path.write_text(path.read_text().partition("\n")[0] + "\n")
    page = Page(report.write(run))
    assert "→" not in page.text and "gain in" not in page.text and "after" not in page.under("th")
    assert f"{run.evaluations()[0]['pass@1']['value']:.3f}" in page.under("b")


def test_the_page_of_an_unfinished_run_refreshes_itself_without_a_script(run, tmp_path):
    assert ("http-equiv", "refresh") not in Page(report.write(run)).attributes
    path = run.folder / "metrics.jsonl"
    path.write_text(path.read_text().rpartition("{")[0])  # the last step is not done yet
    page = Page(report.write(run))
    assert ("http-equiv", "refresh") in page.attributes and "<script" not in page.raw
    assert ("http-equiv", "refresh") not in Page(report.compare([run, run], tmp_path / "two.html")).attributes


def test_where_no_preset_has_the_base_the_command_names_the_runs_own_options(run):
    words = shlex.split(reading.command(reading.read(run)))
    assert words[:3] == ["lite-trgrpo", "train", "--config"]
    assert loading.load(file=Path(words[3])) == loading.load(file=run.folder / "config.toml")


def test_a_run_of_an_older_version_still_has_a_page(run):
    """Options that are gone, logs without what is measured today."""
    text = (run.folder / "config.toml").read_text()
    (run.folder / "config.toml").write_text(text.replace('optimizer = "adamw"', 'optimizer = "auto"\ngone = 3'))
    old = {"guards", "entropy_sampled", "update_kl", "weight_mean"}
    change(run.folder / "metrics.jsonl", lambda line: {key: line[key] for key in line if key not in old})
    for name in ("rollouts.jsonl", "run.json"):
        (run.folder / name).unlink()
    page = Page(report.write(run))
    assert "Token by token" not in page.under("h2") and "train.gone" in page.text
    assert page.tags.count("svg") == 6


# -- what must not be in it ---------------------------------------------------------------------------------


def hostile(run: Run) -> Run:
    """Everything that others have written, turned against the page."""

    def rows(line):
        changed = [row | {"prompt": HOSTILE, "greedy": HOSTILE, "answer": HOSTILE} for row in line["rows"]]
        return line | {"rows": changed}

    def group(line):
        answers = [a | {"text": HOSTILE} | ({"pieces": [HOSTILE] * len(a["pieces"])} if "pieces" in a else {})
                   for a in line["completions"]]  # fmt: skip
        return line | {"prompt": HOSTILE, "completions": answers}

    change(run.folder / "eval.jsonl", rows)
    change(run.folder / "rollouts.jsonl", group)
    change(run.folder / "metrics.jsonl", lambda line: line | {f"reward/{HOSTILE}": 0.5, "reward/$x^$": 1.0})
    text = (run.folder / "config.toml").read_text()
    (run.folder / "config.toml").write_text(text.replace('"toy"', json.dumps(HOSTILE)))
    return Run(run.folder.rename(run.folder.with_name("<script>alert(1)<!--")))


def test_nothing_that_a_model_or_a_data_set_wrote_becomes_markup(run):
    run = hostile(run)
    for page in (Page(report.write(run)), Page(report.compare([run, run], run.folder / "two.html"))):
        assert not {"script", "img", "iframe", "object", "link", "base", "form"} & set(page.tags)
        assert not [name for name, _ in page.attributes if name.startswith("on")]
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page.raw)
    page = Page(run.folder / "report.html")
    assert HOSTILE[:40] in page.text and "\\x1b[31m\\u202e" in page.text  # there to read, as text


def test_nothing_is_fetched(run, tmp_path):
    for page in (Page(report.write(run)), Page(report.compare([run, run], tmp_path / "two.html"))):
        links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action", "srcset")]
        assert links and all(link.startswith("#") for link in links)
        assert not re.search(r"https?:|@import|url\((?!#)", page.raw)
        assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
        assert not re.search("#0000c|#010101|#020202", page.raw), "a colour that is no theme's"


# -- small and cheap ----------------------------------------------------------------------------------------


def long_run(folder: Path, steps: int, scored: int) -> Run:
    """Logs of `steps` steps, `scored` evaluations of 200 rows: a real run's, repeated with other numbers."""
    run_toy(folder, {"train": {"steps": 2}})
    run = Run(folder)
    metrics, evaluation = run.metrics()[-1], run.evaluations()[-1]
    jitter = [((i * 7919) % 101) / 101 for i in range(steps)]
    measured = {key for key, value in metrics.items() if type(value) is float}
    with (folder / "metrics.jsonl").open("w") as file:
        for i, noise in enumerate(jitter):
            line = metrics | {key: 0.5 * noise + 0.5 * i / steps for key in measured} | {"step": i + 1, "length_max": i}
            file.write(json.dumps(line) + "\n")
    rows = [row | {"greedy": "so we add. " * 40, "prompt": "How many? " * 20} for row in evaluation["rows"]] * 34
    with (folder / "eval.jsonl").open("w") as file:
        for k in range(scored):
            file.write(json.dumps(evaluation | {"step": k * steps // scored, "rows": rows[:200]}) + "\n")
    return run


def test_five_hundred_steps_stay_far_below_three_megabytes(tmp_path):
    page = report.write(long_run(tmp_path / "run", 500, 11))
    assert page.stat().st_size < 1_000_000
    assert Page(page).tags.count("svg") == 8


def test_only_the_end_of_the_sampled_answers_is_read(toy, tmp_path):
    run = Run(tmp_path)
    path = tmp_path / "rollouts.jsonl"
    groups = [line for line in lines(toy / "rollouts.jsonl") if line["step"] == 15]
    old = json.dumps(groups[0] | {"step": 14}) + "\n"
    for before in (0, 1, 3_000):  # with the last, what is read first ends in the middle of a line
        path.write_text(old * before + "".join(json.dumps(group) + "\n" for group in groups) + '{"step": 16, "pro')
        assert run.last_rollouts() == groups
    path.write_text("not JSON\n" * 100_000 + "".join(json.dumps(group) + "\n" for group in groups))
    assert run.last_rollouts() == groups
    big = [groups[0] | {"prompt": "x" * 300_000}, *groups]  # one step alone is more than is read first
    path.write_text(old + "".join(json.dumps(group) + "\n" for group in big))
    assert run.last_rollouts() == big


def test_log_probabilities_are_kept_where_something_is_learned(toy):
    for group in lines(toy / "rollouts.jsonl"):
        learned = len({answer["reward"] for answer in group["completions"]}) > 1
        for answer in group["completions"]:
            assert ("logprobs" in answer) == (learned or "pieces" in answer)
            if "logprobs" in answer:
                assert len(answer["logprobs"]) == len(answer["ids"]) and max(answer["logprobs"]) <= 0
                assert all(value == round(value, 4) for value in answer["logprobs"])
    for step in range(1, 16):
        shown = [a for g in lines(toy / "rollouts.jsonl") if g["step"] == step for a in g["completions"]
                 if "pieces" in a]  # fmt: skip
        assert len(shown) == 1


# -- when it is written -------------------------------------------------------------------------------------


def call(*arguments):
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, [str(a) for a in arguments])


def test_training_writes_it_at_every_checkpoint_and_trouble_with_it_is_one_line(tiny_config, tmp_path, monkeypatch):
    seen = []

    def broken(run):
        seen.append(len(run.metrics()))
        raise MemoryError("no room\nfor a page")

    monkeypatch.setattr(report, "write", broken)
    settings = ("-s", "train.checkpoint_every=1", "-s", "eval.rows=0")
    result = call("train", "-c", tiny_config, "-o", tmp_path / "run", *settings)
    assert result.exit_code == 0, result.stderr
    assert seen == [0, 1, 2]
    assert result.stderr.count("warning: no report was written: no room\n") == 3
    monkeypatch.undo()
    assert call("report", tmp_path / "run").stdout == f"{tmp_path / 'run' / 'report.html'}\n"


# -- the command --------------------------------------------------------------------------------------------


def test_without_a_name_the_runs_are_listed(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run.folder, "runs/set/a")
    shutil.copytree(run.folder, "runs/began")
    Path("runs/began/eval.jsonl").write_text("")
    shutil.copytree(run.folder, "runs/bad")
    Path("runs/bad/metrics.jsonl").write_bytes(b"\xff\n")
    Path("runs/bad/eval.jsonl").write_text("{\n")
    out = call("report").stdout.splitlines()
    scores = [line["pass@1"]["value"] for line in run.evaluations()]
    found = {line.split()[0]: " ".join(line.split()[1:-2]) for line in out[1:]}
    assert found == {
        "set/a": f"15/15 {scores[0]:.3f} -> {scores[-1]:.3f}",
        "began": "15/15 -",
        "bad": "damaged damaged",
    }


def test_several_runs_become_one_file(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("report", run.folder, run.folder).stdout == "comparison.html\n"
    assert Page(Path("comparison.html")).under("h1") == ["2 runs"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no run in"),
        (["none"], "none holds no run"),
        (["toy-run", "--output", "x.html"], "--output"),
        (["toy-run", "toy-run", "--output", "no/where.html"], "cannot write no/where.html: No such file"),
    ],
)
def test_a_report_that_cannot_be_made(run, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("report", *arguments)
    assert result.exit_code in (1, 2) and result.stdout == ""
    assert said in " ".join(re.sub(r"[─│╭╮╰╯]", " ", result.stderr).split())


# -- in a browser -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_a_browser_shows_it_on_a_phone_and_a_desk_in_light_and_dark(run, tmp_path):
    run = hostile(run)
    pages = [report.write(run), report.compare([run, run], tmp_path / "two.html")]
    chromium = browser.Browser(tmp_path / "profile")
    try:
        for page in pages:
            colours = set()
            for width, scheme in ((380, "light"), (380, "dark"), (1280, "light"), (1280, "dark")):
                chromium.open(page, width, scheme)
                assert chromium.value("document.documentElement.scrollWidth") <= width, "it would scroll sideways"
                assert chromium.value("document.querySelectorAll('svg path').length") > 50
                ink = "getComputedStyle(document.querySelector('.chart text')).fill"
                back = "getComputedStyle(document.body).backgroundColor"
                curve = "getComputedStyle(document.querySelector('.chart path[style*=\"--c1\"]')).stroke"
                colours.add(tuple(map(chromium.value, (ink, back, curve))))
                assert chromium.value("window.hacked") is None
            assert len(colours) == 2 and all(len(set(found)) == 3 for found in colours)
        assert {url.partition(":")[0] for url in chromium.requests} == {"file"}
        assert chromium.complaints == []
    finally:
        chromium.close()
