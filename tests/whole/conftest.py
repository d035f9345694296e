"""A sound world, and a copy of it to spoil."""

import bad
import pytest


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return bad.base(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def here(sound, tmp_path, monkeypatch):
    monkeypatch.chdir(bad.copy(sound, tmp_path))
    return tmp_path
