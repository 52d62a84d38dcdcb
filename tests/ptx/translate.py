"""Translates PTX to C++ that runs in the emulated threads of ``tests/cuda_emulation``: one statement per instruction.

Registers keep their names, with ``$`` for ``%``, and their declared sizes. An instruction reads them as its types say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from .opcodes import (
    ATOMICS,
    CACHES,
    CONVERSIONS,
    CPP,
    FENCES,
    KINDS,
    OPERATIONS,
    ORDERS,
    SPACES,
    SPECIAL_REGISTERS,
    VECTORS,
)
from .parse import Brace, Function, Instruction, Label, Module, Parameter, Register, Statement, Unknown

#: Alignment of shared memory whose size is set by the launch, within the shared memory of a block.
ALIGNMENT = 16


def translate(module: Module, entries: Iterable[str], names: Mapping[str, str] | None = None) -> str:
    """Returns a C++ file with these kernels and all functions that they call.

    Args:
        names: names of kernels in C++, if they differ.
    """
    layout, size = {}, 0
    for name, own in sorted(module.shared.items(), key=lambda item: item[1] is None):  # the launch's comes last
        layout[name] = size
        size += (-(-(own or 0) // ALIGNMENT)) * ALIGNMENT
    wanted = reachable(module, entries)
    functions = [Translator(module.functions[name], layout, module.zeros) for name in wanted]
    lines = ['#include "ptx.h"']
    # Several files with kernels of one module share its variables.
    weak = 'extern "C" __attribute__((weak)) alignas(8) char'
    lines += [f"{weak} {name}[{own}] = {{}};" for name, own in module.zeros.items()]
    lines += ["namespace {", f"const unsigned kShared = {size};"]
    lines += [f"{f.signature()};" for f in functions]
    for f in functions:
        lines += [f"{f.signature()} {{", *f.lines(), "}"]
    known = {name: (names or {}).get(name, name) for name in wanted if module.functions[name].is_entry}
    lines += [f'const ptx::Kernel of_{name}("{own}", {name}, kShared);' for name, own in known.items()]
    return "\n".join([*lines, "}  // namespace", ""])


def reachable(module: Module, entries: Iterable[str]) -> list[str]:
    found: dict[str, None] = {}
    left = list(entries)
    while left:
        name = left.pop()
        if name not in found:
            found[name] = None
            left += module.functions[name].calls()
    return list(found)


class Translator:
    """Translates one function.

    Args:
        shared: offset of each variable in the block's shared memory.
        variables: names of the device's variables.
    """

    def __init__(self, function: Function, shared: dict[str, int], variables: Iterable[str]) -> None:
        self.function, self.shared, self.variables = function, shared, {*variables}
        self.registers: dict[str, str] = {}  # types, by name or by the part before the number
        self.parameters = {*function.parameters, *([function.result] if function.result else [])}

    def signature(self) -> str:
        own = [self.function.result] if self.function.result else []
        if self.function.is_entry:
            return f"void {self.function.name}(char* shared, unsigned shared_size, char* const* arguments)"
        arguments = [f", char* {name}" for name in own + list(self.function.parameters)]
        return f"void {self.function.name}(char* shared, unsigned shared_size{''.join(arguments)})"

    def lines(self) -> list[str]:
        found = []
        if self.function.is_entry:
            found += [f"char* const {name} = arguments[{i}];" for i, name in enumerate(self.function.parameters)]
        return found + [self.statement(s) for s in self.function.body]

    def statement(self, s: Statement) -> str:
        match s:
            case Brace(text):
                return text
            case Label(name):
                return f"{name}:;"
            case Parameter(name, size):
                self.parameters.add(name)
                return f"alignas(8) char {name}[{size}];"
            case Register(kind, name, count):
                self.registers[name] = kind
                names = [f"{name}{i}" for i in range(count)] if count else [name]
                return f"{CPP[kind]} {', '.join(n.replace('%', '$') for n in names)};"
            case Instruction():
                return self.guarded(s)

    def guarded(self, s: Instruction) -> str:
        code = self.instruction(s)
        if not s.guard:
            return code
        return f"if ({s.guard.replace('%', '$')}) {code}"

    def instruction(self, s: Instruction) -> str:
        if handler := HANDLERS.get(s.parts[0]):
            return handler(self, s)
        if s.name in FENCES and not s.types:
            return ";"
        if s.parts[0] == "cvt":
            return self.convert(s)
        return self.operation(s)

    # ---- arithmetic ----

    def operation(self, s: Instruction) -> str:
        row = OPERATIONS.get(s.name)
        if row is None or len(s.types) != 1 or KINDS[s.types[0][0]] not in row.kinds or s.types[0] not in CPP:
            raise Unknown(s.text)
        result, *operands = s.operands
        columns = row.operands.split()
        if len(operands) != len(columns):
            raise Unknown(s.text)
        values = [self.column(s, c, o) for c, o in zip(columns, operands, strict=True)]
        return self.write(result.split("|")[0], of_type(row.result, s.types[0]), row.code.format(*values))

    def column(self, s: Instruction, column: str, operand: str) -> str:
        """Returns an operand with the type of its column."""
        if column == "all":
            if operand not in ("31", "0x1f"):
                raise Unknown(s.text)
            return ""
        if column == "unread":
            return ""
        return self.read(operand, of_type(column, s.types[0]))

    def convert(self, s: Instruction) -> str:
        if len(s.types) != 2:
            raise Unknown(s.text)
        to, source = s.types
        code = CONVERSIONS.get((s.name, to, source))
        if code is None and s.name == "cvt" and "f" not in to + source:
            code = "{0}"
        if code is None:
            raise Unknown(s.text)
        return self.write(s.operands[0], to, code.format(*(self.read(o, source) for o in s.operands[1:])))

    # ---- registers ----

    def declared(self, register: str) -> str:
        """Returns the declared type of a register."""
        for name in (register, register.rstrip("0123456789")):
            if name in self.registers:
                return self.registers[name]
        raise Unknown(register)

    def read(self, operand: str, kind: str) -> str:
        """Returns an operand as a value of that type."""
        cpp = CPP[kind]
        if operand in SPECIAL_REGISTERS:
            return SPECIAL_REGISTERS[operand]
        if operand.startswith("%"):
            own, name = self.declared(operand), operand.replace("%", "$")
            if CPP[own] == cpp:
                return name
            if "f" in (own + kind) or "pred" in (own, kind):
                if bits(own) != bits(kind) or "pred" in (own, kind):
                    raise Unknown(f"{operand}, declared as {own}, read as {kind}")
                return f"__builtin_bit_cast({cpp}, {name})"
            return f"(({cpp}){name})"
        if operand in self.shared:
            return f"(({cpp}){self.shared[operand]})"
        if operand in {*self.parameters, *self.variables}:
            return f"(({cpp}){operand})"
        if m := re.fullmatch(r"0([fd])([0-9A-Fa-f]+)", operand):
            whole, real = ("uint32_t", "float") if m[1] == "f" else ("uint64_t", "double")
            literal = f"{whole}{{0x{m[2]}u}}"
            # A number may be written for its bits.
            return f"__builtin_bit_cast({real}, {literal})" if cpp == real else f"(({cpp}){literal})"
        if re.fullmatch(r"-?(?:0x[0-9A-Fa-f]+|\d+)", operand):
            return f"(({cpp}){operand}ll)" if "-" in operand else f"(({cpp}){operand}ull)"
        raise Unknown(operand)

    def write(self, register: str, kind: str, code: str) -> str:
        """Returns code that writes a value of that type into a register. Shorter integers are sign-extended."""
        if register == "_":
            return f"(void)({code});"
        own, name, cpp = self.declared(register), register.replace("%", "$"), CPP[kind]
        if CPP[own] == cpp:
            return f"{name} = {code};"
        if "f" in own + kind or "pred" in (own, kind):
            if bits(own) != bits(kind) or "pred" in (own, kind):
                raise Unknown(f"{register}, declared as {own}, written as {kind}")
            return f"{name} = __builtin_bit_cast({CPP[own]}, {cpp}({code}));"
        return f"{name} = ({cpp})({code});"

    # ---- moves ----

    def move(self, s: Instruction) -> str:
        if s.parts != ("mov",) or len(s.types) != 1:
            raise Unknown(s.text)
        kind, (to, source) = s.types[0], s.operands
        if to.startswith("{"):  # unpacked
            names = vector(to)
            part = f"b{bits(kind) // len(names)}"
            own = [self.write(n, part, f"(whole >> {i * bits(part)})") for i, n in enumerate(names)]
            return f"{{ const {CPP[f'b{bits(kind)}']} whole = {self.read(source, f'b{bits(kind)}')}; {' '.join(own)} }}"
        if source.startswith("{"):  # packed
            names, cpp = vector(source), CPP[kind]
            part = f"b{bits(kind) // len(names)}"
            values = [f"{cpp}{{{self.read(n, part)}}} << {i * bits(part)}" for i, n in enumerate(names)]
            return self.write(to, kind, " | ".join(values))
        return self.write(to, kind, self.read(source, kind))

    def convert_address(self, s: Instruction) -> str:
        """Converts between generic addresses and those of a space; they differ only for shared memory."""
        is_to, spaces = "to" in s.parts, [p for p in s.parts[1:] if p != "to"]
        if len(spaces) != 1 or spaces[0] not in SPACES or s.types != ("u64",):
            raise Unknown(s.text)
        value = self.read(s.operands[1], "u64")
        if spaces[0] == "shared":
            value += f" {'-' if is_to else '+'} (uint64_t)shared"
        return self.write(s.operands[0], "u64", value)

    # ---- memory ----

    def access(self, s: Instruction, allowed: Sequence[str]) -> tuple[str, int]:
        """Returns the space of an access, and the number of elements that it accesses."""
        spaces = [p for p in s.parts[1:] if p in SPACES]
        counts = [VECTORS[p] for p in s.parts[1:] if p in VECTORS]
        if len(spaces) > 1 or len(counts) > 1 or len(s.types) != 1:
            raise Unknown(s.text)
        if set(s.parts[1:]) - {*SPACES, *VECTORS, *allowed}:
            raise Unknown(s.text)
        return spaces[0] if spaces else "", counts[0] if counts else 1

    def address(self, s: Instruction, operand: str, space: str, size: int) -> str:
        """Declares ``at``, which must be a multiple of the size."""
        m = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if m is None:
            raise Unknown(s.text)
        base, offset = m[1], m[2] or "0"
        is_shared = space == "shared" or base in self.shared
        value = self.read(base, "u32" if is_shared and not self.is_wide(base) else "u64")
        macro = "SHARED" if is_shared else "AT"
        return f'{macro}({value} + {offset}, {size}, "{s.text}")'

    def is_wide(self, operand: str) -> bool:
        return operand.startswith("%") and bits(self.declared(operand)) == 64

    def load(self, s: Instruction) -> str:
        space, count = self.access(s, (*CACHES, *ORDERS))
        kind, names = s.types[0], vector(s.operands[0])
        if len(names) != count:
            raise Unknown(s.text)
        size = bits(kind) // 8
        own = [self.write(n, kind, f"*({CPP[kind]}*)(at + {i * size})") for i, n in enumerate(names)]
        return f"{{ {self.address(s, s.operands[1], space, size * count)} {' '.join(own)} }}"

    def store(self, s: Instruction) -> str:
        space, count = self.access(s, (*CACHES, *ORDERS))
        kind, names = s.types[0], vector(s.operands[1])
        if len(names) != count:
            raise Unknown(s.text)
        size = bits(kind) // 8
        own = [f"*({CPP[kind]}*)(at + {i * size}) = {self.read(n, kind)};" for i, n in enumerate(names)]
        return f"{{ {self.address(s, s.operands[0], space, size * count)} {' '.join(own)} }}"

    def atomic(self, s: Instruction) -> str:
        """Threads switch only at barriers, so the operation is not interrupted."""
        space, count = self.access(s, (*ATOMICS, *ORDERS))
        kind, operations = s.types[0], [p for p in s.parts if p in ATOMICS]
        if len(operations) != 1 or count != 1 or KINDS[kind[0]] != "i":
            raise Unknown(s.text)
        address = self.address(s, s.operands[1], space, bits(kind) // 8)
        cpp, value = CPP[kind], self.read(s.operands[2], kind)
        own = self.write(s.operands[0], kind, "before")
        after = ATOMICS[operations[0]].format(value)
        return f"{{ {address} const {cpp} before = *({cpp}*)at; *({cpp}*)at = {after}; {own} }}"

    # ---- control flow ----

    def branch(self, s: Instruction) -> str:
        if s.name not in ("bra", "bra.uni"):
            raise Unknown(s.text)
        return f"goto {s.operands[0]};"

    def leave(self, s: Instruction) -> str:
        return "return;"

    def call(self, s: Instruction) -> str:
        groups = [o for o in s.operands if o.startswith("(")]
        name = next(o for o in s.operands if not o.startswith("("))
        arguments = [a.strip() for group in groups for a in group.strip("()").split(",") if a.strip()]
        return f"{name}({', '.join(['shared', 'shared_size', *arguments])});"

    def barrier(self, s: Instruction) -> str:
        if s.name not in ("bar.sync", "barrier.sync") or s.operands != ("0",):
            raise Unknown(s.text)
        return "ptx::barrier();"


HANDLERS: dict[str, Callable[[Translator, Instruction], str]] = {
    "mov": Translator.move,
    "cvta": Translator.convert_address,
    "ld": Translator.load,
    "st": Translator.store,
    "atom": Translator.atomic,
    "bra": Translator.branch,
    "ret": Translator.leave,
    "call": Translator.call,
    "bar": Translator.barrier,
    "barrier": Translator.barrier,
}


def bits(kind: str) -> int:
    return {"f16x2": 32, "pred": 1}.get(kind) or int(kind[1:])


def of_type(column: str, kind: str) -> str:
    """Returns the type for a column of a row."""
    if column == "w":
        return f"{kind[0]}{2 * bits(kind)}"
    return kind if column == "t" else column


def vector(operand: str) -> list[str]:
    return [n.strip() for n in operand.strip("{} ").split(",")]
