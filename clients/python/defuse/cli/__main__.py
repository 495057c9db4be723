"""`python -m defuse.cli`: the command `defuse`, where scripts are not on the path."""

from defuse.cli import main

main()
