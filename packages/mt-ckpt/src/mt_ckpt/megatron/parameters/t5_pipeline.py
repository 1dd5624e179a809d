"""T5 on several pipeline stages: the first ones hold its encoder, the others its decoder.

Megatron 0.8 to 0.11 have --encoder-pipeline-model-parallel-size, and number the encoder's stages before those that
--pipeline-model-parallel-size counts. The old classes of earlier releases count all stages there, and say with
--pipeline-model-parallel-split-rank which is the decoder's first. Later releases have an argument for neither.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mt_ckpt.megatron.parameters.names import LAYER
from mt_ckpt.megatron.parameters.table import stacks
from mt_core.errors import Problem
from mt_models.config import T5Config, TransformerConfig

OPTION = "--target-encoder-pipeline-parallel-size"
UNUSED: Mapping[str, tuple[str, ...]] = {
    "encoder": ("output_layer.", "lm_head.", "decoder_relative_pos_emb."),
    "decoder": ("encoder_relative_pos_emb.",),
}
"""What Megatron stores on the stages of a stack, and neither computes with there nor trains."""


def fitting_splits(config: T5Config, pipeline: int) -> list[int]:
    """The numbers of stages, out of so many, that an encoder can have so that stages of a stack have equal layers."""
    even = (e for e in range(1, pipeline) if not config.layers % e and not config.decoder_layers % (pipeline - e))
    return list(even)


def encoder_stages(config: TransformerConfig, pipeline: int, given: int | None) -> int:
    """The stages of a T5's encoder: as given, or so that the fullest stage has the fewest layers; 0 if none fit."""
    if given is not None or config.kind != "t5":
        return given or 0
    fullest = {
        e: max(config.layers // e, config.decoder_layers // (pipeline - e)) for e in fitting_splits(config, pipeline)
    }
    return min(fullest, key=lambda e: fullest[e], default=0)


def spans(config: TransformerConfig, pipeline: int, encoder: int) -> dict[str, range]:
    """The stages of every stack: all, but for a T5 whose encoder has stages of its own."""
    apart = {"encoder": range(encoder), "decoder": range(encoder, pipeline)}
    return {name: apart[name] if encoder else range(pipeline) for name in stacks(config)}


def split_errors(config: T5Config, pipeline: int, encoder: int, where: str) -> Iterator[Problem]:
    """Why a T5 cannot be cut so."""
    fitting = fitting_splits(config, pipeline)
    if encoder in fitting or (pipeline, encoder) == (1, 0):
        return
    on = f"{encoder} and {pipeline - encoder} stages" if encoder else f"{pipeline} stages"
    layers = f"{config.layers} layers of the encoder and {config.decoder_layers} of the decoder"
    if fitting:
        allowed = f"{OPTION} of {', '.join(map(str, fitting))}"
    else:
        counts = range(2, config.layers + config.decoder_layers + 1)
        allowed = ", ".join(str(count) for count in counts if fitting_splits(config, count))
        allowed = f"--target-pipeline-parallel-size of {allowed}"
    yield Problem(where, f"{layers} do not divide by {on}", allowed)


def declared_stages(args: Any) -> tuple[int, int]:
    """All pipeline stages that args tell of, and how many are the encoder's; 0, if they do not say."""
    get = vars(args).get
    apart = get("encoder_pipeline_model_parallel_size") or 0
    return (get("pipeline_model_parallel_size") or 1) + apart, apart or get("pipeline_model_parallel_split_rank") or 0


def stacks_in(model: Mapping[str, Any]) -> set[str]:
    """The stacks that have layers on a stage."""
    return {name.partition(".")[0] for name in model if LAYER.match(name)}


def used(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a stage of a T5 stores, without what it makes no use of."""
    present = stacks_in(model)
    unused = UNUSED[present.pop()] if len(present) == 1 else ()
    return {name: value for name, value in model.items() if not name.startswith(unused)}


def stage_problems(where: str, stages: Sequence[set[str]], declared: int) -> Iterator[Problem]:
    """What is wrong with the stacks that stages have layers of, where args say how many are the encoder's."""
    for number, present in enumerate(stages):
        if len(present) != 1:
            problem = f"holds layers of {' and '.join(sorted(present)) or 'neither encoder nor decoder'}"
            yield Problem(
                f"{where}: pipeline stage {number}", problem, "a T5 on several stages has one of the two on each"
            )
    holding = sum("encoder" in present for present in stages)
    if declared and declared != holding:
        problem = f"args give the encoder {declared} pipeline stages, and {holding} hold layers of it"
        yield Problem(where, problem, "correct args")
