#!/bin/bash
# Are the kernels clean under compute-sanitizer? memcheck and racecheck over the check programs of
# benchmarks/cuda_lab in their small form, each after a plain run that must pass.
#
#   benchmarks/h200/sanitize.sh              # builds the programs with nvcc first (for this machine's GPU)
#   benchmarks/h200/sanitize.sh FOLDER       # takes product, prefill_product, act_check, tile_check from there
#
# Exit status 1 if a program or a tool reports an error or runs past its time. Settings:
#   PROGRAMS  which (default: all four)      TOOLS   (default: "memcheck racecheck")
#   LIMIT     seconds for each run (default: 120)
#   ARCH      for nvcc (default: 90a where the GPU has 9.0, else native)
#   OUT       folder for the logs (default: sanitize here)
#   BIN       folder with test-backend-ops: memcheck then also runs over its small products of both types
set -u
case ${1:-} in -*) sed -n '2,/^set/{/^set/!p}' "$0" | sed 's/^# \{0,1\}//'; exit 2 ;; esac
HERE=$(cd "$(dirname "$0")" && pwd)
LAB=$HERE/../cuda_lab
KERNELS=$HERE/../../third_party/llama.cpp/overlay/ggml/src/ggml-cuda
OUT=${OUT:-sanitize} LIMIT=${LIMIT:-120} TOOLS=${TOOLS:-memcheck racecheck}
PROGRAMS=${PROGRAMS:-tile_check act_check product prefill_product}
SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2> /dev/null | tail -1)
[ -n "$SANITIZER" ] || { echo "there is no compute-sanitizer; it comes with the CUDA toolkit" >&2; exit 2; }
mkdir -p "$OUT" || exit 2
FAILED=0

build() {
    local arch=${ARCH:-native} define=() program=$1
    if [ "$arch" = native ] && nvidia-smi --query-gpu=compute_cap --format=csv,noheader | grep -q '^9.0'; then arch=90a; fi
    case $arch in
        native) arch=native ;;
        *a) define=(-DGGML_CUDA_TQ_SM90A) arch=sm_$arch ;;
        *) arch=sm_$arch ;;
    esac
    local sources=()
    case $program in  # act_check.cu has what it checks by #include
        product) sources=("$KERNELS"/tq-act.cu) ;;
        prefill_product) sources=("$KERNELS"/tq-prefill.cu "$KERNELS"/tq-prefill-wgmma.cu) ;;
        tile_check) sources=("$KERNELS"/tq-tile.cu) ;;
    esac
    # -lineinfo: the sanitizer names source lines
    nvcc -O3 -std=c++17 -lineinfo -cudart static -arch="$arch" "${define[@]}" -I"$KERNELS" -o "$OUT/$program" \
        "$LAB/$program.cu" "${sources[@]}" > "$OUT/$program-build.txt" 2>&1
}

# check NAME COMMAND...: runs it and says how it ended.
check() {
    local name=$1 rc
    shift
    local started=$SECONDS
    timeout "$LIMIT" "$@" > "$OUT/$name.txt" 2>&1
    rc=$?
    [ $rc = 0 ] || FAILED=1
    case $rc in
        0) echo "ok      $name ($((SECONDS - started)) s): $(tail -1 "$OUT/$name.txt")" ;;
        124) echo "LATE    $name: stopped after $LIMIT s (log: $OUT/$name.txt)" ;;
        *) echo "FAILED  $name: exit status $rc (log: $OUT/$name.txt)"; grep -m 12 '=========\|FAIL\|rror' "$OUT/$name.txt" ;;
    esac
    return $rc
}

for program in $PROGRAMS; do
    if [ -n "${1:-}" ]; then
        path=$1/$program
        [ -x "$path" ] || { echo "FAILED  there is no $program in $1"; FAILED=1; continue; }
    else
        path=$OUT/$program
        build "$program" || { echo "FAILED  $program was not built (log: $OUT/$program-build.txt)"; FAILED=1; continue; }
    fi
    path=$(cd "$(dirname "$path")" && pwd)/$program
    check "$program" "$path" check small || continue
    for tool in $TOOLS; do
        check "$program-$tool" "$SANITIZER" --tool "$tool" --error-exitcode 9 "$path" check small
    done
done
if [ -n "${BIN:-}" ]; then
    export GGML_CUDA_TQ=tiles # our own kernels
    check backend-ops-memcheck "$SANITIZER" --tool memcheck --error-exitcode 9 "$BIN/test-backend-ops" test -b CUDA0 \
        -o MUL_MAT -p 'type_a=tq[12]_1,type_b=f32,m=16,'
fi
exit $FAILED
