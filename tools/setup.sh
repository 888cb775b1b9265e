#!/usr/bin/env bash
# Makes .venv and installs edge-rt and edge-rt-text (plugins/text) into it. Usage: tools/setup.sh PYTHON [EXTRA]
# The native libraries come with llama-cpp-python, which pip builds from source unless it finds a wheel (its own cache counts).
set -euo pipefail
python=$1 extra=${2:-}

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

native=$(sed -n 's/^ *"\(llama-cpp-python==[^"]*\)".*/\1/p' pyproject.toml)
installed() {
  .venv/bin/python -c 'import importlib.metadata as m, sys; sys.exit("llama-cpp-python==" + m.version("llama-cpp-python") != sys.argv[1])' "$native" 2>/dev/null
}
if ! installed; then
  # A wheel on an index or in --find-links needs no compiler; neither does one that pip built here before.
  if ! { .venv/bin/pip cache list llama_cpp_python 2>/dev/null | grep -q "${native#*==}" ||
         .venv/bin/pip download -q --no-deps --only-binary :all: -d .venv/.wheel "$native" >/dev/null 2>&1; }; then
    command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
      fail "there is no C++ compiler to build $native with; on Debian and Ubuntu: apt install g++, on Fedora: dnf install gcc-c++, on macOS: xcode-select --install"
    echo "Building $native from source; this takes about five minutes, once"
  fi
  rm -rf .venv/.wheel
  .venv/bin/pip install -q --progress-bar off "$native" || fail "installing $native failed; the reason is above (a compiler too old, no network?)"
fi
if [ "$extra" = dev ] && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  # PyPI's build for Linux on x86-64 brings 3 GB of CUDA that no test uses; PyTorch's own index has one without, where it can be reached.
  cpu=https://download.pytorch.org/whl/cpu
  if .venv/bin/python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5)' "$cpu" 2>/dev/null; then
    .venv/bin/pip install -q --progress-bar off torch --index-url "$cpu" || fail "installing torch failed; the reason is above"
  fi
fi
# editable_mode=compat: a plain path entry. setuptools' default is an import hook, which costs 13 ms at every start.
.venv/bin/pip install -q --config-settings editable_mode=compat -e ".${extra:+[$extra]}" -e plugins/text ||
  fail "installing edge-rt failed; the reason is above"
.venv/bin/python -m compileall -q edge_rt plugins/text/edge_rt_text # the first start is then as fast as the next
