"""Parses PTX text into functions of instructions: the grammar that nvcc and Triton use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

#: Types of PTX, as the last parts of an opcode.
TYPES = {f"{kind}{bits}" for kind in "usb" for bits in (8, 16, 32, 64)} | {"f16", "f16x2", "f32", "f64", "pred"}


@dataclass(frozen=True)
class Instruction:
    """``guard``: the predicate of the instruction, with "!" in front if it is negated; "" if there is none."""

    text: str
    guard: str
    parts: tuple[str, ...]
    types: tuple[str, ...]
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        """The opcode without its types."""
        return ".".join(self.parts)


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Register:
    """A declaration: ``%r<20>`` declares ``%r0`` to ``%r19``; 0: a single register."""

    type: str
    name: str
    count: int


@dataclass(frozen=True)
class Parameter:
    """Memory of an argument or result of a function call."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Brace:
    """The token "{" or "}": names declared between them are not visible outside."""

    text: str


Statement = Instruction | Label | Register | Parameter | Brace


@dataclass(frozen=True)
class Function:
    """``result``: name of the result's memory; "" if there is none."""

    name: str
    is_entry: bool
    result: str
    parameters: tuple[str, ...]
    body: tuple[Statement, ...]

    def calls(self) -> Iterator[str]:
        """Yields the functions that are called."""
        for s in self.body:
            if isinstance(s, Instruction) and s.parts[0] == "call":
                yield next(o for o in s.operands if not o.startswith("("))


@dataclass
class Module:
    """``shared``: bytes of each variable in shared memory; None: the launch sets the size.

    ``zeros``: bytes of each device variable that is initialized with zeros.
    """

    functions: dict[str, Function] = field(default_factory=dict)
    shared: dict[str, int | None] = field(default_factory=dict)
    zeros: dict[str, int] = field(default_factory=dict)


class Unknown(Exception):
    """Raised for PTX that this parser does not know. Nothing is skipped."""


NOISE = re.compile(r"//[^\n]*|/\*.*?\*/|^\s*\.(?:loc|file|pragma)\b[^\n]*$", re.MULTILINE | re.DOTALL)
HEADER = re.compile(
    r"^(?:\.(?:visible|weak) )?\.(?P<kind>func|entry)\s*(?:\(\s*\.param \.[bus]\d+ (?P<result>\w+)\s*\))?\s*"
    r"(?P<name>\w+)\s*\((?P<parameters>[^)]*)\)(?P<directives>[^{;]*)\{(?P<body>.*?)^\}",
    re.MULTILINE | re.DOTALL,
)
SHARED = re.compile(r"\.shared \.align \d+ \.[bus](?P<bits>\d+) (?P<name>\w+)(?P<length>\[\d*\])?;")
ZEROS = re.compile(r"^\.global \.align \d+ \.[bus](?P<bits>\d+) (?P<name>\w+);", re.MULTILINE)
STATEMENT = re.compile(r"\s*(?:(?P<label>[$\w]+):(?!:)|(?P<brace>[{}])|(?P<text>[^;{}]*(?:\{[^{};]*\}[^;{}]*)*);)")
DECLARATION = re.compile(r"\.(?P<space>reg|param) \.(?P<type>\w+)\s+(?P<name>%?\w+)(?:<(?P<count>\d+)>)?")
OPCODE = re.compile(r"(?:@(?P<guard>!?%\w+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)", re.DOTALL)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,\s(]+")


def parse(text: str) -> Module:
    text = NOISE.sub("", text)
    module = Module()
    for m in SHARED.finditer(text):
        elements = (m["length"] or "[1]").strip("[]")
        module.shared[m["name"]] = int(elements) * int(m["bits"]) // 8 if elements else None
    module.zeros = {m["name"]: int(m["bits"]) // 8 for m in ZEROS.finditer(text)}
    for m in HEADER.finditer(text):
        names = re.findall(r"(\w+)(?:\[\d+\])?\s*(?:,|$)", m["parameters"].strip())
        body = tuple(statements(SHARED.sub("", m["body"])))
        module.functions[m["name"]] = Function(m["name"], m["kind"] == "entry", m["result"] or "", tuple(names), body)
    if text.count(".entry") != sum(f.is_entry for f in module.functions.values()):
        raise Unknown("an entry without a body that can be read")
    return module


def statements(body: str) -> Iterator[Statement]:
    body, at = body.strip(), 0
    while at < len(body):
        m = STATEMENT.match(body, at)
        if m is None:
            raise Unknown(body[at : at + 80].strip())
        at = m.end()
        if m["label"]:
            yield Label(m["label"])
        elif m["brace"]:
            yield Brace(m["brace"])
        elif declaration := DECLARATION.fullmatch(m["text"].strip()):
            kind, name = declaration["type"], declaration["name"]
            if kind not in TYPES:
                raise Unknown(m["text"].strip())
            if declaration["space"] == "param":
                yield Parameter(name, int(kind[1:]) // 8)
            else:
                yield Register(kind, name, int(declaration["count"] or 0))
        else:
            yield instruction(" ".join(m["text"].split()))


def instruction(text: str) -> Instruction:
    m = OPCODE.fullmatch(text)
    if m is None:
        raise Unknown(text)
    parts = m["opcode"].split(".")
    n = len(parts)
    while n > 1 and parts[n - 1] in TYPES:
        n -= 1
    operands = tuple(o.strip() for o in OPERAND.findall(m["operands"]))
    return Instruction(text, m["guard"] or "", tuple(parts[:n]), tuple(parts[n:]), operands)
