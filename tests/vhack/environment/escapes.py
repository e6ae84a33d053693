"""Programs that try to get out of the sandbox, or to harm the machine.

Each prints ESCAPED when it got what it was after, and each is bounded, so that it does no harm even where nothing
holds it: a few processes that end by themselves, some hundred megabytes, files of a few megabytes. The places in
braces are filled by the test: the parent's process id, a port and an abstract socket it listens on, a file with a
secret, and a file that must not change.
"""

SYSCALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    return libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
"""

ESCAPES = {
    "fork_bomb": """
import os, time
for _ in range(3):
    if os.fork() == 0:
        time.sleep(0.5)
    print("ESCAPED")
""",
    "fork_by_system_call": SYSCALL
    + """
import os, time
for arguments in ((57,), (58,), (56, 17, 0, 0, 0, 0), (435, 0, 0), (0x40000000 | 57,)):
    result = call(*arguments)
    if result == 0:
        os._exit(0)
    if result > 0:
        print("ESCAPED", arguments)
""",
    "subprocess": """
import os, subprocess
for start in (lambda: subprocess.run(["/bin/sh", "-c", "echo ESCAPED"]), lambda: os.system("echo ESCAPED"),
              lambda: os.posix_spawn("/bin/echo", ["echo", "ESCAPED"], {}), lambda: os.popen("echo ESCAPED").read()):
    try:
        start()
    except OSError:
        pass
""",
    "exec": """
import os, sys
try:
    os.execv(sys.executable, [sys.executable, "-c", "print('ESCAPED')"])
except OSError:
    pass
""",
    "exec_from_memory": """
import os
fd = os.memfd_create("x")
os.write(fd, b"#!/bin/sh\\necho ESCAPED\\n")
try:
    os.execve(fd, ["x"], {})
except OSError:
    pass
""",
    "threads_left_behind": """
import _thread, threading, time
def late():
    time.sleep(0.2)
    print("ESCAPED")
for start in (lambda: threading.Thread(target=late, daemon=True).start(), lambda: _thread.start_new_thread(late, ())):
    try:
        start()
        print("ESCAPED")
    except RuntimeError:
        pass
""",
    "memory": """
held = []
for _ in range(12):
    held.append(bytearray(64 << 20))
print("ESCAPED", len(held))
""",
    "memory_mapped": """
import mmap
try:
    maps = [mmap.mmap(-1, 64 << 20) for _ in range(12)]
    print("ESCAPED")
except (OSError, MemoryError, ValueError):
    pass
""",
    "disk": """
written = 0
try:
    for i in range(32):
        with open(f"f{i}", "wb") as file:
            written += file.write(b"x" * (1 << 20))
except OSError:
    pass
if written > 16 << 20:
    print("ESCAPED", written)
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
import os
for _ in range(1 << 14):
    os.write(2, b"x" * (1 << 16))
print("ESCAPED")
""",
    "report_flood": """
import os
for fd in range(3, 32):
    try:
        for _ in range(64):
            os.write(fd, b"x" * (1 << 16))
    except OSError:
        continue
""",
    "tcp": """
import socket
for address in (("127.0.0.1", {port}), ("1.1.1.1", 53)):
    try:
        socket.create_connection(address, 0.5)
        print("ESCAPED")
    except OSError:
        pass
""",
    "udp": """
import socket
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", {port}))
    print("ESCAPED")
except OSError:
    pass
""",
    "unix_socket": """
import socket
for address in ("\\0{socket}", "/run/docker.sock", "/var/run/dbus/system_bus_socket"):
    try:
        socket.socket(socket.AF_UNIX).connect(address)
        print("ESCAPED")
    except OSError:
        pass
""",
    "netlink": """
import socket
for kind in (socket.AF_NETLINK, socket.AF_PACKET, socket.AF_VSOCK):
    try:
        socket.socket(kind, socket.SOCK_RAW)
        print("ESCAPED")
    except OSError:
        pass
""",
    "environment": """
import glob, os
print(dict(os.environ))
for path in glob.glob("/proc/*/environ") + ["/proc/{pid}/environ", "/proc/1/environ", "/proc/self/environ"]:
    try:
        print(open(path, "rb").read())
    except OSError:
        pass
""",
    "command_line": """
import glob
for path in glob.glob("/proc/*/cmdline") + ["/proc/{pid}/cmdline", "/proc/1/cmdline"]:
    try:
        text = open(path, "rb").read()
    except OSError:
        continue
    if b"pytest" in text or b"control" in text:
        print("ESCAPED", text)
""",
    "process_memory": """
import glob, os
for path in glob.glob("/proc/[0-9]*/mem") + glob.glob("/proc/[0-9]*/maps"):
    if f"/{{os.getpid()}}/" in path:
        continue
    try:
        open(path, "rb").read(1)
        print("ESCAPED", path)
    except OSError:
        pass
""",
    "proc_writes": """
for path in ("/proc/sys/kernel/hostname", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger",
             "/proc/self/oom_score_adj", "/sys/kernel/uevent_helper", "/sys/fs/cgroup/x"):
    try:
        open(path, "w").write("0")
        print("ESCAPED", path)
    except OSError:
        pass
""",
    "secret": """
import os
for start in ("", "/work/..", "/proc/1/root", "/proc/self/root", "/proc/{pid}/root"):
    path = start + "{secret}"
    try:
        print(open(path).read())
    except OSError:
        pass
""",
    "symlink": """
import os
for name, target in (("result.txt", "{secret}"), ("there", "/etc/passwd"), ("up", "../../../../../..")):
    os.symlink(target, name)
    try:
        print("ESCAPED" if open(name).read() else "")
    except OSError:
        pass
os.chdir("up")
try:
    os.link("{secret}", "/work/hard")
    print("ESCAPED")
except OSError:
    pass
""",
    "writes_outside": """
import os, sys
paths = ["{canary}", "/tmp/x", "/usr/x", "/etc/x", "/x", "/dev/shm/x", "/dev/x", "/bin/x", "/proc/x"]
paths.append(os.path.dirname(os.__file__) + "/x.pth")
for path in paths:
    try:
        open(path, "w").write("x")
        print("ESCAPED", path)
    except OSError:
        pass
""",
    "overwritten_tests": """
import json, os, sys
for path in (sys.executable, os.__file__, json.__file__, json.__file__.replace("json/__init__", "sitecustomize")):
    for change in (lambda: open(path, "w").close(), lambda: os.remove(path), lambda: os.chmod(path, 0o777)):
        try:
            change()
            print("ESCAPED", path)
        except OSError:
            pass
""",
    "signals": """
import os, signal
for target in {{{pid}, -{pid}, 2, 3}} - {{os.getpid()}}:
    try:
        os.kill(target, 0)
        print("ESCAPED", target)
    except OSError:
        pass
try:
    os.kill(-1, signal.SIGKILL)
except OSError:
    pass
""",
    "stopped_group": """
import os, signal
os.killpg(0, signal.SIGSTOP)
""",
    "pidfd": SYSCALL
    + """
import os
for pid in (2, 3, {pid}):
    fd = call(434, pid, 0)
    if fd >= 0:
        print("ESCAPED", pid)
""",
    "ptrace": SYSCALL
    + """
for pid in (1, 2, {pid}):
    if call(101, 16, pid, 0, 0) == 0:
        print("ESCAPED ptrace", pid)
    if pid != 1 and call(310, pid, 0, 0, 0, 0, 0) >= 0:
        print("ESCAPED process_vm_readv", pid)
""",
    "mounts": SYSCALL
    + """
attempts = ((165, b"none", b"/work", b"tmpfs", 0, None), (166, b"/work", 0), (161, b"/"), (155, b"/work", b"/work"),
            (272, 0x10000000), (272, 0x00020000), (272, 0x20000000), (308, 0, 0), (430, b"tmpfs", 0),
            (428, -100, b"/", 1))
for arguments in attempts:
    if call(*arguments) >= 0:
        print("ESCAPED", arguments)
""",
    "chroot": """
import os
try:
    os.mkdir("d")
    os.chroot("d")
    print("ESCAPED")
except OSError:
    pass
""",
    "privileges": SYSCALL
    + """
import os
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
for change in (lambda: os.setgroups([0]), lambda: os.chown(".", 1, 1), lambda: os.setuid(1)):
    try:
        change()
        print("ESCAPED")
    except OSError:
        pass
""",
    "limits": """
import resource
for name in ("AS", "CPU", "NPROC", "FSIZE", "NOFILE"):
    kind = getattr(resource, "RLIMIT_" + name)
    try:
        resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print("ESCAPED", kind)
    except (OSError, ValueError):
        pass
""",
    "devices": """
import os, stat
for path in ("/dev/mem", "/dev/kmsg", "/dev/fuse", "/dev/kvm", "/dev/vda", "/dev/sda", "/dev/net/tun", "/dev/nvidia0"):
    try:
        os.open(path, os.O_RDONLY)
        print("ESCAPED", path)
    except OSError:
        pass
try:
    os.mknod("disk", stat.S_IFBLK | 0o600, os.makedev(254, 0))
    print("ESCAPED")
except OSError:
    pass
""",
    "shared_memory": SYSCALL
    + """
for arguments in ((29, 4242, 4096, 0o1666), (68, 4242, 0o1666), (64, 4242, 1, 0o1666), (240, b"x", 0o102, 0o666, 0)):
    if call(*arguments) >= 0:
        print("ESCAPED", arguments)
""",
    "kernel_doors": SYSCALL
    + """
for number in (425, 321, 298, 323, 250, 248, 175, 313, 246, 304, 135, 169, 170):
    if call(number, 0, 0, 0, 0, 0) >= 0:
        print("ESCAPED", number)
""",
    "descriptors": """
import os, stat
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
import os
for attempt in (os.openpty, lambda: os.open("/dev/ptmx", os.O_RDWR), lambda: os.listdir("/dev/pts")):
    try:
        attempt()
        print("ESCAPED")
    except OSError:
        pass
""",
    "locks": """
import fcntl, os, sys
for path in (os.__file__, sys.executable, "/usr/lib/os-release", "/usr/bin"):
    for lock in (fcntl.flock, fcntl.lockf):
        for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            try:
                descriptor = os.open(path, os.O_RDONLY)
                lock(descriptor, kind | fcntl.LOCK_NB)
                print("ESCAPED", path)
            except OSError:
                pass
""",
    "leases": """
import fcntl, os
descriptor = os.open("mine", os.O_CREAT | os.O_RDONLY)
for command, argument in ((1024, fcntl.F_RDLCK), (8, os.getpid()), (10, 10), (1031, 1 << 20), (38, 0)):
    try:
        fcntl.fcntl(descriptor if command != 1031 else os.pipe()[0], command, argument)
        print("ESCAPED", command)
    except OSError:
        pass
""",
    "notifications": SYSCALL
    + """
import fcntl, os
for arguments in ((253,), (294, 0), (300, 0, 0), (282, -1, 0, 8), (289, -1, 0, 8, 0)):
    if call(*arguments) >= 0:
        print("ESCAPED", arguments)
try:
    fcntl.fcntl(os.open("/usr/bin", os.O_RDONLY), 1026, 0x80000001)
    print("ESCAPED")
except OSError:
    pass
""",
    "sync": SYSCALL
    + """
import os
for arguments in ((162,), (306, os.open("/usr/bin", os.O_RDONLY))):
    if call(*arguments) >= 0:
        print("ESCAPED", arguments)
""",
    "mount_lists": SYSCALL
    + """
request = (ctypes.c_uint64 * 4)(24, 0xFFFFFFFFFFFFFFFF, 0, 0)
found = (ctypes.c_uint64 * 64)()
if call(458, request, found, 64, 0) >= 0:
    print("ESCAPED")
if call(457, request, found, 512, 0) >= 0:
    print("ESCAPED")
""",
    "signals_by_system_call": SYSCALL
    + """
import os
own, information = os.getpid(), (ctypes.c_char * 128)()
for arguments in ((62, own, 0), (200, own, 0), (234, own, own, 0), (129, own, 10, information),
                  (297, own, own, 10, information)):
    if call(*arguments) >= 0:
        print("ESCAPED", arguments)
""",
    "shared_futexes": SYSCALL
    + """
if call(202, (ctypes.c_uint32 * 4)(), 1, 1, None, None, 0) >= 0:
    print("ESCAPED")
""",
    "files_in_memory": """
import os
try:
    os.memfd_create("more")
    print("ESCAPED")
except OSError:
    pass
""",
}
