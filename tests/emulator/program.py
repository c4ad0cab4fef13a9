"""PTX as text into blocks of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    """`@guard name operands`; the guard is a predicate's name, "!" in front if negated, or None."""

    name: str
    operands: tuple[str, ...]
    guard: str | None
    line: int

    @property
    def parts(self) -> list[str]:
        """The name's parts: ["ld", "global", "v4", "b32"]."""
        return self.name.split(".")


@dataclass
class Program:
    """A kernel: its parameters (name, bytes), registers (name, kind), and blocks, in order; `labels` name blocks."""

    name: str = ""
    parameters: list[tuple[str, int]] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    blocks: list[list[Instruction]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


_KINDS = {
    "pred": "p",
    "b8": "8",
    "s8": "8",
    "u8": "8",
    "b16": "16",
    "f16": "16",
    "b32": "32",
    "f32": "32",
    "b64": "64",
    "f64": "64",
}
_PARAMETER = re.compile(r"\.param \.[a-z](\d+).*?(\w+),?$")
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+(%?\w+)(?:<(\d+)>)?$")


def parse(text: str) -> Program:
    """The kernel of a PTX file with one `.entry`. ValueError names a line that is not understood."""
    program = Program(blocks=[[]])
    scopes: list[dict[str, str]] = []
    depth = body = 0
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.split("//")[0].strip()
        if not body:
            if found := re.match(r"\.visible \.entry (\w+)\(", line):
                program.name = found[1]
            elif program.name and (found := _PARAMETER.match(line)):
                program.parameters.append((found[2], int(found[1]) // 8))
            elif program.name and line.startswith("{"):
                body = number
            continue
        for statement in re.split(r";|(?=[{}]\s*$)|(?<=^[{}])", line):
            statement = statement.strip()
            if not statement or statement.startswith((".loc", ".pragma", ".maxn")):
                continue
            if statement == "{":
                depth += 1
                scopes.append({})
            elif statement == "}":
                if not depth:
                    return program
                depth -= 1
                scopes.pop()
            elif statement.endswith(":"):
                program.blocks.append([])
                program.labels[statement[:-1]] = len(program.blocks) - 1
            elif found := _REGISTERS.match(statement):
                kind, name = _KINDS[found[1]], found[2].lstrip("%")
                names = [name] if found[3] is None else [f"{name}{i}" for i in range(int(found[3]))]
                for each in names:
                    full = each if not scopes else f"scoped{number}_{each}"
                    program.registers[full] = kind
                    if scopes:
                        scopes[-1][each] = full
            else:
                instruction = _instruction(statement, number, scopes)
                program.blocks[-1].append(instruction)
                if instruction.parts[0] in ("bra", "ret"):
                    program.blocks.append([])
    raise ValueError("the text ends inside of a kernel")


def _instruction(statement: str, number: int, scopes: list[dict[str, str]]) -> Instruction:
    found = re.match(r"(?:@(!?)%?(\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", statement, re.DOTALL)
    if not found:
        raise ValueError(f"line {number}: {statement!r} is not an instruction")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+", found[4])
    if scopes:
        for scope in scopes:
            operands = [re.sub(r"(?<![%\w])[a-z]\w*", lambda m, s=scope: s.get(m[0], m[0]), x) for x in operands]
    guard = None if found[2] is None else found[1] + found[2]
    return Instruction(found[3], tuple(operands), guard, number)
