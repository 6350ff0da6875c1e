"""The hash by which processes compare the code they have."""

import pytest

from music_ar.code import code_digest, look_for_code


def test_it_depends_on_the_names_and_contents_of_python_files(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "some_package_to_hash"
    package.mkdir()
    found = []
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.py", "2"), ("notes.txt", "3")):
        for old in package.glob("*.py"):
            old.unlink()
        (package / "__init__.py").touch()
        (package / name).write_text(text)
        found.append(code_digest("some_package_to_hash"))
    assert len(set(found[:3])) == 3
    (package / "b.py").write_text("2")
    assert code_digest("some_package_to_hash") == found[2]  # whatever else lies there


def test_it_is_of_all_packages_or_of_those_named():
    assert code_digest() == look_for_code()() == code_digest("music_ar", "data_pipeline", "app")
    assert code_digest() != code_digest("music_ar")


def test_without_a_package_there_is_none():
    assert look_for_code("no_such_package")() is None
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        code_digest("no_such_package")
