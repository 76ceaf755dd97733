#!/bin/bash
# The refinement of wiki-llama-82m on one GPU within 280 seconds, with steps at 7B's shapes beside it:
#
#     benchmarks/refine_schedules.sh MODEL TEXTS OUT
#
# MODEL: the folder of wiki-llama-82m (weights and tokenizer). TEXTS: a folder with calib.txt,
# wiki.valid.txt and wiki.test.txt. OUT gets log.txt, schedules.json, schedules.md and the refined
# artifact in parts of 15 MB; on another machine:
#
#     cat OUT/final.tar.* | tar x
#     pt2-export refined.gguf --from final --model MODEL --type tq1_1 --embedding-type q4_k
#     pt2-eval MODEL refined.gguf --reference MODEL --text wiki.test.txt --protocol llama.cpp
#
# Needs torch, transformers, safetensors, rich and pyyaml; no network.
set -u
model=${1:?MODEL} texts=${2:?TEXTS} out=${3:?OUT}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
export PYTHONPATH=$root PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
timeout -k 5 295 python3 "$root/benchmarks/refine_schedules.py" "$model" -o "$work" \
    --device cuda --minutes 4.6 --cost 7b --embeddings \
    --calibration "$texts/calib.txt" --held-out "$texts/wiki.valid.txt" \
    --test "$texts/wiki.test.txt,$root/examples/text/austen.test.txt" 2>&1 | tee "$out/log.txt"
cp "$work"/schedules.* "$out"/
[ -d "$work/final" ] && tar c -C "$work" final | split -b 15000000 - "$out/final.tar."
ls -l "$out"
