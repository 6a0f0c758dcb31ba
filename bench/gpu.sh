#!/usr/bin/env bash
# What only a machine with a GPU can tell: whether the CUDA backend builds and passes its tests there, how long things
# take, and what compute-sanitizer finds. What is worth most comes first; what fails is noted and the rest goes on.
#
#   bench/gpu.sh [--seconds N] [--wheels DIR] [--only "STAGE..."] [OUT]
#
# OUT (bench/results if it is not given) gets stages.txt, which says how each stage ended, and gpu.tar.gz with the logs
# and the results as JSON, which is replaced after every stage. Exits with 1 if a stage did not pass.
# --seconds: for all of it, 480 if it is not given. A stage starts where at least half of the most that it may take is
#   left, and is ended when the time is over.
# --wheels: a directory of wheels that are installed beside the packages of python3, which stay as they are:
#   ros-gtest-vendor, without which the C++ tests are left out, and what else may be missing there. For Python 3.12:
#     python3 -m pip download --no-deps --only-binary :all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#       --platform manylinux2014_x86_64 -c constraints.txt -d wheels \
#       ros-gtest-vendor pybind11 pytest iniconfig pluggy pygments hypothesis sortedcontainers
# --only: of the stages behind the build, these (names as in stages.txt). A build that is there already is brought up to
#   date.
# There have to be nvcc 13, cmake, ninja and Python 3.10 or newer with its headers, torch and transformers; ncu and
# compute-sanitizer for the stages named after them.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

budget=480
wheels=
only=
out=bench/results
while (($#)); do
  case $1 in
    --seconds) budget=$2 && shift ;;
    --wheels) wheels=$2 && shift ;;
    --only) only=$2 && shift ;;
    -*) echo "bench/gpu.sh: unknown option $1" >&2 && exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
out=$(mkdir -p "$out" && cd "$out" && pwd) || exit
build=$PWD/build/gpu
failures=0
logs=$build/logs
results=$build/results
rm -rf "$logs" "$results"
mkdir -p "$logs" "$results"
: >"$out/stages.txt"

# What was found until now, in one file that is whole at every moment.
keep() { tar -czf "$out/gpu.tar.gz.new" -C "$build" logs results && mv "$out/gpu.tar.gz.new" "$out/gpu.tar.gz"; }

say() { echo "$*" | tee -a "$out/stages.txt"; }

# run NAME MOST_SECONDS COMMAND...: runs it if there is time, and says how it ended: 1 if it did not succeed, 2 if there
# was no time, 3 if it took too long.
run() {
  local name=$1 most=$2 began=$SECONDS left=$((budget - SECONDS)) status took ended
  shift 2
  if ((left < 1 || 2 * left < most)); then
    say "$name: not started, $left s are left"
    failures=1
    return 2
  fi
  ((most = most < left ? most : left))
  timeout -k 5 "$most" "$@" >"$logs/$name.log" 2>&1
  status=$?
  took=$((SECONDS - began))
  if ((status == 0)); then
    ended=passed
  elif ((status == 124 || (status == 137 && took >= most))); then
    ended="timed out"
  else
    ended="failed, status $status"
  fi
  say "$name: $ended, $took s"
  keep
  ((status == 0)) && return
  failures=1
  tail -n 20 "$logs/$name.log" | cut -c 1-300 | sed 's/^/  | /'
  [[ $ended == "timed out" ]] && return 3
  return 1
}

asked() { [[ -z $only || " $only " == *" $1 "* ]]; }

# stage NAME MOST_SECONDS COMMAND...: a stage behind the build.
stage() { asked "$1" && run "$@"; }

# measure NAME MOST_SECONDS COMMAND...: one whose last lines are what it found.
measure() { stage "$@" && tail -n 24 "$logs/$1.log" | cut -c 1-700; }

# tested NAME MOST_SECONDS COMMAND...: a stage of the C++ tests, if there are any.
tested() { [[ $gtest == ON ]] && stage "$@"; }

# --- the packages of python3, and more beside them: made from a virtual environment, another one sees none of its ---

outer=$(command -v python3)
python=$build/venv/bin/python
"$outer" -m venv --without-pip "$build/venv" || exit
"$outer" - "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" <<'END' || exit
import pathlib, site, sys
directories = site.getsitepackages() + [site.getusersitepackages()] * bool(site.ENABLE_USER_SITE)
lines = [f"import site; site.addsitedir({directory!r})\n" for directory in directories]
pathlib.Path(sys.argv[1], "outer.pth").write_text("".join(lines))
END
export PATH=$build/venv/bin:$PATH:/usr/local/cuda/bin HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD/service:$PWD/client:$PWD/tests/python${PYTHONPATH:+:$PYTHONPATH}
export DRAFTWERK_CUDA_LIBRARY=$build/libdraftwerk_cuda.so
if [[ -n $wheels ]]; then
  run packages 60 "$python" -m pip install -q --no-index --no-deps --ignore-installed "$wheels"/*.whl
fi
for module in numpy pybind11 torch; do
  "$python" -c "import $module" || { say "$outer has no $module" && exit 1; }
done
nvidia-smi >"$logs/gpu.txt"
# Its clocks while all of this runs; and as long as somebody is at it, a GPU is not made ready anew for each process.
nvidia-smi dmon -d 5 -o T >"$logs/dmon.txt" 2>&1 &
watching=$!
weights=
trap 'kill $watching $weights 2>/dev/null' EXIT
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
[[ -n $capability ]] || { say "nvidia-smi finds no GPU" && exit 1; }
[[ $capability == 90 ]] && capability=90a

# --- the build ------------------------------------------------------------------------------------------------------

if asked transformers; then  # 10 GB that are compared on, written while the compilers work
  "$python" bench/random_gemma4.py E2B "$build/weights" >"$logs/writing.log" 2>&1 &
  weights=$!
fi
if [[ -e $("$python" -c 'import sys; print(sys.prefix)')/src/gtest_vendor/src/gtest-all.cc ]]; then
  gtest=ON
  targets=(draftwerk_gpu_tests draftwerk_gpu_arithmetic_tests draftwerk_gpu_kernel_tests)
else
  gtest=OFF
  targets=()
  failures=1
  say "C++ tests: left out, there is no ros-gtest-vendor among the wheels"
fi
run configure 60 cmake -S . -B "$build" -G Ninja -DDRAFTWERK_BUILD_CUDA=ON -DDRAFTWERK_BUILD_TESTS=$gtest \
  -DCMAKE_CUDA_ARCHITECTURES="$capability-real" -DPython_EXECUTABLE="$python" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" || exit 1
# Of tests that do not compile, speed can be measured all the same.
run build 240 cmake --build "$build" --target _core draftwerk_cuda "${targets[@]}" -- -k 0 \
  || run library 120 cmake --build "$build" --target _core draftwerk_cuda || exit 1
cp "$build"/_core*.so service/draftwerk/

# --- the stages: what is right, what is fast, what explains it ------------------------------------------------------

tested arithmetic 15 "$build/draftwerk_gpu_arithmetic_tests"
# Drafts, logits, and texts of a model like E2B's, whose drafter has clusters, and of one with experts.
tiny='MtpDrafter.DraftsDoNotDependOnTheSequencesBesideIt:EngineTest.LogprobsAreThoseOfTheScoredLogits'
tiny+=':*Gemma4Promise*/edge_q8_0_mtp_60_clusters_of_0:*Gemma4Promise*/experts_f32_mtp_0_clusters_of_0'
tested tests 60 "$build/draftwerk_gpu_tests"
status=$?
# What fails or hangs may be right where kernels are launched in another way: then all that follows is. Where time was
# up, a few tests tell what hangs from what is slow.
if [[ $gtest == ON && -z ${DRAFTWERK_CUDA_LAUNCHES:-} ]] && asked tests; then
  case $status in
    1) again=("ordered single" 60 '*') ;;
    3) again=("early ordered single" 20 "$tiny") ;;
    *) again=("" 0 '') ;;
  esac
  for launches in ${again[0]}; do
    if run "tests-$launches" "${again[1]}" env DRAFTWERK_CUDA_LAUNCHES=$launches "$build/draftwerk_gpu_tests" \
      --gtest_filter="${again[2]}"; then
      [[ $launches == early ]] && break
      export DRAFTWERK_CUDA_LAUNCHES=$launches
      say "launches: $launches from here on"
      break
    fi
  done
fi
measure passes-E2B 60 "$python" bench/gpu_passes.py E2B --rounds 1 --json "$results/passes-E2B.json"
measure passes-31B 120 "$python" bench/gpu_passes.py 31B --rounds 1 --json "$results/passes-31B.json"
# Each suite in a process of its own, as no kernel runs in one after an illegal access.
tested kernels 60 bash -c '
  suites=$("$0" --gtest_list_tests | sed -n "s/^\([^ ]*\.\).*/\1/p") && [[ $suites ]] || exit
  status=0
  for suite in $suites; do "$0" --gtest_filter="$suite*" || status=1; done
  exit $status' "$build/draftwerk_gpu_kernel_tests"
if asked transformers && run weights 60 tail --pid="$weights" -f /dev/null; then
  measure transformers 90 "$python" bench/compare_transformers.py "$build/weights/E2B" --device cuda --weights bf16 \
    --told --tokens 128 --rounds 1 --json "$results/transformers.json"
fi
# What kernels that start early are worth; and whether any of them read what was not there yet: texts would differ.
[[ -z ${DRAFTWERK_CUDA_LAUNCHES:-} ]] \
  && measure ordered-E2B 45 env DRAFTWERK_CUDA_LAUNCHES=ordered "$python" bench/gpu_passes.py E2B --rounds 1 \
    --same-text-as "$results/passes-E2B.json" --json "$results/ordered-E2B.json"
# CUDA_PYTHON_TESTS of the Makefile.
stage parity 90 env DRAFTWERK_PROMISE_EXAMPLES=2 DRAFTWERK_PROMISE_CASES=9 DRAFTWERK_PROMISE_TOKENS=12 \
  "$python" -m pytest -q -p no:cacheprovider tests/python/test_devices.py tests/python/test_cuda_parity.py \
  tests/python/test_fp8.py tests/python/test_gemma4_parity.py tests/python/test_drafter_parity.py \
  tests/python/test_gemma4_promise.py
# Kernel by kernel, which the tools know best, and then as graphs.
for tool in memcheck racecheck synccheck; do
  tested $tool 60 env DRAFTWERK_CUDA_LAUNCHES=single compute-sanitizer --tool $tool --error-exitcode 9 \
    "$build/draftwerk_gpu_tests" --gtest_filter="$tiny"
done
[[ ${DRAFTWERK_CUDA_LAUNCHES:-} != single ]] \
  && tested memcheck-graphs 40 compute-sanitizer --tool memcheck --error-exitcode 9 "$build/draftwerk_gpu_tests" \
    --gtest_filter="$tiny"
measure steps-E2B 45 "$python" bench/gpu_profile.py steps E2B --json "$results/steps-E2B.json"
# All launches of a pass of the smallest model, for whose size they count for most. The clocks stay as they are found:
# ncu would lock them to the base clock, for everybody and for all other figures.
stage ncu 60 env DRAFTWERK_CUDA_LAUNCHES=single ncu --csv --log-file "$results/kernels.csv" --print-units base \
  --kill yes --clock-control none --cache-control none \
  --metrics gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed \
  --launch-skip 1000 --launch-count 470 "$python" bench/gpu_profile.py passes E2B
[[ -s $results/kernels.csv ]] \
  && measure losses 10 "$python" bench/gpu_profile.py losses "$results/kernels.csv" --json "$results/losses.json"
measure steps-31B 60 "$python" bench/gpu_profile.py steps 31B --streams 1 16 --json "$results/steps-31B.json"
measure passes-others 120 "$python" bench/gpu_passes.py 26B-A4B 12B E4B --rounds 1 --json "$results/passes-others.json"
measure passes-quantised 90 "$python" bench/gpu_passes.py E2B 31B --weights int8 int4 fp8 --rounds 1 \
  --json "$results/passes-quantised.json"
exit $failures
