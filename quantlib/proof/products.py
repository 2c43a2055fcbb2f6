"""Theorems of products and sums: C11."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import numpy as np

from quantlib.proof import functions, terms
from quantlib.proof.description import IntDescription, float_row, int_row, widened
from quantlib.proof.terms import F64, Term, and_, bits, float_const, float_sort, fp, ite, not_, or_
from quantlib.proof.theorem import (
    NUMERICS_PY,
    REFERENCE,
    Case,
    Claim,
    Fault,
    Run,
    Theorem,
    edit,
    float_variable,
    int_variable,
)

# ---- integers -------------------------------------------------------------------------------------------------------

CHOICES = [
    (x, w, xz, wz)
    for x, w in (("int8", "int8"), ("int8", "int4"), ("uint8", "int8"))
    for xz in (False, True)
    for wz in (False, True)
]
CONTRACT_K = 131071  # the limit of C11 for int8 without zero points
WIDTH = 64


@functools.cache
def accepted(x: str, w: str, x_zero: bool, w_zero: bool) -> int:
    """The largest K that scaled_matmul does not refuse, asked of the op with tensors that have no memory."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from quantlib import ops

    def accepts(K: int) -> bool:
        one, zero = torch.empty(1, 1), torch.empty(1, 1, dtype=torch.int32)
        dtype = getattr(torch, int_row(w).dtype_name)
        codes = torch.empty(1, K // 2 if int_row(w).packed else K, dtype=dtype)
        x_codes, x_z, z = torch.empty(1, K, dtype=getattr(torch, x)), zero if x_zero else None, zero if w_zero else None
        try:
            ops.scaled_matmul(x_codes, one, codes, one, w, block=(1, K), x_zero_point=x_z, zero_point=z)
        except RuntimeError as error:
            if "so that an int32 holds the sum" not in str(error):
                raise
            return False
        return True

    step = 2 if int_row(w).packed else 1  # K is even, so that every byte is full
    low, high = 1, 1 << 40
    with FakeTensorMode():
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if accepts(step * middle) else (low, middle)
    return step * low


def extent(name: str, zero: bool) -> tuple[int, int]:
    """The lowest and the highest code less its zero point."""
    code = IntDescription(int_row(name), affine=True)
    return (code.qmin - code.qmax, code.qmax - code.qmin) if zero else (code.qmin, code.qmax)


def fits(x: str, w: str, x_zero: bool, w_zero: bool, more: int = 0) -> Case:
    """Induction over the terms: before the last of K terms the sum is at most K - 1 times the largest product."""

    def build(run: Run) -> Claim:
        K = accepted(x, w, x_zero, w_zero) + more
        largest = largest_product(x, w, x_zero, w_zero)
        partial, product = int_variable("partial", WIDTH), int_variable("product", WIDTH)
        total = terms.add(partial, product)
        number = terms.TRUE
        if (x, w, x_zero, w_zero) == ("int8", "int8", False, False):
            number = terms.TRUE if CONTRACT_K + more == K else terms.FALSE
        return Claim(
            and_(within(partial, (K - 1) * largest), within(product, largest)),
            and_(number, within(total, K * largest), terms.sle(total, bits((1 << 31) - 1, WIDTH))),
        )

    return Case(operands(x, w, x_zero, w_zero), build)


def product_fits(x: str, w: str, x_zero: bool, w_zero: bool, less: int = 0) -> Case:
    """The product of two codes less their zero points."""

    def build(run: Run) -> Claim:
        a, b = int_variable("a", 20), int_variable("b", 20)
        inside = [
            and_(terms.sle(bits(low, 20), v), terms.sle(v, bits(high, 20)))
            for v, (low, high) in ((a, extent(x, x_zero)), (b, extent(w, w_zero)))
        ]
        return Claim(and_(*inside), within(terms.mul(a, b), largest_product(x, w, x_zero, w_zero) - less))

    return Case(operands(x, w, x_zero, w_zero), build)


def operands(x: str, w: str, x_zero: bool, w_zero: bool) -> str:
    shown = [f"{name}{' with zero points' if zero else ''}" for name, zero in ((x, x_zero), (w, w_zero))]
    return " times ".join(shown)


def within(value: Term, limit: int) -> Term:
    width = value.sort.bits
    return and_(terms.sle(bits(-limit, width), value), terms.sle(value, bits(limit, width)))


def largest_product(x: str, w: str, x_zero: bool, w_zero: bool) -> int:
    return max(abs(a * b) for a in extent(x, x_zero) for b in extent(w, w_zero))


def refuses(x: str, w: str, x_zero: bool, w_zero: bool) -> None:
    """The op takes the largest K, of the codes whose sum is the largest, exactly; and refuses one more."""
    import torch

    from quantlib import ops

    K = accepted(x, w, x_zero, w_zero)
    (low, high), (w_low, w_high) = extent(x, x_zero), extent(w, w_zero)
    pairs = [(a, b) for a in (low, high) for b in (w_low, w_high)]
    a, b = max(pairs, key=lambda pair: abs(pair[0] * pair[1]))
    one = torch.ones(1, 1)

    def operand(name: str, value: int, zero: bool, size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        code = IntDescription(int_row(name), affine=True)
        z = (code.qmax if value < 0 else code.qmin) if zero else 0
        codes = torch.full((1, size), value + z, dtype=getattr(torch, name))
        return codes, torch.full((1, 1), z, dtype=torch.int32) if zero else None

    for size in (K, K + 1):
        x_codes, x_z = operand(x, a, x_zero, size)
        codes, z = operand(w, b, w_zero, size)
        try:
            y = ops.scaled_matmul(x_codes, one, codes, one, w, block=(1, size), x_zero_point=x_z, zero_point=z)
        except RuntimeError:
            if size == K:
                raise
            continue
        if size > K or y.item() != np.float32(a * b * size):
            raise AssertionError(f"scaled_matmul of K = {size} must give {a * b * K}, got {y.item()}")


def exact_sums(limit: int = 1 << 24, whole: bool = True, long: bool = False) -> Case:
    def build(run: Run) -> Claim:
        a, b = float_variable("a"), float_variable("b")
        exact = fp("add", widened(a), widened(b))  # of integers below 2^53
        small = [
            fp("leq", fp("abs", v), float_const(float(limit), v.sort)) for v in ((a, b, exact) if whole else (a, b))
        ]
        integers = [fp("eq", fp("roundToIntegral", v), v) for v in (a, b)]
        return Claim(and_(*small, *integers), fp("eq", widened(fp("add", a, b)), exact))

    return Case(f"float32, up to 2^{limit.bit_length() - 1}", build, long=long)


# ---- the bound of a float sum ---------------------------------------------------------------------------------------

F16, SIGNIFICANT = float_sort(5, 10), 11


def one_rounding(op: str, factor: float = 1.0, long: bool = False) -> Case:
    """fl(a op b) = (a op b)(1 + d) with |d| <= 2^-p where the result is normal: the step that the bound is made of."""

    def build(run: Run) -> Claim:
        a, b = (terms.float_of(int_variable(name, 16), F16) for name in ("a", "b"))
        got = widened(fp(op, a, b))
        exact = fp(op, widened(a), widened(b))  # exact in float64
        error = fp("abs", fp("sub", got, exact))
        bound = fp("mul", float_const(factor * 2.0**-SIGNIFICANT, F64), fp("abs", exact))
        finite = [not_(or_(fp("isNaN", v), fp("isInfinite", v))) for v in (a, b, fp(op, a, b))]
        # A sum that is subnormal is exact; a product has to be normal.
        normal = or_(fp("leq", float_const(2.0**-14, F64), fp("abs", exact)), fp("isZero", exact))
        return Claim(and_(*finite, terms.TRUE if op == "add" else normal), fp("leq", error, bound))

    return Case("a sum" if op == "add" else "a product", build, long=long)


# The solver searches integers up to 2^6 for products, with operations that err by at most 2^-4 of their results.
PRODUCT_BITS, PLACES = 6, 4
SUM_WIDTH = PRODUCT_BITS + PLACES + 10


def sum_bound(
    K: int, ascending: bool = True, sixteenths: int = 16, underflow: bool = False, long: bool = False
) -> Case:
    """The bound in integers of a small unit: any rounding of v is within u |v| of it, and nothing else is used.

    |sum - exact| <= 2 K 2 u sum |x||w|, or so many sixteenths of that.
    """

    def build(run: Run) -> Claim:
        inside: list[Term] = []

        def rounded(exact: Term, name: str) -> Term:
            """Some value within u of ``exact``, relative to it."""
            value = int_variable(name, SUM_WIDTH)
            error = size(terms.sub(value, exact))
            most = size(exact)
            if underflow:  # and half of the smallest subnormal, which is the unit
                most = terms.add(most, bits(1 << PLACES, SUM_WIDTH))
            inside.extend([within(value, 1 << (PRODUCT_BITS + 3)), terms.sle(terms.shl(error, PLACES), most)])
            return value

        exact = [int_variable(f"product{k}", SUM_WIDTH) for k in range(K)]
        inside += [within(v, 1 << PRODUCT_BITS) for v in exact]
        products = [rounded(v, f"rounded{k}") for k, v in enumerate(exact)]
        if ascending:
            total = products[0]
            for k, product in enumerate(products[1:]):
                total = rounded(terms.add(total, product), f"sum{k}")
        else:
            halves = [
                rounded(terms.add(a, b), f"sum{i}")
                for i, (a, b) in enumerate(zip(products[::2], products[1::2], strict=True))
            ]
            total = rounded(terms.add(*halves), "sum")
        difference = size(terms.sub(total, functools.reduce(terms.add, exact)))
        magnitudes = functools.reduce(terms.add, map(size, exact))
        # 4 K u / 16 = K u / 4
        bound = terms.mul(magnitudes, bits(K * sixteenths, SUM_WIDTH))
        return Claim(and_(*inside), terms.sle(terms.shl(difference, PLACES + 2), bound))

    return Case(f"K = {K}, {'ascending' if ascending else 'in pairs'}", build, long=long)


def size(value: Term) -> Term:
    return ite(terms.slt(value, bits(0, value.sort.bits)), terms.neg(value), value)


def on_the_op(model: Mapping[str, int]) -> None:
    """Check on float32 what small floats show: products below 2^-150 are lost, and the bound with them."""
    import torch

    from quantlib import ops, reference

    x = torch.full((1, 2), 2.0**-75)
    y = ops.dequant_matmul(x, x.bfloat16(), torch.ones(1, 1), "bfloat16", block=(1, 2))  # no scale follows the sum
    exact, w = 2.0**-149, np.full((1, 2), 2.0**-75, np.float32)
    bound = reference.matmul.bound(x.numpy(), w)[0, 0] + 2.0**-150  # and half a unit in the last place of y
    if abs(y.item() - exact) <= bound:
        raise AssertionError(f"the sum of two products that underflow is {y.item()}, which C11 would allow")


def tight(model: Mapping[str, int]) -> None:
    """Check the bound on float32: 1 + 2^-24 is 1."""
    import torch

    from quantlib import ops, reference

    x, codes = torch.tensor([[1.0, 2.0**-24]]), torch.ones(1, 2, dtype=torch.int8)
    y = ops.dequant_matmul(x, codes, torch.ones(1, 1), "int8", block=(1, 2))
    bound = reference.matmul.bound(x.numpy(), np.ones((1, 2), np.float32))[0, 0]
    if abs(y.item() - (1 + 2.0**-24)) <= bound / 16:
        raise AssertionError(f"the sum of 1 and 2^-24 is {y.item()}, within a sixteenth of the bound")


# ---- parts of bfloat16 ----------------------------------------------------------------------------------------------


def parts(run: Run, x: Term, count: int) -> tuple[list[Term], Term]:
    """x as ``count`` values of bfloat16, each that of the rest, and what is left."""
    f = float_row("bfloat16")
    found, rest = [], x
    for _ in range(count):
        code = run(functions.encode_float(f, False), REFERENCE, x=rest)
        part = run(functions.decode_float(f), REFERENCE, code=terms.resize(code, 32))
        found.append(part)
        rest = fp("sub", rest, part)
    return found, rest


SMALLEST_SPLIT = 2.0**-110  # below it the last part may need a place that is smaller than bfloat16's subnormals have


def split(count: int, smallest: float = SMALLEST_SPLIT, exact: bool | None = None) -> Case:
    def build(run: Run) -> Claim:
        x = float_variable("x")
        _, rest = parts(run, x, count)
        largest = float_const(float.fromhex("0x1.fep127"))  # numbers that do not overflow
        inside = and_(fp("leq", fp("abs", x), largest), fp("leq", float_const(smallest), fp("abs", x)))
        if exact if exact is not None else count == 3:
            return Claim(inside, fp("isZero", rest))
        bound = fp("mul", widened(fp("abs", x)), float_const(2.0 ** (1 - 9 * count), F64))
        return Claim(inside, fp("leq", widened(fp("abs", rest)), bound))

    return Case(f"{count} parts", build, "bfloat16")


def subtraction_is_exact() -> Case:
    """The rest after a part is a float32: nothing is lost in taking the part away."""

    def build(run: Run) -> Claim:
        x = float_variable("x")
        (part,), rest = parts(run, x, 1)
        largest = float_const(float.fromhex("0x1.fep127"))
        difference = fp("sub", widened(x), widened(part))  # exact: 32 places hold both
        return Claim(fp("leq", fp("abs", x), largest), fp("eq", widened(rest), difference))

    return Case("float32 less its bfloat16", build, "bfloat16")


def theorems() -> Iterator[Theorem]:
    yield Theorem(
        "the product of two codes has a largest value",
        "C11",
        "|(q_x - z_x)(q_w - z_w)| is at most the product of the largest magnitudes.",
        "all codes and zero points",
        tuple(product_fits(*choice) for choice in CHOICES),
        (
            Fault("one less", product_fits("int8", "int8", False, False, less=1)),
            Fault("one less", product_fits("uint8", "int8", True, True, less=1)),
        ),
    )
    yield Theorem(
        "an int32 holds every sum that scaled_matmul takes",
        "C11",
        "with K up to what the op refuses beyond, 131071 for int8 without zero points, no partial sum leaves int32: "
        "each term adds at most the largest product.",
        "all partial sums and products, the largest K that is not refused",
        tuple(fits(*choice) for choice in CHOICES),
        (
            Fault(
                "one more term",
                fits("int8", "int8", False, False, more=1),
                confirm=lambda model: refuses("int8", "int8", False, False),
            ),
            Fault(
                "one more term",
                fits("uint8", "int8", True, False, more=1),
                confirm=lambda model: refuses("uint8", "int8", True, False),
            ),
        ),
    )
    yield Theorem(
        "sums of integers are exact in float32 up to 2^24",
        "C11",
        "fl(a + b) = a + b for integers whose sum, as they, is within 2^24: where every partial sum is that, every "
        "order of a sum gives the same bytes.",
        "all pairs of integers within 2^24",
        (exact_sums(long=True), exact_sums(limit=1 << 12)),
        (
            Fault("up to 2^25", exact_sums(1 << 25)),
            Fault("the sum beyond 2^24", exact_sums(whole=False)),
        ),
    )
    yield Theorem(
        "one operation errs by 2^-p of its result",
        "C11",
        "fl(a + b) = (a + b)(1 + d) and, where the product is normal, fl(a b) = a b (1 + d), |d| <= 2^-p with p "
        "significant bits.",
        "all pairs of float16, p = 11",
        (one_rounding("add", long=True), one_rounding("mul")),
        (
            Fault("half of that", one_rounding("add", factor=0.5)),
            Fault("half of that", one_rounding("mul", factor=0.5)),
        ),
    )
    yield Theorem(
        "the bound of a float sum",
        "C11",
        "|sum - exact| <= 4 K u sum |x||w| if every product and every sum errs by at most u of its result, in any "
        "order; 2 K 2^-23 = 4 K u for float32's u = 2^-24. By hand for every K: the K roundings on the way of a term "
        "give (1 + u)^K - 1 <= 2 K u for K u <= 1/2, which is half of the bound.",
        "u = 2^-4, products up to 2^6 units, any roundings within u, K = 2 to 4; not where a product underflows",
        (sum_bound(2), sum_bound(3), sum_bound(4, ascending=False, long=True)),
        (
            Fault("with products that underflow", sum_bound(2, underflow=True), confirm=on_the_op),
            Fault("a sixteenth of the bound", sum_bound(2, sixteenths=1), confirm=tight),
        ),
    )
    yield Theorem(
        "a float32 less its bfloat16 is exact",
        "C11",
        "x - bfloat16(x) is a float32.",
        "all float32 that do not overflow bfloat16",
        (subtraction_is_exact(),),
        (
            Fault(
                "truncated twice",
                subtraction_is_exact(),
                edit(
                    NUMERICS_PY,
                    "r = a + ((a >> np.uint32(shift))",
                    "r = np.uint32(0x3F800000) + ((a >> np.uint32(shift))",
                ),
            ),
            Fault(
                "rounded to nothing",
                subtraction_is_exact(),
                edit(
                    NUMERICS_PY,
                    "r = np.minimum(r, np.int32(f.max_code if saturate else f.overflow_code))",
                    "r = np.int32(0x4000) | (r & np.int32(1))",
                ),
            ),
        ),
    )
    yield Theorem(
        "two parts of bfloat16 keep 17 bits, three all",
        "C11",
        "x - b1 is at most 2^-8 |x|, x - b1 - b2 at most 2^-17 |x|, and x = b1 + b2 + b3, each part the bfloat16 of "
        "what is left.",
        "all float32 from 2^-110 to bfloat16's overflow",
        (split(1), split(2), split(3)),
        (
            Fault("two parts are all", split(2, exact=True)),
            Fault("three parts are all of the smallest too", split(3, smallest=2.0**-149)),
        ),
    )
