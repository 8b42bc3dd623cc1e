"""The steps of `lite-trgrpo export`: make and verify the export, write its card, upload it to the Hugging Face Hub.

Login and token are the Hub client's: nothing here reads, keeps or shows them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lite_trgrpo.config.loading import HUB_ID, is_hub_id
from lite_trgrpo.config.schema import Config
from lite_trgrpo.errors import HubError, first_line
from lite_trgrpo.export import card, export
from lite_trgrpo.report import figures
from lite_trgrpo.store.run import Run

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Say = Callable[[str], None]
OURS = ["*.safetensors", "*.gguf", "merged/*", "Modelfile", "curve.png"]  # of an earlier export, if it is gone now


def deliver(
    run: Run, config: Config, wanted: export.Wanted, repo: str | None, private: bool, say: Say
) -> export.Report:
    """Export, unless that is done already; write the card; push where a repository is named -> the check's report."""
    _must_be_id(repo)
    if repo and not is_hub_id(base := config.model.upstream or config.model.name):
        raise HubError(
            f'the base {base} is no Hub id. Others cannot load that base: set upstream = "USER/MODEL" under [model] '
            f"in {run.folder / 'config.toml'}, or give no --push"
        )
    api = _client(repo, private) if repo else None  # a login that is refused should not cost an hour
    report = export.existing(run, wanted)
    if report is None:
        report = export.export(run, config, wanted, say)
    else:
        say("this adapter is exported and checked already")
    folder = export.folder_of(run)
    if run.metrics():
        figures.training(run.metrics(), folder / "curve.png")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    text = card.write(run, config, report, repo, files, licence(config, report["base"]))
    (folder / "README.md").write_text(text, encoding="utf-8")
    say(f"exported into {folder}")
    if api is not None and repo is not None:
        _push(api, folder, repo, private)
        say(f"pushed to {api.endpoint}/{repo}")
    return report


def preview(run: Run, config: Config, wanted: export.Wanted, repo: str | None) -> tuple[list[str], str]:
    """-> the names of the files and the card, as they would be; nothing is written or sent."""
    _must_be_id(repo)
    report = export.existing(run, wanted)
    files = {"README.md", "adapter_config.json", export.WEIGHTS, "check.json", *(report["files"] if report else ())}
    if run.metrics():
        files.add("curve.png")
    if wanted.gguf:
        files |= {export.gguf_name(run, wanted.gguf), "Modelfile"}
    if wanted.merged and report is None:
        files.add("merged/model.safetensors, config and tokenizer")
    base = config.model.upstream or config.model.name
    return sorted(files), card.write(run, config, report, repo, sorted(files), licence(config, base))


def _must_be_id(repo: str | None) -> None:
    if repo is not None and HUB_ID.fullmatch(repo) is None:
        raise HubError(f"--push {repo!r} is no Hub id such as USER/REPO")


def licence(config: Config, base: str) -> str:
    """Licence of the base: as a preset states it, else as its page on the Hub does, else `unknown`."""
    if (known := card.base_licence(config, base)) is not None:
        return known
    from huggingface_hub import HfApi

    try:
        data = HfApi().model_info(base, timeout=10).card_data
    except Exception:  # not there, no connection, offline: the card says that it is not known
        return "unknown"
    return str(data.license) if data is not None and data.license else "unknown"


# -- the Hub ------------------------------------------------------------------------------------------------


def _client(repo: str, private: bool) -> "HfApi":
    """Logged in and allowed to go on, as far as that shows before the upload. Raises HubError."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import disable_progress_bars, logging

    if constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it and run this again")
    disable_progress_bars()
    logging.set_verbosity_error()  # its warnings hold the addresses of uploads, which are signed
    api = HfApi()
    try:
        api.whoami()
        _is_ours(api, repo, private)
    except HubError:
        raise
    except Exception as error:  # whatever the client's transport raises: it differs between its versions
        _known(error, repo)
        raise HubError(f"the Hub cannot be reached: {_said(error)}. Check the connection and run this again") from None
    return api


def _is_ours(api: "HfApi", repo: str, private: bool) -> bool:
    """Whether the repository is there. Refused where it holds something else, or is public against `private`."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        return False
    if private and not info.private:
        raise HubError(
            f"{repo} is there and public, and --private was asked for: change its settings on the Hub, or name another"
        )
    files = {entry.rfilename for entry in info.siblings or []} - {".gitattributes", "README.md"}
    if files and card.TAGS[0] not in (info.tags or []):
        raise HubError(f"{repo} is there and holds something else ({min(files)}): name another repository")
    return True


def _push(api: "HfApi", folder: Path, repo: str, private: bool) -> None:
    """The folder into the repository, made if it is not there, as one commit. Raises HubError."""
    try:
        if not _is_ours(api, repo, private):
            api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, delete_patterns=OURS, commit_message="Export of lite-trgrpo"
        )
    except HubError:
        raise
    except Exception as error:
        _known(error, repo)
        raise HubError(
            f"{repo} could not be pushed: {_said(error)}. Check the connection and run this again: the export is kept, "
            "and what has arrived is not sent again"
        ) from None


def _known(error: Exception, repo: str) -> None:
    """Raises HubError where trying again cannot help."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    if isinstance(error, HFValidationError):
        raise HubError(f"--push {repo!r} is no Hub id: {first_line(error)}") from None
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        raise HubError(
            "the Hub refuses the login, or there is none: type `hf auth login` with a token that may write"
        ) from None
    if status == 403:
        raise HubError(f"your login may not write to {repo}: type `hf auth login` with a token that may") from None
    if 400 <= status < 500 and status not in (408, 409, 429):
        raise HubError(f"the Hub refuses {repo}: {_said(error)}") from None


def _said(error: BaseException) -> str:
    """The innermost cause: the client wraps a lost connection in `Error while uploading`."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
