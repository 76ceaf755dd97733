#!/bin/bash
# Are the kernels clean under compute-sanitizer? The check programs of benchmarks/cuda_lab by themselves (`check small`),
# then their few small launches (`check tiny`) under memcheck and racecheck; a line for each run.
#
#   benchmarks/h200/sanitize.sh              # builds the programs with nvcc first (for this machine's GPU)
#   benchmarks/h200/sanitize.sh FOLDER       # takes them from there: tile_check, act_check, attn_check, product,
#                                            # batch_product, prefill_product, and the last three with -DTQ_RACECHECK as NAME-racecheck
#
# racecheck gets that form, in which it can follow what orders the accesses (tq-decode-stream.cuh, tq-wgmma.cuh). Versions
# that also ask for a fence between a lane's read and the bulk copy over it (fence.proxy.async) are told not to: the copy
# waits at an mbarrier for those who have read, as in CUTLASS.
# Exit status 1 if a program or a tool reports an error or runs past its time. Settings:
#   PROGRAMS   which (default: all six)      TOOLS   (default: "memcheck racecheck")
#   LIMIT      seconds for each run (default: 60)
#   SANITIZER  the tool, where another than the installed one is wanted
#   ARCH       for nvcc (default: 90a where the GPU has 9.0, else native)
#   OUT        folder for the logs (default: sanitize here)
#   BIN        folder with test-backend-ops: memcheck then also runs over its small products of both types
set -u
case ${1:-} in -*) sed -n '2,/^set/{/^set/!p}' "$0" | sed 's/^# \{0,1\}//'; exit 2 ;; esac
HERE=$(cd "$(dirname "$0")" && pwd)
LAB=$HERE/../cuda_lab
KERNELS=$HERE/../../third_party/llama.cpp/overlay/ggml/src/ggml-cuda/tq/kernels
OUT=${OUT:-sanitize} LIMIT=${LIMIT:-60} TOOLS=${TOOLS:-memcheck racecheck}
PROGRAMS=${PROGRAMS:-tile_check act_check attn_check product batch_product prefill_product}
SANITIZER=${SANITIZER:-$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2> /dev/null | tail -1)}
[ -n "$SANITIZER" ] || { echo "there is no compute-sanitizer; it comes with the CUDA toolkit" >&2; exit 2; }
"$SANITIZER" --version > /dev/null || { echo "$SANITIZER does not run" >&2; exit 2; }
echo "$SANITIZER: $("$SANITIZER" --version | grep Version)"
NO_FENCE=()
if "$SANITIZER" --help 2>&1 | grep -q racecheck-fence-proxy-async; then NO_FENCE=(--racecheck-fence-proxy-async no); fi
mkdir -p "$OUT" || exit 2
FAILED=0

# build PROGRAM FILE FLAGS...
build() {
    local arch=${ARCH:-native} define=() program=$1 file=$2 sources=()
    shift 2
    if [ "$arch" = native ] && nvidia-smi --query-gpu=compute_cap --format=csv,noheader | grep -q '^9.0'; then arch=90a; fi
    case $arch in
        native) arch=native ;;
        *a) define=(-DGGML_CUDA_TQ_SM90A) arch=sm_$arch ;;
        *) arch=sm_$arch ;;
    esac
    case $program in # as the head of each says; act_check.cu has what it checks by #include
        product) sources=("$KERNELS"/tq-act.cu) ;;
        batch_product) sources=("$KERNELS"/tq-prefill.cu "$KERNELS"/tq-prefill-wgmma.cu "$KERNELS"/tq-act.cu) ;;
        prefill_product) sources=("$KERNELS"/tq-prefill.cu "$KERNELS"/tq-prefill-wgmma.cu) ;;
        tile_check) sources=("$KERNELS"/tq-tile.cu) ;;
        attn_check) sources=("$KERNELS"/tq-act.cu -use_fast_math) ;;
        act_check) sources=(-use_fast_math) ;;
    esac
    # -lineinfo: the sanitizer names source lines
    nvcc -O3 -std=c++17 -lineinfo -cudart static -arch="$arch" "${define[@]}" "$@" -I"$KERNELS" -o "$OUT/$file" \
        "$LAB/$program.cu" "${sources[@]}" > "$OUT/$file-build.txt" 2>&1
}

# find FOLDER PROGRAM FILE FLAGS...: a program's path, after building it where there is no folder.
find_program() {
    local folder=$1 program=$2 file=$3
    shift 3
    if [ -z "$folder" ]; then
        folder=$OUT
        build "$program" "$file" "$@" || { echo "FAILED  $file was not built (log: $OUT/$file-build.txt)" >&2; return 1; }
    fi
    [ -x "$folder/$file" ] || { echo "FAILED  there is no $file in $folder" >&2; return 1; }
    echo "$(cd "$folder" && pwd)/$file"
}

# check NAME COMMAND...: runs it and says how it ended.
check() {
    local name=$1 rc
    shift
    local started=$SECONDS
    timeout -k 2 "$LIMIT" "$@" > "$OUT/$name.txt" 2>&1
    rc=$?
    [ $rc = 0 ] || FAILED=1
    case $rc in
        0) echo "ok      $name ($((SECONDS - started)) s): $(tail -1 "$OUT/$name.txt")" ;;
        124 | 137) echo "LATE    $name: stopped after $LIMIT s (log: $OUT/$name.txt)" ;;
        *) echo "FAILED  $name: exit status $rc (log: $OUT/$name.txt)"; grep -m 12 '=========\|FAIL\|rror' "$OUT/$name.txt" ;;
    esac
    return $rc
}

# racecheck NAME KERNEL BARRIERS COMMAND...: of kernels whose name has KERNEL in it; those that make data and reference are
# the lab's. BARRIERS: the most that a thread block has; the tool counts where they are initialised, and ours are in loops.
racecheck() {
    local name=$1 kernel=$2 barriers=$3
    shift 3
    check "$name" "$SANITIZER" --tool racecheck "${NO_FENCE[@]}" --num-cuda-barriers "$barriers" --kernel-name "kns=$kernel" \
        --error-exitcode 9 "$@"
}

for program in $PROGRAMS; do
    path=$(find_program "${1:-}" "$program" "$program") || { FAILED=1; continue; }
    check "$program" "$path" check small || continue
    for tool in $TOOLS; do
        if [ "$tool" != racecheck ]; then
            check "$program-$tool" "$SANITIZER" --tool "$tool" --error-exitcode 9 "$path" check tiny
            continue
        fi
        case $program in
            product | batch_product | prefill_product)
                path=$(find_program "${1:-}" "$program" "$program-racecheck" -DTQ_RACECHECK) || { FAILED=1; continue; } ;;
        esac
        case $program in
            product) # one thread block by itself, then two, which wait for one another
                racecheck product-racecheck-1 tq_decode 16 "$path" check tiny 1
                racecheck product-racecheck-2 tq_decode 16 "$path" check tiny 2 ;;
            batch_product) racecheck batch_product-racecheck tq_batch_kernel 16 "$path" check tiny ;;
            prefill_product) racecheck prefill_product-racecheck prefill_ 64 "$path" check tiny ;;
            attn_check) racecheck attn_check-racecheck attention_kernel 1 "$path" check tiny ;;
            act_check) racecheck act_check-racecheck _kernel 0 "$path" check tiny ;;
            *) racecheck "$program-racecheck" tq_ 0 "$path" check tiny ;;
        esac
    done
done
if [ -n "${BIN:-}" ]; then
    export GGML_CUDA_TQ=tiles # our own kernels
    check backend-ops-memcheck "$SANITIZER" --tool memcheck --error-exitcode 9 "$BIN/test-backend-ops" test -b CUDA0 \
        -o MUL_MAT -p 'type_a=tq[12]_1,type_b=f32,m=16,'
fi
exit $FAILED
