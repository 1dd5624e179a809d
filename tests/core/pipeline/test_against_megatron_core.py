"""Megatron-Core cuts layers into stages, reads layouts and orders microbatches the same way."""

import pytest
import torch

from mt_core.config.sections import PipelineConfig
from mt_core.pipeline.actions import Placement
from mt_core.pipeline.layout_string import parse_layout
from mt_core.pipeline.rank_schedules import ScheduleSize
from mt_core.pipeline.schedule_table import build_schedule
from mt_core.pipeline.stages import Layers, cut_stages

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("megatron_core")]


@pytest.mark.parametrize(("count", "chunks", "group"), [(8, 2, 4), (10, 2, 6), (14, 3, 5), (4, 4, 4), (9, 2, 9)])
def test_interleaved_passes_come_in_its_order(count, chunks, group):
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    schedule = build_schedule("interleaved", ScheduleSize(4, count, chunks, group))
    table = [(microbatch, chunk) for microbatch, chunk in get_schedule_table(count, chunks, group)]
    for rank in range(4):
        passes = [*schedule.list_passes(rank)]
        assert [(a.microbatch, a.chunk) for a in passes if a.kind == "F"] == table
        assert [(a.microbatch, chunks - 1 - a.chunk) for a in passes if a.kind == "B"] == table


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("Et*3|t*4|t*2L", 3),
        ("Et*3|(tt|)*2,t|L", 5),
        ("Et*3|t*4||tL", 4),
        ("Ett|(t|)*5tt,L", 7),
        ("E|*2t|(t|tt|)*2L", 4),
    ],
)
def test_a_layout_has_its_stages(text, ranks):
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    layout = PipelineParallelLayerLayout.from_str(text, ranks).layout
    stages, first = parse_layout(text), 0
    placement = Placement(ranks, len(stages) // ranks)
    for number, stage in enumerate(stages):
        rank = placement.get_rank(number)
        names = [part.name for part in layout[rank][placement.get_stages(rank).index(number)]]
        assert names == ["embedding"] * stage.embedding + ["decoder"] * len(stage.layers) + ["loss"] * stage.loss
        assert stage.layers.start == first
        first = stage.layers.stop


CUTS = [
    (16, 4, 1, {}),
    (16, 4, 2, {}),
    (10, 4, 1, {"num_layers_in_first_stage": 2, "num_layers_in_last_stage": 2}),
    (16, 4, 2, {"num_layers_in_first_stage": 2, "num_layers_in_last_stage": 6}),
    (11, 4, 1, {"num_layers_in_first_stage": 2}),
    (14, 4, 2, {"num_layers_in_last_stage": 2}),
    (14, 4, 1, {"account_for_embedding": True, "account_for_loss": True}),
    (14, 4, 2, {"account_for_embedding": True, "account_for_loss": True}),
    (15, 4, 2, {"account_for_loss": True}),
]


@pytest.mark.parametrize(("layers", "ranks", "chunks", "keys"), CUTS)
def test_stages_have_its_layers(layers, ranks, chunks, keys):
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    renamed = {
        "num_layers_in_first_stage": "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_stage": "num_layers_in_last_pipeline_stage",
        "account_for_embedding": "account_for_embedding_in_pipeline_split",
        "account_for_loss": "account_for_loss_in_pipeline_split",
    }
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=ranks,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        pipeline_dtype=torch.float32,
        **{renamed[key]: value for key, value in keys.items()},
    )
    placement = Placement(ranks, chunks)
    for number, stage in enumerate(cut_stages(Layers(layers), placement, PipelineConfig.model_validate(keys))):
        rank = placement.get_rank(number)
        where = {"vp_stage": number // ranks if chunks > 1 else None, "pp_rank": rank}
        assert len(stage.layers) == get_num_layers_to_build(config, **where)
        assert stage.layers.start == get_transformer_layer_offset(config, **where)
