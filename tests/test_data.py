"""Sources to examples: where a row came from, what is refused, what is held out, and the order of a run."""

import importlib.util
import json
import random
import re
from pathlib import Path

import pytest

from lite_trgrpo.config.schema import Data
from lite_trgrpo.data import sources
from lite_trgrpo.data.examples import batch, load_examples, read_examples
from lite_trgrpo.errors import DataError, MissingPackageError

ROWS = [{"prompt": "1 + 1?", "answer": "2"}, {"prompt": "2 + 3?", "answer": "5"}, {"prompt": "4 + 4?", "answer": "8"}]
needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow (extra: data)")
needs_gym = pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="needs reasoning-gym (data)")


def text_of(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Write a file into the working folder; -> its name, which is what a person types and what messages show."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: str | bytes | list[dict]) -> str:
        content = text_of(content) if isinstance(content, list) else content
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return write


def read(source: str, **options):
    return read_examples(Data(source=source, **options), source, "train")


def refusal(source: str, **options) -> str:
    with pytest.raises(DataError) as caught:
        read(source, **options)
    return str(caught.value)


# -- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("t.jsonl", text_of(ROWS), [1, 2, 3]),
        ("t.json", text_of(ROWS), [1, 2, 3]),
        ("t.jsonl", "\ufeff" + text_of(ROWS), [1, 2, 3]),
        ("t.jsonl", "\n" + text_of(ROWS).replace("\n", "\n   \n"), [2, 4, 6]),
        ("t.jsonl", text_of(ROWS).replace("\n", "\r\n").removesuffix("\r\n"), [1, 2, 3]),
        ("t.csv", "prompt,answer\n1 + 1?,2\n2 + 3?,5\n4 + 4?,8\n", [2, 3, 4]),
        ("t.csv", "\ufeffprompt,answer\n1 + 1?,2\n2 + 3?,5\n4 + 4?,8", [2, 3, 4]),
        ("t.csv", 'answer,prompt\r\n2,"1 + 1?"\r\n\r\n5,2 + 3?\r\n8,4 + 4?\r\n', [2, 4, 5]),
    ],
    ids=["jsonl", "json", "jsonl-bom", "jsonl-blank-lines", "jsonl-crlf", "csv", "csv-bom", "csv-quotes-blank-line"],
)
def test_a_file_gives_its_rows_in_order_each_with_file_and_line(file, name, content, lines):
    rows = read(file(name, content))
    assert [(row.prompt, row.columns["answer"]) for row in rows] == [(row["prompt"], row["answer"]) for row in ROWS]
    assert [row.origin for row in rows] == [f"{name}:{line}" for line in lines]


@needs_pyarrow
def test_a_parquet_file_gives_its_rows_messages_included(file):
    import pyarrow
    import pyarrow.parquet

    messages = [{"role": "user", "content": "2 + 3?"}]
    table = pyarrow.Table.from_pylist([{"prompt": messages, "answer": 5}, {"prompt": messages * 2, "answer": 6}])
    pyarrow.parquet.write_table(table, file("t.parquet", ""))
    first, second = read("t.parquet")
    assert (first.prompt, first.columns, first.origin) == (messages, {"answer": 5}, "t.parquet:1")
    assert (second.prompt, second.columns, second.origin) == (messages * 2, {"answer": 6}, "t.parquet:2")


@needs_pyarrow
def test_a_parquet_file_that_is_none_is_refused(file):
    assert refusal(file("t.parquet", "prompt,answer\n")).startswith("t.parquet is not a readable Parquet file: ")


def test_quoted_line_breaks_stay_in_a_csv_field(file):
    [row] = read(file("t.csv", 'prompt,answer\n"1 +\n1?",2\n'))
    assert row.prompt == "1 +\n1?"


def test_jsonl_keeps_the_types_of_columns_and_csv_has_only_text(file):
    rows = [{"prompt": "?", "answer": 2, "level": 1.5, "tags": ["a"], "none": None}]
    assert read(file("t.jsonl", rows))[0].columns == {"answer": 2, "level": 1.5, "tags": ["a"], "none": None}
    assert read(file("t.csv", "prompt,answer\n?,2\n"))[0].columns == {"answer": "2"}


def test_columns_are_mapped_and_the_others_kept(file):
    rows = [{"question": "1 + 1?", "solution": "it is 2", "level": 3}]
    [row] = read(file("t.jsonl", rows), prompt="question", answer="solution")
    assert row.prompt == "1 + 1?"
    assert row.columns == {"solution": "it is 2", "answer": "it is 2", "level": 3}


def test_without_an_answer_column_the_rest_is_kept(file):
    [row] = read(file("t.jsonl", [{"prompt": "write a poem", "topic": "sea"}]), answer="")
    assert row.columns == {"topic": "sea"}


# -- rows that cannot be used -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{prompt: 1}", "t.jsonl:2: not a JSON object on one line: "),
        ('{"prompt": "a", "answer": ', "t.jsonl:2: not a JSON object on one line: "),
        ("[1, 2]", "t.jsonl:2: a JSON list, not an object with columns"),
        ('"text"', "t.jsonl:2: a JSON str, not an object with columns"),
        ("null", "t.jsonl:2: a JSON NoneType, not an object with columns"),
        ('{"prompt": "", "answer": "1"}', "t.jsonl:2: the prompt is empty"),
        ('{"prompt": " \\n", "answer": "1"}', "t.jsonl:2: the prompt is empty"),
        ('{"prompt": 5, "answer": "1"}', "t.jsonl:2: the prompt is int, not a string or a list of messages"),
        ('{"prompt": null, "answer": "1"}', "t.jsonl:2: the prompt is NoneType, not a string or a list of messages"),
        ('{"prompt": {"a": 1}, "answer": "1"}', "t.jsonl:2: the prompt is dict, not a string or a list of messages"),
        ('{"prompt": ["hello"], "answer": "1"}', "t.jsonl:2: 'hello' is not a message; it needs 'role' and 'content'"),
        ('{"prompt": [{"role": "user"}], "answer": "1"}', "t.jsonl:2: {'role': 'user'} is not a message; "),
        ('{"prompt": [{"role": "user", "content": 5}], "answer": "1"}', "t.jsonl:2: {'role': 'user', 'content': 5} is"),
        ('{"prompt": [{"role": null, "content": "a"}], "answer": "1"}', "t.jsonl:2: {'role': None, 'content': 'a'} is"),
        ('{"answer": "1"}', "t.jsonl:2: no column 'prompt'. It has answer; type --set data.prompt=NAME"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_file_line_and_reason(file, line, message):
    assert refusal(file("t.jsonl", text_of(ROWS[:1]) + line + "\n")).startswith(message)


def test_an_empty_list_of_messages_is_said_to_be_empty(file):
    """Not: 'the prompt is list, not a string or a list of messages'."""
    message = refusal(file("t.jsonl", [{"prompt": [], "answer": "1"}]))
    assert message.startswith("t.jsonl:1: ") and "empty" in message


def test_messages_without_any_text_are_an_empty_prompt_too(file):
    rows = [{"prompt": [{"role": "user", "content": " "}], "answer": "1"}]
    assert refusal(file("t.jsonl", rows)) == "t.jsonl:1: the prompt is empty"


@pytest.mark.parametrize(
    ("row", "option", "nearest"),
    [
        ({"promt": "?", "answer": 1}, "data.prompt", "no column 'prompt'. Did you mean 'promt'? It has promt, answer"),
        ({"prompt": "?", "answers": 1}, "data.answer", "no column 'answer'. Did you mean 'answers'? It has prompt, an"),
        ({"prompt": "?", "x": 1}, "data.answer", "no column 'answer'. It has prompt, x; "),
    ],
)
def test_a_missing_column_is_answered_with_the_nearest_and_what_to_type(file, row, option, nearest):
    message = refusal(file("t.jsonl", [row]))
    assert message.startswith(f"t.jsonl:1: {nearest}")
    assert f"type --set {option}=NAME" in message
    assert ("if no reward needs one" in message) == (option == "data.answer")


@pytest.mark.parametrize(("bad", "named", "more"), [(2, 2, None), (5, 5, None), (6, 5, 1), (40, 5, 35)])
def test_several_bad_rows_are_named_at_once(file, bad, named, more):
    lines = refusal(file("t.jsonl", ROWS + [{"prompt": "", "answer": "1"}] * bad)).splitlines()
    assert lines[:named] == [f"t.jsonl:{4 + i}: the prompt is empty" for i in range(named)]
    assert lines[named:] == ([] if more is None else [f"... and {more} more"])


def test_what_is_wrong_with_every_row_is_said_once(file):
    [line] = refusal(file("t.jsonl", [{"question": "?", "answer": 1}] * 7)).splitlines()
    assert line.startswith("t.jsonl:1: no column 'prompt'") and line.endswith("(the same in all 7 rows)")


def test_broken_lines_are_among_the_rows_named_at_once(file):
    """A person mends a file in one go, whatever is wrong with its lines."""
    lines = refusal(file("t.jsonl", '{"prompt": "", "answer": 1}\n{broken\n[1]\n{"prompt": 1, "answer": 1}\n'))
    assert [line.split(": ")[0] for line in lines.splitlines()] == [f"t.jsonl:{i}" for i in (1, 2, 3, 4)]


@pytest.mark.parametrize(("line", "fields"), [("?,1,2,3", 4), ("?,1,2", 3), ("?", 1)])
def test_a_csv_row_that_does_not_fit_the_header_says_how_many_fields_it_has(file, line, fields):
    message = refusal(file("t.csv", f"prompt,answer\n1?,1\n{line}\n"))
    assert message.startswith("t.csv:3: ")
    assert re.findall(r"\d+", message.removeprefix("t.csv:3: "))[0] == str(fields)


def test_a_quote_that_never_closes_is_refused(file):
    """It would swallow the rest of the file into one field, and those rows would be missed by nobody."""
    assert "t.csv" in refusal(file("t.csv", 'prompt,answer\n1?,"1\n2?,2\n3?,3\n'))


def test_a_long_field_of_a_csv_is_no_traceback(file):
    """Python's csv stops at 131,072 characters with an error class of its own."""
    source = file("t.csv", f"prompt,answer\n{'x' * 140_000},1\n")
    try:
        assert len(read(source)[0].prompt) == 140_000
    except DataError as error:
        assert str(error).startswith("t.csv:2: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", "", "t.jsonl has no rows"),
        ("t.jsonl", "\n \n", "t.jsonl has no rows"),
        ("t.csv", "", "t.csv has no rows"),
        ("t.csv", "prompt,answer\n", "t.csv has no rows"),
        ("t.jsonl", b'{"prompt": "\xff", "answer": 1}\n', "t.jsonl is not UTF-8 text"),
        ("t.csv", b"prompt,answer\n\xff,1\n", "t.csv is not UTF-8 text"),
    ],
)
def test_a_file_without_usable_text_is_refused(file, name, content, message):
    assert refusal(file(name, content)).startswith(message)


def test_a_missing_file_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal("no.jsonl") == f"no file no.jsonl (from {tmp_path}); give data.source a path that exists"


@pytest.mark.parametrize("source", ["gsm8k", "t.txt", "a/b/c", "./a/b", "/a", "unknown:addition", "builtin"])
def test_a_source_of_no_known_kind_is_answered_with_the_kinds(source):
    assert refusal(source) == (
        f"data.source '{source}' is not a file ending in .jsonl, .json, .csv, .tsv, .parquet, a Hub id such as "
        "openai/gsm8k, reasoning-gym:TASK or builtin:addition"
    )


# -- system message -----------------------------------------------------------------------------------------

USER, SYSTEM = {"role": "user", "content": "2 + 3?"}, {"role": "system", "content": "Think."}


@pytest.mark.parametrize(
    ("prompt", "system", "expected"),
    [
        ("2 + 3?", None, "2 + 3?"),
        ("2 + 3?", "Think.", [SYSTEM, USER]),
        ([USER], None, [USER]),
        ([USER], "Think.", [SYSTEM, USER]),
        ([SYSTEM, USER], None, [SYSTEM, USER]),
        ([{"role": "system", "content": "Own."}, USER], "Think.", [{"role": "system", "content": "Own."}, USER]),
        ([USER, {"role": "assistant", "content": "5"}, USER], "Think.",
         [SYSTEM, USER, {"role": "assistant", "content": "5"}, USER]),
    ],
)  # fmt: skip
def test_a_system_message_is_put_before_prompts_that_have_none(file, prompt, system, expected):
    [row] = read(file("t.jsonl", [{"prompt": prompt, "answer": "5"}]), system=system)
    assert row.prompt == expected


# -- files as people have them ------------------------------------------------------------------------------

SUMS = [{"prompt": "2 + 2?", "answer": "4"}, {"prompt": "3 + 3?", "answer": "6"}]
LINES = "".join(json.dumps(row) + "\n" for row in SUMS)
TABLE = "prompt,answer\n2 + 2?,4\n3 + 3?,6\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("UPPER.JSONL", LINES.encode()),
        ("array.json", json.dumps(SUMS).encode()),
        ("lines.json", LINES.encode()),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("T.CSV", TABLE.encode()),
        ("t.tsv", TABLE.replace(",", "\t").encode()),
    ],
)
def test_files_are_read_however_they_are_called(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    training, _ = load_examples(Data(source=str(tmp_path / name)), 0)
    assert [(row.text, row.columns["answer"]) for row in training] == [("2 + 2?", "4"), ("3 + 3?", "6")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("twice.csv", b"prompt,answer,answer\n2 + 2?,4,0\n", "'answer' stands twice"),
        ("twice.jsonl", b'{"prompt": "2?", "answer": "4", "answer": "0"}\n', "twice.jsonl:1.*'answer' stands twice"),
        ("semi.csv", TABLE.replace(",", ";").encode(), "semi.tsv"),
        ("wide.csv", TABLE.encode("utf-16"), "iconv"),
        ("latin.csv", "prompt,answer\ncombien coûte ça,4\n".encode("cp1252"), "iconv"),
        ("deep.json", b"[" * 100_000, "deep.json"),
        ("packed.jsonl.gz", b"", "packed.jsonl.gz"),
    ],
)
def test_files_that_cannot_be_read_as_meant_name_the_way_out(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_examples(Data(source=str(tmp_path / name)), 0)


def test_a_long_field_and_a_home_folder_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "long.csv").write_text(f"prompt,answer\n{'word ' * 40_000},4\nb,5\n")
    training, _ = load_examples(Data(source="~/long.csv"), 0)
    assert len(training) == 2


@pytest.mark.parametrize("role", ["assistant", "system"])
def test_a_prompt_that_does_not_end_with_the_user_is_refused(file, role):
    row = {"prompt": [{"role": "user", "content": "2 + 2?"}, {"role": role, "content": "It is 4"}], "answer": "4"}
    assert f"t.jsonl:1: the last message of the prompt is the {role}'s" in refusal(file("t.jsonl", [row]))


# -- held-out rows ------------------------------------------------------------------------------------------


def repeated(count: int = 40) -> list[dict]:
    """Every prompt three times, mixed; the copies have different answers."""
    rows = [{"prompt": f"q{i}", "answer": str(copy)} for copy in range(3) for i in range(count)]
    random.Random(1).shuffle(rows)
    return rows


@pytest.mark.parametrize("eval_rows", [1, 7, 20])
def test_no_held_out_prompt_is_trained_on_and_nothing_else_is_lost(file, eval_rows):
    training, heldout = load_examples(Data(source=file("t.jsonl", repeated())), eval_rows)
    assert len(heldout) == len({row.text for row in heldout}) == eval_rows
    assert not {row.text for row in training} & {row.text for row in heldout}
    assert len(training) == 3 * (40 - eval_rows)


def test_of_a_prompt_with_copies_the_first_is_held_out(file):
    rows = repeated()
    first = {row["prompt"]: row["answer"] for row in reversed(rows)}
    _, heldout = load_examples(Data(source=file("t.jsonl", rows)), 20)
    assert {row.text: row.columns["answer"] for row in heldout} == {row.text: first[row.text] for row in heldout}


def test_a_string_and_the_same_single_message_are_the_same_question(file):
    """The model reads both alike, so a held-out row must not stand in training in the other form."""
    strings = [{"prompt": f"q{i}", "answer": "1"} for i in range(20)]
    messages = [{"prompt": [{"role": "user", "content": f"q{i}"}], "answer": "1"} for i in range(10)]
    file("eval.jsonl", messages)
    training, heldout = load_examples(Data(source=file("t.jsonl", strings), eval_source="eval.jsonl"), 5)
    questions = [{row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"] for row in rows}
                 for rows in (training, heldout)]  # fmt: skip
    assert not questions[0] & questions[1]
    assert len(questions[0]) == 15


def test_a_prompt_that_is_trained_on_often_is_held_out_as_often(file):
    """300 draws of one of ten prompts, five of which stand in nine rows each: they make 90 % of the rows."""
    rows = [{"prompt": str(i), "answer": "a"} for i in range(10) for _ in range(9 if i < 5 else 1)]
    source, often = file("t.jsonl", rows), 0
    for seed in range(300):
        _, heldout = load_examples(Data(source=source, seed=seed), 1)
        often += int(heldout[0].text) < 5
    assert 0.85 < often / 300 < 0.95


@pytest.mark.parametrize(("distinct", "wanted", "held"), [(3, 200, 1), (2, 200, 1), (1, 200, 0), (3, 0, 0), (3, 1, 1)])
def test_at_most_half_of_the_distinct_prompts_is_held_out(file, distinct, wanted, held):
    """Every row stands twice, and half is counted in prompts: of 3 prompts in 6 rows 1 is held out, 4 rows are left."""
    training, heldout = load_examples(Data(source=file("t.jsonl", ROWS[:distinct] * 2)), wanted)
    assert (len(training), len(heldout)) == (2 * (distinct - held), held)


def test_the_demo_holds_out_200_rows():
    training, heldout = load_examples(Data(source="builtin:addition"), 200)
    assert (len(training), len(heldout)) == (1300, 200)  # 50 * 30 sums


def test_held_out_rows_depend_on_the_seed_of_the_data_alone():
    def held(seed):
        return [row.text for row in load_examples(Data(source="builtin:addition", seed=seed), 50)[1]]

    random.seed(1)
    first = held(0)
    random.seed(2)
    assert held(0) == first
    assert set(held(1)) != set(first)


def test_the_run_has_no_way_to_choose_the_held_out_rows():
    """Two runs that differ in train.seed are compared on the same rows: `load` never sees that seed."""
    assert list(load_examples.__annotations__) == ["data", "eval_rows", "return"]


def test_an_eval_source_gives_the_held_out_rows_and_they_leave_the_training_rows(file):
    file("eval.jsonl", [ROWS[0], {"prompt": "9 + 9?", "answer": "18"}])
    training, heldout = load_examples(Data(source=file("t.jsonl", ROWS), eval_source="eval.jsonl"), 200)
    assert {row.text: row.origin for row in heldout} == {"1 + 1?": "eval.jsonl:1", "9 + 9?": "eval.jsonl:2"}
    assert [row.origin for row in training] == ["t.jsonl:2", "t.jsonl:3"]


def test_an_eval_split_is_read_from_the_same_source(monkeypatch):
    splits = {"train": ROWS[1:], "test": [ROWS[0], ROWS[1]]}
    asked = []

    def hub(options, source, split):
        asked.append((source, split))
        return ((f"{source}:{split}:{i + 1}", row) for i, row in enumerate(splits[split]))

    monkeypatch.setattr(sources, "_hub", hub)
    training, heldout = load_examples(Data(source="some/set", eval_split="test"), 200)
    assert asked == [("some/set", "train"), ("some/set", "test")]
    assert sorted(row.origin for row in heldout) == ["some/set:test:1", "some/set:test:2"]
    assert [row.origin for row in training] == ["some/set:train:2"]


def test_a_limit_of_held_out_rows_holds_for_an_eval_source_too(file):
    file("eval.jsonl", repeated())
    _, heldout = load_examples(Data(source=file("t.jsonl", ROWS), eval_source="eval.jsonl"), 11)
    assert len(heldout) == len({row.text for row in heldout}) == 11


def test_a_source_that_is_all_held_out_says_what_to_lower(file):
    source = file("t.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no row is left for training after 3 were held out; lower eval\.rows"):
        load_examples(Data(source=source, eval_source=source), 200)


# -- the order of a run -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "per_step"), [(12, 4), (10, 4), (3, 8), (1, 2), (7, 1)])
def test_every_epoch_covers_every_example_once(count, per_step):
    """Steps may span epochs: the run of all steps, cut into pieces of `count`, is a permutation each."""
    steps = count * 3  # per_step epochs times 3, so the last one is whole
    order = [i for step in range(steps) for i in batch(count, per_step, 5, step)]
    assert len(order) == steps * per_step
    assert all(sorted(order[k : k + count]) == list(range(count)) for k in range(0, len(order), count))


def test_a_batch_is_a_pure_function():
    random.seed(1)
    forwards = [batch(10, 4, 3, step) for step in range(6)]
    random.seed(2)
    assert [batch(10, 4, 3, step) for step in reversed(range(6))] == forwards[::-1]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(batch(50, 50, seed, epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 9
    assert tuple(range(50)) not in orders


def test_the_order_is_the_same_on_every_machine_and_version():
    """Pinned, since a resumed run must go on in the order it began: 0..9 under random.Random("3:0").shuffle."""
    assert batch(10, 10, 3, 0) == [3, 4, 7, 5, 6, 0, 2, 1, 8, 9]


# -- generators ---------------------------------------------------------------------------------------------


def test_every_sum_occurs_once_with_its_right_answer():
    rows = read("builtin:addition")
    pairs = [tuple(map(int, re.fullmatch(r"What is (\d+) \+ (\d+)\? Answer .*", row.text).groups())) for row in rows]
    assert [row.columns["answer"] for row in rows] == [str(a + b) for a, b in pairs]
    assert sorted(pairs) == [(a, b) for a in range(10, 60) for b in range(10, 40)]
    assert [row.origin for row in rows] == [f"builtin:addition:{i + 1}" for i in range(1500)]
    assert len({row.text for row in rows}) == 1500


def test_sums_are_shuffled_by_the_seed_of_the_data():
    texts = [[row.text for row in read("builtin:addition", seed=seed)] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert sorted(texts[0]) == sorted(texts[2])


def test_ranges_of_sums_can_be_chosen():
    rows = read("builtin:addition", options={"first": [1, 2], "second": [5, 5]})
    assert sorted((row.text, row.columns["answer"]) for row in rows) == [
        ("What is 1 + 5? Answer with the number.", "6"), ("What is 2 + 5? Answer with the number.", "7"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("builtin:subtraction", {}, "no built-in generator 'subtraction'; there is: addition"),
        ("builtin:", {}, "no built-in generator ''; there is: addition"),
        (
            "builtin:addition",
            {"size": 3, "frist": 1},
            "builtin:addition has no option frist, size; it has first and sec",
        ),
        ("builtin:addition", {"first": [5, 1]}, "builtin:addition has no rows"),
    ],
)
def test_what_a_builtin_does_not_know_is_answered_with_what_it_has(source, options, message):
    assert refusal(source, options=options).startswith(message)


@pytest.mark.parametrize("first", [5, [10], ["a", "b"], [1.5, 3]])
def test_a_range_that_is_none_is_no_traceback(first):
    assert "first" in refusal("builtin:addition", options={"first": first})


@needs_gym
def test_reasoning_gym_gives_questions_with_answer_and_metadata():
    rows = read("reasoning-gym:chain_sum", options={"size": 5})
    assert [row.origin for row in rows] == [f"reasoning-gym:chain_sum:{i}" for i in range(1, 6)]
    for row in rows:
        assert row.prompt == row.columns["question"]
        assert row.columns["metadata"]["source_dataset"] == "chain_sum"
        terms = re.search(r"[\d +-]*\d [+-] [\d +-]*\d", row.text)[0].replace(" ", "")
        assert sum(map(int, re.findall(r"[+-]?\d+", terms))) == int(row.columns["answer"])


@needs_gym
def test_reasoning_gym_follows_the_seed_of_the_data_unless_the_options_name_one():
    def texts(seed, options):
        return [row.text for row in read("reasoning-gym:chain_sum", seed=seed, options={"size": 5, **options})]

    assert texts(0, {}) == texts(0, {}) != texts(1, {})
    assert texts(0, {"seed": 1}) == texts(1, {})


@needs_gym
@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("chain_sun", {}, r"reasoning-gym has no task 'chain_sun'\. Did you mean 'chain_sum'\?"),
        ("chain_sum", {"sizes": 5}, r"reasoning-gym:chain_sum: .*sizes.*\. Look at data\.options"),
        ("chain_sum", {"min_terms": -1}, r"reasoning-gym:chain_sum: .*min_terms.*\. Look at data\.options"),
    ],
)
def test_what_reasoning_gym_refuses_names_the_task(task, options, message):
    assert re.match(message, refusal(f"reasoning-gym:{task}", options=options))


@pytest.mark.parametrize(
    ("source", "package"),
    [("reasoning-gym:chain_sum", "reasoning_gym"), ("t.parquet", "pyarrow"), ("openai/gsm8k", "datasets")],
)
def test_a_missing_package_is_answered_with_the_pip_line(file, monkeypatch, source, package):
    file("t.parquet", "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError) as caught:
        read(source)
    assert str(caught.value) == f"{source} needs the package {package}. Type: pip install 'lite-trgrpo[data]'"
