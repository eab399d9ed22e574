import sys
from pathlib import Path

import pytest

from examples.comparison.extras import folder_of, imported


def test_an_installed_package_is_found():
    assert imported("pytest", "test") is pytest
    assert folder_of("pytest", "test") == Path(pytest.__file__).parent


@pytest.mark.parametrize("find", [imported, folder_of])
def test_the_error_names_a_missing_package_and_its_extra(find):
    with pytest.raises(ModuleNotFoundError, match=r"'nowhere' is not installed: .*\[flights\]"):
        find("nowhere", "flights")


def test_the_error_of_an_installed_package_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "half.py").write_text("import nowhere")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "half", raising=False)
    with pytest.raises(ModuleNotFoundError, match="No module named 'nowhere'"):
        imported("half", "flights")
