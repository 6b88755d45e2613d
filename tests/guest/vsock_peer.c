// The guest's half of tests/guest/vsock_test.py.
//
//   vsock_peer listen PORT      prints "listening PORT"; each connection is sent back what it sends, upper case, until it ends its half
//   vsock_peer connect PORT     to the host; sends standard input, then prints what comes back
#include <ctype.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>
#include <unistd.h>

static void fail(const char *what) {
  perror(what);
  exit(1);
}

static void write_all(int fd, const char *data, size_t n) {
  while (n != 0) {
    const ssize_t w = write(fd, data, n);
    if (w <= 0) fail("write");
    data += w;
    n -= (size_t)w;
  }
}

static void *echo(void *argument) {
  const int fd = (int)(intptr_t)argument;
  char data[16384];
  ssize_t n;
  while ((n = read(fd, data, sizeof data)) > 0) {
    for (ssize_t i = 0; i < n; i++) data[i] = (char)toupper((unsigned char)data[i]);
    write_all(fd, data, (size_t)n);
  }
  close(fd);
  return NULL;
}

int main(int argc, char **argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: vsock_peer listen|connect PORT\n");
    return 2;
  }
  struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = (unsigned)atoi(argv[2])};
  const int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
  if (fd < 0) fail("socket");
  if (strcmp(argv[1], "listen") == 0) {
    address.svm_cid = VMADDR_CID_ANY;
    if (bind(fd, (struct sockaddr *)&address, sizeof address) != 0) fail("bind");
    if (listen(fd, 64) != 0) fail("listen");
    printf("listening %s\n", argv[2]);
    fflush(stdout);
    for (;;) {
      struct sockaddr_vm peer;
      socklen_t size = sizeof peer;
      const int one = accept(fd, (struct sockaddr *)&peer, &size);
      if (one < 0) fail("accept");
      if (peer.svm_cid != VMADDR_CID_HOST) fprintf(stderr, "from %u, not the host\n", peer.svm_cid);
      pthread_t thread;
      if (pthread_create(&thread, NULL, echo, (void *)(intptr_t)one) != 0) fail("pthread_create");
      pthread_detach(thread);
    }
  }
  address.svm_cid = VMADDR_CID_HOST;
  if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0) fail("connect");
  char data[4096];
  ssize_t n;
  while ((n = read(0, data, sizeof data)) > 0) write_all(fd, data, (size_t)n);
  shutdown(fd, SHUT_WR);
  while ((n = read(fd, data, sizeof data)) > 0) write_all(1, data, (size_t)n);
  return 0;
}
