"""Options: where a value comes from, what is refused and how it is said, presets, and TOML there and back."""

import ast
import math
import re
import tomllib
from pathlib import Path

import pytest

from lite_trgrpo.config import loading
from lite_trgrpo.config.schema import Config, Section
from lite_trgrpo.errors import ConfigError

PACKAGE = Path(loading.__file__).parent.parent
PRESETS = list(loading.presets())
ALL = [(section, key) for section, model in loading.SECTIONS.items() for key in model.model_fields]
MINIMAL = ["model.name=toy", "data.source=toy.jsonl"]


@pytest.fixture
def toml(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "own.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(*overrides: str) -> list[str]:
    """The lines of the error that a run with these overrides ends with."""
    with pytest.raises(ConfigError) as caught:
        loading.load(overrides=[*MINIMAL, *overrides])
    return str(caught.value).splitlines()


# -- where a value comes from -------------------------------------------------------------------------------


def test_each_layer_wins_over_the_one_before(toml):
    """Layer by layer over one option: default 200, the preset's own, file 7, --set 8, named flag 9."""
    layers = {"preset": "demo", "file": toml("[train]\nsteps = 7\n"), "overrides": ["train.steps=8"]}
    given, found = {}, [loading.load(overrides=MINIMAL).train.steps]
    for name, value in [*layers.items(), ("named", {"train.steps": 9})]:
        given[name] = value
        found.append(loading.load(**given).train.steps)
    preset = tomllib.loads(loading.preset_path("demo").read_text(encoding="utf-8"))["train"]["steps"]
    assert preset not in (200, 7, 8, 9)
    assert found == [200, preset, 7, 8, 9]


def test_a_layer_leaves_alone_what_it_does_not_name(toml):
    config = loading.load("demo", toml("[train]\nseed = 5\n"), ["train.warmup_steps=3"], {"train.steps": 2})
    assert config.train == loading.load("demo").train.model_copy(update={"seed": 5, "warmup_steps": 3, "steps": 2})
    assert config.model == loading.load("demo").model


def test_of_two_overrides_the_later_wins():
    assert loading.load("demo", overrides=["train.steps=3", "train.steps=4"]).train.steps == 4


def test_a_named_flag_that_was_not_given_changes_nothing():
    assert loading.load("demo", named={"train.steps": None, "model.adapter": None}) == loading.load("demo")


def test_zero_is_a_value_and_not_a_flag_that_was_not_given():
    assert loading.load("demo", overrides=["train.seed=3"], named={"train.seed": 0}).train.seed == 0


@pytest.mark.parametrize("by", ["file", "set"])
def test_a_table_is_replaced_as_a_whole(by, toml):
    """The demo scores with `number`; who asks for `exact` alone must not get both."""
    if by == "file":
        config = loading.load("demo", toml("[rewards]\nfunctions = { exact = 0.5 }\n"))
    else:
        config = loading.load("demo", overrides=["rewards.functions={exact = 0.5}"])
    assert config.rewards.functions == {"exact": 0.5}


def test_loading_does_not_change_the_defaults():
    loading.load("demo", overrides=["data.options={first = [1, 2]}"]).data.options["first"] = None
    assert loading.load("demo").data.options == {}


# -- values of --set ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("train.steps=12", 12),
        ("train.steps = 12", 12),
        ("data.system = Think. ", "Think."),
        ("train.learning_rate=2e-5", 2e-5),
        ("train.learning_rate=.5", ".5"),  # no TOML number; pydantic reads it as one
        ("train.gradient_checkpointing=true", True),
        ("model.name=Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ('model.name="Qwen/Qwen2.5-0.5B-Instruct"', "Qwen/Qwen2.5-0.5B-Instruct"),
        ("model.name=C:\\models\\tiny", "C:\\models\\tiny"),
        ("model.prompt_format=Q: {prompt}", "Q: {prompt}"),
        ('model.prompt_format="Q: {prompt}\\nA:"', "Q: {prompt}\nA:"),
        ("data.system=a = b", "a = b"),  # only the first = parts name and value
        ("data.answer=", ""),
        ("data.answer=''", ""),
        ('model.lora_targets=["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        ("data.options={first = [1, 2]}", {"first": [1, 2]}),
        ("rewards.functions={'own.py:f' = 1}", {"own.py:f": 1}),
        ("rewards.functions.exact=1", 1),
    ],
)
def test_an_override_is_toml_and_what_is_no_toml_is_a_string(text, value):
    section, key, got = loading.parse_override(text)
    assert (got, type(got)) == (value, type(value))
    assert f"{section}.{key}" == text.partition("=")[0].strip()


@pytest.mark.parametrize(
    ("override", "value"),
    [("train.learning_rate=.5", 0.5), ("train.learning_rate=1", 1.0), ("train.gradient_checkpointing=True", True)],
)
def test_numbers_and_booleans_arrive_in_the_type_of_the_option(override, value):
    section, key, _ = loading.parse_override(override)
    got = getattr(getattr(loading.load("demo", overrides=[override]), section), key)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize("text", ["train.steps", "step=3", "=3", ".steps=3", "train.=3", ""])
def test_an_override_in_another_form_says_how_it_is_written(text):
    with pytest.raises(ConfigError, match=r"--set .* is not section\.key=value, e\.g\. --set train\.learning_rate="):
        loading.parse_override(text)


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("trian.steps=3", "unknown section 'trian'. Did you mean 'train'? Allowed: model, data, rewards, rollout, "),
        ("train.step=3", "unknown option 'train.step'. Did you mean 'steps'? Allowed: steps, prompts_per_step, "),
        ("rollout.temprature=1", "unknown option 'rollout.temprature'. Did you mean 'temperature'? Allowed: "),
        ("eval.zzzzzz=1", "unknown option 'eval.zzzzzz'. Allowed: every, rows, samples, max_new_tokens"),
        ("train.steps.x=1", "unknown option 'train.steps.x'. Did you mean 'steps'? Allowed: "),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_and_all_that_are_allowed(override, line):
    [problem] = problems(override)
    assert problem.startswith(line)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("rollout.group_size=1", r"rollout\.group_size = 1: must be at least 2: an answer is judged against"),
        ("rollout.group_size=-3", r"rollout\.group_size = -3: must be at least 2"),
        ("model.lora_dropout=0.1", r"model\.lora_dropout = 0\.1: "),
        ("train.steps=0", r"train\.steps = 0: input should be greater than or equal to 1"),
        ("train.steps=1.5", r"train\.steps = 1\.5: input should be a valid integer"),
        ("train.learning_rate=0", r"train\.learning_rate = 0: input should be greater than 0"),
        ("train.learning_rate=fast", r'train\.learning_rate = "fast": input should be a valid number'),
        ("train.schedule=cosin", r"""train\.schedule = "cosin": input should be 'constant', 'linear' or 'cosine'"""),
        ("model.quantization=int7", r"""model\.quantization = "int7": input should be 'none', 'nf4' or 'int8'"""),
        ("rollout.top_p=0.9", r"rollout\.top_p = 0\.9: "),
        ("objective.clip_low=1", r"objective\.clip_low = 1: input should be less than 1"),
        ("objective.beta=-0.1", r"objective\.beta = -0\.1: input should be greater than or equal to 0"),
        ("rewards.functions={}", r"rewards\.functions = \{\}: must name at least one function, e\.g\. \{ math = 1\.0"),
        ("rewards.options={math={}}", r"rewards.*: options for \['math'\] but functions only has \['exact'\]"),
        ("rewards.on_failure=skp", r'rewards\.on_failure = "skp": must be skip, fail or a number, e\.g\. -1\.0'),
        ("rewards.on_failure=true", r"rewards\.on_failure = true: must be skip, fail or a number"),
        ("rewards.on_failure=nan", r"rewards\.on_failure = NaN: must be skip, fail or a number"),
        ("rewards.memory=2", r"rewards\.memory = 2: must be at least 256MB"),
        ("rewards.memory=2TB", r'rewards\.memory = "2TB": must be a size, e\.g\. 2GB or 512MB'),
        ("rewards.memory=100MB", r'rewards\.memory = "100MB": must be at least 256MB'),
        ("model.name=", r'model\.name = "": '),
        ("data.source=''", r'data\.source = "": '),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_is_allowed(override, line):
    [problem] = problems(override)
    assert re.match(line, problem), problem


@pytest.mark.parametrize("option", ["train.learning_rate", "rollout.temperature", "objective.weight.alpha"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_nan_and_infinity_are_no_settings(option, value):
    """TOML can write both, and a comparison such as > 0 lets infinity through."""
    [problem] = problems(f"{option}={value}")
    assert problem.startswith(f"{option} = ")


def test_a_seed_that_the_generators_cannot_take_is_refused_before_the_run():
    """Counters of the sampler are 64 bits wide, torch.manual_seed too: a longer number would end in a traceback."""
    [problem] = problems(f"train.seed={2**64}")
    assert problem.startswith("train.seed = ")


def test_weight_bounds_the_wrong_way_round_are_refused():
    """torch.clamp(low=2, high=1.4) gives 1.4 everywhere and no error: token weights would be off, silently."""
    [problem] = problems("objective.weight.low=2")
    assert "objective" in problem and "low" in problem and "high" in problem


def test_a_problem_names_the_option_as_it_is_written_and_once():
    """An option of two types (a string or a list) is one option: no `model.lora_targets.list[str]`."""
    [problem] = problems("model.lora_targets=5")
    assert problem.startswith("model.lora_targets = 5: ")


@pytest.mark.parametrize("override", ["model.revision=1234567", "data.system=2024-01-01"])
def test_a_string_that_looks_like_a_number_or_a_date_arrives_or_is_answered_with_the_quotes_to_type(override):
    """A short commit of digits only is TOML for a number; 'input should be a valid string' leaves a person puzzled."""
    section, key, _ = loading.parse_override(override)
    value = override.partition("=")[2]
    try:
        config = loading.load("demo", overrides=[override])
    except ConfigError as error:
        assert f'"{value}"' in str(error).partition(":")[2], error
    else:
        assert getattr(getattr(config, section), key) == value


def test_all_problems_are_reported_at_once_one_a_line(toml):
    file = toml("[train]\nsteps = -1\nlearning_rat = 1\n\n[rollout]\ngroup_size = 1\n\n[trainer]\nsteps = 1\n")
    with pytest.raises(ConfigError) as caught:
        loading.load(None, file, ["model.lora_dropout=0.5", "data.source=x.jsonl"])
    lines = str(caught.value).splitlines()
    for start in (
        "model.name is not set", "model.lora_dropout = 0.5", "train.steps = -1", "unknown option 'train.learning_rat'",
        "rollout.group_size = 1", "unknown section 'trainer'",
    ):  # fmt: skip
        assert sum(line.startswith(start) for line in lines) == 1, (start, lines)
    assert len(lines) == 6


UNSET = (
    "is not set. Type --preset NAME (`lite-trgrpo presets list`), or --config FILE (`lite-trgrpo init my.jsonl` writes "
    "one), or --set"
)


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        ([], [f"model.name {UNSET} model.name=...", f"data.source {UNSET} data.source=..."]),
        (["model.name=toy"], [f"data.source {UNSET} data.source=..."]),
        (["model.name=toy", "data.split=test"], ["data.source is not set. Type --set data.source=..."]),
    ],
)
def test_what_has_no_default_says_what_to_type(given, lines):
    with pytest.raises(ConfigError) as caught:
        loading.load(overrides=given)
    assert str(caught.value).splitlines() == lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 3\n", r"'steps' .*\['model', 'data'"),
        ("[train\n", r"own\.toml is not valid TOML: .*line 1"),
        ("[train]\nsteps = \n", r"own\.toml is not valid TOML: .*line 2"),
    ],
)
def test_a_broken_file_says_where(toml, text, message):
    with pytest.raises(ConfigError, match=message):
        loading.load("demo", toml(text))


def test_a_file_that_is_not_utf8_is_no_traceback(tmp_path):
    (tmp_path / "own.toml").write_bytes(b"[data]\nsystem = '\xff'\n")
    with pytest.raises(ConfigError, match=r"own\.toml is not valid TOML"):
        loading.load("demo", tmp_path / "own.toml")


def test_data_in_the_place_of_a_config_leads_to_init(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"q": 1}\n')
    with pytest.raises(ConfigError, match=r"lite-trgrpo init .*own\.jsonl"):
        loading.load("demo", tmp_path / "own.jsonl")


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_file_that_cannot_be_read_says_so(tmp_path, name):
    with pytest.raises(ConfigError, match=r"cannot read config .*\. Give an existing \.toml file"):
        loading.load("demo", tmp_path / name)


@pytest.mark.parametrize(("name", "meant"), [("dmo", " Did you mean 'demo'?"), ("Math-4b", " Did you mean 'math-4b'?")])
def test_an_unknown_preset_is_answered_with_the_nearest_and_all(name, meant):
    with pytest.raises(ConfigError) as caught:
        loading.load(name)
    assert str(caught.value) == f"no preset '{name}'.{meant} There are: {', '.join(PRESETS)}"


@pytest.mark.parametrize(
    ("word", "allowed", "text"),
    [
        ("grop", ["group", "drop"], " Did you mean 'group'?"),
        ("seed", ["seed"], " Did you mean 'seed'?"),
        ("xyz", ["group", "drop"], ""),
        ("", ["group"], ""),
        ("group", [], ""),
    ],
)
def test_nearest_says_nothing_where_nothing_is_near(word, allowed, text):
    assert loading.nearest(word, allowed) == text


# -- presets ------------------------------------------------------------------------------------------------


def test_the_demo_is_among_the_presets_in_the_order_of_names():
    assert "demo" in PRESETS and sorted(PRESETS) == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads_and_says_who_it_is_for(name):
    head = loading.head_comment(loading.preset_path(name))
    config = loading.load(name)
    assert {"teaches", "base", "licence", "card", "time"} <= head.keys()
    assert all(head.values())
    assert head["licence"] == "Apache-2.0"
    assert (config.model.upstream or config.model.name).rpartition("/")[2] in head["base"]
    assert ("4-bit" in head["base"]) == (config.model.quantization == "nf4")


@pytest.mark.parametrize("name", PRESETS)
def test_the_head_of_a_preset_names_the_packages_that_it_needs(name):
    source = loading.load(name).data.source
    needs = loading.head_comment(loading.preset_path(name)).get("needs", "")
    assert ("lite-trgrpo[data]" in needs) == (not source.startswith("builtin:"))


@pytest.mark.parametrize("name", loading.objectives())
def test_every_objective_loads_over_every_preset_and_says_what_it_is(name):
    head = loading.head_comment(loading.objective_path(name))
    assert all(head.get(key) for key in ("what", "formula", "source"))
    for preset in PRESETS:
        config = loading.load(preset, objective=name)
        assert list(config.rewards.functions)[: len(loading.load(preset).rewards.functions)] == list(
            loading.load(preset).rewards.functions
        )
        assert config.model == loading.load(preset).model


def test_an_objective_lies_over_preset_and_file_and_under_set(toml):
    """It is a named choice: a run's whole config.toml must not cancel it. dr-grpo aggregates by a constant."""
    file = toml('[objective]\naggregation = "token"\nweights = "centred"\n')
    found = [loading.load("demo", objective="dr-grpo")]
    found.append(loading.load("demo", file, objective="dr-grpo"))
    found.append(loading.load("demo", file, ["objective.aggregation=sequence"], objective="dr-grpo"))
    assert [config.objective.aggregation for config in found] == ["constant", "constant", "sequence"]
    assert {config.objective.advantage for config in found} == {"dr-grpo"}
    assert {config.objective.weights for config in found} == {"none"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openai/gsm8k", True), ("Qwen/Qwen2.5-1.5B-Instruct", True), ("a_b/c-d.e", True), ("data/rows.jsonl", False),
        ("base/model.gguf", False), ("../..", False), ("./model", False), ("/model", False), ("~/model", False),
        ("a/b/c", False), ("gsm8k", False), ("reasoning-gym:a/b", False), ("package:a/b", False), ("here/model", False),
        ("a/" + 300 * "b", False),
    ],
)  # fmt: skip
def test_one_definition_says_what_a_hub_id_is(tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert loading.is_hub_id(name) == expected


def test_a_recipes_reward_comes_beside_those_of_the_run(toml):
    file = toml('[data]\nsource = "x.jsonl"\n[model]\nname = "m"\n')
    assert loading.load(None, file, objective="dapo").rewards.functions == {"exact": 1.0, "overlong": 1.0}
    own = toml("[rewards]\nfunctions = { math = 2.0 }\n")
    assert list(loading.load("demo", own, objective="dapo").rewards.functions) == ["math", "overlong"]


@pytest.mark.parametrize("name", loading.objectives())
def test_an_objective_can_be_used_with_a_reward_of_ones_own(toml, name):
    """A recipe may bring a reward and its options; a file that names other rewards must not clash with them."""
    loading.load("demo", toml("[rewards]\nfunctions = { exact = 1.0 }\n"), objective=name)


def test_a_head_comment_may_run_over_lines(toml):
    path = toml("# Teaches: a thing\n#          and another.\n# Card:    6 GB\n\n# Late: not in the head\n[train]\n")
    assert loading.head_comment(path) == {"teaches": "a thing and another.", "card": "6 GB"}


# -- writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_written_preset_reads_back_equal(name, toml):
    config = loading.load(name)
    assert loading.load(file=toml(loading.to_toml(config))) == config


def test_every_kind_of_value_reads_back_equal(toml):
    config = loading.load("demo", overrides=[
        'model.prompt_format="Q: {prompt}\\n\\"A\\": \\\\ é"', 'model.lora_targets=["q_proj"]',
        "model.template_options={enable_thinking = false}", "data.options={first = [1, 2], deep = {x = [{y = 1.5}]}}",
        "rewards.functions={number = 1, 'own.py:my reward' = -0.5}", "rewards.options={'own.py:my reward' = {a = ''}}",
        "train.learning_rate=1.2345678901234567e-7", "rewards.on_failure=-1", "rewards.memory=1.5 gb",
        "eval.max_new_tokens=5",
    ])  # fmt: skip
    assert loading.load(file=toml(loading.to_toml(config))) == config


def test_options_that_are_unset_have_no_line():
    written = tomllib.loads(loading.to_toml(loading.load(overrides=MINIMAL)))
    unset = {(section, key) for section, key in ALL if loading.SECTIONS[section].model_fields[key].default is None}
    assert ("eval", "max_new_tokens") in unset
    assert {(section, key) for section, values in written.items() for key in values} == set(ALL) - unset


# -- each option in one place -------------------------------------------------------------------------------


def test_sections_and_config_name_the_same():
    assert {name: field.annotation for name, field in Config.model_fields.items()} == loading.SECTIONS


@pytest.mark.parametrize(("section", "key"), ALL)
def test_every_option_has_a_description(section, key):
    description = loading.SECTIONS[section].model_fields[key].description
    assert description and len(description) >= 8
    assert not description.endswith(".")


@pytest.mark.parametrize("section", loading.SECTIONS)
def test_every_section_has_a_description_of_its_own(section):
    assert loading.SECTIONS[section].__doc__ not in (None, "", Section.__doc__)


def test_a_description_stands_nowhere_else_in_the_package():
    texts = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py") if path.name != "schema.py"}
    descriptions = [loading.SECTIONS[section].model_fields[key].description or "" for section, key in ALL]
    assert not [(d, path.name) for d in descriptions if len(d) > 25 for path, text in texts.items() if d in text]


def test_every_option_is_read_by_the_code():
    """An option that nothing reads would promise what does not happen. `rewards.decisive` reads solved_by."""
    read = {
        node.attr
        for path in PACKAGE.rglob("*.py") if path.name != "schema.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)
    }  # fmt: skip
    assert [f"{section}.{key}" for section, key in ALL if key not in read] == ["rewards.solved_by"]


def test_the_paper_is_the_default():
    """alpha 2, kappa 9 (its tau), w in [1, 1.4], both epsilons 0.2, temperature 1."""
    config = loading.load(overrides=MINIMAL)
    objective = config.objective
    assert (objective.weights, objective.weight.alpha, objective.weight.kappa) == ("offset", 2.0, 9.0)
    assert (objective.weight.low, objective.weight.high) == (1.0, 1.4)
    assert (objective.clip_low, objective.clip_high) == (0.2, 0.2)
    assert (objective.placement, objective.aggregation, objective.advantage) == ("surrogate", "sequence", "grpo")
    assert config.rollout.temperature == 1.0
    assert math.isclose(objective.beta, 0.0)


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        loading.load("demo").train.steps = 3


# -- options of older versions --------------------------------------------------------------------------------


def test_options_of_older_versions_are_ignored_at_their_old_default_and_else_refused():
    old = {name: default for name, (default, _) in loading.REMOVED.items()}
    settings = [f"{name}={loading.toml_line('x', value).partition(' = ')[2]}" for name, value in old.items()]
    assert loading.load(overrides=[*MINIMAL, *settings]) == loading.load(overrides=MINIMAL)
    assert not {name for name in old if name.split(".")[1] in loading.SECTIONS[name.split(".")[0]].model_fields}
    for name in old:
        [problem] = problems(f"{name}=0.125")
        assert problem.startswith(f"{name} = 0.125: ") and "\n" not in problem


def test_renamed_options_are_read_under_their_new_name(toml):
    file = toml("[objective]\nweights = 'linear'\nkappa = 5.0\nshare = 0.25\n[rewards]\nmust_stop = true\n")
    config = loading.load(None, file, [*MINIMAL, "objective.weight.low=0.5"])
    assert (config.objective.weight.kappa, config.objective.weight.a, config.objective.weight.low) == (5.0, 0.25, 0.5)
    assert config.rewards.truncated_max_zero
    assert loading.load(file=toml(loading.to_toml(config))) == config


def test_an_option_that_may_be_unset_is_unset_by_an_empty_value():
    assert loading.load(overrides=[*MINIMAL, "rollout.cache_mib=64", "rollout.cache_mib="]).rollout.cache_mib is None
    assert loading.load(overrides=[*MINIMAL, "data.answer="]).data.answer == ""


@pytest.mark.parametrize(
    ("written", "meant"),
    [("train.lr", "train.learning_rate"), ("model.group_size", "rollout.group_size"), ("train.stepz", "steps")],
)
def test_an_unknown_option_names_the_one_that_was_meant(written, meant):
    [problem] = problems(f"{written}=1")
    assert written in problem and f"'{meant}'" in problem


def test_the_function_that_decides_what_is_solved_must_be_one_of_them():
    functions = "rewards.functions={ math = 1.0, exact = 0.0 }"
    assert loading.load(overrides=[*MINIMAL, functions]).rewards.decisive == "math"
    assert loading.load(overrides=[*MINIMAL, functions, "rewards.solved_by=exact"]).rewards.decisive == "exact"
    [problem] = problems(functions, "rewards.solved_by=number")
    assert "solved_by" in problem and "number" in problem


def test_a_config_with_a_byte_order_mark_is_read_and_a_deep_one_is_one_line(tmp_path):
    (tmp_path / "bom.toml").write_bytes(b'\xef\xbb\xbf[model]\nname = "x"\n')
    assert loading.read_toml(tmp_path / "bom.toml") == {"model": {"name": "x"}}
    (tmp_path / "deep.toml").write_text("a = " + "[" * 10_000)
    (tmp_path / "long.toml").write_text("[train]\nsteps = " + "9" * 5_000)
    for name in ("deep.toml", "long.toml"):
        with pytest.raises(ConfigError, match=name):
            loading.read_toml(tmp_path / name)


@pytest.mark.parametrize(
    "change",
    ["rewards.seconds=1e308", "rollout.temperature=1e-300", "rollout.max_new_tokens=10000000000", "train.steps=1e30",
     "train.learning_rate=1e9", "rollout.group_size=100000", "train.steps=" + "9" * 5_000],
    ids=lambda change: change[:40],
)  # fmt: skip
def test_numbers_beyond_sense_are_one_message_that_names_the_option(change):
    with pytest.raises(ConfigError, match=change.partition("=")[0]):
        loading.load("demo", overrides=[change])


def test_a_value_that_no_parser_can_take_is_text():
    assert loading.load("demo", overrides=["data.system=" + "[" * 9_000]).data.system == "[" * 9_000
