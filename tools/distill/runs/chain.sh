#!/usr/bin/env bash
# From a teacher to a student in service, and what was kept: distil and quantise, compile, serve, replay, evaluate, collect feedback.
# What each command says goes into FOLDER/chain.md. Interrupted, the same command goes on; distillation is not done twice.
#   tools/distill/runs/chain.sh RUN.toml FOLDER
set -uo pipefail
run=${1:?a run, such as tools/distill/runs/demo.toml} out=${2:?a folder for what is made}
requests=${REQUESTS:-120} at_once=${AT_ONCE:-2} suites=${SUITES:-finance healthcare}
mkdir -p "$out"
report=$out/chain.md
folder=$(dirname "$run")/$(basename "$run" .toml)
printf '# From a teacher to a student in service\n\n<!-- Made by tools/distill/runs/chain.sh. -->\n\n%s\n' \
  "What each command said last, and how long it took. A distillation that was done before is not done again: its steps say what they took." > "$report"

# A command as one would type it.
typed() {
  for one in "$@"; do
    case $one in *[!A-Za-z0-9_./:=,@-]* | '') printf "'%s' " "$one" ;; *) printf '%s ' "$one" ;; esac
  done
}

# What a command said last, under a title, and how long it took. `may` before the title: that it exits with 1 is a result, too.
step() {
  local may=0
  if [ "$1" = may ]; then may=1; shift; fi
  local title=$1 lines=$2 begun=$SECONDS code=0
  shift 2
  "$@" > "$out/last.txt" 2> >(tee "$out/errors.txt" >&2) || code=$?
  { printf '\n## %s\n\n```\n$ %s\n' "$title" "$(typed "$@" | sed 's/ $//')"; tail -n "$lines" "$out/last.txt"; printf '```\n\n%d s' $((SECONDS - begun)); } >> "$report"
  if [ $code -gt $may ]; then
    printf ', failed with %d\n' $code >> "$report"
    cat "$out/errors.txt" >&2
    exit $code
  fi
  printf '%s\n' "$([ $code = 0 ] || echo ', exit code 1')" >> "$report"
}

serve() {  # MODEL OPTION...: the command by which a replay starts a daemon
  printf 'edge-rt serve --listen %q --http %q --ctx 4096 -m %q' "$out/daemon.sock" "$out/http.sock" "$1"
  shift
  [ $# = 0 ] || printf ' %q' "$@"
}

student() { echo "$folder/$(sed -n 's/^ *"file": "\(.*\)",$/\1/p' "$folder/verify/verify.json")"; }  # the last step says which file it is
teacher=$(sed -n 's/^model = "\(.*\)"/\1/p' "$run" | head -1)

step "Distil, quantise, correct" 12 edge-rt distill run "$run"
step "Compile for this machine" 14 edge-rt compile "$(student)" --target auto --output "$out/compiled"
step "Traffic" 1 edge-rt replay make mixed --requests "$requests" --rate 2 --longest 1 --language en -o "$out/trace.jsonl"
for who in teacher student; do
  if [ $who = teacher ]; then model=$teacher more=(); else model=$out/compiled more=(--record "$out/traffic.jsonl"); fi
  step "Serve the $who, and replay" 8 edge-rt replay run "$out/trace.jsonl" --url "unix:$out/http.sock" --concurrency "$at_once" \
    --start "$(serve "$model" ${more[@]+"${more[@]}"})" -o "$out/replay-$who.json"
done
step may "The service that is kept" 60 edge-rt replay compare "$out/replay-teacher.json" "$out/replay-student.json" --trace "$out/trace.jsonl" \
  --json "$out/service.json"
for who in teacher student; do
  if [ $who = teacher ]; then model=$teacher; else model=$(student); fi
  step "Evaluate the $who" 20 edge-rt eval run "$model" -o "$out/eval-$who.json" $(printf -- '--suite %s ' $suites)
done
step may "The quality that is kept" 30 edge-rt eval compare "$out/eval-teacher.json" "$out/eval-student.json" --min-retention 0.95 $(printf -- '--suite %s ' $suites)
rm -f "$out/http.sock"
edge-rt serve --listen "$out/daemon.sock" --http "$out/http.sock" -m "$out/compiled" --record "$out/traffic.jsonl" &
daemon=$!
trap 'kill $daemon' EXIT
until [ -S "$out/http.sock" ]; do kill -0 $daemon || exit; sleep 1; done
step "What users say of it" 1 edge-rt feedback give "$(dirname "$0")/said.jsonl" --url "unix:$out/http.sock"
trap - EXIT
kill $daemon && wait $daemon
step "Hard cases of the recorded traffic" 12 edge-rt feedback mine "$out/traffic.jsonl" -o "$out/hard.jsonl"
edge-rt eval compare "$out/eval-teacher.json" "$out/eval-student.json" --min-retention 0.95 $(printf -- '--suite %s ' $suites) --json \
  > "$out/quality.json" || [ $? = 1 ] || exit
step "The next run" 20 edge-rt feedback propose "$run" "$out/hard.jsonl" --traffic "$out/traffic.jsonl" --comparison "$out/service.json" \
  --comparison "$out/quality.json" -o "$(dirname "$run")/$(basename "$run" .toml)-next.toml"
echo "the report is $report"
