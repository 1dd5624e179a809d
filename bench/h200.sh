#!/usr/bin/env bash
# One H200: the tests marked gpu, then the gpt2-124m shape through `mt train`. Run in the repository root.
set -euo pipefail
python3 -m pytest -q -m gpu -p no:cacheprovider tests 2>&1 | tail -15
gpt2() { python3 bench/training.py gpt2-124m --steps 20 --warmup 10 --set "$@" 2>>"${OUT:-/tmp}/training.log"; }
gpt2 precision.dtype=bf16 batch.micro_batch=32 batch.global_batch=32
gpt2 precision.dtype=bf16 batch.micro_batch=32 batch.global_batch=32 runtime.compile=true
gpt2 precision.dtype=bf16 batch.micro_batch=16 batch.global_batch=64 runtime.compile=true
gpt2 precision.dtype=fp32 batch.micro_batch=16 batch.global_batch=32
