"""Loads what tests share, `shared.py`, except into the process that only hands tests to others: it need not wait until
torch is imported."""

import gc


def pytest_configure(config):
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        gc.disable()  # until all tests are collected: imports and tests make many objects that stay
        config.pluginmanager.import_plugin("tests.shared")
