"""The build and its cache: what is compiled, what is kept, what is loaded from it, and what a killed build leaves.

Most tests build a copy of the sources that is small enough to compile in a second.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_static.cuda_kernels import cuobjdump

from quantlib import _build

ROOT = Path(__file__).resolve().parent.parent

compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None or _build.mode() == "0", reason="no compiler to compile with"
)
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "quantlib").mkdir()
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    for name in ("_build.py", "ops.def"):
        shutil.copy(ROOT / "quantlib" / name, tmp_path / "quantlib")
    (tmp_path / "csrc/registration.cpp").write_text('#define DEF(schema)\n#include "ops.def"\n')
    (tmp_path / "csrc/numbers.h").write_text("#define ANSWER 42\n")
    (tmp_path / "csrc/cpu/op.cpp").write_text('#include "numbers.h"\nnamespace QL_ISA { int f() { return ANSWER; } }\n')
    (tmp_path / "csrc/cpu/backend.cpp").write_text("namespace plain { int f(); }\nint g() { return plain::f(); }\n")
    return tmp_path


def command(tree: Path) -> list[str]:
    return [sys.executable, str(tree / "quantlib/_build.py"), "cpu"]


def settings(tree: Path, **environment: str | None) -> dict[str, str]:
    """The environment of a build into the tree's own cache; None takes a variable away."""
    mine = {**os.environ, "QUANTLIB_BUILD": "auto", "QUANTLIB_CACHE": str(tree / "cache"), **environment}
    return {name: value for name, value in mine.items() if value is not None}


def run(tree: Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    env = settings(tree, **environment)
    return subprocess.run(command(tree), env=env, capture_output=True, text=True, check=False, timeout=6000)


def build(tree: Path, **environment: str | None) -> str:
    """The path of the library, or why there is none."""
    done = run(tree, **environment)
    return done.stdout.removeprefix("cpu: ").split(" ")[0] or done.stderr


def objects(tree: Path) -> set[Path]:
    return set((tree / "cache/objects").glob("*.o"))


# ---- what is compiled ------------------------------------------------------------------------------------------------


@compiler
def test_a_library_is_named_by_all_that_it_is_made_of(tree: Path) -> None:
    first = build(tree)
    assert Path(first).exists()
    assert build(tree) == first
    names = {first, build(tree, CXXFLAGS="-DOTHER")}
    for changed in ("csrc/numbers.h", "csrc/cpu/op.cpp", "quantlib/ops.def"):
        with open(tree / changed, "a") as file:
            file.write("// changed\n")
        names.add(build(tree))
    assert len(names) == 5
    assert all(Path(name).exists() for name in names)


@compiler
def test_only_what_changed_is_compiled_again(tree: Path) -> None:
    build(tree)
    before = objects(tree)
    with open(tree / "csrc/cpu/backend.cpp", "a") as file:
        file.write("// changed\n")
    build(tree)
    assert len(objects(tree) - before) == 1


@compiler
def test_a_header_is_of_those_that_include_it(tree: Path) -> None:
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/vector.cuh").touch()
    (tree / "csrc/cpu/more.h").write_text("#include <numbers.h>  // found as ../numbers.h\n")
    (tree / "csrc/cpu/other.cpp").write_text('#  include "more.h"\nnamespace QL_ISA { int h() { return 0; } }\n')
    library, before = build(tree), objects(tree)

    def compiled_again(header: str) -> int:
        with open(tree / header, "a") as file:
            file.write("// changed\n")
        assert Path(build(tree)).exists()
        known = objects(tree) - before
        before.update(known)
        return len(known)

    assert compiled_again("csrc/cuda/vector.cuh") == 0
    assert build(tree) == library
    assert compiled_again("csrc/cpu/more.h") == len(_build.ISAS)
    assert compiled_again("csrc/numbers.h") == 2 * len(_build.ISAS)
    (tree / "csrc/cpu/more.h").write_text("#define MORE <numbers.h>\n#include MORE\n")
    assert "must include headers by name, got MORE" in build(tree)


@compiler
def test_what_changes_while_it_is_compiled_is_not_kept(tree: Path) -> None:
    """The object would have the name of the old text and the code of the new one, or the other way round."""
    editor = tree / "editor"  # a compiler in whose time somebody edits a header
    editor.write_text(
        f'#!/bin/sh\ncase "$*" in *op.cpp*) echo "// edited" >> {tree}/csrc/numbers.h;; esac\nexec c++ "$@"\n'
    )
    editor.chmod(0o755)
    said = build(tree, CXX=str(editor), MAX_JOBS="1")
    assert "cpu/op.cpp or a header of it changed while it was compiled: build again" in said
    assert not list((tree / "cache").glob("*.so"))
    editor.write_text('#!/bin/sh\nexec c++ "$@"\n')
    assert Path(build(tree, CXX=str(editor))).exists()


def test_an_import_reads_each_source_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import of a checkout has the library found by its sources, a hundred files for ninety objects."""
    if not (ROOT / "csrc").is_dir():
        pytest.skip("not a checkout")
    counts: Counter[Path] = Counter()
    read = Path.read_bytes

    def counted(path: Path) -> bytes:
        counts[path] += 1
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    _build.Recipe("cpu")
    assert len(counts) > 50
    assert set(counts.values()) == {1}


@compiler
def test_every_header_that_a_compiler_reads_is_known() -> None:
    """`Unit.read` finds the headers that the compiler names, for every source that this machine can preprocess."""
    if not (ROOT / "csrc").is_dir():
        pytest.skip("not a checkout")
    include = [f"-I{_build.CSRC}", f"-I{_build.PACKAGE}", "-isystem", str(_build.find_torch() / "include")]
    emulated = [f"-I{ROOT / 'tests/cuda_on_cpu'}", "-DUSE_CUDA"]
    folder = _build.CSRC / "cuda"
    cuda = [_build.Unit(p, ("c++",), ("-std=c++20",)) for p in folder.glob("*.cu")]
    cuda += _build.glue_units(folder, ("-std=c++20",))
    assert len(cuda) > 10
    assert len(cuda[-1].before) > 10
    for unit in (*_build.cpu_units(), *cuda):
        more = [*(emulated if unit in cuda else []), *(word for p in unit.before for word in ("-include", str(p)))]
        command = [*unit.compiler, *unit.flags, f"-I{unit.folder}", *include, *more, "-x", "c++", "-MM"]
        command.append(str(unit.source))
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        files = {Path(os.path.normpath(word)) for word in said.replace("\\\n", " ").split()[1:]}
        ours = {path for path in files if {_build.CSRC, _build.PACKAGE} & set(path.parents)}
        assert unit.source in ours
        assert ours <= set(unit.read()), unit.source


@compiler
@pytest.mark.skipif(_build.nvcc() is None, reason="no nvcc")
def test_the_cuda_library_runs_on_every_device_that_nvcc_knows(tmp_path: Path) -> None:
    """Machine code of every architecture, PTX of the newest, and the library says so itself."""
    *kernels, glue = _build.cuda_units()
    for unit in kernels:
        assert unit.flags == kernels[0].flags
    source = tmp_path / "kernel.cu"
    source.write_text("__global__ void kernel(int* x) { *x = 1; }\n")
    made = tmp_path / "kernel.o"
    subprocess.run([*kernels[0].compiler, *kernels[0].flags, "-c", source, "-o", made], check=True)
    archs = _build.cuda_archs(kernels[0].compiler[0])
    assert {80, 90} <= set(archs) <= set(_build.CUDA_ARCHS)
    read = [cuobjdump(), "--list-elf", "--list-ptx", made]
    listed = subprocess.run(read, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"(?:ELF|PTX) file.*\.sm_(\d+)\.(cubin|ptx)", listed)) == {
        *((str(arch), "cubin") for arch in archs),
        (str(archs[-1]), "ptx"),
    }
    include = [
        f"-I{glue.folder}",
        f"-I{_build.CSRC}",
        f"-I{_build.PACKAGE}",
        "-isystem",
        _build.find_torch() / "include",
    ]
    made = tmp_path / "backend.o"
    subprocess.run([*glue.compiler, *glue.flags, "-O0", *include, "-c", glue.source, "-o", made], check=True)
    assert _build.targets(made) == (*(f"sm_{arch}" for arch in archs), f"compute_{archs[-1]}")


@pytest.mark.parametrize(
    ("targets", "runs", "does_not"),
    [
        (("sm_80", "sm_90", "compute_90"), [(8, 0), (8, 9), (9, 0), (10, 0), (12, 1)], [(5, 3), (7, 5)]),
        (("sm_86", "sm_120"), [(8, 6), (8, 9), (12, 0), (12, 1)], [(8, 0), (9, 0), (10, 0), (13, 0)]),
        ((), [], [(9, 0)]),
    ],
)
def test_machine_code_runs_on_its_major_version_and_ptx_on_all_that_follow(
    targets: tuple[str, ...], runs: list[tuple[int, int]], does_not: list[tuple[int, int]]
) -> None:
    assert all(_build.runs_on(targets, capability) for capability in runs)
    assert not any(_build.runs_on(targets, capability) for capability in does_not)


@compiler
def test_an_op_is_registered_by_the_backends_that_have_its_kernel(tree: Path) -> None:
    """csrc/ops/<op>.cpp is compiled where the backend's folder has a file of its stem."""
    (tree / "csrc/ops").mkdir()
    (tree / "csrc/cpu/backend.h").touch()
    for op in ("op", "another"):
        function = f'extern "C" __attribute__((visibility("default"))) int glue_of_{op}() {{ return 0; }}\n'
        (tree / f"csrc/ops/{op}.cpp").write_text(f"#include <backend.h>\n{function}")
    library = Path(build(tree)).read_bytes()
    assert b"glue_of_op" in library
    assert b"glue_of_another" not in library


@compiler
def test_a_mistake_is_shown_with_its_line(tree: Path) -> None:
    (tree / "csrc/cpu/op.cpp").write_text("mistake\n")
    assert "cpu: cpu/op.cpp does not compile" in build(tree)
    assert list((tree / "cache").glob("*.so")) == []


@compiler
def test_fast_math_of_the_user_changes_no_flag_of_ours(tree: Path) -> None:
    (tree / "csrc/cpu/op.cpp").write_text(
        "#ifdef __FAST_MATH__\n#error fast\n#endif\nnamespace QL_ISA { int f() { return 1; } }\n"
    )
    assert Path(build(tree, CXXFLAGS="-ffast-math -Ofast")).exists()


@compiler
def test_processes_that_start_at_once_compile_once(tree: Path) -> None:
    started = [subprocess.Popen(command(tree), env=settings(tree), stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = "".join(process.communicate(timeout=6000)[1] for process in started)
    assert [process.returncode for process in started] == [0, 0, 0]
    assert said.count("compiling the cpu kernels") == 1


@compiler
@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("MAX_JOBS", "x", "MAX_JOBS must be a positive integer, got 'x'"),
        ("MAX_JOBS", "0", "MAX_JOBS must be a positive integer, got '0'"),
        ("MAX_JOBS", "-1", "MAX_JOBS must be a positive integer, got '-1'"),
        ("MAX_JOBS", "1.5", "MAX_JOBS must be a positive integer, got '1.5'"),
        ("CXXFLAGS", "'", 'CXXFLAGS must be words that a shell can split, got "\'": No closing quotation'),
        ("CXX", 'c++ "', "CXX must be words that a shell can split, got 'c++ \"': No closing quotation"),
        ("CXX", "/no/compiler", "no compiler: /no/compiler is not there"),
        ("QUANTLIB_CACHE", "some/folder", "QUANTLIB_CACHE must be an absolute path, got 'some/folder'"),
        ("QUANTLIB_CACHE", "/dev/null/cache", "QUANTLIB_CACHE must be a folder that this user can write"),
        ("TMPDIR", "/no/folder", ""),  # there are others
    ],
)
def test_a_variable_that_cannot_be_used_is_named(tree: Path, variable: str, value: str, expected: str) -> None:
    done = run(tree, **{variable: value})
    assert "Traceback" not in done.stderr
    assert expected in done.stderr
    assert done.stdout.startswith("cpu: ") == (not expected)


@compiler
def test_a_variable_that_is_empty_is_not_set(tree: Path) -> None:
    assert Path(build(tree, CXX="", CXXFLAGS="", MAX_JOBS="")).exists()


def test_sources_that_cannot_be_read_are_a_reason(tree: Path) -> None:
    (tree / "csrc/cpu/op.cpp").unlink()
    (tree / "csrc/cpu/op.cpp").mkdir()
    done = run(tree)
    assert "cannot compile the cpu kernels: " in done.stderr
    assert "Traceback" not in done.stderr


# ---- where it is kept ------------------------------------------------------------------------------------------------


def nobody(user: int) -> Any:
    raise KeyError(f"getpwuid(): uid not found: {user}")


def no_folder() -> str:
    raise FileNotFoundError("No usable temporary directory found")


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("QUANTLIB_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    return monkeypatch


def test_the_folders_of_the_cache(no_settings: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_settings.setattr("tempfile.tempdir", str(tmp_path))
    last = tmp_path / f"quantlib-{os.geteuid()}"
    assert _build.caches() == [last]
    no_settings.setenv("HOME", "/home/somebody")
    assert _build.caches() == [Path("/home/somebody/.cache/quantlib"), last]
    no_settings.setenv("XDG_CACHE_HOME", "relative")
    assert _build.caches() == [Path("/home/somebody/.cache/quantlib"), last]
    no_settings.setenv("XDG_CACHE_HOME", "/var/cache")
    assert _build.caches() == [Path("/var/cache/quantlib"), last]
    no_settings.setattr("tempfile.gettempdir", no_folder)
    assert _build.caches() == [Path("/var/cache/quantlib")]
    no_settings.delenv("XDG_CACHE_HOME")
    no_settings.delenv("HOME")
    with pytest.raises(_build.BuildError, match="QUANTLIB_CACHE must be a folder that can be written"):
        _build.caches()
    no_settings.setenv("QUANTLIB_CACHE", "/somewhere")
    assert _build.caches() == [Path("/somewhere")]


@compiler
def test_without_a_home_that_can_be_written_the_kernels_are_kept_with_temporary_files(tree: Path) -> None:
    (tree / "temporary").mkdir()
    (tree / "home").touch()  # a file: nothing can be made below it, not even by root
    environment = {"QUANTLIB_CACHE": None, "XDG_CACHE_HOME": None, "HOME": str(tree / "home")}
    done = run(tree, **environment, TMPDIR=str(tree / "temporary"))
    folder = tree / f"temporary/quantlib-{os.geteuid()}"
    assert done.stdout.startswith(f"cpu: {folder}/"), done.stderr
    assert f"(not into {tree / 'home/.cache/quantlib'}: Not a directory)" in done.stderr
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert run(tree, **environment, TMPDIR=str(tree / "temporary")).stderr == "", "found there, without a word"


@compiler
@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077], ids=oct)
def test_only_this_user_can_write_the_cache(tree: Path, umask: int) -> None:
    cache = tree / "above/cache"
    old = os.umask(umask)
    try:
        library = Path(build(tree, QUANTLIB_CACHE=str(cache)))
    finally:
        os.umask(old)
    for folder in (cache.parent, cache, cache / "objects"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert library.stat().st_mode & 0o022 == 0
    assert build(tree, QUANTLIB_CACHE=str(cache)) == str(library)


# ---- what is loaded from it ------------------------------------------------------------------------------------------


def truncate(library: Path) -> None:
    os.truncate(library, library.stat().st_size // 2)


def zero(library: Path) -> None:
    size = library.stat().st_size
    with library.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))


def flip(library: Path) -> None:
    data = bytearray(library.read_bytes())
    data[len(data) // 2] ^= 1
    library.write_bytes(data)


def forget(library: Path) -> None:
    library.with_name(f"{library.name}.sha256").unlink()


@compiler
@pytest.mark.parametrize("harm", [truncate, zero, flip, forget, Path.unlink, lambda library: os.truncate(library, 0)])
@pytest.mark.parametrize("what", ["library", "objects"])
def test_what_is_damaged_is_made_again(tree: Path, what: str, harm: Callable[[Path], None]) -> None:
    library = Path(build(tree))
    want = library.read_bytes()
    for path in [library] if what == "library" else objects(tree):
        harm(path)
    if what == "objects":
        library.unlink()
    done = run(tree)
    assert "compiling the cpu kernels" in done.stderr
    assert done.stdout.startswith(f"cpu: {library} ")
    assert library.read_bytes() == want
    assert run(tree).stderr == ""


@compiler
def test_a_library_that_others_can_write_is_not_loaded(tree: Path) -> None:
    library = Path(build(tree))
    library.chmod(0o666)
    done = run(tree)
    assert f"{library} is not loaded: others can write {library}, its mode is 0666" in done.stderr
    assert done.stdout.startswith(f"cpu: {library} "), "made again"
    assert library.stat().st_mode & 0o022 == 0


@compiler
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777], ids=oct)
def test_nothing_is_loaded_from_a_folder_that_others_can_write(tree: Path, mode: int) -> None:
    library = Path(build(tree))
    library.parent.chmod(mode)
    done = run(tree)
    assert done.stdout == ""
    assert f"is not loaded: others can write {library.parent}, its mode is {mode:04o}" in done.stderr
    assert "QUANTLIB_CACHE must be a folder that this user can write and nobody else" in done.stderr
    library.parent.chmod(0o755)
    assert build(tree) == str(library)
    (library.parent / "objects").chmod(mode)
    library.unlink()
    assert f"others can write {library.parent / 'objects'}" in run(tree).stderr


@compiler
@root
def test_what_belongs_to_another_user_is_not_loaded(tree: Path) -> None:
    library = Path(build(tree))
    os.chown(library, 12345, 12345)
    done = run(tree)
    assert f"{library} is not loaded: {library} belongs to another user, 12345" in done.stderr
    assert library.stat().st_uid == os.geteuid(), "made again"
    os.chown(library.parent, 12345, 12345)
    done = run(tree)
    assert done.stdout == ""
    assert f"{library.parent} belongs to another user, 12345" in done.stderr


@compiler
@root
def test_a_link_of_another_user_is_not_followed(tree: Path) -> None:
    library = Path(build(tree))
    link = tree / "link"
    link.symlink_to(library.parent)
    assert build(tree, QUANTLIB_CACHE=str(link)) == str(link / library.name)
    os.chown(link, 12345, 12345, follow_symlinks=False)
    assert f"{link} belongs to another user, 12345" in run(tree, QUANTLIB_CACHE=str(link)).stderr


# ---- what a killed build leaves --------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    """Say if a process runs; one that has ended, and that nobody has waited for, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@compiler
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_build_that_is_killed_leaves_no_compilers_and_no_folders_for_ever(tree: Path, how: signal.Signals) -> None:
    slow = tree / "slow"  # a driver that starts the true compiler, as c++ and nvcc do
    slow.write_text(f"#!/bin/sh\necho $$ > {tree}/pids/$$\nsleep 1000 &\necho $! > {tree}/pids/$!\nwait\n")
    slow.chmod(0o755)
    (tree / "pids").mkdir()
    environment = settings(tree, CXX=str(slow), MAX_JOBS="2")
    process = subprocess.Popen(command(tree), env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 600
    while len(list((tree / "pids").iterdir())) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    started = [int(path.name) for path in (tree / "pids").iterdir()]
    assert len(started) == 4
    process.send_signal(how)
    process.communicate(timeout=600)
    while any(alive(pid) for pid in started) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [pid for pid in started if alive(pid)] == []
    assert Path(build(tree)).exists()
    assert list((tree / "cache/objects").glob("tmp*")) == []


@compiler
def test_a_compiler_that_fails_ends_the_others(tree: Path) -> None:
    """They were started at once; what one of them would still do is of no use."""
    slow = tree / "slow"
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *backend.cpp*) exit 3;; esac\necho $$ > {tree}/pids/$$\nexec sleep 1000\n'
    )
    slow.chmod(0o755)
    (tree / "pids").mkdir()
    assert "cpu/backend.cpp does not compile: exit status 3" in build(tree, CXX=str(slow), MAX_JOBS="99")
    assert [pid for pid in (int(path.name) for path in (tree / "pids").iterdir()) if alive(pid)] == []
