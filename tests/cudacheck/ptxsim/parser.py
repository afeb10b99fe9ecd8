"""PTX text to instructions. Functions that a kernel calls are appended to its instructions, with
registers of their own; a call becomes copies of parameters around a jump that remembers where it
came from. What nvcc emits for kernels here does not recurse: a return address a function is enough.
"""

import re
from dataclasses import dataclass, field

import numpy as np


class PtxError(Exception):
    """The program did what it must not, or uses what the interpreter does not know."""


Operand = str | list[str] | tuple[str, str, int]
"""A register, number or name; the registers of a vector; ("memory", base, offset)."""


@dataclass
class Instruction:
    opcode: str
    operands: list[Operand]
    predicate: tuple[str, bool] | None
    """Register and whether it is negated."""
    where: str
    parts: list[str] = field(default_factory=list)
    type: str = ""

    def __post_init__(self) -> None:
        self.parts = self.opcode.split(".")
        self.type = self.parts[-1]


@dataclass
class Space:
    """Variables laid out one after another: name to offset."""

    offset: dict[str, int] = field(default_factory=dict)
    bytes: int = 0

    def add(self, name: str, alignment: int, size: int) -> None:
        self.bytes = -(-self.bytes // alignment) * alignment
        self.offset[name] = self.bytes
        self.bytes += size


@dataclass
class Kernel:
    name: str
    parameters: Space = field(default_factory=Space)
    sizes: list[int] = field(default_factory=list)
    """Bytes of each parameter."""
    registers: dict[str, str] = field(default_factory=dict)
    """Register to type."""
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    """Targets of brx.idx."""
    shared: Space = field(default_factory=Space)
    dynamic: list[str] = field(default_factory=list)
    """Names of the dynamic shared memory."""
    local: Space = field(default_factory=Space)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    """Initialised variables of the module."""
    call_parameters: dict[str, int] = field(default_factory=dict)
    """Parameters of calls and functions: name to bytes."""


def split_operands(text: str) -> list[str]:
    found, depth, current = [], 0, ""
    for character in text:
        depth += character in "{[("
        depth -= character in "}])"
        if character == "," and depth == 0:
            found.append(current.strip())
            current = ""
        else:
            current += character
    return [*found, current.strip()] if current.strip() else found


VARIABLE = re.compile(
    r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s[^,]*?\s)?([\w$%]+)(?:\[(\d*)\])?$"
)
SIZES = {"b8": 1, "s8": 1, "u8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "b32": 4, "u32": 4}
SIZES |= {"s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "b128": 16}


def variable(text: str) -> tuple[str, int, int]:
    """Name, alignment and bytes (0 if open) of a declaration without its state space."""
    match = VARIABLE.match(text.strip())
    if match is None:
        raise PtxError(f"declaration: {text}")
    alignment, kind, name, count = match.groups()
    size = SIZES[kind]
    total = size if count is None else size * int(count or 0)
    return name, int(alignment or size), total


def _block_end(text: str, begin: int) -> int:
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, begin):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise PtxError("a body without an end")


HEAD = re.compile(
    r"\.(entry|func)\s+(?:\(([^)]*)\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?\s*((?:\.\w+[^{;\n]*\s*)*)\{"
)


@dataclass
class Function:
    kind: str
    name: str
    results: list[str]
    parameters: list[str]
    body: str


def parse(text: str) -> dict[str, Kernel]:
    """Kernels of a PTX module by name."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"\.section[^{]*\{[^}]*\}", "", text)
    files = {
        number: name.rsplit("/", 1)[-1]
        for number, name in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text)
    }
    text = re.sub(r"^\s*\.(file|target|version|address_size)\b.*$", "", text, flags=re.MULTILINE)
    functions, outside, at = {}, "", 0
    for match in HEAD.finditer(text):
        if match.start() < at:
            continue
        end = _block_end(text, match.end())
        kind, results, name, parameters, _ = match.groups()
        functions[name] = Function(
            kind,
            name,
            split_operands(results or ""),
            split_operands(parameters or ""),
            text[match.end() : end],
        )
        outside += text[at : match.start()]
        at = end + 1
    outside += text[at:]
    return {
        f.name: _Builder(f, functions, outside, files).kernel
        for f in functions.values()
        if f.kind == "entry"
    }


class _Builder:
    """Makes a kernel of its own body and those of the functions it calls."""

    def __init__(
        self,
        entry: Function,
        functions: dict[str, Function],
        outside: str,
        files: dict[str, str],
    ) -> None:
        self.kernel = Kernel(entry.name)
        self.functions, self.files = functions, files
        self.module_variables(outside)
        for text in entry.parameters:
            name, alignment, size = variable(text.strip().removeprefix(".param").strip())
            self.kernel.parameters.add(name, alignment, size)
            self.kernel.sizes.append(size)
        self.scopes: list[dict[str, str]] = []
        self.prefix, self.count, self.where = "", 0, ""
        self.wanted, self.done = [entry.name], set()
        while self.wanted:
            name = self.wanted.pop(0)
            if name not in self.done:
                self.done.add(name)
                self.function(functions[name], name == entry.name)
        used = " ".join(functions[name].body for name in self.done)
        shared = {n: self.shared[n] for n in self.shared if re.search(re.escape(n) + r"\b", used)}
        for name, (alignment, size) in shared.items():
            if size:
                self.kernel.shared.add(name, alignment, size)
            else:
                self.kernel.dynamic.append(name)

    def module_variables(self, outside: str) -> None:
        self.shared: dict[str, tuple[int, int]] = {}
        for statement in outside.split(";"):
            text = " ".join(statement.split())
            match = re.search(r"\.(shared|global|const)\s+(.*)$", text)
            if match is None:
                continue
            declared, _, value = match[2].partition("=")
            name, alignment, size = variable(declared.strip())
            if match[1] == "shared":
                self.shared[name] = (alignment, size)
                continue
            kind = VARIABLE.match(declared.strip())
            assert kind is not None
            data = np.zeros(max(size, 1) + 15, np.uint8)
            numbers = re.findall(r"0[fd][0-9A-Fa-f]+|-?\b(?:0x[0-9A-Fa-f]+|\d+)\b", value)
            width = SIZES[kind[2]]
            for i, number in enumerate(numbers):
                integer = int(
                    number[2:] if number[1:2] in "fd" else number,
                    16 if number[1:2] in ("f", "d") else 0,
                ) & ((1 << (8 * width)) - 1)
                data[i * width : (i + 1) * width] = list(integer.to_bytes(width, "little"))
            self.kernel.constants[name] = data[:size]

    # --- One function ----------------------------------------------------------------------------

    def function(self, function: Function, is_entry: bool) -> None:
        kernel = self.kernel
        self.prefix = "" if is_entry else f"{function.name}:"
        if not is_entry:
            kernel.labels[f"call {function.name}"] = len(kernel.instructions)
            kernel.registers[f"return {function.name}"] = "b64"
            for text in [*function.parameters, *function.results]:
                name, _, size = variable(text.strip().removeprefix(".param").strip())
                kernel.call_parameters[name] = size
        self.scopes = [{}]
        for statement in self.statements(function.body):
            self.statement(statement, function, is_entry)

    def statements(self, body: str) -> list[str]:
        found, current = [], ""
        for token in re.split(r"(;|\n)", body):
            if token == ";":
                found.append(current.strip())
                current = ""
            elif token == "\n":
                text = current.strip()
                alone = text in ("{", "}") or re.match(r"^[\w$]+:$", text) is not None
                if alone or text.startswith((".loc", ".pragma")):
                    found.append(text)
                    current = ""
                else:
                    current += " "
            else:
                current += token
        return [s for s in found if s]

    def statement(self, text: str, function: Function, is_entry: bool) -> None:
        kernel = self.kernel
        while True:  # labels and braces before it
            text = text.strip()
            if text.startswith("{") and not re.match(r"^\{[^}]*\}\s*,", text):
                self.scopes.append({})
                text = text[1:]
            elif text.startswith("}"):
                self.scopes.pop()
                text = text[1:]
            elif match := re.match(r"^([\w$]+):\s*", text):
                label = self.prefix + match[1]
                text = text[match.end() :]
                if text.startswith(".branchtargets"):
                    targets = split_operands(text.removeprefix(".branchtargets"))
                    kernel.tables[label] = [self.prefix + t for t in targets]
                    return
                kernel.labels[label] = len(kernel.instructions)
            else:
                break
        if not text or text.startswith(".pragma"):
            return
        if text.startswith("."):
            self.directive(text)
            return
        self.instruction(text, function, is_entry)

    def directive(self, text: str) -> None:
        kernel = self.kernel
        kind, rest = text.split(None, 1)
        if kind == ".loc":
            words = text.split()
            self.where = f"{self.files.get(words[1], words[1])}:{words[2]}"
        elif kind == ".reg":
            match = re.match(r"\.(\w+)\s+(.*)", rest.strip())
            assert match is not None
            for name in split_operands(match[2]):
                if many := re.match(r"(%?[\w$]+)<(\d+)>", name):
                    names = [f"{many[1]}{i}" for i in range(int(many[2]))]
                else:
                    names = [name]
                for one in names:
                    self.count += 1
                    own = (
                        one
                        if not self.prefix and len(self.scopes) == 1
                        else (f"{self.prefix}{one}~{self.count}")
                    )
                    self.scopes[-1][one] = own
                    kernel.registers[own] = match[1]
        elif kind == ".param":
            name, _, size = variable(rest)
            self.count += 1
            own = f"{self.prefix}{name}~{self.count}"
            self.scopes[-1][name] = own
            kernel.call_parameters[own] = size
        elif kind == ".shared":
            name, alignment, size = variable(rest)
            self.shared[name] = (alignment, size)
        elif kind == ".local":
            name, alignment, size = variable(rest)
            own = self.prefix + name
            self.scopes[-1][name] = own
            kernel.local.add(own, alignment, size)
        else:
            raise PtxError(f"directive {text}")

    def name(self, text: str) -> str:
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        return text

    def operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return [self.name(x.strip()) for x in text[1:-1].split(",")]
        if text.startswith("["):
            match = re.match(r"\[\s*(%?[\w$.]+)\s*(?:\+\s*(-?\d+))?\s*\]$", text)
            if match is None:
                raise PtxError(f"address {text}")
            return ("memory", self.name(match[1]), int(match[2] or 0))
        negated = "!" if text.startswith("!") else ""
        two = text.removeprefix("!").split("|")
        return negated + "|".join(self.name(x.strip()) for x in two)

    def add(
        self, opcode: str, *operands: Operand, predicate: tuple[str, bool] | None = None
    ) -> None:
        self.kernel.instructions.append(Instruction(opcode, list(operands), predicate, self.where))

    def instruction(self, text: str, function: Function, is_entry: bool) -> None:
        predicate = None
        if match := re.match(r"@(!?)(%?[\w$]+)\s+", text):
            predicate = (self.name(match[2]), bool(match[1]))
            text = text[match.end() :]
        match = re.match(r"([\w.:]+)\s*(.*)", text, re.DOTALL)
        assert match is not None
        opcode, rest = match[1], match[2].strip()
        if opcode.startswith("call"):
            self.call(rest, predicate)
        elif opcode.startswith("ret") and not is_entry:
            self.add("%return", f"return {function.name}", predicate=predicate)
        elif opcode.startswith(("bra", "brx")):
            labels: list[Operand] = [
                self.prefix + x if x.startswith("$") else self.name(x) for x in split_operands(rest)
            ]
            self.add(opcode, *labels, predicate=predicate)
        else:
            operands = [self.operand(x) for x in split_operands(rest)]
            self.add(opcode, *operands, predicate=predicate)

    def call(self, rest: str, predicate: tuple[str, bool] | None) -> None:
        parts = split_operands(rest)
        results = split_operands(parts.pop(0).strip("() ")) if parts[0].startswith("(") else []
        name = parts.pop(0)
        given = split_operands(parts[0].strip("() ")) if parts else []
        if name not in self.functions:  # __assertfail, vprintf
            self.add("%system", name, predicate=predicate)
            return
        if predicate is not None:
            raise PtxError("a call under a predicate")
        function = self.functions[name]

        def formal(text: str) -> str:
            return variable(text.strip().removeprefix(".param").strip())[0]

        for own, text in zip(given, function.parameters, strict=True):
            self.add("%copy", formal(text), self.name(own))
        self.add("%call", f"call {name}", f"return {name}")
        for own, text in zip(results, function.results, strict=True):
            self.add("%copy", self.name(own), formal(text))
        self.wanted.append(name)
