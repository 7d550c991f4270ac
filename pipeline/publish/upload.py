"""Uploads a folder to a hub as one commit, and reports failures in one line."""

import contextlib
import os
from collections.abc import Iterator
from typing import Literal

from pipeline.core.files.foreign import first_line
from pipeline.core.records import ConfigError, InputError
from training.weights.hub.remote import endpoint, is_offline

Kind = Literal["model", "dataset"]


def check_target(repo: str) -> None:
    """Check that `repo` is OWNER/NAME and that uploads are allowed.

    Raises:
        ConfigError: if it is not, or the hub is offline.
    """
    from huggingface_hub import errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except errors.HFValidationError as error:
        raise ConfigError(f"{repo}: not an id of a hub ({first_line(error)}): give OWNER/NAME") from None
    if repo.count("/") != 1:
        raise ConfigError(f"{repo}: has no owner: give OWNER/NAME")


def upload(folder: str, repo: str, kind: Kind, message: str, *, private: bool) -> str:
    """Upload all files of a folder and make the repository if necessary. Return the commit's address.

    The token comes from `hf auth login` or HF_TOKEN.

    Raises:
        InputError: if the hub does not answer or refuses the upload.
    """
    from huggingface_hub import HfApi

    if is_offline():
        raise ConfigError(f"{repo}: HF_HUB_OFFLINE is set: unset it, or write a folder with --dry-run FOLDER")
    with _telling(repo):
        api = HfApi(endpoint=endpoint())
        api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, repo_type=kind, folder_path=os.path.abspath(folder), commit_message=message
        )
    return str(commit.commit_url)


@contextlib.contextmanager
def _telling(repo: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        where = f"{repo}: {endpoint()} answers with status {status}"
        if status in (401, 403):
            raise InputError(
                f"{where}: run `hf auth login` or set HF_TOKEN, with a token that may write to this owner"
            ) from None
        said = f" ({error.server_message.splitlines()[0]})" if error.server_message else ""
        raise InputError(f"{where}{said}: correct that, or try again later") from None
    except ValueError as error:  # the hub refuses the card's metadata
        raise InputError(f"{repo}: {endpoint()} refuses the card: {first_line(error)}") from None
    except OSError as error:
        raise InputError(f"{repo}: {endpoint()} cannot be reached: {first_line(error)}") from None
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):  # huggingface_hub's client
            raise
        raise InputError(f"{repo}: {endpoint()} cannot be reached: {first_line(error)}") from None
