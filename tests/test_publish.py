"""The push, with the Hub's real client over HTTP against a small Hub on this machine; and the card."""

import html
import json

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard, constants
from typer.testing import CliRunner

from lite_trgrpo.cli import app
from lite_trgrpo.errors import HubError
from lite_trgrpo.export import card, export, hub
from lite_trgrpo.export.verify import answer
from lite_trgrpo.text import sha256
from tests.hub_uploads import TOKEN, USER, UploadServer
from tests.runs import BASE, finished_run

REPO = f"{USER}/sums"
WANTED = export.Wanted()


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """-> a run with an export that has passed (its scores are made up), and the run's config."""
    run, config = finished_run(tmp_path_factory.mktemp("run"))
    folder = export.folder_of(run)
    folder.mkdir()
    export.write_adapter(run, export.locate(config.model.model_copy(update={"upstream": BASE})), folder)
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6}
    scores = {"base": estimate, "pass@1": estimate, "gain": estimate}
    files = {path.name: sha256(path) for path in folder.iterdir()}
    report = {"base": BASE, "revision": None, "quantization": "none", "rows": 8, "held_out": True, "trained": scores,
              "forms": {}, "files": files}  # fmt: skip
    (folder / "check.json").write_text(json.dumps(report))
    return run, config


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The client of this process talks to the small Hub; Xet, which is no HTTP of the Hub's, is off."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with UploadServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        address = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        huggingface_hub.close_session()
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def push(checked, server):
    """`push(repo, private)` -> what was said."""
    run, config = checked

    def call(repo: str = REPO, private: bool = False) -> list[str]:
        said: list[str] = []
        hub.deliver(run, config, WANTED, repo, private, said.append)
        return said

    return call


def on_disk(run) -> dict[str, bytes]:
    folder = export.folder_of(run)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- the push -----------------------------------------------------------------------------------------------


def test_files_arrive_byte_by_byte_and_the_token_appears_nowhere(checked, server, push, capsys):
    said = push()
    files = server.files(REPO)
    del files[".gitattributes"]
    assert files == on_disk(checked[0])
    assert {"README.md", "adapter_config.json", export.WEIGHTS, "check.json"} <= files.keys()
    assert REPO not in server.private
    assert said[-1] == f"pushed to {server.url}/{REPO}"
    printed = "".join([*said, *capsys.readouterr()])
    assert TOKEN not in printed and not any(TOKEN.encode() in body for body in server.bodies)
    assert not [name for name, content in files.items() if TOKEN.encode() in content]
    assert not any(TOKEN in request for request in server.requests)


def test_a_second_push_sends_only_what_changed_and_takes_away_what_is_gone(checked, server, push):
    push()
    server.add(REPO, server.files(REPO) | {"old-Q8_0.gguf": b"of an earlier export", "notes.md": b"the person's own"})
    server.requests.clear()
    push()
    assert "old-Q8_0.gguf" not in server.files(REPO) and server.files(REPO)["notes.md"] == b"the person's own"
    assert not any(request.startswith("PUT") for request in server.requests)


@pytest.mark.parametrize("lost", ["PUT", "preupload"])
def test_a_connection_lost_in_mid_upload_is_tried_again(checked, server, push, lost):
    server.drops[lost] = 1
    push()
    assert server.drops[lost] == 0
    assert server.files(REPO)[export.WEIGHTS] == on_disk(checked[0])[export.WEIGHTS]


def test_a_connection_lost_at_the_commit_says_that_the_export_is_kept(server, push):
    server.drops["commit"] = 99
    with pytest.raises(HubError, match=rf"{REPO} could not be pushed: .* run this again: the export is kept"):
        push()
    server.drops["commit"] = 0
    server.requests.clear()
    push()  # what had arrived is not sent again
    assert not any(request.startswith("PUT") for request in server.requests)


@pytest.mark.parametrize("token", ["hf_wrong", None])
def test_a_refused_login_is_known_before_anything_is_exported(monkeypatch, checked, server, push, token):
    monkeypatch.setattr(export, "existing", lambda *_: pytest.fail("looked at the export first"))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="type `hf auth login` with a token that may write"):
        push()
    assert not server.repos


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("eve/sums", "your login may not write to eve/sums"),
        ("no id at all", "'no id at all' is no Hub id such as USER/REPO"),
        ("sums", "'sums' is no Hub id such as USER/REPO"),
        ("../..", r"'\.\./\.\.' is no Hub id"),
    ],
)
def test_a_repository_that_cannot_be_ones_own(push, repo, message):
    with pytest.raises(HubError, match=message):
        push(repo)


def test_a_private_repository_is_made_private_and_a_public_one_is_refused(server, push):
    push(private=True)
    assert REPO in server.private
    server.private.clear()
    with pytest.raises(HubError, match="is there and public, and --private was asked for"):
        push(private=True)


def test_a_repository_that_holds_something_else_is_left_alone(server, push):
    theirs = {"model.safetensors": b"another model", "README.md": b"---\ntags: [mine]\n---\n"}
    server.add(REPO, theirs)
    with pytest.raises(HubError, match=r"holds something else \(model\.safetensors\): name another repository"):
        push()
    assert server.files(REPO) == theirs


def test_without_a_hub_or_offline_it_is_one_line(monkeypatch, server, push):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError, match=r"the Hub cannot be reached: .*Connection refused"):
        push()


def test_a_base_that_is_no_hub_id_cannot_be_pushed(checked):
    run, config = checked
    local = config.model_copy(update={"model": config.model.model_copy(update={"upstream": None})})
    with pytest.raises(HubError, match="Others cannot load that base: set upstream"):
        hub.deliver(run, local, WANTED, REPO, False, print)


# -- the card -----------------------------------------------------------------------------------------------


def card_of(run, config, **more) -> str:
    given = {"report": None, "repo": REPO, "files": ["curve.png"], "licence": "apache-2.0"} | more
    return card.write(run, config, *given.values())


def test_the_metadata_is_read_by_the_hubs_own_client(checked):
    data = ModelCard(card_of(*checked)).data
    assert {"lite-trgrpo", "tr-grpo", "grpo", "peft"} <= set(data.tags)
    assert (data.base_model, data.license, data.library_name) == (BASE, "apache-2.0", "peft")
    assert [(result.metric_type, result.metric_value) for result in data.eval_results] == [
        ("pass@1", 0.5),
        ("pass@4", 0.5),
    ]
    assert "model-index" in yaml.safe_load(card_of(*checked).split("---")[1])


def test_the_card_says_what_a_reader_needs(checked):
    run, config = checked
    report = json.loads((export.folder_of(run) / "check.json").read_text())
    text = card_of(run, config, report=report, files=["curve.png", "merged/config.json", "run-Q8_0.gguf"])
    wanted = [
        "arxiv.org/abs/2511.00066", f"huggingface.co/{BASE}", "`exact` (weight 1)", "24 prompts, 8 more held out",
        "| pass@1 | 0.000 [0.000, 0.000] | 0.500 [0.400, 0.600] |", "gain in pass@1", "](curve.png)", "## Samples",
        f'PeftModel.from_pretrained(base, "{REPO}")', "--enable-lora --max-lora-rank 8", 'subfolder="merged"',
        "ollama create sums", f"--adapter {REPO}", "adapter, as in training", "train.learning_rate = ",
    ]  # fmt: skip
    assert [part for part in wanted if part not in text] == []


def test_no_folder_and_no_secret_of_this_machine_is_on_the_card(checked):
    run, config = checked
    secret = config.rollout.model_copy()
    rewards = config.rewards.model_copy(update={"functions": {f"/home/ada/{TOKEN}.py:right": 1.0}})
    text = card_of(run, config.model_copy(update={"rollout": secret, "rewards": rewards}))
    assert TOKEN not in text and "(removed: it looks like a secret)" in text
    assert str(run.folder.parent) not in text and "/home/ada" not in text
    assert "data.jsonl" in text


@pytest.mark.parametrize(
    "secret",
    [
        "hf_abcdefghijklmnopqrstuvwxyz012345", "ghp_abcdefghijklmnopqrstuvwxyz0123", "AKIAABCDEFGHIJKLMNOP",
        "https://ada:correct-horse@example.com/data", "postgresql://ada:p@ss@host/db",
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["answer", "prompt", "system", "setting"])
def test_a_secret_is_removed_wherever_it_stands_on_the_card(checked, monkeypatch, secret, place):
    """An underscore becomes an entity in a table: the filter once ran after that and saw no secret."""
    run, config = checked
    lines = run.evaluations()
    for line in lines:
        line["rows"][0] |= {"greedy": f"it is {secret} ok" if place == "answer" else "42"}
        line["rows"][0] |= {"prompt": f"it is {secret} ok" if place == "prompt" else "6 * 7"}
    monkeypatch.setattr(type(run), "evaluations", lambda self: lines)
    if place == "system":
        config = config.changed("data", system=f"Use {secret} please")
    if place == "setting":
        config = config.changed("model", lora_targets=[secret])
    text = html.unescape(card_of(run, config))
    private = "correct-horse" if "horse" in secret else "p@ss" if "p@ss" in secret else secret
    assert private not in text and "it looks like a secret" in text


def test_model_text_cannot_break_the_table(checked, monkeypatch):
    """Model text is data: a pipe, a tag, a fence or a link in it stays text."""
    from markdown_it import MarkdownIt

    run, config = checked
    lines = run.evaluations()
    answer = "a | b\n```x``` <script>alert(1)</script> [go](https://evil.example) **bold**"
    for line in lines:
        line["rows"][0]["greedy"] = answer
    monkeypatch.setattr(type(run), "evaluations", lambda self: lines)
    body = card_of(run, config).split("## Samples")[1].split("## How")[0]
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    assert page.count("<tr>") == 1 + card.SAMPLES and page.count("<td>") == 4 * card.SAMPLES
    assert "<script>" not in page and "href" not in page and "<strong>" not in page and "<code>" not in page


def test_a_dry_run_shows_the_card_and_the_files_and_writes_nothing(checked):
    run, _ = checked
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    done = CliRunner().invoke(app, ["export", str(run.folder), "--merge", "--gguf", "--push", REPO, "--dry-run"])
    assert done.exit_code == 0, done.stderr
    files, _, text = done.stdout.partition("\n\n")
    assert {"README.md", export.WEIGHTS, "run-Q8_0.gguf", "Modelfile"} <= set(files.splitlines())
    assert text.startswith("---\n") and "# sums" in text
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before


def test_a_licence_that_no_preset_states_is_asked_for(checked, server):
    _, config = checked
    assert hub.licence(config, "HuggingFaceTB/SmolLM2-135M-Instruct") == "apache-2.0"
    assert hub.licence(config, "not/there") == "unknown"
    server.add("some/base", {"README.md": b"---\nlicense: mit\n---\n"})
    assert hub.licence(config, "some/base") == "mit"
    assert not any("SmolLM2" in request for request in server.requests)


def test_the_pushed_adapter_is_loaded_by_its_hub_id(checked, server, push, tmp_path, monkeypatch):
    """Continue from an adapter: what was pushed answers as the run did; merged weights beside it are not fetched."""
    run, config = checked
    push()
    server.add(REPO, server.files(REPO) | {"merged/model.safetensors": b"gigabytes"})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = answer(config.changed("model", adapter=REPO), None, None)
    assert found.ids == [row["ids"] for row in run.evaluations()[-1]["rows"]]
    assert not any("resolve" in request and "merged" in request for request in server.requests)
