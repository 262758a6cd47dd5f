#!/usr/bin/env python3
"""Make what runs a released SGLang without a GPU: a venv, a small real model, a prebuilt extension.

    python tools/sglang_cpu/setup_env.py --venv .venvs/sglang --model .models/smollm2-135m
    python tools/sglang_cpu/setup_env.py --venv .venvs/sglang --model .models/smollm2-135m --wheel dist/x.whl

Stdlib only: any Python from 3.11 runs it, and the venv is made with Python 3.11, which the pins are for.
A stamp in the venv and one in the model folder say what they were made from; a step whose inputs did not
change is skipped, so a second run takes milliseconds. A step cut short has no stamp, and runs again.
Never does: install anything outside the venv, accept a torch with CUDA, or change SGLang's files.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
PLUGIN = HERE / "plugin"
MODEL_MAKER = HERE / "make_model.py"
PYTHON = "3.11"
STAMP = ".sglang-cpu.json"

CHECK_ENVIRONMENT = """
import torch
assert torch.version.cuda is None, f"torch {torch.__version__} is a CUDA build; the pins need the CPU build"
from sglang.srt.mem_cache.cpp_utils.native_hash import _load_native_hash_module
_load_native_hash_module()
import sglang
from sglang.srt.platforms import current_platform
assert type(current_platform).__name__ == "CpuTorchPlatform", f"SGLang chose {current_platform}"
print(f"sglang {sglang.__version__}, torch {torch.__version__}, platform {current_platform.device_name}")
"""


class SetupError(Exception):
    """What is wrong, and what to do about it."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(f"{message}\n  remedy: {remedy}")


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--venv", type=Path, required=True, help="where the environment is, or will be")
    parser.add_argument("--model", type=Path, help="where the model folder is, or will be")
    parser.add_argument("--wheel", type=Path, help="a wheel to install beside SGLang, with its dependencies")
    options = parser.parse_args(argv)
    try:
        prepare(options.venv.absolute(), options.model and options.model.absolute(), options.wheel)
    except SetupError as error:
        print(f"setup_env: {error}", file=sys.stderr)
        return 1
    return 0


def prepare(venv: Path, model: Path | None, wheel: Path | None) -> None:
    if wheel and not wheel.is_file():
        raise SetupError(f"no wheel at {wheel}", "build it first: python -m build --wheel")
    with only_one_at_a_time(venv):
        stamp = read_stamp(venv) if (venv / "bin" / "python").exists() else {}
        if stamp.get("pins") != (pins := hash_files(REQUIREMENTS)):
            install_pins(venv)
            stamp = {"pins": pins}
            write_stamp(venv, stamp)
        if stamp.get("plugin") != (plugin := hash_files(*plugin_sources())):
            install_plugin(venv)
            stamp |= {"plugin": plugin}
            write_stamp(venv, stamp)
        if wheel and stamp.get("wheel") != (contents := hash_wheel(wheel)):
            install_wheel(venv, wheel)
            stamp |= {"wheel": contents}
            write_stamp(venv, stamp)
        if model:
            make_model(venv, model)
    say(f"ready: {venv}" + (f" and {model}" if model else ""))


def install_pins(venv: Path) -> None:
    """From nothing: a venv whose pins changed is made again, so that nothing of the old ones stays."""
    python = find_python()
    check_build_tools(python)
    with step(f"venv {venv} ({python})"):
        run([python, "-m", "venv", "--clear", str(venv)])
    with step(f"SGLang and its pins ({REQUIREMENTS.name}; about 2.3 GB on disk)"):
        pip(venv, "--no-deps", "-r", str(REQUIREMENTS))


def install_plugin(venv: Path) -> None:
    with step("the CPU platform plugin"), tempfile.TemporaryDirectory() as scratch:
        # pip builds inside the source folder; a copy keeps this one clean.
        skip = shutil.ignore_patterns("__pycache__")
        source = shutil.copytree(PLUGIN, Path(scratch, "plugin"), ignore=skip)
        pip(venv, "--force-reinstall", "--no-deps", "--no-build-isolation", str(source))
    with step("SGLang's native hash extension, and a check of all that"):
        # Else the first storage request compiles it and waits for that.
        check = [str(venv / "bin" / "python"), "-W", "ignore", "-c", CHECK_ENVIRONMENT]
        say(run(check, environment_of(venv)))


def make_model(venv: Path, model: Path) -> None:
    wanted = hash_files(MODEL_MAKER)
    if read_stamp(model).get("model") == wanted:
        return
    with step(f"model {model}"):
        say(run([str(venv / "bin" / "python"), str(MODEL_MAKER), str(model)]))
    write_stamp(model, {"model": wanted})


def install_wheel(venv: Path, wheel: Path) -> None:
    with step(f"wheel {wheel.name}"):
        pip(venv, "--force-reinstall", "--no-deps", str(wheel))
        pip(venv, str(wheel))  # now only what it depends on and the pins do not already hold


def environment_of(venv: Path) -> dict[str, str]:
    """Torch keeps extensions by name only, so each venv has a folder of its own."""
    return {**os.environ, "TORCH_EXTENSIONS_DIR": str(venv / "torch_extensions"), "HF_HUB_OFFLINE": "1"}


def find_python() -> str:
    """A Python of the version the pins are for: the running one, or one on the PATH."""
    for candidate in (sys.executable, shutil.which(f"python{PYTHON}")):
        if candidate and python_says(candidate, "'%d.%d' % sys.version_info[:2]") == PYTHON:
            if not python_says(candidate, "__import__('ensurepip').version()"):
                raise SetupError(f"{candidate} cannot make a venv", f"apt-get install python{PYTHON}-venv")
            return candidate
    raise SetupError(
        f"the pins are for Python {PYTHON}: this is {sys.version.split()[0]}, and none is on the PATH",
        f"apt-get install python{PYTHON} python{PYTHON}-venv python{PYTHON}-dev, or run this with one",
    )


def check_build_tools(python: str) -> None:
    """SGLang compiles its page hash with torch, at the first storage request; we do it now."""
    include = python_says(python, "__import__('sysconfig').get_path('include')") or "/nonexistent"
    packages = {"g++": "g++", "ninja": "ninja-build"}
    missing = [package for tool, package in packages.items() if not shutil.which(tool)]
    if not Path(include, "Python.h").exists():
        missing.append(f"python{PYTHON}-dev")
    if shutil.which("g++") and not compiles("#include <openssl/evp.h>\nint main() { return 0; }\n"):
        missing.append("libssl-dev")
    if missing:
        raise SetupError(
            "SGLang compiles a C++ extension (its page hash) and something to build it with is missing",
            f"apt-get install {' '.join(missing)}",
        )


def compiles(source: str) -> bool:
    command = ["g++", "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=source, text=True, capture_output=True, check=False).returncode == 0


def python_says(python: str, expression: str) -> str | None:
    """What `expression` is in that Python, or None where it cannot say."""
    program = f"import sys; print({expression})"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def pip(venv: Path, *arguments: str) -> None:
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*command, *arguments])


def run(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """Its output; a failure shows the end of what it said."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        what = f"`{' '.join(command[:6])} ...` ended with {done.returncode}"
        raise SetupError(f"{what}:\n{said}", "mend that, then run this again: it goes on from here")
    return done.stdout.strip()


def plugin_sources() -> list[Path]:
    return [path for path in sorted(PLUGIN.rglob("*")) if path.suffix in (".py", ".toml")]


def hash_files(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def hash_wheel(wheel: Path) -> str:
    """Of what is inside: building the same sources twice gives other file times, not another wheel."""
    with zipfile.ZipFile(wheel) as archive:
        members = sorted((entry.filename, entry.CRC, entry.file_size) for entry in archive.infolist())
    return hashlib.sha256(repr((wheel.name, members)).encode()).hexdigest()


def read_stamp(folder: Path) -> dict[str, str]:
    try:
        stamp: dict[str, str] = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp


def write_stamp(folder: Path, stamp: dict[str, str]) -> None:
    (folder / STAMP).write_text(json.dumps(stamp, indent=1) + "\n")


@contextlib.contextmanager
def only_one_at_a_time(venv: Path) -> Iterator[None]:
    """Two test runs may start together; the second waits, then finds the work done."""
    venv.parent.mkdir(parents=True, exist_ok=True)
    with (venv.parent / f".{venv.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    say(f"{what} ...")
    begin = time.monotonic()
    yield
    say(f"{what}: done in {time.monotonic() - begin:.1f} s")


def say(line: str) -> None:
    print(f"[sglang-cpu] {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
