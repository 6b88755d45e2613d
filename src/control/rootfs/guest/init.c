/* The first process of a guest that `ring3 run --rootfs` boots: mounts the shared root, runs one command in it, tells how
 * that ended, powers off. Static, and all of its initramfs but for kernel modules.
 *
 * /modules/ORDER       the modules' file names, one a line
 * ring3-control        a share of files: args, env, cwd, mode ("tty ROWS COLUMNS" or "files", then "ro" or "rw"); net, when the first card is
 *                      on the user network ("ADDRESS PREFIX GATEWAY NAMESERVER"); stdin, stdout, stderr; what is written: started
 *                      (empty), status (a number), error (one line)
 * ring3-root           the share that becomes the root
 * /dev/ttyS0           with "files": a byte is the number of a signal for the command
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static int control = -1; /* the control share's directory */

static void end(void) {
  sync();
  reboot(RB_POWER_OFF);
  for (;;) pause();
}

static void put_file(const char *name, const char *text) {
  int fd = control < 0 ? -1 : openat(control, name, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  if (fd < 0) return;
  if (write(fd, text, strlen(text)) < 0) dprintf(2, "ring3-init: cannot write %s\n", name);
  close(fd);
}

static void die(const char *format, ...) {
  char text[512];
  int code = errno;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (code != 0) snprintf(text + strlen(text), sizeof text - strlen(text), ": %s", strerror(code));
  dprintf(2, "ring3-init: %s\n", text);
  put_file("error", text);
  end();
}

/* A whole small file, with a NUL behind it. */
static char *get_file(int directory, const char *name, size_t *size) {
  int fd = openat(directory, name, O_RDONLY | O_CLOEXEC);
  size_t used = 0, room = 4096;
  char *text = malloc(room + 1);
  if (fd < 0 || text == NULL) return NULL;
  for (;;) {
    ssize_t got = read(fd, text + used, room - used);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    used += (size_t)got;
    if (used == room) {
      room *= 2;
      text = realloc(text, room + 1);
      if (text == NULL) return NULL;
    }
  }
  close(fd);
  text[used] = 0;
  if (size != NULL) *size = used;
  return text;
}

/* Modules need one another: what fails for want of another one is tried again. */
static void load_modules(void) {
  char *list = get_file(AT_FDCWD, "/modules/ORDER", NULL);
  if (list == NULL) return;
  for (int round = 0, failed = 1; failed != 0 && round < 8; round++) {
    char *copy = strdup(list), *rest = copy;
    failed = 0;
    for (char *name; (name = strsep(&rest, "\n")) != NULL;) {
      char path[300];
      size_t length = strlen(name);
      if (length == 0) continue;
      snprintf(path, sizeof path, "/modules/%s", name);
      int fd = open(path, O_RDONLY | O_CLOEXEC);
      int flags = length > 3 && strcmp(name + length - 3, ".ko") == 0 ? 0 : 4 /* MODULE_INIT_COMPRESSED_FILE */;
      if (fd < 0) continue;
      if (syscall(SYS_finit_module, fd, "", flags) != 0 && errno != EEXIST) failed++;
      close(fd);
    }
    free(copy);
  }
  free(list);
}

static void mount_in(const char *type, const char *where, unsigned long flags, const char *data) {
  mkdir(where, 0755); /* there already, or the root is read-only */
  mount(type, where, type, flags, data);
}

/* One of ours over what the root has; what it has stays as it is. */
static void cover_file(const char *path, const char *content) {
  char target[PATH_MAX], link[PATH_MAX];
  ssize_t length = readlink(path, link, sizeof link - 1);
  if (length > 0) link[length] = 0;
  if (realpath(path, target) == NULL) {
    /* A link into what is empty here, as systemd-resolved's: that file can be made. */
    const char *below = length <= 0 ? NULL : strncmp(link, "/run/", 5) == 0 ? link : strncmp(link, "../run/", 7) == 0 ? link + 2 : NULL;
    if (below == NULL || strstr(below, "..") != NULL) return;
    snprintf(target, sizeof target, "%s", below);
    for (char *slash = target + 5; (slash = strchr(slash, '/')) != NULL; slash++) {
      *slash = 0;
      mkdir(target, 0755);
      *slash = '/';
    }
    int fd = open(target, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd >= 0 && write(fd, content, strlen(content)) < 0) errno = 0;
    if (fd >= 0) close(fd);
    return;
  }
  int fd = open("/run/ring3-cover", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return;
  if (write(fd, content, strlen(content)) < 0) errno = 0;
  close(fd);
  mount("/run/ring3-cover", target, NULL, MS_BIND, NULL);
  unlink("/run/ring3-cover"); /* the mount keeps it */
}

static int interface_up(int fd, const char *name) {
  struct ifreq request = {0};
  snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
  if (ioctl(fd, SIOCGIFFLAGS, &request) != 0) return -1;
  request.ifr_flags |= IFF_UP;
  return ioctl(fd, SIOCSIFFLAGS, &request);
}

static struct sockaddr ipv4(in_addr_t address) {
  struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = address};
  struct sockaddr any;
  memcpy(&any, &in, sizeof any);
  return any;
}

/* The loopback, and the first card as the user network's DHCP would have it. What goes wrong here the command sees by itself. */
static void set_up_network(const char *settings) {
  char address[16], gateway[16], nameserver[16], text[64];
  unsigned prefix = 0;
  int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return;
  interface_up(fd, "lo");
  if (settings != NULL && sscanf(settings, "%15s %u %15s %15s", address, &prefix, gateway, nameserver) == 4 && prefix > 0 && prefix <= 32) {
    struct ifreq request = {0};
    struct rtentry route = {0};
    snprintf(request.ifr_name, sizeof request.ifr_name, "eth0");
    request.ifr_addr = ipv4(inet_addr(address));
    int fine = ioctl(fd, SIOCSIFADDR, &request) == 0;
    request.ifr_addr = ipv4(htonl(~0u << (32 - prefix)));
    fine = fine && ioctl(fd, SIOCSIFNETMASK, &request) == 0 && interface_up(fd, "eth0") == 0;
    route.rt_dst = ipv4(INADDR_ANY);
    route.rt_genmask = ipv4(INADDR_ANY);
    route.rt_gateway = ipv4(inet_addr(gateway));
    route.rt_flags = RTF_UP | RTF_GATEWAY;
    fine = fine && ioctl(fd, SIOCADDRT, &route) == 0;
    snprintf(text, sizeof text, "nameserver %s\n", nameserver);
    if (fine) cover_file("/etc/resolv.conf", text);
  }
  close(fd);
  errno = 0;
}

/* The working directory lies below a place that gets a file system of its own: it is put back there. */
static void keep_directory(int directory, const char *path) {
  char at[PATH_MAX], from[64];
  if (directory < 0 || snprintf(at, sizeof at, "%s", path) >= (int)sizeof at) return;
  for (char *slash = at + 1; (slash = strchr(slash, '/')) != NULL; slash++) {
    *slash = 0;
    mkdir(at, 0755);
    *slash = '/';
  }
  mkdir(at, 0755);
  snprintf(from, sizeof from, "/proc/self/fd/%d", directory);
  mount(from, at, NULL, MS_BIND, NULL);
  close(directory);
}

static int is_below(const char *path, const char *top) { return strncmp(path, top, strlen(top)) == 0 && path[strlen(top)] == '/'; }

/* Signals of the host's for the command and its children. */
static void relay_signals(pid_t command) {
  struct termios raw;
  int fd = open("/dev/ttyS0", O_RDWR | O_NOCTTY | O_CLOEXEC);
  if (fd < 0) _exit(0);
  if (tcgetattr(fd, &raw) == 0) {
    cfmakeraw(&raw);
    raw.c_oflag |= OPOST | ONLCR; /* the kernel's messages go here too */
    tcsetattr(fd, TCSANOW, &raw);
  }
  for (;;) {
    unsigned char number;
    ssize_t got = read(fd, &number, 1);
    if (got < 0 && errno == EINTR) continue;
    if (got != 1) _exit(0);
    if (number > 0 && number < 32) kill(-command, number);
  }
}

/* A vector of the NUL-separated strings in text. */
static char **split(char *text, size_t size) {
  size_t count = 0;
  for (size_t i = 0; i < size; i++) count += text[i] == 0;
  char **vector = calloc(count + 1, sizeof *vector);
  if (vector == NULL) return NULL;
  for (size_t i = 0; i < count; i++) {
    vector[i] = text;
    text += strlen(text) + 1;
  }
  return vector;
}

/* stdin grows while the host has more to say; a file stdin.end says that that was all. */
static void relay_input(int pipe_end) {
  int fd = openat(control, "stdin", O_RDONLY | O_CLOEXEC);
  char buffer[65536];
  off_t at = 0;
  if (fd < 0) _exit(0);
  for (;;) {
    int ended = faccessat(control, "stdin.end", F_OK, 0) == 0; /* asked first: what came before it is read below */
    ssize_t got;
    while ((got = pread(fd, buffer, sizeof buffer, at)) > 0) {
      at += got;
      for (ssize_t done = 0; done < got;) {
        ssize_t wrote = write(pipe_end, buffer + done, (size_t)(got - done));
        if (wrote <= 0) _exit(0);
        done += wrote;
      }
    }
    if (ended) _exit(0);
    struct timespec pause_for = {0, 20000000};
    nanosleep(&pause_for, NULL);
  }
}

static void run_command(const char *cwd, char **args, int tty, const int *files) {
  setsid();
  if (tty) {
    int fd = open("/dev/ttyS0", O_RDWR);
    if (fd < 0) fd = open("/dev/console", O_RDWR);
    ioctl(fd, TIOCSCTTY, 1);
    for (int i = 0; i < 3; i++) dup2(fd, i);
    if (fd > 2) close(fd);
  } else {
    for (int i = 0; i < 3; i++) dup2(files[i], i);
  }
  signal(SIGPIPE, SIG_DFL);
  if (chdir(cwd) != 0 && chdir("/") != 0) _exit(126);
  execvp(args[0], args);
  int code = errno;
  dprintf(2, "ring3: cannot run %s: %s\n", args[0], strerror(code));
  _exit(code == ENOENT ? 127 : 126);
}

int main(void) {
  errno = 0;
  mkdir("/proc", 0755), mkdir("/dev", 0755), mkdir("/control", 0755), mkdir("/newroot", 0755);
  mount("devtmpfs", "/dev", "devtmpfs", 0, "");
  int console = open("/dev/console", O_RDWR);
  for (int i = 0; console >= 0 && i < 3; i++) dup2(console, i);
  load_modules();
  errno = 0;
  if (mount("ring3-control", "/control", "virtiofs", 0, "") != 0) {
    die("cannot mount the control share (does the kernel have virtio_pci and virtiofs?)");
  }
  control = open("/control", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  size_t args_size = 0, env_size = 0;
  char *mode = get_file(control, "mode", NULL), *cwd = get_file(control, "cwd", NULL);
  char *args_text = get_file(control, "args", &args_size), *env_text = get_file(control, "env", &env_size);
  if (mode == NULL || cwd == NULL || args_text == NULL || env_text == NULL) die("the control share lacks files");
  char **args = split(args_text, args_size), **env = split(env_text, env_size);
  char *net = get_file(control, "net", NULL);
  int tty = strncmp(mode, "tty", 3) == 0, read_only = strstr(mode, " ro") != NULL;
  if (args == NULL || env == NULL || args[0] == NULL) die("no command");

  if (mount("ring3-root", "/newroot", "virtiofs", read_only ? MS_RDONLY : 0, "") != 0) die("cannot mount the root share");
  int files[3] = {-1, openat(control, "stdout", O_WRONLY | O_APPEND | O_CLOEXEC), openat(control, "stderr", O_WRONLY | O_APPEND | O_CLOEXEC)};
  int input[2] = {-1, -1};
  if (!tty) {
    if (files[1] < 0 || files[2] < 0 || pipe2(input, O_CLOEXEC) != 0) die("cannot open the command's output");
    files[0] = input[0];
    if (fork() == 0) {
      close(input[0]);
      signal(SIGPIPE, SIG_IGN);
      relay_input(input[1]);
    }
    close(input[1]);
  }
  umount("/dev");
  if (chdir("/newroot") != 0 || mount(".", "/", NULL, MS_MOVE, NULL) != 0 || chroot(".") != 0) die("cannot enter the root share");
  umask(022);
  int here = is_below(cwd, "/tmp") || is_below(cwd, "/run") || is_below(cwd, "/dev") ? open(cwd, O_PATH | O_DIRECTORY | O_CLOEXEC) : -1;
  mount_in("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
  mount_in("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
  mount_in("devtmpfs", "/dev", MS_NOSUID, "");
  mount_in("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "mode=0620,ptmxmode=0666");
  mount_in("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777");
  mount_in("tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=0755");
  mount_in("tmpfs", "/tmp", MS_NOSUID | MS_NODEV, "mode=1777");
  keep_directory(here, cwd);
  /* What a kernel's tests and tools look for; a kernel may lack any of them. */
  mount("debugfs", "/sys/kernel/debug", "debugfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
  mount("tracefs", "/sys/kernel/tracing", "tracefs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
  mount("securityfs", "/sys/kernel/security", "securityfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
  mount("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
  mount("bpf", "/sys/fs/bpf", "bpf", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0700");
  set_up_network(net);
  if (symlink("/proc/self/fd", "/dev/fd") == 0) {
    if (symlink("fd/0", "/dev/stdin") != 0 || symlink("fd/1", "/dev/stdout") != 0 || symlink("fd/2", "/dev/stderr") != 0) errno = 0;
  }
  if (sethostname("ring3", 5) != 0) errno = 0;
  clearenv();
  for (char **e = env; *e != NULL; e++) putenv(*e);
  if (tty) {
    unsigned short rows = 0, columns = 0;
    int fd = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
    if (fd >= 0 && sscanf(mode, "tty %hu %hu", &rows, &columns) == 2 && rows != 0) {
      struct winsize size = {rows, columns, 0, 0};
      ioctl(fd, TIOCSWINSZ, &size);
    }
    /* Tells a waiting ring3 that the boot is over, and leaves no trace on the screen. */
    if (fd >= 0 && write(fd, "ring3-guest: ready\r\033[K", 22) < 0) errno = 0;
    if (fd >= 0) close(fd);
  }
  pid_t child = fork();
  if (child < 0) die("fork");
  if (child == 0) run_command(cwd, args, tty, files);
  if (!tty && fork() == 0) relay_signals(child);
  put_file("started", "");
  for (int i = 0; i < 3; i++) {
    if (files[i] >= 0) close(files[i]);
  }
  for (;;) {
    int status;
    pid_t ended = wait(&status);
    if (ended < 0 && errno != EINTR) die("wait");
    if (ended != child) continue;
    char number[16];
    snprintf(number, sizeof number, "%d", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    if (tty) {
      int fd = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
      if (fd >= 0) tcdrain(fd);
    }
    put_file("status", number);
    end();
  }
}
