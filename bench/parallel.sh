#!/usr/bin/env bash
# Layouts of Llama 3's shape with 8 layers (2.80 billion parameters, 8,192 tokens, 4 samples a step) through `mt train`, and
# Megatron-Core with Transformer Engine in the same call. usage: parallel.sh GPUS [PEER], in the root; PEER is the script that
# times Megatron-Core and takes shape=, tp=, cp=, s=, gbs=.
set -uo pipefail
gpus=$1 peer=${2:-} log=${OUT:-/tmp}/parallel.log
ours() {
  python3 bench/training.py llama3-8b --steps 10 --warmup 5 --nproc "$gpus" --set precision.dtype=bf16 model.layers=8 \
    batch.micro_batch=1 runtime.compile=true "$@" 2>>"$log" || tail -n 25 "$log"
}
theirs() {
  [ -z "$peer" ] || torchrun --nproc-per-node "$gpus" "$peer" shape=llama8b-8l warmup=5 steps=10 "$@" 2>>"$log" | tail -n 1
}
if [ "$gpus" = 1 ]; then
  ours batch.global_batch=4
  theirs gbs=4
  exit
fi
ours batch.global_batch=4 parallel.sharding=zero1
theirs gbs=4
ours batch.global_batch=4 parallel.tensor="$gpus" parallel.sequence=true
theirs gbs=4 tp="$gpus"
ours batch.global_batch=4 parallel.context="$gpus" parallel.sharding=zero1
theirs gbs=4 cp="$gpus"
long=(data.seq_length=32768 model.max_seq_len=32768 batch.global_batch=2)
ours "${long[@]}" parallel.context="$gpus" parallel.sharding=zero1
theirs gbs=2 s=32768 cp="$gpus"
ours batch.global_batch=4 parallel.sharding=fsdp
