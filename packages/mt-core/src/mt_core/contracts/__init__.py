"""What an implementation of each kind of component must offer.

torch types appear as forward references, so this package imports without torch.
"""

from mt_core.contracts.checkpoints import ID_FILES, CheckpointLoader, CheckpointSaver
from mt_core.contracts.configurations import (
    AttentionConfig,
    MLPConfig,
    ModelConfig,
    PlannedModelConfig,
    TransformerModelConfig,
)
from mt_core.contracts.data import DataSection, Dataset, Tokenizer
from mt_core.contracts.metrics import MetricSink
from mt_core.contracts.models import (
    AttentionCore,
    BatchKey,
    Blocks,
    CanonicalModel,
    EdgeTensor,
    HasCore,
    HasOp,
    Losses,
    MetricSum,
    Model,
    StagedModel,
    StageOutput,
    as_module,
)
from mt_core.contracts.scorers import ToxicityScorer

__all__ = [
    "ID_FILES",
    "AttentionConfig",
    "AttentionCore",
    "BatchKey",
    "Blocks",
    "CanonicalModel",
    "CheckpointLoader",
    "CheckpointSaver",
    "DataSection",
    "Dataset",
    "EdgeTensor",
    "HasCore",
    "HasOp",
    "Losses",
    "MLPConfig",
    "MetricSink",
    "MetricSum",
    "Model",
    "ModelConfig",
    "PlannedModelConfig",
    "StageOutput",
    "StagedModel",
    "Tokenizer",
    "ToxicityScorer",
    "TransformerModelConfig",
    "as_module",
]
