"""A plugin of pytest: with EQST_NO_SKIPS=1, a skipped test fails unless it is expected to skip.

A skip is for a machine that lacks something (recordings, an extra). Where nothing is lacking, as in
.ci/run, a skip is a test that has quietly ceased to run.
"""

import os
from collections.abc import Generator

import pytest

# What a skip's reason may begin with even so: what no machine of the project can be asked for.
EXPECTED = (
    "needs an accelerator",  # the suite is for CPU
    "needs a browser",  # launch/test.sh --all installs one where it may, and says so where it fails
    "needs Slurm",  # likewise, and its daemons need root
    "needs root to mount",  # a small file system to fill
)


def _judge(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turns a skip that is not expected into a failure; an xfail is no skip."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    assert isinstance(report.longrepr, tuple)  # what pytest keeps of a skip: file, line, reason
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if not reason.startswith(EXPECTED):
        report.outcome = "failed"
        report.longrepr = f"unexpected skip (EQST_NO_SKIPS is set): {reason}"


# These run where the test runs, so that it makes no difference whether that is a worker's process.
@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if os.environ.get("EQST_NO_SKIPS") == "1":
        _judge(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if os.environ.get("EQST_NO_SKIPS") == "1":
        _judge(report)
    return report
