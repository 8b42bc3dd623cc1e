"""Talking to the Hugging Face Hub: one place that fetches, and that says in one line what went wrong."""

from pathlib import Path

from lite_trgrpo.errors import HubError, first_line


def cached(name: str, revision: str | None) -> Path | None:
    """A Hub model's folder if it has been fetched before; nothing is asked of the network."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:  # not there, or not whole: the client has a class for each way, which differ between versions
        return None


def fetch(name: str, revision: str | None, patterns: list[str], option: str = "model.name") -> Path:
    """Files of a Hub repository -> its folder in the Hub's own cache, named by the resolved commit.

    `option` is the one that named it; `data.source` names a data set, every other a model or adapter.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    section, kind = option.partition(".")[0], "dataset" if option == "data.source" else "model"
    where = f"data set {name}" if kind == "dataset" else name
    where += f" (revision {revision})" if revision else ""
    # second copies of the same weights: those of some makers, and what `lite-trgrpo export` puts beside an adapter
    ignored = ["original/*", "consolidated*", "merged/*", "*.gguf"]
    try:
        return Path(
            snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns, ignore_patterns=ignored)
        )
    except HFValidationError as error:
        raise HubError(f"{option} {name!r} is no Hub id: {first_line(error)}") from None
    except GatedRepoError:
        raise HubError(
            f"{where} is gated: accept its terms on its Hub page, then type `hf auth login`, and run this again"
        ) from None
    except RevisionNotFoundError:
        raise HubError(f"{where}: the repository is there, the revision is not; change {section}.revision") from None
    except RepositoryNotFoundError:
        raise HubError(f"{where} is not on the Hub, or it is private: check the id, or type `hf auth login`") from None
    except Exception as error:  # whatever the client's transport raises: it differs between its versions
        if constants.HF_HUB_OFFLINE:
            raise HubError(
                f"{where} is not in the cache, or not whole, and HF_HUB_OFFLINE is set: unset it and run this again, "
                f"or give {option} a path"
            ) from None
        raise HubError(
            f"{where} could not be fetched: {first_line(error)}. Check the connection and run this again "
            f"(what is already there is kept), or give {option} a path"
        ) from None
