"""`mt data`: its commands in one group. Only `mt` imports this; heavy imports are made where they are used."""

from pathlib import Path
from typing import Annotated

import typer

from mt_core.cli.options import MultiValueCommand
from mt_data.corpus.command import openwebtext, wikipedia
from mt_data.options import print_rows
from mt_data.preprocess.command import preprocess
from mt_data.tools.command import blend, check, inspect, merge, plan

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Prepare and inspect training data.",
)
app.command("preprocess", cls=MultiValueCommand)(preprocess)
app.command("merge", cls=MultiValueCommand)(merge)
app.command("check")(check)
app.command("blend", cls=MultiValueCommand)(blend)
app.command("plan")(plan)
app.command("inspect")(inspect)
app.add_typer(openwebtext, name="openwebtext")
app.add_typer(wikipedia, name="wikipedia")

Inputs = Annotated[list[Path], typer.Option("--input", help="One or more files; .gz and .zst are read as they are.")]


@app.command("train-tokenizer", cls=MultiValueCommand)
def train_tokenizer_command(
    input: Inputs,
    output_dir: Annotated[Path, typer.Option(help="A new folder for vocab.json, merges.txt and tokenizer.json.")],
    vocab_size: Annotated[int, typer.Option(help="Ids, the end of document included.")],
    json_key: Annotated[str, typer.Option(help="Key of the text in .jsonl files.")] = "text",
) -> None:
    """Train a byte-level BPE tokenizer on JSON lines or plain text.

    Example:
      mt data train-tokenizer --input text.jsonl --vocab-size 8000 --output-dir tokenizer
    """
    from mt_data.tokenizers.train import train_tokenizer

    tokenizer = train_tokenizer(input, output_dir, vocab_size=vocab_size, key=json_key)
    print_rows({"tokenizer": str(output_dir), "vocabulary": f"{tokenizer.vocab_size:,}", "eod": str(tokenizer.eod)})
