"""The scheduler alone, as a C++ program with sanitizers."""

import pathlib
import subprocess

import pytest

from attnlab._src.implementations.native import build

SOURCE = pathlib.Path(__file__).with_name("parallel_test.cc")


@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_parallel_for(sanitize, tmp_path):
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    flags += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"]
    flags += [f"-I{build.SOURCES}"]
    probe = tmp_path / "probe.cc"
    probe.write_text("int main() { return 0; }\n")
    program = tmp_path / "program"
    command = [*compiler, *flags, "-o", program]
    if subprocess.run([*command, probe], capture_output=True, check=False).returncode:
        pytest.skip(f"the compiler has no -fsanitize={sanitize}")
    subprocess.run([*command, SOURCE], check=True)
    done = subprocess.run(
        program, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "parallel_for holds\n"
