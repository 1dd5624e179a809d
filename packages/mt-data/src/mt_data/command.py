"""`mt data`: its commands in one group. Only `mt` imports this; heavy imports are made where they are used."""

import typer

from mt_core.cli.options import MultiValueCommand
from mt_data.corpus.command import openwebtext, wikipedia
from mt_data.preprocess.command import preprocess
from mt_data.tools.command import blend, check, inspect, merge, plan, train_tokenizer

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
app.command("train-tokenizer", cls=MultiValueCommand)(train_tokenizer)
