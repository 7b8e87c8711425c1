"""The hub as a place to write to: asks whether that may be done, creates the repository, sends files in one commit.

The token is the one of the hub's own login (``hf auth login``, ``HF_TOKEN``); this program never reads or stores one.
A repository shows all files of an upload or none. What arrived before an interruption is not sent again.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.errors import InputError, MoecoverError, arg

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOGIN = "hf auth login"
READ = "read"  # role of a token, or of a member of an organisation, that may not write
REPOSITORY = re.compile(r"(?=.{3,96}$)(?!.*(--|\.\.))\w[\w.-]*(?<![-.])/\w[\w.-]*(?<![-.])", re.ASCII)
WEIGHTS = (".safetensors", ".safetensors.index.json")


def check_access(repository: str, *, private: bool) -> None:
    """Refuse an upload that the hub would refuse, before anything is made for it; the repository is not created.

    Args:
        repository: ``owner/name``.
        private: whether nobody else may see it.

    Raises:
        InputError: no such name is possible, no login, a token or owner without the right to write, offline, or a
            repository that is public although ``private`` is asked for.
        MoecoverError: the hub does not answer.
    """
    from huggingface_hub import HfApi, constants, get_token

    if not REPOSITORY.fullmatch(repository):
        raise InputError(
            f"repository {repository!r}: give OWNER/NAME, of ASCII letters, digits, _, - and . (96 characters at most; "
            "- and . neither twice in a row nor first or last)"
        )
    owner = repository.partition("/")[0]
    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it, or run `moecover upload` later")
    if get_token() is None:
        raise InputError(f"not logged in to the hub. Run `{LOGIN}` with a token that may write, or set HF_TOKEN")
    api = HfApi()
    with explained(repository):
        _check_owner(owner, api.whoami())
        about = _about(api, repository)
    if private and about is not None and about.private is False:
        raise InputError(
            f"{arg('private')}: {repository} exists and is public. Choose another name, or change it on the hub"
        )


def _check_owner(owner: str, about: Mapping[str, Any]) -> None:
    """Refuse an owner for whom the token may not write.

    Args:
        owner: first part of the repository's id.
        about: what the hub says of the token.

    Raises:
        InputError: see above.
    """
    token = about.get("auth", {}).get("accessToken", {})
    if token.get("role") == READ:
        raise InputError(f"the token of your login may only read. Run `{LOGIN}` with one that may write")
    roles = {one["name"]: one.get("roleInOrg") for one in about.get("orgs", [])}
    scoped = [one.get("entity", {}).get("name") for one in token.get("fineGrained", {}).get("scoped", [])]
    if owner not in {about["name"], *roles, *scoped}:
        known = ", ".join([about["name"], *roles])
        raise InputError(f"{owner} is neither your account nor an organisation of yours on the hub: {known}")
    if roles.get(owner) == READ:
        raise InputError(f"your role in {owner} may only read. Ask for another one, or upload to {about['name']}")


def _about(api: HfApi, repository: str) -> Any:  # ModelInfo
    """What the hub says of a repository; None where it does not exist."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repository)
    except RepositoryNotFoundError:
        return None


def send(
    contents: Mapping[str, Path | bytes], repository: str, *, private: bool, weights: Collection[str], resume: str
) -> str:
    """Create the repository where it does not exist and commit files to it; unchanged ones are not sent.

    Args:
        contents: files or their bytes, by name in the repository.
        repository: ``owner/name``.
        private: create it so that nobody else sees it.
        weights: names of safetensors files that alone may be there; empty to look for none.
        resume: the command that goes on, for messages.

    Returns:
        The address of the repository.

    Raises:
        InputError: the hub refuses the upload, or the repository holds other weights.
        MoecoverError: the connection was lost, or the hub failed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with explained(repository, f"What arrived is not sent again: {resume}"):
        url = str(api.create_repo(repository, private=True if private else None, exist_ok=True))
        there = [one.rfilename for one in api.model_info(repository).siblings or ()]
        if weights and (other := [name for name in there if name.endswith(WEIGHTS) and name not in weights]):
            raise InputError(
                f"{repository} holds other weights, {other[0]} among them, which would be read in place of these. Give "
                "another repository, or delete them there"
            )
        additions = [CommitOperationAdd(name, one) for name, one in contents.items()]
        api.create_commit(repository, additions, commit_message="Upload with moecover")
    return url


@contextlib.contextmanager
def explained(repository: str, remedy: str = "Check the connection, and run the same command again") -> Iterator[None]:
    """Turn what the hub's client raises within the block into one line with the next step."""
    try:
        yield
    except MoecoverError:
        raise
    except Exception as error:  # the client raises a dozen unrelated types
        raise _explanation(repository, error, remedy) from error


def _explanation(repository: str, error: Exception, remedy: str) -> MoecoverError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = _line(getattr(error, "server_message", None) or error)
    if status == 401:
        return InputError(f"the hub does not accept the token. Run `{LOGIN}` with one that is valid and may write")
    if status in (402, 403):
        return InputError(
            f"{repository}: the hub refuses to write ({reason}). Run `{LOGIN}` with a token that may, or give another "
            "owner"
        )
    if isinstance(error, ValueError) and "README.md" in reason:
        return InputError(f"{repository}: the hub refuses the head of the model card: {reason}. Correct it in the card")
    return MoecoverError(f"{repository}: the hub did not do it: {reason}. {remedy}")


def _line(error: object) -> str:
    """An error in one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200].rstrip(".")
