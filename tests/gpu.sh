#!/usr/bin/env bash
# All that a GPU has to say about the kernels, in one call of less than ten minutes:
#     1. the tests of the kernels, on its tensors         tests/test_kernels*.py
#     2. every kernel again and again on one input        tests/gpu_repeat.py
#     3. compute-sanitizer on a few programs, if it is installed: memcheck, racecheck
#     4. hedgehog bench                                   results/bench-DEVICE.json
# Each part has its share of the time; one that fails or is cut off does not stop the next, and the last lines say how each went.
#
# Needed: Linux, a GPU, Python with torch, triton and transformers, and these packages, which are installed from a folder of
# wheels where they are missing (make it on another machine with `pip download -d wheels NAMES`):
#     pytest pytest-xdist hypothesis fastcore typer rich
# With matplotlib, datasets, peft and accelerate missing all of this runs. flash-linear-attention is measured if it is there.
#
# What may be overridden, as in `SECONDS_ALL=1800 make gpu`:
#     PYTHON        the interpreter                                     (python3)
#     WHEELS        the folder of wheels                                (wheels)
#     OUT           the folder of results                               (results)
#     SECONDS_ALL   for all parts together                              (560)
#     WORKERS       processes of tests at a time: compiling is the work (the cores of this machine, 16 at most)
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} WHEELS=${WHEELS:-wheels} OUT=${OUT:-results} SECONDS_ALL=${SECONDS_ALL:-560}
WORKERS=${WORKERS:-$(n=$(getconf _NPROCESSORS_ONLN); [ "$n" -gt 16 ] && n=16; echo "$n")}
export PYTHONPATH="$PWD" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || { echo "make gpu needs PyTorch and a GPU that it can use; there is none here. make test runs the kernels in Triton's interpreter." >&2; exit 1; }
for p in pytest xdist:pytest-xdist hypothesis fastcore typer rich; do
  "$PYTHON" -c "import ${p%%:*}" 2>/dev/null || "$PYTHON" -m pip install -q --no-index --find-links "$WHEELS" "${p##*:}" || { echo "${p##*:} is missing, and not among the wheels in $WHEELS" >&2; exit 1; }
done

start=$SECONDS; said=(); bad=0
left() { echo $(( SECONDS_ALL - (SECONDS - start) )); }
part() { # name, seconds at most, command
  local name=$1 most=$2 t=$SECONDS rc; shift 2
  [ "$most" -gt "$(left)" ] && most=$(left)
  if [ "$most" -lt 5 ]; then said+=("$name: not run, no time left"); bad=1; return; fi
  echo "== $name (at most $most s)"
  timeout -k 5 "$most" "$@"; rc=$?
  case $rc in 0) said+=("$name: passed, $((SECONDS - t)) s");; 124|137) said+=("$name: cut off after $most s"); bad=1;; *) said+=("$name: FAILED ($rc), $((SECONDS - t)) s"); bad=1;; esac
}

"$PYTHON" -c 'import torch, triton; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)'
device=$("$PYTHON" -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')
# A part of each file first: shapes, dtypes, everything at once, and what must repeat
part "the kernels' tests, the first half" 170 env HEDGEHOG_TUNE=0 "$PYTHON" -m pytest -q -n "$WORKERS" tests/test_kernels*.py -k "shapes or dtypes or everything or repeat or whole or packed or prompt or autocast"
part "every kernel, again and again" 60 env HEDGEHOG_TUNE=0 "$PYTHON" tests/gpu_repeat.py
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    part "compute-sanitizer $tool" 45 env HEDGEHOG_TUNE=0 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 3 --target-processes all "$PYTHON" tests/gpu_repeat.py --small
  done
else said+=("compute-sanitizer: not run, not installed"); fi
part "hedgehog bench" 200 "$PYTHON" -c 'from hedgehog_nb.cli import app; app(prog_name="hedgehog")' bench --overwrite --minutes 3 --out "$OUT/bench-$device.json"
part "the kernels' tests, the other half" "$(left)" env HEDGEHOG_TUNE=0 "$PYTHON" -m pytest -q -n "$WORKERS" tests/test_kernels*.py -k "not (shapes or dtypes or everything or repeat or whole or packed or prompt or autocast) and not import and not hopper"

printf '%s\n' "== $device, $((SECONDS - start)) s" "${said[@]}"
exit $bad
