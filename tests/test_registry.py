"""Registries: order, unknown names, records and functions; plugins and the names that are taken."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from moecover.errors import InputError
from moecover.registry import Registry, guarded, load_plugin


@dataclass(frozen=True)
class Planet:
    mass: float
    moons: Callable[[], int]


@pytest.fixture
def planets(monkeypatch: pytest.MonkeyPatch) -> Registry[Planet]:
    """A registry of records that plugins can import as ``planets.PLANETS``."""
    table: Registry[Planet] = Registry("planet")
    module = type(sys)("planets")
    module.PLANETS, module.Planet = table, Planet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "planets", module)
    return table


def plugin(folder: Path, body: str, name: str = "mine") -> Path:
    path = folder / f"{name}.py"
    path.write_text("from planets import PLANETS, Planet\n" + body)
    return path


def enter(name: str, mass: float = 1.0) -> str:
    return f"PLANETS.add({name!r}, Planet({mass}, lambda: 0))\n"


def test_records_by_name(planets: Registry[Planet]) -> None:
    for name in ("Venus", "Earth"):
        planets.add(name, Planet(1.0, lambda: 0))
    assert list(planets) == ["Venus", "Earth"]
    assert len(planets) == 2
    assert planets["Earth"].mass == 1.0
    assert "Mars" not in planets
    with pytest.raises(InputError, match=r"unknown planet 'Erth'\. Did you mean Earth\? Known: Earth, Venus"):
        planets["Erth"]


def test_functions_by_decorator() -> None:
    table: Registry[Callable[[float], float]] = Registry("curve")

    @table("square", paper="Euclid", blind=True)
    def square(x: float) -> float:
        """The square.

        More on it.
        """
        return x * x

    assert table["square"] is square
    assert table.rows() == [{"name": "square", "summary": "The square.", "paper": "Euclid"}]
    assert table.facts == {"square": {"blind": True}}


def test_built_in_entries_come_before_those_of_plugins(planets: Registry[Planet], tmp_path: Path) -> None:
    planets.add("Venus", Planet(1.0, lambda: 0))
    load_plugin(plugin(tmp_path, enter("Aurora")))
    planets.add("Earth", Planet(1.0, lambda: 0))
    assert list(planets) == ["Venus", "Earth", "Aurora"]


def test_a_plugin_cannot_take_a_built_in_name(planets: Registry[Planet], tmp_path: Path) -> None:
    planets.add("Earth", Planet(1.0, lambda: 0))
    path = plugin(tmp_path, enter("Earth", 2.0))
    with pytest.raises(InputError, match=rf"^plugin {path}: planet Earth exists already\. Choose another name$"):
        load_plugin(path)
    assert planets["Earth"].mass == 1.0


def test_nor_if_the_built_in_entry_comes_later(planets: Registry[Planet], tmp_path: Path) -> None:
    path = plugin(tmp_path, enter("Earth", 2.0))
    load_plugin(path)
    with pytest.raises(InputError, match=rf"^plugin {path}: planet Earth exists already\. Choose another name$"):
        planets.add("Earth", Planet(1.0, lambda: 0))


def test_two_plugins_cannot_share_a_name_but_one_can_be_loaded_again(planets: Registry[Planet], tmp_path: Path) -> None:
    path = plugin(tmp_path, enter("Aurora"))
    load_plugin(path)
    plugin(tmp_path, enter("Aurora", 3.0))
    load_plugin(path)
    assert planets["Aurora"].mass == 3.0
    other = plugin(tmp_path, enter("Aurora"), name="other")
    with pytest.raises(InputError, match=f"plugin {other}: planet Aurora exists already"):
        load_plugin(other)


def test_what_a_plugin_imports_from_this_package_is_built_in(tmp_path: Path) -> None:
    """Even if the plugin is the first to import it; in a process of its own."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from moecover.planning.saliency import SALIENCIES\n"
        "@SALIENCIES('aaa', paper='x')\ndef f(s):\n    return s['count']\n"
    )
    code = (
        "import sys\nfrom moecover.registry import load_plugin\nload_plugin(sys.argv[1])\n"
        "from moecover.planning.saliency import SALIENCIES\nprint(*SALIENCIES)\n"
        "assert hasattr(SALIENCIES['aaa'], '__wrapped__') and not hasattr(SALIENCIES['reap'], '__wrapped__')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1] == "aaa", done.stderr
    assert "reap" in done.stdout.split()
    assert done.returncode == 0, done.stderr


def test_a_module_that_a_plugin_imports_belongs_to_it(
    planets: Registry[Planet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planets.add("Earth", Planet(1.0, lambda: 0))
    monkeypatch.syspath_prepend(tmp_path)
    plugin(tmp_path, enter("Earth"), name="helper_of_the_plugin")
    path = plugin(tmp_path, "import helper_of_the_plugin\n")
    with pytest.raises(InputError, match=f"plugin {path}: planet Earth exists already"):
        load_plugin(path)


def test_errors_of_a_plugins_functions_name_its_file(planets: Registry[Planet], tmp_path: Path) -> None:
    path = plugin(
        tmp_path,
        "from moecover.registry import guarded\n"
        "def broken():\n    return 1 // 0\n"
        "PLANETS.add('Aurora', Planet(1.0, guarded(broken, 'planet Aurora')))\n",
    )
    load_plugin(path)
    with pytest.raises(InputError, match=rf"^plugin {path}, line 4: planet Aurora raised ZeroDivisionError: "):
        planets["Aurora"].moons()


def test_unknown_names_are_answered_by_in_and_get(planets: Registry[Planet]) -> None:
    from moecover.corpora.sources import CORPORA
    from moecover.planning.methods import METHODS

    for table in (planets, CORPORA, METHODS):
        assert "nonsense" not in table
        assert table.get("nonsense") is None
        assert 5 not in table
        with pytest.raises(InputError, match="^unknown .* 'nonsense'"):
            _ = table["nonsense"]
        with pytest.raises(KeyError):
            _ = table["nonsense"]


@pytest.mark.parametrize("code", ["import sys; sys.exit(0)", "exit()", "raise SystemExit"])
def test_a_plugin_that_exits_is_an_error(code: str, planets: Registry[Planet], tmp_path: Path) -> None:
    (tmp_path / "at_import.py").write_text(code)
    with pytest.raises(InputError, match=r"at_import.py, line 1: the file raised SystemExit"):
        load_plugin(tmp_path / "at_import.py")
    body = "\n".join(f"    {line}" for line in code.split("; "))
    (tmp_path / "later.py").write_text(f"from planets import PLANETS\n@PLANETS('p', paper='')\ndef f():\n{body}\n")
    load_plugin(tmp_path / "later.py")
    with pytest.raises(InputError, match="planet p raised SystemExit"):
        planets["p"]()  # type: ignore[operator]


def test_what_a_plugin_prints_does_not_reach_stdout(
    planets: Registry[Planet], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loud.py").write_text(
        "print('hello')\nfrom planets import PLANETS\n"
        "@PLANETS('p', paper='')\ndef f():\n    print('again')\n    return 3\n"
    )
    load_plugin(tmp_path / "loud.py")
    assert planets["p"]() == 3  # type: ignore[operator]
    out, err = capsys.readouterr()
    assert (out, err.split()) == ("", ["hello", "again"])


def test_an_error_without_a_message_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text("class E(Exception):\n    def __str__(self):\n        raise ValueError\nraise E\n")
    with pytest.raises(InputError, match="the file raised E: no message"):
        load_plugin(tmp_path / "odd.py")


def test_functions_outside_plugins_are_left_as_they_are() -> None:
    def function() -> int:
        return 1

    assert guarded(function, "planet X") is function


def test_what_a_block_enters_can_be_undone(planets: Registry[Planet], tmp_path: Path) -> None:
    planets.add("Earth", Planet(1.0, lambda: 0))
    with planets.restored():
        planets.add("Earth", Planet(2.0, lambda: 0))
        load_plugin(plugin(tmp_path, enter("Aurora")))
        assert list(planets) == ["Earth", "Aurora"]
    assert list(planets) == ["Earth"]
    assert planets["Earth"].mass == 1.0


@pytest.mark.parametrize("name", ["missing.py", "text.txt"])
def test_no_such_plugin(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(InputError, match=r"no such Python file\. Give the path of a \.py file"):
        load_plugin(tmp_path / name)


def test_a_failed_plugin_does_not_mark_later_entries(planets: Registry[Planet], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 2: the file raised ZeroDivisionError"):
        load_plugin(plugin(tmp_path, "1 / 0\n"))
    planets.add("Earth", Planet(1.0, lambda: 0))
    planets.add("Earth", Planet(2.0, lambda: 0))
    assert planets["Earth"].mass == 2.0
