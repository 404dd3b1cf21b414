#!/usr/bin/env bash
# Everything that needs a GPU, in one go and inside ten minutes: builds the CUDA sources for the GPU present, runs
# the tests marked `gpu` and the benchmarks, and writes a small report folder.
#
#   benchmarks/gpu_check.sh [FOLDER]      default: gpu_report
#
# PYTHON chooses the interpreter; it needs the build requirements and the extras `test` and `bench`. A part that
# fails is reported and does not stop the others; the exit status is 1 if any failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
report=${1:-gpu_report}
mkdir -p "$report"
report=$(cd "$report" && pwd)
limit=$((SECONDS + 570))
failed=0

part() {  # part NAME SECONDS COMMAND...: run within a limit, keep the output, note the result
  local name=$1 allowed=$2 start=$SECONDS status=0
  shift 2
  if ((limit - SECONDS < allowed)); then allowed=$((limit - SECONDS)); fi
  if ((allowed < 1)); then
    status="skipped, out of time"
  else
    timeout "$allowed" "$@" >"$report/$name.txt" 2>&1 || status=$?
  fi
  if [[ $status != 0 ]]; then failed=1; fi
  printf '%-12s status %s, %d s: %s\n' "$name" "$status" $((SECONDS - start)) "$*" | tee -a "$report/summary.txt"
}

date -u +'%Y-%m-%d %H:%M UTC' >"$report/summary.txt"
if ! nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv,noheader >>"$report/summary.txt"; then
  echo "benchmarks/gpu_check.sh: nvidia-smi finds no GPU here" >&2
  exit 1
fi
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')

export SPT_FAST_CUDA=on SPT_FAST_CUDA_ARCHS=$arch
# The in-place module is the one under test, also for the processes that the tests start.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
part build 180 "$python" setup.py build_ext --inplace
part doctor 30 "$python" -m spt_fast doctor
part tests 240 "$python" -m pytest -m gpu -p no:cacheprovider
part attention 120 "$python" -m pytest tests/test_prompt_attention.py -k "triton or kernel" -p no:cacheprovider
if command -v compute-sanitizer >/dev/null; then
  part memcheck 90 compute-sanitizer --error-exitcode 9 "$python" -m pytest -x -m gpu tests/test_cuda_source.py \
    -p no:cacheprovider
fi
part benchmarks 200 "$python" -m pytest benchmarks --benchmark-only --benchmark-json "$report/benchmarks.json" \
  -p no:cacheprovider
part report 30 "$python" -m benchmarks.report "$report/benchmarks.json" --out "$report" --overwrite
part kmeans 90 "$python" -m benchmarks.bench_kmeans_cuda
part step 90 "$python" -m benchmarks.bench_prompted_step --device cuda --dtype bf16 --batch 64 \
  --sides ours ours-cast concat plain linear-probe full
part nmi 60 "$python" -m benchmarks.bench_nmi --tracker
part table1 90 "$python" -m benchmarks.bench_table1 --device cuda --csv "$report/table1.csv"
tail -n 3 "$report/tests.txt" "$report/benchmarks.txt" 2>/dev/null
printf 'report: %s\n' "$report"
exit "$failed"
