"""A counter-example replayed: what the solver found is false of the code with the fault, and of that code alone.

The functions of the claim are run on the values of the counter-example: as public ops, which must give what the sources
say; and with the fault, on NumPy itself where the fault is in the reference, which must give something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantlib.proof import terms
from quantlib.proof.sources import Sources, unedited
from quantlib.proof.terms import Array, Term
from quantlib.proof.theorem import REFERENCE, Call, Fault, Function, Run

TO_NUMPY = {"float32": np.float32, "float64": np.float64}


class UnfaithfulError(AssertionError):
    """A counter-example that the code does not confirm."""


def replay(fault: Fault, model: Mapping[str, int], run: Run, claim: Any) -> str:
    """Confirm ``model``, which refutes ``claim`` built by ``run``; return the confirmation in words.

    Raises
    ------
    UnfaithfulError
        Where the ops differ from the sources without the fault, or the fault changes nothing.
    """
    expect(bool(terms.evaluate(claim.assume, model)), "the counter-example is outside of the domain")
    expect(not terms.evaluate(claim.goal, model), "the counter-example does not refute the claim")
    said = [f"{name} = {text}" for name, text in sorted(shown(run, model).items())]
    if fault.edits:
        right = Run(unedited())
        restored = fault.case.build(right)
        expect(bool(terms.evaluate(restored.goal, model)), "the claim is false without the fault too")
    else:
        right = run
    changed = not fault.edits
    for wrong_call, right_call in zip(run.calls, right.calls, strict=True):
        function, wrong, correct = wrong_call.function, outputs(wrong_call, model), outputs(right_call, model)
        if function.op is not None:
            inputs = arrays(right_call.inputs, function, model)
            got = function.op(**inputs)
            listed = got if isinstance(got, tuple) else (got,)
            for (name, want), value in zip(correct.items(), listed, strict=True):
                expect(
                    same_bits(want, int(value[0]), function, name),
                    f"{function.name} of the op gives {value[0]:#x}, the sources {want:#x}",
                )
        if wrong != correct:
            changed = True
            if wrong_call.language == REFERENCE:
                confirm_on_numpy(wrong_call, run.sources, wrong, model)
    expect(changed, "the fault changes nothing")
    if fault.confirm is not None:
        try:
            fault.confirm(model)
        except AssertionError as error:
            raise UnfaithfulError(str(error)) from None
    return ", ".join(said)


def confirm_on_numpy(call: Call, sources: Sources, wrong: dict[str, int], model: Mapping[str, int]) -> None:
    """The faulty reference, run by NumPy, gives what its terms say."""
    inputs = arrays(call.inputs, call.function, model)
    with np.errstate(all="ignore"):
        got = call.function.reference(sources.running, **{name: value.reshape(1, 1) for name, value in inputs.items()})
    listed = got if isinstance(got, tuple) else (got,)
    for (name, want), value in zip(wrong.items(), listed, strict=True):
        found = int(np.asarray(value).reshape(-1).view(f"uint{8 * np.asarray(value).itemsize}")[0])
        both_nan = is_nan(want, call.function.outputs[name]) and is_nan(found, call.function.outputs[name])
        expect(found == want or both_nan, f"the faulty {call.function.name} gives {found:#x}, its terms {want:#x}")


def outputs(call: Call, model: Mapping[str, int]) -> dict[str, int]:
    """The bits of the outputs."""
    return {name: value_bits(term, model) for name, term in call.outputs.items()}


def value_bits(term: Term, model: Mapping[str, int]) -> int:
    return int(terms.evaluate(terms.bits_of(term) if term.sort.kind == "float" else term, model))


def arrays(inputs: Mapping[str, Term], function: Function, model: Mapping[str, int]) -> dict[str, Array]:
    """The inputs as arrays of one element, of their own types."""
    out = {}
    for name, type in function.inputs.items():
        bits = value_bits(inputs[name], model)
        width = int("".join(c for c in type if c.isdigit()))
        out[name] = np.array([bits], f"uint{width}").view(type)
    return out


def same_bits(want: int, got: int, function: Function, name: str) -> bool:
    """An op that sums up has no -0; a code comes in its own width, and an int4 in a nibble."""
    type = function.outputs[name]
    if function.sums:
        want, got = (0 if value == 1 << 31 else value for value in (want, got))
    if type == "int32":
        return (want - got) % (1 << function.code_bits) == 0
    return want == got or (is_nan(want, type) and is_nan(got, type) and function.sums)


def is_nan(bits: int, type: str) -> bool:
    return type == "float32" and bits & 0x7FFFFFFF > 0x7F800000


def shown(run: Run, model: Mapping[str, int]) -> dict[str, str]:
    """The inputs of the functions, in words."""
    out: dict[str, str] = {}
    for call in run.calls:
        for name, term in call.inputs.items():
            if term.op == "const" or name in out:
                continue
            bits = value_bits(term, model)
            if call.function.inputs[name] == "float32":
                out[name] = f"{np.array(bits, np.uint32).view(np.float32)[()]:.9g} ({bits:#010x})"
            else:
                signed = call.function.inputs[name].startswith("int") and bits >> (term.sort.bits - 1)
                out[name] = str(bits - (1 << term.sort.bits) if signed else bits)
    return out


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UnfaithfulError(otherwise)
