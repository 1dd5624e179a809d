"""WikiText-103 perplexity per original word, as published for Megatron (docs/specs/evaluation.md §3.2).

The model reads detokenised text, T tokens of it; its loss is spread over the To words of the word-tokenised file, so
models with different vocabularies compare: adjusted perplexity = exp(loss · (T−1)/(To−1)).
"""

from collections.abc import Sequence

from mt_core.contracts import Tokenizer
from mt_eval.detokenize import wikitext
from mt_eval.scoring import perplexity


def prepare(raw: str, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Tokens of the stripped and detokenised text, and the number of words in the stripped original.

    Words are the pieces between single spaces, line breaks included: 245,566 in the test set.
    """
    raw = raw.strip()
    return tokenizer.encode(wikitext(raw)), len(raw.split(" "))


def metrics(loss_sum: float, tokens: Sequence[int], words: int) -> dict[str, float]:
    """Adjusted perplexity first: it is the one that is published."""
    loss = loss_sum / (len(tokens) - 1)
    ratio = (len(tokens) - 1) / (words - 1)
    return {
        "adjusted_perplexity": perplexity(loss * ratio),
        "token_perplexity": perplexity(loss),
        "loss": loss,
        "token_ratio": ratio,
    }
