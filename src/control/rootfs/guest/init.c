/* The first process of a guest that `ring3 run --rootfs` boots: mounts the shared root, runs one command in it, tells how
 * that ended, powers off. Static, and all of its initramfs but for kernel modules.
 *
 * /modules/ORDER       the modules' file names, one a line
 * ring3-control        a share of files: args, env, cwd, mode ("tty ROWS COLUMNS" or "files", then "ro" or "rw"); stdin, stdout,
 *                      stderr; what is written: status (a number), error (one line)
 * ring3-root           the share that becomes the root
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
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
  mount_in("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
  mount_in("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
  mount_in("devtmpfs", "/dev", MS_NOSUID, "");
  mount_in("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "mode=0620,ptmxmode=0666");
  mount_in("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777");
  mount_in("tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=0755");
  mount_in("tmpfs", "/tmp", MS_NOSUID | MS_NODEV, "mode=1777");
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
