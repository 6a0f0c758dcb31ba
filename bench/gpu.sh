#!/usr/bin/env bash
# What only a machine with a GPU can tell: whether the CUDA backend builds and passes its tests there, what
# compute-sanitizer finds, and how long things take. Eight minutes at most; what fails is noted and the rest goes on.
#
#   bench/gpu.sh [OUT [WHEELS]]
#
# OUT (bench/results if it is not given) gets a log of each stage, stages.txt, passes.json, passes-quantised.json and
# transformers.json. Where not all of it fits into the time, GPU_SECONDS=900 gives it more.
# WHEELS is a directory of wheels, which are installed beside the system's packages: pybind11, ros-gtest-vendor, pytest,
# and of draftwerk's dependencies in pyproject.toml those that are not there (`pip download` for that machine's Python).
# There have to be nvcc 13, cmake, ninja and Python 3.10 or newer with its headers; parity and comparisons need torch and
# transformers.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results}
out=$(mkdir -p "$out" && cd "$out" && pwd)
wheels=${2:-}
build=build/gpu
budget=${GPU_SECONDS:-480}

# stage NAME MOST_SECONDS COMMAND...: runs it in what is left of the time; 1 if it fails.
stage() {
  local name=$1 most=$2 began=$SECONDS left=$((budget - SECONDS)) status
  shift 2
  ((left > 5)) || { echo "$name: no time left" | tee -a "$out/stages.txt"; return 1; }
  timeout -k 5 "$((left < most ? left : most))" "$@" >"$out/$name.log" 2>&1
  status=$?
  echo "$name: $((SECONDS - began)) s, status $status" | tee -a "$out/stages.txt"
  return "$status"
}

python3 -m venv --system-site-packages "$build/venv"
python=$PWD/$build/venv/bin/python
export PATH=$PWD/$build/venv/bin:$PATH:/usr/local/cuda/bin
if [[ -n $wheels ]]; then
  stage packages 60 "$python" -m pip install -q --no-index --no-deps --upgrade "$wheels"/*.whl
fi
export HF_HUB_OFFLINE=1
export PYTHONPATH=$PWD/service:$PWD/client:$PWD/tests/python DRAFTWERK_CUDA_LIBRARY=$PWD/$build/libdraftwerk_cuda.so
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
[[ $capability == 90 ]] && capability=90a
nvidia-smi >"$out/gpu.txt"
# 10 GB that the comparison with transformers reads, written while the compilers work.
"$python" bench/random_gemma4.py E2B "$build/weights" >"$out/writing.log" 2>&1 &
weights=$!
trap 'kill "$weights" 2>/dev/null' EXIT

stage configure 60 cmake -S . -B "$build" -G Ninja -DDRAFTWERK_BUILD_CUDA=ON -DDRAFTWERK_BUILD_TESTS=ON \
  -DCMAKE_CUDA_ARCHITECTURES="$capability-real" -DPython_EXECUTABLE="$python" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)"
stage build 240 cmake --build "$build" --target _core draftwerk_cuda draftwerk_gpu_tests || exit 1
cp "$build"/_core*.so service/draftwerk/

# What is right comes before what is fast.
stage build-arithmetic 30 cmake --build "$build" --target draftwerk_gpu_arithmetic_tests \
  && stage arithmetic 10 "$build/draftwerk_gpu_arithmetic_tests"
stage tests 60 "$build/draftwerk_gpu_tests" --gtest_brief=1
tiny='MtpDrafter.DraftsDoNotDependOnTheSequencesBesideIt:EngineTest.LogprobsAreThoseOfTheScoredLogits'
for tool in memcheck racecheck; do
  stage $tool 30 compute-sanitizer --tool $tool --error-exitcode 9 "$build/draftwerk_gpu_tests" --gtest_filter="$tiny"
done
stage parity 60 "$python" -m pytest -q -p no:cacheprovider tests/python/test_devices.py tests/python/test_cuda_parity.py \
  tests/python/test_fp8.py tests/python/test_gemma4_parity.py tests/python/test_drafter_parity.py
stage passes 150 "$python" bench/gpu_passes.py E2B 31B 26B-A4B 12B E4B --rounds 1 --json "$out/passes.json"
# The kernels of a few passes of the smallest model, whose launches count for most: what to make faster.
stage profile 30 ncu --csv --kill yes --metrics gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed \
  --launch-skip 2000 --launch-count 600 "$python" bench/gpu_passes.py E2B --rounds 1
stage weights 30 tail --pid="$weights" -f /dev/null
stage transformers 90 "$python" bench/compare_transformers.py "$build/weights/E2B" --device cuda --weights bf16 --told \
  --tokens 128 --rounds 1 --json "$out/transformers.json"
stage quantised 60 "$python" bench/gpu_passes.py E2B 31B --weights int8 int4 fp8 --rounds 1 --json "$out/passes-quantised.json"
