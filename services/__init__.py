"""The services, and what all of them set before torch is loaded."""

import os

# OpenMP's threads wait for each other at every layer. Waiting actively, they take the cores that the others need when
# the machine is shared: twenty steps of a small convolutional network beside two busy processes took 7.9 s on two
# cores; without active waiting they took 0.7 s.
os.environ.setdefault("GOMP_SPINCOUNT", "0")
