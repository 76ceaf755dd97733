#!/bin/bash
# Does the GPU predict what the CPU predicts? Perplexity of both, and the KL divergence between them.
#
#   benchmarks/h200/perplexity.sh model.gguf text.txt            # all of the text, windows of 512 tokens
#   CHUNKS=64 benchmarks/h200/perplexity.sh model.gguf text.txt  # its first 64 windows
#
# Where a number of tokens at a time goes wrong, it is run again with parts of the backend switched off.
#
# Exit status 1 if the perplexities differ by more than TOLERANCE, if an operation of the model ran on the CPU
# (but for the look-up of the embeddings), or if a program failed. Settings are environment variables:
#   BIN        folder with llama-perplexity and llama-bench (default: the build of `pt2-llama build --cuda`)
#   WORK       where the CPU's predictions are kept meanwhile, 2 bytes a token and word of the vocabulary
#              (default: /dev/shm)
#   CHUNKS     windows of 512 tokens (default: all)
#   SMALL      windows for the runs with 1, 3, 8 and 40 tokens at a time (default: 4; 0: none), which are the
#              paths of decoding, several sequences and prefill
#   TOLERANCE  of the ratio of perplexities (default: 0.005); four times that for the few windows of SMALL, where
#              the CPU's own figure moves by half a percent with the number of tokens at a time
#   LIMIT      seconds for each program (default: 300)
#   OUT        folder for the logs (default: perplexity-<model> here)
#   BENCH      the command of pt2-bench, for the placement (default: pt2-bench)
set -u
export GGML_CUDA_TQ=${GGML_CUDA_TQ:-tiles}
ROUTE=$GGML_CUDA_TQ
if [ $# != 2 ]; then
    sed -n '2,/^set/{/^set/!p}' "$0" | sed 's/^# \{0,1\}//'
    exit 2
fi
MODEL=$1 TEXT=$2
for f in "$MODEL" "$TEXT"; do [ -r "$f" ] || { echo "$f: no such file" >&2; exit 2; }; done
WORK=${WORK:-/dev/shm} SMALL=${SMALL:-4} TOLERANCE=${TOLERANCE:-0.005} LIMIT=${LIMIT:-300} BENCH=${BENCH:-pt2-bench}
OUT=${OUT:-perplexity-$(basename "$MODEL" .gguf)}
if [ -n "${BIN:-}" ]; then
    run=() tool=$BIN/llama-perplexity bench=(--bin "$BIN" --variant cuda)
else
    run=(pt2-llama run --variant cuda) tool=llama-perplexity bench=(--variant cuda)
fi
mkdir -p "$OUT" || exit 2
BASE=$WORK/pt2-predictions-$$
trap 'rm -f "$BASE"' EXIT
trap 'exit 130' INT TERM
FAILED=0
fail() { echo "FAILED: $*"; FAILED=1; }

# perplexity NAME cpu|gpu OPTIONS...: one run with its log in OUT/NAME.txt. A program that ends well without
# its last lines is run again: llama-perplexity now and then loses them.
perplexity() {
    local name=$1 where=$2 rc
    shift 2
    local hide=() layers=()
    if [ "$where" = cpu ]; then hide=(CUDA_VISIBLE_DEVICES=); else layers=(-ngl 99); fi
    for _ in 1 2 3 4; do
        env "${hide[@]}" timeout "$LIMIT" "${run[@]}" "$tool" -m "$MODEL" "$@" "${layers[@]}" > "$OUT/$name.txt" 2>&1
        rc=$?
        [ $rc = 0 ] || { fail "$name: exit status $rc (log: $OUT/$name.txt)"; return 1; }
        grep -q 'Final estimate: PPL\|Same top p' "$OUT/$name.txt" && return 0
    done
    fail "$name: no result (log: $OUT/$name.txt)"
    return 1
}
final() { sed -n 's/.*Final estimate: PPL = \([0-9.]*\) .*/\1/p' "$OUT/$1.txt" | tail -1; }
value() { sed -n "s/.*$2 *: *\(-\{0,1\}[0-9.]*\).*/\1/p" "$OUT/$1.txt" | tail -1; }
# same A B TIMES: whether A / B is 1 within TIMES the tolerance
same() { awk -v a="$1" -v b="$2" -v t="$TOLERANCE" -v n="$3" 'BEGIN {d = a / b - 1; exit !(a > 0 && b > 0 && d < n * t && -d < n * t)}'; }

chunks=()
[ -n "${CHUNKS:-}" ] && chunks=(--chunks "$CHUNKS")
echo "$(basename "$MODEL"), $(basename "$TEXT"), ${CHUNKS:-all} windows of 512 tokens"
if perplexity cpu cpu -f "$TEXT" -c 512 "${chunks[@]}" --kl-divergence-base "$BASE"; then
    cpu=$(final cpu)
    if perplexity gpu gpu -f "$TEXT" -c 512 "${chunks[@]}" --kl-divergence-base "$BASE" --kl-divergence; then
        gpu=$(value gpu 'Mean PPL(Q)')
        echo "CPU $cpu, GPU $gpu; KL divergence of the GPU's predictions from the CPU's:" \
            "mean $(value gpu 'Mean    KLD'), largest $(value gpu 'Maximum KLD'); same top token $(value gpu 'Same top p')%"
        same "$gpu" "$cpu" 1 || fail "the perplexities differ by more than $TOLERANCE of the CPU's"
    fi
fi
if [ "$SMALL" != 0 ] && perplexity cpu-few cpu -f "$TEXT" -c 512 --chunks "$SMALL"; then
    cpu=$(final cpu-few)
    echo "first $SMALL windows: CPU $cpu"
    for tokens in 1 3 8 40; do
        perplexity "gpu-$tokens" gpu -f "$TEXT" -c 512 --chunks "$SMALL" -b "$tokens" -ub "$tokens" || continue
        gpu=$(final "gpu-$tokens")
        echo "  GPU, $tokens at a time: $gpu"
        same "$gpu" "$cpu" 4 && continue
        fail "$tokens tokens at a time: $gpu against $cpu"
        for switch in GGML_CUDA_TQ_FUSE=0 GGML_CUDA_DISABLE_GRAPHS=1 GGML_CUDA_PDL=0 GGML_CUDA_TQ=templates; do
            export "${switch?}"  # which part of it is at fault?
            perplexity "gpu-$tokens-$switch" gpu -f "$TEXT" -c 512 --chunks "$SMALL" -b "$tokens" -ub "$tokens" &&
                echo "    with $switch: $(final "gpu-$tokens-$switch")"
            unset "${switch%%=*}"
            export GGML_CUDA_TQ=$ROUTE
        done
    done
fi
if timeout "$LIMIT" $BENCH "$MODEL" --baseline none --no-perplexity "${bench[@]}" -p 64 -n 8 --pg none -r 1 \
    --bandwidth 1 --strict --no-report --out "$OUT/placement" > "$OUT/placement.txt" 2>&1; then
    echo "placement:"
    grep 'MUL_MAT\|GET_ROWS' "$OUT/placement.txt"
else
    fail "placement (log: $OUT/placement.txt)"
    grep 'error' "$OUT/placement.txt"
fi
exit $FAILED
