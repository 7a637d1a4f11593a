"""Where the cache lies, on a machine with a home directory and without one."""

import os
import pwd
from pathlib import Path

import pytest

from mlflow_soup.errors import SpecError
from mlflow_soup.files.cache import cache_folder


@pytest.fixture(autouse=True)
def home(monkeypatch):
    for name in ("MLFLOW_SOUP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/alice")


def test_the_cache_lies_where_the_user_keeps_caches(monkeypatch):
    assert cache_folder() == Path("/home/alice/.cache/mlflow-soup")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path("/home/alice/.cache/mlflow-soup")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/tmp/alice")
    assert cache_folder() == Path("/var/tmp/alice/mlflow-soup")


def test_our_own_variable_wins(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/tmp/alice")
    monkeypatch.setenv("MLFLOW_SOUP_CACHE", "/srv/soups")
    assert cache_folder() == Path("/srv/soups")


def test_a_cache_never_depends_on_the_working_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")  # the XDG specification says to ignore it
    assert cache_folder() == Path("/home/alice/.cache/mlflow-soup")


def test_a_user_without_a_home_directory_is_told_what_to_set(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(SpecError, match="the cache has no folder") as refused:
        cache_folder()
    assert "MLFLOW_SOUP_CACHE=" in refused.value.fix
    assert not os.path.lexists("~")
