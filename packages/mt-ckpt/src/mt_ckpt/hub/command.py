"""`mt ckpt pull` and `push`."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add these commands to `mt ckpt`."""
    app.command()(pull)
    app.command()(push)


def pull(
    name: Annotated[str, typer.Argument(metavar="ORG/NAME[@REVISION]", help="A repository on the hub.")],
    directory: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
) -> None:
    """Fetch a checkpoint from the Hugging Face hub; files in its cache are not sent again and need no network.

    Example:
      mt ckpt pull HuggingFaceTB/SmolLM2-135M SmolLM2-135M
    """
    from mt_ckpt.hub.transfer import pull as run

    print(f"wrote {directory}: {', '.join(run(name, directory))}")


def push(
    directory: Annotated[Path, typer.Argument(help="A checkpoint in Hugging Face format.")],
    name: Annotated[str, typer.Argument(metavar="ORG/NAME", help="A repository on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is for you alone.")] = False,
    message: Annotated[str | None, typer.Option(help="Describes the commit.")] = None,
) -> None:
    """Publish a checkpoint on the Hugging Face hub; it is checked first.

    Example:
      mt ckpt push hf my-org/my-model --private
    """
    from mt_ckpt.hub.transfer import push as run

    print(f"pushed {directory}: {run(directory, name, private=private, message=message)}")
