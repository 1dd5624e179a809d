"""`mt serve`: answer requests over HTTP with the model of a checkpoint; only `mt` imports this module."""

import ipaddress
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from mt_core.cli.options import expand_options
from mt_core.errors import MtError
from mt_core.plugins import import_library
from mt_eval.generation.command import CheckpointOptions
from mt_eval.options import Beginning, ModelOptions, RankOptions, TokenizerOptions

if TYPE_CHECKING:
    from mt_eval.load import Checkpoint
    from mt_eval.serving.interfaces.calls import ServedModel


@dataclass(frozen=True, slots=True)
class ListenOptions:
    """Where the server listens, and to whom."""

    host: Annotated[str, "Address to listen at; 0.0.0.0 is all of this machine's."] = "127.0.0.1"
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 5000
    api_key: Annotated[
        str,
        Option(
            envvar="MT_API_KEY",
            help="Key that clients have to send; better in the variable, as others see command lines.",
            show_default=False,
        ),
    ] = ""
    name: Annotated[str, Option(help="Name of the model; that of its directory if not given.")] = ""
    chat_template: Annotated[Path | None, "Jinja file for conversations; the tokenizer's own if not given."] = None
    bos: Beginning = None


@dataclass(frozen=True, slots=True)
class LimitOptions:
    """How much is taken; what is beyond a limit is refused with its number."""

    max_tokens: Annotated[
        int | None, Option(min=1, help="Most new tokens of an answer; the model's positions if not given.")
    ] = None
    max_prompt_tokens: Annotated[
        int | None, Option(min=1, help="Most tokens of a prompt; the model's positions if not given.")
    ] = None
    max_prompts: Annotated[int, Option(min=1, help="Most prompts of a request.")] = 128
    max_body_bytes: Annotated[int, Option(min=1, help="Most bytes of a request.")] = 4 * 2**20
    max_waiting: Annotated[int, Option(min=1, help="Most prompts that wait; what is more is answered with 429.")] = 256
    drain_seconds: Annotated[float, Option(min=0, help="Seconds that running requests have after SIGTERM.")] = 30.0


@dataclass(frozen=True, slots=True)
class EngineSizes:
    """What runs at a time; changes speed and memory only."""

    max_running: Annotated[int, Option(min=1, help="Most prompts that are continued at a time.")] = 32
    chunk_tokens: Annotated[
        int | None, Option(min=1, help="Most tokens of a step; 256 on the CPU and 2048 on a GPU if not given.")
    ] = None
    cache_gib: Annotated[float, "Memory of the key/value cache in GiB."] = 1.0
    block_size: Annotated[int, "Tokens of a block of the cache; a power of 2 up to 128."] = 16
    prefix_reuse: Annotated[bool, Option(help="Compute equal beginnings of prompts once.")] = True


@expand_options
def serve(
    checkpoint: CheckpointOptions,
    listen: ListenOptions,
    limits: LimitOptions,
    sizes: EngineSizes,
    model: ModelOptions,
    ranks: RankOptions,
    tokenizer: TokenizerOptions,
) -> None:
    """Serve a model over HTTP: OpenAI's completions and chat, Megatron's PUT /api, and a page to type at.

    Listens to this machine alone unless --host says otherwise. SIGTERM ends it when running requests are answered.

    Example:
      mt serve run --port 5000
    """
    for library in ("starlette", "uvicorn"):
        import_library(library, where="mt serve", requires=["mt-eval[serve]"])
    from mt_eval.generation.engine import Engine
    from mt_eval.generation.ranks.processes import open_model
    from mt_eval.generation.sequences import EngineOptions
    from mt_eval.load import Checkpoint
    from mt_eval.serving.app import Server
    from mt_eval.serving.engine_thread import EngineThread
    from mt_eval.serving.http_server import open_socket, run_server

    if limits.max_prompts > limits.max_waiting:
        raise MtError(
            "--max-prompts", f"{limits.max_prompts} do not fit --max-waiting {limits.max_waiting}", "raise it"
        )
    options = EngineOptions(
        cache_gib=sizes.cache_gib,
        block_size=sizes.block_size,
        chunk_tokens=sizes.chunk_tokens,
        max_running=sizes.max_running,
        prefix_reuse=sizes.prefix_reuse,
    )
    listener = open_socket(listen.host, listen.port)
    opened = Checkpoint.open(checkpoint.path(), model.loader, model.loader_options)
    served = describe_model(opened, listen, limits, tokenizer)
    if not listen.api_key and not _is_local(listener.getsockname()[0]):
        print(f"serve: anyone who reaches {listen.host} may use the model: give --api-key", file=sys.stderr)
    with open_model(opened, model, ranks) as network:
        engine = EngineThread(Engine(network, options), max_waiting=limits.max_waiting)
        run_server(Server(served, engine, listen.api_key or None), listener, drain_s=limits.drain_seconds)


def describe_model(
    opened: "Checkpoint", listen: ListenOptions, limits: LimitOptions, tokenizer: TokenizerOptions
) -> "ServedModel":
    """What the interfaces know of a checkpoint's model."""
    from mt_eval.encoding import TextEncoder
    from mt_eval.load import choose_ends, find_template, load_tokenizer
    from mt_eval.serving.interfaces.calls import Limits, ServedModel

    config = opened.loader.config()
    encoder = TextEncoder.create(load_tokenizer(opened, tokenizer.config()), bos=listen.bos)
    context = config.max_seq_len
    return ServedModel(
        name=listen.name or opened.path.resolve().name,
        encoder=encoder,
        vocab_size=config.vocab_size,
        ends=choose_ends(opened, encoder.tokenizer),
        limits=Limits(
            context=context,
            prompt=min(limits.max_prompt_tokens or context, context),
            new=min(limits.max_tokens or context, context),
            prompts=limits.max_prompts,
            body=limits.max_body_bytes,
        ),
        template=find_template(opened, listen.chat_template),
    )


def _is_local(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
