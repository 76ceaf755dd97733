#!/bin/bash
# Speed of LLaMA's shapes (random weights: speed only) on one GPU: the figures of this folder's README.
#
#   benchmarks/h200/run.sh core out          # the table: 7B to 65B, prefill 128, decode 256, both
#   benchmarks/h200/run.sh full out          # the rest: all types, 1 to 64 sequences, depth to 16k
#   pip install . && pt2-llama build --cuda  # what it needs first
#
# Writes out/<step>/results.json, one folder a step, and prints tables; publish.sh makes the figures and the
# README of them. Settings are environment variables:
#   BIN       folder with llama-bench and the other programs (default: the build of `pt2-llama build --cuda`)
#   WORK      where the models are written, best a file system in memory (default: /dev/shm).
#             65B needs 54 GiB for three types and 102 GiB for all six
#   SECONDS_  time limit of the whole (default: 500). Steps are ordered by worth: those that no longer fit
#             are left out, by name, and rounds within a step likewise
#   ROUNDS    interleaved rounds at most (default: 3)
#   STREAM    program that measures the memory's reading rate (default: stream_read.cu, built by nvcc if
#             there is one; torch's sum otherwise)
#   BENCH     the command (default: pt2-bench)
#   BIG_TYPES types of the largest shape in `core` (default: all six, or three where WORK is too small)
#   BIG, MIDDLE, SMALL   shapes (default: 65b, "30b 13b", 7b); VARIANT=cpu tries the script without a GPU
set -u
usage() { sed -n '2,/^set/{/^set/!p}' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
[ $# = 2 ] || usage
PLAN=$1 OUT=$2
case $PLAN in core|full) ;; *) usage ;; esac
WORK=${WORK:-/dev/shm} LIMIT=${SECONDS_:-500} ROUNDS=${ROUNDS:-3} BENCH=${BENCH:-pt2-bench}
BIG=${BIG:-65b} MIDDLE=${MIDDLE:-30b 13b} SMALL=${SMALL:-7b} VARIANT=${VARIANT:-cuda}
CORE=tq2_1,tq1_1,q2_k ALL=tq2_1,tq1_1,q2_k,q2_0,iq1_m,iq2_xxs
HERE=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$OUT" || exit 2
FILES=$WORK/pt2-bench-$$
mkdir -p "$FILES" || exit 2
trap 'rm -rf "$FILES"' EXIT
trap 'exit 130' INT TERM

say() { echo "[$SECONDS s] $*"; }
left() { echo $((LIMIT - SECONDS)); }
FAILED=0

if [ -z "${STREAM:-}" ] && [ "$VARIANT" = cuda ] && command -v nvcc > /dev/null; then
    STREAM=$FILES/stream_read
    nvcc -O3 -cudart static -arch=native -o "$STREAM" "$HERE/stream_read.cu" || STREAM=
fi
fixed=(--variant "$VARIANT" --work "$FILES" --keep-going --tool-timeout 150 --no-report)
[ -n "${BIN:-}" ] && fixed+=(--bin "$BIN")
[ -n "${STREAM:-}" ] && fixed+=(--bandwidth-program "$STREAM")

# step NAME LEAST MOST OPTIONS...: one run of pt2-bench, if at least LEAST seconds are left. No round begins
# that would end after MOST seconds; the run is stopped (and its figures kept) when the time is up.
step() {
    local name=$1 least=$2 most=$3 rc
    shift 3
    if [ "$(left)" -lt "$least" ]; then
        say "left out: $name (needs $least s, $(left) s are left)"
        FAILED=1
        return
    fi
    [ "$most" -gt "$(left)" ] && most=$(left)
    say "$name: $*"
    timeout -s INT -k 20 "$(left)" $BENCH "$@" "${fixed[@]}" --time-limit "$most" --out "$OUT/$name" 2>&1 | grep -v '^$'
    rc=${PIPESTATUS[0]}
    [ "$rc" = 0 ] || { say "$name: exit status $rc"; FAILED=1; }
}
clean() { rm -f "$FILES"/*.gguf; }
room() { df -Pk "$WORK" | awk 'NR == 2 {print int($4 / 1048576)}'; }

plain="-p 128 -n 256 --pg 128,256"
if [ "$PLAN" = core ]; then
    types=${BIG_TYPES:-$ALL} others=
    if [ "$types" = $ALL ] && [ "$BIG" = 65b ] && { [ "$LIMIT" -lt 450 ] || [ "$(room)" -lt 104 ]; }; then
        say "$BIG: three types first, the others with Q2_K at the end ($LIMIT s, $(room) GiB in $WORK)"
        types=$CORE others=q2_k,q2_0,iq1_m,iq2_xxs
    fi
    # what the steps after it need stays for them
    most=$((LIMIT - 210 < 230 ? LIMIT - 210 : 230))
    step "speed-$BIG" 60 "$most" --synthetic "$BIG" --types $types $plain -r "$ROUNDS" --placement ternary
    # a short prompt is mostly the recording of its CUDA graph, which other passes then use
    step "speed-$SMALL" 45 105 --synthetic "$SMALL" --types $ALL $plain -r "$ROUNDS" --repeats 3 --placement ternary
    for shape in $MIDDLE; do
        step "speed-$shape" 30 60 --synthetic "$shape" --types $CORE $plain -r "$ROUNDS" --placement ternary
    done
    if [ -n "$others" ]; then
        step "speed-$BIG-others" 85 85 --synthetic "$BIG" --types $others $plain -r 1 --placement none
    fi
else
    step "batch-$SMALL" 30 60 --synthetic "$SMALL" --types $ALL --keep -p 0 -n 0 --pg none -r 2 --placement none \
        --batch 1,2,4,8,9,12,16,24,32,48,64 --batch-prompt 16 --batch-gen 128
    step "depth-$SMALL" 30 60 --synthetic "$SMALL" --types $CORE --keep -p 0 -n 256 --pg none -r 2 --placement none \
        --depth 0,1024,4096,16384
    clean
    step "batch-$BIG" 60 110 --synthetic "$BIG" --types $CORE -p 0 -n 0 --pg none -r 1 --placement none \
        --batch 1,2,4,8,9,12,16,24,32,48,64 --batch-prompt 16 --batch-gen 128
    for shape in $MIDDLE; do
        step "speed-$shape" 60 110 --synthetic "$shape" --types $ALL $plain -r "$ROUNDS" --placement none
    done
    step "depth-$BIG" 120 120 --synthetic "$BIG" --types tq2_1,q2_k -p 0 -n 256 --pg none -r 1 --placement none \
        --depth 0,4096,16384
fi
say "done"
exit $FAILED
