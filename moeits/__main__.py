"""``python -m moeits``: the command line."""

from moeits.cli import main

main(prog_name="moeits")
