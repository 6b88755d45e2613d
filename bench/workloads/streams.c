/* Bytes through one or several TCP connections, as fast as they go: the guest's side and the host's of bench/net.
 *
 *   streams serve                         listens on 127.0.0.1 (or ADDRESS), prints its port; serves until its input ends
 *   streams send|receive ADDRESS PORT MIB CONNECTIONS
 *
 * prints "DIRECTION seconds S mib M". The client says in a first byte what it wants ('s' or 'r') and how many MiB.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { kBlock = 256 * 1024 };
static char block[kBlock];

static void die(const char* what) {
  perror(what);
  exit(1);
}

static void push(int fd, uint64_t bytes) {
  while (bytes > 0) {
    const ssize_t n = write(fd, block, bytes < kBlock ? bytes : kBlock);
    if (n <= 0) die("write");
    bytes -= (uint64_t)n;
  }
}

static void pull(int fd, uint64_t bytes) {
  while (bytes > 0) {
    const ssize_t n = read(fd, block, bytes < kBlock ? bytes : kBlock);
    if (n <= 0) die("read");
    bytes -= (uint64_t)n;
  }
}

static int serve(const char* address) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in a = {.sin_family = AF_INET};
  inet_pton(AF_INET, address, &a.sin_addr);
  socklen_t size = sizeof a;
  if (bind(fd, (struct sockaddr*)&a, size) != 0 || listen(fd, 64) != 0) die("listen");
  getsockname(fd, (struct sockaddr*)&a, &size);
  printf("%d\n", ntohs(a.sin_port));
  fflush(stdout);
  for (;;) {
    struct pollfd p[2] = {{fd, POLLIN, 0}, {0, POLLIN, 0}};
    poll(p, 2, -1);
    if (p[1].revents != 0) return 0;
    const int c = accept(fd, NULL, NULL);
    if (c < 0) continue;
    if (fork() == 0) {
      char what[5];
      pull(c, 1);
      what[0] = block[0];
      pull(c, 4);
      uint32_t mib;
      memcpy(&mib, block, 4);
      if (what[0] == 's') {
        pull(c, (uint64_t)mib << 20);
        push(c, 1); /* all of it is here */
      } else {
        push(c, (uint64_t)mib << 20);
      }
      _exit(0);
    }
    close(c);
    while (waitpid(-1, NULL, WNOHANG) > 0) {
    }
  }
}

static void talk(char what, const char* address, int port, uint32_t mib) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
  inet_pton(AF_INET, address, &a.sin_addr);
  if (connect(fd, (struct sockaddr*)&a, sizeof a) != 0) die("connect");
  block[0] = what;
  memcpy(block + 1, &mib, 4);
  push(fd, 5);
  if (what == 's') {
    push(fd, (uint64_t)mib << 20);
    pull(fd, 1);
  } else {
    pull(fd, (uint64_t)mib << 20);
  }
  close(fd);
}

int main(int argc, char** argv) {
  if (argc >= 2 && strcmp(argv[1], "serve") == 0) return serve(argc > 2 ? argv[2] : "127.0.0.1");
  if (argc != 6) return 2;
  const int connections = atoi(argv[5]);
  const uint32_t each = (uint32_t)(atoi(argv[4]) / connections);
  struct timespec begin, end;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  for (int i = 0; i < connections; i++) {
    if (fork() == 0) {
      talk(argv[1][0], argv[2], atoi(argv[3]), each);
      _exit(0);
    }
  }
  int status, failed = 0;
  while (wait(&status) > 0) failed |= status;
  clock_gettime(CLOCK_MONOTONIC, &end);
  if (failed) return 1;
  printf("%s seconds %.3f mib %u\n", argv[1], (double)(end.tv_sec - begin.tv_sec) + (double)(end.tv_nsec - begin.tv_nsec) / 1e9,
         each * (uint32_t)connections);
  return 0;
}
