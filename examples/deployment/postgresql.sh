#!/bin/bash
# PostgreSQL on loopback, in the foreground; $DATA/postgresql is made at the first start.
# SIGINT ends it. PostgreSQL refuses to run as root.
set -euo pipefail
cd "$(dirname "$0")"
: "${DATA:?}" "${PGPORT:?}" "${PGPASSWORD:?}"
folder=$DATA/postgresql
bin=$(dirname "$(find /usr/lib/postgresql/*/bin/postgres | sort -V | tail -n 1)")

if [ ! -e "$folder" ]; then
    making=$(mktemp -d "$DATA/postgresql.XXXXXX")
    trap 'rm -rf "$making"' EXIT
    (umask 077 && printf '%s' "$PGPASSWORD" > "$making/password")
    "$bin/initdb" --pgdata "$making/data" --username mlflow --pwfile "$making/password" \
        --auth scram-sha-256 --encoding UTF8 --locale C.UTF-8 > /dev/null
    "$bin/postgres" --single -D "$making/data" postgres < databases.sql > /dev/null
    mv "$making/data" "$folder"
    rm -rf "$making"
fi
exec "$bin/postgres" -D "$folder" -p "$PGPORT" \
    -c listen_addresses=127.0.0.1 -c unix_socket_directories=
