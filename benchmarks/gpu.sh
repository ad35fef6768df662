#!/usr/bin/env bash
# Builds, tests, checks and measures the kernels on a machine with an NVIDIA GPU, without a network.
#
#   benchmarks/gpu.sh                   everything, in less than 10 minutes
#   benchmarks/gpu.sh build kernels=60  some parts, kernels in at most 60 seconds, of:
#                                       build tests sanitize tune kernels models search ncu
#   benchmarks/gpu.sh build peers       what does not fit into everything's ten minutes: models
#                                       beside peers that tune for minutes, sizes (B4, V2-S at 384),
#                                       modes (other batches and precisions)
#
# A part that fails is reported and does not stop the others; the exit status is 1 if any did.
# Needs python3 with torch (CUDA), triton, timm, pytest and ninja; nvcc; for sanitize
# compute-sanitizer, for ncu ncu. Logs, JSON and plots go to $OUT, or benchmarks/results/<device>.
# tune replaces the package's table of tiles for the GPU, and what comes after it runs with the new
# one. KERNELS are the ops to measure, all unless given (KERNELS="mbconv squeeze_excite");
# KERNELS_ARGS and MODELS_ARGS replace those two parts' options, TESTS what tests are chosen by.
# shellcheck disable=SC2329  # the parts are called by name
set -uo pipefail

readonly PARTS=(build tests sanitize tune kernels models search ncu)
readonly MORE=(peers sizes modes)
# Seconds; of the parts together, with the start, less than 10 minutes.
declare -A LIMITS=([build]=105 [tests]=110 [sanitize]=40 [tune]=60 [kernels]=100 [models]=115
  [search]=20 [ncu]=35 [peers]=330 [sizes]=330 [modes]=220)
readonly B0=efficientnet_b0@224 V2_S=efficientnetv2_s@300
# Of the ops' benchmarks.
readonly BRIEF=(--dtypes bfloat16 --caches warm --seconds 0.1 --quiet)

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"

usage() {
  sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'
}

# Runs a command under the part's remaining time: an interrupt first, so that results are written.
limited() {
  timeout --signal=INT --kill-after=10 "$((PART_END - SECONDS > 1 ? PART_END - SECONDS : 1))" "$@"
}

need() {
  command -v "$1" >/dev/null && return
  echo "cannot: there is no $1 on the PATH"
  return 1
}

part_build() {
  need nvcc || return
  export TORCH_CUDA_ARCH_LIST="$ARCH" MAX_JOBS="${MAX_JOBS:-16}" FORCE_CUDA=1
  echo "building for compute capability $ARCH with $MAX_JOBS jobs"
  limited python3 setup.py build_ext --inplace || return
  limited python3 -m effnet_kernels info
}

part_tests() {
  local parallel=()
  if python3 -c "import xdist" 2>/dev/null; then
    parallel=(-n "$(($(nproc) > 4 ? $(nproc) - 2 : 2))" --dist worksteal)
  fi
  PYTHONPATH="$PWD/tests:$PWD/benchmarks:$PYTHONPATH" limited python3 -m pytest tests/ops \
    tests/layers tests/test_convert.py tests/test_round_trip.py -m "" -q -p no:cacheprovider \
    --tb=short -k "${TESTS:-(cuda or triton) and not on_cpu}" --durations=5 "${parallel[@]}"
}

part_sanitize() {
  need compute-sanitizer || return
  local tool status=0
  # Every allocation by itself, or reads past a tensor's end would land in its neighbour.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    echo "== $tool"
    # Of the kernels that are ours: cuDNN's have races.
    limited compute-sanitizer --tool "$tool" --kernel-name kns=effnet --error-exitcode 9 \
      python3 benchmarks/exercise.py small --backend cuda || status=$?
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
  return "$status"
}

part_tune() {
  limited python3 -m effnet_kernels tune --jobs "$(nproc)" || return
  # Beside the results, which are read as such, not among them.
  mkdir -p "$OUT/tiles" && cp effnet_kernels/triton/tiles/*.json "$OUT/tiles"
}

# Measures an op in a share, in hundredths, of what time the part has left; options follow.
measure() {
  local share=$1 op=$2
  shift 2
  if [[ " ${KERNELS:-$op} " != *" $op "* ]]; then return; fi
  local PART_END=$((SECONDS + (PART_END - SECONDS) * share / 100))
  echo "== $op"
  limited python3 "benchmarks/kernels/$op.py" --out "$OUT" "$@"
}

part_kernels() {
  local status=0 op args
  if [[ -n ${KERNELS_ARGS:-} ]]; then
    read -ra args <<<"$KERNELS_ARGS"
    for op in mbconv fused_mbconv depthwise_conv_bn_act pointwise_conv_bn_act squeeze_excite \
      batch_norm_act; do
      measure 100 "$op" "${args[@]}" || status=$?
    done
    return "$status"
  fi
  args=("${BRIEF[@]}" --models efficientnet_b0 --batch 256)
  # Beside whole blocks in inference also torch.compile, which takes seconds for each.
  measure 30 mbconv "${args[@]}" --modes inference --only compile cuda triton auto || status=$?
  measure 30 mbconv "${args[@]}" --modes training --only cuda triton \
    --name kernels-mbconv-training || status=$?
  # B0 has no Fused-MBConv.
  measure 35 fused_mbconv "${args[@]}" --models efficientnetv2_s --batch 128 --modes inference \
    --only compile folded folded+compile cuda triton auto || status=$?
  measure 30 fused_mbconv "${args[@]}" --models efficientnetv2_s --batch 128 --modes training \
    --only cuda triton --name kernels-fused_mbconv-training || status=$?
  measure 40 depthwise_conv_bn_act "${args[@]}" --modes inference training \
    --only compile cuda triton || status=$?
  measure 35 pointwise_conv_bn_act "${args[@]}" --only cuda triton || status=$?
  measure 50 squeeze_excite "${args[@]}" --only cuda triton || status=$?
  measure 100 batch_norm_act "${args[@]}" --only cuda triton || status=$?
  return "$status"
}

# Measures a model in a share, in hundredths, of what time the part has left, beside torch.compile
# unless options say otherwise: name, model, mode, batches.
measure_model() {
  local share=$1 name=$2 model=$3 mode=$4
  shift 4
  local PART_END=$((SECONDS + (PART_END - SECONDS) * share / 100))
  echo "== $name"
  limited python3 benchmarks/models/efficientnet.py --out "$OUT" --name "models-$name" --quiet \
    --dtypes bfloat16 --seconds 1 --models "$model" --modes "$mode" --only compile auto --batch "$@"
}

part_models() {
  local status=0 args
  if [[ -n ${MODELS_ARGS:-} ]]; then
    read -ra args <<<"$MODELS_ARGS"
    limited python3 benchmarks/models/efficientnet.py --out "$OUT" "${args[@]}"
    return
  fi
  # Most of the time is torch.compile's.
  measure_model 30 inference-b0 "$B0" inference 1 32 256 --only compile cuda triton auto ||
    status=$?
  measure_model 30 training-b0 "$B0" training 128 || status=$?
  measure_model 50 inference-v2-s "$V2_S" inference 128 --only compile cuda triton auto || status=$?
  measure_model 100 training-v2-s "$V2_S" training 64 || status=$?
  return "$status"
}

# Beside peers that tune or compile for minutes. A problem whose contenders are not all through when
# its time is up leaves nothing, so each has a call, and the order is that of worth.
part_peers() {
  local status=0
  measure_model 40 inference-b0-peers "$B0" inference 256 --only compile compile-max xla auto ||
    status=$?
  measure_model 50 training-b0-peers "$B0" training 128 --only compile xla auto || status=$?
  measure 100 fused_mbconv "${BRIEF[@]}" --models efficientnetv2_s --batch 128 --modes inference \
    --only compile-max folded folded+compile auto --name kernels-fused_mbconv-peers || status=$?
  return "$status"
}

part_sizes() {
  local status=0 b4=efficientnet_b4@380 v2_s=efficientnetv2_s@384
  measure_model 20 inference-b4 "$b4" inference 256 || status=$?
  measure_model 25 inference-v2-s-384 "$v2_s" inference 256 || status=$?
  measure_model 50 training-b4 "$b4" training 64 || status=$?
  measure_model 100 training-v2-s-384 "$v2_s" training 64 || status=$?
  return "$status"
}

# The other batches and precisions.
part_modes() {
  local status=0
  measure_model 20 inference-b0-32 "$B0" inference 32 || status=$?
  measure_model 25 inference-b0-autocast "$B0" inference-autocast 256 || status=$?
  measure_model 50 training-b0-pure "$B0" training-pure 128 || status=$?
  measure_model 100 training-b0-256 "$B0" training 256 || status=$?
  return "$status"
}

part_search() {
  limited python3 benchmarks/stages.py --seconds 0.5 --out "$OUT/search/stages.json"
}

part_ncu() {
  need ncu || return
  local ours="dense_conv|depthwise_conv|expand_depthwise|fused_mbconv|pointwise_|squeeze_excite"
  ours+="|channel_s|batch_norm_act|batch_statistics|reduce_partials"
  limited ncu --clock-control none --kernel-name "regex:$ours" --launch-count 80 \
    --section SpeedOfLight --section LaunchStats --section Occupancy --csv --page details \
    --log-file "$OUT/ncu.csv" python3 benchmarks/exercise.py model --backend cuda || return
  python3 - "$OUT/ncu.csv" <<'PYTHON'
import csv, sys

lines = [line for line in open(sys.argv[1]) if line.startswith('"')]
wanted = ("Duration", "DRAM Throughput", "Registers Per Thread", "Achieved Occupancy")
kernels = {}
for row in csv.DictReader(lines):
    if row["Metric Name"] in wanted:
        name = row["Kernel Name"].split("(")[0][:60]
        kernels.setdefault((row["ID"], name), {})[row["Metric Name"]] = (
            f"{row['Metric Value']} {row['Metric Unit']}"
        )
if not kernels:
    sys.exit("ncu saw no kernel")
for (_, name), metrics in kernels.items():
    print(f"{name:60} " + "  ".join(f"{m}: {metrics.get(m, '-')}" for m in wanted))
PYTHON
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  usage
  exit 0
fi
selected=()
for argument in "${@:-${PARTS[@]}}"; do
  part=${argument%%=*}
  if [[ -z ${LIMITS[$part]:-} || ($argument == *=* && ! ${argument#*=} =~ ^[1-9][0-9]*$) ]]; then
    echo "gpu.sh: there is no part '$argument', only: ${PARTS[*]} ${MORE[*]}," \
      "or one of them and =SECONDS" >&2
    exit 2
  fi
  if [[ $argument == *=* ]]; then LIMITS[$part]=${argument#*=}; fi
  selected+=("$part")
done

ARCH=$(python3 -c '
import sys, torch
if not torch.cuda.is_available():
    sys.exit(1)
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if major >= 9 else ""))') || ARCH=""
if [[ -n $ARCH ]]; then
  slug=$(python3 -c 'import re, torch
print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')
else
  slug=no-gpu
  echo "gpu.sh: PyTorch sees no GPU here: nothing can be built for it, tested or measured on it"
fi
OUT=${OUT:-benchmarks/results/$slug}
mkdir -p "$OUT" || exit 2
: >"$OUT/gpu.log"

declare -A RESULTS TIMES
failed=0
for part in "${selected[@]}"; do
  echo "=== $part (at most ${LIMITS[$part]} s)" | tee -a "$OUT/gpu.log"
  began=$SECONDS
  PART_END=$((SECONDS + LIMITS[$part]))
  if [[ -z $ARCH ]]; then
    echo "cannot: no GPU"
    status=3
  else
    # A subshell, so that what a part exports ends with it.
    ("part_$part") 2>&1 | tee -a "$OUT/gpu.log"
    status=${PIPESTATUS[0]}
  fi
  TIMES[$part]=$((SECONDS - began))
  case $status in
    0) RESULTS[$part]=ok ;;
    3) RESULTS[$part]="not run: no GPU" ;;
    124 | 137) RESULTS[$part]="FAILED: out of time" ;;
    *) RESULTS[$part]="FAILED: exit status $status" ;;
  esac
  if [[ $status -ne 0 ]]; then failed=1; fi
done

echo "=== summary of ${slug}, in $OUT"
for part in "${selected[@]}"; do
  printf '%-10s %5d s  %s\n' "$part" "${TIMES[$part]}" "${RESULTS[$part]}"
done | tee -a "$OUT/gpu.log"
exit "$failed"
