"""What a repository on the hub is called, which of its files are a checkpoint, and what goes wrong on the way there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mt_core.errors import MtError

WANTED = ("*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model")
UNWANTED = ("*/*", "consolidated*", "*.index.fp16.json")
"""Folders hold the same weights for other programs, as do consolidated files."""


@dataclass(frozen=True)
class Repository:
    """A repository, and a branch, tag or commit of it."""

    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Repository":
        """ "org/name" or "org/name@revision"."""
        name, at, revision = text.partition("@")
        if name.count("/") != 1 or not all(name.split("/")) or (at and not revision):
            raise MtError(f"hub:{text}", "is no name of a repository", "give org/name, or org/name@revision")
        return cls(name, revision or None)

    def __str__(self) -> str:
        return f"hub:{self.name}" + (f"@{self.revision}" if self.revision else "")


@contextmanager
def hub_errors(repository: Repository) -> Iterator[None]:
    """Turn what huggingface_hub raises into one `MtError` that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as err:
        raise MtError(str(repository), f"is no name of a repository ({err})", "give org/name") from err
    except errors.GatedRepoError as err:
        raise _hub_error(repository, "access to it must be granted", "ask for it on the hub's page") from err
    except errors.RevisionNotFoundError as err:
        raise _hub_error(repository, "no such revision", "give a branch, a tag or a commit of it") from err
    except errors.RepositoryNotFoundError as err:
        problem = "no such repository, or a private one"
        raise _hub_error(repository, problem, "check the name, or log in: hf auth login") from err
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as err:
        if isinstance(err.__cause__, errors.HfHubHTTPError):
            raise _refused(repository, err.__cause__) from err
        problem = "the hub cannot be reached, and the cache does not hold all of it"
        raise _hub_error(repository, problem, "check the network and HF_HUB_OFFLINE, then run this again") from err
    except errors.HfHubHTTPError as err:
        raise _refused(repository, err) from err
    except errors.HTTPError as err:  # pyright: ignore[reportPrivateImportUsage] (httpx's, or httpx2's since release 2)
        problem = f"the connection failed ({err})"
        raise _hub_error(repository, problem, "run this again: files that have arrived are not sent again") from err


def _refused(repository: Repository, err: Any) -> MtError:
    status = err.response.status_code if err.response is not None else None
    if status in (401, 403):
        return _hub_error(repository, "not allowed", "log in with a token that may do this: hf auth login")
    return _hub_error(repository, f"the hub answered {status}", "run this again later")


def _hub_error(repository: Repository, problem: str, allowed: str) -> MtError:
    return MtError(str(repository), " ".join(problem.split()), allowed)
