"""Where compiled programs are kept."""

import os
from pathlib import Path

import jax
import pytest

from l2m_jax.compiled import keep_compiled


@pytest.fixture
def before():
    """The tests' own folder comes back afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    values = [getattr(jax.config, name) for name in names]
    yield values[0]
    for name, value in zip(names, values):
        jax.config.update(name, value)


def test_the_environment_goes_before(before, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == before  # conftest's
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("variable, below", [("XDG_CACHE_HOME", "l2m_jax"), ("HOME", ".cache/l2m_jax")])
def test_the_users_cache_folder(before, monkeypatch, tmp_path, variable: str, below: str):
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / below) and (tmp_path / below).is_dir()


def test_without_a_folder_to_write(before, monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == before
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: path != Path(tmp_path / "l2m_jax"))
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == before
