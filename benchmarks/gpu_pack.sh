#!/usr/bin/env bash
# Gathers what gpu_check.sh needs on a GPU machine without network, into build/gpu (or
# $FXQUANT_GPU_PACK): wheels for Python 3.12 on Linux, and kernels for 90 and 90a. The kernels are
# built in build/gpu-kernels: they share so much that packed they take a fifth.
#
#     benchmarks/gpu_pack.sh [--jobs N] [--only NAME...]
#
# Needs network, nvcc and the packages of fxquant[cuda]; no GPU. $PYTHON is the Python that has
# fxquant, by default .venv's or python3. --jobs and --only are those of `fxquant kernels build`.
# Called again it builds what is missing, or of other sources. Fails if the pack and the working
# tree, which travel together, are over 64 MiB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PACK=${FXQUANT_GPU_PACK:-build/gpu}
LIMIT=64
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
setup() { "$PYTHON" benchmarks/gpu_setup.py "$@"; }

case "${1:-}" in
  -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 0
    ;;
esac
if ! command -v nvcc > /dev/null; then
  echo "gpu_pack.sh: nvcc is not on \$PATH: kernels cannot be built here" >&2
  exit 2
fi

gather_wheels() {
  local platforms=() to="$PACK/wheels" number
  for number in manylinux1 manylinux2010 manylinux2014 manylinux_2_{5,12,17,24,26,27,28,31,34}; do
    platforms+=(--platform "${number}_x86_64")
  done
  rm -rf "$to.part"
  # shellcheck disable=SC2046 # names have no spaces
  "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
    --python-version 3.12 "${platforms[@]}" --constraint constraints.txt --dest "$to.part" \
    $(setup names)
  rm -rf "$to"
  mv "$to.part" "$to"
}

build_kernels() {
  local built=0
  export FXQUANT_CACHE=${FXQUANT_GPU_KERNELS:-build/gpu-kernels}
  mkdir -p "$FXQUANT_CACHE"
  setup prune
  "$PYTHON" -P -m fxquant.cli kernels build --arch 90,90a "$@" > /dev/null || built=$?
  tar -C "$FXQUANT_CACHE" --exclude=build.lock -c . | xz -9 -T1 > "$PACK/kernels.part"
  mv "$PACK/kernels.part" "$PACK/kernels.tar.xz"
  return "$built"
}

tree_size() { # what git does not ignore
  # shellcheck disable=SC2046
  IFS=$'\n' && setup size $(git ls-files --cached --others --exclude-standard)
}

mkdir -p "$PACK"
gather_wheels
built=0
build_kernels "$@" || built=$?
wheels=$(setup size "$PACK/wheels")
kernels=$(setup size "$PACK/kernels.tar.xz")
tree=$(tree_size)
echo "wheels $wheels MiB, kernels $kernels MiB, working tree $tree MiB: limit $LIMIT MiB together"
if [ $((wheels + kernels + tree)) -gt "$LIMIT" ]; then
  echo "gpu_pack.sh: too large to travel" >&2
  exit 1
fi
exit "$built"
