"""Builds the workloads and the guest's initramfs; finds what they need."""
import hashlib
import os
import re
import shutil
import subprocess

from . import generate

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SOURCES = os.path.join(ROOT, "bench", "workloads")

# Program -> libraries it is linked with.
PROGRAMS = {"micro": ["-lm"], "crypto": ["-lcrypto"], "database": ["-lsqlite3"], "timed": [], "x87": ["-lm"]}
SCRIPTS = ["suite", "python_loop.py", "shell_loop.sh"]
DEBIAN = "gcc libc6-dev libssl-dev libsqlite3-dev xz-utils zstd python3 dash coreutils binutils busybox-static cpio"


class Missing(Exception):
    """Something is not installed; says what and how to get it."""


def _output(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise Missing("%s failed:\n%s" % (" ".join(command), result.stderr.strip()))
    return result.stdout


def _write_if_new(path, make):
    if not os.path.exists(path):
        with open(path + ".new", "wb") as f:
            f.write(make())
        os.rename(path + ".new", path)


def workloads(out):
    """Compiles the programs and makes the inputs in the directory out, which the suite calls BENCH_FILES."""
    os.makedirs(out, exist_ok=True)
    for name, libraries in PROGRAMS.items():
        source, target = os.path.join(SOURCES, name + ".c"), os.path.join(out, name)
        newest = max(os.path.getmtime(p) for p in (source, os.path.join(SOURCES, "work.h")))
        if os.path.exists(target) and os.path.getmtime(target) > newest:
            continue
        try:
            _output("gcc", "-O2", "-Wall", "-Wextra", "-ffp-contract=off", "-o", target, source, *libraries)
        except (FileNotFoundError, Missing) as e:
            raise Missing("%s\nbench: the workloads need Debian's packages: apt-get install %s" % (e, DEBIAN))
    for name in SCRIPTS:
        shutil.copy2(os.path.join(SOURCES, name), os.path.join(out, name))
    sources = b"".join(open(p, "rb").read() for p in (generate.__file__, __file__))
    version = hashlib.sha256(sources).hexdigest()[:12]
    stamp = os.path.join(out, "inputs-" + version)
    if not os.path.exists(stamp):
        for name in os.listdir(out):
            if name.startswith("inputs-") or name in ("text", "small.i", "large.i"):
                os.remove(os.path.join(out, name))
    _write_if_new(os.path.join(out, "text"), lambda: generate.text(3 << 20))
    _write_if_new(os.path.join(out, "small.i"), lambda: generate.c_source(30))
    _write_if_new(os.path.join(out, "large.i"), lambda: generate.c_source(300))
    open(stamp, "w").close()


def libraries(path):
    """The shared libraries and the loader of a program."""
    text = subprocess.run(["ldd", path], capture_output=True, text=True).stdout
    return re.findall(r"(/\S+) \(0x", text)


def _python_modules(files):
    """Every file that the python workload's interpreter opens for its modules."""
    script = ("import runpy, sys; sys.stdout = open('/dev/null', 'w'); runpy.run_path(sys.argv[1]); sys.stdout = sys.__stdout__\n"
              "import encodings.ascii, encodings.utf_8, encodings.latin_1\n"
              "for m in list(sys.modules.values()):\n"
              "    for p in (getattr(m, '__file__', None), getattr(m, '__cached__', None)): print(p or '')")
    found = _output("/usr/bin/python3", "-I", "-S", "-c", script, os.path.join(files, "python_loop.py")).split()
    library = _output("/usr/bin/python3", "-I", "-S", "-c", "import os; print(os.__file__)").strip()
    return sorted({p for p in found + [library] if os.path.isfile(p) and p.startswith("/usr/")})


def _programs(files):
    """Host files the guest needs, at the same paths."""
    gcc = "/usr/bin/gcc"
    programs = ["/bin/dash", "/usr/bin/xz", "/usr/bin/zstd", "/usr/bin/python3", gcc, "/bin/true", "/usr/bin/tr",
                "/usr/bin/wc", "/bin/mkdir", "/bin/rm", "/usr/bin/as"]
    programs.append(_output(gcc, "-print-prog-name=cc1").strip())
    lacking = [p for p in programs if not os.path.isfile(p)]
    if lacking:
        raise Missing("not here: %s\nbench: the workloads need Debian's packages: apt-get install %s" % (" ".join(lacking), DEBIAN))
    own = [os.path.join(files, n) for n in PROGRAMS]
    needed = {l for p in programs + own for l in libraries(p)}
    return programs + sorted(needed) + _python_modules(files)


def initramfs(out, files):
    """An initramfs with the suite and all it runs, uncompressed: unpacking it is not what is measured."""
    path = os.path.join(out, "bench-initramfs")
    adds = ["%s:%s" % (p, p.lstrip("/")) for p in _programs(files)]
    adds += ["%s:bench/%s" % (os.path.join(files, n), n)
             for n in [*PROGRAMS, *SCRIPTS, "text", "small.i", "large.i"]]
    command = [os.path.join(ROOT, "scripts", "make-initramfs"), "--no-compress", "-o", path]
    for a in adds:
        command += ["--add", a]
    _output(*command)
    return path


def small_initramfs(out):
    """The initramfs of the boot times: a busybox and nothing else, as quickstart's."""
    path = os.path.join(out, "boot-initramfs.gz")
    _output(os.path.join(ROOT, "scripts", "make-initramfs"), "-o", path)
    return path


def kernel(kind):
    return _output(os.path.join(ROOT, "scripts", "fetch-kernels"), kind).strip().splitlines()[-1]


def qemu(install):
    """The path of qemu-system-x86_64; None when it is not here and not to be, or cannot be, installed."""
    found = shutil.which("qemu-system-x86_64")
    if found is None and install and shutil.which("apt-get") and os.geteuid() == 0:
        environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        for command in (["update"], ["install", "-y", "--no-install-recommends", "qemu-system-x86"]):
            subprocess.run(["apt-get", "-q", *command], env=environment, stdin=subprocess.DEVNULL,
                           stdout=subprocess.DEVNULL)
        found = shutil.which("qemu-system-x86_64")
    return found
