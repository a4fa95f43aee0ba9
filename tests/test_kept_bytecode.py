"""Bytecode that is made before several processes import the same tests."""

from _pytest.assertion import rewrite

from testkit.kept_bytecode import keep_bytecode


def test_what_pytest_and_python_would_make_is_there_and_is_made_once(pytestconfig, tmp_path):
    (tmp_path / "test_one.py").write_text("def test_it():\n    assert [1] == [2]\n")
    (tmp_path / "helper.py").write_text("ONE = 1\n")
    keep_bytecode(pytestconfig, tmp_path)
    test, helper = (tmp_path / name for name in ("test_one.py", "helper.py"))
    kept = rewrite.get_cache_dir(test) / ("test_one" + rewrite.PYC_TAIL)
    code = rewrite._read_pyc(test, kept)
    assert "@pytest_ar" in code.co_names  # rewritten, so that it says what is compared
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("__pycache__/*")}
    assert kept in made
    assert any(path.name.startswith(helper.stem) for path in made)
    keep_bytecode(pytestconfig, tmp_path)
    assert made == {path: path.stat().st_mtime_ns for path in made}
