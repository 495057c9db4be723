"""`python -m defuse.cli`: the command `defuse` without a script on the path."""

from defuse.cli import main

main()
