"""Old module paths and names still work, and warn."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from v2l_fast._deprecated import MOVED, RENAMED, new_path


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_is_the_new_module(old):
    old = f"v2l_fast.{old}"
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new_path(old)}; ") as caught:
        module = importlib.import_module(old)
    new = importlib.import_module(new_path(old))
    assert module is new or module.__path__ == []
    names = [name for name in vars(new) if not name.startswith("__")]
    assert all(getattr(module, name) is getattr(new, name) for name in names)
    assert new.__name__ == new.__spec__.name == new_path(old)
    assert len([w for w in caught if old in str(w.message)]) == 1


def test_modules_of_a_moved_package():
    assert new_path("v2l_fast.backbones.decoder") == "v2l_fast.vlm.decoder"
    assert new_path("v2l_fast.backbones.steps") == "v2l_fast.work_units"
    for name in ("v2l_fast", "v2l_fast.vlm", "v2l_fast.adapters", "other.adapter"):
        assert new_path(name) is None


def test_the_warning_points_to_the_caller():
    """Once for each old path."""
    code = (
        "import warnings; warnings.simplefilter('always')\n"
        "from v2l_fast.adapter import Adapter\n"
        "from v2l_fast.backbones.base import Backbone\n"
        "import v2l_fast.backbones.base\n"
        "from v2l_fast import Adapter as New\n"
        "assert Adapter is New\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if "DeprecationWarning" in line]
    assert [line.split(":")[1] for line in lines] == ["2", "3", "3"], done.stderr


def test_an_unknown_module_of_a_moved_package():
    importlib.import_module("v2l_fast.vlm")
    with (
        pytest.warns(DeprecationWarning),
        pytest.raises(ModuleNotFoundError, match="v2l_fast.vlm.nothing"),
    ):
        sys.modules.pop("v2l_fast.backbones", None)
        importlib.import_module("v2l_fast.backbones.nothing")


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_the_new_one(old):
    owner, _, name = f"v2l_fast.{old}".rpartition(".")
    # A module has its old names once it was imported by its old path.
    for path, package in MOVED.items():
        if f"{owner}.".startswith(f"v2l_fast.{package}."):
            path = f"v2l_fast.{path}{owner.removeprefix(f'v2l_fast.{package}')}"
            sys.modules.pop(path, None)
            with pytest.warns(DeprecationWarning):
                importlib.import_module(path)
    module = importlib.import_module(owner)
    with pytest.warns(
        DeprecationWarning, match=f"{name} is now v2l_fast.{RENAMED[old]}; "
    ) as caught:
        value = getattr(module, name)
    assert caught[0].filename == __file__
    new_owner, _, new_name = f"v2l_fast.{RENAMED[old]}".rpartition(".")
    assert value is getattr(importlib.import_module(new_owner), new_name)
    with pytest.raises(AttributeError, match=f"{name}Nothing"):
        getattr(module, f"{name}Nothing")
