"""`mt data merge`. Only `mt` imports this; heavy imports stand where they are used."""

from typing import Annotated

import typer

from mt_data.options import print_rows


def merge(
    input: Annotated[
        list[str],
        typer.Option("--input", help="A directory of .bin/.idx pairs, their prefixes, or a quoted glob of them."),
    ],
    output_prefix: Annotated[str, typer.Option(help="The new pair is PREFIX.bin and PREFIX.idx.")],
    multimodal: Annotated[bool, typer.Option("--multimodal", help="The pairs hold a mode for each sequence.")] = False,
) -> None:
    """Join .bin/.idx pairs: those of a directory or a glob in sorted order, others in the order given."""
    from mt_data.merge.find import find_pairs
    from mt_data.tools.merge import merge as join

    merged = join(find_pairs(input), output_prefix, multimodal=multimodal)
    print_rows(
        {
            "merged": f"{merged.pairs:,} pairs",
            output_prefix: f"{merged.tokens:,} tokens, {merged.sequences:,} sequences, {merged.documents:,} documents",
        }
    )
