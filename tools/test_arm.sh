#!/usr/bin/env bash
# Runs edge-rt on emulated ARM cores: an arm64 root file system with Python, libllama cross-built once for each instruction set,
# and edge-rt from this checkout, under proot and qemu-user. See "Without a board" in plugins/arm/README.md.
#
# Usage: tools/test_arm.sh [root] [build] [site] [model] [run]    all of them, in this order, if none is named
# What it makes is kept in EDGE_RT_ARM_CACHE (default ~/.cache/edge-rt/arm, 1.5 GB) and not made again.
# ARM_CORES chooses cores by name ("cortex-a72 cortex-a76"), ARM_MODELS among Q4_0 and F16 (or none); ARM_TOKENS is the length of the answer (8).
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD cache=${EDGE_RT_ARM_CACHE:-$HOME/.cache/edge-rt/arm} python=${PYTHON:-.venv/bin/python}
suite=trixie target_python=3.13 tokens=${ARM_TOKENS:-8}
native=$(sed -n 's/^ *"\(llama-cpp-python==[^"]*\)".*/\1/p' pyproject.toml)
version=${native#*==} root=$cache/root source=$cache/llama_cpp_python-$version
prompt="The capital of France is"

# core of qemu | build of libggml that its owner would have | what this core stands for
cores='
cortex-a72  armv8   Raspberry Pi 4, CM4
cortex-a76  dotprod Raspberry Pi 5
neoverse-n2 i8mm    i8mm, vectors of 128 bits (phones from 2022 on, built without SVE)
neoverse-v1 sve     i8mm and SVE with vectors of 256 bits (Graviton3)
neoverse-n2 sve     i8mm and SVE with vectors of 128 bits (Graviton4, Cortex-A710)'
march() {
  case $1 in
    armv8) echo armv8-a ;;
    dotprod) echo armv8.2-a+dotprod+fp16 ;;
    i8mm) echo armv8.2-a+dotprod+fp16+i8mm ;;
    sve) echo armv8.2-a+dotprod+fp16+i8mm+sve ;;
  esac
}

features() {  # core, build: as a target's file names them
  local found='"neon"'
  [ "$2" = armv8 ] || found+=', "fp16", "dotprod"'
  case $2 in i8mm | sve) found+=', "i8mm"' ;; esac
  [ "$2" != sve ] || found+=', "sve"'
  [ "$1-$2" != neoverse-v1-sve ] || found+=', "sve256"'
  echo "$found"
}

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
say() { printf -- '--- %s\n' "$*"; }

tools() {
  [ "$(uname -m)" != aarch64 ] || fail "this is an ARM machine: edge-rt runs on it as it is, there is nothing to emulate"
  local missing=() emulators=(qemu-aarch64-static qemu-aarch64)
  for tool in debootstrap proot cmake aarch64-linux-gnu-g++; do command -v "$tool" >/dev/null || missing+=("$tool"); done
  for emulator in "${emulators[@]}"; do command -v "$emulator" >/dev/null && break || emulator=; done
  [ -n "$emulator" ] || missing+=(qemu-aarch64)
  [ ${#missing[@]} = 0 ] || fail "there is no ${missing[*]}; on Debian: apt install debootstrap proot qemu-user cmake ninja-build g++-aarch64-linux-gnu"
  mkdir -p "$cache"
}

root() {
  [ -e "$root/.ready" ] && return
  say "root file system: Debian $suite, arm64"
  rm -rf "$root"
  debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,libgomp1 "$suite" "$root" >"$cache/debootstrap.log" 2>&1 ||
    fail "debootstrap failed; see $cache/debootstrap.log (as root, or with fakeroot; it needs the network)"
  # No second stage: unpacked files are all that Python needs.
  for package in "$root"/var/cache/apt/archives/*.deb; do dpkg -x "$package" "$root"; done
  rm -f "$root"/var/cache/apt/archives/*.deb
  touch "$root/.ready"
}

fetch() {
  [ -e "$source/.ready" ] && return
  if [ ! -e "$source.tar.gz" ]; then
    say "source of $native"
    "$python" -m pip download -q --no-deps --no-binary :all: -d "$cache" "$native" || fail "cannot download the source of $native"
  fi
  rm -rf "$source"
  tar -xzf "$source.tar.gz" -C "$cache"
  touch "$source/.ready"
}

build() {
  fetch
  build_one armv8 llama
  for name in dotprod i8mm sve; do build_one "$name" ggml-cpu; done
}

build_one() {  # name, target: the libraries differ in ggml-cpu alone
  local name=$1 target=$2 folder=$cache/build-$1 lib=$cache/lib-$1
  [ -e "$lib/.$version" ] && return
  say "libllama for $name ($(march "$name")), target $target"
  cmake -S "$source/vendor/llama.cpp" -B "$folder" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
    -DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH="$(march "$name")" -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF >"$cache/cmake-$name.log" 2>&1 ||
    fail "cmake failed; see $cache/cmake-$name.log"
  cmake --build "$folder" --target "$target" -j "$(nproc)" >"$cache/build-$name.log" 2>&1 || fail "building failed; see $cache/build-$name.log"
  rm -rf "$lib" && mkdir "$lib"
  [ "$name" = armv8 ] || cp -a "$cache"/lib-armv8/*.so* "$lib/"
  cp -a "$folder"/bin/*.so* "$lib/"
  touch "$lib/.$version"
}


site() {  # Python packages for the root's Python, and edge-rt with its plugin as they are installed on a board
  local packages
  packages=$(sed -n '/^dependencies = \[/,/^\]/s/^ *"\([^";]*\)".*/\1/p' pyproject.toml | grep -v llama-cpp-python)
  if [ "$packages" != "$(cat "$cache/site/.packages" 2>/dev/null)" ]; then
    say "arm64 wheels"
    rm -rf "$cache/site"
    # shellcheck disable=SC2086
    "$python" -m pip install -q --target "$cache/site" --only-binary :all: --implementation cp --python-version "$target_python" \
      --platform manylinux2014_aarch64 --platform manylinux_2_28_aarch64 $packages || fail "cannot install the arm64 wheels"
    printf '%s' "$packages" >"$cache/site/.packages"
  fi
  say "edge-rt and edge-rt-arm from $checkout"
  rm -rf "$cache/source" "$cache/edge-rt" && mkdir -p "$cache/source/plugin"
  cp -r edge_rt pyproject.toml README.md "$cache/source/"
  cp -r plugins/arm/edge_rt_arm plugins/arm/pyproject.toml plugins/arm/README.md "$cache/source/plugin/"
  for folder in "$cache/source" "$cache/source/plugin"; do
    "$python" -m pip install -q --no-deps --no-compile --target "$cache/edge-rt" "$folder" 2>&1 | grep -v "already exists" || true
  done
  [ -d "$cache/edge-rt/edge_rt_arm" ] || fail "installing edge-rt failed; the reason is above"
  mkdir -p "$cache/edge-rt/llama_cpp" # where the package of the libraries would be
}

model() {
  for kind in Q4_0 F16; do
    [ -e "$cache/$kind.gguf" ] && continue
    say "SmolLM2 in $kind"
    "$python" tools/arm/model.py "$kind" "$cache/$kind.gguf" >"$cache/model.log" 2>&1 || fail "making the model failed; see $cache/model.log"
  done
}

on() {  # core, build, command...: on an emulated core
  local core=$1 build=$2
  shift 2
  mkdir -p "$cache/out/$core-$build" "$cache/cross"
  env -i PATH=/usr/bin:/bin HOME=/root LANG=C.UTF-8 PYTHONPATH=/opt/edge-rt:/opt/site LLAMA_CPP_LIB_PATH=/opt/lib LD_LIBRARY_PATH=/opt/lib EDGE_RT_CACHE=/opt/out \
    PROOT_NO_SECCOMP=1 "$(command -v proot)" -q "$(command -v qemu-aarch64-static || command -v qemu-aarch64) -cpu $core" -r "$root" \
    -b /proc -b /sys -b /dev -b "$cache/lib-$build:/opt/lib" -b "$cache/edge-rt:/opt/edge-rt" -b "$cache/site:/opt/site" \
    -b "$checkout/tools/arm:/opt/tools" -b "$cache/Q4_0.gguf:/opt/Q4_0.gguf" -b "$cache/F16.gguf:/opt/F16.gguf" -b "$cache/out:/opt/reference" \
    -b "$cache/cross:/opt/cross" \
    -b "$cache/out/$core-$build:/opt/out" -w /root "$@"
}

reference() {  # what this machine computes: with its packed kernels, with its plain ones, and with float weights
  local out=$cache/out/here
  mkdir -p "$out"
  export EDGE_RT_CACHE=$out
  "$python" tools/arm/kernels.py "$out/kernels.npz" || fail "the kernels of this machine are not as foretold"
  "$python" tools/arm/logits.py "$cache/Q4_0.gguf" "$out/Q4_0.npz" "$prompt" "$tokens"
  "$python" tools/arm/logits.py "$cache/Q4_0.gguf" "$out/plain.npz" "$prompt" "$tokens" --plain --reference "$out/Q4_0.npz"
  "$python" tools/arm/logits.py "$cache/F16.gguf" "$out/F16.npz" "$prompt" "$tokens"
  unset EDGE_RT_CACHE
}

run() {
  export PYTHONPATH=$checkout:$checkout/plugins/arm
  say "reference: this machine"
  reference
  local failed=0
  while read -r core build meaning; do
    [ -n "$core" ] || continue
    case " ${ARM_CORES:-$core} " in *" $core "*) ;; *) continue ;; esac
    say "$core, libllama for $build: $meaning"
    SECONDS=0
    one_core "$core" "$build" </dev/null || { failed=1; echo "FAILED on $core with $build"; }
    echo "$SECONDS s in all"
  done <<<"$cores"
  # shellcheck disable=SC2046
  "$python" tools/arm/sample.py record "$cache/arm_packed.json" $(cd "$cache/out" && for one in */sample.json; do
    echo "${one%/*}=$cache/out/$one"; done)
  cmp -s "$cache/arm_packed.json" tests/fixtures/arm_packed.json || say "$cache/arm_packed.json is not tests/fixtures/arm_packed.json"
  return $failed
}

one_core() {  # core, build
  local out=$cache/out/$1-$2 good=0 kind
  on "$1" "$2" python3 -m edge_rt.cli.main arm || return 1
  on "$1" "$2" python3 /opt/tools/kernels.py /opt/out/kernels.npz /opt/reference/here/kernels.npz || good=1
  on "$1" "$2" python3 /opt/tools/sample.py make /opt/out/sample.json && "$python" tools/arm/sample.py check "$out/sample.json" || good=1
  "$python" tools/arm/compare.py packed "$cache/out/here/kernels.npz" "$out/kernels.npz" || good=1
  for kind in ${ARM_MODELS:-Q4_0 F16}; do
    [ "$kind" != none ] || continue
    echo "SmolLM2 $kind: $prompt"
    on "$1" "$2" python3 -m edge_rt.cli.main run -m "/opt/$kind.gguf" --device arm -t 2 --temp 0 -n "$tokens" --ignore-eos --json --raw "$prompt" \
      >"$out/$kind.jsonl" 2>"$out/$kind.err" || { cat "$out/$kind.err"; good=1; }
    "$python" tools/arm/compare.py answers "$cache/out/here/$kind.npz" "$out/$kind.jsonl" || good=1
    on "$1" "$2" python3 /opt/tools/logits.py "/opt/$kind.gguf" "/opt/out/$kind.npz" "$prompt" 0 \
      --device arm --reference "/opt/reference/here/$kind.npz" | sed 's/^/  /' || good=1
    # shellcheck disable=SC2046
    "$python" tools/arm/compare.py logits "$cache/out/here/$kind.npz" "$out/$kind.npz" \
      $([ "$kind" = F16 ] || echo "$cache/out/here/plain.npz") || good=1
  done
  case " ${ARM_MODELS:-Q4_0} " in *" Q4_0 "*) cross "$1" "$2" || good=1 ;; esac
  return $good
}

cross() {  # core, build: a directory compiled here for such a core has what the core packs itself, and answers as the plain file does
  local out=$cache/out/$1-$2 folder=$cache/cross/$1-$2 target=$cache/cross/$1-$2.toml good=0 own
  case $1-$2 in
    cortex-a72-armv8) target=rpi-cm4 ;;
    cortex-a76-dotprod) target=rpi-5 ;;
    *) sed "s/^features = .*/features = [$(features "$1" "$2")]/" edge_rt/deploy/targets/rpi-5.toml >"$target" ;;
  esac
  rm -rf "$folder"
  echo "compiled here for $target"
  "$python" -m edge_rt.cli.main compile "$cache/Q4_0.gguf" --target "$target" --output "$folder" >"$folder.log" 2>&1 ||
    { cat "$folder.log"; return 1; }
  own=$(find "$out/packed" -name 'Q4_0-*.pack' 2>/dev/null | head -1)
  if [ -n "$own" ] && [ -e "$folder/model.pack" ]; then
    "$python" tools/arm/compare.py files "$folder/model.pack" "$own" || good=1
  elif [ -z "$own" ] && [ ! -e "$folder/model.pack" ]; then
    echo "  no packed weights, neither here nor on the core"
  else
    echo "  PACKED WEIGHTS ON ONE SIDE ALONE: here $(ls "$folder"), the core ${own:-none}" && good=1
  fi
  rm -f "$out"/packed/model-*
  on "$1" "$2" python3 -m edge_rt.cli.main run -m "/opt/cross/$1-$2" --device arm -t 2 --temp 0 -n "$tokens" --ignore-eos --json --raw "$prompt" \
    >"$out/cross.jsonl" 2>"$out/cross.err" || { cat "$out/cross.err"; good=1; }
  "$python" tools/arm/compare.py tokens "$out/Q4_0.jsonl" "$out/cross.jsonl" || good=1
  [ -z "$(find "$out/packed" -name 'model-*.pack' 2>/dev/null)" ] || { echo "  IT WAS PACKED ANEW"; good=1; }
  return $good
}

for stage in tools "${@:-root build site model run}"; do for one in $stage; do "$one"; done; done
