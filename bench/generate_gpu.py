"""Generation on a GPU beside transformers', with Llama 3 8B's shape and random weights in bf16.

usage: generate_gpu.py [--preset llama3-8b] [--requests 64] [--prompt 512] [--new 256] [--mixed] [--chunk-tokens 16384]
                       [--device cuda|cpu] [--dtype bf16] [--layers N] [--repeats 1] [--no-graphs] [--profile]

Prints tokens/s of both, the prompts' time included, their ratio, the time to the median first token and the share of
tokens that agree, which in bf16 is not all: a text goes its own way after the first near tie. Before that come the
times of our steps, each waited for. Both sides are warmed up with a few tokens.

On a CPU it runs with few layers: --preset smollm2-135m --layers 2 --device cpu --dtype fp32 --prompt 16 --new 8
"""

import argparse
import statistics
import time
from dataclasses import replace
from functools import partial

import torch
from generation import (
    Load,
    build,
    build_theirs,
    compare,
    make_engine,
    make_load,
    synchronize,
    time_engine,
    time_theirs,
)

from mt_eval.generation.engine import Engine
from mt_eval.generation.requests import Output
from mt_eval.load import pick_dtype

WARM_UP_TOKENS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    for name, value in (("requests", 64), ("prompt", 512), ("new", 256), ("chunk-tokens", 16384), ("repeats", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--preset", default="llama3-8b")
    parser.add_argument("--layers", type=int, help="as many layers as the preset has, if not given")
    parser.add_argument("--mixed", action="store_true", help="lengths from a quarter of these up to them")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--no-graphs", action="store_true", help="do not record steps as CUDA graphs")
    parser.add_argument("--profile", action="store_true", help="print our GPU time by kernel instead")
    args = parser.parse_args()
    overrides = {} if args.layers is None else {"layers": args.layers}
    model = build(args.preset, torch.device(args.device), pick_dtype(args.dtype), overrides)
    load = make_load(args.requests, args.prompt, args.new, model.config.vocab_size, mixed=args.mixed)
    engine = make_engine(model, load, args.chunk_tokens, graphs=not args.no_graphs)
    warm = replace(load, new=[WARM_UP_TOKENS] * len(load.new))
    time_engine(engine, warm)
    decoder = engine.cached.decoder
    print(f"recorded steps: {'none' if decoder is None or decoder.failed else 'yes'}")
    describe_steps(engine, load)
    if args.profile:
        profile(engine, warm)
        return
    theirs = build_theirs(model, "sdpa")
    time_theirs(theirs, warm)
    compare(partial(time_engine, engine, load), partial(time_theirs, theirs, load), args.repeats)


def describe_steps(engine: Engine, load: Load) -> None:
    """Print how long steps of our engine take: those with prompts, and those of one token a request."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    step = engine.step

    def timed() -> list[Output]:
        synchronize()
        prompts = engine.stats.waiting > 0 or any(running.sequence.left > 1 for running in engine._running.values())
        started = time.perf_counter()
        outputs = step()
        synchronize()
        seconds[prompts].append(time.perf_counter() - started)
        return outputs

    engine.step = timed
    time_engine(engine, load)
    engine.step = step
    for prompts, name in ((True, "with prompts"), (False, "of one token a request")):
        if seconds[prompts]:
            print(f"{len(seconds[prompts])} steps {name}: {statistics.median(seconds[prompts]) * 1e3:.2f} ms (median)")


def profile(engine: Engine, load: Load) -> None:
    """Print the kernels that take most of the time of a few tokens."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        time_engine(engine, load)
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=60))


if __name__ == "__main__":
    main()
