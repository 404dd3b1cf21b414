#!/usr/bin/env bash
# Everything that needs a GPU, in one go and inside eight minutes, the most valuable first: builds the CUDA sources for
# the GPUs present, checks every op, runs the tests marked `gpu` and the benchmarks, and writes a small report folder.
#
#   benchmarks/gpu_check.sh [FOLDER]      default: gpu_report
#
# PYTHON chooses the interpreter; it needs the build requirements and the extras `test` and `bench`. A part that
# fails is reported and does not stop the others; the exit status is 1 if any failed. Tests that are skipped, and
# ops that fall back to PyTorch, are failures here: they say nothing about the kernels.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
report=${1:-gpu_report}
mkdir -p "$report"
report=$(cd "$report" && pwd)
limit=$((SECONDS + 470))
failed=0

note() { printf '%s\n' "$*" | tee -a "$report/summary.txt"; }

says() {  # says FILE PATTERN: whether a line has it; what only a second GPU could do is not looked at
  grep -v 'needs two CUDA devices' "$1" | grep -E "$2" >/dev/null
}

part() {  # [must=PATTERN] [must_not=PATTERN] part NAME SECONDS COMMAND...: within a limit; keep output, note result
  local name=$1 allowed=$2 start=$SECONDS status=0 output=$report/$1.txt
  shift 2
  if ((limit - SECONDS < allowed)); then allowed=$((limit - SECONDS)); fi
  if ((allowed < 1)); then
    status="not run, out of time"
  else
    # INT and not TERM: pytest then says what it has found so far.
    timeout --signal INT --kill-after 10 "$allowed" "$@" >"$output" 2>&1 || status=$?
    if [[ $status == 124 || $status == 137 ]]; then status="$status, stopped after $allowed s"; fi
    if [[ $status == 0 && -n ${must:-} ]] && ! says "$output" "$must"; then
      status="0, but its output lacks '$must'"
    elif [[ $status == 0 && -n ${must_not:-} ]] && says "$output" "$must_not"; then
      status="0, but its output has '$must_not'"
    fi
  fi
  if [[ $status == 0 ]]; then note "ok      $name, $((SECONDS - start)) s"; return; fi
  failed=1
  note "FAILED  $name, $((SECONDS - start)) s: status $status: ${*//$'\n'/; }"
}

tests() {  # tests NAME SECONDS ARGUMENTS...: of which some have to pass, and none may be skipped
  local name=$1 allowed=$2
  shift 2
  must='[0-9]+ passed' must_not='^SKIPPED' part "$name" "$allowed" "$python" -m pytest -p no:cacheprovider \
    --continue-on-collection-errors "$@"
}

date -u +'%Y-%m-%d %H:%M UTC' >"$report/summary.txt"
if ! nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv,noheader >>"$report/summary.txt"; then
  echo "benchmarks/gpu_check.sh: nvidia-smi finds no GPU here" >&2
  exit 1
fi
# 9.0 is called 90a, as in the default build; several GPUs are 80;90a, the newest last.
archs=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | tr -d '. ' | sort -nu | sed 's/^90$/90a/' |
  paste -sd ';')
if ! [[ $archs =~ ^[0-9]+a?(\;[0-9]+a?)*$ ]]; then
  echo "benchmarks/gpu_check.sh: nvidia-smi gives no compute capability, but '$archs'" >&2
  exit 1
fi
# Without this, tests and benchmarks would run on the CPU and say nothing of a GPU.
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  note "FAILED  torch of $python cannot use the GPU"
  exit 1
fi

# Compiled kernels, also where conftest.py finds no /dev/nvidiactl.
# Tests and benchmarks see the kernels themselves, whatever was found of them.
export SPT_FAST_CUDA=on SPT_FAST_CUDA_ARCHS=$archs TRITON_INTERPRET=0 SPT_FAST_VERIFY=0
# The in-place module is the one under test, also for the processes that the tests start.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# An older one must not be taken for it where the build fails.
rm -f spt_fast/_kmeans*.so
part build 200 "$python" setup.py build_ext --inplace
# Nor the module of another checkout that is installed as editable.
part module 30 "$python" -c 'import os
from spt_fast import _kmeans
print(_kmeans.__file__, _kmeans.build_info())
assert os.path.samefile(os.path.dirname(_kmeans.__file__), "spt_fast") and _kmeans.build_info()["cuda"]'
must='^all [0-9]+ ok' must_not='fallback|no CUDA device' part check 120 "$python" -m spt_fast doctor --check
part doctor 30 "$python" -m spt_fast doctor
# What is claimed of speed, while there is time; `check` has seen that results are right.
part prompt_attention 60 "$python" -m benchmarks.bench_prompt_attention --rounds 20
part step 60 "$python" -m benchmarks.bench_prompted_step --device cuda --dtype bf16 --batch 64 \
  --sides ours ours-cast concat plain linear-probe full
part nmi 40 "$python" -m benchmarks.bench_nmi --rounds 5
part tracker 40 "$python" -m benchmarks.bench_nmi --tracker
part kmeans 60 "$python" -m benchmarks.bench_kmeans_cuda
# Each test of attention compiles kernels of its own. What they compile to needs no GPU to be seen.
tests tests 120 -n 4 -m gpu -k "not as_compiled"
tests attention 60 -n 8 tests/ops/test_prompt_attention.py -k "triton or kernel"
if command -v compute-sanitizer >/dev/null; then
  must='[0-9]+ passed' must_not='^SKIPPED' part memcheck 60 compute-sanitizer --error-exitcode 9 "$python" -m pytest \
    -x -m gpu tests/ops/test_cuda_source.py -k "not full_size" -p no:cacheprovider
else
  note "not run memcheck: compute-sanitizer is not installed"
fi
part table1 60 "$python" -m benchmarks.bench_table1 --device cuda --csv "$report/table1.csv"
# Last: the same once more, for a table. Those of bench_kmeans.py are for the CPU.
must='[0-9]+ passed' part benchmarks 90 "$python" -m pytest benchmarks --ignore benchmarks/bench_kmeans.py \
  --benchmark-only --benchmark-json "$report/benchmarks.json" -p no:cacheprovider
part report 30 "$python" -m benchmarks.report "$report/benchmarks.json" --out "$report" --overwrite
# What went wrong, in the ops' own words, and how the tests ended.
grep -h WRONG "$report/check.txt" 2>/dev/null
tail -n 1 "$report/tests.txt" "$report/attention.txt" "$report/benchmarks.txt" 2>/dev/null
printf 'report: %s\n' "$report"
exit "$failed"
