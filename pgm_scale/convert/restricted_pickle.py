"""Pickles read as data: a machine that knows plain containers, and calls nothing that a file names.

Python's own unpickler imports what a file asks for and calls it. This one never looks up a name: a global of the
file becomes a `Record` of its module and name, and what the file wants done with it is written down in the record.
Only the names in the table of `builders`, which the caller gives, are made into something. The opcodes are split by
`pickletools`, which reads them without acting on them.

Memory is bounded: the machine's dicts and lists grow by what the file has bytes for, the memo is a dict (not an
array as long as the largest number in the file), and `_MOST_OPERATIONS` bounds the small objects.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Hashable, Mapping
from typing import IO, Any

_MOST_OPERATIONS = 5_000_000  # a tokenizer with 50,000 words in Python dicts takes a million
_MOST_COPIED_BYTES = 1 << 26
_ITEM_BYTES = 16
_LONGEST_KEY = 16
_LONGEST_NAME = 1000  # of a global: names are joined and copied, once a call and once a mention
_PYTHON_2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
# Not complex: a file could choose a million of equal hashes, and a dict of them takes hours.
_KEY_TYPES = (str, bytes, int, float, bool, type(None))


class PickleError(Exception):
    """The bytes are no pickle, or one that this machine does not read."""


class Record:
    """Something of a foreign class or function: what the file says of it, inert.

    Attributes:
        module, name: of the global.
        args: what it would be called with; None of the bare global.
        state: what the file would set it to.
        items: what the file would append to it, or the (key, value) pairs that it would set.
    """

    __slots__ = ("args", "items", "module", "name", "state")

    def __init__(self, module: str, name: str, args: tuple[Any, ...] | None = None) -> None:
        if len(module) + len(name) > _LONGEST_NAME:
            raise PickleError(f"a name of {len(module) + len(name):,} letters")
        self.module, self.name, self.args = module, name, args
        self.state: Any = None
        self.items: list[Any] = []

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"

    def __repr__(self) -> str:  # short: it may hold gigabytes, or itself
        return f"<{self.path[:100]} of the file>"


Builder = Callable[..., Any]
Builders = Mapping[str, Builder]  # by "module.name"


def _bytes_of(text: Any, encoding: str = "latin1") -> bytes:
    """`_codecs.encode`, by which old protocols write bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "utf-8"):
        raise PickleError("bytes in an unknown encoding")
    return text.encode(encoding)


def _bytearray_of(content: Any = b"", encoding: str = "latin1") -> bytes:
    return content if isinstance(content, bytes) else _bytes_of(content, encoding)


def _pairs(items: Any = ()) -> dict[Any, Any]:
    """`OrderedDict(pairs)`, as Python 2 wrote it; later the pairs come by SETITEMS."""
    content: dict[Any, Any] = {}
    for key, value in items.items() if isinstance(items, dict) else items:
        content[_hashable(key)] = value
    return content


# What is made of names that only stand for plain values.
PLAIN_BUILDERS: Builders = {
    "_codecs.encode": _bytes_of,
    "builtins.bytearray": _bytearray_of,
    "builtins.bytes": _bytearray_of,
    "builtins.complex": complex,
    "builtins.frozenset": lambda items=(): frozenset(map(_hashable, items)),
    "builtins.set": lambda items=(): set(map(_hashable, items)),
    "collections.OrderedDict": _pairs,
    "collections.defaultdict": lambda factory=None, items=(): _pairs(items),
}


def load(
    file: IO[bytes], builders: Builders = PLAIN_BUILDERS, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """The value of the pickle at the file's position, which is left behind it.

    Args:
        builders: what makes a value of the arguments of these names; all others become `Record`s.
        persistent: what a persistent id stands for; without it there may be none.

    Raises:
        PickleError: no whole pickle. Other exceptions come of hostile ones; all mean the same.
    """
    return _Machine(builders, persistent).run(file)


class _Machine:
    """The stack, the stacks below the marks, and the memo."""

    def __init__(self, builders: Builders, persistent: Callable[[Any], Any] | None) -> None:
        self.builders, self.persistent = builders, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0  # bytes that builders were given, as the same can be given again and again

    def run(self, file: IO[bytes]) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count > _MOST_OPERATIONS:
                raise PickleError(f"more than {_MOST_OPERATIONS:,} operations")
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name in _IGNORED:
                continue
            if opcode.name in _PUSHED:
                self.stack.append(argument)
                continue
            operation = _OPERATIONS.get(opcode.name)
            if operation is None:
                raise PickleError(f"the operation {opcode.name}")
            operation(self, argument)
        raise PickleError("no end")

    def pop_marked(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def pop_strings(self) -> tuple[str, str]:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError("a global without a name")
        return module, name

    def mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def remember(self, number: Any) -> None:
        self.memo[len(self.memo) if number is None else number] = self.stack[-1]

    def recall(self, number: int) -> None:
        self.stack.append(self.memo[number])

    def push_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(_global(module, name))

    def stack_global(self, _: Any) -> None:
        self.stack.append(_global(*self.pop_strings()))

    def push_marked(self, collect: Callable[[list[Any]], Any]) -> None:
        items = self.pop_marked()  # before `self.stack` is looked up
        self.stack.append(collect(items))

    def push_tuple(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        if len(items) != count:
            raise PickleError("a tuple of nothing")
        self.stack[-count:] = [items]

    def reduce(self, _: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.made(function, args))

    def reduce_with_keywords(self, _: Any) -> None:
        keywords, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        record = Record(*_named(function), args=_arguments(args))
        record.items.append(keywords)
        self.stack.append(record)

    def instance(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        args = tuple(self.pop_marked())
        self.stack.append(self.made(_global(module, name), args))

    def object_of_marked(self, _: Any) -> None:
        function, *args = self.pop_marked()
        self.stack.append(self.made(function, tuple(args)))

    def made(self, function: Any, args: Any) -> Any:
        """What a table of ours makes of it, or else a record; nothing that is on the stack is ever called."""
        arguments = _arguments(args)
        is_global = isinstance(function, Record) and function.args is None
        builder = self.builders.get(function.path) if is_global else None
        if builder is None:
            return Record(*_named(function), args=arguments)
        self.copied += sum(map(_copied_bytes, arguments))
        if self.copied > _MOST_COPIED_BYTES:
            raise PickleError(f"more than {_MOST_COPIED_BYTES:,} bytes in its containers")
        return builder(*arguments)

    def build(self, _: Any) -> None:
        """State is kept of records only: what is made by our tables is whole without it."""
        state, value = self.stack.pop(), self.stack[-1]
        if isinstance(value, Record) and value.args is not None:
            value.state = state

    def append(self, _: Any) -> None:
        item = self.stack.pop()
        self.extended([item])

    def extend(self, _: Any) -> None:
        self.extended(self.pop_marked())

    def extended(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is set:
            target.update(map(_hashable, items))
        elif isinstance(target, Record) and target.args is not None:
            target.items.extend(items)
        else:
            raise PickleError(f"items of a {type(target).__name__}")

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_pairs([key, value])

    def set_items(self, _: Any) -> None:
        self.set_pairs(self.pop_marked())

    def set_pairs(self, items: list[Any]) -> None:
        pairs, target = list(zip(items[::2], items[1::2], strict=True)), self.stack[-1]
        if type(target) is dict:
            target.update((_hashable(key), value) for key, value in pairs)
        elif isinstance(target, Record) and target.args is not None:
            target.items.extend(pairs)
        else:
            raise PickleError(f"keys of a {type(target).__name__}")

    def pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_marked()

    def persistent_id(self, identity: Any) -> None:
        if self.persistent is None:
            raise PickleError("a persistent id")
        self.stack.append(self.persistent(identity))


def _global(module: str, name: str) -> Record:
    return Record(_PYTHON_2_MODULES.get(module, module), name)


def _named(function: Any) -> tuple[str, str]:
    """Module and name of what would be called: a global, or what another call would give."""
    if not isinstance(function, Record):
        raise PickleError(f"a call of a {type(function).__name__}")
    return function.module, function.name if function.args is None else f"{function.name}()"


def _arguments(args: Any) -> tuple[Any, ...]:
    if type(args) is not tuple:
        raise PickleError("a call without a tuple of arguments")
    return args


def _copied_bytes(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    return _ITEM_BYTES * len(value) if isinstance(value, (list, tuple, dict, set, frozenset)) else 0


def _hashable(key: Any) -> Hashable:
    """Keys that are hashed in a moment, each time: neither nested or long tuples nor large integers."""
    parts = key if type(key) is tuple and len(key) <= _LONGEST_KEY else (key,)
    for part in parts:
        is_large = type(part) is int and part.bit_length() > 64
        if is_large or not isinstance(part, (*_KEY_TYPES, Record)):
            raise PickleError(f"a {type(part).__name__} as a key")
    return key


_IGNORED = {"PROTO", "FRAME"}
# The value is the opcode's own argument.
_PUSHED = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_PUSHED |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_PUSHED |= {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_OPERATIONS: dict[str, Callable[[_Machine, Any], object]] = {
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_SET": lambda machine, _: machine.stack.append(set()),
    "TUPLE": lambda machine, _: machine.push_marked(tuple),
    "LIST": lambda machine, _: machine.push_marked(list),
    "DICT": lambda machine, _: machine.push_marked(
        lambda items: _pairs(zip(*[iter(items)] * 2, strict=True))
    ),
    "FROZENSET": lambda machine, _: machine.push_marked(lambda items: frozenset(map(_hashable, items))),
    "TUPLE1": lambda machine, _: machine.push_tuple(1),
    "TUPLE2": lambda machine, _: machine.push_tuple(2),
    "TUPLE3": lambda machine, _: machine.push_tuple(3),
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": lambda machine, _: machine.pop_marked(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "PUT": _Machine.remember,
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": _Machine.remember,
    "GET": _Machine.recall,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.extend,
    "ADDITEMS": _Machine.extend,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.push_global,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.reduce_with_keywords,
    "INST": _Machine.instance,
    "OBJ": _Machine.object_of_marked,
    "BUILD": _Machine.build,
    "PERSID": _Machine.persistent_id,
    "BINPERSID": lambda machine, _: machine.persistent_id(machine.stack.pop()),
}
