"""Griffe extension: docstrings as they stand in the code, read as the Markdown that the site wants.

``Example:`` becomes griffe's section of examples, ``::`` before a block a colon, a first sentence
one line, and a public name between backticks a link to where it is described.
"""

import ast
import pathlib
import re

import griffe

PACKAGE = pathlib.Path(__file__).parents[2] / "lstmjax"


def exported(module: pathlib.Path) -> list[str]:
    """What ``__all__`` of a file lists."""
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def places() -> dict[str, str]:
    """The full name of every public name; of equal ones that of the first module."""
    found: dict[str, str] = {}
    for file in sorted(PACKAGE.rglob("*.py"), reverse=True):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if module != "lstmjax":
            found |= {name: f"{module}.{name}" for name in exported(file)}
    return found


class Markdown(griffe.Extension):
    """Changes every docstring once it is collected."""

    def __init__(self) -> None:
        self.places = places()
        code = "import dataclasses\n\n@dataclasses.dataclass(kw_only=True)\nclass Cell: ..."
        self.dataclass = griffe.visit("cell", pathlib.Path("cell.py"), code)["Cell"].decorators

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """A function that a package takes from a module of the same name hides that module."""
        for module in (pkg, *pkg.modules.values()):
            for name in {*(module.exports or ())} & {*module.imports} & {*module.modules}:
                target = module.modules[name][name]
                module.set_member(name, griffe.Alias(name, target, parent=module))

    def on_class_instance(self, *, cls: griffe.Class, **_: object) -> None:
        """A cell becomes a dataclass by itself."""
        if any(self.places.get(str(base), "").startswith("lstmjax.cells.") for base in cls.bases):
            cls.decorators += self.dataclass

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Of one object."""
        if obj.docstring:
            obj.docstring.value = self.of(obj.docstring.value, obj.name)

    def of(self, text: str, own: str) -> str:
        """The text of a docstring, as Markdown."""

        def linked(found: re.Match[str]) -> str:
            if not found[1]:
                return found[0]  # a block of code
            name, _, member = found[1].removeprefix("lstmjax.").partition(".")
            place = self.places.get(name)
            if place is None or name == own or member:
                return found[0]
            return f"[`{found[1]}`][{place}]"

        first, blank, rest = text.partition("\n\n")
        text = " ".join(first.split()) + blank + rest  # lists of names show the first line
        text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.M)
        text = re.sub(r"::$", ":", text, flags=re.M)
        return re.sub(r"(?<![`\[])`([\w.]+)`(?!`)|:\n\n(?: {4}.*\n|\n)+", linked, text)
