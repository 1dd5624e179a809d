"""A model with a paged KV cache, and the sequences that are in it: each knows its tokens, blocks and what is computed.

Shape suffixes: N tokens of a pass, D hidden size, V vocabulary.
"""

from collections.abc import Sequence as Values
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mt_core.errors import MtError, Problem, raise_if
from mt_eval.generation.blocks import ROOT, BlockPool, Prefix, Reservation

if TYPE_CHECKING:
    from torch import Tensor

    from mt_eval.generation.ranks.part import ModelPart
    from mt_eval.generation.ranks.shared_model import SharedModel
    from mt_models.models.gpt import GPT


CHUNKS = {"cpu": 256, "cuda": 2048}
"""Tokens of a step: as many as keep a device busy, and the running requests waiting for little time."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The sizes of an engine. None of them changes a token."""

    cache_gib: float = 1.0
    """Memory of the cache, on each rank; less is taken where all requests that can run at a time need less."""
    blocks: int | None = None
    """Blocks of the cache, if not as many as `cache_gib` has."""
    block_size: int = 16
    """Tokens of a block; a power of 2 up to 128."""
    chunk_tokens: int | None = None
    """Most tokens of one step; every running request has one of them before prompts have any. If not given, 256 on the
    CPU and 2,048 on a GPU, or `max_running`."""
    max_running: int = 32
    """Most requests that run at a time."""
    graphs: bool = True
    """Whether steps of one token a sequence are recorded as CUDA graphs, on a GPU."""
    prefix_reuse: bool = True
    """Whether prompts take from the cache what earlier requests have computed of their beginnings."""

    def __post_init__(self) -> None:
        problems = []
        if not self.cache_gib > 0:
            problems.append(Problem("cache_gib", f"{self.cache_gib}", "above 0"))
        if self.blocks is not None and self.blocks < 1:
            problems.append(Problem("blocks", f"{self.blocks}", "1 or more"))
        if self.block_size not in (1, 2, 4, 8, 16, 32, 64, 128):
            problems.append(Problem("block_size", f"{self.block_size}", "a power of 2 from 1 to 128"))
        if self.max_running < 1:
            problems.append(Problem("max_running", f"{self.max_running}", "1 or more"))
        if self.chunk_tokens is not None and self.chunk_tokens < self.max_running:
            allowed = f"max_running = {self.max_running} or more, as each running request has a token in every step"
            problems.append(Problem("chunk_tokens", f"{self.chunk_tokens}", allowed))
        raise_if(problems)

    def choose_chunk(self, device: str) -> int:
        """Most tokens of a step on a device of this type."""
        return self.chunk_tokens or max(CHUNKS.get(device, CHUNKS["cuda"]), self.max_running)

    def count_blocks(self, part: "ModelPart | SharedModel", max_seq_len: int) -> int:
        """Blocks of the cache of a model."""
        if self.blocks is not None:
            return self.blocks
        most = self.max_running * -(-max_seq_len // self.block_size)
        return max(1, min(int(self.cache_gib * 2**30) // part.measure_block(self.block_size), most))


class Sequence:
    """Tokens of one text, of which the first `computed` are in the cache."""

    def __init__(self, tokens: Values[int], reservation: Reservation) -> None:
        self.tokens = list(tokens)
        self.reservation = reservation
        """Where its blocks come from; it may share it with copies."""
        self.computed = 0
        self.table: list[int] = []
        """Blocks by their number; 0 where a block is out of every window."""
        self.first = 0
        """Number of the first block that it has."""
        self.prefix: Prefix = ROOT
        self.registered = 0
        """Blocks whose prefix is known."""

    @property
    def blocks(self) -> list[int]:
        """The blocks that it has."""
        return self.table[self.first :]

    @property
    def left(self) -> int:
        """Tokens that are not computed yet."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Decoded:
    """What follows the last tokens of some sequences."""

    logits_NV: "Tensor"
    """They last until the next step."""
    finite: list[bool]
    """Whether each row's largest logit is finite."""
    likeliest: list[int] | None = None
    """The likeliest token of each row, where a step has found it."""


class CachedModel:
    """A GPT in eval mode, and the blocks of its cache; ranks may share both."""

    def __init__(self, model: "GPT | SharedModel", options: EngineOptions) -> None:
        from mt_eval.generation.decode_step import DecodeStep, can_record
        from mt_eval.generation.ranks.part import ModelPart
        from mt_eval.generation.ranks.shared_model import SharedModel

        self.options, config = options, model.config
        if isinstance(model, SharedModel):
            self.part = model
        else:
            check_whole(model)
            self.part = ModelPart(model)
        self.chunk_tokens = options.choose_chunk(self.part.device.type)
        blocks = options.count_blocks(self.part, config.max_seq_len)
        self.part.allocate(blocks + 2, options.block_size)
        self.pool = BlockPool(blocks, options.block_size)
        windows = [config.attention.get_window(layer) for layer in range(config.layers)]
        self.horizon = None if None in windows else max(window for window in windows if window is not None)
        """Tokens that are seen, if all layers have windows."""
        self.prefix_hits = 0
        self.decoder: DecodeStep | None = None
        if isinstance(self.part, ModelPart) and options.graphs and can_record(self.part.model, self.part.cache.k):
            self.decoder = DecodeStep(self.part.model, self.part.cache, scratch=blocks + 1)

    def count_blocks(self, tokens: int) -> int:
        """Most blocks that a sequence of so many tokens has at a time."""
        size = self.pool.block_size
        count = -(-tokens // size)
        return count if self.horizon is None else min(count, -(-(self.horizon + self.chunk_tokens) // size) + 1)

    def open(self, tokens: Values[int], longest: int, *, reuse: bool = True, copies: int = 1) -> Sequence | None:
        """A sequence that will have up to `longest` tokens in the cache; None if there are too few blocks now.

        There have to be enough for so many copies of it, which `fork` makes.

        What others have computed of its beginning is taken from the cache, but for the last token, unless `reuse` is
        off.
        """
        pool, size = self.pool, self.pool.block_size
        known = pool.find_prefix(tokens, (len(tokens) - 1) // size) if reuse and self.options.prefix_reuse else []
        first = self._first_block(len(known) * size)
        shared = [block for _, block in known[first:]]
        keeps = copies == 1 and self._first_block(longest) == 0  # copies are closed one by one
        reservation = pool.reserve(copies * self.count_blocks(longest), shared, keeps=keeps)
        if reservation is None:
            return None
        sequence = Sequence(tokens, reservation)
        sequence.table, sequence.first = [0] * first + shared, first
        sequence.computed, sequence.registered = len(known) * size, len(known)
        sequence.prefix = known[-1][0] if known else ROOT
        self.prefix_hits += sequence.computed
        return sequence

    def close(self, sequence: Sequence) -> None:
        """Give the blocks of a sequence back; copies of it go on."""
        reservation = sequence.reservation
        self.pool.release(sequence.blocks, reservation)
        sequence.table, sequence.first = [], 0
        reservation.sequences -= 1
        if not reservation.sequences:
            self.pool.end(reservation)

    def fork(self, sequence: Sequence) -> Sequence:
        """Another sequence with the same beginning; full blocks are shared. It is one of those it was opened for."""
        reservation = sequence.reservation
        child = Sequence(sequence.tokens, reservation)
        child.computed, child.first, child.prefix = sequence.computed, sequence.first, sequence.prefix
        child.registered, child.table = sequence.registered, list(sequence.table)
        reservation.sequences += 1
        self.pool.share(child.blocks, reservation)
        if child.computed % self.pool.block_size:
            last, copy = child.table[-1], self.pool.take(reservation)
            self.part.copy([last], [copy])
            self.pool.release([last], reservation)
            child.table[-1] = copy
        return child

    def run(self, parts: Values[tuple[Sequence, int]]) -> "Tensor":
        """Compute the next so many tokens of each sequence; their features [N, D], one sequence after the other."""
        import torch

        x_ND = self._pass(parts)
        first = 0
        for sequence, count in parts:
            if count > 1 and not bool(x_ND[first : first + count].isfinite().all()):
                x_ND = torch.cat((x_ND[:first], self._run_singly(sequence, count), x_ND[first + count :]))
            first += count
            self._advance(sequence, count)
        return x_ND

    def decode(self, sequences: Values[Sequence]) -> Decoded | None:
        """Compute the only token that is left of each sequence, and what follows it, in a recorded step if there is
        one for this model."""
        from mt_eval.generation.decode_step import Row

        if self.decoder is None or self.decoder.failed:
            return None
        if new := self._take_blocks([(sequence, 1) for sequence in sequences]):
            self.part.clear(new)
        rows = [Row(sequence.tokens[-1], sequence.computed, sequence.table) for sequence in sequences]
        decoded = self.decoder.run(rows)
        if decoded is not None:
            for sequence in sequences:
                self._advance(sequence, 1)
        return decoded

    def _advance(self, sequence: Sequence, count: int) -> None:
        sequence.computed += count
        self._register(sequence)
        self._leave_window(sequence)

    def _take_blocks(self, parts: Values[tuple[Sequence, int]]) -> list[int]:
        """Give sequences the blocks that their next tokens need; those blocks, which are to be cleared."""
        size, new = self.pool.block_size, []
        for sequence, count in parts:
            while len(sequence.table) * size < sequence.computed + count:
                sequence.table.append(self.pool.take(sequence.reservation))
                new.append(sequence.table[-1])
        return new

    def _pass(self, parts: Values[tuple[Sequence, int]]) -> "Tensor":
        """The features of the next so many tokens of each sequence, [N, D]."""
        from mt_models.layers.kv_cache import Span

        new = self._take_blocks(parts)
        spans = [Span(sequence.computed, count, sequence.table) for sequence, count in parts]
        ids = [token for s, count in parts for token in s.tokens[s.computed : s.computed + count]]
        x_ND = self.part.run(ids, spans, new)
        assert x_ND is not None, "the first rank has the last stage"
        return x_ND

    def _run_singly(self, sequence: Sequence, count: int) -> "Tensor":
        """The features of the next tokens, each computed before the next is in the cache.

        NaN in a token's value reaches the tokens before it in a common pass, as 0 · NaN is NaN; and others might take
        those from the cache.
        """
        import torch

        start = sequence.computed
        self.part.forget(sequence.table, start, start + count)
        parts = []
        for sequence.computed in range(start, start + count):
            parts.append(self._pass([(sequence, 1)]))
        sequence.computed = start
        return torch.cat(parts)

    def compute_logits(self, x_ND: "Tensor") -> "Tensor":
        """Logits [N, V] of the true vocabulary for features [N, D]."""
        logits_NV = self.part.compute_logits(x_ND, len(x_ND))
        assert logits_NV is not None, "the first rank has the last stage"
        return logits_NV

    def _register(self, sequence: Sequence) -> None:
        size = self.pool.block_size
        while self.options.prefix_reuse and (sequence.registered + 1) * size <= sequence.computed:
            number = sequence.registered
            tokens = sequence.tokens[number * size : (number + 1) * size]
            sequence.prefix = self.pool.register(sequence.prefix, tokens, sequence.table[number])
            sequence.registered += 1

    def _leave_window(self, sequence: Sequence) -> None:
        """Give back the blocks that no further token sees."""
        first = self._first_block(sequence.computed)
        if first > sequence.first:
            left = sequence.table[sequence.first : first]
            sequence.table[sequence.first : first] = [0] * len(left)
            self.pool.release(left, sequence.reservation)
            sequence.first = first

    def _first_block(self, position: int) -> int:
        """Number of the first block that the token at a position sees."""
        return 0 if self.horizon is None else max(position - self.horizon + 1, 0) // self.pool.block_size


def check_whole(model: "GPT") -> None:
    """Refuse a part of a model that comes without the other ranks: logits or features would be parts of the true
    ones."""
    allowed = "a whole model, or the SharedModel of all ranks (mt generate --nproc)"
    if model.embed is None or len(model.layers) < model.config.layers:
        raise MtError("model", "is a stage of a pipeline, without the other stages", allowed)
    if len(model.embed.weight) < model.config.vocab_size:
        actual = f"has {len(model.embed.weight)} of {model.config.vocab_size} rows of the vocabulary on this rank"
        raise MtError("model", actual, allowed)
    if model.training:
        raise MtError("model", "is in training mode, in which it drops features", "call model.eval() first")
