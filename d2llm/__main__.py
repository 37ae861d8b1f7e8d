"""`python -m d2llm`."""

from d2llm.cli import main

main(prog_name="d2llm")
