"""Programs that try to get out of the sandbox, or to harm the machine.

Each prints ESCAPED when it got what it was after, and each is bounded, so that it does no harm even
where nothing holds it: a few processes that end by themselves, some hundred megabytes, files of a
few megabytes. The places in braces are filled by the test: the parent's process id, a port and an
abstract socket it listens on, a file with a secret, and a file that must not change.
"""

MEANS = """
import ctypes, fcntl, glob, os, signal, socket, stat, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def attempt(action, *given, error=OSError):
    for one in given or (None,):
        try:
            action(one)
            print("ESCAPED", one)
        except error:
            pass
def call(*arguments):
    return libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
def calls(*rows):
    for arguments in rows:
        if call(*arguments) >= 0:
            print("ESCAPED", arguments)
"""
"""What every program begins with: actions that must fail for everything they are given, and system
calls that must.
"""

_PROGRAMS = {
    "fork_bomb": """
for _ in range(3):
    if os.fork() == 0:
        time.sleep(0.5)
    print("ESCAPED")
""",
    "fork_by_system_call": """
for arguments in ((57,), (58,), (56, 17, 0, 0, 0, 0), (435, 0, 0), (0x40000000 | 57,)):
    result = call(*arguments)
    if result == 0:
        os._exit(0)
    if result > 0:
        print("ESCAPED", arguments)
""",
    "subprocess": """
import subprocess
os.system("echo ESCAPED")
attempt(lambda _: subprocess.run(["/bin/sh", "-c", "echo ESCAPED"]))
attempt(lambda _: os.posix_spawn("/bin/echo", ["echo", "ESCAPED"], {}))
attempt(lambda _: os.popen("echo ESCAPED").read())
""",
    "exec": """
attempt(lambda _: os.execv(sys.executable, [sys.executable, "-c", "print('ESCAPED')"]))
""",
    "exec_from_memory": """
fd = os.memfd_create("x")
os.write(fd, b"#!/bin/sh\\necho ESCAPED\\n")
attempt(lambda _: os.execve(fd, ["x"], {}))
""",
    "threads_left_behind": """
import _thread, threading
def late():
    time.sleep(0.2)
    print("ESCAPED")
attempt(lambda _: threading.Thread(target=late, daemon=True).start(), error=RuntimeError)
attempt(lambda _: _thread.start_new_thread(late, ()), error=RuntimeError)
""",
    "memory": """
held = []
for _ in range(12):
    held.append(bytearray(64 << 20))
print("ESCAPED", len(held))
""",
    "memory_mapped": """
import mmap
attempt(lambda _: [mmap.mmap(-1, 64 << 20) for _ in range(12)], error=(OSError, MemoryError, ValueError))
""",
    "disk": """
written = 0
try:
    for i in range(256):
        with open(f"f{i}", "wb") as file:
            written += file.write(b"x" * (1 << 20))
    print("ESCAPED", written)
except OSError:
    pass
""",
    "deleted_files": """
held = []
try:
    for i in range(48):
        held.append(open("gone", "wb"))
        os.unlink("gone")
    for file in held:
        file.write(b"x" * (6 << 20))
        file.flush()
    print("ESCAPED")
except OSError:
    pass
""",
    "deep_folders": """
try:
    for _ in range(3000):
        os.mkdir("d", 0o300)
        os.chdir("d")
    print("ESCAPED")
except OSError:
    pass
""",
    "files": """
made = 0
try:
    for made in range(5000):
        open(f"f{made}", "w").close()
except OSError:
    pass
if made > 4000:
    print("ESCAPED")
""",
    "output": """
line = "x" * (1 << 16)
for _ in range(1 << 14):
    print(line)
print("ESCAPED")
""",
    "errors": """
for _ in range(1 << 14):
    os.write(2, b"x" * (1 << 16))
print("ESCAPED")
""",
    "report_flood": """
for fd in range(3, 32):
    try:
        for _ in range(64):
            os.write(fd, b"x" * (1 << 16))
    except OSError:
        continue
""",
    "tcp": """
attempt(lambda to: socket.create_connection(to, 0.5), ("127.0.0.1", {port}), ("1.1.1.1", 53))
""",
    "udp": """
attempt(lambda to: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", to), ("127.0.0.1", {port}))
""",
    "unix_socket": """
places = "\\0{socket}", "/run/docker.sock", "/var/run/dbus/system_bus_socket"
attempt(lambda to: socket.socket(socket.AF_UNIX).connect(to), *places)
""",
    "netlink": """
kinds = socket.AF_NETLINK, socket.AF_PACKET, socket.AF_VSOCK
attempt(lambda kind: socket.socket(kind, socket.SOCK_RAW), *kinds)
""",
    "environment": """
print(dict(os.environ))
for path in glob.glob("/proc/*/environ") + ["/proc/{pid}/environ", "/proc/1/environ", "/proc/self/environ"]:
    try:
        print(open(path, "rb").read())
    except OSError:
        pass
""",
    "other_processes": """
for name in ("cmdline", "maps", "mem"):
    paths = glob.glob(f"/proc/[0-9]*/{{name}}") + [f"/proc/{pid}/{{name}}", f"/proc/1/{{name}}"]
    attempt(lambda path: open(path, "rb").read(1), *paths)
""",
    "proc_writes": """
paths = ("/proc/sys/kernel/hostname", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger",
         "/proc/self/oom_score_adj", "/sys/kernel/uevent_helper", "/sys/fs/cgroup/x")
attempt(lambda path: open(path, "w").write("0"), *paths)
""",
    "secret": """
starts = "", "/work/..", "/proc/1/root", "/proc/self/root", "/proc/{pid}/root"
attempt(lambda start: print(open(start + "{secret}").read()), *starts)
""",
    "symlink": """
for name, target in (("result.txt", "{secret}"), ("there", "/etc/passwd"), ("up", "../../../../../..")):
    os.symlink(target, name)
attempt(lambda name: open(name).read(), "result.txt", "there", "up")
os.chdir("up")
attempt(lambda place: os.link("{secret}", place), "/work/hard")
""",
    "writes_outside": """
paths = ["{canary}", "/tmp/x", "/usr/x", "/etc/x", "/x", "/dev/shm/x", "/dev/x", "/bin/x", "/proc/x"]
attempt(lambda path: open(path, "w").write("x"), *paths, os.path.dirname(os.__file__) + "/x.pth")
""",
    "overwritten_tests": """
import json
paths = sys.executable, os.__file__, json.__file__, json.__file__.replace("json/__init__", "sitecustomize")
attempt(lambda path: open(path, "w").close(), *paths)
attempt(os.remove, *paths)
attempt(lambda path: os.chmod(path, 0o777), *paths)
""",
    "signals": """
attempt(lambda target: os.kill(target, 0), *{{{pid}, -{pid}, 2, 3}} - {{os.getpid()}})
attempt(lambda target: os.kill(target, signal.SIGKILL), -1)
""",
    "stopped_group": """
os.killpg(0, signal.SIGSTOP)
""",
    "pidfd": """
calls((434, 2, 0), (434, 3, 0), (434, {pid}, 0))
""",
    "ptrace": """
for pid in (1, 2, {pid}):
    calls((101, 16, pid, 0, 0))
    if pid != 1:
        calls((310, pid, 0, 0, 0, 0, 0))
""",
    "mounts": """
calls((165, b"none", b"/work", b"tmpfs", 0, None), (166, b"/work", 0), (161, b"/"), (155, b"/work", b"/work"),
      (272, 0x10000000), (272, 0x00020000), (272, 0x20000000), (308, 0, 0), (430, b"tmpfs", 0), (428, -100, b"/", 1))
""",
    "chroot": """
os.mkdir("d")
attempt(os.chroot, "d")
""",
    "privileges": """
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)
if libc.capset(header, data) == 0:
    print("ESCAPED capset")
current = (ctypes.c_uint32 * 6)()
libc.capget(header, current)
if any(current):
    print("ESCAPED", list(current))
if libc.prctl(47, 2, 21, 0, 0) == 0:
    print("ESCAPED ambient")
if libc.prctl(39, 0, 0, 0, 0) == 0:
    print("ESCAPED new privileges")
attempt(lambda change: change(), lambda: os.setgroups([0]), lambda: os.chown(".", 1, 1), lambda: os.setuid(1))
""",
    "limits": """
import resource
kinds, endless = ("AS", "CPU", "NPROC", "FSIZE", "NOFILE"), (resource.RLIM_INFINITY,) * 2
change = lambda kind: resource.setrlimit(getattr(resource, "RLIMIT_" + kind), endless)
attempt(change, *kinds, error=(OSError, ValueError))
""",
    "devices": """
names = "mem", "kmsg", "fuse", "kvm", "vda", "sda", "net/tun", "nvidia0"
attempt(lambda name: os.open("/dev/" + name, os.O_RDONLY), *names)
attempt(lambda name: os.mknod(name, stat.S_IFBLK | 0o600, os.makedev(254, 0)), "disk")
""",
    "shared_memory": """
calls((29, 4242, 4096, 0o1666), (68, 4242, 0o1666), (64, 4242, 1, 0o1666), (240, b"x", 0o102, 0o666, 0))
""",
    "kernel_doors": """
numbers = 425, 321, 298, 323, 250, 248, 175, 313, 246, 304, 135, 169, 170
calls(*((number, 0, 0, 0, 0, 0) for number in numbers))
""",
    "descriptors": """
pipes = 0
for fd in range(256):
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        continue
    pipes += stat.S_ISFIFO(mode)
    if stat.S_ISSOCK(mode) or stat.S_ISDIR(mode) or pipes > 3:
        print("ESCAPED", fd, oct(mode))
""",
    "terminals": """
attempt(lambda _: os.openpty())
attempt(lambda path: os.open(path, os.O_RDWR), "/dev/ptmx")
attempt(os.listdir, "/dev/pts")
""",
    "locks": """
paths = os.__file__, sys.executable, "/usr/lib/os-release", "/usr/bin"
for lock in (fcntl.flock, fcntl.lockf):
    for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH):
        attempt(lambda path: lock(os.open(path, os.O_RDONLY), kind | fcntl.LOCK_NB), *paths)
""",
    "leases": """
mine = os.open("mine", os.O_CREAT | os.O_RDONLY)
attempt(lambda asked: fcntl.fcntl(mine, *asked), (1024, fcntl.F_RDLCK), (8, os.getpid()), (10, 10), (38, 0))
attempt(lambda size: fcntl.fcntl(os.pipe()[0], 1031, size), 1 << 20)
""",
    "notifications": """
calls((253,), (294, 0), (300, 0, 0), (282, -1, 0, 8), (289, -1, 0, 8, 0))
attempt(lambda path: fcntl.fcntl(os.open(path, os.O_RDONLY), 1026, 0x80000001), "/usr/bin")
""",
    "sync": """
calls((162,), (306, os.open("/usr/bin", os.O_RDONLY)))
""",
    "mount_lists": """
request, found = (ctypes.c_uint64 * 4)(24, 0xFFFFFFFFFFFFFFFF, 0, 0), (ctypes.c_uint64 * 64)()
calls((458, request, found, 64, 0), (457, request, found, 512, 0))
""",
    "signals_by_system_call": """
own, information = os.getpid(), (ctypes.c_char * 128)()
calls((62, own, 0), (200, own, 0), (234, own, own, 0), (129, own, 10, information), (297, own, own, 10, information))
""",
    "shared_futexes": """
calls((202, (ctypes.c_uint32 * 4)(), 1, 1, None, None, 0))
""",
    "files_in_memory": """
attempt(os.memfd_create, "more")
""",
    "own_process": """
for process in ("self", "thread-self", str(os.getppid())):
    names = "environ", "cmdline", "maps", "mem", "status", "root/etc/passwd", "attr/current"
    attempt(lambda name: os.open(f"/proc/{{process}}/{{name}}", os.O_RDONLY), *names)
    attempt(lambda name: os.listdir(f"/proc/{{process}}/{{name}}"), "fd", "task", "root")
""",
    "starters": """
attempt(lambda target: os.kill(target, 0), os.getppid() or -1)
attempt(lambda target: os.sched_setaffinity(target, {{0}}), 0, os.getppid())
attempt(lambda target: os.setpriority(os.PRIO_PROCESS, target, 5), os.getppid())
calls((302, os.getppid() or 1, 7, None, (ctypes.c_uint64 * 2)()))
""",
    "socket_pairs": """
attempt(lambda kind: socket.socketpair(socket.AF_UNIX, kind), socket.SOCK_STREAM, socket.SOCK_DGRAM)
attempt(lambda _: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"x", "\\0{socket}"))
""",
    "shared_folders": """
for folder in ("/dev/shm", "/tmp", "/var/tmp", "/run", "/home", os.path.dirname("{canary}")):
    attempt(os.listdir, folder)
    attempt(lambda path: os.mkdir(path), folder + "/assay-escape")
    attempt(lambda path: os.open(path, os.O_TMPFILE | os.O_RDWR), folder)
""",
    "neighbours": """
for place in ("..", "../..", "/"):
    try:
        names = set(os.listdir(place))
    except OSError:
        continue
    if names & {{"boot", "home", "var"}} or any("assay" in name for name in names):
        print("ESCAPED", names)
attempt(lambda path: os.mkdir(path), "../assay-escape")
attempt(lambda path: os.rename(os.getcwd(), path), os.getcwd() + "-moved")
""",
    "links_and_renames": """
open("mine", "w").write("forged")
attempt(lambda path: os.link(path, "linked"), "{canary}", "{secret}", os.__file__, "/etc/passwd")
attempt(lambda path: os.rename(path, "moved"), "{canary}", "{secret}")
attempt(lambda path: os.replace("mine", path), "{canary}", "/tmp/assay-escape", "/dev/shm/assay-escape")
attempt(lambda path: os.link("mine", path), "/tmp/assay-escape", "{canary}-linked")
attempt(lambda path: os.symlink("mine", path), "/tmp/assay-escape", "{canary}-linked")
attempt(os.remove, "{canary}", "{secret}")
""",
    "truncation": """
attempt(lambda path: os.truncate(path, 0), "{canary}", "{secret}")
attempt(lambda path: os.open(path, os.O_RDONLY | os.O_TRUNC), "{canary}", "{secret}")
attempt(lambda path: os.truncate(path, os.path.getsize(path)), os.__file__, sys.executable)
""",
    "metadata": """
paths = "{canary}", "{secret}", os.path.dirname("{canary}"), os.__file__, "/etc/passwd"
attempt(lambda path: os.chmod(path, os.stat(path).st_mode), *paths)
attempt(lambda path: os.fchmod(os.open(path, os.O_RDONLY), 0o644), os.__file__)
attempt(lambda path: os.utime(path), *paths)
attempt(lambda path: os.setxattr(path, "user.x", b"x"), *paths)
attempt(lambda path: os.chown(path, os.getuid(), -1), *paths)
""",
    "devices_and_terminals": """
attempt(lambda request: fcntl.ioctl(os.open("/dev/urandom", os.O_RDONLY), request, bytes(8)), 0x80045200, 0x5413 + 1)
attempt(lambda request: fcntl.ioctl(1, request, bytes(8)), 0x5412, 0x5410, 0x540E)
""",
    "rings": """
calls((425, 8, (ctypes.c_uint64 * 16)()), (426, 0, 1, 0, 0, 0, 0), (427, 0, 0, 0, 0))
""",
    "new_rules": """
attributes = (ctypes.c_uint64 * 3)(1 << 2, 0, 0)
calls((444, attributes, 8, 0), (445, 3, 1, attributes, 0), (446, 3, 0))
""",
    "installed_packages": """
import sysconfig
for folder, _, names in os.walk("/usr"):
    if folder.endswith("-packages") and names:
        print("ESCAPED", folder)
places = glob.glob(sysconfig.get_path("stdlib") + "/*-packages/*")
library = os.path.dirname(os.__file__)
attempt(lambda path: os.open(path, os.O_RDONLY), *places, library + "/site-packages/README.txt")
""",
}
ESCAPES = {name: MEANS + program for name, program in _PROGRAMS.items()}
