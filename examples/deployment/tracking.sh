#!/bin/bash
# MLflow's server with users, in the foreground. Runs are in PostgreSQL, files are in S3.
# SIGTERM ends it. No password is a word of the command: libpq and boto3 read the environment.
set -euo pipefail
cd "$(dirname "$0")"
: "${SERVER_NAME:?}" "${LISTEN:?}" "${TRACKING_PORT:?}" "${S3_PORT:?}" "${PGPORT:?}"
: "${PGPASSWORD:?}" "${AWS_ACCESS_KEY_ID:?}" "${AWS_SECRET_ACCESS_KEY:?}"
: "${MLFLOW_AUTH_ADMIN_PASSWORD:?}" "${MLFLOW_FLASK_SERVER_SECRET_KEY:?}"
export PGHOST="${PGHOST:-127.0.0.1}" PGUSER=mlflow
export AWS_DEFAULT_REGION=us-east-1 MLFLOW_S3_ENDPOINT_URL="http://$SERVER_NAME:$S3_PORT"
export MLFLOW_AUTH_CONFIG_PATH="$PWD/auth.ini" MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
export MLFLOW_DISABLE_TELEMETRY=true

python - <<'PYTHON' # a bucket that is there stays as it is
import os
import boto3

boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"]).create_bucket(Bucket="mlflow")
PYTHON
exec mlflow server --app-name basic-auth --host "$LISTEN" --port "$TRACKING_PORT" --workers 2 \
    --allowed-hosts "$SERVER_NAME,$SERVER_NAME:$TRACKING_PORT,localhost:$TRACKING_PORT" \
    --backend-store-uri postgresql+psycopg2:///mlflow \
    --serve-artifacts --artifacts-destination s3://mlflow/
