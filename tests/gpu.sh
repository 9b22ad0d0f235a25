#!/usr/bin/env bash
# What a GPU has to say about this library, in parts. Each is one command of nine minutes at most, writes as it goes, and goes on
# where it was cut off when it is run again. One that fails does not stop the next; the last lines say how each went.
#
#     tests/gpu.sh              all parts, one after the other: smoke tests sanitize bench models
#     tests/gpu.sh smoke bench  these
#
#     smoke      90 s: the kernels that matter most, forward and every gradient, against fp64, 20 times for equal bits; then their time,
#                softmax's and a copy's. Once more with the assembler in .gpu/*/ptxas.xz, if one was carried             OUT/smoke-DEVICE[-ptxas].json
#                Then hedgehog bench --self-check: what a user's first call compares, and its verdicts
#     tests      every kernel again and again on one input; then the kernels' tests, the important first, side by side      OUT/tests-DEVICE.jsonl
#     sanitize   compute-sanitizer, memcheck and racecheck, on a few programs in bf16 with 64 channels                      OUT/sanitize-TOOL-DEVICE.log
#     bench      hedgehog bench: ours and softmax first, then flash-linear-attention, then what compiles for long           OUT/bench-DEVICE.json
#     models     models converted on the GPU and their decoding                           OUT/gpu-*.json, OUT/*.tar; its state in build/gpu-models
#
# Needed: Linux, a GPU, Python with torch, triton, transformers, numpy and fastcore. tests needs pytest, pytest-xdist and hypothesis too; bench and
# the self-check typer and rich (flash-linear-attention is measured if it is there); models accelerate, matplotlib, peft and safetensors.
# A machine without a network: on another one `make gpu-files` makes the folders .gpu/1, .gpu/2, ... of at most 45 MB each:
#     .gpu/1        wheels (fastcore, flash-linear-attention, fla-core, datasets and its needs, gguf), and ptxas 13.4
#     .gpu/2 ...    with MODELS='.../smollm2-135m-instruct' DATA='.../wikitext-2': model and text, folders of these names, cut into pieces
# Carry what a part needs: .gpu/1 for all parts, the others for models. Wheels are installed beside, not into, Python, which looks there last;
# pieces are joined in .gpu/files, where models looks if HEDGEHOG_MODELS and HEDGEHOG_DATA do not say otherwise. What is not complete is not used.
# To go on on a machine that is bare again, carry the files in OUT along; for models build/gpu-models too, which holds what is half done.
#
# What may be overridden, as in `SECONDS_PART=300 make gpu-tests`:
#     HEDGEHOG_MODELS, HEDGEHOG_DATA   folders that hold smollm2-135m-instruct and wikitext-2     (.gpu/files/models, .gpu/files/data)
#     PYTHON         the interpreter                                          (python3)
#     OUT            the folder of results                                    (results)
#     SECONDS_PART   for each part, a whole number                           (530)
#     WORKERS        processes of tests side by side: compiling is the work   (the cores of this machine, 16 at most)
#     TRITON_PTXAS_PATH, TRITON_CACHE_DIR                                     (Triton's own; a folder for each ptxas in ~/.triton)
set -uo pipefail
cd "$(dirname "$0")/.."
ALL="smoke tests sanitize bench models"
PYTHON=${PYTHON:-python3} OUT=${OUT:-results} SECONDS_PART=${SECONDS_PART:-530} FILES=.gpu HEDGEHOG='from hedgehog_nb.cli import app; app(prog_name="hedgehog")'
WORKERS=${WORKERS:-$(n=$(getconf _NPROCESSORS_ONLN); [ "$n" -gt 16 ] && n=16; echo "$n")}
export PYTHONPATH="$PWD:$PWD/tests:$PWD/$FILES/last${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
unset TRITON_INTERPRET

stop() { echo "$2" >&2; exit "$1"; }
case "${1-}" in -h|--help) sed -n '2,/^set /{s/^# \{0,1\}//p}' tests/gpu.sh; exit;; esac
[ $# -gt 0 ] || set -- $ALL
for p in "$@"; do [[ -n $p && $p != *[[:space:]]* && " $ALL " = *" $p "* ]] || stop 2 "parts are $ALL; given ${p:-an empty name}"; done
for n in SECONDS_PART WORKERS; do [[ ${!n} =~ ^[1-9][0-9]{0,8}$ ]] || stop 2 "$n is a whole number, 1 at least; given ${!n}"; done
command -v "$PYTHON" >/dev/null || stop 1 "there is no interpreter $PYTHON: name one with PYTHON=..."
why=$("$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)' 2>&1)
case $? in
  0) ;;
  3) stop 1 "make gpu needs PyTorch and a GPU that it can use; there is none here. make test runs the kernels in Triton's interpreter.";;
  *) stop 1 "make gpu needs PyTorch and a GPU that it can use; $PYTHON cannot import torch: ${why##*$'\n'}";;
esac
mkdir -p "$OUT" && [ -w "$OUT" ] || stop 1 "$OUT cannot be written: name another folder with OUT=..."

# What was carried: wheels go into a folder that Python looks into last, pieces are joined
wheels="carry .gpu/1 of \`make gpu-files\`"
if ls $FILES/[0-9]*/*.whl >/dev/null 2>&1; then
  "$PYTHON" tests/gpu_files.py --install "$FILES" || wheels="the wheels in $FILES could not be installed, pip says why above: carry .gpu/1 again"
fi
if [ -e $FILES/files.json ] || ls $FILES/[0-9]*/pieces.json >/dev/null 2>&1; then "$PYTHON" tests/gpu_files.py --join "$FILES"; fi
export HEDGEHOG_GPU_FILES=$PWD/$FILES/files

needs() { # part, packages as MODULE or MODULE:NAME
  local part=$1 lack=() p; shift
  for p in "$@"; do "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('${p%%:*}') is None)" 2>/dev/null || lack+=("${p##*:}"); done
  [ ${#lack[@]} = 0 ] && return
  said+=("$part: not run, ${lack[*]} missing: $wheels, or put the packages on PYTHONPATH"); bad=1; return 1
}
device=$("$PYTHON" -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')
said=() bad=0 begun=$SECONDS
left() { echo $(( SECONDS_PART - (SECONDS - started) )); }
run() { # name, seconds at most, command
  local name=$1 most=$2 t=$SECONDS rc; shift 2
  [ "$most" -gt "$(left)" ] && most=$(left)
  if [ "$most" -lt 5 ]; then said+=("$name: not run, no time left"); bad=1; return 1; fi
  echo "== $name (at most $most s)"
  timeout -s INT -k 15 "$most" "$@"; rc=$?
  case $rc in
    0) said+=("$name: passed, $((SECONDS - t)) s");;
    124|137) said+=("$name: cut off after $most s; run it again to go on"); bad=1;;
    *) said+=("$name: FAILED ($rc), $((SECONDS - t)) s"); bad=1;;
  esac
  return $rc
}

part_smoke() {
  needs smoke fastcore triton transformers || return
  run smoke 150 "$PYTHON" tests/gpu_smoke.py --out "$OUT/smoke-$device.json"
  local xz other; xz=$(ls $FILES/[0-9]*/ptxas.xz 2>/dev/null | head -n 1)
  if [ -n "$xz" ] && [ -z "${TRITON_PTXAS_PATH:-}" ]; then
    other=$PWD/$FILES/ptxas
    [ -x "$other" ] || { "$PYTHON" -c 'import lzma, sys; open(sys.argv[2], "wb").write(lzma.open(sys.argv[1]).read())' "$xz" "$other" && chmod +x "$other"; }
    run "smoke, the carried ptxas" 150 env TRITON_PTXAS_PATH="$other" "$PYTHON" tests/gpu_smoke.py --out "$OUT/smoke-$device-ptxas.json"
  fi
  needs self-check typer rich && run "self-check" "$(left)" "$PYTHON" -c "$HEDGEHOG" bench --self-check
}
part_tests() {
  needs tests fastcore triton transformers pytest xdist:pytest-xdist hypothesis || return
  local log="$OUT/tests-$device.jsonl"
  run "every kernel, again and again" 150 env HEDGEHOG_TUNE=0 "$PYTHON" tests/gpu_repeat.py --seconds 120 --done "$OUT/repeat-$device.txt"
  run "the kernels' tests" "$(left)" env HEDGEHOG_TUNE=0 "$PYTHON" -m pytest -q -p gpu_pytest --gpu-log "$log" \
    -n "$WORKERS" --dist load --maxschedchunk 1 tests/test_kernels*.py
  "$PYTHON" tests/gpu_pytest.py "$log" || bad=1
}
part_sanitize() {
  needs sanitize fastcore triton transformers || return
  command -v compute-sanitizer >/dev/null || { said+=("sanitize: not run, compute-sanitizer is not installed (it comes with the CUDA toolkit)"); bad=1; return 1; }
  local tool log was now most=$(( (SECONDS_PART - 10) / 2 ))
  HEDGEHOG_TUNE=0 "$PYTHON" tests/gpu_repeat.py --size few >/dev/null 2>&1 # compiled before, since that is slow under the tool
  now="sources $("$PYTHON" -c 'from gpu_pytest import sources; print(sources())')"
  for tool in memcheck racecheck; do
    log="$OUT/sanitize-$tool-$device.log"
    [ "$(head -n 1 "$log" 2>/dev/null)" = "$now" ] || { rm -f "$log.done"; echo "$now" > "$log"; } # of other sources: anew
    was=$bad
    run "compute-sanitizer $tool" "$most" env HEDGEHOG_TUNE=0 PYTORCH_NO_CUDA_MEMORY_CACHING=1 bash -o pipefail -c '
      compute-sanitizer --tool "$0" --report-api-errors no --error-exitcode 3 --target-processes all "$1" tests/gpu_repeat.py --size few --done "$2.done" 2>&1 |
      tee -a "$2"' "$tool" "$PYTHON" "$log"
    if grep -qi 'device not supported' "$log"; then
      bad=$was; said[${#said[@]}-1]="compute-sanitizer $tool: not run, it says 'Device not supported' here"; rm -f "$log" "$log.done"
    elif grep -Eq '^=+ +(Invalid|Error:|Uninitialized|Barrier error|.*SUMMARY: [1-9])' "$log"; then bad=1; said+=("compute-sanitizer $tool: FINDINGS in $log"); fi
  done
}
part_bench() {
  needs bench fastcore triton transformers typer rich || return
  "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("fla") is None)' 2>/dev/null ||
    echo "flash-linear-attention is missing and will not be measured: carry .gpu/1 of \`make gpu-files\`"
  local minutes; minutes=$("$PYTHON" -c "print(max(.2, ($(left)-30)/60))")
  run "hedgehog bench" "$(left)" "$PYTHON" -c "$HEDGEHOG" \
    bench --resume --overwrite --minutes "$minutes" --out "$OUT/bench-$device.json"
}
part_models() {
  needs models fastcore triton transformers accelerate matplotlib peft safetensors || return
  [ -f tests/gpu_models.py ] || { said+=("models: not run, tests/gpu_models.py is missing"); bad=1; return; }
  run models "$(left)" "$PYTHON" tests/gpu_models.py --out "$OUT"
}

"$PYTHON" -c 'import torch, triton; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)'
for p in "$@"; do started=$SECONDS; "part_$p"; done
printf '%s\n' "== $device, $((SECONDS - begun)) s" "${said[@]}"
exit $bad
