"""Command-line options that several commands share, as dataclasses; only `mt` imports this module.

A command takes the dataclasses as parameters; `mt_core.cli.options.expand_options` makes an option of each field.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from mt_core.cli.completion import complete_names
from mt_core.cli.options import PluginValues
from mt_core.errors import MtError

if TYPE_CHECKING:
    from mt_data.config import TokenizerConfig


Beginning = Annotated[
    bool | None,
    Option(
        "--bos/--no-bos",
        help="Begin every text with the beginning-of-sequence token, or never; as the tokenizer says if not given.",
        show_default=False,
    ),
]
"""Whether texts begin with a token of their own, for commands that read texts."""


LoadDir = Annotated[Path, "Checkpoint: a run, a step or a Hugging Face directory."]
BatchSize = Annotated[
    int | None, Option(min=1, help="Sequences in a batch; changes the speed only.", show_default=False)
]
SeqLength = Annotated[
    int | None,
    Option(min=1, help="Longest input in tokens; at most what the run trained at if not given.", show_default=False),
]
Output = Annotated[
    Path | None, "Also write the results to this JSON file, and the samples of each task to a .jsonl beside it."
]
"""Where results go, for commands that evaluate."""


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How a checkpoint becomes a model."""

    loader: Annotated[
        str | None,
        Option(
            help="Checkpoint format; found from the directory if not given.",
            autocompletion=complete_names("ckpt-loader"),
        ),
    ] = None
    loader_options: PluginValues = field(default_factory=dict)
    device: Annotated[
        str,
        Option(
            help="auto, cpu or cuda; auto is a GPU if there is one.", autocompletion=lambda: ["auto", "cpu", "cuda"]
        ),
    ] = "auto"
    dtype: Annotated[
        str, Option(help="fp32 or bf16, of weights and activations.", autocompletion=lambda: ["fp32", "bf16"])
    ] = "fp32"


@dataclass(frozen=True, slots=True)
class RankOptions:
    """How many ranks share the model, each on a device of this machine."""

    nproc: Annotated[int, Option(min=1, help="Ranks to start on this machine, one a device, that share the model.")] = 1
    pipeline: Annotated[
        int, Option(min=1, help="Stages of layers that the ranks are divided into; those of a stage share matrices.")
    ] = 1

    def __post_init__(self) -> None:
        if self.nproc % self.pipeline:
            allowed = f"a divisor of --nproc {self.nproc}; the ranks of each stage share its matrices"
            raise MtError("--pipeline", f"{self.pipeline}", allowed)

    @property
    def tensor(self) -> int:
        """Ranks of each stage."""
        return self.nproc // self.pipeline


@dataclass(frozen=True, slots=True)
class TokenizerOptions:
    """Another source for the tokenizer than the checkpoint."""

    tokenizer_type: Annotated[
        str | None,
        Option(help="Tokenizer to use; the checkpoint's own if not given.", autocompletion=complete_names("tokenizer")),
    ] = None
    vocab_file: Annotated[Path | None, "vocab.json of GPT2BPETokenizer."] = None
    merge_file: Annotated[Path | None, "merges.txt of GPT2BPETokenizer."] = None
    tokenizer_model: Annotated[Path | None, "tokenizer.json or its directory."] = None

    def config(self) -> "TokenizerConfig | None":
        """The tokenizer that the options name, its kind found from the files if not given; None if they name none."""
        from mt_data.options import make_tokenizer_config

        given = {name: value for name, value in asdict(self).items() if value is not None}
        return make_tokenizer_config(given) if given else None


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """What every evaluation task on texts takes."""

    load_dir: LoadDir
    data: Annotated[Path, "The file to evaluate on; .gz, .zst and .bz2 are decompressed."]
    seq_length: SeqLength = None
    batch_size: BatchSize = None
    bos: Beginning = None
    output: Output = None
