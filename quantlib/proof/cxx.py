"""The small C++ that csrc/numerics.h is written in, read from the file and run on terms.

It understands: macros, `#ifdef`, `#include` of a file beside it; structs of constants, of members and of static
functions; templates over types, bools and ints, with overloads, specialisations and `if constexpr`; declarations,
assignments, `return`; expressions over bool, (u)int8 to 64 and float with C++'s promotions. Integers wrap, as those of
vectors do. A declaration that is more than this is left out, and whoever uses its name gets a SyntaxError, never a
guess.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from quantlib.proof import terms, words
from quantlib.proof.terms import Term
from quantlib.proof.words import TYPES, Type

TOKEN = re.compile(
    r"""
    (?P<float>\d+\.\d*(?:e[+-]?\d+)?f?|\d+e[+-]?\d+f?) | (?P<int>0x[0-9a-fA-F]+u?|\d+u?)
  | (?P<name>[A-Za-z_]\w*) | (?P<string>"[^"]*")
  | (?P<op>\[\[|\]\]|::|->|<<|<=|>=|==|!=|&&|\|\||\+\+|--|[-+*/%&|^~!<>=?:;,.(){}\[\]])
    """,
    re.VERBOSE,
)
SCALARS = {
    "bool": "bool",
    "int": "int32",
    "unsigned": "uint32",
    "float": "float32",
    **{f"{u}int{n}_t": f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)},
}
BINARY = [
    ("||",),
    ("&&",),
    ("|",),
    ("^",),
    ("&",),
    ("==", "!="),
    ("<", ">", "<=", ">="),
    ("<<", ">>"),
    ("+", "-"),
    ("*", "/"),
]


@dataclass(frozen=True)
class Value:
    """A scalar."""

    type: Type
    term: Term


@dataclass
class Object:
    """A struct's value."""

    struct: Struct
    members: dict[str, Any] = field(default_factory=dict)


@dataclass
class Struct:
    """A struct with the arguments of its template."""

    name: str
    scope: Scope
    arguments: tuple[Any, ...] = ()
    members: list[str] = field(default_factory=list)
    types: dict[str, list[str]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.name, *(_key(a) for a in self.arguments))


def _key(value: Any) -> Any:
    return value.key if isinstance(value, Struct) else value.term.parameters[0] if isinstance(value, Value) else value


@dataclass
class Function:
    name: str
    template: list[tuple[str, str]]  # ("class", "V") or ("bool", "AFFINE")
    result: list[str]
    parameters: list[tuple[list[str], str]]
    body: list[str]


class Scope:
    """The meaning of names: types, values, functions, templates."""

    def __init__(self, outer: Scope | None = None) -> None:
        self.outer = outer
        self.names: dict[str, Any] = {}

    def find(self, name: str) -> Any:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.outer
        raise SyntaxError(f"{name} is not known")


Builtin = Callable[..., Any]


class Program:
    """Headers, read. ``call`` runs one of their functions.

    Parameters
    ----------
    text : Callable
        From a file's name to its text.
    files : tuple of str
        Read in this order, each after what it includes.
    """

    def __init__(self, text: Callable[[str], str], files: tuple[str, ...]) -> None:
        self.scope = Scope()
        self.templates: set[str] = {"same_bits", "encode_book", "decode_book"}
        self.macros: dict[str, tuple[list[str] | None, list[str]]] = {}
        for name, scalar in SCALARS.items():
            self.scope.names[name] = TYPES[scalar]
        self.text, self._included = text, set[str]()
        for file in files:
            self._include(file)
        self.scope.names["same_bits"] = self._same_bits

    # -- preprocessing --

    def _include(self, file: str) -> None:
        if file not in self._included | UNREAD:
            self._included.add(file)
            text = self.text(file)
            for name in re.findall(r'^#include "([^"]+)"', text, re.MULTILINE):
                self._include(f"{file.rpartition('/')[0]}/{name}")
            Reader(self, list(self._preprocessed(text))).declarations(self.scope)

    def _preprocessed(self, text: str) -> Iterator[str]:
        text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text.replace("\\\n", " "), flags=re.DOTALL)
        kept = [True]
        for line in text.split("\n"):
            directive, _, rest = line.strip().partition(" ")
            if directive in ("#ifdef", "#ifndef", "#if"):
                defined = rest.strip() in self.macros
                kept.append(kept[-1] and (defined if directive == "#ifdef" else not defined and directive == "#ifndef"))
            elif directive == "#else":
                kept[-1] = kept[-2] and not kept[-1]
            elif directive == "#endif":
                kept.pop()
            elif not kept[-1] or directive in ("#pragma", "#include"):
                continue
            elif directive == "#define":
                self._define(rest)
            elif directive == "#undef":
                del self.macros[rest.strip()]
            elif directive.startswith("#"):
                raise SyntaxError(f"{line.strip()} is no directive that is read")
            else:
                yield from self._expanded(tokenized(line))

    def _define(self, text: str) -> None:
        found = re.match(r"(\w+)(\(([^)]*)\))?(.*)", text, re.DOTALL)
        assert found is not None
        name, has_parameters, parameters, body = found.groups()
        listed = [p.strip() for p in parameters.split(",")] if has_parameters else None
        self.macros[name] = (listed, tokenized(body))

    def _expanded(self, tokens: list[str]) -> list[str]:
        out: list[str] = []
        i = 0
        while i < len(tokens):
            token = tokens[i]
            i += 1
            if token not in self.macros:
                out.append(token)
                continue
            parameters, body = self.macros[token]
            if parameters is None:
                out += self._expanded(body)
            elif i < len(tokens) and tokens[i] == "(":
                end = _closing(tokens, i)
                given = _split(tokens[i + 1 : end], ",")
                i = end + 1
                by_name = dict(zip(parameters, given, strict=parameters[-1:] != ["..."]))
                out += self._expanded([t for b in body for t in by_name.get(b, [b])])
            else:
                out.append(token)
        return out

    # -- running --

    def call(self, name: str, *arguments: Any, template: tuple[Any, ...] = ()) -> Any:
        """``name<template...>(arguments...)``: scalars are Value, structs Object; of a template names, bools, types."""
        given = [self._argument(t) for t in template]
        return self._call(self.scope.find(name), list(arguments), given, name)

    def struct(self, name: str, *arguments: Any) -> Struct:
        """The struct of this name, made if it is a template."""
        found = self.scope.find(name)
        if isinstance(found, Struct):
            return found
        made = self._instance(name, found, tuple(arguments))
        assert isinstance(made, Struct)
        return made

    def constant(self, struct: str, name: str) -> Value:
        found = self.struct(struct).scope.names[name]
        assert isinstance(found, Value)
        return found

    def _argument(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.scope.find(value)
        return Value(TYPES["bool"], terms.const(value, terms.BOOL)) if isinstance(value, bool) else value

    @staticmethod
    def _same_bits(template: list[Any], arguments: list[Any]) -> Value:
        (to,), (value,) = template[:1], arguments
        if to.bits != value.type.bits:
            raise SyntaxError(f"same_bits from {value.type.name} to {to.name}")
        return Value(to, words.reinterpret(value.term, value.type, to))

    def _call(self, found: Any, arguments: list[Any], template: list[Any], name: str) -> Any:
        if callable(found):
            return found(template, arguments)
        failures = []
        for function in found:
            scope = self._bound(function, arguments, template)
            if isinstance(scope, Scope):
                run = Runner(self, scope)
                for (tokens, parameter), argument in zip(function.parameters, arguments, strict=True):
                    scope.names[parameter] = run.initialised(tokens, argument)
                body = Reader(self, function.body)
                result = run.block(body.statements())
                return run.initialised(function.result, result)
            failures.append(scope)
        raise SyntaxError(f"no {name} takes these arguments: {'; '.join(failures)}")

    def _bound(self, function: Function, arguments: list[Any], template: list[Any]) -> Scope | str:
        """A scope in which the template's parameters are bound, or why they cannot be."""
        if len(arguments) != len(function.parameters) or len(template) > len(function.template):
            return "their number"
        if template and not function.template:
            return "it is no template"
        scope = Scope(getattr(function, "scope", None) or self.scope)
        for (_, name), value in zip(function.template, template, strict=False):
            scope.names[name] = value
        free = [name for _, name in function.template[len(template) :]]
        for (tokens, _), argument in zip(function.parameters, arguments, strict=True):
            plain = _plain(tokens)
            if len(plain) == 1 and plain[0] in free and plain[0] not in scope.names and isinstance(argument, Value):
                scope.names[plain[0]] = argument.type
            elif len(plain) == 4 and plain[1] == "<" and isinstance(argument, Object):
                scope.names.setdefault(plain[2], argument.struct.arguments[0])
        unbound = [name for name in free if name not in scope.names]
        return f"{', '.join(unbound)} follows from no argument" if unbound else scope

    def _instance(self, name: str, found: Any, arguments: tuple[Any, ...]) -> Any:
        """A struct or alias of a template with its arguments."""
        for specialisation in reversed(found.specialisations):
            result = specialisation.match(self, arguments)
            if result is not None:
                return result
        raise SyntaxError(f"{name} has no form for these arguments")


@dataclass
class Specialisation:
    """One form of a struct or alias template."""

    name: str
    template: list[tuple[str, str]]
    arguments: list[list[str]] | None  # the specialised ones, None where it is the general form
    body: list[str]
    alias: bool
    scope: Scope

    def __post_init__(self) -> None:
        self.made: dict[tuple[Any, ...], Any] = {}

    def match(self, program: Program, arguments: tuple[Any, ...]) -> Any:
        key = tuple(_key(a) for a in arguments)
        if key in self.made:
            return self.made[key]
        inner = Scope(self.scope)
        if self.arguments is None:
            if not self.body:
                return None
            for (_, name), value in zip(self.template, arguments, strict=True):
                inner.names[name] = value
        else:
            run = Runner(program, self.scope)
            if key != tuple(_key(run.template_argument(tokens)) for tokens in self.arguments):
                return None
        if self.alias:
            result: Any = Runner(program, inner).type(self.body)
        else:
            result = Struct(self.name, inner, arguments)
            Reader(program, self.body).declarations(inner, result)
        self.made[key] = result
        return result


@dataclass
class Template:
    """A struct or alias template: its forms."""

    specialisations: list[Specialisation] = field(default_factory=list)


# ---- tokens ---------------------------------------------------------------------------------------------------------


def tokenized(text: str) -> list[str]:
    out: list[str] = []
    at = 0
    while True:
        while at < len(text) and text[at].isspace():
            at += 1
        if at == len(text):
            return out
        found = TOKEN.match(text, at)
        if found is None:
            raise SyntaxError(f"{text[at : at + 20]!r} is no token that is read")
        out.append(found.group())
        at = found.end()


UNREAD = {"csrc/book.h"}  # tables, whose codes and midpoints `make test` enumerates
OPENING = {"(": ")", "{": "}", "[": "]", "[[": "]]"}


def _closing(tokens: list[str], start: int) -> int:
    """The index of what closes the bracket at ``start``."""
    depth = 0
    for i in range(start, len(tokens)):
        if tokens[i] in OPENING:
            depth += 1
        elif tokens[i] in OPENING.values():
            depth -= 1
            if not depth:
                return i
    raise SyntaxError("a bracket is never closed")


def _split(tokens: list[str], separator: str) -> list[list[str]]:
    """Split at separators outside brackets."""
    parts: list[list[str]] = [[]]
    i = 0
    while i < len(tokens):
        if tokens[i] in OPENING:
            end = _closing(tokens, i)
            parts[-1] += tokens[i : end + 1]
            i = end
        elif tokens[i] == separator:
            parts.append([])
        else:
            parts[-1].append(tokens[i])
        i += 1
    return parts if parts != [[]] else []


NO_TYPE = {"const", "constexpr", "static", "inline", "&", "typename"}


def _plain(tokens: list[str]) -> list[str]:
    """A type without what does not change its values."""
    out: list[str] = []
    i = 0
    while i < len(tokens):
        if tokens[i] == "[[":
            i = _closing(tokens, i)
        elif tokens[i] == "__attribute__":
            i = _closing(tokens, i + 1)
        elif tokens[i] not in NO_TYPE:
            out.append(tokens[i])
        i += 1
    return out


# ---- declarations and syntax ----------------------------------------------------------------------------------------


class Reader:
    """Tokens to declarations, statements and expressions."""

    def __init__(self, program: Program, tokens: list[str]) -> None:
        self.program, self.tokens, self.at = program, tokens, 0

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ""

    def next(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1]

    def expect(self, token: str) -> None:
        if self.peek() != token:
            raise SyntaxError(f"expected {token}, got {' '.join(self.tokens[self.at : self.at + 8])}")
        self.at += 1

    def accept(self, token: str) -> bool:
        found = self.peek() == token
        self.at += found
        return found

    def until(self, token: str) -> list[str]:
        """Return the tokens before ``token``, and pass it."""
        start = self.at
        while self.peek() != token:
            if self.peek() in OPENING:
                self.at = _closing(self.tokens, self.at)
            self.next()
        self.at += 1
        return self.tokens[start : self.at - 1]

    def inside(self) -> list[str]:
        """Return the tokens inside the bracket here."""
        end = _closing(self.tokens, self.at)
        inner = self.tokens[self.at + 1 : end]
        self.at = end + 1
        return inner

    def angles(self) -> list[str]:
        """Return the tokens inside < >; shifts do not occur in there."""
        self.expect("<")
        depth, start = 1, self.at
        while depth:
            depth += {"<": 1, ">": -1}.get(self.next(), 0)
        return self.tokens[start : self.at - 1]

    def declarations(self, scope: Scope, struct: Struct | None = None) -> None:
        while self.peek():
            if self.accept(";"):
                continue
            if self.accept("namespace"):
                self.next()
                Reader(self.program, self.inside()).declarations(scope)
            else:
                with contextlib.suppress(SyntaxError, ValueError, IndexError, TypeError, AttributeError):
                    Reader(self.program, self.whole_declaration()).declaration(scope, struct)

    def whole_declaration(self) -> list[str]:
        """The tokens up to the semicolon that ends them, or the brace that ends a function."""
        start = self.at
        while self.peek() not in ("", ";"):
            if self.peek() not in OPENING:
                self.next()
                continue
            brace = self.peek() == "{"
            self.at = _closing(self.tokens, self.at) + 1
            if brace and self.peek() != ";":
                return self.tokens[start : self.at]
        self.at += 1
        return self.tokens[start : self.at]

    def declaration(self, scope: Scope, struct: Struct | None) -> None:
        template: list[tuple[str, str]] | None = None
        if self.accept("template"):
            template = [(p[0], p[1]) for p in _split(self.angles(), ",")]
        if self.accept("using"):
            name = self.next()
            self.expect("=")
            self._form(scope, name, template, None, self.until(";"), alias=True)
        elif self.accept("struct"):
            name = self.next()
            arguments = _arguments(self.angles()) if self.peek() == "<" else None
            body = self.inside() if self.peek() == "{" else []
            self.expect(";")
            if template is None:
                made = Struct(name, Scope(scope))
                Reader(self.program, body).declarations(made.scope, made)
                scope.names[name] = made
            else:
                self._form(scope, name, template, arguments, body, alias=False)
        elif self.accept("static_assert"):
            self.until(";")
        else:
            self._function_or_value(scope, template, struct)

    def _form(
        self,
        scope: Scope,
        name: str,
        template: list[tuple[str, str]] | None,
        arguments: list[list[str]] | None,
        body: list[str],
        alias: bool,
    ) -> None:
        if template is None:
            try:
                scope.names[name] = Runner(self.program, scope).type(body)
            except SyntaxError:  # a type that is not read, such as a storage type; whoever uses it fails
                scope.names.pop(name, None)
            return
        self.program.templates.add(name)
        forms = scope.names.setdefault(name, Template())
        forms.specialisations.append(Specialisation(name, template, arguments, body, alias, scope))

    def _function_or_value(self, scope: Scope, template: list[tuple[str, str]] | None, struct: Struct | None) -> None:
        start = self.at
        while self.peek() not in ("(", "=", ";", ",") or self.tokens[self.at - 1] in ("__attribute__", "decltype"):
            if self.peek() in OPENING:
                self.at = _closing(self.tokens, self.at)
            elif self.peek() == "<":
                self.angles()
                continue
            self.next()
        name, kind = self.tokens[self.at - 1], _plain(self.tokens[start : self.at - 1])
        if self.peek() == "(":
            parameters = []
            for tokens in _split(self.inside(), ","):
                plain = _plain(tokens)
                parameters.append((plain[:-1], plain[-1]))
            function = Function(name, template or [], kind, parameters, self.inside())
            function.scope = scope  # type: ignore[attr-defined]
            if template is not None:
                self.program.templates.add(name)
            scope.names.setdefault(name, []).append(function)
            return
        rest = [name, *self.until(";")]
        for part in _split_declarators(rest):
            if len(part) > 1 and part[1] == "=":
                run = Runner(self.program, scope)
                scope.names[part[0]] = run.initialised(kind, run.expression(Reader(self.program, part[2:]).whole()))
            elif struct is not None:
                struct.members.append(part[0])
                struct.types[part[0]] = kind

    # -- statements --

    def statements(self) -> list[Any]:
        out = []
        while self.peek():
            out.append(self.statement())
        return out

    def statement(self) -> Any:
        if self.peek() == "{":
            return ("block", Reader(self.program, self.inside()).statements())
        if self.accept(";"):
            return ("block", [])
        if self.accept("if"):
            if not self.accept("constexpr"):
                raise SyntaxError("an if that is not constexpr is a branch on data")
            condition = Reader(self.program, self.inside()).whole()
            then = self.statement()
            return ("if", condition, then, self.statement() if self.accept("else") else ("block", []))
        if self.accept("return"):
            return ("return", Reader(self.program, self.until(";")).whole(braces=True))
        if self.accept("using"):
            name = self.next()
            self.expect("=")
            return ("using", name, self.until(";"))
        if self.accept("static_assert"):
            self.until(";")
            return ("block", [])
        tokens = self.until(";")
        # `a = e`, `a.b = e`; else a declaration
        if len(tokens) > 1 and tokens[1] == "=":
            return ("assign", [tokens[0]], Reader(self.program, tokens[2:]).whole())
        if len(tokens) > 3 and tokens[1] == "." and tokens[3] == "=":
            return ("assign", [tokens[0], tokens[2]], Reader(self.program, tokens[4:]).whole())
        inner = Reader(self.program, tokens)
        while inner.peek() not in ("=", "", ","):
            if inner.peek() == "<":
                inner.angles()
            else:
                inner.next()
        kind = _plain(tokens[: inner.at - 1])
        if not kind:
            raise SyntaxError(f"{' '.join(tokens)} is no statement that is read")
        declared = []
        for part in _split_declarators(tokens[inner.at - 1 :]):
            value = Reader(self.program, part[2:]).whole() if len(part) > 1 else None
            declared.append((part[0], value))
        return ("declare", kind, declared)

    # -- expressions --

    def whole(self, braces: bool = False) -> Any:
        if braces and self.peek() == "{":
            parts = _split(self.inside(), ",")
            return ("braces", [Reader(self.program, part).whole() for part in parts])
        out = self.conditional()
        if self.peek():
            raise SyntaxError(f"{' '.join(self.tokens)} is no expression that is read")
        return out

    def conditional(self) -> Any:
        condition = self.binary(0)
        if not self.accept("?"):
            return condition
        then = self.conditional()
        self.expect(":")
        return ("?", condition, then, self.conditional())

    def binary(self, level: int) -> Any:
        if level == len(BINARY):
            return self.unary()
        left = self.binary(level + 1)
        while True:
            op = self.peek()
            if op == ">" and self.peek(1) == ">":
                op = ">>"
            if op not in BINARY[level]:
                return left
            self.at += 2 if op == ">>" else 1
            left = (op, left, self.binary(level + 1))

    def unary(self) -> Any:
        if self.peek() in ("-", "!", "~", "+"):
            return ("unary", self.next(), self.unary())
        return self.postfix()

    def postfix(self) -> Any:
        out = self.primary()
        while self.peek() in (".", "(", "{"):
            if self.accept("."):
                out = ("member", out, self.next())
            elif self.peek() == "(":
                parts = _split(self.inside(), ",")
                out = ("call", out, [Reader(self.program, part).whole() for part in parts])
            else:
                if self.inside():
                    raise SyntaxError("braces with values in them are not read here")
                out = ("zero", out)
        return out

    def primary(self) -> Any:
        token = self.next()
        if token == "(":
            self.at -= 1
            return Reader(self.program, self.inside()).whole()
        if token == "typename":
            return self.primary()
        if re.match(r"\d", token):
            return ("number", token)
        if not re.match(r"[A-Za-z_]", token):
            raise SyntaxError(f"{token} begins no expression that is read")
        path: list[tuple[str, list[list[str]] | None]] = [(token, self._template_arguments(token))]
        while self.accept("::"):
            name = self.next()
            path.append((name, self._template_arguments(name)))
        return ("path", path)

    def _template_arguments(self, name: str) -> list[list[str]] | None:
        return _arguments(self.angles()) if self.peek() == "<" and name in self.program.templates else None


def _arguments(tokens: list[str]) -> list[list[str]]:
    """Split at commas outside brackets of every kind."""
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        depth += {"<": 1, ">": -1, "(": 1, ")": -1}.get(token, 0)
        if token == "," and not depth:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts if parts != [[]] else []


def _split_declarators(tokens: list[str]) -> list[list[str]]:
    """`a = f<F, V>(x), b = 2` at the comma between the two."""
    parts: list[list[str]] = [[]]
    for i, token in enumerate(tokens):
        starts = i + 2 == len(tokens) or (i + 2 < len(tokens) and tokens[i + 2] in ("=", ","))
        if token == "," and starts and _balanced(parts[-1]):
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _balanced(tokens: list[str]) -> bool:
    return all(tokens.count(a) == tokens.count(b) for a, b in (("(", ")"), ("{", "}")))


# ---- running --------------------------------------------------------------------------------------------------------


class Runner:
    """Statements and expressions on terms."""

    def __init__(self, program: Program, scope: Scope) -> None:
        self.program, self.scope = program, scope

    def block(self, statements: list[Any]) -> Any:
        for statement in statements:
            done, value = self.run(statement)
            if done:
                return value
        raise SyntaxError("a function ends without a return")

    def run(self, statement: Any) -> tuple[bool, Any]:
        kind = statement[0]
        if kind == "return":
            value = statement[1]
            if value[0] == "braces":
                return True, [self.expression(v) for v in value[1]]
            return True, self.expression(value)
        if kind == "block":
            for inner in statement[1]:
                done, value = self.run(inner)
                if done:
                    return True, value
        elif kind == "if":
            condition = self.boolean(self.expression(statement[1]))
            if condition.op != "const":
                raise SyntaxError("the condition of an `if constexpr` is not known")
            return self.run(statement[2 if condition.parameters[0] else 3])
        elif kind == "using":
            self.scope.names[statement[1]] = self.type(statement[2])
        elif kind == "declare":
            for name, value in statement[2]:
                if value is not None:
                    self.scope.names[name] = self.initialised(statement[1], self.expression(value))
                else:
                    declared = self.type(statement[1])
                    self.scope.names[name] = Object(declared) if isinstance(declared, Struct) else declared
        else:
            self.assign(statement[1], self.expression(statement[2]))
        return False, None

    def assign(self, path: list[str], value: Any) -> None:
        if len(path) == 2:
            self.scope.find(path[0]).members[path[1]] = value
            return
        scope: Scope | None = self.scope
        while scope is not None and path[0] not in scope.names:
            scope = scope.outer
        if scope is None:
            raise SyntaxError(f"{path[0]} is not known")
        before = scope.names[path[0]]
        to = before if isinstance(before, Type) else before.type
        scope.names[path[0]] = Value(to, words.convert(value.term, value.type, to))

    def type(self, tokens: list[str]) -> Any:
        """A type from its tokens."""
        plain = _plain(tokens)
        reader = Reader(self.program, plain)
        tree = reader.primary()
        if tree[0] != "path":
            raise SyntaxError(f"{' '.join(tokens)} is no type that is read")
        found = self.path(tree[1])
        if reader.peek() or isinstance(found, (Value, Object, list)):
            raise SyntaxError(f"{' '.join(tokens)} is no type that is read")
        return found

    def template_argument(self, tokens: list[str]) -> Any:
        try:
            return self.type(tokens)
        except SyntaxError:
            return self.expression(Reader(self.program, tokens).whole())

    def initialised(self, kind: list[str], value: Any) -> Any:
        """``value`` converted to a declared type."""
        plain = _plain(kind)
        if plain in (["auto"], []) or isinstance(value, Object):
            return value
        to = self.type(plain)
        if isinstance(to, Struct):
            given = value if isinstance(value, list) else [value]
            run = Runner(self.program, to.scope)
            pairs = zip(to.members, given, strict=True)
            return Object(to, {name: run.initialised(to.types[name], v) for name, v in pairs})
        return Value(to, words.convert(value.term, value.type, to))

    def boolean(self, value: Value) -> Term:
        return words.convert(value.term, value.type, TYPES["bool"])

    def path(self, path: list[tuple[str, list[list[str]] | None]]) -> Any:
        """Resolve a name with its qualifiers and template arguments."""
        found: Any = None
        for i, (name, arguments) in enumerate(path):
            scope = self.scope if i == 0 else found.scope
            if i and not isinstance(found, Struct):
                raise SyntaxError(f"{path[0][0]} has no members")
            found = scope.find(name) if i == 0 else scope.names.get(name)
            if found is None:
                raise SyntaxError(f"{path[i - 1][0]} has no {name}")
            if isinstance(found, Template):
                given = tuple(self.template_argument(a) for a in arguments or ())
                found = self.program._instance(name, found, given)
        return found

    def expression(self, tree: Any) -> Any:
        kind = tree[0]
        if kind == "number":
            return _number(tree[1])
        if kind == "path":
            path = tree[1]
            if path[-1][0] in ("true", "false"):
                return Value(TYPES["bool"], terms.const(path[-1][0] == "true", terms.BOOL))
            found = self.path(path)
            if isinstance(found, Type):
                raise SyntaxError(f"{path[-1][0]} has no value yet")
            return found
        if kind == "zero":
            to = self.path(tree[1][1])
            return Value(to, words.literal(0, to))
        if kind == "member":
            return self.expression(tree[1]).members[tree[2]]
        if kind == "call":
            return self.called(tree[1], [self.expression(a) for a in tree[2]])
        if kind == "unary":
            return self.unary(tree[1], self.expression(tree[2]))
        if kind == "?":
            condition = self.boolean(self.expression(tree[1]))
            a, b = self.expression(tree[2]), self.expression(tree[3])
            to = a.type if a.type == b.type else _common(a.type, b.type)
            left, right = (words.convert(v.term, v.type, to) for v in (a, b))
            return Value(to, terms.ite(condition, left, right))
        return self.operated(kind, self.expression(tree[1]), self.expression(tree[2]))

    def called(self, callee: Any, arguments: list[Any]) -> Any:
        if callee[0] != "path":
            raise SyntaxError("only a name can be called")
        path = callee[1]
        template = [self.template_argument(a) for a in path[-1][1] or ()]
        found = self.path([*path[:-1], (path[-1][0], None)] if path[-1][1] and self._is_function(path) else path)
        if isinstance(found, Type):  # a cast
            (value,) = arguments
            return Value(found, words.convert(value.term, value.type, found))
        return self.program._call(found, arguments, template, path[-1][0])

    def _is_function(self, path: list[tuple[str, list[list[str]] | None]]) -> bool:
        return not isinstance(self.scope.find(path[0][0]), Template) or len(path) > 1

    def unary(self, op: str, value: Value) -> Value:
        if op == "!":
            return Value(TYPES["bool"], terms.not_(self.boolean(value)))
        to = _common(value.type, value.type)
        term = words.convert(value.term, value.type, to)
        if op == "~":
            return Value(to, terms.xor(term, terms.const(-1, to.sort)))
        return Value(to, words.negative(term, to) if op == "-" else term)

    def operated(self, op: str, a: Value, b: Value) -> Value:
        if op in ("&&", "||"):
            join = terms.and_ if op == "&&" else terms.or_
            return Value(TYPES["bool"], join(self.boolean(a), self.boolean(b)))
        if op in ("&", "|") and a.type == b.type == TYPES["bool"]:  # of two masks, as of two lanes of a vector
            return Value(a.type, words.arithmetic(op, a.term, b.term, a.type))
        if op in ("<<", ">>"):
            to = _common(a.type, a.type)
            left = words.convert(a.term, a.type, to)
            right = words.convert(b.term, b.type, to)
        else:
            to = _common(a.type, b.type)
            left, right = (words.convert(v.term, v.type, to) for v in (a, b))
        result = words.arithmetic(op, left, right, to)
        return Value(TYPES["bool"] if result.sort == terms.BOOL else to, result)


def _common(a: Type, b: Type) -> Type:
    """Return the common type of two operands: float over integers, else the wider integer, unsigned where they tie."""
    if "float" in (a.kind, b.kind):
        return max((t for t in (a, b) if t.kind == "float"), key=lambda t: t.bits)
    promoted = [TYPES["int32"] if t.bits < 32 else t for t in (a, b)]
    return max(promoted, key=lambda t: (t.bits, t.kind == "unsigned"))


def _number(token: str) -> Value:
    if re.fullmatch(r"(0x[0-9a-fA-F]+|\d+)u?", token):
        number = int(token.rstrip("u"), 0)
        unsigned = token.endswith("u") or (token.startswith("0x") and number >= 1 << 31)
        type = TYPES["uint32" if unsigned else "int32"]
        return Value(type, words.literal(number, type))
    if not token.endswith("f"):
        raise SyntaxError(f"{token} is a double")
    (number32,) = struct.unpack("<f", struct.pack("<f", float(token[:-1])))
    return Value(TYPES["float32"], words.literal(number32, TYPES["float32"]))
