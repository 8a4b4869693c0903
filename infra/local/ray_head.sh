#!/usr/bin/env bash
# A one-machine Ray cluster with token authentication on loopback, to submit families to and to schedule them on.
# Ctrl-C ends it; schedules are still there when it is started again.
#
#     infra/local/ray_head.sh [JOB_SERVER_PORT]
#
# The token is the one in RAY_AUTH_TOKEN, or the one in ~/.ray/auth_token, which is made if it is not there.
set -euo pipefail
port="${1:-8265}"
bin="$(cd "$(dirname "$0")/../.." && pwd)/.venv/bin"
# A submitted job runs `python`, which must be the one that has Stillhouse.
if [ -x "$bin/ray" ]; then PATH="$bin:$PATH"; fi

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -f "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]; then
  ray get-auth-token --generate > /dev/null
fi

folder="$(mktemp -d /tmp/still-head-XXXXXX)"
# Without a port of its own the agent that starts jobs would meet the one of any other Ray on this machine.
ray start --head --block --node-ip-address=127.0.0.1 --port=0 --dashboard-agent-listen-port=0 \
  --dashboard-host=127.0.0.1 --dashboard-port="$port" --temp-dir="$folder" &
ray=$!

# The process that starts the nights of schedules. It keeps all it knows in a database, so it is just started again.
schedule() {
  trap 'kill "$now" 2>/dev/null; exit 0' TERM
  while true; do
    stillhouse scheduler --address "http://127.0.0.1:$port" &
    now=$!
    wait "$now" || true
    sleep 5 &
    now=$!
    wait "$now" || true
  done
}
schedule > "$folder/scheduler.log" 2>&1 &
scheduler=$!

# `ray start --block` takes its own processes down when it is told to end.
trap 'kill "$ray" "$scheduler" 2>/dev/null; wait "$ray" "$scheduler" || true; rm -rf "$folder"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
wait "$ray"
