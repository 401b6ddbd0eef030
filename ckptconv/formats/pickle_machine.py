"""Pickles read without running them: an own machine over the opcodes that honest checkpoints consist of.

It builds dicts, lists, tuples, text, bytes, numbers, and places of tensors. Every other global becomes an inert
:class:`~ckptconv.formats.base.Foreign`: never imported, never called. Globals that exist to run commands or code, or to open files or
connections, are refused by name (CK303). Opcodes: https://docs.python.org/3/library/pickletools.html.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ckptconv.errors import Refusal, printable
from ckptconv.formats import fsdp
from ckptconv.formats.base import Composite, Foreign, Keyed, Placed, Unsupported
from ckptconv.formats.rebuilding import DICTS, KNOWN, Global, Ordered, StorageRef, malformed
from ckptconv.formats.strangers import refused_reason
from ckptconv.spec import MAX_ELEMENTS

#: What a pickle may cost (docs/limits.md): about two seconds and 400 MB, room for 150,000 tensors. The first four grow with the checkpoint,
#: see :func:`~ckptconv.formats.strict.allowance`.
MAX_PICKLE = 64 << 20  #: bytes
MAX_STEPS = 6_000_000
MAX_OBJECTS = 1_500_000
MAX_MEMO = 2_000_000
MAX_GLOBALS = 10_000
MAX_TEXT = 16 << 20  #: bytes of one text
MAX_MARKS = 256
MAX_INTEGER_BYTES = 32
#: (storage class name, key, element count, view metadata) -> the storage. Raises Refusal for one that is not there.
Resolve = Callable[[str, str, int, Any], StorageRef]


def run(raw: bytes, resolve: Resolve, start: int = 0, *, times: int = 1) -> tuple[Any, int]:
    """The object of the pickle that starts at ``start``, and where the pickle ends. ``times`` multiplies the limits.

    Raises :class:`~ckptconv.errors.Refusal`: CK303 for a global that is refused, CK304 for a malformed pickle or a passed limit,
    CK305 for a tensor that does not lie in its storage.
    """
    machine = _Machine(raw, resolve, start, times)
    try:
        return machine.run()
    except (IndexError, KeyError, struct.error, UnicodeDecodeError, ValueError, TypeError, OverflowError) as error:
        if isinstance(error, Refusal):
            raise
        what = "the pickle ends early" if machine.at >= len(raw) else f"the pickle is malformed ({type(error).__name__})"
        raise malformed(what, machine.at) from None


class _Machine:
    def __init__(self, raw: bytes, resolve: Resolve, start: int, times: int) -> None:
        self.raw, self.resolve, self.at, self.times = raw, resolve, start, times
        self.globals: dict[tuple[str, str], Global] = {}
        self.copied = 0

    def run(self) -> tuple[Any, int]:
        raw, at = self.raw, self.at
        stack: list[Any] = []
        marks: list[list[Any]] = []
        memo: dict[int, Any] = {}
        unpack_u2, unpack_u4, unpack_i4 = struct.Struct("<H").unpack_from, struct.Struct("<I").unpack_from, struct.Struct("<i").unpack_from
        max_objects, max_memo = MAX_OBJECTS * self.times, MAX_MEMO * self.times
        made = 0  # whatever takes a few dozen bytes or more
        for _ in range(MAX_STEPS * self.times):
            if made > max_objects:
                raise malformed(f"the pickle makes more than {max_objects:,} objects", at)
            self.at = at
            op = raw[at]
            at += 1
            if op == 0x72:  # LONG_BINPUT; the commonest first
                if len(memo) >= max_memo:
                    raise malformed(f"the pickle remembers more than {max_memo:,} things", at)
                memo[unpack_u4(raw, at)[0]] = stack[-1]
                at += 4
            elif op == 0x68:  # BINGET
                stack.append(memo[raw[at]])
                at += 1
            elif op == 0x4B:  # BININT1
                stack.append(raw[at])
                at += 1
            elif op == 0x28:  # MARK
                if len(marks) >= MAX_MARKS:
                    raise malformed(f"the pickle nests deeper than {MAX_MARKS}", at)
                marks.append(stack)
                stack = []
            elif op == 0x58:  # BINUNICODE
                made += 1
                (size,) = unpack_u4(raw, at)
                stack.append(self.text(at + 4, size))
                at += 4 + size
            elif op == 0x74:  # TUPLE
                made += 1
                whole = tuple(stack)
                stack = self.unmark(marks)
                stack.append(whole)
            elif op == 0x85:  # TUPLE1
                made += 1
                stack.append((stack.pop(),))
            elif op == 0x52:  # REDUCE
                made += 1
                arguments = stack.pop()
                stack.append(self.reduce(stack.pop(), arguments))
            elif op == 0x51:  # BINPERSID
                stack.append(self.persistent(stack.pop()))
            elif op == 0x89:  # NEWFALSE
                stack.append(False)
            elif op == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif op == 0x71:  # BINPUT
                memo[raw[at]] = stack[-1]
                at += 1
            elif op == 0x6A:  # LONG_BINGET
                stack.append(memo[unpack_u4(raw, at)[0]])
                at += 4
            elif op == 0x86:  # TUPLE2
                made += 1
                second = stack.pop()
                stack.append((stack.pop(), second))
            elif op == 0x87:  # TUPLE3
                made += 1
                third, second = stack.pop(), stack.pop()
                stack.append((stack.pop(), second, third))
            elif op == 0x4D:  # BININT2
                stack.append(unpack_u2(raw, at)[0])
                at += 2
            elif op == 0x4A:  # BININT
                stack.append(unpack_i4(raw, at)[0])
                at += 4
            elif op == 0x94:  # MEMOIZE
                if len(memo) >= max_memo:
                    raise malformed(f"the pickle remembers more than {max_memo:,} things", at)
                memo[len(memo)] = stack[-1]
            elif op == 0x8C:  # SHORT_BINUNICODE
                made += 1
                stack.append(self.text(at + 1, raw[at]))
                at += 1 + raw[at]
            elif op == 0x63:  # GLOBAL
                first = raw.index(b"\n", at, at + 2000)
                second = raw.index(b"\n", first + 1, first + 2000)
                stack.append(self.named(raw[at:first].decode(), raw[first + 1 : second].decode()))
                at = second + 1
            elif op == 0x93:  # STACK_GLOBAL
                name = stack.pop()
                stack.append(self.named(stack.pop(), name))
            elif op == 0x75:  # SETITEMS
                made += len(stack) // 2
                items = stack
                stack = self.unmark(marks)
                self.set_items(stack[-1], items)
            elif op == 0x73:  # SETITEM
                made += 1
                value = stack.pop()
                self.set_items(stack[-2], [stack.pop(), value])
            elif op == 0x7D:  # EMPTY_DICT
                made += 1
                stack.append({})
            elif op == 0x5D:  # EMPTY_LIST
                made += 1
                stack.append([])
            elif op == 0x61:  # APPEND
                value = stack.pop()
                self.extend(stack[-1], [value])
            elif op == 0x65:  # APPENDS
                items = stack
                stack = self.unmark(marks)
                self.extend(stack[-1], items)
            elif op == 0x4E:  # NONE
                stack.append(None)
            elif op == 0x88:  # NEWTRUE
                stack.append(True)
            elif op == 0x47:  # BINFLOAT
                stack.append(struct.unpack_from(">d", raw, at)[0])
                at += 8
            elif op == 0x8A:  # LONG1
                size = raw[at]
                if size > MAX_INTEGER_BYTES:
                    raise malformed(f"an integer of {size} bytes", at)
                stack.append(int.from_bytes(self.bytes(at + 1, size), "little", signed=True))
                at += 1 + size
            elif op == 0x62:  # BUILD
                state = stack.pop()
                self.build(stack[-1], state)
            elif op == 0x81:  # NEWOBJ
                made += 1
                arguments = stack.pop()
                stack.append(self.new(stack.pop(), arguments))
            elif op == 0x92:  # NEWOBJ_EX
                made += 1
                stack.pop()
                arguments = stack.pop()
                stack.append(self.new(stack.pop(), arguments))
            elif op in (0x43, 0x55):  # SHORT_BINBYTES, SHORT_BINSTRING
                made += 1
                stack.append(self.bytes(at + 1, raw[at]) if op == 0x43 else self.bytes(at + 1, raw[at]).decode("latin-1"))
                at += 1 + raw[at]
            elif op in (0x42, 0x54):  # BINBYTES, BINSTRING
                made += 1
                (size,) = unpack_u4(raw, at)
                found = self.bytes(at + 4, size)
                stack.append(found if op == 0x42 else found.decode("latin-1"))
                at += 4 + size
            elif op in (0x8D, 0x8E):  # BINUNICODE8, BINBYTES8
                made += 1
                (size,) = struct.unpack_from("<Q", raw, at)
                stack.append(self.text(at + 8, size) if op == 0x8D else self.bytes(at + 8, size))
                at += 8 + size
            elif op == 0x95:  # FRAME
                at += 8
            elif op == 0x80:  # PROTO
                if raw[at] > 5:
                    raise malformed(f"pickle protocol {raw[at]}", at)
                at += 1
            elif op == 0x8F:  # EMPTY_SET; kept as a list: nothing of a file is ever hashed but plain keys
                made += 1
                stack.append([])
            elif op in (0x90, 0x91):  # ADDITEMS, FROZENSET
                items = stack
                stack = self.unmark(marks)
                if op == 0x91:
                    stack.append(items)
                else:
                    self.extend(stack[-1], items)
            elif op == 0x30:  # POP
                if stack:
                    stack.pop()
                else:
                    stack = self.unmark(marks)
            elif op == 0x2E:  # STOP
                if marks or len(stack) != 1:
                    raise malformed("the pickle ends with something left over", at - 1)
                return stack[0], at
            else:
                raise malformed(f"opcode 0x{op:02x} is none that an honest checkpoint needs", at - 1)
        raise malformed(f"the pickle has more than {MAX_STEPS * self.times:,} steps")

    def unmark(self, marks: list[list[Any]]) -> list[Any]:
        if not marks:
            raise malformed("a mark is missing", self.at)
        return marks.pop()

    def bytes(self, at: int, size: int) -> bytes:
        if size > MAX_TEXT:
            raise malformed(f"a text of {size:,} bytes; at most {MAX_TEXT:,} are read", at)
        found = self.raw[at : at + size]
        if len(found) != size:
            raise malformed("the pickle ends early", at)
        return found

    def text(self, at: int, size: int) -> str:
        return self.bytes(at, size).decode("utf-8", "surrogatepass")

    def named(self, module: Any, name: Any) -> Global:
        key = (module, name)
        found = self.globals.get(key) if type(module) is str and type(name) is str else None
        if found is not None:
            return found
        if type(module) is not str or type(name) is not str or not module or not name or len(module) + len(name) > 1000:
            raise malformed("a global without a proper name", self.at)
        reason = refused_reason(module, name)
        if reason and name == "getattr" and any(each.name == fsdp.SHARDED_TENSOR for each in self.globals.values()):
            raise fsdp.sharded_tensors(self.at)  # refused like anything else that is to be called, but it is no attack
        if reason:
            raise Refusal(
                f"the file asks for {printable(module)}.{printable(name)}, which {reason}; nothing of it was run", code="CK303",
                found=f"at byte {self.at:,} of the pickle", try_="do not load this file anywhere; ask its author for safetensors",
            )  # fmt: skip
        if len(self.globals) >= MAX_GLOBALS:
            raise malformed(f"the pickle asks for more than {MAX_GLOBALS:,} different names", self.at)
        self.globals[key] = found = Global(f"{module}.{name}")
        return found

    def set_items(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, Foreign):
            return  # the entries of an object that is never built
        if not isinstance(target, dict):
            raise malformed(f"entries are set on a {type(target).__name__}", self.at)
        if len(items) % 2:
            raise malformed("a key without a value", self.at)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is int and key.bit_length() > 64:  # those that hash alike make a dict quadratic
                raise malformed("a key that is an integer of more than 64 bits", self.at, code="CK306")
            if type(key) not in (str, int, float, bool, bytes, type(None)):
                # Hashing nested tuples can take for ever; such keys stand in tables that are no tensors, and are kept under a text.
                if isinstance(key, Foreign):
                    value = Keyed(key, value)  # noqa: PLW2901
                key = f"<{type(key).__name__} {len(target)}>"  # noqa: PLW2901
            if key in target:
                raise malformed(f"the key {printable(key)!r} stands twice", self.at, code="CK306")
            target[key] = value

    def extend(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, Foreign):
            return
        if not isinstance(target, list):
            raise malformed(f"items are appended to a {type(target).__name__}", self.at)
        target.extend(items)

    def build(self, target: Any, state: Any) -> None:
        if isinstance(target, Foreign):
            target.state = state
        elif isinstance(target, Ordered) and isinstance(state, dict) and state.keys() <= {"_metadata"}:
            target.metadata = state.get("_metadata")
        else:
            kinds = {Placed: "tensor", Composite: "tensor", Unsupported: "tensor", Ordered: "dict", Global: "class"}
            raise malformed(f"the file sets attributes on a {kinds.get(type(target), type(target).__name__)}", self.at)

    def new(self, kind: Any, arguments: Any) -> Any:
        if not isinstance(kind, Global) or not isinstance(arguments, tuple):
            raise malformed("an object of something that is no class", self.at)
        if kind.name in DICTS:
            return Ordered()
        return Foreign(kind.name, arguments=arguments)

    def reduce(self, function: Any, arguments: Any) -> Any:
        if not isinstance(arguments, tuple):
            raise malformed("a call without arguments", self.at)
        if not isinstance(function, Global):
            if isinstance(function, Foreign):
                return Foreign(f"{function.name}()", arguments=arguments)
            raise malformed(f"a call of a {type(function).__name__}", self.at)
        known = KNOWN.get(function.name)
        if known is None:
            return Foreign(function.name, arguments=arguments)
        # What a call copies (its first argument, or its last) may be asked for again and again.
        for argument in arguments if len(arguments) < 2 else (arguments[0], arguments[-1]):
            if isinstance(argument, (list, tuple, dict)):
                self.copied += len(argument)
            elif isinstance(argument, str):
                self.copied += len(argument) >> 6
        if self.copied > MAX_OBJECTS * self.times:
            raise malformed(f"the pickle copies more than {MAX_OBJECTS * self.times:,} objects", self.at)
        return known(arguments)

    def persistent(self, reference: Any) -> Any:
        if isinstance(reference, tuple) and len(reference) == 4 and reference[0] == "module" and isinstance(reference[1], Global):
            return reference[1]  # legacy files carry the source of a module's class beside it
        if (
            not isinstance(reference, tuple)
            or len(reference) not in (5, 6)
            or reference[0] != "storage"
            or not isinstance(reference[1], Global)
        ):
            raise malformed("a reference that is no storage", self.at)
        _, kind, key, _, count = reference[:5]
        if type(count) is not int or not 0 <= count <= MAX_ELEMENTS or type(key) not in (str, int):
            raise malformed("a storage with an impossible size or key", self.at, code="CK305")
        return self.resolve(kind.name.rsplit(".", 1)[-1], str(key), count, reference[5] if len(reference) == 6 else None)
