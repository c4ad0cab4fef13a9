"""A block of instructions as a Python function over arrays with one element a thread, or one for all of them.

Registers are globals of the function, unsigned arrays (predicates bool); types are views. Each block is made twice: for
all threads, and for some of them (`M`), which the others' registers outlast.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .program import Instruction, Program

VIEWS = {
    **{f"s{n}": f"i{n // 8}" for n in (8, 16, 32, 64)},
    **{f"u{n}": f"u{n // 8}" for n in (8, 16, 32, 64)},
    **{f"b{n}": f"u{n // 8}" for n in (8, 16, 32, 64)},
    **{f"f{n}": f"f{n // 8}" for n in (16, 32, 64)},
}
_SMALL = ("bf16", "f16")
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_NOT = {"eq": "ne", "ne": "eq", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}
_INFIX = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}


class Translator:
    """Turns the blocks of a program into source; names of constants end up in `constants`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.constants: dict[str, Any] = {}
        self.symbols = {"global_smem": 0}

    def function(self, block: int, masked: bool) -> str:
        """Source of `def f(M)`, which returns the next block, None at the end, or what `branch` found."""
        self.lines: list[str] = []
        self.written: set[str] = set()
        self.masked = masked
        end = f"return {block + 1}"
        for instruction in self.program.blocks[block]:
            name = instruction.parts[0]
            if name == "bra":
                target = self.program.labels[instruction.operands[-1]]
                end = f"return {target}"
                if instruction.guard is not None:
                    end = f"return branch({self._guard(instruction.guard)}, {target}, {block + 1})"
            elif name == "ret":
                end = "return None"
                if instruction.guard is not None:
                    end = f"return branch({self._guard(instruction.guard)}, None, {block + 1})"
            else:
                self._instruction(instruction)
        names = ", ".join(sorted(self.written))
        head = [f"global {names}"] if names else []
        return "def f(M):\n" + "".join(f"    {line}\n" for line in [*head, *self.lines, end])

    # -- operands ------------------------------------------------------------------------------------------------------

    def _guard(self, guard: str) -> str:
        return f"~{guard[1:]}" if guard.startswith("!") else guard

    def _mask(self, instruction: Instruction) -> str:
        """What limits an instruction to some threads, as an expression, "" if nothing does."""
        parts = (["M"] if self.masked else []) + ([self._guard(instruction.guard)] if instruction.guard else [])
        return "(" + " & ".join(parts) + ")" if parts else ""

    def _kind(self, name: str) -> str | None:
        return self.program.registers.get(name.lstrip("%"))

    def read(self, operand: str, type_: str) -> str:
        """An operand as a value of a type."""
        view = VIEWS.get(type_, "")
        kind = self._kind(operand)
        if kind is not None:
            name = operand.lstrip("%")
            if kind == "p":
                return name
            width = int(re.sub(r"\D", "", type_) or kind) if view else int(kind)
            if view and width < int(kind):
                name = f"{name}.astype('u{width // 8}')"
            return f"{name}.view('{view}')" if view and view[0] != "u" else name
        if operand.startswith("%"):
            return {"%laneid": "laneid"}.get(operand, operand[1:].replace(".", "_"))
        return self._constant(operand, type_)

    def _constant(self, text: str, type_: str) -> str:
        if type_ == "pred":
            return "TRUE" if int(text, 0) else "FALSE"
        bits = int(re.sub(r"\D", "", type_.split("x")[0]))
        if text in self.symbols:
            value = self.symbols[text]
        elif text.startswith(("0f", "0F", "0d", "0D")):
            value = int(text[2:], 16)
        elif "." in text:
            value = int(np.array(float(text), f"f{bits // 8}").view(f"u{bits // 8}"))
        else:
            value = int(text.rstrip("U"), 0)
        value &= (1 << bits) - 1
        name = f"c{bits}_{value:x}"
        self.constants[name] = np.array([value], f"u{bits // 8}")
        view = VIEWS.get(type_, "u")
        return f"{name}.view('{view}')" if view[0] != "u" else name

    def address(self, operand: str, space: str) -> str:
        """`[register + offset]` as an array of addresses."""
        found = re.fullmatch(r"\[\s*(%?\w+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not found:
            raise NotImplementedError(f"address {operand}")
        base, offset = found[1], int(found[2] or 0)
        bits = 64 if space == "global" else 32
        base = self._constant(base, f"u{bits}") if base in self.symbols else base.lstrip("%")
        return f"({base} + {self._constant(str(offset), f'u{bits}')})" if offset else base

    def write(self, operand: str, value: str, instruction: Instruction) -> None:
        """Assigns to a register, in the threads that take part."""
        if operand == "_":
            return
        name = operand.lstrip("%")
        self.written.add(name)
        mask = self._mask(instruction)
        self.lines.append(f"{name} = where({mask}, {value}, {name})" if mask else f"{name} = {value}")

    @staticmethod
    def _list(operand: str) -> list[str]:
        return [x.strip() for x in operand.strip("{}").split(",")]

    # -- instructions --------------------------------------------------------------------------------------------------

    def _instruction(self, instruction: Instruction) -> None:
        parts = instruction.parts
        for prefix, method in _METHODS:
            if instruction.name.startswith(prefix):
                method(self, instruction, parts)
                return
        raise NotImplementedError(f"line {instruction.line}: {instruction.name}")

    def _to_register(self, value: str, type_: str) -> str:
        """A value of a type as a register holds it."""
        view = VIEWS[type_]
        return value if view[0] == "u" else f"({value}).view('u{view[1:]}')"

    def _arithmetic(self, instruction: Instruction, parts: list[str]) -> None:
        operation, type_ = parts[0], parts[-1]
        d, *sources = instruction.operands
        if type_ in _SMALL:
            function = "np.negative" if operation == "neg" else f"lambda a, b: a {_INFIX[operation]} b"
            self.write(d, self._small(function, type_, sources), instruction)
            return
        if type_ == "pred":
            a = [self.read(x, "pred") for x in sources]
            value = f"~{a[0]}" if operation == "not" else f"({a[0]} {_INFIX[operation]} {a[1]})"
            self.write(d, value, instruction)
            return
        if type_ in ("f32x2", "f16x2", "bf16x2"):
            function = "np.negative" if operation == "neg" else f"lambda a, b: a {_INFIX[operation]} b"
            value = f"packed({function}, '{type_}', {self._join(sources, type_)})"
            self.write(d, value, instruction)
            return
        a = [self.read(x, type_) for x in sources]
        if operation == "shl":
            value = f"shift_left({a[0]}, {self.read(sources[1], 'u32')})"
        elif operation == "shr":
            value = self._to_register(f"shift_right({a[0]}, {self.read(sources[1], 'u32')})", type_)
        elif operation == "not":
            value = f"~{a[0]}"
        elif operation == "neg":
            value = self._to_register(f"-{a[0]}", type_)
        elif "wide" in parts:
            wide = f"{type_[0]}{2 * int(type_[1:])}"
            view = VIEWS[wide]
            value = f"{a[0]}.astype('{view}') * {a[1]}.astype('{view}')"
            if operation == "mad":
                value += f" + {self.read(sources[2], wide)}"
            value = self._to_register(f"({value})", wide)
        elif "hi" in parts:
            value = f"multiply_high({a[0]}, {a[1]})"
        elif operation == "mad":
            u = [self.read(x, "b" + type_[1:]) for x in sources]
            value = f"{u[0]} * {u[1]} + {u[2]}"
        elif type_[0] == "f":
            value = self._to_register(f"({a[0]} {_INFIX[operation]} {a[1]})", type_)
        else:
            u = [self.read(x, "b" + type_[1:]) for x in sources]
            value = f"({u[0]} {_INFIX[operation]} {u[1]})"
        self.write(d, value, instruction)

    def _small(self, function: str, type_: str, sources: list[str]) -> str:
        """An operation on 16-bit floats, taken in float32."""
        numbers = ", ".join(f"from_{type_}({self.read(x, 'b16')})" for x in sources)
        return f"to_{type_}(({function})({numbers}))"

    def _join(self, sources: list[str], type_: str) -> str:
        return ", ".join(self.read(x, "b64" if type_ == "f32x2" else "b32") for x in sources)

    def _fma(self, instruction: Instruction, parts: list[str]) -> None:
        d, *sources = instruction.operands
        if parts[-1] in ("f32x2", "f16x2", "bf16x2"):
            self.write(d, f"packed(fma, '{parts[-1]}', {self._join(sources, parts[-1])})", instruction)
            return
        if parts[-1] in _SMALL:
            self.write(d, self._small("fma", parts[-1], sources), instruction)
            return
        if parts[-1] != "f32":
            raise NotImplementedError(f"line {instruction.line}: {instruction.name}")
        a = ", ".join(self.read(x, parts[-1]) for x in sources)
        self.write(d, self._to_register(f"fma({a})", parts[-1]), instruction)

    def _division(self, instruction: Instruction, parts: list[str]) -> None:
        d, a, b = instruction.operands
        a, b = self.read(a, parts[-1]), self.read(b, parts[-1])
        value = (
            f"({a} / {b})" if parts[-1][0] == "f" else f"{'remainder' if parts[0] == 'rem' else 'quotient'}({a}, {b})"
        )
        self.write(d, self._to_register(value, parts[-1]), instruction)

    def _unary(self, instruction: Instruction, parts: list[str]) -> None:
        d, a = instruction.operands
        type_ = parts[-1]
        if type_ in ("f16x2", "bf16x2"):
            self.write(d, f"({self.read(a, 'b32')} & {self._constant('0x7fff7fff', 'b32')})", instruction)
            return
        function = {"abs": "np.abs", "ex2": "np.exp2", "lg2": "np.log2", "sqrt": "np.sqrt", "popc": "np.bitwise_count"}
        functions = function | {"rcp": "np.reciprocal", "rsqrt": "reciprocal_root"}
        if type_ in _SMALL:
            self.write(d, self._small(functions[parts[0]], type_, [a]), instruction)
            return
        value = f"{functions[parts[0]]}({self.read(a, type_)})"
        if parts[0] == "popc":
            value, type_ = f"{value}.astype('u4')", "u32"
        self.write(d, self._to_register(value, type_), instruction)

    def _extreme(self, instruction: Instruction, parts: list[str]) -> None:
        d, a, b = instruction.operands
        type_ = parts[-1]
        function = f"{parts[0]}imum" if "NaN" in parts or type_[0] in "su" else f"f{parts[0]}"
        if type_ in ("f16x2", "bf16x2"):
            self.write(d, f"packed(np.{function}, '{type_}', {self._join([a, b], type_)})", instruction)
            return
        if type_ in _SMALL:
            self.write(d, self._small(f"np.{function}", type_, [a, b]), instruction)
            return
        a, b = self.read(a, type_), self.read(b, type_)
        value = f"np.{function}({a}, {b})"
        if "relu" in parts:
            value = f"np.maximum({value}, 0)"
        self.write(d, self._to_register(value, type_), instruction)

    def _compare(self, instruction: Instruction, parts: list[str]) -> None:
        d, *sources = instruction.operands
        if len(sources) != 2 or ("|" in d) != (parts[-1][-2:] == "x2"):
            raise NotImplementedError(f"line {instruction.line}: {instruction.name} {instruction.operands}")
        how, type_ = parts[1], parts[-1]
        if type_ in ("f16x2", "bf16x2"):
            halves = [f"unpack({self.read(x, 'b32')}, 2, 'u2')" for x in sources]
            for i, name in enumerate(d.split("|")):
                a, b = (f"from_{type_[:-2]}({half}[{i}])" for half in halves)
                self.write(name, self._comparison(how, type_, a, b), instruction)
            return
        if type_ in ("bf16", "f16"):
            to = "from_bf16" if type_ == "bf16" else "from_f16"
            a, b = (f"{to}({self.read(x, 'b16')})" for x in sources)
        else:
            a, b = (self.read(x, type_) for x in sources)
        self.write(d, self._comparison(how, type_, a, b), instruction)

    @staticmethod
    def _comparison(how: str, type_: str, a: str, b: str) -> str:
        if how in ("num", "nan"):
            value = f"(np.isnan({a}) | np.isnan({b}))"
            return f"~{value}" if how == "num" else value
        if how in ("lo", "ls", "hi", "hs"):
            how = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}[how]
        if how == "neu" or (how == "ne" and "f" not in type_):
            return f"({a} != {b})"
        if how == "ne":  # ordered: false for NaN
            return f"(({a} < {b}) | ({a} > {b}))"
        if how in _COMPARE:
            return f"({a} {_COMPARE[how]} {b})"
        if how == "equ":
            return f"~(({a} < {b}) | ({a} > {b}))"
        return f"~({a} {_COMPARE[_NOT[how[:-1]]]} {b})"  # unordered: true for NaN

    def _select(self, instruction: Instruction, parts: list[str]) -> None:
        d, a, b, p = instruction.operands
        type_ = "b" + parts[-1][1:]
        self.write(d, f"where({p.lstrip('%')}, {self.read(a, type_)}, {self.read(b, type_)})", instruction)

    def _move(self, instruction: Instruction, parts: list[str]) -> None:
        d, a = instruction.operands
        type_ = parts[-1]
        if d.startswith("{"):
            names = self._list(d)
            width = int(type_[1:]) // len(names)
            self.lines.append(f"t = unpack({self.read(a, type_)}, {len(names)}, 'u{width // 8}')")
            for i, name in enumerate(names):
                self.write(name, f"t[{i}]", instruction)
        elif a.startswith("{"):
            names = self._list(a)
            width = int(type_[1:]) // len(names)
            self.write(
                d, f"pack('u{int(type_[1:]) // 8}', {', '.join(self.read(x, f'b{width}') for x in names)})", instruction
            )
        elif type_ == "pred":
            self.write(d, self.read(a, "pred"), instruction)
        else:
            self.write(d, self.read(a, "b" + type_[1:]), instruction)

    def _convert(self, instruction: Instruction, parts: list[str]) -> None:
        d, *sources = instruction.operands
        if parts[-1] == "tf32" or parts[-2] == "tf32":
            self.write(d, f"to_tf32({self.read(sources[0], 'b32')})", instruction)
            return
        if parts[-1] == "e4m3x2":
            self.write(d, f"e4m3x2_to_f16x2({self.read(sources[0], 'b16')})", instruction)
            return
        to, from_ = parts[-2], parts[-1]
        if to in ("bf16x2", "f16x2"):
            high, low = (f"to_{to[:-2]}({self.read(x, from_)})" for x in sources)
            self.write(d, f"pack('u4', {low}, {high})", instruction)
            return
        a = self.read(sources[0], "b16" if from_ in ("bf16", "f16") else from_)
        if from_ in ("bf16", "f16"):
            a = f"from_{from_}({a})"
        if to in ("bf16", "f16"):
            value = f"to_{to}({a})"
        elif to[0] == "f":
            value = self._to_register(f"{a}.astype('{VIEWS[to]}')", to)
        elif from_[0] in "fb":  # a float to an integer
            rounding = {"rzi": "np.trunc", "rni": "np.rint", "rmi": "np.floor", "rpi": "np.ceil"}[parts[1]]
            value = self._to_register(f"saturate({rounding}({a}), '{VIEWS[to]}')", to)
        else:
            value = self._to_register(f"{a}.astype('{VIEWS[to]}')", to)
        if to in VIEWS and to[0] != "f":
            self._widened(d, value, to, instruction)
        else:
            self.write(d, value, instruction)

    def _bits(self, instruction: Instruction, parts: list[str]) -> None:
        d, *sources = instruction.operands
        if parts[0] == "prmt":
            a, b, selector = (self.read(x, "b32") for x in sources)
            self.write(d, f"permute_bytes({a}, {b}, {selector})", instruction)
            return
        if parts[0] == "bfi":
            a, b, at, count = (self.read(x, t) for x, t in zip(sources, (*[parts[-1]] * 2, "u32", "u32"), strict=True))
            self.write(d, f"insert({a}, {b}, {at}, {count})", instruction)
            return
        a = self.read(sources[0], parts[-1])
        at, count = (self.read(x, "u32") for x in sources[1:3])
        self.write(d, self._to_register(f"extract({a}, {at}, {count})", parts[-1]), instruction)

    def _parameter(self, instruction: Instruction, parts: list[str]) -> None:
        d, a = instruction.operands
        value = f"parameter_{a.strip('[]')}"
        self._widened(d, value, parts[-1], instruction)

    def _widened(self, d: str, value: str, type_: str, instruction: Instruction) -> None:
        """Writes what was read, extended to the register's width by the type's sign."""
        bits = int(self._kind(d) or 0) if d != "_" else int(type_[1:])
        width = int(type_[1:])
        if bits > width:
            view = VIEWS[type_]
            value = f"{value}.view('{view}')" if view[0] == "i" else value
            value = f"{value}.astype('{view[0]}{bits // 8}').view('u{bits // 8}')"
        self.write(d, value, instruction)

    def _vector(self, parts: list[str]) -> int:
        return next((int(x[1:]) for x in parts if x in ("v2", "v4", "v8")), 1)

    def _load(self, instruction: Instruction, parts: list[str]) -> None:
        d, at = instruction.operands[:2]
        space, type_, count = parts[1].split("::")[0], parts[-1], self._vector(parts)
        width = int(type_[1:]) // 8
        mask = self._mask(instruction) or "None"
        self.lines.append(f"t = load_{space}({self.address(at, space)}, {width}, {count}, {mask}, {instruction.line})")
        for i, name in enumerate(self._list(d)):
            self._widened(name, f"t[{i}]", type_, instruction)

    def _store(self, instruction: Instruction, parts: list[str]) -> None:
        at, a = instruction.operands[:2]
        space, type_, count = parts[1].split("::")[0], parts[-1], self._vector(parts)
        width = int(type_[1:]) // 8
        values = ", ".join(self.read(x, "b" + type_[1:]) for x in self._list(a))
        mask = self._mask(instruction) or "None"
        call = f"store_{space}({self.address(at, space)}, {width}, {count}, {mask}, {instruction.line}, {values})"
        self.lines.append(call)

    def _async_copy(self, instruction: Instruction, parts: list[str]) -> None:
        if "commit_group" in parts:
            self.lines.append("commit()")
        elif "wait_group" in parts or "wait_all" in parts:
            self.lines.append(f"wait_copies({instruction.operands[0] if instruction.operands else 0})")
        else:
            to, from_, size, *rest = instruction.operands
            present = self.read(rest[0], "u32") if rest else "None"
            mask = self._mask(instruction) or "None"
            self.lines.append(
                f"copy_async({self.address(to, 'shared')}, {self.address(from_, 'global')}, {int(size, 0)}, {present}, "
                f"{mask}, {instruction.line})"
            )

    def _barrier(self, instruction: Instruction, parts: list[str]) -> None:
        if parts[1] == "warp":
            self.lines.append("pass")
        elif len(instruction.operands) != 1 or instruction.guard:
            raise NotImplementedError(f"line {instruction.line}: {instruction.name} {instruction.operands}")
        else:
            self.lines.append(f"barrier({'M' if self.masked else 'None'}, {instruction.line})")

    def _shuffle(self, instruction: Instruction, parts: list[str]) -> None:
        d, a, b, c, _ = instruction.operands
        if "|" in d:
            raise NotImplementedError(f"line {instruction.line}: {instruction.name} {instruction.operands}")
        value = f"shuffle('{parts[2]}', {self.read(a, 'b32')}, {self.read(b, 'u32')}, {self.read(c, 'u32')})"
        self.write(d, value, instruction)

    def _redux(self, instruction: Instruction, parts: list[str]) -> None:
        d, a, members = instruction.operands
        value = f"reduce_warp('{parts[2]}', {self.read(a, parts[-1])}, {self.read(members, 'u32')})"
        self.write(d, self._to_register(value, parts[-1]), instruction)

    def _matrix_load(self, instruction: Instruction, parts: list[str]) -> None:
        d, at = instruction.operands
        names = self._list(d)
        transposed = "trans" in parts
        self.lines.append(
            f"t = load_matrices({self.address(at, 'shared')}, {len(names)}, {transposed}, {instruction.line})"
        )
        for i, name in enumerate(names):
            self.write(name, f"t[{i}]", instruction)

    def _matrix_store(self, instruction: Instruction, parts: list[str]) -> None:
        at, a = instruction.operands
        values = ", ".join(self.read(x, "b32") for x in self._list(a))
        self.lines.append(
            f"store_matrices({self.address(at, 'shared')}, {'trans' in parts}, {instruction.line}, {values})"
        )

    def _multiply(self, instruction: Instruction, parts: list[str]) -> None:
        """mma.sync.aligned.m16n8kK.row.col[.satfinite].D.A.B.C"""
        d, a, b, c = (self._list(x) for x in instruction.operands)
        d_type, a_type, b_type, _ = parts[-4:]
        lists = [f"[{', '.join(self.read(x, 'b32') for x in names)}]" for names in (a, b, c)]
        self.lines.append(f"t = multiply({', '.join(lists)}, '{d_type}', '{a_type}', '{b_type}')")
        for i, name in enumerate(d):
            self.write(name, f"t[{i}]", instruction)

    def _group_multiply(self, instruction: Instruction, parts: list[str]) -> None:
        """wgmma.mma_async.sync.aligned.mMnNkK.D.A.B d, a, b, scale-d[, signs[, transposed]]"""
        d, a, b, scale, *immediates = instruction.operands
        names = self._list(d)
        shape = next(x for x in parts if re.fullmatch(r"m\d+n\d+k\d+", x))
        n, k = (int(x) for x in re.findall(r"\d+", shape)[1:])
        a_text = (
            self.read(a, "b64")
            if not a.startswith("{")
            else (f"[{', '.join(self.read(x, 'b32') for x in self._list(a))}]")
        )
        if any(x != "1" for x in immediates[:2]):
            raise NotImplementedError(f"line {instruction.line}: negated operands")
        transposed = [x == "1" for x in immediates[2:]]
        flip_b = transposed[-1] if transposed else False
        flip_a = transposed[0] if len(transposed) == 2 else False
        values = ", ".join(self.read(x, "b32") for x in names)
        scale = self.read(scale, "pred")
        self.lines.append(
            f"t = group_multiply([{values}], {a_text}, {self.read(b, 'b64')}, {scale}, {n}, {k}, {flip_a}, {flip_b}, "
            f"'{parts[-3]}', '{parts[-2]}', '{parts[-1]}', {instruction.line})"
        )
        for i, name in enumerate(names):
            self.write(name, f"t[{i}]", instruction)

    def _policy(self, instruction: Instruction, parts: list[str]) -> None:
        self.write(instruction.operands[0], self._constant("0", "b64"), instruction)

    def _nothing(self, instruction: Instruction, parts: list[str]) -> None:
        """Fences: accesses happen in order here, and the groups of wgmma at once."""


Method = Callable[[Translator, Instruction, list[str]], None]
_METHODS: list[tuple[str, Method]] = [
    ("mul.", Translator._arithmetic),
    ("mad.", Translator._arithmetic),
    *((f"{name}.", Translator._arithmetic) for name in ("add", "sub", "and", "or", "xor", "not", "neg", "shl", "shr")),
    ("fma.", Translator._fma),
    ("div.", Translator._division),
    ("rem.", Translator._division),
    *((f"{name}.", Translator._unary) for name in ("abs", "ex2", "lg2", "sqrt", "rsqrt", "rcp", "popc")),
    ("min.", Translator._extreme),
    ("max.", Translator._extreme),
    ("setp.", Translator._compare),
    ("selp.", Translator._select),
    ("mov.", Translator._move),
    ("cvt.", Translator._convert),
    ("prmt.", Translator._bits),
    ("bfe.", Translator._bits),
    ("bfi.", Translator._bits),
    ("ld.param", Translator._parameter),
    ("ld.", Translator._load),
    ("st.", Translator._store),
    ("cp.async", Translator._async_copy),
    ("bar.", Translator._barrier),
    ("barrier.", Translator._barrier),
    ("shfl.", Translator._shuffle),
    ("redux.", Translator._redux),
    ("ldmatrix.", Translator._matrix_load),
    ("stmatrix.", Translator._matrix_store),
    ("mma.", Translator._multiply),
    ("wgmma.mma_async", Translator._group_multiply),
    ("wgmma.", Translator._nothing),
    ("fence.", Translator._nothing),
    ("membar.", Translator._nothing),
    ("createpolicy.", Translator._policy),
]
