"""Imports run downward through the rooms of the package, and the root holds only what everyone uses."""

import ast
from pathlib import Path

import flap_stream

PACKAGE = Path(flap_stream.__file__).parent
ROOMS = (
    ("commands",), ("report", "export", "integrations"), ("stages",), ("restore",), ("engine",), ("text",), ("output",),
    ("model",), ("storage",), ("arithmetic",), ("modeling",),
)  # fmt: skip
HEIGHT = {room: -depth for depth, rooms in enumerate(ROOMS) for room in rooms}


def imported_rooms(module: Path) -> set[str]:
    """Rooms that a module names in its imports, wherever in it they stand."""
    nodes = list(ast.walk(ast.parse(module.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    assert not any(node.level for node in froms), f"{module}: a relative import"
    names |= {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("flap_stream.")} & HEIGHT.keys()


def test_imports_run_downward() -> None:
    upward = [
        f"{module.relative_to(PACKAGE)} imports {room}"
        for own, height in HEIGHT.items()
        for module in sorted((PACKAGE / own).rglob("*.py"))
        for room in sorted(imported_rooms(module))
        if room != own and HEIGHT[room] >= height
    ]
    assert upward == []


def test_the_root_holds_what_everyone_uses() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if (path / "__init__.py").exists() or path.suffix == ".py"}
    assert found - HEIGHT.keys() == {"__init__", "__main__", "cli", "config", "errors", "progress"}
    assert found >= HEIGHT.keys()
