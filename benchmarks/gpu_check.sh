#!/usr/bin/env bash
# Everything that only a GPU can show: numerics, models, speed. For a bare machine with PyTorch and
# no network, in the repository's root; gpu_pack.sh gathers before what such a machine lacks.
#
#     benchmarks/gpu_check.sh [--seconds N] [--only PART]... [--again]
#
#     --seconds N   in all, 570 by default; what does not fit is cut, and said
#     --only PART   only that, and what it needs; may be repeated
#     --again       also what has passed already
#
# Parts, in order:
#     install   wheels that this Python lacks, in an environment of its own
#     build     kernels that the pack does not have
#     products  every GEMM and convolution library against the reference
#     models    models on the GPU against the CPU, operator by operator and as a whole
#     kernels   each layer of SD 1.x and SDXL against cuBLASLt, cuDNN, _int_mm; tunes the tiles
#     sdxl      a step of SDXL against PyTorch's own, eager and compiled
#     sd14      the same of SD 1.x
#     producers the kernels that make activations against the reference
#     refusals  bad calls are refused, and the GPU stays usable
#     memcheck  compute-sanitizer on a small set
#
# A part that passed is not repeated while the sources are the same: call it again for the rest.
# State and results are kept in benchmarks/results, and copied to $OUT if that is set. No part stops
# the others; the exit status is 1 if any failed or was cut, 2 without a GPU.
set -uo pipefail
SELF=$(readlink -f "${BASH_SOURCE[0]}")
cd "$(dirname "$SELF")/.." || exit 1

PARTS=(install build products models kernels sdxl sd14 producers refusals memcheck)
declare -A LIMIT=([install]=90 [build]=300 [products]=150 [models]=180 [kernels]=170 [sdxl]=420
  [sd14]=300 [producers]=90 [refusals]=60 [memcheck]=120)
declare -A LEAST=([install]=5 [build]=5 [products]=20 [models]=30 [kernels]=40 [sdxl]=120
  [sd14]=90 [producers]=15 [refusals]=15 [memcheck]=30)
GRACE=10 # seconds after a part's limit before it is killed

PACK=${FXQUANT_GPU_PACK:-build/gpu}
WORK=$(readlink -m "${FXQUANT_GPU_WORK:-build/gpu-work}")
RESULTS=${FXQUANT_GPU_RESULTS:-benchmarks/results}
STATE=$RESULTS/gpu_check.tsv
PY=$WORK/venv/bin/python
SITE=$WORK/venv/site.txt # where packages are installed
export FXQUANT_CACHE=$WORK/kernels TORCHINDUCTOR_CACHE_DIR=$WORK/inductor
export PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive

# Parts. Each runs in a process of its own, `gpu_check.sh --run PART SECONDS`.

run_install() {
  local wheel wheels
  mkdir -p "$WORK/kernels"
  python3 -m tarfile -e "$PACK/kernels.tar.xz" "$WORK/kernels" || return
  rm -rf "$WORK/venv"
  python3 -m venv --without-pip --system-site-packages "$WORK/venv" || return
  "$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$SITE" || return
  # python3 may be of an environment itself, whose packages another one does not see.
  python3 -c 'import os, torch
print(f"import site; site.addsitedir({os.path.dirname(os.path.dirname(torch.__file__))!r})")' \
    > "$(cat "$SITE")/machine.pth" || return
  wheels=$("$PY" benchmarks/gpu_setup.py missing "$PACK/wheels") || return
  for wheel in $wheels; do
    echo "unpacking $wheel"
    python3 -m zipfile -e "$wheel" "$(cat "$SITE")" || return
  done
  mkdir -p "$(cat "$SITE")/fxquant"
  ln -sfn "$PWD"/fxquant/* "$PWD/passes" "$PWD/kernels" "$(cat "$SITE")/fxquant/" || return
  "$PY" -P -c 'import torch, diffusers, fxquant.kernels, fxquant.passes
print("torch", torch.__version__, "diffusers", diffusers.__version__, torch.cuda.get_device_name())'
}

run_build() { "$PY" benchmarks/gpu_setup.py build; }

run_tests() { # what libraries warn of on another machine fails nothing
  local jobs=$1
  shift
  if [ "$jobs" -gt 1 ] && "$PY" -c 'import xdist' 2> /dev/null; then set -- -n "$jobs" "$@"; fi
  "$PY" -P -m pytest -q -W default -p no:cacheprovider --durations=5 "$@"
}

run_products() { run_tests 8 tests/gpu/test_products_gpu.py; }
run_models() { run_tests 8 tests/gpu/test_models_gpu.py; }
run_producers() { run_tests 4 tests/gpu/test_producers_gpu.py; }
run_refusals() { run_tests 1 tests/gpu/test_refusals_gpu.py; }

run_kernels() {
  "$PY" benchmarks/gpu_kernels.py --tune --budget $(($1 - 20)) --results "$RESULTS"
}

run_unet() { "$PY" benchmarks/gpu_unet.py --arch "$1" --budget $(($2 - 15)) --results "$RESULTS"; }
run_sdxl() { run_unet sdxl "$1"; }
run_sd14() { run_unet sd14 "$1"; }

run_memcheck() {
  local found
  found=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) || {
    echo "not run: there is no compute-sanitizer"
    return
  }
  # The allocator's own blocks would hide what is read past a tensor's end.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$found" --tool memcheck --error-exitcode 9 \
    "$PY" -P -m pytest -q -W default -p no:cacheprovider -k memory_checker tests/gpu
}

# State: lines of part, status, seconds, sources, note.

sources() {
  find fxquant passes kernels tests/gpu tests/kernels benchmarks -type f \
    \( -name '*.py' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.sh' \) |
    LC_ALL=C sort | xargs -d '\n' sha256sum | sha256sum | cut -c1-16
}

passed() { grep -q "^$1	ok	[0-9]*	$SOURCES	" "$STATE" 2> /dev/null; }

record() { # part status seconds note
  local rest
  rest=$(grep -v "^$1	" "$STATE" 2> /dev/null)
  { if [ -n "$rest" ]; then echo "$rest"; fi
    printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$SOURCES" "$4"; } > "$STATE.part"
  mv "$STATE.part" "$STATE"
}

keep() { # at most eight files, none of them in a folder
  [ -n "${OUT:-}" ] || return 0
  mkdir -p "$OUT"
  cat "$WORK"/*.log > "$OUT/gpu_check.log" 2> /dev/null
  cp "$STATE" "$OUT/"
  find "$RESULTS" kernels/cutlass/measured -newer "$WORK/started" \
    \( -name 'gpu_*.json' -o -name 'tiles-*.json' \) -exec cp {} "$OUT/" \; 2> /dev/null
}

left() { echo $((SECONDS_IN_ALL - SECONDS)); }

run_part() { # $FXQUANT_GPU_LIMIT, in seconds, is for the test of this script
  local part=$1 limit=${FXQUANT_GPU_LIMIT:-${LIMIT[$1]}} room log="$WORK/$1.log" began=$SECONDS code note
  if passed "$part" && [ -z "$AGAIN" ] && ready "$part"; then
    echo "== $part: passed before"
    return
  fi
  room=$(($(left) - GRACE))
  if [ "$room" -lt "${LEAST[$part]}" ]; then
    echo "== $part: cut, $room s are left"
    passed "$part" || record "$part" cut 0 "needs ${LEAST[$part]} s, $room were left"
    return
  fi
  if [ "$limit" -gt "$room" ]; then limit=$room; fi
  echo "== $part, at most $limit s"
  timeout -k 5 "$limit" bash "$SELF" --run "$part" "$limit" 2>&1 | tee "$log"
  code=${PIPESTATUS[0]}
  note=$(grep -v '^[[:space:]]*$' "$log" | tail -1 | tr '\t' ' ' | cut -c1-100)
  case $code in
    0) record "$part" ok $((SECONDS - began)) "$note" ;;
    124 | 137) record "$part" cut $((SECONDS - began)) "stopped at its limit; see its log" ;;
    *) record "$part" failed $((SECONDS - began)) "$note" ;;
  esac
  keep
}

ready() { # what install and build made is of this machine, whatever the state says
  case $1 in
    install | build) [ -x "$PY" ] && [ -d "$WORK/kernels" ] ;;
  esac
}

table() {
  local part line failed=0
  printf '\n%-10s %-7s %5s  %s\n' part status s note
  for part in "${PARTS[@]}"; do
    wanted "$part" || continue
    line=$(grep "^$part	" "$STATE" 2> /dev/null)
    if ! passed "$part"; then failed=1; fi
    awk -F '\t' -v part="$part" -v sources="$SOURCES" '
      $1 == "" {printf "%-10s not run\n", part; next}
      {printf "%-10s %-7s %5s  %s%s\n", $1, $2, $3, ($4 == sources ? "" : "(of other sources) "), $5}
    ' <<< "$line"
  done
  return $failed
}

wanted() { [ ${#ONLY[@]} -eq 0 ] || [[ " install build ${ONLY[*]} " == *" $1 "* ]]; }

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$SELF"; }

SECONDS_IN_ALL=570 ONLY=() AGAIN=""
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --run) "run_$2" "${3:-0}" && exit 0 || exit 1 ;;
    --seconds) SECONDS_IN_ALL=$2 && shift 2 ;;
    --only)
      if [[ " ${PARTS[*]} " != *" $2 "* ]]; then
        echo "gpu_check.sh: there is no part $2; there are ${PARTS[*]}" >&2
        exit 1
      fi
      ONLY+=("$2") && shift 2
      ;;
    --again) AGAIN=1 && shift ;;
    *) usage >&2 && exit 1 ;;
  esac
done

if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
  echo "gpu_check.sh: needs a GPU, and a python3 whose PyTorch can use it" >&2
  exit 2
fi
if [ ! -d "$PACK" ]; then
  echo "gpu_check.sh: $PACK is not there: benchmarks/gpu_pack.sh makes it, with network" >&2
fi
mkdir -p "$WORK" "$RESULTS" && touch "$WORK/started"
SOURCES=$(sources)
for part in "${PARTS[@]}"; do
  if wanted "$part"; then run_part "$part"; fi
done
table
failed=$?
keep
exit "$failed"
