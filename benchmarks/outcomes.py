"""A pytest plugin (`-p benchmarks.outcomes`): every outcome as a JSON line, so that a run that is cut off still tells.

Lines go to the file named by ZOO_TEST_OUTCOMES: {"test": node id, "outcome": passed, failed or skipped, "message"}.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TextIO

import pytest

MESSAGE = 400  # characters of a failure that are kept


class Outcomes:
    def __init__(self, path: Path) -> None:
        self.file: TextIO = path.open("w")  # open until the process ends

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            message = str(report.longrepr)[-MESSAGE:] if report.failed else ""
            line = {"test": report.nodeid, "outcome": report.outcome, "message": message}
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()


def pytest_configure(config: pytest.Config) -> None:
    wanted = os.environ.get("ZOO_TEST_OUTCOMES")
    if wanted and not hasattr(config, "workerinput"):  # of parallel runs, only the process that collects reports
        config.pluginmanager.register(Outcomes(Path(wanted)))
