"""The shape that every module, command and option of the package has."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import click
import pytest

import dora_convert
from dora_convert.cli import cli
from dora_convert.cli.boundary import run

ROOT = Path(dora_convert.__file__).parent
README = ROOT.parent / "README.md"


def module_names() -> list[str]:
    found = pkgutil.walk_packages([str(ROOT)], prefix="dora_convert.")
    return ["dora_convert", *(info.name for info in found)]


MODULES = [name for name in module_names() if name != "dora_convert.__main__"]


def public(module: ModuleType) -> set[str]:
    """Functions, classes and constants that the module itself defines, but for type variables."""
    assert module.__file__ is not None
    names: set[str] = set()
    for node in ast.parse(Path(module.__file__).read_text()).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(targets=targets):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return {
        name
        for name in names
        if (not name.startswith("_") or name == "__version__")
        and not isinstance(getattr(module, name), TypeVar)
    }


def reexported(module: ModuleType) -> set[str]:
    """What a package takes from modules of its own."""
    assert module.__file__ is not None
    return {
        alias.name
        for node in ast.parse(Path(module.__file__).read_text()).body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(f"{module.__name__}.")
        for alias in node.names
    }


@pytest.mark.parametrize("name", MODULES)
def test_public_names(name: str) -> None:
    module = importlib.import_module(name)
    declared = getattr(module, "__all__", None)
    if declared is None:
        assert not public(module)  # a folder, with nothing but what it is for
        return
    constants = [n for n in declared if n.isupper()]
    others = [n for n in declared if not n.isupper()]
    classes = [n for n in others if n[0].isupper()]
    functions = [n for n in others if not n[0].isupper()]
    assert declared == sorted(constants) + sorted(classes) + sorted(functions)  # as ruff sorts
    own = public(module)
    assert own <= set(declared) <= own | reexported(module)


PLUG_INS = (
    ("formats", "FORMAT"),
    ("loras", "FORMAT"),
    ("quant", "QUANTIZER"),
    ("cli.commands", "COMMAND"),
)


def test_plug_ins() -> None:
    for package, attribute in PLUG_INS:
        folder = ROOT / package.replace(".", "/")
        names = [path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")]
        assert names
        for name in names:
            module = importlib.import_module(f"dora_convert.{package}.{name}")
            assert attribute in module.__all__, name


@pytest.mark.parametrize("name", module_names())
def test_every_module_says_what_it_is_for(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text()
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 400


def commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        yield name, command


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_help(name: str) -> None:
    command = dict(commands())[name]
    assert command.help
    short = command.get_short_help_str(limit=80)
    assert short.endswith(".")
    assert not short.endswith("...")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.help.endswith(".") or ";" in parameter.help, parameter.help


def test_readme_names_every_command_and_format() -> None:
    text = README.read_text()
    for name, _ in commands():
        assert f"dora-convert {name}" in text, name


def test_readme_names_only_what_there_is() -> None:
    text = README.read_text()
    known = dict(commands())
    options = {
        option
        for command in known.values()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    for command in re.findall(r"dora-convert ([a-z][a-z-]+)", text):
        assert command in known, command
    for option in re.findall(r"(--[a-z][a-z-]+)", re.sub(r"scripts/test.*", "", text)):
        assert option in options or option == "--help", option


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", dora_convert.__version__)
    assert run(cli, ["--version"]) == 0
    assert capsys.readouterr().out == f"dora-convert, version {dora_convert.__version__}\n"


def test_exit_codes_are_those_of_the_readme() -> None:
    from dora_convert import errors  # noqa: PLC0415

    text = README.read_text()
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert inspect.getdoc(kind)
        if kind is not errors.DoraConvertError:
            assert re.search(rf"^\| {kind.exit_code}\b", text, re.MULTILINE), name
            assert f"exit {kind.exit_code}" in (errors.__doc__ or "")
