"""Generation on the CPU in fp32 beside transformers', with SmolLM2-135M's shape and random weights.

usage: generate_cpu.py [--requests 8] [--prompt 32] [--new 128] [--mixed] [--layers 30] [--repeats 3] [--profile]

Prints tokens/s of both (the best of some runs, in turn), their ratio, and the share of tokens that agree.
"""

import argparse
import cProfile
import pstats
from functools import partial

import torch
from generation import build, build_theirs, compare, make_engine, make_load, time_engine, time_theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    for name, value in (("requests", 8), ("prompt", 32), ("new", 128), ("layers", 30), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--mixed", action="store_true", help="lengths from a quarter of these up to them")
    parser.add_argument("--profile", action="store_true", help="print where our time goes instead")
    args = parser.parse_args()
    model = build("smollm2-135m", torch.device("cpu"), torch.float32, {"layers": args.layers})
    load = make_load(args.requests, args.prompt, args.new, model.config.vocab_size, mixed=args.mixed)
    engine = make_engine(model, load, chunk_tokens=256)
    ours = partial(time_engine, engine, load)
    if args.profile:
        ours()
        with cProfile.Profile() as profile:
            ours()
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        return
    compare(ours, partial(time_theirs, build_theirs(model, "sdpa"), load), args.repeats)


if __name__ == "__main__":
    main()
