#!/usr/bin/env bash
# The command line of together[cli], unmodified, against together_fake.py: upload a file, list the
# files, create a fine-tuning job and follow it until it has completed, list the models.
#
#     tg.sh        TG is the command line (tg), PYTHON the interpreter (python3), TOGETHER_FAKE the
#                  file to serve (together_fake.py)
set -euo pipefail

home=$(mktemp -d)  # the command line keeps its settings there
"${PYTHON:-python3}" "${TOGETHER_FAKE:-together_fake.py}" --port 0 --quiet >"$home/server" &
server=$!
trap 'kill $server; rm -rf "$home"' EXIT

for _ in {1..100}; do
  url=$(grep -om1 'http://127.0.0.1:[0-9]*$' "$home/server" || true)
  [ -z "$url" ] || break
  sleep 0.1
done
export TOGETHER_BASE_URL=$url TOGETHER_API_KEY=parlel-together HOME=$home
export TOGETHER_TELEMETRY_DISABLED=1 TOGETHER_DISABLE_VERSION_CHECK=1 NO_COLOR=1
export -n XDG_CONFIG_HOME XDG_CACHE_HOME TOGETHER_CREDENTIALS_PATH

base=meta-llama/Meta-Llama-3.1-8B-Instruct-Reference
for n in {1..12}; do
  echo '{"messages": [{"role": "user", "content": "Ping '"$n"'"}, {"role": "assistant", "content": "Pong."}]}'
done >"$home/train.jsonl"

# tg ARGUMENT...: run the command line, keep what it prints; a status other than 0 ends the script.
tg() {
  echo "tg $*"
  "${TG:-tg}" "$@" </dev/null >"$home/output" 2>"$home/errors" ||
    { echo "exit status $?"; cat "$home/output" "$home/errors"; return 1; }
}

# expect PATTERN: the last output, with its messages, must have a line that matches.
expect() {
  cat "$home/output" "$home/errors" | grep -E -- "$1" >"$home/lines" ||
    { echo "no line matches $1 in:"; cat "$home/output" "$home/errors"; return 1; }
}

# find_id PREFIX: print the first id in the last output.
find_id() {
  expect "$1-" >&2 || return
  grep -oEm1 "$1-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" "$home/lines" | head -n 1
}

tg files upload "$home/train.jsonl" --purpose fine-tune --json
expect '"processing_status": "COMPLETED"'
file=$(find_id file)

tg files list --json
expect "\"id\": \"$file\""
expect '"filename": "train.jsonl"'

tg fine-tuning create "$file" --model "$base" --lora --suffix ping --json --non-interactive
expect 'job has been submitted'
job=$(find_id ft)

seen=''
for _ in {1..10}; do
  tg fine-tuning retrieve "$job" --json
  expect '^  "status": '
  status=$(sed 's/.*: "\(.*\)".*/\1/' "$home/lines")
  seen="$seen $status"
  [ "$status" != completed ] || break
done
echo "the job was:$seen"
[ "$seen" = ' queued running uploading completed' ]

tg fine-tuning list-events "$job" --json
expect job_complete
tg fine-tuning list --json
expect "\"id\": \"$job\""

tg models public --json
expect 'meta-llama/Llama-3.3-70B-Instruct-Turbo'
tg models list --json
expect '"data": '
