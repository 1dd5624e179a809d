"""Fixtures of the model tests; every test here runs on one thread."""

from collections.abc import Callable, Iterator

import pytest
import torch

from mt_models.config import GPTConfig
from mt_models.models.gpt import GPT


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tokens_BT() -> torch.Tensor:
    return torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def make_model() -> Callable[..., GPT]:
    """Build and initialise a model, in fp64 by default."""

    def make(config: GPTConfig, *, dtype: torch.dtype = torch.float64, seed: int = 1) -> GPT:
        model = config.build().to(dtype)
        model.initialize(seed)
        return model

    return make
