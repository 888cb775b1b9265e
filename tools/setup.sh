#!/usr/bin/env bash
# Makes .venv and installs edge-rt and its own distributions into it. Usage: tools/setup.sh PYTHON EXTRA FOLDER...
# FOLDERs are installed editable, the first with EXTRA ("" for none). What pip and the compiler say goes to .venv/build.log.
# The native libraries come with llama-cpp-python, which is built from source unless there is a wheel (pip's own cache counts).
set -euo pipefail
python=$1 extra=$2
shift 2
folders=("$@")
log=.venv/build.log
every=${EDGE_RT_PROGRESS_SECONDS:-20} # between two lines of progress where standard output is no terminal

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

command -v "$python" >/dev/null || fail "there is no $python; install Python 3.10 or newer, or name one: make run PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$python is $("$python" -c 'import platform; print(platform.python_version())'), and edge-rt needs 3.10 or newer; name one: make run PYTHON=python3.12"

if ! .venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make a virtual environment (no venv or ensurepip); on Debian and Ubuntu: apt install python3-venv"
  echo "Making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
fi
: >"$log"

cores=$(.venv/bin/python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)')
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$cores} # Ninja uses all cores by itself, make does not

# How far a log has come: the compiler's count (Ninja's [12/345], make's [ 12%]), else the package that pip is at.
reached() {
  local step
  step=$(grep -aoE '^ *\[ *([0-9]+/[0-9]+|[0-9]+%)\]' "$log" | tail -n 1 | tr -d '[] ') || true
  case $step in
    */*) echo "compiling, $((100 * ${step%/*} / ${step#*/})) % ($step)" ;;
    *%) echo "compiling, ${step%\%} %" ;;
    *)
      step=$(sed -n 's/^ *\(Collecting\|Building\|Installing\) \(.*\)/\1 \2/p' "$log" | tail -n 1 | cut -c 1-60)
      echo "${step:-asking the package index}" ;;
  esac
}

watch_log() { # until it is killed
  local begin=$SECONDS
  while sleep "$1" >/dev/null 2>&1; do # what is left of it holds no pipe of the caller's
    printf "$2" "$(reached), $(((SECONDS - begin) / 60)) min $(((SECONDS - begin) % 60)) s"
  done
}

# installing WHAT PIP-ARGUMENTS: runs pip into the log and shows how far it is; on a failure the end of the log.
installing() {
  local what=$1 watcher code=0
  shift
  : >"$log"
  if [ -t 1 ]; then watch_log 1 '\r\033[K  %s' & else watch_log "$every" '  %s\n' & fi
  watcher=$!
  trap 'kill "$watcher" 2>/dev/null || true' EXIT
  # pip stays in the foreground: Ctrl-C reaches it and its compilers.
  .venv/bin/pip install --progress-bar off "$@" >>"$log" 2>&1 || code=$?
  kill "$watcher" 2>/dev/null || true
  wait "$watcher" 2>/dev/null || true
  trap - EXIT
  if [ -t 1 ]; then printf '\r\033[K'; fi
  if [ "$code" != 0 ]; then
    tail -n 40 "$log" >&2
    fail "installing $what failed; the reason is above (a compiler too old, no network?), the whole log is $log"
  fi
}

native=$(sed -n 's/^ *"\(llama-cpp-python==[^"]*\)".*/\1/p' pyproject.toml)
installed() {
  .venv/bin/python -c 'import importlib.metadata as m, sys; sys.exit("llama-cpp-python==" + m.version("llama-cpp-python") != sys.argv[1])' "$native" 2>/dev/null
}
if ! installed; then
  rm -rf .venv/.wheel
  if .venv/bin/pip cache list llama_cpp_python 2>/dev/null | grep -q "${native#*==}"; then
    echo "Installing $native, which pip built on this machine before"
    installing "$native" "$native"
  elif .venv/bin/pip download -q --no-deps --only-binary :all: -d .venv/.wheel "$native" >>"$log" 2>&1; then
    wheel=$(echo .venv/.wheel/*.whl)
    echo "Installing $native from a prebuilt wheel, ${wheel##*/}"
    installing "$native" "$wheel"
    rm -rf .venv/.wheel
  else
    command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
      fail "there is no C++ compiler to build $native with; on Debian and Ubuntu: apt install g++, on Fedora: dnf install gcc-c++, on macOS: xcode-select --install"
    echo "Building $native from source on $CMAKE_BUILD_PARALLEL_LEVEL cores: once, usually about five minutes on two cores (log: $log)"
    installing "$native" -v "$native"
  fi
fi
if [ "$extra" = dev ] && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  # PyPI's build for Linux on x86-64 brings 3 GB of CUDA that no test uses; PyTorch's own index has one without, where it can be reached.
  cpu=https://download.pytorch.org/whl/cpu
  if .venv/bin/python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5)' "$cpu" 2>/dev/null; then
    echo "Installing torch for the tests (about 200 MB)"
    installing torch torch --index-url "$cpu"
  fi
fi
targets=()
for folder in "${folders[@]}"; do
  targets+=(-e "$folder${extra:+[$extra]}")
  extra=
done
echo "Installing edge-rt and the other packages it needs"
# editable_mode=compat: a plain path entry. setuptools' default is an import hook, which costs 13 ms at every start.
installing edge-rt --config-settings editable_mode=compat "${targets[@]}"
for folder in "${folders[@]}"; do
  .venv/bin/python -m compileall -q "$folder"/edge_rt*/ # the first start is then as fast as the next
done
