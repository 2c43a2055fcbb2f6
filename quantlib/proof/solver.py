"""An SMT solver asked whether a script can be satisfied: proven, refuted with a counter-example, or undecided."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass

PROVEN, REFUTED, UNDECIDED = "proven", "refuted", "undecided"
INSTALL = "pip install bitwuzla"


@dataclass(frozen=True)
class Answer:
    """The solver's answer to the negation of a claim."""

    verdict: str
    seconds: float  # of this process: what else the machine does is not counted
    model: dict[str, int]  # the bits of every declared constant, where it is refuted
    why: str = ""  # the reason if it is undecided


def missing(solver: str = "bitwuzla") -> str | None:
    """Return why ``solver`` cannot be asked, or None."""
    module = {"z3": "z3", "cvc5": "cvc5", "bitwuzla": "bitwuzla"}[solver]
    if importlib.util.find_spec(module) is None:
        return f"{solver} is not installed ({INSTALL.replace('bitwuzla', PACKAGES[solver])})"
    return None


PACKAGES = {"bitwuzla": "bitwuzla", "z3": "z3-solver", "cvc5": "cvc5"}


def version(solver: str) -> str:
    from importlib.metadata import version

    return f"{solver} {version(PACKAGES[solver])}"


def ask(script: str, limit: float, solver: str = "bitwuzla") -> Answer:
    """Ask ``solver`` about a script of SMT-LIB, for at most ``limit`` seconds of this process."""
    started = time.process_time()
    result, model = ASK[solver](script, limit)
    seconds = time.process_time() - started
    if result == "unsat":
        return Answer(PROVEN, seconds, {})
    if result == "sat":
        return Answer(REFUTED, seconds, model)
    return Answer(UNDECIDED, seconds, {}, f"{solver} answers {result} after {seconds:.1f} s of {limit:.0f} s")


def _bitwuzla(script: str, limit: float) -> tuple[str, dict[str, int]]:
    import bitwuzla

    options = bitwuzla.Options()
    options.set(bitwuzla.Option.PRODUCE_MODELS, True)
    parser = bitwuzla.Parser(bitwuzla.TermManager(), options)
    end = time.process_time() + limit
    parser.configure_terminator(lambda: time.process_time() > end)
    parser.parse(script, True, False)
    instance = parser.bitwuzla()
    result = str(instance.check_sat())
    if result != "sat":
        return result, {}
    constants = [f for f in parser.get_declared_funs() if not f.sort().is_fun()]
    values = {f.symbol().strip("|"): instance.get_value(f).value(2) for f in constants}
    return result, {name: int(v, 2) if isinstance(v, str) else int(v) for name, v in values.items()}


def _z3(script: str, limit: float) -> tuple[str, dict[str, int]]:
    import z3

    instance = z3.SolverFor("QF_FPBV")
    instance.set("timeout", int(1000 * limit))
    instance.from_string(script)
    result = str(instance.check())
    if result != "sat":
        return result, {}
    model = instance.model()
    values = {d.name(): model[d] for d in model.decls()}
    return result, {n: v.as_long() if z3.is_bv_value(v) else int(z3.is_true(v)) for n, v in values.items()}


def _cvc5(script: str, limit: float) -> tuple[str, dict[str, int]]:
    import cvc5

    instance = cvc5.Solver(cvc5.TermManager())
    instance.setOption("tlimit-per", str(int(1000 * limit)))
    instance.setOption("fp-exp", "true")  # floats other than float32 and float64
    parser = cvc5.InputParser(instance)
    parser.setStringInput(cvc5.InputLanguage.SMT_LIB_2_6, script, "claim")
    symbols, said = parser.getSymbolManager(), ""
    while not (command := parser.nextCommand()).isNull():
        said += command.invoke(instance, symbols)
    return said.strip(), {}


ASK: dict[str, Callable[[str, float], tuple[str, dict[str, int]]]] = {
    "bitwuzla": _bitwuzla,
    "z3": _z3,
    "cvc5": _cvc5,
}
