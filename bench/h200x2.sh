#!/usr/bin/env bash
# Two H200s of one host: gpt2-124m data-parallel (replicated) against one GPU, the same global batch. Run in the root.
set -euo pipefail
gpt2() { python3 bench/training.py gpt2-124m --steps 20 --warmup 10 "$@" batch.global_batch=64 2>>"${OUT:-/tmp}/training.log"; }
for precision in "bf16 batch.micro_batch=32 runtime.compile=true" "fp32 batch.micro_batch=16"; do
  for ranks in 1 2; do
    # shellcheck disable=SC2086
    gpt2 --nproc $ranks --set precision.dtype=$precision
  done
done
