"""tests/build_cache.py: a build is made once, and again when a source, a flag or a version changes."""

from __future__ import annotations

import build_cache
import pytest


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setattr(build_cache, "CACHE", tmp_path / "cache")
    source = tmp_path / "source.cpp"
    source.write_text("int one;")
    made = []

    def make(folder):
        made.append(folder)
        (folder / "result").write_text(source.read_text())

    def run(flags=("-O1",)):
        return build_cache.cached_build("thing", [source], flags, make)

    return source, made, run


def test_second_build_comes_from_the_cache(build):
    _, made, run = build
    assert run() == run()
    assert len(made) == 1
    assert (run() / "result").read_text() == "int one;"


def test_changed_source_or_flags_build_again(build):
    source, made, run = build
    first = run()
    assert run(flags=("-O2",)) != first
    source.write_text("int two;")  # the same size; the modification time is ignored
    second = run()
    assert second != first
    assert (second / "result").read_text() == "int two;"
    assert len(made) == 3


def test_failed_build_leaves_nothing(build, tmp_path):
    source, _, _ = build

    def fail(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("does not compile")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="does not compile"):
            build_cache.cached_build("broken", [source], [], fail)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir() and path.suffix != ".unfinished"]
