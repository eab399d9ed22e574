import sys
from pathlib import Path

import pytest

from examples.comparison.extras import folder_of, imported


def test_what_is_installed_is_found():
    assert imported("pytest", "test") is pytest
    assert folder_of("pytest", "test") == Path(pytest.__file__).parent


@pytest.mark.parametrize("find", [imported, folder_of])
def test_what_is_not_installed_is_told_with_its_extra(find):
    with pytest.raises(ModuleNotFoundError, match=r"'nowhere' is not installed: .*\[flights\]"):
        find("nowhere", "flights")


def test_what_an_installed_package_lacks_itself_is_told_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "half.py").write_text("import nowhere")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "half", raising=False)
    with pytest.raises(ModuleNotFoundError, match="No module named 'nowhere'"):
        imported("half", "flights")
