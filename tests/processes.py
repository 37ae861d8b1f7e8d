"""Commands that tests kill. A process for one is forked from a server, which has imported torch once."""

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from d2llm.cli import main

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["d2llm.cli", "d2llm.train.teach", "d2llm.train.kale", "transformers.models.bert.modeling_bert"]
)


def start(*arguments: object, folder: Path) -> BaseProcess:
    """Start `d2llm` with these arguments in `folder`. What it prints is lost."""
    process = FORKS.Process(target=_run, args=([str(argument) for argument in arguments], folder), daemon=True)
    process.start()
    return process


def _run(arguments: Sequence[str], folder: Path) -> None:
    os.chdir(folder)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    main(arguments)
