#!/bin/sh
# Install what the client needs, and the extras that are named, into /opt/defuse.
set -eu
python requirements.py "$@" > requirements.txt
pip --python /opt/defuse install --find-links . ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --requirement requirements.txt
for extra in "$@"; do
    if [ "$extra" = cuda ]; then
        /opt/defuse/bin/python -c 'import torch; assert torch.version.cuda, f"torch {torch.__version__} is not for CUDA"'
    fi
done
