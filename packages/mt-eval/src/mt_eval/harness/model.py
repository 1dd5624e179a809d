"""A checkpoint of mt as a model of lm-evaluation-harness, by the name `mt`; only who has lm-eval imports this module.

Numbers are those of its own `hf` model on the same weights, with two deliberate differences: a beginning of sequence is
put where `mt eval` puts it, and it is never scored, which `hf` does in rolling log-likelihoods.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from mt_core.errors import MtError, Problem, raise_if
from mt_core.plugins import did_you_mean
from mt_data.datasets.sft.template import FILE, KEY, ChatTemplate
from mt_eval.encoding import TextEncoder
from mt_eval.harness.loglikelihood import Continuation, score_continuations
from mt_eval.harness.tasks import SEED
from mt_eval.harness.texts import TextOptions, generate_texts
from mt_eval.load import Checkpoint, choose_ends, find_template, load_model, load_tokenizer
from mt_eval.tasks.evaluation import choose_seq_length

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from mt_eval.generation.ranks.shared_model import SharedModel
    from mt_models.models.gpt import GPT

ARGUMENTS = ("load_dir", "loader", "device", "dtype", "bos", "max_length", "batch_size", "max_batch_size")
"""What `--model_args` of the command lm-eval may say; the last is passed over, as batches are sized by tokens."""


class HarnessModel(TemplateLM):
    """A GPT with its tokenizer that answers lm-evaluation-harness's three kinds of request."""

    def __init__(
        self,
        network: "GPT | SharedModel",
        encoder: TextEncoder,
        *,
        seq_length: int,
        begin: int | None,
        ends: frozenset[int] = frozenset(),
        batch_size: int | None = None,
        find_template: Callable[[], ChatTemplate | None] = lambda: None,
    ) -> None:
        """`begin` is what a text follows that nothing stands before; `ends` are ids at which a generated text ends.

        Inputs have at most `seq_length` tokens, and batches `batch_size` rows, or as many as fit a budget of tokens.
        The template that writes conversations is looked for when one is asked.
        """
        super().__init__()
        self.network, self.encoder, self.max_length = network, encoder, seq_length
        self.begin, self.ends, self.rows = begin, ends, batch_size
        self._find_template = find_template

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> Self:
        """Open the checkpoint of `lm-eval --model mt --model_args load_dir=run,bos=true`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> Self:
        """Open a checkpoint from arguments by name: `ARGUMENTS`, of which `load_dir` is needed."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        given |= arg_dict
        raise_if(
            Problem(f"model_args.{name}", "unknown argument", did_you_mean(name, ARGUMENTS))
            for name in given
            if name not in ARGUMENTS
        )
        if "load_dir" not in given:
            raise MtError("model_args", "load_dir is missing", "load_dir=CHECKPOINT, a run or a directory of weights")
        checkpoint = Checkpoint.open(Path(str(given["load_dir"])), given.get("loader"))
        bos = given.get("bos")
        encoder = TextEncoder.create(load_tokenizer(checkpoint), bos=bos)
        rows, length = str(given.get("batch_size")), given.get("max_length")
        return cls(
            load_model(checkpoint, device=given.get("device", "auto"), dtype=given.get("dtype", "fp32")),
            encoder,
            seq_length=choose_seq_length(checkpoint, None if length is None else int(length))[0],
            begin=choose_begin(encoder, bos=bos),
            ends=choose_ends(checkpoint, encoder.tokenizer),
            batch_size=int(rows) if rows.isdecimal() else None,
            find_template=partial(find_template, checkpoint),
        )

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        return self.encoder.tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """What a text follows that nothing stands before."""
        if self.begin is None:
            actual = f"{type(self.encoder.tokenizer).__name__} has neither a beginning nor an end of sequence"
            raise MtError("mt eval harness", actual, "name bos_token or eos_token in tokenizer_config.json")
        return self.begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Ids of a text behind its prefix, unless that is spelled in the text already or not asked for."""
        encoder = self._plain_encoder if add_special_tokens is False else self._choose_encoder(string)
        return [*encoder.prefix, *encoder.encode_plain(string)]

    @property
    def tokenizer_name(self) -> str:
        """What lm-evaluation-harness's cache of requests tells tokenizers and templates apart by."""
        return f"{type(self.encoder.tokenizer).__name__}-{sha256(self._template.source.encode()).hexdigest()[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The Jinja text of the template that writes conversations."""
        return self._template.source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation up to the answer, or up to the end of the last message, which is to go on."""
        values = {"messages": chat_history, "add_generation_prompt": add_generation_prompt}
        text = self._template.render_prompt(values, "mt eval harness")
        return text if add_generation_prompt else _end_with(text, chat_history[-1]["content"])

    def loglikelihood_rolling(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows that do not overlap."""
        continuations, texts = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            windows = get_rolling_token_windows(
                self.encoder.encode_plain(text), self.prefix_token_id, self.max_length, context_len=1
            )
            parts = [make_disjoint_window(window) for window in windows]
            where = f"loglikelihood_rolling, request {number + 1}"
            continuations += [Continuation(tuple(context), tuple(target), where) for context, target in parts]
            texts += [number] * len(parts)
        sums = [0.0] * len(requests)
        for number, score in zip(texts, self._score(continuations), strict=True):
            sums[number] += score.log_prob
        for request, log_prob in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, log_prob)
        return sums

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop string."""
        options = []
        for number, request in enumerate(requests):
            where = f"generate_until, request {number + 1}"
            options.append(TextOptions.parse(request.arguments[1], where))
            options[-1].check(self.max_length, where)
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        texts = generate_texts(
            self._engine,
            prompts,
            options,
            tokenizer=self.encoder.tokenizer,
            ends=self.ends,
            seq_length=self.max_length,
            seed=SEED,
        )
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        continuations = [
            Continuation(tuple(context), tuple(target), f"loglikelihood, request {number} ({texts[1]!r})")
            for number, (texts, context, target) in enumerate(requests, start=1)
        ]
        answers = [(score.log_prob, score.greedy) for score in self._score(continuations)]
        for (texts, *_rest), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not context.strip():
            return [self.prefix_token_id], self.encoder.encode_plain(context + continuation)
        return self._choose_encoder(context).encode_pair(context, continuation)

    def _score(self, continuations: Sequence[Continuation]) -> list[Any]:
        return score_continuations(self.network, continuations, seq_length=self.max_length, batch_size=self.rows)

    def _choose_encoder(self, text: str) -> TextEncoder:
        """The encoder without a prefix for a text that begins with the prefix's own spelling, as chat templates do."""
        return self._plain_encoder if self._spelled and text.startswith(self._spelled) else self.encoder

    @cached_property
    def _template(self) -> ChatTemplate:
        template = self._find_template()
        if template is None:
            actual = "the tokenizer of this model has no chat template"
            raise MtError("apply_chat_template", actual, f"a {KEY} in tokenizer_config.json, or {FILE} beside it")
        return template

    @cached_property
    def _plain_encoder(self) -> TextEncoder:
        return replace(self.encoder, prefix=())

    @cached_property
    def _spelled(self) -> str:
        return self.encoder.tokenizer.decode(self.encoder.prefix) if self.encoder.prefix else ""

    @cached_property
    def _engine(self) -> Any:
        from mt_eval.generation.engine import Engine
        from mt_eval.generation.sequences import EngineOptions

        sizes = EngineOptions()
        if self.rows:
            sizes = replace(sizes, max_running=self.rows)
        return Engine(self.network, sizes)


def _end_with(text: str, message: str) -> str:
    """A conversation's text without what follows the last message."""
    place = text.rindex(message.strip())
    whole = message.lstrip()
    return text[: place + len(whole if text.startswith(whole, place) else message.strip())]


def choose_begin(encoder: TextEncoder, *, bos: bool | None) -> int | None:
    """What a text follows that nothing stands before: the beginning of sequence, unless `bos` is False, or an end.

    It is the beginning also where the tokenizer does not put one before texts of its own accord, as in
    lm-evaluation-harness.
    """
    if encoder.prefix:
        return encoder.prefix[-1]
    named = None if bos is False else getattr(encoder.tokenizer, "bos", None)
    return getattr(encoder.tokenizer, "eod", None) if named is None else named


register_model("mt")(HarnessModel)  # not as a decorator, whose type would hide the signature
