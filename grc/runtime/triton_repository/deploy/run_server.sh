#!/usr/bin/env bash
# Start tritonserver on this repository. More options may follow:  ./run_server.sh --http-port=9000
# The models run on the packages of the first python on PATH: activate an environment with torch $torch and safetensors.
set -euo pipefail
repository="$$(cd "$$(dirname "$${BASH_SOURCE[0]}")" && pwd)"
server="$${TRITONSERVER:-$$(command -v tritonserver || echo /opt/tritonserver/bin/tritonserver)}"
if [ ! -x "$$server" ]; then
  echo "error: no tritonserver found on PATH or at $$server" >&2
  echo "hint: run it in the image (docker compose up --build), or name the binary in TRITONSERVER" >&2
  exit 1
fi
# One thread a process: requests run side by side in --instances, and threads that wait spin.
export OMP_NUM_THREADS="$${OMP_NUM_THREADS:-1}"
address="$${TRITON_ADDRESS:-127.0.0.1}"
exec "$$server" \
  --model-repository="$$repository" \
  --disable-auto-complete-config \
  --http-address="$$address" --grpc-address="$$address" --metrics-address="$$address" \
  --exit-timeout-secs=30$options \
  "$$@"
