"""A test that lacks a tool is a failure where the tool must be there.

Enters: the reports of a pytest run. Leaves: under CI=true, a failure for each skip whose reason starts with
"needs tool:". Elsewhere such a test is skipped and named in the summary. Skips for other reasons (data that only some
checkouts have) stay skips everywhere. Floor: above the tests.
"""

import os

import pytest

PREFIX = "needs tool:"


def reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test, or a whole file, was skipped; empty if it was not."""
    if not report.skipped:
        return ""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def refuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip for want of a tool into a failure where CI=true."""
    why = reason(report)
    if why.startswith(PREFIX) and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped: {why}. Under CI every tool must be there: install it."


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    refuse(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    report = yield
    refuse(report)
    return report
