"""Options of `mt task detoxify`, as dataclasses; only `mt` imports this module."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from typer import Option

from mt_core.cli.completion import complete_names
from mt_core.cli.options import CheckpointCommand, PluginCommand, PluginValues
from mt_core.plugins import Kind
from mt_eval.options import Beginning, ModelOptions, RankOptions, TokenizerOptions

if TYPE_CHECKING:
    from mt_core.contracts import ToxicityScorer
    from mt_eval.detoxify.continuations import TextSource

SCORER: Kind = "toxicity-scorer"
LONGEST = 1000
"""Tokens of a text if no number is given."""


class ScorerCommand(PluginCommand):
    """A command that takes the options of its scorer."""

    kinds: ClassVar[Mapping[str, Kind]] = {"scorer": SCORER}


class EvaluateCommand(CheckpointCommand):
    """A command that takes the options of its checkpoint's loader and of its scorer."""

    kinds: ClassVar[Mapping[str, Kind]] = {"loader": "ckpt-loader", "scorer": SCORER}


@dataclass(frozen=True, slots=True)
class ScorerOptions:
    """What says how toxic a text is."""

    scorer: Annotated[
        str, Option(help="perspective asks a server; local needs none.", autocompletion=complete_names(SCORER))
    ] = "local"
    api_key: Annotated[
        str,
        Option(
            envvar="PERSPECTIVE_API_KEY",
            help="Key of the scorer's server; better in the variable, as others see command lines.",
            show_default=False,
        ),
    ] = ""
    cache: Annotated[Path | None, "File of scores that are known, by the hash of their text; it is added to."] = None
    scorer_options: PluginValues = field(default_factory=dict)

    def open(self) -> "ToxicityScorer":
        """The scorer with those of the options that are its own."""
        from mt_core.plugin_options import convert_values, read_options
        from mt_core.plugins import component

        target = component(SCORER, self.scorer)
        return target(self.api_key, **convert_values(self.scorer_options, read_options(target)))

    def strip(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of the checkpoint's loader, among which a command line has those of the scorer too."""
        from mt_core.plugin_options import read_options
        from mt_core.plugins import component

        mine = read_options(component(SCORER, self.scorer))
        return {name: value for name, value in options.items() if name not in mine}


@dataclass(frozen=True, slots=True)
class DrawOptions:
    """How texts are drawn."""

    temperature: Annotated[float, "Logits are divided by this; above 0."] = 1.0
    top_k: Annotated[int, "Draw from this many likeliest tokens; 0 is off."] = 0
    top_p: Annotated[float, "Draw from the likeliest tokens that reach this probability; 0 is off."] = 0.9
    seed: Annotated[int, "Seed of the draws; equal seeds give equal texts."] = 0
    batch_size: Annotated[int, Option(min=1, help="Texts drawn together; changes the speed only.")] = 32
    cache_gib: Annotated[float, "Memory of the key/value cache in GiB; more lets more texts be drawn together."] = 1.0
    bos: Beginning = None

    def open(
        self,
        load_dir: Path,
        model: ModelOptions,
        ranks: RankOptions,
        tokenizer: TokenizerOptions,
        max_new_tokens: int | None,
    ) -> "TextSource":
        """The checkpoint as a source of texts; without `max_new_tokens` of `LONGEST`, or what the run trained at."""
        from mt_eval.detoxify.continuations import Drawing, TextSource
        from mt_eval.encoding import TextEncoder
        from mt_eval.generation.sampling import SamplingOptions
        from mt_eval.load import Checkpoint, check_generates, load_tokenizer
        from mt_eval.tasks.evaluation import choose_seq_length

        sampling = SamplingOptions(self.temperature, self.top_k, self.top_p)
        checkpoint = Checkpoint.open(load_dir, model.loader, model.loader_options)
        check_generates(checkpoint)
        encoder = TextEncoder.create(load_tokenizer(checkpoint, tokenizer.config()), bos=self.bos)
        room = choose_seq_length(checkpoint, None)[0] - len(encoder.encode(""))
        drawing = Drawing(max_new_tokens or max(1, min(LONGEST, room)), sampling, self.seed, self.batch_size)
        return TextSource(checkpoint, encoder, drawing, model, ranks, self.cache_gib)


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """Settings of the training; the defaults are Megatron's for 1.3 billion parameters."""

    steps: Annotated[int, Option(min=1, help="Optimizer steps.")] = 78
    micro_batch_size: Annotated[int, Option(min=1, help="Samples in a forward pass of one rank.")] = 4
    global_batch_size: Annotated[int, Option(min=1, help="Samples in an optimizer step, over all ranks.")] = 512
    lr: Annotated[float, "Learning rate, which stays."] = 2e-5
    weight_decay: Annotated[float, "Decay of matrices."] = 0.1
    seq_length: Annotated[
        int | None, Option(min=1, help="Tokens of a sample; those of the checkpoint's training if not given.")
    ] = None
    seed: Annotated[int, Option(min=0, help="Seed of the order of samples.")] = 1234
    nproc: Annotated[int, Option(min=1, help="Ranks to start on this machine, one a device.")] = 1
    overrides: Annotated[
        list[str] | None, Option("--set", help="Any other setting of mt train: section.field=value.")
    ] = None
