"""What a pickle would make its reader do, found out by following its instructions without carrying them out.

``torch.load(weights_only=True)`` calls nothing foreign, but what it may call can still be told to fill the memory
(``bytearray(2**40)``, text encoded to twice its size again and again, a long list copied a million times) or to
overflow the stack (the hash of a tuple nested a million deep). Such a file is refused before torch sees it.
"""

from __future__ import annotations

import pickle
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Sequence
from typing import IO, Any

from mto_analysis.errors import CheckpointError

# A training dict of a ViT-H with its optimizer has some 100 000 instructions, nested 10 deep.
_MOST_INSTRUCTIONS = 1_000_000
_MOST_BYTES_COPIED = 256 * 2**20
_BYTES_PER_ITEM = 64
_DEEPEST = 1_000
# What torch writes unless told otherwise, and all that its safe reader understands.
_NEWEST_PROTOCOL = 2

# Nothing that a file names is ever called. These run programs, code or files when they are, and no trainer saves them:
# such a file is refused rather than read around.
_TO_BE_CALLED = {
    "_io", "_pickle", "_posixsubprocess", "bdb", "cProfile", "code", "codeop", "commands", "ctypes", "imp", "importlib",
    "io", "marshal", "multiprocessing", "nt", "os", "pdb", "pickle", "pickletools", "platform", "posix", "profile",
    "pty", "runpy", "shelve", "shutil", "socket", "subprocess", "sys", "tempfile", "timeit", "trace", "webbrowser",
}  # fmt: skip
_BUILTINS_TO_BE_CALLED = {"__import__", "breakpoint", "compile", "eval", "exec", "input", "open"}
# Bytes are text encoded so in torch's pickle protocol; other encodings (hex) let it grow without bound.
_BYTES_AS_TEXT = (["latin1"], [b"latin1"])


class _Value:
    """What is kept of a value on the pickle's stack: a constant or name, parts of a short tuple, depth, rough size."""

    __slots__ = ("bytes", "constant", "depth", "parts")

    def __init__(self, constant: Any = None, parts: Sequence[_Value] = ()) -> None:
        self.constant = constant
        self.parts = parts if 0 < len(parts) <= 3 else ()
        self.bytes = len(constant) if isinstance(constant, (str, bytes)) else len(parts) * _BYTES_PER_ITEM
        self.depth: int = max((part.depth + 1 for part in parts), default=0)

    def take(self, items: Sequence[_Value]) -> None:
        """Hold more items."""
        self.bytes += len(items) * _BYTES_PER_ITEM
        self.depth = max((self.depth, *(item.depth + 1 for item in items)))


_MARK = _Value("mark")


def foreign_names(stream: IO[bytes], count: int = 1) -> list[str]:
    """Names, as ``module.name``, of the objects that pickles ask for which follow each other in a stream."""
    names: set[str] = set()
    for _ in range(count):
        _follow(stream, names)
    return sorted(names)


def _follow(stream: IO[bytes], names: set[str]) -> None:
    """Move values over the stack as the unpickler would, and note the names."""
    stack: list[_Value] = []
    memo: dict[int, _Value] = {}
    copied, protocol = 0, 0
    for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        kind, protocol = opcode.name, max(protocol, opcode.proto)
        if kind in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif kind in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[argument if isinstance(argument, int) else len(memo)] = stack[-1]
        elif kind == "MARK":
            stack.append(_MARK)
        elif kind in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"):
            items = _pop(stack, opcode, leave=1)
            stack[-1].take(items)
        elif kind == "BUILD":
            state = _pop(stack, opcode, leave=1)[0]
            stack[-1].take([state])
            copied += state.bytes
        elif kind in ("GLOBAL", "STACK_GLOBAL"):
            words = argument.split(" ", 1) if argument else [value.constant for value in _pop(stack, opcode)]
            name = _checked_name(*map(str, words))
            names.add(name)
            stack.append(_Value(name))
        else:
            operands = _pop(stack, opcode)
            if kind in ("REDUCE", "NEWOBJ"):
                _check_call(*operands)
                copied += sum(part.bytes for part in operands[1].parts)
            stack.extend(_Value(argument, operands) for _ in opcode.stack_after)
        if step >= _MOST_INSTRUCTIONS or copied > _MOST_BYTES_COPIED or (stack and stack[-1].depth > _DEEPEST):
            raise CheckpointError("asks for more memory than a checkpoint needs: it may be an attack; nothing was run")
    if protocol > _NEWEST_PROTOCOL:
        raise CheckpointError(
            f"was saved with pickle protocol {protocol}, which cannot be read safely; save it again with the default"
        )


def _pop(stack: list[_Value], opcode: pickletools.OpcodeInfo, leave: int = 0) -> list[_Value]:
    """Take an instruction's operands from the stack but for the lowest ``leave``, without the mark among them."""
    if pickletools.stackslice in opcode.stack_before:
        low = len(stack) - 1
        while stack[low] is not _MARK:
            low -= 1
        operands = stack[low + 1 :]
        del stack[low:]
        return operands
    low = len(stack) - len(opcode.stack_before) + leave
    operands = stack[low:] if low >= leave else []
    if len(operands) != len(opcode.stack_before) - leave or _MARK in operands:
        raise pickle.UnpicklingError("values are missing on the stack")
    del stack[low:]
    return operands


def _checked_name(module: str, name: str) -> str:
    """The present-day name of what a pickle asks for, refused if it is there to be called."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    top = module.split(".")[0]
    if top in _TO_BE_CALLED or (top == "builtins" and name in _BUILTINS_TO_BE_CALLED):
        raise CheckpointError(
            f"asks for {module}.{name} to be called, which no checkpoint needs: it may be an attack; nothing was run"
        )
    return f"{module}.{name}"


def _check_call(function: _Value, arguments: _Value) -> None:
    if function.constant == "_codecs.encode" and [part.constant for part in arguments.parts[1:]] not in _BYTES_AS_TEXT:
        raise CheckpointError("encodes text in a way no checkpoint needs: it may be an attack; nothing was run")
    # Of a number, it would be as many bytes.
    if function.constant == "builtins.bytearray" and isinstance(arguments.parts[0].constant, int):
        raise CheckpointError("asks for more memory than a checkpoint needs: it may be an attack; nothing was run")
