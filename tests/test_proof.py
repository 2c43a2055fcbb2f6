"""The numeric contract proven: theorems, planted faults that are found and replayed, and the reading of the sources."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from quantlib import formats
from quantlib.cli import main
from quantlib.proof import catalogue, cxx, functions, prove, replay, solver, symbolic, terms
from quantlib.proof.__main__ import main as prove_main
from quantlib.proof.description import FloatDescription, IntDescription
from quantlib.proof.prove import Question
from quantlib.proof.report import report, write
from quantlib.proof.sources import CSRC, PACKAGE, Edit, Sources
from quantlib.proof.theorem import (
    HEADER,
    LANGUAGES,
    REFERENCE,
    Case,
    Fault,
    Function,
    Run,
    float_variable,
    int_variable,
)
from quantlib.proof.words import TYPES
from quantlib.testing import values

ROOT = Path(__file__).resolve().parent.parent
needs_solver = pytest.mark.skipif(solver.missing() is not None, reason=str(solver.missing()))
LIMIT = 120.0  # seconds of one core for one case
QUICK = ("float4_e2m1fn", "int4")  # `make prove` takes them all
THEOREMS = catalogue.theorems()
ids = [t.name for t in THEOREMS]


def question(name: str, label: str) -> Question:
    labels = [case.label for case in catalogue.theorem(name).cases]
    return Question(name, labels.index(label), fault=False)


def nearest(label: str) -> Question:
    return question("cast rounds once to nearest, ties to even", label)


# ---- theorems -------------------------------------------------------------------------------------------------------


@needs_solver
@pytest.mark.parametrize("theorem", THEOREMS, ids=ids)
def test_a_theorem_holds_and_its_faults_are_found(theorem: catalogue.Theorem) -> None:
    asked = [q for q in prove.questions(theorem=theorem.name) if q.theorem == theorem.name]
    for q in asked:
        if not q.fault and q.case.format not in (None, *QUICK):
            continue
        result = prove.answer(q, LIMIT)
        assert (result.verdict, result.wrong) == (solver.REFUTED if q.fault else solver.PROVEN, ""), q


@pytest.mark.parametrize("theorem", THEOREMS, ids=ids)
def test_every_theorem_has_two_faults_and_is_named_in_the_documents(theorem: catalogue.Theorem) -> None:
    assert len(theorem.faults) >= 2
    labels = [case.label for case in theorem.cases]
    assert len(set(labels)) == len(labels)
    assert len([t for t in THEOREMS if t.name == theorem.name]) == 1
    if (ROOT / "docs").is_dir():
        assert theorem.name.replace("|", "\\|") in (ROOT / "docs/proof.md").read_text()
        assert theorem.name in (ROOT / "docs/contract.md").read_text()


def test_each_function_is_proven_in_both_languages() -> None:
    for theorem in THEOREMS:
        told = {case.label.rpartition(", ")[2] for case in theorem.cases}
        if told & set(LANGUAGES):
            assert told == set(LANGUAGES) or theorem.name in ONE_LANGUAGE, theorem.name


# Other theorems say of both languages which result is the right one, so that what follows from it holds for both.
ONE_LANGUAGE = (
    "a cast is idempotent",
    "a cast is monotone",
    "a cast is symmetric",
    "a cast errs by at most half a step",
    "a projection is monotone",
    "a symmetric projection is symmetric",
    "a projection errs by at most half a step",
    "c - t is exact",
    "a symmetric scale times Q brackets amax",
    "the largest value of a block gets the largest code",
    "round trip: quantize(dequantize(q, s), s) = q",
)


# ---- what changes in the sources ------------------------------------------------------------------------------------

NUMERICS_H, NUMERICS_PY = "csrc/numerics.h", "quantlib/reference/numerics.py"
CAST, CODES = "cast rounds", "a projection rounds"
CHANGES = [  # file, text, what it becomes, a theorem, a case
    (NUMERICS_H, "12582912.0f", "12582914.0f", CODES, "int4, symmetric, C++"),
    (NUMERICS_H, "kInfinity = 0x7f800000u", "kInfinity = 0x7f900000u", CAST, "float4_e2m1fn, saturating, C++"),
    (NUMERICS_H, "uint32_t kNaN = 0x7fffffffu", "uint32_t kNaN = 0x7fc00000u", "a code is", "float8_e4m3fn, C++"),
    ("csrc/formats.h", "0x7e, 0x7f, 0x7f", "0x7d, 0x7f, 0x7f", CAST, "float8_e4m3fn, saturating, C++"),
    ("csrc/formats.h", "SCALE_MIN 0x0d800000", "SCALE_MIN 0x0d000000", "the effective scale", "int4, C++"),
    (NUMERICS_PY, "np.uint32(0x7F800000)", "np.uint32(0x7F800001)", CAST, "float8_e5m2, reference"),
    (NUMERICS_PY, "(127 + 24 - f.bias", "(127 + 22 - f.bias", CAST, "float16, reference"),
    (
        "quantlib/reference/fake_quantize.py",
        "hi + np.float32(1)",
        "hi - np.float32(1)",
        "fake_quantize(x)",
        "int4, every zero point, reference",
    ),
]


@needs_solver
@pytest.mark.parametrize(("file", "right", "wrong", "theorem", "label"), CHANGES, ids=[c[1] for c in CHANGES])
def test_a_changed_constant_turns_the_proof_red(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, right: str, wrong: str, theorem: str, label: str
) -> None:
    for source in ("csrc", "quantlib/reference"):
        here = CSRC if source == "csrc" else PACKAGE / "reference"
        shutil.copytree(here, tmp_path / source, ignore=shutil.ignore_patterns("__pycache__", "cuda", "cpu"))
    (tmp_path / "csrc/cpu").mkdir()
    name = next(t.name for t in THEOREMS if t.name.startswith(theorem))
    case = question(name, label)
    assert prove.answer(case, LIMIT).verdict == solver.PROVEN
    text = (tmp_path / file).read_text()
    assert right in text
    (tmp_path / file).write_text(text.replace(right, wrong))
    result = prove.answer(case, LIMIT, root=tmp_path)
    assert result.verdict == solver.REFUTED
    assert result.wrong.startswith("false")
    if file == "csrc/formats.h":  # and so the whole command
        status = report(formats=[str(case.case.format)], theorem=name, faults=False, jobs=1, root=tmp_path)
        assert status == 1
        assert f"{label}: refuted, false for " in capsys.readouterr().out


@needs_solver
def test_a_source_that_is_not_understood_is_no_proof(tmp_path: Path) -> None:
    loop = Edit(
        "csrc/numerics.h",
        "  r = r < limit ? r : limit;\n",
        "  for (int i = 0; i < 2; ++i) r = r < limit ? r : limit;\n",
    )
    with pytest.raises(SyntaxError):
        nearest("float16, C++").case.build(Run(Sources((loop,))))
    broken = Edit("quantlib/reference/numerics.py", "r = np.minimum(r, ", "r = np.fmin(r, ")
    with pytest.raises(AttributeError, match="fmin"):
        nearest("float16, reference").case.build(Run(Sources((broken,))))
    shutil.copytree(PACKAGE / "reference", tmp_path / "quantlib/reference")
    path = tmp_path / "quantlib/reference/numerics.py"
    path.write_text(path.read_text().replace(broken.right, broken.wrong))
    result = prove.answer(nearest("float16, reference"), LIMIT, root=tmp_path)
    assert result.verdict == "unread"
    assert "fmin" in result.wrong


def test_an_edit_of_text_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="no such text"):
        Sources((Edit("csrc/numerics.h", "no such text", ""),)).text("csrc/numerics.h")


# ---- the sources and their formulas ---------------------------------------------------------------------------------

APPLIED = [
    *(functions.encode_float(f, s) for f in formats.WITHOUT_BOOKS if f.is_float for s in (False, True)),
    *(functions.quantize(f) for f in formats.WITHOUT_BOOKS),
    *(functions.fake_quantize(f, False) for f in formats.WITHOUT_BOOKS),
    *(functions.gradients(f, False, lsq) for f in formats.WITHOUT_BOOKS for lsq in (False, True)),
    *(functions.effective_scale(f) for f in formats.WITHOUT_BOOKS),
    *(functions.encode_int(f, True) for f in formats.WITHOUT_BOOKS if not f.is_float),
    *(functions.affine_scale(f) for f in formats.WITHOUT_BOOKS if not f.is_float),
    *(functions.gradients(f, True, False) for f in formats.WITHOUT_BOOKS if not f.is_float),
]


@pytest.mark.parametrize("function", APPLIED, ids=lambda function: f"{function.name} {len(function.inputs)}")
def test_a_formula_is_its_source_where_rounding_is_decided(function: Function) -> None:
    """The terms that the solver is given equal the reference, both run by NumPy: no solver takes part."""
    small = [f for f in formats.WITHOUT_BOOKS if f.bits <= 8]
    decisive = values.neighbours(np.concatenate([values.midpoints(f.name) for f in small]))
    x = np.concatenate([values.edges()[::5], decisive])
    rng = np.random.default_rng(7)
    given = {}
    for name, kind in function.inputs.items():
        if kind == "int32":
            given[name] = rng.integers(-200, 300, x.size).astype(np.int32)
        else:
            given[name] = x if name in ("x", "t") or len(function.inputs) == 1 else rng.choice(x, x.size)
    sources = Sources()
    unknown = {
        name: int_variable(name) if kind == "int32" else float_variable(name) for name, kind in function.inputs.items()
    }
    bits = {name: value.view(np.uint32) for name, value in given.items()}
    with np.errstate(all="ignore"):
        want = function.reference(sources.running, **{name: value.reshape(1, -1) for name, value in given.items()})
    listed = want if isinstance(want, tuple) else (want,)
    for language in LANGUAGES:
        got = function.terms(sources, language, unknown)
        for term, value in zip(got.values(), listed, strict=True):
            found = terms.evaluate(terms.bits_of(term) if term.sort.kind == "float" else term, bits)
            raw = np.asarray(value).reshape(-1)
            if raw.dtype.kind == "f":
                raw, found = (numeric(v.astype(np.uint32)) for v in (raw.view(np.uint32), found))
            else:
                found, raw = found.astype(np.uint32), raw.astype(np.int64).astype(np.uint32)
            assert np.array_equal(np.broadcast_to(found, raw.shape), raw), language


def numeric(bits: np.ndarray) -> np.ndarray:
    """Bits with one NaN, as an operation's NaN has no bits of its own."""
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint32(0x7FFFFFFF), bits)


@pytest.mark.parametrize("f", formats.WITHOUT_BOOKS, ids=lambda f: f.name)
def test_the_descriptions_have_the_facts_of_the_table(f: formats.Format) -> None:
    if isinstance(f, formats.FloatFormat):
        described = FloatDescription(f)
        assert (described.largest, described.nan, described.beyond) == (f.max_code, f.nan_code, f.overflow_code)
        assert float(terms.evaluate(described.value(terms.bits(f.max_code, 64)), {})) == f.max
    else:
        for affine in (False, True):
            assert (IntDescription(f, affine).qmin, IntDescription(f, affine).qmax) == f.range(affine)


# ---- reading C++ ----------------------------------------------------------------------------------------------------


def run_cxx(text: str, name: str, *arguments: tuple[str, int]) -> int:
    program = cxx.Program({"a.h": text}.__getitem__, ("a.h",))
    given = [cxx.Value(TYPES[type], terms.const(value, TYPES[type].sort)) for type, value in arguments]
    result = program.call(name, *given)
    assert result.term.op == "const"
    return int(result.term.parameters[0])


PROGRAMS = [  # a function f, x, f(x)
    ("int32_t f(int32_t x) { return x >> 1; }", 0xFFFFFFFC, 0xFFFFFFFE),  # arithmetic
    ("uint32_t f(uint32_t x) { return x >> 1u; }", 0xFFFFFFFC, 0x7FFFFFFE),
    ("bool f(uint32_t x) { return x > -1; }", 5, 0),  # -1 becomes unsigned
    ("bool f(int32_t x) { return x > -1; }", 5, 1),
    ("uint32_t f(uint32_t x) { return x + 1u * 2u << 1u; }", 5, 14),
    ("int32_t f(uint8_t x) { return ~x; }", 1, 0xFFFFFFFE),  # promoted to int first
    ("uint8_t f(int32_t x) { return uint8_t(x); }", 0x1FF, 0xFF),
    ("int32_t f(int32_t x) { const int32_t a = x, b = a + 1; return x > 0 ? b : -b; }", 3, 4),
    (
        """
        template <bool B> int32_t g(int32_t x) { if constexpr (B) return x + 1; else return x; }
        int32_t f(int32_t x) { return g<true>(x) + g<false>(x); }
        """,
        4,
        9,
    ),
    (
        """
        template <class T> struct S;
        template <> struct S<float> { static int32_t of(int32_t a) { return a * 3; } };
        int32_t f(int32_t x) { return S<float>::of(x); }
        """,
        4,
        12,
    ),
    (
        """
        struct P { int32_t a, b; };
        P g(int32_t x) { return {x, x + 1}; }
        int32_t f(int32_t x) { P p = g(x); p.a = 7; return p.a * p.b; }
        """,
        1,
        14,
    ),
    (
        """
        #define TWICE(X) (X + X)
        #define ROW(F) F(three, 3)
        #define MAKE(N, V) struct N { static constexpr int value = V; };
        ROW(MAKE)
        #ifdef NO
        int32_t f(int32_t x) { return 1; }
        #else
        int32_t f(int32_t x) { return TWICE(x) + three::value; }
        #endif
        """,
        2,
        7,
    ),
]


@pytest.mark.parametrize(("text", "x", "y"), PROGRAMS)
def test_cxx_means_what_a_compiler_makes_of_it(text: str, x: int, y: int) -> None:
    argument = text.partition(" f(")[2].partition("_t x)")[0]
    assert run_cxx(text, "f", (argument, x)) == y


def test_cxx_that_branches_on_data_is_refused() -> None:
    with pytest.raises(SyntaxError, match="branch on data"):
        run_cxx("int32_t f(int32_t x) { if (x > 0) return 1; return 0; }", "f", ("int32", 1))
    with pytest.raises(SyntaxError, match="is not known"):
        run_cxx("int32_t f(int32_t x) { return g(x); }", "f", ("int32", 1))
    with pytest.raises(SyntaxError, match="takes these arguments"):
        run_cxx("template <class T> int32_t g() { return 1; } int32_t f(int32_t x) { return g(); }", "f", ("int32", 1))


def test_the_header_is_read_as_a_compiler_reads_it() -> None:
    """The constants of a format's struct, which macros make."""
    program = Sources().header
    for f in formats.WITHOUT_BOOKS:
        struct = program.struct(f.name)
        for name in ("max_code", "overflow_code", "bias") if f.is_float else ("qmin", "affine_qmax"):
            want = getattr(f, name, None)
            want = {"qmin": f.range(False)[0], "affine_qmax": f.range(True)[1]}[name] if want is None else want
            assert struct.scope.names[name].term is terms.bits(want, 32)


# ---- NumPy on terms -------------------------------------------------------------------------------------------------


def test_symbolic_arrays_are_strict() -> None:
    x = symbolic.Array(float_variable("x"), TYPES["float32"])
    n = symbolic.Array(int_variable("n"), TYPES["int32"])
    with pytest.raises(TypeError, match="one dtype"):
        x + n
    with pytest.raises(TypeError, match="decides no branch"):
        bool(x == x)
    with pytest.raises(OverflowError, match="int32"):
        n + (1 << 31)
    with pytest.raises(ValueError, match="FloatingPoint"):
        x + 0.1  # no float32
    assert symbolic.minimum(symbolic.float32(3), symbolic.float32(2)).term is terms.float_const(2.0)


def test_which_zero_a_minimum_gives_is_left_open() -> None:
    either = symbolic.minimum(symbolic.asarray(float_zero(0)), symbolic.asarray(float_zero(1 << 31))).term
    name = next(t.parameters[0] for t in terms.ordered([either]) if t.op == "var")
    assert [int(terms.evaluate(terms.bits_of(either), {name: choice})) for choice in (1, 0)] == [0, 1 << 31]


def float_zero(bits: int) -> symbolic.Array:
    return symbolic.Array(terms.float_of(terms.bits(bits, 32), terms.F32), TYPES["float32"])


# ---- counter-examples -----------------------------------------------------------------------------------------------


def test_a_counter_example_that_is_none_is_seen() -> None:
    theorem = catalogue.theorem("cast rounds once to nearest, ties to even")
    fault = theorem.faults[0]
    run = Run(Sources(fault.edits))
    claim = fault.case.build(run)
    with pytest.raises(replay.UnfaithfulError, match="does not refute"):
        replay.replay(fault, {"x": 0x3F800000}, run, claim)  # 1.0 rounds to itself
    right = Fault("none", fault.case)
    run = Run(Sources())
    with pytest.raises(replay.UnfaithfulError, match="does not refute"):
        replay.replay(right, {"x": 0x3FE80000}, run, right.case.build(run))


def test_an_op_that_differs_from_the_sources_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    theorem = catalogue.theorem("cast rounds once to nearest, ties to even")
    fault = theorem.faults[0]
    run = Run(Sources(fault.edits))
    claim = fault.case.build(run)
    assert "0x3fe80000" in replay.replay(fault, {"x": 0x3FE80000}, run, claim)
    for call in run.calls:
        object.__setattr__(call.function, "op", lambda x: np.zeros(1, np.uint8))
    try:
        with pytest.raises(replay.UnfaithfulError, match="of the op gives 0x0"):
            replay.replay(fault, {"x": 0x3FE80000}, run, claim)
    finally:
        functions.encode_float.cache_clear()
        catalogue.theorems.cache_clear()


# ---- the command ----------------------------------------------------------------------------------------------------


@needs_solver
def test_undecided_is_no_proof(capsys: pytest.CaptureFixture[str]) -> None:
    name = "round trip: quantize(dequantize(q, s), s) = q"
    assert report(theorem=name, formats=["int8"], long=True, faults=False, jobs=1, limit=0.05) == 1
    said = capsys.readouterr().out
    assert "1 undecided of 1 cases" in said
    assert "0 of 1 cases proven, 1 undecided" in said
    assert "s of 0 s" in said  # the time that was spent


@needs_solver
def test_verify_prove_says_what_was_proven(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "proof.json"
    arguments = ["--theorem", "a cast is symmetric", "--format", "float4_e2m1fn", "--jobs", "1", "--json", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["quantlib.proof", *arguments, "--verbose"])
        assert prove_main() == 0
    said = capsys.readouterr().out
    assert f"{solver.version('bitwuzla')}; 3 questions, 1 theorems" in said
    assert "a cast is symmetric (C2 C3): proven, 1 cases, for all float32 but NaN" in said
    assert "2 of 2 planted faults refuted" in said
    assert "x = " in said  # a counter-example
    (theorem,) = json.loads(out.read_text())["theorems"]
    assert [case["verdict"] for case in theorem["cases"]] == ["proven"]
    assert [fault["verdict"] for fault in theorem["faults"]] == ["refuted", "refuted"]


def test_verify_prove_reaches_the_theorems(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = {}
    monkeypatch.setattr("quantlib.proof.report.report", lambda **options: given.update(options) or 0)
    assert main(["verify", "--prove", "--format", "int8", "--all", "--jobs", "2"]) == 0
    assert given == {"formats": ["int8"], "long": True, "jobs": 2, "out": None}
    assert main(["verify", "--prove", "--op", "cast", "--share", "0"]) == 2
    assert "--prove must come without options of a sweep, got --op, --share" in capsys.readouterr().err
    assert main(["verify", "--all"]) == 2
    assert "--all must come with --prove" in capsys.readouterr().err


def test_without_a_solver_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["verify", "--prove"]) == 1
    assert "bitwuzla is not installed (pip install bitwuzla)" in capsys.readouterr().err


@needs_solver
def test_written_questions_are_what_is_asked(tmp_path: Path) -> None:
    asked = prove.questions(["float4_e2m1fn"], theorem="a cast is monotone")
    write(tmp_path, asked)
    expected = dict(line.split("\t")[::-1] for line in (tmp_path / "expected.txt").read_text().splitlines())
    assert len(expected) == len(asked) == 3
    for name, answer in expected.items():
        text = (tmp_path / name).read_text()
        assert text.startswith("; a cast is monotone (C3): float")
        verdict = solver.ask(text, LIMIT).verdict
        assert verdict == {"sat": solver.REFUTED, "unsat": solver.PROVEN}[answer]


@pytest.mark.parametrize("other", ["z3", "cvc5"])
def test_another_solver_reads_the_questions(other: str, tmp_path: Path) -> None:
    if (why := solver.missing(other)) is not None:
        pytest.skip(why)
    for q in (
        question("the effective scale is the scale within its bounds", "int8, C++"),
        question("a code is worth what its fields say", "float4_e2m1fn, reference"),
        Question("a code is worth what its fields say", 0, fault=True),
    ):
        result = prove.answer(q, LIMIT, other)
        assert (result.verdict, result.wrong) == (solver.REFUTED if q.fault else solver.PROVEN, "")


def test_a_case_is_found_by_its_label() -> None:
    case = catalogue.theorem("a cast is monotone").case("float16, reference")
    assert isinstance(case, Case)
    assert case.format == "float16"
    assert REFERENCE != HEADER
