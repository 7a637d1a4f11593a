#!/bin/bash
# PostgreSQL, S3 and MLflow's server, one after the other. It says `ready`, and stays in the
# foreground; SIGTERM or Ctrl-C ends them all, the last one first.
set -euo pipefail
cd "$(dirname "$0")"
set -a
. ./.env
set +a
PATH=$PWD/venv/bin:$PATH
(umask 077 && mkdir -p "$DATA/log")
set -m # each gets a process group of its own, which Ctrl-C does not reach

running=()
end() {
    trap '' TERM INT
    for ((i = ${#running[@]} - 1; i >= 0; i--)); do
        read -r how pid <<< "${running[i]}"
        kill "$how" -- "$pid" 2> /dev/null || true
        wait "${pid#-}" || true
    done
}
trap end EXIT
trap 'exit 0' TERM INT

start() { # NAME SIGNAL GROUP CHECK: a script, how to end it, and whether it answers
    "./$1.sh" >> "$DATA/log/$1.log" 2>&1 &
    running+=("$2 $3$!")
    until eval "$4"; do
        kill -0 "$!" 2> /dev/null || { echo "$1 has ended: see $DATA/log/$1.log" >&2; exit 1; }
        sleep 1
    done
}

start postgresql -INT '' 'pg_isready --quiet --host 127.0.0.1 --port $PGPORT'
start s3 -TERM '' 'curl --fail --silent --output /dev/null http://127.0.0.1:$S3_PORT'
start tracking -TERM - 'python -c "from urllib import request; request.urlopen(\"http://127.0.0.1:$TRACKING_PORT/health\")" 2> /dev/null'
echo "ready: http://$SERVER_NAME:$TRACKING_PORT"
wait -n # one has ended, so all end
exit 1
