"""Runs Triton modules in numpy: what a GPU computes, one program of the grid after the other.

The modules are those that Pallas gives to the compiler of the GPU. The meaning of each operation is
that on a GPU, which is not always the one of jax: the larger of a number and NaN is the number,
products of float32 may be rounded to TF32, and an address may be anywhere.
"""

import operator
from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes
import numpy as np
from jax._src.lib.mlir import ir
from triton_memory import Memory

Values = list[Any]  # of all variables, by number
Run = Callable[[Values, "Launch"], None]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_TYPES = {
    "i1": np.dtype(bool), "i8": np.dtype(np.int8), "i16": np.dtype(np.int16),
    "i32": np.dtype(np.int32), "i64": np.dtype(np.int64), "f16": np.dtype(np.float16),
    "bf16": _BFLOAT16, "f32": np.dtype(np.float32),
}  # fmt: skip
_SMALL_FLOATS = (_BFLOAT16, np.dtype(np.float16))
_ENDS = ("scf.yield", "scf.condition", "tt.reduce.return", "tt.scan.return", "tt.return")
_TF32 = 0  # of tt.dot's inputPrecision


class Launch:
    """What a program of the grid sees beside its variables.

    Attributes:
      memory: the arrays.
      program_ids: number of the program on each axis of the grid.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.program_ids = (0, 0, 0)


class TritonProgram:
    """A Triton module whose operations became functions of numpy."""

    def __init__(self, module: ir.Module) -> None:
        self._numbers: dict[ir.Value, int] = {}
        with module.context:
            [entry] = module.body.operations[0].regions[0].blocks
            self._arguments = self._numbers_of(entry.arguments)
            self._code, _ = self._block(entry)

    def run(self, addresses: Iterable[int], launch: Launch) -> None:
        """Runs one program of the grid on arrays at addresses."""
        values: Values = [None] * len(self._numbers)
        for number, address in zip(self._arguments, addresses, strict=True):
            values[number] = np.int64(address)
        with np.errstate(all="ignore"):
            _run(self._code, values, launch)

    def _numbers_of(self, values):
        return [self._numbers.setdefault(value, len(self._numbers)) for value in values]

    def _block(self, block) -> tuple[list[Run], list[int]]:
        """Returns the operations of a block and the variables that it passes on."""
        code = []
        for view in block.operations:
            operation = view.operation
            if operation.name in _ENDS:
                return code, self._numbers_of(operation.operands)
            code.append(self._operation(operation))
        return code, []

    def _operation(self, operation) -> Run:
        if build := getattr(self, "_" + operation.name.replace(".", "_"), None):
            return build(operation)
        function = _function(operation)
        inputs, [result] = self._numbers_of(operation.operands), self._numbers_of(operation.results)
        dtype = _dtype(operation.results[0])

        def run(values, launch):
            computed = function(*(values[number] for number in inputs))
            values[result] = computed if dtype is None else np.asarray(computed, dtype)

        return run

    # Memory and position

    def _tt_get_program_id(self, operation):
        axis, [result] = _integer(operation, "axis"), self._numbers_of(operation.results)

        def run(values, launch):
            values[result] = np.int32(launch.program_ids[axis])

        return run

    def _tt_load(self, operation):
        if not list(operation.results[0].uses):  # Pallas reads what it overwrites; Triton does not
            return lambda values, launch: None
        has_mask, has_other = list(operation.attributes["operandSegmentSizes"])[1:]
        pointer, *rest = self._numbers_of(operation.operands)
        mask, other = rest[0] if has_mask else None, rest[-1] if has_other else None
        [result], where = self._numbers_of(operation.results), _where(operation)
        dtype = _pointee(operation.operands[0])

        def run(values, launch):
            given = [None if number is None else values[number] for number in (mask, other)]
            values[result] = launch.memory.load(np.asarray(values[pointer]), dtype, *given, where)

        return run

    def _tt_store(self, operation):
        pointer, value, *mask = self._numbers_of(operation.operands)
        where = _where(operation)

        def run(values, launch):
            given = values[mask[0]] if mask else None
            launch.memory.store(np.asarray(values[pointer]), values[value], given, where)

        return run

    def _gpu_barrier(self, operation):
        return lambda values, launch: launch.memory.barrier()

    # Blocks

    def _tt_reduce(self, operation):
        combine, axis = self._combination(operation), _integer(operation, "axis")
        inputs, results = self._numbers_of(operation.operands), self._numbers_of(operation.results)

        def run(values, launch):
            parts = [np.moveaxis(np.asarray(values[number]), axis, 0) for number in inputs]
            while (length := len(parts[0])) > 1:
                left, right = ([x[half] for x in parts] for half in np.split(np.arange(length), 2))
                parts = combine(left, right, values, launch)
            _assign(values, results, [x[0] for x in parts])

        return run

    def _tt_scan(self, operation):
        combine, axis = self._combination(operation), _integer(operation, "axis")
        step = -1 if ir.BoolAttr(operation.attributes["reverse"]).value else 1
        inputs, results = self._numbers_of(operation.operands), self._numbers_of(operation.results)

        def run(values, launch):
            parts = [np.moveaxis(np.asarray(values[number]), axis, 0)[::step] for number in inputs]
            rows = [[x[0] for x in parts]]
            for i in range(1, len(parts[0])):
                rows.append(combine(rows[-1], [x[i] for x in parts], values, launch))
            found = [np.moveaxis(np.stack(x)[::step], 0, axis) for x in zip(*rows, strict=True)]
            _assign(values, results, found)

        return run

    def _combination(self, operation):
        [block] = operation.regions[0].blocks
        arguments, (code, passed) = self._numbers_of(block.arguments), self._block(block)

        def combine(left, right, values, launch):
            _assign(values, arguments, [*left, *right])
            _run(code, values, launch)
            return [np.asarray(values[number]) for number in passed]

        return combine

    def _scf_for(self, operation):
        start, stop, step, *initial = self._numbers_of(operation.operands)
        [block] = operation.regions[0].blocks
        index, *carried = self._numbers_of(block.arguments)
        (code, passed), results = self._block(block), self._numbers_of(operation.results)
        dtype = _dtype(operation.operands[0])

        def run(values, launch):
            state = [values[number] for number in initial]
            for i in range(*(int(values[number]) for number in (start, stop, step))):
                _assign(values, [index, *carried], [np.asarray(i, dtype), *state])
                _run(code, values, launch)
                state = [values[number] for number in passed]
            _assign(values, results, state)

        return run

    def _scf_while(self, operation):
        initial, results = self._numbers_of(operation.operands), self._numbers_of(operation.results)
        [[test], [body]] = ([*region.blocks] for region in operation.regions)
        tested, (test_code, found) = self._numbers_of(test.arguments), self._block(test)
        carried, (code, passed) = self._numbers_of(body.arguments), self._block(body)

        def run(values, launch):
            state = [values[number] for number in initial]
            while True:
                _assign(values, tested, state)
                _run(test_code, values, launch)
                more, *state = (values[number] for number in found)
                if not more:
                    break
                _assign(values, carried, state)
                _run(code, values, launch)
                state = [values[number] for number in passed]
            _assign(values, results, state)

        return run

    def _scf_if(self, operation):
        [condition], results = (
            self._numbers_of(operation.operands), self._numbers_of(operation.results),
        )  # fmt: skip
        branches = [
            self._block(region.blocks[0]) if len(region.blocks) else ([], [])
            for region in operation.regions
        ]

        def run(values, launch):
            code, passed = branches[0 if values[condition] else 1]
            _run(code, values, launch)
            _assign(values, results, [values[number] for number in passed])

        return run


def _run(code, values, launch):
    for run in code:
        run(values, launch)


def _assign(values, numbers, new):
    for number, value in zip(numbers, new, strict=True):
        values[number] = value


# ------------------------------------------------------------------------------------------------
# Operations without side effects
# ------------------------------------------------------------------------------------------------


def _function(operation) -> Callable[..., np.ndarray]:
    """Returns an operation as a function of arrays.

    Raises:
      NotImplementedError: no kernel used it so far.
    """
    name, result = operation.name, operation.results[0]
    if name in _ORDINARY:
        return _ORDINARY[name]
    if name == "arith.constant":
        constant = _constant(operation.attributes["value"], result)
        return lambda: constant
    if name in ("tt.splat", "tt.broadcast"):
        shape = _shape(result)
        return lambda x: np.broadcast_to(x, shape)
    if name == "tt.make_range":
        numbers = np.arange(_integer(operation, "start"), _integer(operation, "end"))
        return lambda: numbers
    if name == "tt.expand_dims":
        axis = _integer(operation, "axis")
        return lambda x: np.expand_dims(x, axis)
    if name == "tt.trans":
        order = list(operation.attributes["order"])
        return lambda x: np.transpose(x, order)
    if name == "tt.addptr":
        size = _pointee(result).itemsize
        return lambda pointer, offset: pointer + np.asarray(offset, np.int64) * size
    if name == "tt.bitcast":
        dtype = _dtype(result)
        return lambda x: x if dtype is None else _view(x, dtype)
    if name == "arith.cmpi":
        return _INTEGER_COMPARISONS[_integer(operation, "predicate")]
    if name == "arith.cmpf":
        return _FLOAT_COMPARISONS[_integer(operation, "predicate")]
    if name == "tt.dot":
        truncated = _integer(operation, "inputPrecision") == _TF32
        return lambda x, y, total: _dot(x, y, total, truncated)
    if name == "tt.elementwise_inline_asm":
        return _ASSEMBLY[ir.StringAttr(operation.attributes["asm_string"]).value]
    if name == "tt.extern_elementwise":
        return _LIBRARY[ir.StringAttr(operation.attributes["symbol"]).value]
    raise NotImplementedError(str(operation))


def _constant(attribute, result):
    if not str(result.type).startswith("tensor"):
        return attribute.value
    return np.broadcast_to(ir.DenseElementsAttr(attribute).get_splat_value().value, _shape(result))


def _dot(x, y, total, truncated):
    if truncated and x.dtype == np.float32:
        # Tensor cores ignore the last 13 bits of the mantissa.
        x, y = (_view(_view(a, np.uint32) & np.uint32(0xFFFFE000), np.float32) for a in (x, y))
    return np.matmul(x.astype(float), y.astype(float)) + total


def _view(x, dtype):
    return np.ascontiguousarray(x).view(dtype).reshape(np.shape(x))


def _unsigned(x):
    x = np.asarray(x)
    return x.astype(np.uint8) if x.dtype == bool else _view(x, f"u{x.itemsize}")


def _of_unsigned(function):
    return lambda x, y: _view(function(_unsigned(x), _unsigned(y)), np.asarray(x).dtype)


def _in_float32(function):
    """Lets a function round once: numpy's types of 16 bits may lack it."""

    def run(*args):
        if np.asarray(args[0]).dtype not in _SMALL_FLOATS:
            return function(*args)
        return function(*(np.asarray(x, np.float32) for x in args))

    return run


def _quotient(x, y):
    return np.trunc(np.asarray(x, float) / y)  # towards 0; exact up to 32 bits


def _flushed(x):
    """Returns float32 numbers with 0 in place of subnormal ones."""
    x = np.asarray(x, np.float32)
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _sign_extended(x):
    return -x.astype(np.int8) if x.dtype == bool else x


def _leading_zeros(x):
    return 32 - np.frexp(_unsigned(x).astype(float))[1]


def _same(x):
    return x


_ORDINARY = {
    "arith.addi": np.add, "arith.subi": np.subtract, "arith.muli": np.multiply,
    "arith.andi": np.bitwise_and, "arith.ori": np.bitwise_or, "arith.xori": np.bitwise_xor,
    "arith.shli": np.left_shift, "arith.shrsi": np.right_shift,
    "arith.shrui": _of_unsigned(np.right_shift), "arith.divsi": _quotient,
    "arith.remsi": lambda x, y: x - _quotient(x, y) * y,
    "arith.divui": _of_unsigned(np.floor_divide), "arith.remui": _of_unsigned(np.remainder),
    "arith.minsi": np.minimum, "arith.maxsi": np.maximum,
    "arith.minui": _of_unsigned(np.minimum), "arith.maxui": _of_unsigned(np.maximum),
    "arith.addf": _in_float32(np.add), "arith.subf": _in_float32(np.subtract),
    "arith.mulf": _in_float32(np.multiply), "arith.divf": _in_float32(np.divide),
    "arith.minnumf": _in_float32(np.fmin), "arith.maxnumf": _in_float32(np.fmax),
    "arith.select": np.where, "arith.uitofp": _unsigned, "arith.extui": _unsigned,
    "arith.extsi": _sign_extended, "arith.sitofp": _same, "arith.fptosi": np.trunc,
    "arith.extf": _same, "arith.truncf": _same, "arith.trunci": _same,
    "math.exp": _in_float32(np.exp), "math.log": _in_float32(np.log),
    "math.sqrt": _in_float32(np.sqrt), "math.absf": np.abs, "math.absi": np.abs,
}  # fmt: skip
_COMPARISONS = (operator.eq, operator.gt, operator.ge, operator.lt, operator.le)
_INTEGER_COMPARISONS = [
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
    *(
        lambda x, y, compare=compare: compare(_unsigned(x), _unsigned(y))
        for compare in (operator.lt, operator.le, operator.gt, operator.ge)
    ),
]  # fmt: skip


def _is_nan(x, y):
    return np.isnan(x) | np.isnan(y)


_FLOAT_COMPARISONS = dict(
    [
        *enumerate(_COMPARISONS, start=1),  # false if a number is NaN
        (6, lambda x, y: (x != y) & ~_is_nan(x, y)),
        (7, lambda x, y: ~_is_nan(x, y)),
        *(
            (i, lambda x, y, compare=compare: compare(x, y) | _is_nan(x, y))
            for i, compare in enumerate(_COMPARISONS, start=8)
        ),
        (13, operator.ne),
        (14, _is_nan),
    ]
)
_ASSEMBLY = {
    "fma.rn.f32 $0, $1, $2, $3;": lambda x, y, z: np.asarray(x, float) * y + z,
    "ex2.approx.ftz.f32 $0, $1;": lambda x: _flushed(np.exp2(_flushed(x).astype(float))),
    "rcp.approx.ftz.f32 $0, $1;": lambda x: _flushed(1 / _flushed(x)),
    "max.NaN.f32 $0, $1, $2;": np.maximum,
    "min.NaN.f32 $0, $1, $2;": np.minimum,
    "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;": _same,
    "cvt.rn.bf16x2.f32 $0, $2, $1;": _same,
}
_LIBRARY = {
    "__nv_rsqrtf": lambda x: 1 / np.sqrt(np.asarray(x, float)), "__nv_sqrtf": np.sqrt,
    "__nv_expf": np.exp, "__nv_exp2f": np.exp2, "__nv_logf": np.log, "__nv_log2f": np.log2,
    "__nv_fabsf": np.abs, "__nv_clz": _leading_zeros,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Types and attributes
# ------------------------------------------------------------------------------------------------


def _shape(value):
    kind = value.type
    return tuple(ir.RankedTensorType(kind).shape) if str(kind).startswith("tensor") else ()


def _element(value):
    kind = value.type
    return str(ir.RankedTensorType(kind).element_type if str(kind).startswith("tensor") else kind)


def _dtype(value):
    """Returns the type of a number or of a tensor's elements; None: addresses."""
    element = _element(value)
    return None if element.startswith("!tt.ptr") else _TYPES[element]


def _pointee(value):
    return _TYPES[_element(value).removeprefix("!tt.ptr<").removesuffix(">").split(",")[0]]


def _integer(operation, attribute):
    return ir.IntegerAttr(operation.attributes[attribute]).value


def _where(operation):
    return str(operation)[:120]
