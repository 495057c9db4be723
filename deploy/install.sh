#!/bin/sh
# Install the wheel of this folder, with the extras that are named, into /opt/defuse.
set -eu
extras=$(echo "$*" | tr ' ' ',')
exec pip --python /opt/defuse install --find-links . ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
    "defuse-ml[$extras] @ file://$(echo "$PWD"/defuse_ml-*.whl)"
